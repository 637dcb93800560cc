"""Grafana and Prometheus: what is drawn is exported, and every expression parses."""

from typing import Any

import promql_parser
import pytest

from pipeline.tracking.gauges import GAUGES, STATES
from tests.infra.documents import BUILT_IN, INFRA, VLLM, files, pod_templates, read_json, read_yaml


def dashboard() -> dict[str, Any]:
    return read_json(INFRA / "monitoring" / "adsc.json")


def metrics(expression: str) -> set[str]:
    """Names of the metrics in a PromQL expression."""
    found: set[str] = set()

    def look(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.add(node.name)
        return True

    promql_parser.walk(promql_parser.parse(expression), look)
    return found


def test_every_gauge_is_drawn_and_every_metric_is_exported() -> None:
    drawn = {
        name
        for panel in dashboard()["panels"]
        for target in panel["targets"]
        for name in metrics(target["expr"])
    }
    exported = {f"ray_{name}" for name in GAUGES}
    assert drawn == exported | BUILT_IN | VLLM


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    found = dashboard()
    panels = found["panels"]
    assert found["uid"] == "adsc" and found["title"] and found["schemaVersion"] >= 39
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places)), "panels overlap"
    assert max(x for x, _ in places) < 24
    source = read_yaml(INFRA / "monitoring" / "datasource.yml")[0]["datasources"][0]["uid"]
    assert {target["datasource"]["uid"] for panel in panels for target in panel["targets"]} == {
        source
    }
    shown = panels[0]["fieldConfig"]["defaults"]["mappings"][0]["options"]
    assert [shown[str(number)]["text"] for number in range(len(STATES))] == list(STATES)


def test_prometheus_finds_what_the_manifests_start() -> None:
    kept = read_yaml(INFRA / "monitoring" / "prometheus.kubernetes.yml")[0]["scrape_configs"][0]
    label, port = kept["relabel_configs"][0]["regex"].split(";")
    ray_pods = [(name, it) for name, it in pod_templates() if name.startswith("Ray")]
    assert len(ray_pods) == 8
    for name, template in ray_pods:
        assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == label
        ports = {
            it["name"]: it["containerPort"] for it in template["spec"]["containers"][0]["ports"]
        }
        assert ports[port] == 8080, name


@pytest.mark.parametrize("path", files(".yml", ".yaml"), ids=lambda path: path.name)
def test_every_yaml_file_parses_without_duplicates(path: Any) -> None:
    assert read_yaml(path)

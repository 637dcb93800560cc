"""Manifests of infra/, read strictly: a key that stands twice is an error, as YAML itself says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

INFRA = Path(__file__).parents[2] / "infra"


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"{', '.join(sorted(twice))} stands twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> list[Any]:
    """All documents of a file."""
    return [it for it in yaml.load_all(path.read_text(), StrictLoader) if it is not None]


def read_json(path: Path) -> Any:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        assert len(keys) == len(set(keys)), f"{path}: a key stands twice among {keys}"
        return dict(pairs)

    return json.loads(path.read_text(), object_pairs_hook=no_duplicates)


def files(*suffixes: str) -> list[Path]:
    return sorted(path for path in INFRA.rglob("*") if path.suffix in suffixes)


def kubernetes_objects() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each object that `kubectl apply -k` would make, from its file."""
    for folder in ("kubernetes", "kubernetes/job", "kubernetes/serve", "monitoring"):
        listed = read_yaml(INFRA / folder / "kustomization.yaml")[0]["resources"]
        for name in listed:
            path = INFRA / folder / name
            if path.is_file():
                yield from ((path, document) for document in read_yaml(path))


def cluster_of(it: dict[str, Any]) -> dict[str, Any]:
    """The cluster of one of KubeRay's objects."""
    spec: dict[str, Any] = it["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return found


def pod_templates() -> list[tuple[str, dict[str, Any]]]:
    """Every pod that the objects would start: where it stands, and its template."""
    found = []
    for _, it in kubernetes_objects():
        name, spec = f"{it['kind']}/{it['metadata']['name']}", it.get("spec", {})
        if it["kind"] in ("Deployment", "StatefulSet"):
            found.append((name, spec["template"]))
        elif it["kind"] in ("RayCluster", "RayJob", "RayService"):
            cluster = cluster_of(it)
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                found.append((f"{name}/{group.get('groupName', 'head')}", group["template"]))
    return found


BUILT_IN = {
    "ray_node_cpu_utilization",
    "ray_node_mem_used",
    "ray_node_mem_total",
    "ray_node_gpus_utilization",
}
"""Ray's own, that the dashboard draws besides; all but the last are looked for on a real node by
tests/pipeline/cluster/test_jobs.py."""
VLLM = {
    "ray_vllm_num_requests_running",
    "ray_vllm_num_requests_waiting",
    "ray_vllm_prompt_tokens_total",
    "ray_vllm_generation_tokens_total",
    "ray_vllm_kv_cache_usage_perc",
    "ray_vllm_time_to_first_token_seconds_bucket",
}
"""Of what is served; tests/adsc/serving/engine/test_ray_serve.py looks for them on a real node."""

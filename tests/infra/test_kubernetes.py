"""Kubernetes objects: against their schemas, and against rules of our own."""

import copy
import shlex
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.infra.documents import (
    INFRA,
    StrictLoader,
    cluster_of,
    kubernetes_objects,
    pod_templates,
    read_yaml,
)
from tests.infra.kuberay import SCHEMAS

VERSION = "1.31"
OBJECTS = [
    pytest.param(it, id=f"{it['kind']}-{it['metadata']['name']}") for _, it in kubernetes_objects()
]
PODS = [pytest.param(template, id=name) for name, template in pod_templates()]


def validate(it: dict[str, Any]) -> None:
    if it["kind"] in SCHEMAS:
        jsonschema.validate(it, SCHEMAS[it["kind"]])
    else:
        kubernetes_validate.validate(it, VERSION, strict=True)


@pytest.mark.parametrize("it", OBJECTS)
def test_objects_follow_their_schema(it: dict[str, Any]) -> None:
    validate(it)
    assert it["metadata"].get("namespace", it["metadata"]["name"]) == "adsc"


@pytest.mark.parametrize("template", PODS)
def test_pods_follow_their_schema(template: dict[str, Any]) -> None:
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}}
    validate({**pod, "template": template})


def test_the_schemas_do_refuse() -> None:
    """One wrong word in each kind that has a schema of ours, and one in a pod."""
    with pytest.raises(yaml.constructor.ConstructorError, match="a stands twice"):
        yaml.load("a: 1\nb: 2\na: 3\n", StrictLoader)
    by_kind = {it["kind"]: it for _, it in kubernetes_objects()}
    for kind in SCHEMAS:
        wrong = copy.deepcopy(by_kind[kind])
        cluster = cluster_of(wrong)
        cluster["autoscalerOptions"]["idleTimeout"] = 5
        with pytest.raises(jsonschema.ValidationError, match="idleTimeout"):
            validate(wrong)
    wrong = copy.deepcopy(by_kind["Deployment"])
    wrong["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(wrong)


def containers() -> list[Any]:
    return [
        pytest.param(template["spec"], container, id=f"{name}-{container['name']}")
        for name, template in pod_templates()
        for container in template["spec"]["containers"]
    ]


@pytest.mark.parametrize(("pod", "container"), containers())
def test_containers_are_bounded_and_unprivileged(
    pod: dict[str, Any], container: dict[str, Any]
) -> None:
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True and context["runAsUser"] > 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    limits, requests = container["resources"]["limits"], container["resources"]["requests"]
    assert set(limits) >= {"cpu", "memory"} and requests["memory"] == limits["memory"]
    if "nvidia.com/gpu" in limits:
        assert requests["nvidia.com/gpu"] == limits["nvidia.com/gpu"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert all("hostPath" not in volume for volume in pod["volumes"])
    assert all("sizeLimit" in it["emptyDir"] for it in pod["volumes"] if "emptyDir" in it)


def test_images_stand_in_one_place_with_a_version() -> None:
    for folder, others in (
        ("kubernetes", ["monitoring"]),
        ("kubernetes/job", []),
        ("kubernetes/serve", []),
    ):
        kustomization = read_yaml(INFRA / folder / "kustomization.yaml")[0]
        pinned = {it["name"]: it.get("newTag") or it["digest"] for it in kustomization["images"]}
        assert all(tag and "latest" not in tag for tag in pinned.values())
        used = {
            container["image"]
            for path, it in kubernetes_objects()
            if path.parent in {INFRA / folder, *(INFRA / other for other in others)}
            for name, template in pod_templates()
            if name.startswith(f"{it['kind']}/{it['metadata']['name']}")
            for container in template["spec"]["containers"]
        }
        assert used == set(pinned)


def test_no_secret_stands_in_a_manifest() -> None:
    """Secrets are made by hand and only named here: by volume, by key, by KubeRay's options."""
    for path, it in kubernetes_objects():
        assert it["kind"] != "Secret", path
    for name, template in pod_templates():
        for container in template["spec"]["containers"]:
            for variable in container.get("env", ()):
                secret = any(part in variable["name"] for part in ("PASSWORD", "SECRET", "TOKEN"))
                value = variable.get("value", "")
                assert not secret or value.startswith("/"), f"{name}: {variable['name']}"


def test_everything_is_closed_and_every_pod_has_a_policy() -> None:
    policies = [it["spec"] for _, it in kubernetes_objects() if it["kind"] == "NetworkPolicy"]
    everything = [it for it in policies if it["podSelector"] == {}]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in everything
    for name, template in pod_templates():
        labels = template["metadata"]["labels"].items()
        own = [it for it in policies if it["podSelector"].get("matchLabels", {}).items()]
        assert [it for it in own if it["podSelector"]["matchLabels"].items() <= labels], name
    # Of rules that name a pod, both ends let it through.
    for policy in policies:
        for rule in policy.get("egress", ()):
            for peer in rule["to"]:
                labels = peer.get("podSelector", {}).get("matchLabels", {})
                if labels and "namespaceSelector" not in peer:
                    back = [it for it in policies if it["podSelector"].get("matchLabels") == labels]
                    assert any("ingress" in it for it in back), labels


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_ray_has_tokens_an_idle_head_and_spot_workers_from_nothing(kind: str) -> None:
    import ray

    from workflows.commands.main import build_parser

    it = next(it for _, it in kubernetes_objects() if it["kind"] == kind)
    cluster = cluster_of(it)
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    spot = groups["gpu-spot"]
    assert spot["minReplicas"] == 0 < spot["maxReplicas"]
    assert spot["template"]["spec"]["terminationGracePeriodSeconds"] <= 120  # of EC2's notice
    if kind == "RayCluster":
        assert cluster["gcsFaultToleranceOptions"]["redisAddress"] == "redis:6379"
    else:
        words = shlex.split(it["spec"]["entrypoint"])
        assert words[:3] == ["python", "-m", "workflows.jobs"]
        assert build_parser().parse_args(words[4:]).gpus == 1


def test_what_is_served_waits_for_its_clients() -> None:
    """A cluster of its own with a GPU that stays; only pods marked as clients reach it."""
    import ray

    (it,) = (it for _, it in kubernetes_objects() if it["kind"] == "RayService")
    cluster = cluster_of(it)
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert it["spec"]["excludeHeadPodFromServeSvc"] is True
    (group,) = cluster["workerGroupSpecs"]
    config = yaml.load(it["spec"]["serveConfigV2"], StrictLoader)
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    scaling = deployment["autoscaling_config"]
    assert group["minReplicas"] == scaling["min_replicas"] >= 1
    assert group["maxReplicas"] == scaling["max_replicas"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert deployment["ray_actor_options"]["num_gpus"] == gpus
    (policy,) = (
        it["spec"]
        for path, it in kubernetes_objects()
        if it["kind"] == "NetworkPolicy" and path.parent.name == "serve"
    )
    labels = group["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    (rule,) = policy["ingress"]
    assert rule["ports"] == [{"port": 8000, "protocol": "TCP"}] and rule["from"]
    assert {"name": "serve", "containerPort": 8000} in container["ports"]

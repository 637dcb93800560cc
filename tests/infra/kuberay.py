"""What KubeRay 1.7 takes in RayCluster, RayJob and RayService, as far as the manifests here use it.

Written for these tests from KubeRay's documentation: names, types and allowed words; unknown names
are refused. Pod templates are not described here: Kubernetes' own schema checks them.
"""

from typing import Any

STRING: dict[str, Any] = {"type": "string"}
WHOLE: dict[str, Any] = {"type": "integer", "minimum": 0}
SWITCH: dict[str, Any] = {"type": "boolean"}
ANY: dict[str, Any] = {"type": "object"}


def closed(required: tuple[str, ...] = (), /, **properties: dict[str, Any]) -> dict[str, Any]:
    """An object with these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def word(*words: str) -> dict[str, Any]:
    return {"enum": list(words)}


PARAMETERS = {"type": "object", "additionalProperties": STRING}
SECRET_KEY = closed(
    ("valueFrom",),
    valueFrom=closed(
        ("secretKeyRef",), secretKeyRef=closed(("name", "key"), name=STRING, key=STRING)
    ),
)
GROUP = {"rayStartParams": PARAMETERS, "template": ANY, "labels": PARAMETERS}
CLUSTER_SPEC = closed(
    ("headGroupSpec", "rayVersion"),
    rayVersion=STRING,
    authOptions=closed(("mode",), mode=word("token", "disabled"), secretName=STRING),
    gcsFaultToleranceOptions=closed(
        (), backend=word("redis", "rocksdb"), redisAddress=STRING, redisUsername=SECRET_KEY,
        redisPassword=SECRET_KEY, externalStorageNamespace=STRING,
    ),
    enableInTreeAutoscaling=SWITCH,
    autoscalerOptions=closed(
        (), version=word("v1", "v2"), upscalingMode=word("Default", "Aggressive", "Conservative"),
        idleTimeoutSeconds=WHOLE, resources=ANY, securityContext=ANY, image=STRING,
    ),
    headGroupSpec=closed(("template",), **GROUP, serviceType=STRING),
    workerGroupSpecs={
        "type": "array",
        "items": closed(
            ("groupName", "minReplicas", "maxReplicas", "template"), **GROUP, groupName=STRING,
            replicas=WHOLE, minReplicas=WHOLE, maxReplicas=WHOLE, numOfHosts=WHOLE, priority=WHOLE,
            idleTimeoutSeconds=WHOLE,
        ),
    },
)  # fmt: skip
JOB_SPEC = closed(
    ("entrypoint",),
    entrypoint=STRING,
    submissionMode=word("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    shutdownAfterJobFinishes=SWITCH,
    ttlSecondsAfterFinished=WHOLE,
    activeDeadlineSeconds=WHOLE,
    backoffLimit=WHOLE,
    rayClusterSpec=CLUSTER_SPEC,
    clusterSelector=PARAMETERS,
    runtimeEnvYAML=STRING,
    metadata=PARAMETERS,
)
SERVICE_SPEC = closed(
    ("serveConfigV2", "rayClusterConfig"),
    serveConfigV2=STRING,
    rayClusterConfig=CLUSTER_SPEC,
    upgradeStrategy=closed((), type=word("NewCluster", "None")),
    excludeHeadPodFromServeSvc=SWITCH,
    rayClusterDeletionDelaySeconds=WHOLE,
)
SCHEMAS = {
    kind: closed(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"}, kind={"const": kind}, metadata=ANY, spec=spec,
    )
    for kind, spec in (
        ("RayCluster", CLUSTER_SPEC),
        ("RayJob", JOB_SPEC),
        ("RayService", SERVICE_SPEC),
    )
}  # fmt: skip

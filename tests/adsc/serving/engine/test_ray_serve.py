"""The deployment on a real Ray Serve: answers, a stream, metrics, and a replica whose engine is
killed."""

from __future__ import annotations

import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # Ray reads both when it is imported
os.environ.setdefault("RAY_raylet_start_wait_time_s", "900")
pytest.importorskip("vllm")
pytest.importorskip("ray")

from tests.adsc.serving.engine.cases import Reference
from tests.adsc.serving.engine.chats import CHATS, PLAN, as_prompt, chat
from tests.documents import ROOT
from tests.infra.documents import VLLM, cluster_of, kubernetes_objects

PATIENCE = 900  # seconds that a slow machine may take to load
ENGINE = (
    "--max-model-len 1024 --max-num-seqs 16 --dtype float32 --block-size 32 "
    """--limit-mm-per-prompt '{"image": 4}'"""
)


@dataclass
class Served:
    http: int
    metrics: int

    def post(self, body: dict[str, Any]) -> str:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.http}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            text: str = answer.read().decode()
            return text


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def served(exported: Path) -> Iterator[Served]:
    import ray
    from ray import serve

    from workflows.deployment import Options, build

    found = Served(free_port(), free_port())
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "PYTHONPATH": str(ROOT),
    }
    ray.init(
        num_cpus=2,
        _metrics_export_port=found.metrics,
        runtime_env={"env_vars": variables},
        log_to_driver=False,
    )
    try:
        serve.start(http_options={"port": found.http})
        serve.run(build(Options(checkpoint=str(exported), engine=ENGINE)))
        yield found
    finally:
        serve.shutdown()
        ray.shutdown()


def test_eight_clients_and_a_stream(served: Served, reference: Reference) -> None:
    with ThreadPoolExecutor(8) as clients:
        texts = list(clients.map(lambda it: served.post(chat(it, 10)), CHATS))
    wanted = reference.answers(PLAN, [as_prompt(it) for it in CHATS], new=10)
    got = [tuple(json.loads(text)["choices"][0]["token_ids"]) for text in texts]
    assert got == [it.tokens for it in wanted]
    lines = served.post(chat(CHATS[0], 10) | {"stream": True}).split("\n\n")
    events = [json.loads(it.removeprefix("data: ")) for it in lines if it.startswith("data: {")]
    pieces = [it["choices"][0].get("token_ids") or [] for it in events if it["choices"]]
    assert (
        len(pieces) > 5 and tuple(token for piece in pieces for token in piece) == wanted[0].tokens
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        served.post(chat(CHATS[0], 1) | {"vllm_xargs": {"adsc_plan": "64"}})
    assert refused.value.code == 400
    assert "may choose dense;" in refused.value.read().decode()


def test_metrics_that_the_dashboard_draws_are_exported(served: Served) -> None:
    end = time.monotonic() + PATIENCE
    missing = set(VLLM)
    while missing and time.monotonic() < end:
        with urllib.request.urlopen(f"http://127.0.0.1:{served.metrics}/metrics") as page:
            text = page.read().decode()
        missing = {name for name in VLLM if f"\n{name}{{" not in text}
        time.sleep(1)
    assert not missing


def test_a_replica_whose_engine_died_is_replaced(served: Served) -> None:
    replicas = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "ServeReplica" in " ".join(process.info["cmdline"] or ()) and process.children()
    ]
    (replica,) = replicas
    for child in replica.children(recursive=True):
        child.kill()
    end = time.monotonic() + PATIENCE
    answered = ""
    while not answered:
        try:
            answered = served.post(chat(CHATS[0], 3))
        except OSError:  # HTTP errors, too
            assert time.monotonic() < end
            time.sleep(2)
    assert json.loads(answered)["choices"]
    psutil.wait_procs([replica], timeout=PATIENCE)
    assert not replica.is_running()


def test_the_manifest_is_a_config_that_serve_takes() -> None:
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from workflows.deployment import Options, Replica, parsed

    (service,) = (it for _, it in kubernetes_objects() if it["kind"] == "RayService")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == "workflows.deployment:build"
    options = Options(**application.args)
    assert parsed(["--model", "x", *options.engine.split()])
    assert [it.name for it in application.deployments] == [Replica.name]
    assert cluster_of(service)["workerGroupSpecs"]

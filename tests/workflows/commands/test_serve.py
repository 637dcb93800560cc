"""`adsc serve` around the engine: what it fetches, refuses, tells and runs. The engine itself is
tested in tests/adsc/serving/engine."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

import adsc
from pipeline.publishing.manifest import write_manifest
from pipeline.publishing.publish import publish
from pipeline.store import open_store
from tests.documents import ROOT
from workflows import serving
from workflows.commands.main import _parse, main

BASE = ROOT / "workflows" / "assets" / "tiny_base"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped base with a plan and a manifest."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    shutil.copytree(BASE, folder)
    config = json.loads((folder / "config.json").read_text())
    config["adsc"] = adsc.PruningPlan.parse("1:1/4;pool=tiles").to_dict()
    config["adsc_plans"] = {"half": adsc.PruningPlan.parse("4:1/2").to_dict()}
    (folder / "config.json").write_text(json.dumps(config))
    write_manifest(folder, {})
    return folder


def options(*words: str) -> Any:
    return _parse(["serve", *words])


def test_what_is_not_ours_is_handed_to_vllm_in_order() -> None:
    found = options("CHECKPOINT", "--max-model-len", "512", "--plan", "64", "--enforce-eager",
                    "--port", "8123", "--dtype=float32")  # fmt: skip
    assert (found.checkpoint, found.plan, found.port) == ("CHECKPOINT", "64", 8123)
    assert found.engine == ["--max-model-len", "512", "--enforce-eager", "--dtype=float32"]
    words = serving.command("/models/tiny", found)
    assert words[words.index("--model") + 1] == "/models/tiny"
    assert words[words.index("--served-model-name") + 1] == "tiny"
    assert json.loads(words[words.index("--hf-overrides") + 1]) == {"adsc": "64"}
    assert words[-4:] == found.engine
    own = serving.command("/models/tiny", options("X", "--served-model-name=mine"))
    assert "--served-model-name" not in own and "--hf-overrides" not in own
    with pytest.raises(ValueError, match="--plan and --hf-overrides"):
        serving.command("x", options("X", "--plan", "64", "--hf-overrides", "{}"))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_the_folder_one_stands_in_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = serving.engine_arguments(".", None, [])
    assert words[words.index("--served-model-name") + 1] == tmp_path.name


def test_without_vllm_it_says_how_to_install_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "anything"]) == 1
    printed = capsys.readouterr().err
    assert "make vllm" in printed and ".venv-vllm/bin/adsc serve CHECKPOINT" in printed


def test_plan_and_costs_are_printed(checkpoint: Path) -> None:
    lines = serving.described(str(checkpoint), None)
    assert "plan 1:1/4;pool=tiles, 22.0 of 64 vision tokens" in lines[0]
    assert "% less than dense" in lines[1] and "MiB of KV" in lines[1]
    assert "plan 4:1/2, 48.0 of 64" in serving.described(str(checkpoint), "half")[0]
    assert "no plan; served dense" in serving.described(str(BASE), None)[0]
    assert "no plan; served dense" in serving.described(str(checkpoint), "dense")[0]
    with pytest.raises(ValueError, match="did you mean half"):
        serving.described(str(checkpoint), "hafl")
    with pytest.raises(ValueError, match=r"layers 0\.\.7"):
        serving.described(str(checkpoint), "9:1/2")


def test_a_port_in_use_is_refused_before_anything_is_loaded() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(serving.ServingError, match=f"can't listen on 127.0.0.1:{port}"):
            serving.check_port("127.0.0.1", port)
    serving.check_port("127.0.0.1", port)


def test_folders_are_verified_and_others_named(checkpoint: Path, tmp_path: Path) -> None:
    assert serving.fetched(options(str(checkpoint))) == str(checkpoint)
    assert serving.fetched(options(str(BASE))) == str(BASE)  # without a manifest
    assert serving.fetched(options("llava-hf/llava-1.5-7b-hf")) == "llava-hf/llava-1.5-7b-hf"
    altered = shutil.copytree(checkpoint, tmp_path / "altered")
    (altered / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json has 2 bytes"):
        serving.fetched(options(str(altered)))
    with pytest.raises(ValueError, match="there is no folder 'nowhere'"):
        serving.fetched(options("nowhere"))
    with pytest.raises(ValueError, match="is no checkpoint"):
        serving.fetched(options(str(tmp_path)))


def test_an_address_is_fetched_once_and_verified(
    checkpoint: Path, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADSC_CACHE", str(tmp_path / "cache"))
    address = f"s3://lab/{uuid.uuid4().hex}"
    with pytest.raises(ValueError, match="no checkpoint is published at"):
        serving.fetched(options(address))
    publish(checkpoint, open_store(address), lambda copy: {"worst_difference": 0.0})
    first = serving.fetched(options(address))
    assert (Path(first) / "config.json").read_text() == (checkpoint / "config.json").read_text()
    assert serving.fetched(options(address)) == first
    assert Path(first).is_relative_to(tmp_path / "cache")
    with pytest.raises(ValueError, match="another checkpoint"):
        monkeypatch.setenv("ADSC_CACHE", str(tmp_path / "other"))
        serving.fetched(options(address, "--expect", "0" * 64))


def test_a_cpu_gets_a_small_cache_unless_a_flag_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert serving.environment(["--port", "1"])["VLLM_CPU_KVCACHE_SPACE"] == "4"
    for flag in ("--gpu-memory-utilization=0.5", "--kv-cache-memory-bytes"):
        assert "VLLM_CPU_KVCACHE_SPACE" not in serving.environment([flag])
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "9")
    assert serving.environment([])["VLLM_CPU_KVCACHE_SPACE"] == "9"


def test_a_server_that_fails_is_reported_by_its_last_error(
    capfd: pytest.CaptureFixture[str],
) -> None:
    fails = "raise ValueError('No available memory for the cache blocks.')"
    with pytest.raises(serving.ServingError, match=r"ended with 1: ValueError: No available mem"):
        serving.run([sys.executable, "-c", fails])
    assert "Traceback" in capfd.readouterr().err
    assert serving.run([sys.executable, "-c", "pass"]) == 0


def test_ctrl_c_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal sends it to both; here the server gets it by the command."""
    monkeypatch.setattr(serving, "GRACE", 0.1)
    ended: list[int] = []
    sleeps = "import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: raise SystemExit(7)"
    whole = serving.subprocess.Popen.wait

    def interrupted(self: Any, timeout: float | None = None) -> int:
        if timeout is None and not ended:
            ended.append(0)
            import time

            time.sleep(2)  # until the server catches it
            raise KeyboardInterrupt
        return whole(self, timeout)

    monkeypatch.setattr(serving.subprocess.Popen, "wait", interrupted)
    assert serving.run([sys.executable, "-c", sleeps]) == 0
    assert ended == [0]


def test_a_service_manager_ends_the_server() -> None:
    """SIGTERM reaches the command alone: what it started must not go on listening."""
    sleeps = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    words = [sys.executable, "-c", sleeps]
    code = f"from workflows import serving; raise SystemExit(serving.run({words!r}))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        started = int(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(started, 0)

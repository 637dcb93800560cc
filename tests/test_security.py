"""What docs/security.md claims: secrets stay where they are, checkpoints execute nothing, and what
starts here listens on loopback."""

from __future__ import annotations

import json
import logging
import os
import pickle
import secrets
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

import adsc
from pipeline.config import Config
from pipeline.durable.attempt import execute
from pipeline.durable.failure import StageFailed
from pipeline.durable.progress import ProgressHandle
from pipeline.durable.stage import Kind, RunContext, StageContext
from pipeline.kinds.base import BaseConfig
from pipeline.kinds.export import ExportConfig
from pipeline.packaged import resolve
from pipeline.publishing.manifest import ExportError
from pipeline.stages.base import base
from pipeline.stages.export import complete
from pipeline.store import open_store
from pipeline.tracking import tracker as tracking
from tests.pipeline.contexts import stage_context
from workflows.commands.main import main as command

PLANTED = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "RAY_AUTH_TOKEN",
    "MLFLOW_TRACKING_PASSWORD", "OPENAI_API_KEY",
)  # fmt: skip


class Careless(Config):
    """A stage's config, with what belongs into the environment."""

    api_key: str = ""
    source: str = ""
    fail: bool = False


def careless(ctx: StageContext, config: Careless) -> dict[str, Any]:
    """Tells every secret of its environment to everybody."""
    text = " ".join(f"{name} is {os.environ[name]}" for name in PLANTED)
    ctx.track.params({"planted": text, "nested": {"password": config.api_key}})
    ctx.track.tag("planted", text)
    ctx.track.note(text)
    ctx.track.dataset(f"s3://key:{config.api_key}@bucket/x", "data", "0")
    ctx.track.metrics({"loss": text})  # not a number: becomes a warning and a tag
    ctx.progress(1, 1, "done")
    if config.fail:
        try:
            raise OSError(text)
        except OSError as error:
            raise ValueError(f"can't open {config.source}") from error
    return {"planted": text, "url": config.source}


def test_planted_secrets_are_nowhere_in_what_a_run_wrote(
    s3_endpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Store, journals, MLflow's database and artifacts, logs, output, errors."""
    planted = {name: secrets.token_hex(16) for name in PLANTED}
    for name, secret in planted.items():
        monkeypatch.setenv(name, secret)
    hidden = {*planted.values(), key := secrets.token_hex(12)}
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    root = f"s3://lab/{uuid.uuid4().hex}"
    uri = tracking.prepare(tracking.default_uri(tmp_path / "mlflow"), "adsc")
    context = RunContext(
        root=root, workflow="careless", tracking_uri=uri, cache=str(tmp_path / "cache")
    )
    messages = []
    for fail in (False, True):
        config = Careless(api_key=key, source=f"https://ada:{key}@host/x", fail=fail)
        kind = Kind(id="careless", version=1, body=careless, config=Careless)
        stage = kind.stage(name="careless", title="", config=config)
        try:
            execute(stage, f"{fail:d}" * 64, context, ProgressHandle(stage="careless"), {})
        except StageFailed as error:
            messages.append(str(error))
    assert len(messages) == 1
    assert command(["show", "demo", "evaluate", "--root", f"s3://ada:{key}@bucket/x"]) == 2
    store, wrote = open_store(root), {"the error": messages[0].encode()}
    for entry in store.list(""):
        wrote[entry.key] = store.read(entry.key) or b""
    for path in tmp_path.rglob("*"):
        if path.is_file():
            wrote[str(path)] = path.read_bytes()
    wrote["log"], wrote["output"] = caplog.text.encode(), "".join(capfd.readouterr()).encode()
    names = " ".join(wrote)
    for made in ("record.json", "failures/", "mlflow.db"):
        assert made in names, names
    assert b"planted" in b"".join(wrote.values()) and b"[redacted]" in wrote["the error"]
    found = [(name, secret) for name, it in wrote.items() for secret in hidden
             if secret.encode() in it]  # fmt: skip
    assert not found


class Payload:
    """A pickle that leaves a file when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A working checkpoint, to be tampered with."""
    source = resolve("package://workflows/assets/tiny_base")
    return shutil.copytree(source, tmp_path / "stranger")


def test_no_pickle_of_a_checkpoint_is_loaded(stranger: Path, tmp_path: Path) -> None:
    (stranger / "model.safetensors").unlink()
    trace = tmp_path / "trace"
    (stranger / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(trace)))
    pickle.loads((stranger / "pytorch_model.bin").read_bytes())
    assert trace.exists(), "the payload must work"
    trace.unlink()
    with pytest.raises(adsc.CheckpointError, match="only safetensors are loaded"):
        adsc.from_pretrained(stranger)
    with pytest.raises(adsc.CheckpointError, match="only safetensors are loaded"):
        base(stage_context("base", tmp_path / "out", {}), BaseConfig(source=str(stranger)))
    with pytest.raises(ExportError, match=r"pytorch_model\.bin: only"):
        complete(stranger, tmp_path / "export", ExportConfig())
    assert not trace.exists()


@pytest.mark.parametrize("known", [True, False])
def test_no_code_of_a_checkpoint_is_run(stranger: Path, tmp_path: Path, known: bool) -> None:
    """`auto_map` names a module beside the weights; a model_type that transformers doesn't know
    would make it ask."""
    trace = tmp_path / "trace"
    (stranger / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        content = json.loads((stranger / name).read_text())
        autos = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer")
        content["auto_map"] = dict.fromkeys(autos, "evil.Evil")
        if not known:
            content |= {"model_type": "evil", "processor_class": "Evil", "tokenizer_class": "Evil"}
        (stranger / name).write_text(json.dumps(content))
    context = stage_context("base", tmp_path / "out", {})
    try:
        base(context, BaseConfig(source=str(stranger)))
    except ValueError as error:
        assert not known and "trust_remote_code" in str(error)
    else:
        assert known
    assert not trace.exists()
    assert not list(context.out.rglob("*.py"))


def test_a_template_can_not_reach_python(stranger: Path, tmp_path: Path) -> None:
    """Chat templates are programs of strangers: they run in a sandbox."""
    from jinja2.exceptions import SecurityError
    from transformers import AutoProcessor

    trace = tmp_path / "trace"
    (stranger / "chat_template.jinja").write_text(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        "{{ cycler.__init__.__globals__.os.system('touch " + str(trace) + "') }}"
    )
    processor: Any = AutoProcessor.from_pretrained(stranger, trust_remote_code=False)
    with pytest.raises(SecurityError):
        processor.apply_chat_template([{"role": "user", "content": "hello"}])
    assert not trace.exists()


@pytest.mark.slow
def test_the_embedded_ray_is_on_loopback_or_behind_a_token(tmp_path: Path) -> None:
    """Dashboard and job server on loopback; Ray's inner processes listen everywhere, and let no one
    in without the token that this process made."""
    (tmp_path / "client.py").write_text(
        "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR')\n"
        "print(ray.get(ray.remote(lambda: 'executed').remote()))"
    )
    (tmp_path / "host.py").write_text(
        "import os, json, subprocess, sys, urllib.request, urllib.error, psutil\n"
        "from pipeline.durable.session import ray_for\n"
        "from pipeline.durable.stage import RunContext\n"
        "with ray_for(RunContext(root='.', workflow='x')):\n"
        "    import ray; assert ray.get(ray.remote(lambda: 1).remote()) == 1\n"
        "    url = os.environ['RAY_API_SERVER_ADDRESS']; port = int(url.rpartition(':')[2])\n"
        "    own = [psutil.Process(), *psutil.Process().children(recursive=True)]\n"
        "    at = [c.laddr.ip for p in own for c in p.net_connections('tcp')"
        " if c.status == 'LISTEN' and c.laddr.port == port]\n"
        "    try: urllib.request.urlopen(url + '/api/jobs/'); code = 200\n"
        "    except urllib.error.HTTPError as error: code = error.code\n"
        "    address = ray.get_runtime_context().gcs_address\n"
        "    for mode in ('disabled', 'token'):\n"
        "        other = {**os.environ, 'RAY_AUTH_MODE': mode, 'RAY_AUTH_TOKEN': '0' * 64}\n"
        "        done = subprocess.run([sys.executable, sys.argv[1], address], env=other,"
        " capture_output=True, text=True, timeout=120)\n"
        "        print(json.dumps([at, code, done.returncode, done.stdout]))\n"
    )
    set_here = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_API_SERVER_ADDRESS")
    environment = {k: v for k, v in os.environ.items() if k not in set_here}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "host.py"), str(tmp_path / "client.py")],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(answers) == 2
    for listens, code, status, output in answers:
        assert (listens, code) == (["127.0.0.1"], 401)
        assert status != 0 and "executed" not in output

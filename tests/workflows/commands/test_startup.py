"""What each command imports: modules are counted, not seconds, which a busy machine would fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from workflows.commands.main import COMMANDS

HEAVY = (
    "torch", "transformers", "peft", "ray", "mlflow", "boto3", "matplotlib", "optuna", "pandas",
    "pyarrow", "numpy", "PIL", "jinja2",
)  # fmt: skip
CONFIGS = ("pydantic", "yaml", "rich")
COST = ["llava-1.5-7b", "--plan", "8:1/2"]


def loaded(names: tuple[str, ...], code: str) -> list[str]:
    """Which of these packages a fresh process, without a cluster, has imported once the code has
    run."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_API_SERVER_ADDRESS"}
    end = f"print(json.dumps([name for name in {names!r} if name in sys.modules]), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"import json, sys\n{code}\n{end}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
        env=environment,
    )
    found: list[str] = json.loads(done.stderr.splitlines()[-1])
    return found


def command(*words: str) -> str:
    return (
        "from workflows.commands.entry import main\n"
        f"sys.argv = ['adsc', *{list(words)!r}]\n"
        "try:\n    code = main()\nexcept SystemExit as end:\n    code = end.code\n"
        "assert code in (0, 2), code"
    )


def test_help_and_the_list_of_workflows_import_nothing() -> None:
    code = "\n".join(
        command(*words) for words in (["--help"], ["ls"], ["ls", "--json"], ["nonsense"])
    )
    assert loaded((*HEAVY, *CONFIGS), code) == []


def test_no_commands_help_imports_more() -> None:
    code = "\n".join(command(name, "--help") for name in COMMANDS)
    assert loaded((*HEAVY, *CONFIGS), code) == []


@pytest.mark.parametrize(
    "words",
    [
        ["ls", "demo"],
        ["ls", "llava15_7b_elastic"],
        ["show", "demo"],
        ["show", "demo", "evaluate"],
        ["show", "llava15_7b", "--config", "--set", "train.steps=3"],
        ["status"],
        ["status", "--address", "http://127.0.0.1:9"],
        ["logs", "--address", "http://127.0.0.1:9"],
    ],
    ids=" ".join,
)
def test_looking_at_workflows_and_jobs_is_light(words: list[str], tmp_path: Path) -> None:
    root = ["--root", str(tmp_path)] if words[0] in ("ls", "show") else []
    assert loaded(HEAVY, command(*words, *root)) == []


@pytest.mark.parametrize("name", ["status", "logs"])
def test_jobs_of_a_cluster_that_answers_need_rays_client_alone(name: str) -> None:
    code = f"""
import http.server, threading
class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        answers = {{"/api/version": {{"version": "4", "ray_version": "2", "ray_commit": ""}}}}
        body = json.dumps(answers.get(self.path, [])).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        asked.append(self.path)
asked = []
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
address = f"http://127.0.0.1:{{server.server_port}}"
{command(name, "--address").replace("'--address'", "'--address', address")}
assert asked.count("/api/jobs/") == 1, asked
"""
    assert loaded(HEAVY, code) == ["ray"]


def test_costs_of_a_named_geometry_are_light() -> None:
    plan = ["--model", "llava-1.5-7b", "--average", "192"]
    code = command("cost", *COST) + "\n" + command("plan", *plan)
    assert loaded((*HEAVY, *CONFIGS), code) == []


def test_a_trainings_stage_and_controller_load_no_torch() -> None:
    """What they import besides Ray's own modules; the workers' loop is imported by workers."""
    code = """
import pickle, ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from pipeline.durable import graph
from pipeline.kinds.train import TRAIN
from pipeline.stages.process_group import ProcessGroup
from pipeline.stages.train import _worker, train_stage
pickle.loads(pickle.dumps(ProcessGroup("gloo"))).backend_cls()
"""
    assert loaded(("torch", "transformers", "mlflow"), code) == []


def test_a_run_of_what_is_finished_is_light(tmp_path: Path) -> None:
    """As the second `make demo`: every stage is cached, and no Ray is started."""
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "file.txt").write_text("made before")
    code = f"""
from pipeline.durable import graph
from pipeline.durable.session import send_pending
from pipeline.durable.stage import RunContext, adopted
from workflows.registry import load_workflow
load_workflow("demo").stages()
stage = adopted(name="made", title="made before", place={str(tmp_path / "made")!r})
context = RunContext(root={str(tmp_path / "store")!r}, workflow="demo")
assert set(graph.run([stage], context)) == {{"made"}}
assert send_pending(context.root, None, context.cache) is None
"""
    assert loaded(HEAVY, code) == []

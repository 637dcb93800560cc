"""The whole demo at a small size, in processes of its own: undisturbed, cached, and killed.

The fast tests share one run with one training stage; those marked slow have two.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.durable import record as records
from pipeline.durable.graph import fingerprints
from pipeline.durable.record import Record
from pipeline.store import open_store
from tests.small import SMALL_DEMO, Small
from workflows.commands.main import main
from workflows.registry import load_workflow

pytestmark = pytest.mark.usefixtures("ray_address")

ONE_STAGE = "curriculum.stages=1"
Captured = pytest.CaptureFixture[str]


def words(
    name: str, root: Path | str, base: Path, *extra: str, stage: str | None = None
) -> list[str]:
    """What follows `adsc`; `extra` goes last, so that it overrides."""
    changes = [f"--set={change}" for change in (*SMALL_DEMO, f"base.source={base}")]
    place = ["demo", *([stage] if stage else []), "--root", str(root)]
    return [name, *place, *changes, *extra]


def command(*arguments: Any, **more: Any) -> list[str]:
    return [sys.executable, "-m", "workflows.commands.main", *words(*arguments, **more)]


def run(root: Path | str, base: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_API_SERVER_ADDRESS"}
    return subprocess.run(
        command("run", root, base, *extra), capture_output=True, text=True, env=environment
    )


def made(root: Path | str, base: Path, *changes: str) -> dict[str, Record]:
    """Records of all finished stages."""
    workflow = load_workflow("demo", [*SMALL_DEMO, f"base.source={base}", *changes])
    store = open_store(str(root))
    found = {
        name: records.load(store, name, fingerprint)
        for name, fingerprint in fingerprints(workflow.stages()).items()
    }
    return {name: record for name, record in found.items() if record is not None}


@pytest.fixture(scope="module")
def undisturbed(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    done = run(root, small.base, f"--set={ONE_STAGE}")
    assert done.returncode == 0, done.stdout + done.stderr
    return root


@pytest.fixture(scope="module")
def two_stages(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two-stages")
    done = run(root, small.base)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"train-1", "train-2", "control-1", "control-2"} <= set(made(root, small.base))
    return root


def test_every_stage_is_recorded_and_linked_with_its_run(undisturbed: Path, small: Small) -> None:
    from mlflow import MlflowClient

    found = made(undisturbed, small.base, ONE_STAGE)
    assert set(found) == {
        "pictures", "base", "prepare", "train-1", "merge", "control-1", "merge-control", "evaluate",
        "export", "report",
    }  # fmt: skip
    client = MlflowClient(f"sqlite:///{undisturbed}/mlflow.db")
    parents = set()
    for record in found.values():
        assert record.run_id is not None
        tags = client.get_run(record.run_id).data.tags
        assert tags["adsc.fingerprint"] == record.fingerprint
        assert tags["adsc.record"].endswith("record.json")
        parents.add(tags["mlflow.parentRunId"])
    assert len(parents) == 1
    steps = client.get_metric_history(found["train-1"].run_id, "loss")
    assert [metric.step for metric in steps] == [6]


def test_the_table_shows_every_arm_and_what_to_type_next(
    undisturbed: Path, small: Small, capsys: Captured
) -> None:
    assert main(words("run", undisturbed, small.base, f"--set={ONE_STAGE}")) == 0
    printed = capsys.readouterr().out
    for word in ("dense_lora", "plan_untrained", "plan_trained", "majority answer", "adsc chat"):
        assert word in printed
    assert printed.count("cached") >= 10 and "to run" not in printed


def test_ls_and_show_find_what_was_made(undisturbed: Path, small: Small, capsys: Captured) -> None:
    stages = f"--set={ONE_STAGE}"
    assert main(words("ls", undisturbed, small.base, stages, "--json")) == 0
    assert {row["state"] for row in json.loads(capsys.readouterr().out)} == {"cached"}
    assert main(words("show", undisturbed, small.base, stages, "--path", stage="export")) == 0
    shown = capsys.readouterr().out
    assert (Path(shown.strip()) / "model.safetensors").is_file()


def test_chat_answers_from_the_exported_checkpoint(undisturbed: Path, small: Small) -> None:
    found = made(undisturbed, small.base, ONE_STAGE)
    picture = next((small.pictures / "images" / "test").glob("*.png"))
    assert main(["chat", found["export"].uri, str(picture), "is there a bag?"]) == 0


@pytest.mark.slow
def test_a_killed_driver_loses_nothing(two_stages: Path, small: Small, tmp_path: Path) -> None:
    """kill -9 as soon as the second training stage has a checkpoint, then the same command."""
    root = tmp_path / "killed"
    for finished in two_stages.glob("*-*"):
        # Stages before training are taken over, so that the test is about the kill.
        if re.match(r"(pictures|base|prepare)-", finished.name):
            shutil.copytree(finished, root / finished.name)
    environment = {k: v for k, v in os.environ.items() if k != "RAY_API_SERVER_ADDRESS"}
    driver = subprocess.Popen(
        command("run", root, small.base, "--lease=6"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not list(root.glob("train-2-*/run/step-*")) and time.monotonic() < deadline:
        assert driver.poll() is None, "the driver ended before it could be killed"
        time.sleep(0.1)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    before = {record.stage: record for record in made(root, small.base).values()}
    assert "train-1" in before and "merge" not in before
    done = run(root, small.base, "--lease=6")
    assert done.returncode == 0, done.stdout + done.stderr
    after, whole = made(root, small.base), made(two_stages, small.base)
    for stage, record in before.items():
        assert after[stage] == record, f"{stage} was repeated"
    for stage in ("train-2", "merge", "merge-control"):
        assert weights(after[stage]) == weights(whole[stage])
    answers = [
        pq.read_table(Path(found["evaluate"].uri) / "samples.parquet").drop(["seconds"])
        for found in (after, whole)
    ]
    assert answers[0].equals(answers[1])


def weights(record: Record) -> dict[str, str]:
    return {file.path: file.sha256 for file in record.files if "safetensors" in file.path}


@pytest.mark.slow
def test_the_same_demo_on_an_s3_endpoint(s3_endpoint: str, two_stages: Path, small: Small) -> None:
    root = "s3://lab/demo"
    tracking = f"--mlflow=sqlite:///{two_stages}/s3.db"
    done = run(root, small.base, tracking)
    assert done.returncode == 0, done.stdout + done.stderr
    on_s3, local = made(root, small.base), made(two_stages, small.base)
    assert {name: weights(record) for name, record in on_s3.items()} == {
        name: weights(record) for name, record in local.items()
    }
    store = open_store(on_s3["export"].uri)
    assert {entry.key for entry in store.list("")} >= {"model.safetensors", "manifest.json"}
    again = run(root, small.base, tracking)
    assert again.returncode == 0 and "to run" not in again.stdout

"""A store that is moved or copied: nothing is written where it was, and nothing is lost."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.durable import record as records
from pipeline.durable.record import Record, Source
from pipeline.stages.export import runs_behind
from pipeline.store import LocalStore, open_store
from pipeline.tracking import moved
from pipeline.tracking import tracker as tracking
from pipeline.tracking.spool import Journal


def track(root: Path, text: str, messages: list[str]) -> tuple[str, str]:
    """A run with an artifact, tracked as a driver does for a store in `root`: address and id."""
    uri = tracking.prepare(tracking.default_uri(root), "adsc", report=messages.append)
    (root / f"{text}.txt").write_text(text)
    tags = {"adsc.record": str(root / "train-0123" / "record.json")}
    with tracking.stage_run(uri, "adsc", None, "train", tags, root / "tracking") as tracker:
        tracker.artifact(root / f"{text}.txt")
    assert tracker.problems == [] and tracker.run_id
    return uri, tracker.run_id


def artifacts(uri: str, run: str) -> list[str]:
    return [it.path for it in MlflowClient(uri).list_artifacts(run)]


@pytest.mark.parametrize("how", ["moved", "copied"])
@pytest.mark.parametrize("name", ["new", "new place#1"])
def test_artifacts_follow_the_store(how: str, name: str, tmp_path: Path) -> None:
    old, new, messages = tmp_path / "old", tmp_path / name, list[str]()
    old.mkdir()
    _, first = track(old, "first", messages)
    assert messages == []
    limit = time.monotonic() + 120
    while list(old.glob("tracking/*")) and time.monotonic() < limit:
        time.sleep(0.1)  # the journal's thread still clears up
    before = sorted(old.rglob("*"))
    shutil.move(old, new) if how == "moved" else shutil.copytree(old, new)
    uri, second = track(new, "second", messages)
    assert messages == [
        f"MLflow's database was at {old} before and is at {new} now: its runs, models and "
        "artifacts were pointed to the new place"
    ]
    assert artifacts(uri, first) == ["first.txt"] and artifacts(uri, second) == ["second.txt"]
    assert list(new.glob("mlflow-artifacts/*/artifacts/second.txt"))
    tag = MlflowClient(uri).get_run(first).data.tags["adsc.record"]
    assert tag == str(new / "train-0123" / "record.json")
    if how == "moved":
        assert not old.exists()
    else:
        assert sorted(old.rglob("*")) == before
    messages.clear()
    track(new, "third", messages)
    assert messages == []


def test_a_link_to_the_store_is_no_move(tmp_path: Path) -> None:
    messages: list[str] = []
    (tmp_path / "store").mkdir()
    track(tmp_path / "store", "first", messages)
    (tmp_path / "link").symlink_to("store")
    track(tmp_path / "link", "second", messages)
    assert messages == []


def test_places_that_a_person_chose_are_left_alone(tmp_path: Path) -> None:
    uri = tracking.prepare(tracking.default_uri(tmp_path), "adsc", str(tmp_path / "elsewhere"))
    assert moved.heal(tmp_path / "mlflow.db") is None
    found = MlflowClient(uri).get_experiment_by_name("adsc")
    assert found is not None and found.artifact_location.endswith("/elsewhere")


def test_a_file_that_is_no_database_is_left_to_mlflow(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database")
    assert moved.heal(tmp_path / "mlflow.db") is None
    sqlite3.connect(tmp_path / "empty.db").execute("CREATE TABLE runs (run_uuid)").close()
    assert moved.heal(tmp_path / "empty.db") is None


def test_a_journal_that_moved_with_its_store_is_sent_to_the_new_place(tmp_path: Path) -> None:
    old, new, messages = tmp_path / "old", tmp_path / "new", list[str]()
    old.mkdir()
    uri, run = track(old, "first", messages)
    (old / "late.txt").write_text("late")
    header = {"uri": uri, "experiment": "adsc", "run_id": run, "token": "", "owner": False}
    journal = Journal.create(old / "tracking", header)
    journal.append({"kind": "artifact", "path": str(old / "late.txt"), "folder": None})
    journal.close(delete=False)
    shutil.move(old, new)
    # The next command is another process; MLflow's client keeps places of runs in memory.
    code = (
        "import sys; from pathlib import Path; from pipeline.tracking import tracker\n"
        "tracker.prepare(sys.argv[1], 'adsc'); print(tracker.reconcile(Path(sys.argv[2]), ''))"
    )
    now = tracking.default_uri(new)
    output = subprocess.run(
        [sys.executable, "-c", code, now, str(new / "tracking")],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert output == "MLflow: 1 items of earlier processes sent\n"
    assert artifacts(now, run) == ["first.txt", "late.txt"]
    assert not old.exists()


def chain(store: LocalStore, *names: str) -> Record:
    """Records of stages that need each other in this order; the last one."""
    inputs: dict[str, Source] = {}
    for name in names:
        made = Record(
            stage=name, fingerprint=name[0] * 64, attempt="1", inputs=inputs, run_id=f"run {name}"
        )
        record = records.publish(store, made)
        inputs = {"made": Source(fingerprint=record.fingerprint, uri=record.uri)}
    return record


@pytest.mark.parametrize("old", ["old", "a/attempts/b/old"])
@pytest.mark.parametrize("how", ["stays", "moved", "copied"])
def test_lineage_is_found_in_the_store_itself(old: str, how: str, tmp_path: Path) -> None:
    store: Any = open_store(str(tmp_path / old))
    record = chain(store, "base", "train", "merge")
    if how != "stays":
        store = open_store(str(tmp_path / "new"))
        shutil.copytree(tmp_path / old, tmp_path / "new")
    if how == "moved":
        shutil.rmtree(tmp_path / old)
    found = records.load(store, "merge", record.fingerprint)
    assert found is not None
    from pipeline.durable.stage import Input

    runs = runs_behind({"merge": Input(found)})
    assert runs == {"merge": "run merge", "train": "run train", "base": "run base"}
    for made in records.input_records(found):
        assert made.uri.startswith(store.root)

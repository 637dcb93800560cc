"""Durable stages on a real Ray: what runs, what doesn't run again, what happens when it breaks."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.durable import graph, record
from pipeline.durable.failure import RunFailed, StageFailed, StageInterrupted
from pipeline.durable.graph import GraphError, State, fingerprints, topological_order
from pipeline.durable.lease import Holder, Lease
from pipeline.durable.record import Record
from pipeline.durable.session import ClusterError, free_port
from pipeline.durable.stage import Input, Stage, StageContext
from pipeline.store import Store, StoreError, open_store
from pipeline.tracking.headline import DataSet, Headline
from tests.pipeline.durable import toy

QUIET = Console(quiet=True)


class Toys:
    """The toy pipeline on one store, with a log of the bodies that ran."""

    def __init__(self, root: str, log: Path, ray_address: str) -> None:
        self.root, self.log, self.address = root, log, ray_address
        self.store: Store = open_store(root)

    def run(self, context: dict[str, Any] | None = None, **changes: Any) -> dict[str, Record]:
        return self.run_stages(self.stages(**changes), **context or {})

    def run_stages(self, stages: list[Stage], **context: Any) -> dict[str, Record]:
        return graph.run(stages, toy.context(self.root, **context), QUIET)

    def stages(self, **changes: Any) -> list[Stage]:
        return toy.stages(self.log, **changes)

    def drive(self, context: dict[str, Any] | None = None, **changes: Any) -> subprocess.Popen[str]:
        """The same in another driver process."""
        job = {
            "root": self.root,
            "log": str(self.log),
            "changes": changes,
            "context": {"address": self.address, **(context or {})},
        }
        return subprocess.Popen(
            [sys.executable, "-m", "tests.pipeline.durable.drive", json.dumps(job)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ran(self) -> Counter[str]:
        return Counter(self.log.read_text().split() if self.log.exists() else [])

    def wait_for(self, stage: str, times: int = 1, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while self.ran()[stage] < times:
            assert time.monotonic() < deadline, f"{stage} did not start"
            time.sleep(0.05)

    def record(self, stage: str, **changes: Any) -> Record | None:
        return record.load(self.store, stage, fingerprints(self.stages(**changes))[stage])

    def holder(self, stage: str, **changes: Any) -> Holder | None:
        prints = fingerprints(self.stages(**changes))
        return Holder.read(self.store, record.lease_key(stage, prints[stage]))


@pytest.fixture
def toys(tmp_path: Path, ray_address: str) -> Toys:
    return Toys(str(tmp_path / "runs"), tmp_path / "log", ray_address)


@pytest.fixture(params=["local", "s3"])
def any_toys(request: pytest.FixtureRequest, tmp_path: Path, ray_address: str) -> Toys:
    root = str(tmp_path / "runs") if request.param == "local" else f"s3://lab/{uuid.uuid4().hex}"
    return Toys(root, tmp_path / "log", ray_address)


SHORT = {"lease_seconds": 4.0}
ONCE = {"make": 1, "double": 1, "square": 1, "total": 1}


def test_a_run_and_the_same_again(any_toys: Toys, tmp_path: Path) -> None:
    context = {"cache": str(tmp_path / "cache")}
    first = any_toys.run(context)
    assert first["total"].outputs == {"total": 6}
    assert any_toys.ran() == ONCE
    assert any_toys.run(context) == first
    assert any_toys.ran() == ONCE
    # What `state` has read is not read again.
    states = graph.state(any_toys.store, any_toys.stages())
    elsewhere = toy.context(tmp_path / "nothing")
    assert graph.run(any_toys.stages(), elsewhere, QUIET, states) == first
    made = first["make"]
    assert [(file.path, file.size) for file in made.files] == [("deep/numbers.txt", 5)]
    assert open_store(made.uri).read("deep/numbers.txt") == b"0 1 2"
    assert first["double"].inputs["made"] == record.Source(
        fingerprint=made.fingerprint, uri=made.uri
    )
    # Nothing is left but records and the attempts that they name.
    keys = {entry.key for entry in any_toys.store.list("")}
    home = record.folder("make", made.fingerprint)
    assert {key for key in keys if key.startswith(home)} == {
        f"{home}/record.json",
        f"{home}/attempts/{made.attempt}/deep/numbers.txt",
    }


def test_finished_runs_need_no_ray(toys: Toys) -> None:
    toys.run()
    process = toys.drive()
    out, _ = process.communicate()
    assert json.loads(out)["ray"] is False


def test_an_edit_reruns_what_is_below_it(toys: Toys) -> None:
    first = toys.run()
    second = toys.run(double={"value": 4})
    assert toys.ran() == {"make": 1, "double": 2, "square": 1, "total": 2}
    assert second["square"] == first["square"]


def test_other_resources_and_another_place_rerun_nothing(toys: Toys, tmp_path: Path) -> None:
    toys.run()
    toys.run({"num_workers": 64, "gpus_per_worker": 8, "lease_seconds": 9})
    shutil.copytree(toys.root, tmp_path / "moved")
    found = graph.run(toys.stages(), toy.context(tmp_path / "moved"), QUIET)
    assert toys.ran() == ONCE
    assert (Path(found["make"].uri) / "deep" / "numbers.txt").read_text() == "0 1 2"
    assert found["make"].uri.startswith(str(tmp_path / "moved"))


def test_two_drivers_run_each_body_once(any_toys: Toys, tmp_path: Path) -> None:
    changes = {name: {"seconds": 0.5} for name in ONCE}
    context = {"cache": str(tmp_path / "cache")}
    drivers = [any_toys.drive(context, **changes) for _ in range(2)]
    results = [driver.communicate(timeout=120) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], results
    first, second = (json.loads(out)["attempts"] for out, _ in results)
    assert first == second
    assert any_toys.ran() == ONCE


def test_a_waiter_says_who_holds_the_lease(toys: Toys) -> None:
    text = io.StringIO()
    key = record.lease_key("make", fingerprints(toys.stages())["make"])
    lease = Lease(toys.store, key, "other", 30)
    assert lease.take()

    def release_when_reported() -> None:
        while "held by" not in text.getvalue():
            time.sleep(0.1)
        assert not toys.ran()
        lease.release()

    thread = threading.Thread(target=release_when_reported)
    thread.start()
    graph.run(toys.stages(), toy.context(toys.root), Console(file=text))
    thread.join()
    assert toys.ran() == ONCE
    assert f"held by {socket.gethostname()} (process {os.getpid()})" in text.getvalue()


def test_kill_9_and_the_next_run_takes_over(toys: Toys) -> None:
    changes = {"double": {"seconds": 4}}
    driver = toys.drive(SHORT, **changes)
    toys.wait_for("double")
    killed = toys.holder("double", **changes)
    driver.kill()
    driver.communicate()
    assert killed
    # What a stage's process leaves that was killed itself, before it could clean up.
    home = record.folder("double", fingerprints(toys.stages(**changes))["double"])
    left = Path(toys.root) / home / "attempts" / killed.attempt
    left.mkdir(parents=True, exist_ok=True)
    found = toys.run(**changes)
    assert toys.ran() == {"make": 1, "double": 2, "square": 1, "total": 1}
    assert found["double"].attempt != killed.attempt
    assert killed.attempt not in {path.name for path in Path(toys.root).glob("*/attempts/*")}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_gives_the_lease_back(toys: Toys, number: signal.Signals) -> None:
    changes = {"double": {"seconds": 30}, "square": {"seconds": 30}}
    driver = toys.drive({"lease_seconds": 60}, **changes)
    toys.wait_for("double")
    toys.wait_for("square")
    driver.send_signal(number)
    driver.communicate(timeout=120)
    assert toys.holder("double", **changes) is None
    assert toys.holder("square", **changes) is None
    assert toys.record("double", **changes) is None


def steal(toys: Toys, **changes: Any) -> str:
    """Steal the lease of `make`: the attempt that lost it."""
    toys.wait_for("make")
    key = record.lease_key("make", fingerprints(toys.stages(**changes))["make"])
    while True:
        holder = Holder.read(toys.store, key)
        assert holder
        thief = {"attempt": "thief", "holder": "a thief", "since": "now", "seconds": 1.0}
        if toys.store.replace(key, json.dumps(thief).encode(), holder.version):
            return holder.attempt


def test_a_lost_lease_ends_the_process_and_leaves_no_record(toys: Toys) -> None:
    changes = {"make": {"seconds": 3}}
    thread = threading.Thread(target=steal, args=(toys,), kwargs=changes)
    thread.start()
    with pytest.raises(RunFailed, match="make failed: its process was lost") as error:
        toys.run({**SHORT, "max_retries": 0}, **changes)
    thread.join()
    assert error.value.failures["make"].retry_helps
    assert "rerun the same command to resume" in str(error.value)
    assert toys.record("make", **changes) is None
    assert toys.ran() == {"make": 1}


def test_after_a_lost_lease_ray_starts_the_stage_again(toys: Toys) -> None:
    changes = {"make": {"seconds": 2}}
    lost: list[str] = []
    thread = threading.Thread(target=lambda: lost.append(steal(toys, **changes)))
    thread.start()
    found = toys.run(SHORT, **changes)
    thread.join()
    assert found["make"].attempt != lost[0]
    assert toys.ran() == {**ONCE, "make": 2}


def test_a_failure_stops_what_is_below_it_only(toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "learning rate 7 diverged; use less than 1 (https://ada:lovelace@example.org)"
    with pytest.raises(RunFailed) as error:
        toys.run(double={"fail": message}, square={"seconds": 1})
    assert toys.ran() == {"make": 1, "double": 1, "square": 1}
    assert error.value.skipped == ["total"]
    text = str(error.value)
    assert "double failed: learning rate 7 diverged; use less than 1" in text
    assert "not run, because they need it: total" in text
    assert "A retry would not help" in text
    assert toys.record("square", square={"seconds": 1})
    details = Path(error.value.failures["double"].details)
    content = json.loads(details.read_text())
    assert "ValueError" in content["traceback"] and "toy.py" in content["traceback"]
    assert "lovelace" not in details.read_text() + text
    assert not list(Path(toys.root).glob("double-*/attempts/*"))
    assert toys.holder("double", double={"fail": message}) is None


def crash() -> None:
    os._exit(1)


def survive() -> str:
    return "3"


def crash_once(context: StageContext, config: toy.Toy) -> dict[str, Any]:
    """Its own Ray task dies the first time, as one does whose machine is lost."""
    import ray

    toy.work(context, config)
    first = Path(config.log).read_text().count(context.name) == 1
    return {"text": ray.get(ray.remote(max_retries=0)(crash if first else survive).remote())}


def test_a_lost_machine_is_tried_again(toys: Toys) -> None:
    stage = toy.with_kind(toys.stages()[-1], body=crash_once)
    assert toys.run_stages([stage])["make"].outputs == {"text": "3"}
    assert toys.ran() == {"make": 2}
    with pytest.raises(RunFailed, match="WorkerCrashedError") as error:
        stage = toy.with_kind(stage, version=2)
        toys.log.unlink()
        toys.run_stages([stage], max_retries=0)
    assert error.value.failures["make"].retry_helps


def returns_an_object(context: StageContext, config: toy.Toy) -> dict[str, Any]:
    return {"model": {"weights": object()}}


def returns_nothing(context: StageContext, config: toy.Toy) -> None:
    pass


def asks_for_more(context: StageContext, config: toy.Toy) -> dict[str, Any]:
    return context.inputs["adapter"].outputs


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (returns_an_object, "outputs.model.weights is a object, which has no deterministic"),
        (returns_nothing, "the body of make returned a NoneType; return a dict"),
        (asks_for_more, "there is no input 'adapter'; add it to the stage's needs \\(none\\)"),
    ],
)
def test_bodies_that_break_the_contract(toys: Toys, body: Any, message: str) -> None:
    with pytest.raises(RunFailed, match=message):
        toys.run_stages([toy.with_kind(toys.stages()[-1], body=body)])


def test_a_pinned_stage_is_taken_as_it_is(toys: Toys, tmp_path: Path) -> None:
    made = toys.run(make={"value": 5})["make"]
    *rest, make = toys.stages()
    home = str(Path(made.uri).parents[1])
    found = toys.run_stages([*rest, dataclasses.replace(make, pinned=home)])
    assert found["make"].outputs == {"count": 5}
    assert found["total"].outputs == {"total": 20}
    assert toys.ran()["make"] == 1

    plain = tmp_path / "plain"
    (plain / "deep").mkdir(parents=True)
    (plain / "deep" / "numbers.txt").write_text("100")
    square = dataclasses.replace(rest[-1], kind=toy.KINDS[toy.total], needs={"doubled": "make"})
    (plain / "doubled.txt").write_text("7")
    found = toys.run_stages([square, dataclasses.replace(make, pinned=str(plain))])
    assert found["square"].outputs == {"total": 7}

    with pytest.raises(StoreError, match="which is empty: check the address"):
        toys.run_stages([dataclasses.replace(make, pinned=str(tmp_path / "nothing"))])


def test_state(toys: Toys) -> None:
    def states(**changes: Any) -> dict[str, str]:
        rows = graph.state(toys.store, toys.stages(**changes))
        assert all(isinstance(row, State) and row.path.startswith(toys.root) for row in rows)
        return {row.name: row.state for row in rows}

    assert set(states().values()) == {"to run"}
    toys.run()
    assert set(states().values()) == {"cached"}
    changes = {"double": {"seconds": 30}}
    driver = toys.drive(SHORT, **changes)
    toys.wait_for("double", 2)
    assert states(**changes) == {
        "make": "cached",
        "double": "running",
        "square": "cached",
        "total": "waiting",
    }
    driver.kill()
    driver.communicate()
    time.sleep(1)
    assert states(**changes)["double"] == "to run"


def test_records_carry_no_credentials(any_toys: Toys, tmp_path: Path) -> None:
    any_toys.run({"cache": str(tmp_path / "cache")}, make={"fail": ""})
    secrets = {os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    for entry in any_toys.store.list(""):
        content = any_toys.store.read(entry.key) or b""
        assert not [secret for secret in secrets if secret.encode() in content], entry.key
    made = Record(
        stage="make",
        fingerprint="0" * 64,
        attempt="a",
        config={"log": "https://ada:lovelace@host/x?token=abc and more"},
        outputs={"text": f"the key is {os.environ['AWS_SECRET_ACCESS_KEY']}"},
    )
    record.publish(any_toys.store, made)
    text = (any_toys.store.read(record.record_key("make", "0" * 64)) or b"").decode()
    assert "lovelace" not in text and "abc" not in text and "test-secret-value" not in text


def test_an_input_without_files(s3_endpoint: str, tmp_path: Path) -> None:
    store = open_store(f"s3://lab/{uuid.uuid4().hex}")
    made = record.publish(store, Record(stage="make", fingerprint="1" * 64, attempt="a"))
    assert list(Input(made, str(tmp_path / "cache")).folder.iterdir()) == []


def test_a_damaged_copy_is_refused(ray_address: str, tmp_path: Path) -> None:
    toys = Toys(f"s3://lab/{uuid.uuid4().hex}", tmp_path / "log", ray_address)
    *_, make = toys.stages()
    made = toys.run_stages([make])["make"]
    files = open_store(made.uri)
    files.delete("deep/numbers.txt")
    files.create("deep/numbers.txt", b"9 9 9")
    with pytest.raises(RunFailed, match="its checksum differs"):
        toys.run({"cache": str(tmp_path / "cache")})


def test_lint_reports_everything_at_once() -> None:
    total, double, square, make = toy.stages("log")
    wrong = [
        dataclasses.replace(total, needs={"doubled": "dobule"}),
        dataclasses.replace(double, name="Double it"),
        dataclasses.replace(square, needs={"made": "square"}),
        toy.with_kind(make, body=lambda context, config: {}),
        make,
    ]
    with pytest.raises(GraphError) as error:
        topological_order(wrong)
    message = str(error.value)
    assert "2 stages are called make" in message
    assert "total needs 'dobule' (as 'doubled'), which is not a stage" in message
    assert "'Double it' is not a stage's name" in message
    assert "need each other in a cycle: square -> square" in message
    assert "make: the body <function" in message
    assert "2 kinds have the id tests.pipeline.toy.make: <function" in message


def test_errors_survive_pickling() -> None:
    failed = StageInterrupted("make", "lost", True, "runs/make/failures/1.json")
    for error in (
        failed,
        StageFailed("a", "b", False, "c"),
        RunFailed({"make": failed}, ["total"]),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error) and str(copy) == str(error)
    assert copy.failures["make"].details == failed.details


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=f"port {port} .* is in use .*; choose another"):
            free_port(port)
    assert free_port(port) == port
    assert free_port(None) > 0


def test_an_unwritable_store_is_reported_before_anything_runs(toys: Toys, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="a part of that path is a file"):
        graph.run(toys.stages(), toy.context(tmp_path / "file" / "runs"), QUIET)
    assert not toys.ran()


def test_stages_are_tracked_below_their_workflow(toys: Toys, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    *_, make = toys.stages()
    make = toy.with_kind(make, headline=count_of)
    command = "adsc run toy --set make.value=3"
    given = {"tracking_uri": uri, "parameters": {"value": "3"}, "command": command}
    made = toys.run_stages([make], **given)["make"]
    client = MlflowClient(uri)
    assert made.run_id
    stage = client.get_run(made.run_id)
    assert stage.data.tags["adsc.record"].endswith("record.json")
    parent = client.get_run(stage.data.tags["mlflow.parentRunId"])
    assert (stage.info.status, parent.info.status) == ("FINISHED", "FINISHED")
    assert stage.data.params["value"] == "3"
    assert parent.data.params == {"value": "3", "found": "yes"}
    assert parent.data.metrics == {"count": 3, "gpu_hours": 0, "seconds/make": made.seconds}
    (data,) = parent.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("numbers", "12")
    assert made.workflow_run == f"experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}"
    assert parent.data.tags["mlflow.source.name"] == "adsc run toy"
    assert parent.data.tags["adsc.command"] == command
    config = json.loads(
        Path(client.download_artifacts(parent.info.run_id, "config.json")).read_text()
    )
    assert config["make"]["value"] == 3


def count_of(made: Record) -> Headline:
    data = DataSet(made.uri, "numbers", "12")
    return Headline(metrics=made.outputs, params={"found": "yes"}, data=data)


@pytest.mark.slow
@pytest.mark.slow
def test_an_embedded_ray_beside_another_and_kill_9(toys: Toys, monkeypatch: Any) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    changes = {"double": {"seconds": 4}}
    driver = toys.drive({**SHORT, "address": None}, **changes)
    toys.wait_for("double", seconds=120)
    driver.kill()
    driver.communicate()
    again = toys.drive({"address": None}, **changes)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert set(json.loads(out)["attempts"]) == set(ONCE)
    assert toys.ran() == {"make": 1, "double": 2, "square": 1, "total": 1}

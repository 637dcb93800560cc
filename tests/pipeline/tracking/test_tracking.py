"""Tracking against a real MLflow: an SQLite database, and a server process that dies in mid-run."""

from __future__ import annotations

import logging
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import Run

from pipeline.redact import HIDDEN, flatten, redact
from pipeline.tracking import tracker as tracking
from pipeline.tracking.tracker import RunHandle, Tracker, TrackingError

EXPERIMENT = "adsc"


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of busy machines: a server that is there answers late."""
    monkeypatch.setattr(tracking, "WAIT_SECONDS", 60.0)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tracking.prepare(tracking.default_uri(tmp_path_factory.mktemp("tracking")), EXPERIMENT)


def fetch(uri: str, run_id: str | None) -> Run:
    assert run_id is not None
    return MlflowClient(uri).get_run(run_id)


def log_loss(handle: RunHandle) -> list[str]:
    """What a training worker does, in its own process."""
    tracker = Tracker(handle)
    for step in range(3):
        tracker.metrics({"train": {"loss": 1.0 / (step + 1)}}, step=step)
    tracker.close()
    return tracker.problems


def test_workflow_and_stage_as_people_see_them(uri: str, tmp_path: Path) -> None:
    workflow_run = tracking.start_workflow(
        uri, EXPERIMENT, "demo", {"seed": 0}, {"adsc.root": "/store"}
    )
    parent = workflow_run.run_id
    tags = {"adsc.fingerprint": "f" * 64, "adsc.record": "/store/train-ffff/record.json"}
    (tmp_path / "report.html").write_text("<p>")
    with tracking.stage_run(uri, EXPERIMENT, parent, "train", tags) as tracker:
        tracker.params({"train": {"rank": 8, "plans": ["2:1/2", ""]}, "stages": [{"lr": 0.1}]})
        tracker.metrics({"accuracy": 0.5, "difference": None})
        tracker.artifact(tmp_path / "report.html", "report")
        tracker.artifact(tmp_path, "all")
        tracker.dataset("s3://bucket/grids", "grids", "0123456789abcdef" * 4)
        tracker.note("**What** this is")
        running = fetch(uri, tracker.run_id)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            assert pool.submit(log_loss, pickle.loads(pickle.dumps(tracker.handle))).result() == []
    workflow_run.finish("FINISHED")

    client, run = MlflowClient(uri), fetch(uri, tracker.run_id)
    assert tracker.problems == []
    assert (running.info.status, run.info.status) == ("RUNNING", "FINISHED")
    assert run.info.run_name == "train"
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert tags.items() <= run.data.tags.items()
    assert run.data.params == {
        "train.rank": "8",
        "train.plans": '["2:1/2", ""]',
        "stages.0.lr": "0.1",
    }
    # On a busy machine it takes long enough for the machine's load to be sampled, too.
    metrics = {k: v for k, v in run.data.metrics.items() if not k.startswith("system/")}
    assert metrics == {"accuracy": 0.5, "train/loss": pytest.approx(1 / 3)}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, round(m.value, 3)) for m in history] == [(0, 1.0), (1, 0.5), (2, 0.333)]
    assert [a.path for a in client.list_artifacts(run.info.run_id)] == ["all", "report"]
    assert client.list_artifacts(run.info.run_id, "report")[0].path == "report/report.html"
    data = run.inputs.dataset_inputs[0].dataset
    assert (data.name, data.source_type, data.digest) == (
        "grids",
        "s3",
        ("0123456789abcdef" * 3)[:36],
    )
    assert run.data.tags["mlflow.note.content"] == "**What** this is"
    workflow = fetch(uri, parent)
    assert (workflow.info.run_name, workflow.info.status) == ("demo", "FINISHED")
    assert workflow.data.tags["adsc.workflow"] == "demo"


def test_artifacts_lie_beside_the_database(uri: str, tmp_path: Path) -> None:
    with tracking.stage_run(uri, EXPERIMENT, None, "prepare", {}) as tracker:
        (tmp_path / "sizes.json").write_text("{}")
        tracker.artifact(tmp_path / "sizes.json")
    folder = Path(uri.removeprefix("sqlite:///")).parent / "mlflow-artifacts"
    assert [p.name for p in folder.rglob("sizes.json")] == ["sizes.json"]
    assert not Path("mlruns").exists()


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_a_body_that_raises_closes_its_run(uri: str, error: type, status: str) -> None:
    with pytest.raises(error), tracking.stage_run(uri, EXPERIMENT, None, "merge", {}) as tracker:
        raise error("no")
    assert fetch(uri, tracker.run_id).info.status == status


def test_a_dead_attempts_run_is_closed_by_the_next(uri: str) -> None:
    tags = {"adsc.record": "/store/merge-1/record.json"}
    dead = tracking._open_run(uri, EXPERIMENT, "merge", tags)
    other = tracking._open_run(uri, EXPERIMENT, "merge", {"adsc.record": "/store/merge-2"})
    with tracking.stage_run(uri, EXPERIMENT, None, "merge", tags) as tracker:
        assert tracker.flush()
        assert fetch(uri, tracker.run_id).info.status == "RUNNING"
        assert fetch(uri, dead.run_id).info.status == "KILLED"
        assert fetch(uri, other.run_id).info.status == "RUNNING"


def test_many_and_long_params_and_odd_names(uri: str) -> None:
    with tracking.stage_run(uri, EXPERIMENT, None, "wide", {}) as tracker:
        tracker.params({**{f"p{i}": i for i in range(230)}, "long": "x" * 9000, "odd (name)?": 1})
        tracker.metrics({"prefill (ms)": 3, "wrong": "text"})
    run = fetch(uri, tracker.run_id)
    assert len(run.data.params) == 232
    assert run.data.params["odd _name__"] == "1"
    assert len(run.data.params["long"]) == 6000
    assert run.data.params["long"].endswith("x [cut: 9000 characters in all]")
    assert run.data.metrics == {"prefill _ms_": 3}
    assert tracker.problems == ["metric wrong is 'text', not a number"]
    assert run.data.tags["adsc.tracking_problems"] == tracker.problems[0]


SECRETS = {
    "aws_secret_access_key": "wJalrXUtnFEMI",
    "hf_token": "abcdef",
    "db": {"password": 1234, "uri": "postgresql://ada:lovelace@db/x"},
    "credentials": {"user": "ada", "list": ["lovelace"]},
    "note": "use AKIAIOSFODNN7EXAMPLE please",
    "header": ["Bearer lovelace"],
    "hub": "hf_abcdefghijklmnopqrstuvwxyz",
    "link": "https://b.s3/x?X-Amz-Signature=lovelace&y=1",
    "pem": "-----BEGIN RSA PRIVATE KEY-----\nlovelace",
}
HARMLESS = {
    "num_vision_tokens": 64,
    "image_token": "<image>",
    "eos_token": "</s>",
    "tokenizer": "own",
    "key": "adsc",
    "uri": "s3://bucket/path@2",
}


def test_secrets_never_leave(uri: str) -> None:
    with tracking.stage_run(uri, EXPERIMENT, None, "s", {"adsc.x": "http://ada:lovelace@h"}) as run:
        run.params({**SECRETS, **HARMLESS})
        run.note("Bearer lovelace")
        run.dataset("https://ada:lovelace@host/x", "d", "1")
        run.metrics({"m": "Bearer lovelace"})
    database = Path(uri.removeprefix("sqlite:///")).read_bytes()
    for secret in (
        b"lovelace",
        b"wJalrXUtnFEMI",
        b"AKIAIOSFODNN7EXAMPLE",
        b"hf_abcdef",
        b"1234\x00",
    ):
        assert secret not in database
    params = fetch(uri, run.run_id).data.params
    assert params["db.password"] == params["hf_token"] == params["credentials.user"] == HIDDEN
    assert params["note"] == f"use {HIDDEN} please"
    assert {key: params[key] for key in HARMLESS} == {k: str(v) for k, v in HARMLESS.items()}


def test_redaction_leaves_ordinary_text_alone() -> None:
    assert redact("what is at row 2, column 3? a bag") == "what is at row 2, column 3? a bag"
    assert flatten({"a": {}, "b": None, "c": []}) == {"a": "{}", "b": "None", "c": "[]"}


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("./mlruns", "is a folder"),
        ("file:///data/mlruns", "is a folder"),
        ("sqlite:////proc/no/mlflow.db", "No such file|Read-only|denied"),
        ("http://127.0.0.1:1", "no answer, .* Connection refused"),
        ("localhost:5000", "neither a web address"),
        ("postgresql://ada:lovelace@h/x", r"\[redacted\]@h/x: a database shared"),
    ],
)
def test_a_bad_address_is_refused_at_the_start(address: str, says: str) -> None:
    with pytest.raises(TrackingError, match=says) as caught:
        tracking.prepare(address, EXPERIMENT)
    assert "http://host:port" in str(caught.value)
    assert "lovelace" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_deleted_experiment_says_how_to_restore_it(uri: str) -> None:
    tracking.prepare(uri, "old")
    found = MlflowClient(uri).get_experiment_by_name("old")
    MlflowClient(uri).delete_experiment(found.experiment_id)
    with pytest.raises(TrackingError, match=f"restore --experiment-id {found.experiment_id}"):
        tracking.prepare(uri, "old")


def test_relative_database_is_the_same_for_all_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking.prepare("sqlite:///m.db", EXPERIMENT) == f"sqlite:///{tmp_path}/m.db"


def test_two_drivers_may_prepare_one_database_at_once(tmp_path: Path) -> None:
    address = tracking.default_uri(tmp_path)
    code = f"from pipeline.tracking.tracker import prepare; prepare({address!r}, 'adsc')"
    racers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [racer.wait(60) for racer in racers] == [0, 0]


def test_a_broken_database_fails_nothing_and_is_reported_once(tmp_path: Path) -> None:
    address = tracking.prepare(tracking.default_uri(tmp_path), EXPERIMENT)
    with tracking.stage_run(address, EXPERIMENT, None, "train", {}, tmp_path / "spool") as tracker:
        Path(address.removeprefix("sqlite:///")).write_bytes(b"not a database")
        for step in range(50):
            tracker.metrics({"loss": 1.0}, step)
    assert len(tracker.problems) == 1
    assert "file is not a database" in tracker.problems[0]


def test_a_missing_artifact_is_noted_and_tracking_goes_on(uri: str, tmp_path: Path) -> None:
    with tracking.stage_run(uri, EXPERIMENT, None, "report", {}) as tracker:
        tracker.artifact(tmp_path / "absent.html")
        tracker.metrics({"after": 1})
    assert "absent.html" in tracker.problems[0]
    assert fetch(uri, tracker.run_id).data.metrics == {"after": 1}


def test_artifacts_on_s3_and_an_endpoint_that_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    endpoint = ThreadedMotoServer("127.0.0.1", port=0)
    endpoint.start()
    for name, value in {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*endpoint.get_host_and_port()),
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket="artifacts")
    uri = tracking.prepare(tracking.default_uri(tmp_path), EXPERIMENT, "s3://artifacts/mlflow")
    (tmp_path / "a.txt").write_text("a")
    with tracking.stage_run(uri, EXPERIMENT, None, "report", {}) as tracker:
        tracker.artifact(tmp_path / "a.txt")
        assert tracker.flush()
        assert [
            o["Key"].split("/")[-1] for o in s3.list_objects(Bucket="artifacts")["Contents"]
        ] == ["a.txt"]
        s3.delete_object(
            Bucket="artifacts", Key=s3.list_objects(Bucket="artifacts")["Contents"][0]["Key"]
        )
        s3.delete_bucket(Bucket="artifacts")
        tracker.artifact(tmp_path / "a.txt")
        assert not tracker.flush()
        assert "NoSuchBucket" in tracker.problems[0]
        s3.create_bucket(Bucket="artifacts")
        assert tracker.flush()
        endpoint.stop()
        tracker.artifact(tmp_path / "a.txt")
        assert not tracker.flush()
        assert "Could not connect" in tracker.problems[1]
    assert fetch(uri, tracker.run_id).info.status == "FINISHED"  # only the artifact waits
    assert "the next run sends the rest" in tracker.problems[2]


def test_an_untracked_run_does_not_even_load_mlflow() -> None:
    code = (
        "import sys; from pipeline.tracking.tracker import RunHandle, Tracker\n"
        "t = Tracker(RunHandle('', None)); t.params({'a': 1}); t.metrics({'m': 1}); t.note('x')\n"
        "t.dataset('/x', 'd', '1'); t.artifact('/absent'); t.finish('FINISHED')\n"
        "assert t.model('/absent', 'm') is None and t.problems == []\n"
        "assert 'mlflow' not in sys.modules and 'boto3' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Server:
    """A real `mlflow server` process that can be killed and started again on its port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        store = ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        place = ["--artifacts-destination", str(self.folder / "artifacts")]
        at = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command = [sys.executable, "-m", "mlflow", "server", *store, *place, *at]
        log = (self.folder / "server.log").open("a")
        self.process = subprocess.Popen(
            command, env=env, stdout=log, stderr=log, start_new_session=True
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                if requests.get(f"{self.uri}/health", timeout=2).ok:
                    return
            except requests.ConnectionError:
                time.sleep(0.3)
        raise AssertionError((self.folder / "server.log").read_text())

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def whole_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    tracking.prepare(server.uri, EXPERIMENT)
    yield server
    server.kill()


@pytest.fixture
def server(whole_server: Server) -> Server:
    if whole_server.process.poll() is not None:
        whole_server.start()
    return whole_server


def losses(uri: str, run_id: str | None) -> list[tuple[int, float]]:
    assert run_id
    return [(m.step, m.value) for m in MlflowClient(uri).get_metric_history(run_id, "loss")]


def test_a_server_killed_in_mid_run_gets_everything_later(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("a")
    tags, spool = {"adsc.record": "killed"}, tmp_path / "spool"
    with (
        caplog.at_level(logging.WARNING, "pipeline.tracking.tracker"),
        tracking.stage_run(server.uri, EXPERIMENT, None, "train", tags, spool) as tracker,
    ):
        tracker.params({"lr": 0.1})
        tracker.metrics({"loss": 1.0}, step=0)
        assert tracker.flush()
        server.kill()
        started = time.monotonic()
        for step in range(1, 1001):
            tracker.metrics({"loss": 1 / (1 + step)}, step=step)
        tracker.artifact(tmp_path / "a.txt")
        tracker.tag("after", "the kill")
        assert time.monotonic() - started < 10  # a single request would take its 20 s
        assert not tracker.flush()
        server.start()
        assert tracker.flush()
        tracker.metrics({"loss": 0.0}, step=1001)
    run = fetch(server.uri, tracker.run_id)
    assert run.info.status == "FINISHED"
    assert losses(server.uri, tracker.run_id) == [
        *((step, 1 / (1 + step)) for step in range(1001)),
        (1001, 0.0),
    ]
    problems = run.data.tags["adsc.tracking_problems"]
    # 1000 metrics, artifact and tag; perhaps samples of the machine's load.
    expected = r"MLflow was unavailable for \d+ s; (10\d\d) items spooled, \1 sent later$"
    assert re.search(expected, problems), problems
    ours = [record for record in caplog.records if record.name == "pipeline.tracking.tracker"]
    assert len(ours) == 2  # that it is unavailable, and the sum at the end
    assert run.data.tags["after"] == "the kill"
    assert [a.path for a in MlflowClient(server.uri).list_artifacts(run.info.run_id)] == ["a.txt"]
    assert not list(spool.iterdir())


@pytest.mark.slow
def test_runs_begun_and_ended_while_the_server_is_dead(server: Server, tmp_path: Path) -> None:
    """The parent, its stage and the stage's worker know no run, and the next run makes them."""
    spool, folder = tmp_path / "spool", tmp_path / "scratch"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    server.kill()
    parent = tracking.start_workflow(server.uri, EXPERIMENT, "demo", {"a": 1}, {}, spool)
    with tracking.stage_run(
        server.uri, EXPERIMENT, parent.id_for_children, "train", {"x": "y"}, spool
    ) as tracker:
        assert tracker.run_id is None
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            problems = pool.submit(log_loss, tracker.handle).result()
        assert "Connection refused" in problems[0]
        tracker.artifact(folder / "a.txt")
        ended = time.time()
    parent.finish("FINISHED")
    shutil.rmtree(folder)  # as the scratch folder of a stage on a remote store
    for token in ("ada:lovelace", "wJalr"):
        assert token not in "".join(path.read_text() for path in spool.glob("*.jsonl"))
    server.start()
    time.sleep(1)  # the run's end and its sending are apart
    # Its own threads try again as well: whoever comes first.
    deadline = time.monotonic() + 60
    while list(spool.glob("*.jsonl")):
        outcome = tracking.reconcile(spool, server.uri)
        assert time.monotonic() < deadline, outcome
        time.sleep(0.5)
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id], "tags.x = 'y'")
    assert (run.info.status, run.info.run_name) == ("FINISHED", "train")
    assert abs(run.info.end_time / 1000 - ended) < 5
    above = fetch(server.uri, run.data.tags["mlflow.parentRunId"])
    assert (above.info.status, above.data.params) == ("FINISHED", {"a": "1"})
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [0, 1, 2]
    assert [a.path for a in client.list_artifacts(run.info.run_id)] == ["a.txt"]


@pytest.mark.slow
def test_a_server_that_hangs_delays_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(tracking, "WAIT_SECONDS", 3.0)
    spool = tmp_path / "spool"
    with tracking.stage_run(server.uri, EXPERIMENT, None, "hangs", {}, spool) as tracker:
        tracker.metrics({"loss": 1.0}, step=0)
        assert tracker.flush()
        server.signal(signal.SIGSTOP)
        try:
            started = time.monotonic()
            for step in range(1, 101):
                tracker.metrics({"loss": 0.5}, step=step)
            assert time.monotonic() - started < 1
            assert not tracker.flush()
        finally:
            server.signal(signal.SIGCONT)
    deadline = time.monotonic() + 60
    while list(spool.glob("*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.2)
    # What the server was sent before it was stopped it may do after it was sent again: no twins.
    assert losses(server.uri, tracker.run_id) == [
        (0, 1.0),
        *((step, 0.5) for step in range(1, 101)),
    ]
    assert fetch(server.uri, tracker.run_id).info.status == "FINISHED"


OWNER = """
import sys, time
from pipeline.tracking import tracker as tracking
tracking.WAIT_SECONDS = 60.0
run = tracking._open_run(sys.argv[1], "adsc", "demo", {}, sys.argv[2])
run.metrics({"loss": 1.0}, 1)
print(run.run_id, flush=True)
run.flush()
print("ready", flush=True)
time.sleep(60)
"""


def test_the_run_of_a_dead_process_is_closed_and_that_of_a_living_one_is_not(
    uri: str, tmp_path: Path
) -> None:
    owners = [
        subprocess.Popen(
            [sys.executable, "-c", OWNER, uri, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    runs = []
    for owner in owners:
        assert owner.stdout
        runs.append(owner.stdout.readline().strip())
        assert owner.stdout.readline() == "ready\n"
    owners[0].kill()
    owners[0].wait()
    tracking.reconcile(tmp_path, uri)
    assert [fetch(uri, run).info.status for run in runs] == ["KILLED", "RUNNING"]
    owners[1].kill()
    owners[1].wait()
    tracking.reconcile(tmp_path, uri)
    assert fetch(uri, runs[1]).info.status == "KILLED"
    assert losses(uri, runs[1]) == [(1, 1.0)]
    assert not list(tmp_path.iterdir())

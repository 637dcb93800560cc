"""A team's MLflow: a server on PostgreSQL with artifacts on S3, and many writers at once.

Needs a PostgreSQL server (Debian: `apt-get install postgresql`) and the extra `postgres`.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient

from pipeline.tracking import tracker as tracking
from tests.pipeline.cluster.ray_cluster import free_ports

pytestmark = pytest.mark.slow
EXPERIMENT, WRITERS, STEPS = "team", 12, 150


def initdb() -> str | None:
    there = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))  # noqa: PTH207
    return there[-1] if there else shutil.which("initdb")


def as_postgres(folder: Path) -> list[str]:
    """PostgreSQL refuses to run as the superuser."""
    if os.getuid():
        return []
    shutil.chown(folder, "postgres", "postgres")
    return ["runuser", "-u", "postgres", "--"]


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The address of an empty database of a PostgreSQL server of its own, with a password."""
    program = initdb()
    if program is None:
        pytest.skip("no PostgreSQL server on this machine: apt-get install postgresql")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("MLflow reaches PostgreSQL through psycopg: pip install psycopg[binary]")
    # Not in pytest's folder, which other users may not enter.
    folder = Path(tempfile.mkdtemp(prefix="adsc-postgres-"))
    password, port, user = secrets.token_hex(12), free_ports(1)[0], as_postgres(folder)
    (folder / "password").write_text(password)
    if user:
        shutil.chown(folder / "password", "postgres")
    data, programs = folder / "data", Path(program).parent
    subprocess.run(
        [*user, program, "-D", data, "-U", "adsc", "--auth=scram-sha-256",
         f"--pwfile={folder / 'password'}"],
        check=True, capture_output=True,
    )  # fmt: skip
    options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder}"
    control = [*user, str(programs / "pg_ctl"), "-D", str(data), "-w"]
    subprocess.run(
        [*control, "-o", options, "-l", str(folder / "log"), "start"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield f"postgresql://adsc:{password}@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "fast", "stop"], check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def server(
    database: str, s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    port, log = free_ports(1)[0], tmp_path_factory.mktemp("server") / "log"
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database,
         "--artifacts-destination", "s3://lab/mlflow", "--host", "127.0.0.1",
         "--port", str(port), "--workers", "2"],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    uri, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 180
    try:
        while True:
            try:
                if requests.get(f"{uri}/health", timeout=2).ok:
                    break
            except requests.RequestException:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.3)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def write(job: tuple[str, int, str]) -> list[str]:
    """What a workflow with one stage does, in a process of its own; returns its problems."""
    uri, number, folder = job
    place = Path(folder) / str(number)
    place.mkdir()
    (place / "report.html").write_text(f"<p>{number}")
    tracking.prepare(uri, EXPERIMENT)  # all at once
    parent = tracking.start_workflow(uri, EXPERIMENT, f"workflow {number}", {"seed": number}, {})
    with tracking.stage_run(
        uri, EXPERIMENT, parent.id_for_children, f"train {number}", {"adsc.record": f"r{number}"}
    ) as stage:
        for step in range(STEPS):
            stage.metrics({"loss": number + 1 / (step + 1)}, step=step)
        stage.artifact(place / "report.html")
    parent.finish("FINISHED")
    return [*parent.problems, *stage.problems]


def test_many_writers_at_once(
    server: str, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "WAIT_SECONDS", 120.0)
    started = time.monotonic()
    with ProcessPoolExecutor(WRITERS, mp_context=get_context("spawn")) as pool:
        jobs = [(server, number, str(tmp_path)) for number in range(WRITERS)]
        problems = [it for some in pool.map(write, jobs) for it in some]
    seconds = time.monotonic() - started
    assert not problems
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    assert len(runs) == 2 * WRITERS
    assert {run.info.status for run in runs} == {"FINISHED"}
    by_name = {run.info.run_name: run for run in runs}
    for number in range(WRITERS):
        stage, parent = by_name[f"train {number}"], by_name[f"workflow {number}"]
        assert stage.data.tags["mlflow.parentRunId"] == parent.info.run_id
        history = client.get_metric_history(stage.info.run_id, "loss")
        found = sorted((it.step, it.value) for it in history)
        assert found == [(step, number + 1 / (step + 1)) for step in range(STEPS)]
        assert [it.path for it in client.list_artifacts(stage.info.run_id)] == ["report.html"]
    from pipeline.store import open_store

    assert len(open_store("s3://lab/mlflow").list("")) == WRITERS
    password = database.split(":")[2].partition("@")[0]
    assert all(password not in str(run.to_dictionary()) for run in runs)
    (tmp_path / "seconds").write_text(f"{seconds:.0f}")


def test_a_database_without_a_server_works_too(
    database: str, s3_endpoint: str, tmp_path: Path
) -> None:
    """And its password is in nothing that is written."""
    uri = tracking.prepare(database, "direct", artifacts="s3://lab/direct")
    with tracking.stage_run(uri, "direct", None, "merge", {}, tmp_path / "spool") as stage:
        stage.metrics({"loss": 1.0})
    run = MlflowClient(uri).get_run(str(stage.run_id))
    assert run.data.metrics == {"loss": 1.0} and stage.problems == []
    password = database.split(":")[2].partition("@")[0]
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or password not in path.read_text()

"""Jobs: what is refused before anything is sent, one job for one work, and a real cluster."""

import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.cluster import jobs, preflight
from pipeline.cluster.jobs import JobError, Submission, plan_submission
from pipeline.durable import record as records
from pipeline.durable.graph import fingerprints
from pipeline.durable.record import Record
from pipeline.store import open_store
from pipeline.tracking.gauges import GAUGES, STATES
from tests.infra.documents import BUILT_IN
from tests.pipeline.cluster.ray_cluster import Cluster, free_ports, kill, started
from tests.small import SMALL_DEMO, Small
from workflows.commands.cluster.submit import DRIVER, PACKAGES
from workflows.commands.main import main
from workflows.registry import load_workflow

ROOT = "s3://lab/jobs"


def planned(*changes: str, root: str = ROOT, **options: Any) -> Submission:
    given = {"mlflow": "off", "driver": DRIVER, "packages": PACKAGES, **options}
    return plan_submission(load_workflow("demo", changes), changes, root, **given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mlflow", "off"], "--root runs is a folder of this machine"),
        (["--root", "/mnt/x", "--mlflow", "off"], "add --shared-root if every node mounts it"),
        (["--root", ROOT], "add --mlflow http://HOST:5000, or --mlflow off"),
        (["--root", ROOT, "--mlflow", "sqlite:///x.db"], "is a file of one machine"),
        (["--root", ROOT, "--mlflow", "http://ada:lovelace@mlflow"], "looks like a credential"),
        (["--root", "s3://key:secret@bucket/x", "--mlflow", "off"], "has credentials"),
        (["--root", ROOT, "--mlflow", "off", "--set", "plan=9:1/2"], "layer 9"),
        (["--root", ROOT, "--mlflow", "off", "--address", "head:6379"], "such as http://HEAD:8265"),
        (["--root", ROOT, "--mlflow", "off", "--address", "http://a:b@h:1"], "has credentials"),
    ],
)  # fmt: skip
def test_what_nodes_cannot_share_or_others_must_not_see_is_refused_in_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "demo", *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed
    assert "lovelace" not in printed


def test_a_cluster_that_is_not_there_is_reported_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    for words in (["status"], ["logs"], ["cancel", "adsc-demo-1"]):
        before = time.monotonic()
        assert main([*words, "--address", address]) == 2
        assert time.monotonic() - before < 60
        assert f"nothing answers at {address}" in capsys.readouterr().err


def test_a_server_that_is_no_ray_is_reported(
    s3_endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--address", s3_endpoint]) == 2
    printed = capsys.readouterr().err
    assert (
        "check that this is the dashboard of a Ray cluster" in printed
        and "Traceback" not in printed
    )


def test_the_id_follows_from_the_work_and_its_store_and_from_nothing_else() -> None:
    one = planned()
    assert re.fullmatch(r"adsc-demo-[0-9a-f]{12}", one.family)
    assert (
        planned(options=["--workers=8"], any_versions=True, python="python3").family == one.family
    )
    assert planned(root="s3://lab/elsewhere").family != one.family
    assert planned("train.steps=7").family != one.family


def test_credentials_of_this_machine_do_not_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = secrets.token_hex(20)
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    sent = planned()
    assert secret not in repr(sent)
    assert sent.environment["AWS_ENDPOINT_URL"] == "http://store:9000"
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://ada:{secret}@store:9000")
    with pytest.raises(JobError, match="AWS_ENDPOINT_URL looks like a credential") as caught:
        planned()
    assert secret not in str(caught.value)


def test_code_that_is_too_large_is_refused_with_the_file_to_move(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs, "MAX_CODE", 2**20)
    with pytest.raises(JobError, match=r"its largest file is .*workflows/assets/"):
        jobs.package_folder("workflows")


def test_preflight_names_every_node_and_package_that_differs(ray_address: str) -> None:
    here = preflight.versions()
    assert set(preflight.check(ROOT, here)) and set(preflight.check(ROOT, None))
    with pytest.raises(preflight.PreflightError) as caught:
        preflight.check(ROOT, {**here, "torch": "1.0.0", "peft": "0.1"})
    found = re.findall(r"node \S+ \(\w+\): (\w+) is (\S+) there and (\S+) here", str(caught.value))
    assert found == [("torch", here["torch"], "1.0.0"), ("peft", here["peft"], "0.1")]
    assert not [it for it in open_store(ROOT).list("") if it.key.startswith(".preflight")]


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Of a head of its own: beside another Ray on this machine, the tests' Ray takes no jobs, since
    the port of its job agent can't be chosen."""
    with (
        started({}, mode="disabled", workers=0) as cluster,
        jobs.connected(cluster.address) as client,
    ):
        client.metrics = cluster.metrics
        yield client


def a_job(code: str) -> Submission:
    entrypoint = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(code)}"
    family = f"adsc-toy-{secrets.token_hex(6)}"
    return Submission(
        family=family, entrypoint=entrypoint, metadata={}, environment={}, packages=PACKAGES
    )


@pytest.mark.ray
def test_the_same_work_is_one_job_and_after_it_ended_the_next(client: Any) -> None:
    work = a_job("import pipeline, time; print(pipeline.__file__, flush=True); time.sleep(600)")
    ids: list[tuple[str, bool]] = []
    racers = [
        threading.Thread(target=lambda: ids.append(jobs.start(client, work))) for _ in range(3)
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert sorted(ids) == [(f"{work.family}-1", False)] * 2 + [(f"{work.family}-1", True)]
    until(lambda: re.search(r"pipeline/__init__\.py\n", client.get_job_logs(ids[0][0])), 120)
    # The code that is installed here was shipped, and comes before what the machine has.
    shipped = client.get_job_logs(ids[0][0]).strip().splitlines()[-1]
    assert "working_dir" in shipped and not shipped.startswith(str(Path(jobs.__file__).parent))
    assert main(["cancel", "--address", client.get_address(), ids[0][0]]) == 0
    assert client.get_job_status(ids[0][0]) == "STOPPED"
    again, new = jobs.start(client, work)
    assert (again, new) == (f"{work.family}-2", True)
    client.stop_job(again)


def test_finished_work_is_not_submitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The store answers, so that no cluster is contacted, and none runs here."""
    words = ["submit", "demo", "--root", str(tmp_path), "--shared-root", "--mlflow", "off"]
    address = ["--address", "http://127.0.0.1:9"]
    prints = fingerprints(load_workflow("demo").stages())
    for place, (name, fingerprint) in enumerate(prints.items()):
        if place == len(prints) - 1:
            assert main([*words, *address]) == 2
            assert "nothing answers" in capsys.readouterr().err
        made = Record(stage=name, fingerprint=fingerprint, attempt="1")
        records.publish(open_store(str(tmp_path)), made)
    assert main([*words, *address]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" cached ") == len(prints) and "nothing was submitted" in printed


@pytest.mark.ray
def test_following_passes_everything_on_once_and_tells_of_failures(
    client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import time\nfor n in range(20): print('line', n, flush=True); time.sleep(0.05)\n1/0"
    name, _ = jobs.start(client, a_job(code))
    text: list[str] = []
    assert jobs.follow(client, name, text.append) == "FAILED"
    assert re.findall(r"^line (\d+)$", "".join(text), re.M) == [str(n) for n in range(20)]
    address = client.get_address()
    assert main(["logs", "--follow", "--address", address, name]) == 1
    printed = capsys.readouterr()
    assert "ZeroDivisionError" in printed.out and f"{name} FAILED" in printed.err
    assert main(["logs", "--address", address, "adsc-none-1"]) == 2
    assert "knows no job 'adsc-none-1'" in capsys.readouterr().err
    assert main(["status", "--address", address, "--json"]) == 0
    assert name in {row["job"] for row in json.loads(capsys.readouterr().out)}


class Answers:
    """A job server with one job, whose tail breaks off after some characters."""

    def __init__(self, output: str, statuses: list[str], breaks_at: int) -> None:
        self.output, self.statuses, self.breaks_at = output, statuses, breaks_at
        self.asked: list[str] = []

    def get_job_info(self, job: str) -> Any:
        self.asked.append("details")
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return SimpleNamespace(status=SimpleNamespace(value=status))

    def get_job_logs(self, job: str) -> str:
        self.asked.append("logs")
        return self.output

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.asked.append("tail")
        yield self.output[: self.breaks_at]
        raise RuntimeError("the connection is lost")


def test_an_ended_jobs_output_is_read_and_not_tailed() -> None:
    """Ray's server takes five seconds to close a tail of it."""
    server = Answers("one\ntwo\n", ["SUCCEEDED"], 0)
    text: list[str] = []
    assert jobs.follow(server, "adsc-demo-1", text.append) == "SUCCEEDED"
    assert "".join(text) == server.output
    assert server.asked == ["details", "logs"]


def test_output_written_while_the_connection_was_lost_is_passed_on() -> None:
    server = Answers("one\ntwo\n", ["RUNNING", "FAILED"], 5)
    text: list[str] = []
    assert jobs.follow(server, "adsc-demo-1", text.append) == "FAILED"
    assert text == ["one\nt", "wo\n"]


@pytest.mark.ray
def test_gauges_are_on_the_nodes_metrics_page(client: Any) -> None:
    """All of them, and those of Ray's own that the dashboard draws on any machine."""
    rates = GAUGES.keys() - {"adsc_stage_state"}
    values = {name.removeprefix("adsc_"): 0.5 for name in sorted(rates)}
    code = (
        "import ray, time; from pipeline.tracking import gauges; ray.init(address='auto')\n"
        f"gauges.training('train-1', 3, 8, {values!r})\n"
        "gauges.stage_states('demo', {'train-1': 'running', 'merge': 'to run', 'x': '?'})\n"
        "time.sleep(120)"
    )
    wanted = {f"ray_{gauge}" for gauge in GAUGES} | BUILT_IN - {"ray_node_gpus_utilization"}
    page, name, began = "", "", 0.0
    missing = wanted

    def there() -> bool:
        nonlocal page, name, began, missing
        # A process whose first calls its node's agent did not answer in time is never heard by it
        # (ray-project/ray#59665); the next one is.
        if not name or time.monotonic() - began > 60:
            if name:
                client.stop_job(name)
            (name, _), began = jobs.start(client, a_job(code)), time.monotonic()
        with urllib.request.urlopen(client.metrics, timeout=10) as answer:
            page = answer.read().decode()
        missing = wanted - set(re.findall(r"^(ray_\w+)\{", page, re.M))
        states = re.findall(r"^ray_adsc_stage_state\{", page, re.M)
        return not missing and len(states) == 2

    until(there, 240, lambda: f"without {missing}; the job's output: {client.get_job_logs(name)}")
    client.stop_job(name)
    lines = [line for line in page.splitlines() if line.startswith("ray_adsc_")]
    states = {
        re.search(r'stage="([^"]+)"', line)[1]: float(line.split()[-1])
        for line in lines
        if line.startswith("ray_adsc_stage_state")
    }
    assert states == {"train-1": STATES.index("running"), "merge": STATES.index("to run")}
    assert {float(line.split()[-1]) for line in lines if "steps_" in line} == {3.0, 8.0}


def adsc(cluster: Cluster, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "workflows.commands.main", *words, "--address", cluster.address],
        env={**cluster.environment, **more},
        capture_output=True,
        text=True,
        timeout=1800,
    )


def submit(cluster: Cluster, base: Path, root: str, *more: str) -> str:
    changes = [f"--set={change}" for change in (*SMALL_DEMO, f"base.source={base}")]
    options = ["--mlflow=off", "--workers=2", "--cpus=1.5", "--python", sys.executable]
    done = adsc(cluster, "submit", "demo", "--root", root, *changes, *options, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[0]


def made(root: str, base: Path) -> dict[str, Record]:
    stages = load_workflow("demo", [*SMALL_DEMO, f"base.source={base}"]).stages()
    found = {
        name: records.load(open_store(root), name, fingerprint)
        for name, fingerprint in fingerprints(stages).items()
    }
    return {name: record for name, record in found.items() if record is not None}


def keys(root: str, pattern: str) -> list[str]:
    return [it.key for it in open_store(root).list("") if re.search(pattern, it.key)]


def until(condition: Any, seconds: float = 600, why: Any = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.2)


@pytest.mark.slow
def test_cancelled_and_lost_jobs_go_on_on_a_cluster_with_tokens(
    s3_endpoint: str, small: Small
) -> None:
    """Two nodes, head included; a worker of Ray Train on each. Cancelled in mid-training; then the
    head is killed in mid-training, with all that it knew; the third submit finishes elsewhere."""
    root = "s3://lab/cluster"
    access = {name: os.environ[name] for name in os.environ if name.startswith("AWS_")}
    with started(access, mode="token", workers=1) as cluster:
        first = submit(cluster, small.base, root, "--no-follow")
        assert submit(cluster, small.base, root, "--no-follow") == first
        until(lambda: keys(root, r"^(train|control)-1-.*/run/step-"))
        shown = adsc(cluster, "status", first, "--json", **access)
        stages = json.loads(shown.stdout)["stages"]
        assert stages["prepare"] == "cached" and "running" in stages.values(), shown.stdout
        cancelled = adsc(cluster, "cancel", first)
        assert "STOPPED" in cancelled.stdout, cancelled.stderr
        # Leases were given back, so no run waits for them to expire.
        assert not keys(root, r"lease\.json$")
        before = made(root, small.base)
        assert {"pictures", "base", "prepare"} <= set(before)
        second = submit(cluster, small.base, root, "--no-follow")
        assert second == first.removesuffix("1") + "2"
        until(lambda: {"train-1", "control-1"} <= set(made(root, small.base)))
        log = ""
        while "to run: " not in log:
            log = adsc(cluster, "logs", second).stdout
        assert len(re.findall(r"^node \S+ \(\w+\): ray ", log, re.M)) == 2
        assert not set(before) & set(re.search(r"^to run: (.*)$", log, re.M)[1].split(", "))
        refused = adsc(cluster, "status", RAY_AUTH_MODE="disabled")
        assert refused.returncode == 2 and "it requires a token" in refused.stderr
        everything = [adsc(cluster, "status", job, "--json").stdout for job in (first, second)]
        everything += [log, cancelled.stdout, shown.stdout]
        everything += [path.read_text(errors="replace") for path in logs_of(cluster)]
        kill(cluster.head)
        between = made(root, small.base)
    secret = {cluster.token, access["AWS_SECRET_ACCESS_KEY"]}
    assert not [text for text in everything for word in secret if word in text]
    with started(access, mode="token", workers=1) as cluster:
        third = submit(cluster, small.base, root)
        assert third == first, "a new cluster knows no jobs"
    after = made(root, small.base)
    assert len(after) == 12 and "report" in after
    for stage, record in (before | between).items():
        assert after[stage] == record, f"{stage} was repeated"
    assert {record.commit for record in after.values()} != {None}
    store = open_store(root)
    for entry in store.list(""):
        if entry.size < 2**20:
            data = store.read(entry.key) or b""
            assert not [word for word in secret if word.encode() in data], entry.key


def logs_of(cluster: Cluster) -> list[Path]:
    """Everything that the nodes wrote, apart from the sockets and the token itself."""
    return [path for path in (cluster.folder / "ray").rglob("*.*") if path.is_file()]

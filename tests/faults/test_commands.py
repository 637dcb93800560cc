"""Commands in places where things are missing: one sentence instead of a traceback or a wait."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.durable.address import ClusterError, check_head, check_socket_room
from pipeline.durable.session import send_pending
from pipeline.kinds.export import ExportConfig
from pipeline.publishing.manifest import ExportError
from pipeline.stages.export import check_in_fresh_process
from pipeline.store.cache import folder as cache_folder
from pipeline.tracking.address import explained
from pipeline.tracking.spool import Journal, folder
from workflows.commands import terminal
from workflows.commands.main import main

REPOSITORY = Path(__file__).parents[2]


def command(*words: str, **more: Any) -> subprocess.Popen[str]:
    """`adsc` in a process of its own, from this checkout but without its folder on the path."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | more.pop("env", {})
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "workflows.commands.entry", *words],
        env=environment, text=True, stderr=subprocess.PIPE, **more,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "localhost:{}"])
def test_a_dead_head_is_seen_before_ray_connects(form: str) -> None:
    address = form.format(free_port())
    with pytest.raises(ClusterError, match=r"no Ray answers at .* \(Connection refused\)"):
        check_head(address)


def test_a_dead_head_in_the_environment(tmp_path: Path) -> None:
    """Ray's own words for it come after ten minutes, and are others."""
    address = f"127.0.0.1:{free_port()}"
    run = command(
        "run", "demo", "--root", str(tmp_path), "--mlflow", "OFF", env={"RAY_ADDRESS": address}
    )
    _, output = run.communicate()
    assert run.returncode == 2
    assert (
        f"no Ray answers at {address} (Connection refused)" in output and "Traceback" not in output
    )


@pytest.mark.parametrize(
    "address", ["head", "head:99999", "head:0", "http://head:8265", "ray://head", "a b:1"]
)
def test_what_is_no_address_of_a_cluster(address: str) -> None:
    with pytest.raises(ClusterError, match="is not the address of a Ray cluster; write HOST:6379"):
        check_head(address)


def test_addresses_that_answer() -> None:
    for left_to_ray in ("auto", "local"):
        check_head(left_to_ray)
    with socket.create_server(("127.0.0.1", 0)) as server:
        for form in ("127.0.0.1:{}", "ray://127.0.0.1:{}", "ray://127.0.0.1:{}/?x=1"):
            check_head(form.format(server.getsockname()[1]))


@pytest.fixture
def shadows(tmp_path: Path) -> Path:
    """A folder whose files have the names of ours and of Python's own modules."""
    where = tmp_path / "where the user stands"
    for name in ("pipeline", "adsc", "workflows", "ray", "tests"):
        (where / name).mkdir(parents=True)
        (where / name / "__init__.py").write_text(f"raise SystemExit('the user has {name}')")
    for name in ("queue", "types", "numpy", "secrets", "tempfile"):
        (where / f"{name}.py").write_text(f"raise SystemExit('the user has {name}')")
    return where


@pytest.mark.ray
def test_a_run_from_a_folder_that_shadows_packages(shadows: Path, tmp_path: Path) -> None:
    """A real Ray of its own: its workers import the toy pipeline and all that Ray needs."""
    import json

    job = {"root": str(tmp_path / "store"), "log": str(tmp_path / "log")}
    driver = (
        "import sys; from workflows.commands import terminal\n"
        "from tests.pipeline.durable import drive\n"
        "import json; drive.main(json.loads(sys.argv[1]))"
    )
    script = tmp_path / "bin" / "driver.py"
    script.parent.mkdir()
    script.write_text(driver)
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(job)],
        cwd=shadows, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the user has" not in done.stdout + done.stderr
    assert sorted(json.loads(done.stdout.splitlines()[-1])["attempts"]) == [
        "double", "make", "square", "total",
    ]  # fmt: skip


def test_the_check_of_an_export_does_not_import_from_there(
    shadows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shadows)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with pytest.raises(ExportError) as caught:
        check_in_fresh_process(tmp_path, ExportConfig())
    assert "is not an exported checkpoint" in str(caught.value)
    assert "the user has" not in str(caught.value)


def test_a_long_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * 60)
    with pytest.raises(ClusterError, match=r"TMPDIR is too long for Ray's sockets .*RAY_TMPDIR="):
        check_socket_room()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    check_socket_room()


@pytest.mark.parametrize("number", ["inf", "-inf", "nan", "0", "-1", "1e999", "", "x"])
def test_numbers_of_options(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--cpus", "--lease", "--workers", "--dashboard-port"):
        with pytest.raises(SystemExit) as caught:
            main(["run", "demo", f"{option}={number}"])
        assert caught.value.code == 2 and option in capsys.readouterr().err
    if number != "0":
        with pytest.raises(SystemExit):
            main(["run", "demo", f"--gpus={number}"])
        assert "from 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "limits", "takes", "refuses"),
    [
        (int, {"above": 0, "most": 65535}, ["1", "65535"], ["0", "65536", "99999", "1.5", "1e3"]),
        (float, {"least": 0}, ["0", "0.5", "1e3"], ["-0.1", "inf", "nan", "1e999"]),
    ],
)
def test_bounds(kind: type, limits: dict[str, float], takes: list[str], refuses: list[str]) -> None:
    parse: Callable[[str], Any] = terminal.number(kind, **limits)
    assert [parse(text) for text in takes] == [kind(text) for text in takes]
    for text in refuses:
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text!r} is not a"):
            parse(text)


def test_results_onto_a_file_are_refused_before_the_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "deep" / "er"):
        words = ["eval", "no-checkpoint", "--tasks", "none.json", "--root", str(tmp_path / "store")]
        assert main([*words, "--out", str(out)]) == 2
        assert f"{tmp_path / 'file'} is a file: name a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


def test_pull_onto_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    from pipeline.publishing.manifest import write_manifest

    (source / "config.json").write_text("{}")
    write_manifest(source, {})
    (tmp_path / "file").write_text("kept")
    for target in (tmp_path / "file", tmp_path / "file" / "copy"):
        assert main(["pull", str(source), str(target)]) == 2
        output = capsys.readouterr().err
        assert f"{tmp_path / 'file'} is a file: name a folder" in output
    assert (tmp_path / "file").read_text() == "kept"


def test_a_reader_that_goes_and_streams_that_are_closed() -> None:
    listing = command("ls", stdout=subprocess.PIPE)
    assert listing.stdout and listing.stderr
    listing.stdout.close()
    assert listing.stderr.read() == ""
    assert listing.wait() == terminal.BROKEN_PIPE
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    for closed in (">&-", "<&- >&- 2>&-"):
        words = f"{sys.executable} -P -m workflows.commands.entry ls {closed}"
        done = subprocess.run(["sh", "-c", words], env=environment, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (0, b""), closed


def test_another_broken_pipe_is_none_of_standard_output() -> None:
    with pytest.raises(BrokenPipeError, match="a server"), terminal.streams():
        raise BrokenPipeError("a server")


def test_ctrl_c_during_the_heavy_imports(tmp_path: Path) -> None:
    """The doctor asks torch which GPUs there are."""
    doctor = command("doctor", "--root", str(tmp_path), stdout=subprocess.DEVNULL)
    maps = Path(f"/proc/{doctor.pid}/maps")
    while "libtorch" not in maps.read_text():
        assert doctor.poll() is None
        time.sleep(0.01)
    doctor.send_signal(signal.SIGINT)
    _, output = doctor.communicate()
    assert output == "adsc: interrupted; rerun the same command to resume\n"
    assert doctor.returncode == 130


@pytest.mark.parametrize("small_disk", ["4m"], indirect=True)
def test_a_store_that_may_only_be_read_and_holds_a_journal(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = {"uri": f"sqlite:///{small_disk}/mlflow.db", "experiment": "adsc", "run_id": "1"}
    journal = Journal.create(small_disk / "tracking", header | {"token": "", "owner": False})
    journal.append({"kind": "tag", "key": "a", "value": "b"})
    journal.close(delete=False)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert send_pending(str(small_disk), None, "") is None
    assert main(["ls", "demo", "--root", str(small_disk)]) == 0
    assert "Traceback" not in capsys.readouterr().err
    assert list((small_disk / "tracking").glob("*.jsonl"))


@pytest.fixture
def common() -> Iterator[Path]:
    """A folder that every user can reach; those of `tmp_path` pytest keeps for its own."""
    with tempfile.TemporaryDirectory(prefix="adsc-common-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_user_without_an_account_and_home(common: Path) -> None:
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("taking another user id needs the superuser and setpriv")
    if not all(folder.stat().st_mode & 0o001 for folder in (REPOSITORY, *REPOSITORY.parents)):
        pytest.skip(f"other users can't enter {REPOSITORY}, such as below a folder of `mktemp -d`")
    store = common / "store"
    store.mkdir()
    store.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "USER", "LOGNAME")}
    environment |= {"PYTHONPATH": str(REPOSITORY), "TMPDIR": "/tmp"}
    for words in (["ls", "demo", "--root", str(store)], ["ls", "demo", "--root", "s3://lab/x"]):
        done = subprocess.run(
            ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups", sys.executable,
             "-P", "-m", "workflows.commands.entry", *words],
            env=environment, capture_output=True, text=True, cwd=store,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        if "s3" not in words[-1]:
            assert done.returncode == 0, done.stderr


def test_copies_have_a_place_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ADSC_CACHE", raising=False)
    assert cache_folder() == tmp_path / "home" / ".cache" / "adsc"
    monkeypatch.setenv("ADSC_CACHE", str(tmp_path / "scratch"))
    assert cache_folder() == tmp_path / "scratch"
    assert cache_folder(str(tmp_path / "given")) == tmp_path / "given"
    assert folder("s3://lab/x", None, "").is_relative_to(tmp_path / "scratch" / ".tracking")
    monkeypatch.setenv("ADSC_CACHE", "~nosuchuserhere/x")
    with pytest.raises(ValueError, match=r"the home folder is unknown.*ADSC_CACHE names another"):
        cache_folder()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("databricks", "Databricks' MLflow is not supported"),
        ("databricks://profile", "Databricks' MLflow is not supported"),
        ("databricks-uc", "Databricks' MLflow is not supported"),
        ("none", "--mlflow off tracks nothing"),
        ("False", "--mlflow off tracks nothing"),
    ],
)
def test_tracking_that_is_named_otherwise(address: str, says: str, tmp_path: Path) -> None:
    from pipeline.tracking.tracker import TrackingError, prepare

    assert says in explained(address)
    with pytest.raises(TrackingError, match=says):
        prepare(address, "adsc")

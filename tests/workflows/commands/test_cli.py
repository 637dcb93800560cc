"""The command line: help, errors in one sentence, dry runs."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.durable.record import Record
from pipeline.durable.stage import RunContext
from workflows.commands import terminal
from workflows.commands.main import build_parser, main
from workflows.commands.run import _print_next
from workflows.registry import WORKFLOWS, load_workflow


@pytest.mark.parametrize(
    "command",
    [
        "run",
        "ls",
        "show",
        "submit",
        "status",
        "logs",
        "cancel",
        "prepare",
        "chat",
        "cost",
        "plan",
        "serve",
    ],
)
def test_every_command_has_help_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args([command, "--help"])
    assert caught.value.code == 0
    assert f"  adsc {command} " in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in WORKFLOWS if "llava15_7b" not in name])
def test_every_workflow_passes_a_dry_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of LLaVA-1.5-7B in test_llava15_7b.py, with what they forecast."""
    assert main(["run", name, "--dry-run", "--root", str(tmp_path / "store")]) == 0
    assert "to run" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()


def test_all_unknown_keys_are_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["run", "demo", "--set", "train.learning_rat=1", "--set", "curriculum.ordr=x",
                 "--set", "train.steps=none"])  # fmt: skip
    printed = capsys.readouterr().err
    assert code == 2
    assert "did you mean train.learning_rate?" in printed
    assert "did you mean curriculum.order?" in printed
    assert "train.steps" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu", "demo"], "command 'rnu' is unknown; did you mean run?"),
        (["xyz"], "command 'xyz' is unknown; there are run, eval, "),
        (["run", "demmo"], "workflow 'demmo' is unknown; did you mean demo?"),
        (["run", "demo", "--set", "plan"], "is not KEY=VALUE"),
        (["run", "demo", "--set", "plan=9:1/2"], "layer 9"),
        (["run", "demo", "--set", "plan=2:3"], "keep ratio 3 at layer 2 must be in (0, 1]"),
        (["run", "demo", "--set", "prepare.template=nope"], "'nope' is unknown; there are vicuna"),
        (["run", "demo", "--set", "train.plan=1:1/2"], "train.plan follow from `plan`"),
        (["run", "demo", "--set", "train.lora=null"], "nothing to train"),
        (["run", "demo", "--set", "data.test_pictures=0"], "data.test_pictures"),
        (["show", "demo", "trian-1"], "has no stage 'trian-1'"),
        (["chat", "nowhere", "none.png"], "there is no picture 'none.png'"),
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = [] if arguments[0] in ("chat", "xyz") else ["--root", str(tmp_path)]
    assert main([*arguments, *root]) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


def test_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["help", "run"])
    assert capsys.readouterr().out.startswith("usage: adsc run ")


@pytest.mark.parametrize("arguments", [[], ["help"], ["--help"]])
def test_without_a_command_there_is_the_overview(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert "finished stages are not repeated" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", "--root", "R", "demo", "train-9"],
        ["show", "demo", "--root", "R", "train-9"],
        ["show", "demo", "train-9", "--root", "R"],
        ["show", "demo", "--path", "train-9", "--root=R"],
    ],
)
def test_options_may_stand_anywhere(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert "demo has no stage 'train-9'" in capsys.readouterr().err


def test_an_unwritable_store_is_reported_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert main(["run", "demo", "--root", str(tmp_path / "file" / "store")]) == 2
    assert str(tmp_path / "file" / "store") in capsys.readouterr().err


def test_a_port_in_use_is_reported_at_once(
    tmp_path: Path,
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "workflows.commands.main", "run", "demo", "--root",
             str(tmp_path),
             "--dashboard-port", str(port)], capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 2
    assert f"port {port} for Ray's dashboard is in use" in done.stderr


def test_show_prints_every_key_that_set_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", "demo", "--config", "--root", str(tmp_path)]) == 0
    lines = dict(line.split(" = ", 1) for line in capsys.readouterr().out.splitlines())
    assert json.loads(lines["plan"]) == load_workflow("demo").config.model_dump()["plan"]
    changes = [f"{key}={json.loads(value)}" for key, value in lines.items() if value[0] == '"']
    assert load_workflow("demo", changes).config == load_workflow("demo").config
    assert os.environ.get("ADSC_ROOT") is None


def test_the_lines_at_the_end_of_a_run_can_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line of the report opens it in the browser that the environment names."""
    folder = tmp_path / "with a space"
    folder.mkdir()
    report = Record(stage="report", fingerprint="0", attempt="0", uri=str(folder))
    monkeypatch.setenv("PATH", os.defpath)
    context = RunContext(root=str(tmp_path), workflow="demo", tracking_uri=None)
    _print_next(terminal.console(), {"report": report}, context)
    activate, opening = (line.strip() for line in capsys.readouterr().out.splitlines()[1:])
    for line, shown in (
        (f"{activate}\ncommand -v adsc", str(Path(sys.executable).parent / "adsc")),
        (opening, (folder / "report.html").as_uri()),
    ):
        environment = os.environ | {"BROWSER": "echo %s"}
        ran = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True)
        assert shown in ran.stdout, ran

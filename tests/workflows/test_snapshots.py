"""A flat dump of each workflow's config, frozen: whatever changes a default shows up in a diff."""

from pathlib import Path

import pytest

from workflows.commands.main import main

SNAPSHOTS = Path(__file__).parent / "snapshots"


@pytest.mark.parametrize("file", sorted(SNAPSHOTS.glob("*.txt")), ids=lambda file: file.stem)
def test_the_config_is_what_was_agreed(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", file.stem, "--config"]) == 0
    found = capsys.readouterr().out
    assert found == file.read_text(), (
        f"if the change is meant: adsc show {file.stem} --config > {file.relative_to(Path.cwd())}"
    )

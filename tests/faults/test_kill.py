"""kill -9 of every process that a training has, and of a whole node."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.tracking.tracker import default_uri
from tests.faults.training import EVERY, Disturbed, results, steps_taken_again
from tests.small import Small

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("victim", "survives"),
    [
        ("Train worker", True),
        ("Train controller", True),
        ("stage", True),
        ("raylet", False),
        ("command", False),
    ],
)
def test_kill_9_loses_at_most_the_steps_since_a_checkpoint(
    victim: str, survives: bool, undisturbed: dict[str, str], small: Small, tmp_path: Path
) -> None:
    """The run gets over it by itself, or the same command goes on."""
    run = Disturbed(tmp_path, small.base, small.prepared, tracking_uri=default_uri(tmp_path))
    run.start()
    run.wait_for_checkpoints(2)
    run.kill(victim)
    status, output = run.end()
    if survives:
        assert status == 0, output
    else:
        assert status != 0 and run.record() is None, output
        run.start()
        status, output = run.end()
        assert status == 0, output
    assert results(run.record()) == undisturbed
    lost = steps_taken_again(tmp_path / "mlflow.db")
    # Ray Train may register a checkpoint a moment after it was made: then the one before counts.
    assert sum(lost) <= 2 * EVERY, lost

"""Progress on a terminal and without one, and from other processes."""

from __future__ import annotations

import io
import pickle
import re
import time

import pytest
from rich.console import Console

from pipeline.durable.progress import PLAIN, Board, Display, ProgressHandle, Report, table


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=100), file


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr("pipeline.durable.progress.time.monotonic", lambda: clock)
    screen, file = console(terminal=False)
    with Display(screen, {"make": "make the numbers", "train": "train"}) as display:
        for second in range(25):
            clock = 100.0 + second
            report = Report(state="running", done=second, total=50, note=f"step {second}")
            display.update({"make": report, "elsewhere": report})
        display.update({"train": Report(state="waiting", note="for 3 s: held by a [1]")})
        display.end("make", "done in 25 s")
    assert file.getvalue().splitlines() == [
        "make the numbers  running 0 % (0/50)  step 0",
        "make the numbers  running 20 % (10/50), 40 s left  step 10",
        "make the numbers  running 40 % (20/50), 30 s left  step 20",
        "train             waiting  for 3 s: held by a [1]",
        "make the numbers  done in 25 s",
    ]


def test_a_line_that_says_nothing_new_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr("pipeline.durable.progress.time.monotonic", lambda: clock)
    screen, file = console(terminal=False)
    with Display(screen, {"train": "train"}) as display:
        for second in range(100):
            clock = 100.0 + second
            starting = Report(state="running", note="starting workers")
            at_work = Report(state="running", done=3, total=8, note="loss 1.2")
            display.update({"train": starting if second < 50 else at_work})
    assert file.getvalue().splitlines() == [
        "train  running  starting workers",
        "train  running 38 % (3/8)  loss 1.2",
    ]


def test_a_bar_on_a_terminal() -> None:
    screen, file = console(terminal=True)
    with Display(screen, {"make": "make the numbers", "train": "train"}) as display:
        display.update({"make": Report(state="running", done=1, total=4, note="step 1")})
        display.update({"train": Report(state="waiting", note="for 3 s")})
        display.end("make", "done in 25 s")
        display.end("train", "failed: no [/] data")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    assert "25 %" in text and "step 1" in text and "waiting for 3 s" in text
    assert "make the numbers  done in 25 s" in text
    assert "failed: no [/] data" in text


def test_paths_can_be_copied_from_a_narrow_screen() -> None:
    screen, file = console(terminal=False)
    path = "s3://bucket/" + "very-long-folder/" * 10
    screen.print(table([("make-the-numbers", "cached", path)]), **PLAIN)
    assert file.getvalue().splitlines()[1].split() == ["make-the-numbers", "cached", path]


def test_a_handle_is_cheap_and_never_drops_the_end() -> None:
    sent: list[Report] = []

    class Put:
        def remote(self, stage: str, report: Report) -> None:
            sent.append(report)

    class Here:
        put = Put()

    handle = ProgressHandle(stage="make", board=Here())
    for step in range(1, 10_001):
        handle(step, 10_000)
    assert len(sent) < 20
    assert sent[-1] == Report(state="running", done=10_000, total=10_000)


def test_without_a_board_reports_go_nowhere() -> None:
    handle = pickle.loads(pickle.dumps(ProgressHandle(stage="make")))
    handle(1, 2, "note")
    assert handle == ProgressHandle(stage="make")


def test_reports_from_another_process(ray_address: str) -> None:
    import ray

    board = ray.remote(Board).options(num_cpus=0).remote()
    handle = ProgressHandle(stage="make", board=board)

    @ray.remote(num_cpus=0)
    def elsewhere(handle: ProgressHandle) -> None:
        handle(1, 2, "half")

    ray.get(elsewhere.remote(handle))
    # Calls from two processes reach an actor in any order.
    deadline = time.monotonic() + 60
    while not (found := ray.get(board.all.remote())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found == {"make": Report(state="running", done=1, total=2, note="half")}

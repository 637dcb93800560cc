"""One training stage as a workflow of its own, in a driver process that tests can disturb.

    python -m tests.faults.training '{"root": ..., "base": ..., "data": ..., "context": {},
    "config": {}}'

Prints the record of the finished stage. `Disturbed` is what the tests hold.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from pipeline.durable import graph
from pipeline.durable import record as records
from pipeline.durable.record import Record
from pipeline.durable.stage import RunContext, Stage, adopted
from pipeline.kinds.train import TRAIN
from pipeline.store import open_store
from pipeline.training.config import LoraSettings, TrainConfig
from tests.faults.kills import VICTIMS, processes

EVERY = 15  # steps between two checkpoints: longer than it takes to register one
CONFIG: dict[str, Any] = {
    "plan": "1:1/2",
    "steps": 75,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "lora": LoraSettings(rank=8, alpha=16, dropout=0.0),
    "checkpoint_every": EVERY,
    "log_every": 1,
    "seed": 5,
}


def stages(base: str, data: str, config: Mapping[str, Any]) -> list[Stage]:
    """A training whose base and data lie ready."""
    return [
        adopted(name="base", title="base", place=base),
        adopted(name="data", title="data", place=data),
        TRAIN.stage(
            name="train-1",
            title="train",
            config=TrainConfig(**CONFIG).model_copy(update=dict(config)),
            needs={"base": "base", "data": "data"},
        ),
    ]


class Disturbed:
    """A driver process, its stage and what a test does to them."""

    def __init__(
        self,
        root: Path | str,
        base: Path,
        data: Path,
        config: Mapping[str, Any] | None = None,
        **context: Any,
    ) -> None:
        self.root, self.base, self.data = str(root), str(base), str(data)
        self.config = dict(config or {})
        self.context = {"lease_seconds": 10, "tracking_uri": None, **context}
        self.store = open_store(self.root)
        self.print = graph.fingerprints(stages(self.base, self.data, self.config))["train-1"]
        self.home = records.folder("train-1", self.print)
        self.driver: subprocess.Popen[str] | None = None

    def start(self, environment: Mapping[str, str] | None = None) -> None:
        job = {
            "root": self.root,
            "base": self.base,
            "data": self.data,
            "context": self.context,
            "config": self.config,
        }
        clean = {k: v for k, v in os.environ.items() if k != "RAY_API_SERVER_ADDRESS"}
        self.driver = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.training", json.dumps(job)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**clean, **(environment or {})},
        )

    def checkpoints(self) -> list[str]:
        """Names of the steps whose checkpoints are in the store."""
        found = {
            match[0]
            for entry in self.store.list(f"{self.home}/run")
            if (match := re.search(r"step-\d+(?=/state\.json$)", entry.key))
        }
        return sorted(found)

    def wait_for_checkpoints(self, count: int, seconds: float = 600) -> list[str]:
        """Until so many were made, of which the first may be deleted again."""
        return self.wait(lambda: self.newest() >= count * EVERY and self.checkpoints(), seconds)

    def newest(self) -> int:
        return max((int(name.removeprefix("step-")) for name in self.checkpoints()), default=0)

    def wait(self, condition: Callable[[], Any], seconds: float = 600) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert self.driver and self.driver.poll() is None, self.driver.communicate()
            assert time.monotonic() < deadline, f"waited {seconds} s"
            time.sleep(0.1)
        return found

    def kill(self, victim: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to a process of the run, by its kind in tests.faults.kills."""
        assert self.driver
        found = self.wait(lambda: processes(self.driver).get(victim))  # type: ignore[arg-type]
        assert victim == "command" or victim in VICTIMS
        psutil.Process(found[0].pid).send_signal(number)

    def end(self, seconds: float = 900) -> tuple[int, str]:
        """Exit status and output of the driver."""
        assert self.driver
        out, err = self.driver.communicate(timeout=seconds)
        return self.driver.returncode, out + err

    def record(self) -> Record | None:
        return records.load(self.store, "train-1", self.print)


def results(record: Record | None) -> dict[str, str]:
    """Checksums of the weights and of the losses of every step."""
    assert record is not None
    shape = r"safetensors$|history\.json$"
    return {file.path: file.sha256 for file in record.files if re.search(shape, file.path)}


def steps_taken_again(database: Path) -> list[int]:
    """How many steps each restart took again."""
    return [last - again + 1 for last, again in restarts(database)]


def restarts(database: Path) -> list[tuple[int, int]]:
    """The last step before each restart and the first one after it, as logged in MLflow."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as opened:
        rows = opened.execute(
            "select step, timestamp from metrics where key = 'loss' order by timestamp"
        ).fetchall()
    steps = [step for step, _ in rows]
    return [(last, again) for last, again in pairwise(steps) if again <= last]


def main(job: dict[str, Any]) -> None:
    tracking = job["context"].pop("tracking_uri")
    context = RunContext(
        root=job["root"], workflow="faults", tracking_uri=tracking, **job["context"]
    )
    made = stages(job["base"], job["data"], job.get("config", {}))
    graph.run(made, context, Console(file=sys.stderr))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

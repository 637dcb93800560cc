"""Kill random processes of the demo at random moments, and compare what comes out.

    python -m tests.faults.kills --kills 20 --seed 1 --root /tmp/kills

The demo runs at a reduced size, first undisturbed, then with kill -9 against a process of the run
(its command, a stage, a Train worker or controller, a daemon of Ray) until the kills are used up;
whenever the command is gone the same one is started again. A run that ends before that is followed
by another one in an empty store. Every run must end with the weights and answers of the undisturbed
one. It takes about a minute a kill on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from pipeline.durable import record as records
from pipeline.durable.graph import fingerprints
from pipeline.durable.record import Record
from pipeline.store import open_store
from workflows.registry import load_workflow

SIZE = (
    "data.train_pictures=60",
    "data.test_pictures=8",
    "curriculum.stages=2",
    "train.steps=12",
    "train.batch_size=4",
    "train.checkpoint_every=3",
    "train.log_every=1",
    "evaluate.prefill_rounds=3",
    "export.log_model=false",
)
STUCK = 900.0  # seconds after which a run that does nothing any more is given up

VICTIMS = {
    "Train worker": r"^ray::.*(RayTrainWorker|TrainWorker)",
    "Train controller": r"^ray::.*TrainController",
    "raylet": r"raylet/raylet",
    "GCS": r"gcs_server",
    "stage": r"^ray::(pictures|base|prepare|train-|control-|merge|evaluate|export|report)",
    "worker of Ray": r"^ray::",
}


@dataclass
class Kill:
    """One kill, and what it cost."""

    run: int
    seconds: float
    """Since the command was started."""
    victim: str
    stages: tuple[str, ...]
    """Stages whose lease was held."""
    at: float
    recovered: str = ""
    """`by itself`, or `same command`."""
    lost: dict[str, int] = field(default_factory=dict)
    """Optimizer steps that were taken again, by stage."""


def command(root: Path, lease: float) -> list[str]:
    changes = [f"--set={change}" for change in SIZE]
    place = ["--root", str(root), f"--lease={lease}"]
    return [sys.executable, "-m", "workflows.commands.main", "run", "demo_paper", *place, *changes]


def start(root: Path, lease: float) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_API_SERVER_ADDRESS"}
    root.mkdir(parents=True, exist_ok=True)
    log = (root / "driver.log").open("ab")
    return subprocess.Popen(command(root, lease), stdout=log, stderr=log, env=environment)


def made(root: Path) -> dict[str, Record]:
    """Records of all finished stages."""
    store = open_store(str(root))
    prints = fingerprints(load_workflow("demo_paper", SIZE).stages())
    found = {name: records.load(store, name, print_) for name, print_ in prints.items()}
    return {name: record for name, record in found.items() if record is not None}


def processes(driver: subprocess.Popen[bytes]) -> dict[str, list[psutil.Process]]:
    """Every process of a run by its kind."""
    try:
        parent = psutil.Process(driver.pid)
        children = parent.children(recursive=True)
    except psutil.NoSuchProcess:
        return {}
    found: dict[str, list[psutil.Process]] = {"command": [parent]}
    for child in children:
        try:
            line = " ".join(child.cmdline())
        except psutil.Error:
            continue
        kind = next((kind for kind, shape in VICTIMS.items() if re.search(shape, line)), None)
        if kind:
            found.setdefault(kind, []).append(child)
    return found


def leased(root: Path) -> tuple[str, ...]:
    return tuple(sorted(p.parent.name.rpartition("-")[0] for p in root.glob("*/lease.json")))


def progress(root: Path) -> set[str]:
    """Finished stages and checkpoints."""
    return {
        str(path) for shape in ("record.json", "run/step-*") for path in root.glob(f"*/{shape}")
    }


def differences(root: Path, whole: Path) -> Iterator[str]:
    """How a finished run differs from the undisturbed one: weights, losses, answers, scores."""
    ours, theirs = made(root), made(whole)
    for stage, expected in theirs.items():
        found = ours.get(stage)
        if found is None:
            yield f"{stage} did not finish"
            continue
        other = set(results(found).items()) ^ set(results(expected).items())
        if other:
            yield f"{stage}: other files: {sorted({path for path, _ in other})}"
    samples = [
        pq.read_table(Path(it["evaluate"].uri) / "samples.parquet").drop(["seconds"])
        for it in (ours, theirs)
        if "evaluate" in it
    ]
    if len(samples) != 2 or not samples[0].equals(samples[1]):
        yield "evaluate: other answers"
    elif accuracies(ours) != accuracies(theirs):
        yield f"evaluate: other scores: {accuracies(ours)} instead of {accuracies(theirs)}"


def results(record: Record) -> dict[str, str]:
    """Checksums of what must repeat bit for bit: weights, and the losses of every step."""
    shape = r"safetensors$|history\.json$"
    return {file.path: file.sha256 for file in record.files if re.search(shape, file.path)}


def accuracies(found: dict[str, Record]) -> dict[str, float]:
    return {name: arm["accuracy"] for name, arm in found["evaluate"].outputs["arms"].items()}


def steps_taken_again(root: Path, kills: list[Kill]) -> None:
    """Which steps were logged twice, from MLflow's database, each put to the kill before."""
    database = sqlite3.connect(f"file:{root / 'mlflow.db'}?mode=ro", uri=True)
    rows = database.execute(
        "select t.value, m.step, m.timestamp from metrics m join tags t on "
        "t.run_uuid = m.run_uuid and t.key = 'adsc.stage' where m.key = 'loss' "
        "order by m.timestamp"
    ).fetchall()
    database.close()
    last: dict[str, int] = {}
    for stage, step, milliseconds in rows:
        before = [kill for kill in kills if kill.at <= milliseconds / 1000]
        lost = last.get(stage, 0) - step + 1
        if lost > 0 and before:
            before[-1].lost[stage] = max(lost, before[-1].lost.get(stage, 0))
        last[stage] = step


def disturbed(
    root: Path, run: int, kills: int, chance: random.Random, mean: float, lease: float
) -> list[Kill]:
    """One run from an empty store to its end, with at most so many kills."""
    done: list[Kill] = []
    driver, started, moved = start(root, lease), time.time(), time.time()
    every: dict[int, float] = {}
    seen: set[str] = set()
    try:
        while True:
            wait = chance.expovariate(1 / mean) if len(done) < kills else 5.0
            # Every other kill waits for work to be lost: else a busy machine, where starting takes
            # longer than `mean`, is only ever killed while it starts.
            after, before = chance.random() < 0.5 and len(done) < kills, progress(root)
            if after:
                while progress(root) == before and driver.poll() is None:
                    time.sleep(0.2)
                wait = min(wait, 20.0)
            deadline = time.time() + wait
            while time.time() < deadline and driver.poll() is None:
                time.sleep(0.2)
            if driver.poll() == 0:
                return done
            if driver.poll() is not None:
                if done:
                    done[-1].recovered = f"same command (after exit {driver.returncode})"
                driver, started = start(root, lease), time.time()
                continue
            if progress(root) != seen:
                seen, moved = progress(root), time.time()
            if time.time() - moved > STUCK:
                raise SystemExit(f"nothing happens any more; see {root}/driver.log")
            found = processes(driver)
            for some in found.values():
                for process in some:
                    every[process.pid] = process.create_time() if process.is_running() else 0.0
            if len(done) >= kills or not found:
                continue
            victim = chance.choice(sorted(found))
            process = chance.choice(found[victim])
            kill = Kill(run, round(time.time() - started, 1), victim, leased(root), time.time())
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
            done.append(kill)
            moved = time.time()
            print(
                f"kill {len(done)}: {victim} after {kill.seconds} s, in {kill.stages}", flush=True
            )
            if victim == "command":
                driver.wait()
            elif not kill.recovered:
                # If the command is still there when the next thing happens, it got over it.
                settle_deadline = time.time() + 20
                while time.time() < settle_deadline and driver.poll() is None:
                    time.sleep(0.2)
                if driver.poll() is None:
                    kill.recovered = "by itself"
    finally:
        steps_taken_again(root, done) if (root / "mlflow.db").exists() else None
        for pid, created in every.items():  # of commands that were killed; their daemons go alone
            try:
                left = psutil.Process(pid)
                if left.create_time() == created and driver.poll() is not None:
                    left.kill()
            except psutil.NoSuchProcess:
                pass


def table(kills: list[Kill]) -> str:
    lines = ["| kill | run | seconds | victim | stages at work | went on | steps taken again |"]
    lines.append("|---|---|---|---|---|---|---|")
    for number, kill in enumerate(kills, 1):
        lost = ", ".join(f"{stage}: {steps}" for stage, steps in kill.lost.items()) or "0"
        lines.append(
            f"| {number} | {kill.run} | {kill.seconds:.0f} | {kill.victim} "
            f"| {', '.join(kill.stages) or 'none yet'} | {kill.recovered or 'same command'} "
            f"| {lost} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="kills in all")
    parser.add_argument("--seed", type=int, default=0, help="seed of moments and victims")
    parser.add_argument("--mean", type=float, default=30.0, help="mean seconds between two kills")
    parser.add_argument("--lease", type=float, default=10.0, help="seconds, as of `adsc run`")
    parser.add_argument("--root", type=Path, required=True, help="an empty folder for the stores")
    options = parser.parse_args(arguments)
    chance, kills, wrong = random.Random(options.seed), list[Kill](), list[str]()
    whole = options.root / "undisturbed"
    for _ in range(5):  # on a very busy machine Ray itself may not start at once
        if "report" not in made(whole):
            print("the undisturbed run", flush=True)
            start(whole, options.lease).wait()
    if "report" not in made(whole):
        raise SystemExit(f"the undisturbed run failed; see {whole}/driver.log")
    run = 0
    while len(kills) < options.kills:
        run += 1
        root = options.root / f"killed-{run}"
        kills += disturbed(
            root, run, options.kills - len(kills), chance, options.mean, options.lease
        )
        found = list(differences(root, whole))
        wrong += [f"run {run}: {difference}" for difference in found]
        print(f"run {run}: {len(kills)} kills so far, {len(found)} differences", flush=True)
    print(table(kills))
    summary: dict[str, Any] = {
        "runs": run,
        "kills": [asdict(kill) for kill in kills],
        "differences": wrong,
        "accuracies": accuracies(made(whole)),
    }
    (options.root / "kills.json").write_text(json.dumps(summary, indent=1))
    print("\n".join(wrong) or f"{len(kills)} kills in {run} runs; no difference in any of them")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

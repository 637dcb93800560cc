"""The gain of the search, how well it uses workers, and that it resumes after a kill.

    python -m benchmarks.search compare --root /tmp/search    [a: samplers at equal budgets]
    python -m benchmarks.search parallel --root /tmp/search   [b: concurrent trials on a cluster]
    python -m benchmarks.search restore --root /tmp/search    [c: kill -9 of the driver]
    python -m benchmarks.search node --root /tmp/search       [c: a node is lost]
    python -m benchmarks.search enumerate                     [d: LLaVA-1.5-7B by cost alone]

`compare` measures every plan of the demo's space once, untrained, and then lets studies ask that
table: what a study sees is what it would have measured, since an untrained trial is deterministic.
So five seeds of each arm cost nothing, and the best plan there is is known. Its rungs are prefixes
of the validation conversations; a study's cost is the conversations that it looked at.

Hypotheses, written before the first run: (1) after as many conversations as 24 whole trials, TPE is
nearer to the best plan than a uniform draw; (2) both are better than every hand-picked placement,
whatever its anchor; (3) ASHA at the same number of conversations (more trials, most of them
stopped) is no worse than none; (4) four concurrent trials on N cores reach at least 0.7 of
min(4, N) times the rate of one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

AVERAGE, SEEDS = 22, 5
ROWS, CONFIRM = 48, 48
TABLE_ROWS, TABLE_CONFIRM, RUNG = 16, 16, 4
TRIALS = 24
ANCHORS = ("last", "first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=tuple(RUNS))
    parser.add_argument("--root", default="/tmp/search", help="the store")
    parser.add_argument("--pictures", type=int, default=400, help="training pictures of the demo")
    parser.add_argument("--trials", type=int, default=TRIALS, help="whole trials' worth of rows")
    options = parser.parse_args()
    RUNS[options.what](options)


def workflow(options: argparse.Namespace, **changes: Any) -> Any:
    from workflows.demo.workflow import demo

    return demo().edit(
        {
            "plan": "search",
            "search.average": AVERAGE,
            "search.rows": ROWS,
            "search.confirm_rows": CONFIRM,
            "data.train_pictures": options.pictures,
            "data.test_pictures": 8,
        }
        | {key.replace("__", "."): value for key, value in changes.items()}
    )


def context(options: argparse.Namespace, **changes: Any) -> Any:
    from pipeline.durable.stage import RunContext

    return RunContext(root=options.root, workflow="demo", **changes)


def job_of(options: argparse.Namespace) -> Any:
    """The stages before the search, and what its trials share."""
    from pipeline.durable import graph
    from pipeline.durable.stage import Input
    from pipeline.search.trial import SearchJob
    from pipeline.stages.train import train_stage
    from workflows.commands.search import search_stages

    made = workflow(
        options,
        search__rows=TABLE_ROWS,
        search__confirm_rows=TABLE_CONFIRM,
        search__anchors=ANCHORS,
    )
    run = context(options)
    stages = [stage for stage in search_stages(made) if stage.name != "search"]
    found = graph.run(stages, run)
    return SearchJob(
        search=made.config.search,
        train=made.config.train,
        curriculum=made.config.curriculum,
        inputs={"base": Input(found["base"]), "data": Input(found["search-data"])},
        storage=f"{options.root}/compare",
        run=run,
        train_stage=train_stage,
    )


# (a)


def measured(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The space, and of every plan the sums of losses of each conversation."""
    from transformers import AutoConfig

    from pipeline.search.space import Costs, Space
    from pipeline.search.trial import Bench

    job = job_of(options)
    model = AutoConfig.from_pretrained(job.inputs["base"].folder)
    space = Space(Costs(model, job.search), job.search)
    file = Path(options.root) / f"table-{options.pictures}-{TABLE_ROWS}-{TABLE_CONFIRM}.jsonl"
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    table = {it["plan"]: it for it in known}
    plans = [
        space.candidate(number, anchor).plan
        for number in range(len(space.stages))
        for anchor in space.anchors
    ]
    plans += [plan for plans in by_hand(space).values() for plan in plans] + [""]
    bench = Bench(job)
    started = time.monotonic()
    for count, plan in enumerate(dict.fromkeys(plans)):
        if plan in table:
            continue
        validation, confirm = (bench.judge(plan, split) for split in ("validation", "confirm"))
        table[plan] = {
            "plan": plan,
            "rows": validation.sums.tolist(),
            "weights": validation.weights.tolist(),
            "confirm": confirm.sums.tolist(),
            "confirm_weights": confirm.weights.tolist(),
        }
        with file.open("a") as out:
            out.write(json.dumps(table[plan]) + "\n")
        if count % 50 == 0:
            print(f"{count} of {len(plans)} plans, {time.monotonic() - started:.0f} s", flush=True)
    return space, table


def by_hand(space: Any) -> dict[str, list[str]]:
    """The known placements, with each anchor."""
    from dataclasses import replace

    from adsc.plan import PruningPlan

    return {
        name: [str(replace(PruningPlan.parse(one.plan), anchor=each)) for each in space.anchors]
        for name, one in space.known().items()
    }


def loss(entry: dict[str, Any], rows: int = TABLE_ROWS) -> float:
    return sum(entry["rows"][:rows]) / sum(entry["weights"][:rows])


def confirmed(entry: dict[str, Any]) -> float:
    return sum(entry["confirm"]) / sum(entry["confirm_weights"])


def study(space: Any, table: dict[str, Any], budget: int, **settings: Any) -> dict[str, Any]:
    """One study over the table, until it has looked at `budget` conversations."""
    from pipeline.search.study import Rung, Study, Trial

    config = space.config.model_copy(update={"trials": 10**6, **settings})
    run = Study(space, config)
    spent = 0
    while spent < budget and (proposal := run.next()) is not None:
        entry = table[proposal.plan]
        rungs = []
        state: Any = "finished"
        for place, rows in enumerate((*config.rungs, TABLE_ROWS)):
            rungs.append(Rung(rows, loss(entry, rows), 0.0))
            if rows < TABLE_ROWS and not run.continues(proposal.number, place, rungs[-1].value):
                state = "stopped"
                break
        spent += rungs[-1].resource
        run.over(
            Trial(
                number=proposal.number, name=proposal.name, plan=proposal.plan,
                cost=proposal.cost, known=proposal.known, state=state, rungs=tuple(rungs),
            )
        )  # fmt: skip
    best = run.best()
    assert best is not None
    return {"plan": best.plan, "loss": best.value, "trials": len(run.trials)}


def compare(options: argparse.Namespace) -> None:
    space, table = measured(options)
    proposed = {space.candidate(n, a).plan for n in range(len(space.stages)) for a in space.anchors}
    every = sorted(loss(table[plan]) for plan in proposed)
    print(f"\n{len(every)} plans at {AVERAGE} +- {100 * space.config.tolerance:g} %; dense "
          f"{loss(table['']):.4f}; best {every[0]:.4f}, median {every[len(every) // 2]:.4f}, "
          f"worst {every[-1]:.4f}")  # fmt: skip
    budget = options.trials * TABLE_ROWS
    arms = {
        "TPE + ASHA": {"sampler": "tpe", "rungs": (RUNG,)},
        "TPE": {"sampler": "tpe"},
        "random + ASHA": {"sampler": "random", "rungs": (RUNG,)},
        "random": {"sampler": "random"},
    }
    found = {
        name: [study(space, table, budget, seed=seed, **settings) for seed in range(SEEDS)]
        for name, settings in arms.items()
    }
    rows = {}
    for name, runs in found.items():
        losses = np.array([run["loss"] for run in runs])
        confirmed_gains = np.array([confirmed(table[run["plan"]]) for run in runs])
        ranks = [1 + sum(one < run["loss"] for one in every) for run in runs]
        rows[name] = losses, confirmed_gains
        print(f"| {name} | {np.mean([r['trials'] for r in runs]):.0f} | {interval(losses)} | "
              f"{interval(confirmed_gains)} | {', '.join(map(str, ranks))} |")  # fmt: skip
    for name, plans in by_hand(space).items():
        for plan in plans:
            entry = table[plan]
            rank = 1 + sum(it < loss(entry) for it in every)
            print(f"| {name} `{plan}` | 1 | {loss(entry):.4f} | {confirmed(entry):.4f} | {rank} |")
    for other in ("random", "TPE", "random + ASHA"):
        for what, place in (("search", 0), ("unseen", 1)):
            gap = rows["TPE + ASHA"][place] - rows[other][place]
            print(f"TPE + ASHA minus {other}, {what} conversations: {interval(gap, sign=True)}")
    gap = rows["TPE"][0] - rows["random"][0]
    print(f"TPE minus random, search conversations: {interval(gap, sign=True)}")


def interval(values: np.ndarray, sign: bool = False) -> str:
    """Mean over seeds with a 95 % interval by Student's t."""
    from scipy import stats

    mean, form = float(values.mean()), "+.4f" if sign else ".4f"
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]"


# (b)


def parallel(options: argparse.Namespace) -> None:
    """Trials a minute with 1, 2 and 4 at a time, on a simulated cluster of four nodes."""
    import ray
    from ray.cluster_utils import Cluster
    from rich.console import Console

    from pipeline.durable import graph
    from workflows.commands.search import search_stages

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    cores = os.cpu_count() or 1
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(4):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    rates = {}
    try:
        for workers in (1, 2, 4):
            stages = search_stages(workflow(options, search__trials=24, search__seed=workers))
            run = context(options, num_workers=workers)
            found = graph.run(stages, run, Console(quiet=True))
            uri = Path(found["search"].uri)
            trials = json.loads((uri / "results.json").read_text())["trials"]
            # From the first result on: starting actors and importing torch is paid once a search.
            ends = sorted(trial["ended"] for trial in trials)
            rates[workers] = (len(ends) - workers) / (ends[-1] - ends[workers - 1])
            busy = sum(t["ended"] - t["started"] for t in trials[workers:])
            share = busy / workers / (ends[-1] - ends[workers - 1])
            print(
                f"| {workers} | {60 * rates[workers]:.1f} | {rates[workers] / rates[1]:.2f} | "
                f"{rates[workers] / rates[1] / min(workers, cores):.2f} | {100 * share:.0f} % |",
                flush=True,
            )
    finally:
        ray.shutdown()
        cluster.shutdown()


# (c)


def restore(options: argparse.Namespace) -> None:
    """kill -9 of the driver with all of its Ray, in the middle of the trials; then the same command
    again."""
    root = Path(options.root) / "restore"
    words = [
        sys.executable, "-m", "workflows.commands.main",
        "search", "demo", "--average", str(AVERAGE),
        "--trials", "16", "--workers", "2", "--root", str(root), "--mlflow", "off", "--lease", "4",
        "--set", f"search.rows={ROWS}", "--set", f"search.confirm_rows={CONFIRM}",
        "--set", f"data.train_pictures={options.pictures}", "--set", "data.test_pictures=8",
    ]  # fmt: skip
    for kill_at in (3, 8):
        driver = subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)
        while driver.poll() is None and len(trials_in(root)) < kill_at:
            time.sleep(0.05)
        kill_session(driver.pid)
        driver.wait()
        kept = trials_in(root)
        print(f"killed with {len(kept)} trials over", flush=True)
    started = time.monotonic()
    subprocess.run(words, check=True)
    after = trials_in(root)
    same = all(after[name] == content for name, content in kept.items())
    numbers = [json.loads(content)["number"] for content in after.values()]
    print(
        f"then {len(after)} trials ({len(set(numbers))} numbers), {time.monotonic() - started:.0f} "
        f"s; those of before {'are untouched' if same else 'WERE REPEATED'}"
    )


def lose_node(options: argparse.Namespace) -> None:
    """A node of a simulated cluster dies with its trials, and another one joins."""
    import threading

    import ray
    from ray.cluster_utils import Cluster
    from rich.console import Console

    from pipeline.durable import graph
    from workflows.commands.search import search_stages

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    for name, value in (("period_ms", 500), ("timeout_ms", 1000), ("failure_threshold", 3)):
        os.environ[f"RAY_health_check_{name}"] = str(value)
    root = Path(options.root) / "node"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    stages = search_stages(workflow(options, search__trials=16))
    run = context(argparse.Namespace(root=str(root)), num_workers=2, lease_seconds=4)
    failed: list[BaseException] = []

    def drive() -> None:
        try:
            graph.run(stages, run, Console(quiet=True))
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    try:
        thread = threading.Thread(target=drive)
        thread.start()
        while thread.is_alive() and len(trials_in(root)) < 6:
            time.sleep(0.05)
        kept = trials_in(root)
        print(f"a node dies with {len(kept)} trials over", flush=True)
        cluster.remove_node(nodes[0], allow_graceful=False)
        cluster.add_node(num_cpus=1)
        thread.join()
        after = trials_in(root)
        same = all(after[name] == content for name, content in kept.items())
        states = [json.loads(content)["state"] for content in after.values()]
        print(
            f"then {len(after)} trials, {states.count('failed')} failed; those of before "
            f"{'are untouched' if same else 'WERE REPEATED'}{failed or ''}"
        )
    finally:
        ray.shutdown()
        cluster.shutdown()


def trials_in(root: Path) -> dict[str, str]:
    return {
        path.name: f"{path.read_text()}"
        for path in root.glob("search-*/run/trials/*.json")
        if not path.name.startswith(".")
    }


def kill_session(leader: int) -> None:
    """kill -9 of a process and of everything that it started."""
    import psutil

    found = [psutil.Process(leader), *psutil.Process(leader).children(recursive=True)]
    for process in found:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


# (d)


def enumerate_llava(options: argparse.Namespace) -> None:
    from pipeline.search.config import SearchConfig
    from pipeline.search.space import Costs, Space

    for settings in ({"keeps": ("1/2",)}, {}):
        times, size = [], 0
        for _ in range(5):
            started = time.perf_counter()
            config = SearchConfig(average=192, drops=(3,), **settings)
            size = len(Space(Costs("llava-1.5-7b", config), config).stages)
            times.append(time.perf_counter() - started)
        keeps = ", ".join(config.keeps)
        print(f"{size} placements of 3 drops keeping {keeps} at 192 +- 1 %: median "
              f"{sorted(times)[2]:.3f} s, slowest {max(times):.3f} s of 5")  # fmt: skip


RUNS = {
    "compare": compare,
    "parallel": parallel,
    "restore": restore,
    "node": lose_node,
    "enumerate": enumerate_llava,
}

if __name__ == "__main__":
    main()

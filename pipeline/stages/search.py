"""Stages `search-data` and `search`: conversations for trials, and the best plan on them.

The result of a trial is stored at once, so a killed search repeats no finished trial. The
plan goes to later stages by reference (pipeline.evaluation.methods.FoundPlan): their configs say
`search` (`search^1.5` for a curriculum's stage of that pressure), their needs name the search, and
so their fingerprints hold its.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoConfig

from adsc.plan import PruningPlan
from pipeline.data.prepared import PreparedData
from pipeline.data.shards import ShardWriter
from pipeline.durable.stage import StageContext
from pipeline.kinds.search import SearchDataConfig, SearchStageConfig
from pipeline.search.config import UNITS, SearchConfig
from pipeline.search.keys import own_settings, written
from pipeline.search.space import Costs, Space
from pipeline.search.study import Study, Trial
from pipeline.stages.evaluate import workers_that_fit
from pipeline.stages.train import train_stage
from pipeline.store import Store, open_store

PREFILL = "prefill.json"
"""Measured times in the search's folder, which a resumed search reuses."""


class SearchFailed(RuntimeError):
    """No trial finished; the message has the reasons."""


def search_data(ctx: StageContext, config: SearchDataConfig) -> dict[str, Any]:
    """Stage body; input `data`: its training split as the splits train, validation and confirm.

    Raises:
        ValueError: too few conversations.
    """
    data = ctx.inputs["data"]
    prepared = PreparedData(data.folder / "train")
    held_out = config.rows + config.confirm_rows
    if len(prepared) <= held_out:
        raise ValueError(
            f"search.rows = {config.rows} and search.confirm_rows = {config.confirm_rows} leave "
            f"none of {len(prepared)} training conversations to train on: lower them"
        )
    order = np.random.default_rng([5, config.seed]).permutation(len(prepared))
    parts = {
        "validation": order[: config.rows],
        "confirm": order[config.rows : held_out],
        "train": np.sort(order[held_out : held_out + config.train_rows]),
    }
    owner = np.full(len(prepared), "", dtype=object)
    for name, rows in parts.items():
        owner[rows] = name
    (ctx.out / "train").mkdir()
    writer = ShardWriter(ctx.out / "train", 5000, 256 << 20, 64)
    apart: dict[str, list[pa.Table]] = {"validation": [], "confirm": []}
    done = 0
    for group in prepared.groups:
        with pq.ParquetFile(group.file) as opened:
            table = opened.read_row_group(group.number)
        owners = owner[done : done + table.num_rows]
        done += table.num_rows
        for name, tables in apart.items():
            tables.append(table.filter(pa.array(owners == name)))
        mine = table.filter(pa.array(owners == "train"))
        writer.add(mine, np.full(mine.num_rows, mine.nbytes // max(1, mine.num_rows)))
        ctx.progress(done, len(prepared), "conversations")
    writer.close()
    digest = hashlib.sha256(np.sort(order[:held_out]).tobytes())
    for name, tables in apart.items():
        # In a drawn order: the first rung of a trial is a sample of all sources.
        ranks = np.argsort(np.argsort(parts[name]))
        folder = ctx.out / name
        folder.mkdir()
        pq.write_table(pa.concat_tables(tables).take(ranks), folder / "00000.parquet")
    return {
        "template": data.outputs.get("template"),
        "digest": digest.hexdigest(),
        "train": len(parts["train"]),
        "held_out": held_out,
    }


def search(ctx: StageContext, config: SearchStageConfig) -> dict[str, Any]:
    """Stage body; inputs `base` and `data` (of `search_data`).

    Raises:
        PlanError: no plan meets the budget; TrialRefused: trials can't be run so.
        SearchFailed: no trial finished.
    """
    from pipeline.reporting.search_page import write_page
    from pipeline.search.trial import SearchJob, segments
    from pipeline.search.tuning import kept_trials, run_trials

    path, name = ctx.train_storage
    store = open_store(open_store(path).uri(name))
    job = SearchJob(
        search=config.search,
        train=config.train,
        curriculum=config.curriculum,
        inputs={key: ctx.inputs[key] for key in ("base", "data")},
        storage=store.root,
        run=ctx.run,
        train_stage=train_stage,
    )
    model = AutoConfig.from_pretrained(ctx.inputs["base"].folder)
    times = _prefill(job, store) if config.search.budget[0] == "prefill_ms" else None
    ctx.progress(0, config.search.trials, "listing plans that meet the budget")
    space = Space(Costs(model, config.search, times), config.search)
    segments(job, space.candidate(0, space.anchors[0]).plan)  # refuse bad settings now
    settings = own_settings(config.train, config.search.ranges)
    study = Study(space, config.search, kept_trials(store), settings)
    ctx.track.metrics({"search.plans": len(space)})

    with ThreadPoolExecutor(1, thread_name_prefix="tracking") as tracking:

        def report(trial: Trial) -> None:
            best = study.best()
            note = f"trials, best {best.value:.4f} by {best.plan}" if best else "trials"
            ctx.progress(len(study.trials), config.search.trials, note)
            if best is not None:
                ctx.track.metrics({"search.best": best.value}, step=len(study.trials))
            tracking.submit(_track, ctx, trial)

        for trial in study.trials:
            tracking.submit(_track, ctx, trial)
        run_trials(study, job, store, workers_that_fit(ctx), report)
    best, known = study.best(), study.best_known()
    if best is None:
        reasons = sorted({trial.reason for trial in study.trials})[:3]
        raise SearchFailed(
            f"none of {len(study.trials)} trials finished: {'; '.join(reasons) or 'no reason'}"
        )
    results = _results(config.search, study, best, known, times)
    (ctx.out / "results.json").write_text(json.dumps(results, indent=1))
    pq.write_table(_table(study), ctx.out / "trials.parquet")
    write_page(ctx.out, results, study)
    for artifact in ("results.json", "trials.parquet", "search.html", "search.png"):
        ctx.track.artifact(ctx.out / artifact)
    ctx.track.note(results["finding"])
    ctx.track.metrics({"search.cost": best.cost})
    ctx.track.params({"search.plan": best.plan})
    ctx.track.dataset(
        ctx.inputs["data"].uri, "search conversations", ctx.inputs["data"].outputs["digest"][:12]
    )
    keys = ("plan", "value", "cost", "unit", "finding", "space", "counts", "known", "confirmed")
    outputs = {key: results[key] for key in keys}
    return outputs | ({"settings": results["settings"]} if config.search.over else {})


def _prefill(job: Any, store: Store) -> dict[int, float]:
    """Prefill times, measured once per search on a worker like those of its trials."""
    import ray

    from pipeline.search.trial import Bench

    if (known := store.read(PREFILL)) is None:
        run = job.run
        remote: Any = ray.remote(num_cpus=run.cpus_per_worker, num_gpus=run.gpus_per_worker)(Bench)
        bench = remote.remote(job)
        known = json.dumps(ray.get(bench.prefill.remote())).encode()
        ray.kill(bench)
        store.create(PREFILL, known)
    return {int(count): time for count, time in json.loads(known).items()}


def _track(ctx: StageContext, trial: Trial) -> None:
    """A separate run in MLflow, nested in the search's."""
    from pipeline.tracking.tracker import child_run

    run = child_run(ctx.track, f"trial-{trial.number}", {"adsc.trial": trial.name})
    run.params({"plan": trial.plan, "proposed_by": trial.name, "state": trial.state})
    run.metrics({"cost": trial.cost})
    for rung in trial.rungs:
        run.metrics({"objective": rung.value, "seconds": rung.seconds}, step=rung.resource)
    if trial.reason:
        run.note(trial.reason)
    run.finish("FAILED" if trial.state == "failed" else "FINISHED")


def _results(
    config: SearchConfig,
    study: Study,
    best: Trial,
    known: Trial | None,
    times: dict[int, float] | None,
) -> dict[str, Any]:
    confirmed = None
    if known is not None and known.number != best.number:
        confirmed = compared(best, known, config.seed)
    states = [trial.state for trial in study.trials]
    results: dict[str, Any] = {
        "plan": best.plan,
        "settings": dict(best.settings or study.own),
        "value": best.value,
        "cost": best.cost,
        "unit": UNITS[config.budget[0]],
        "objective": config.objective,
        "fidelity": config.fidelity,
        "space": len(study.space),
        "counts": {state: states.count(state) for state in ("finished", "stopped", "failed")},
        "known": None
        if known is None
        else {"plan": known.plan, "name": known.name} | {"value": known.value, "cost": known.cost},
        "left_out": study.space.left_out,
        "confirmed": confirmed,
        "front": [trial.plan for trial in study.front()] if config.front else [],
        "prefill_ms": times,
        "config": config.model_dump(mode="json"),
        "trials": [trial.to_dict() for trial in study.trials],
    }
    return results | {"finding": _finding(results, config)}


def compared(one: Trial, other: Trial, seed: int) -> dict[str, float]:
    """Difference of the objective on conversations that the search never saw, with a 95 % interval
    by paired bootstrap over conversations."""
    mine, theirs, weights = (np.array(it) for it in (one.confirm, other.confirm, one.weights))
    rng = np.random.default_rng([6, seed])
    draws = rng.multinomial(len(mine), np.full(len(mine), 1 / len(mine)), size=2000)
    low, high = np.quantile((draws @ (mine - theirs)) / (draws @ weights), [0.025, 0.975])
    mean = float((mine - theirs).sum() / weights.sum())
    return {"mean": mean, "low": float(low), "high": float(high)}


def _finding(results: dict[str, Any], config: SearchConfig) -> str:
    what = "loss" if config.objective == "loss" else "share of right answers"
    count, failed = sum(results["counts"].values()), results["counts"]["failed"]
    best = results["plan"]
    if settings := written(tuple(results["settings"].items())):
        best = f"{best} with {settings},"
    if config.plan:
        sentence = (
            f"{count} trainings with {config.plan} were tried ({failed} failed); the best, {best}"
        )
    else:
        sentence = (
            f"Of {results['space']:,} plans that meet the budget, {count} were tried ({failed} "
            f"failed); the best, {best} at {results['cost']:.4g} {results['unit']},"
        )
    sentence += f" has a {what} of {results['value']:.4f}"
    known = results["known"]
    if known is None:
        return f"{sentence}; no known placement finished to compare it with."
    if results["confirmed"] is None:
        return (
            f"{sentence}: it is a known placement ({known['name']}), so nothing better was found."
        )
    gap = results["confirmed"]
    interval = f"{gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]"
    sentence += (
        f", the best known placement ({known['name']}, {known['plan']}) {known['value']:.4f}. On "
        f"conversations that the search never saw the difference is {interval}"
    )
    if gap["low"] <= 0 <= gap["high"]:
        return f"{sentence}, which is not significant."
    better = (gap["mean"] < 0) == (config.objective == "loss")
    return f"{sentence}: the search {'paid off' if better else 'overfitted its conversations'}."


def _table(study: Study) -> pa.Table:
    rows = []
    for trial in sorted(study.trials, key=lambda it: it.number):
        plan = PruningPlan.parse(trial.plan)
        rows.append(
            {
                "number": trial.number,
                "name": trial.name,
                "known": trial.known,
                "plan": trial.plan,
                "settings": json.dumps(dict(trial.settings)),
                "drops": len(plan.stages),
                "layers": [layer for layer, _ in plan.stages],
                "keeps": [float(keep) for _, keep in plan.stages],
                "anchor": plan.anchor,
                "cost": trial.cost,
                "state": trial.state,
                "reason": trial.reason,
                "value": trial.value,
                "resources": [rung.resource for rung in trial.rungs],
                "values": [rung.value for rung in trial.rungs],
                "worker": trial.worker,
                "started": trial.started,
                "ended": trial.ended,
            }
        )
    return pa.Table.from_pylist(rows)

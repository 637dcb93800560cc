"""Stage `evaluate`: every arm answers the same questions; scores, intervals, costs and times.

An arm is a checkpoint and a method (a plan, a peer, or none). Ray actors answer, in shards that a
killed run keeps (pipeline/evaluation/answers.py); every single answer goes to samples.parquet, the
summary to results.json, which the report reads. `adsc eval` runs this stage too.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoProcessor

from pipeline.data.pictures import decode_picture
from pipeline.data.prepared import PreparedData, split_folder
from pipeline.data.templates import find_template
from pipeline.durable.stage import Input, StageContext
from pipeline.evaluation.answers import (
    Job,
    Shard,
    answer_all,
    read_answers,
    shards_of,
    start_workers,
    stop_workers,
    unfinished,
    write_samples,
)
from pipeline.evaluation.benchmarks import BENCHMARKS
from pipeline.evaluation.generation import Asked, Questions, majority_answers, share_right
from pipeline.evaluation.intervals import Bootstrap, interval, over_seeds
from pipeline.evaluation.scoring import FIGURES, RULES, Mean, references
from pipeline.kinds.evaluate import ArmConfig, EvaluateConfig, Row, rows_of
from pipeline.store import open_store


class Against(NamedTuple):
    """What a row is compared with its control by."""

    own: np.ndarray
    """(S, Q) scores of the row's arms."""
    control: np.ndarray
    """(S', Q) those of the control's."""
    same_seeds: bool
    """Whether both are of the same seeds, in the same order."""


class Scored(NamedTuple):
    """What is kept in memory of an arm's answers: the rest stays in the store."""

    scores: np.ndarray
    """(Q,) of each question, 0 to 1."""
    seconds: float | None = None
    """Wall time of all answers, where it is known."""
    generated: float | None = None
    """Tokens of all answers, likewise."""
    shown: dict[int, str] = {}
    """Answers that the report shows, by question."""


def evaluate(ctx: StageContext, config: EvaluateConfig) -> dict[str, Any]:
    """Stage body; inputs `base` (whose processor puts the questions), `data`, the checkpoints that
    the arms name, and training stages (for their loss curves).

    Raises:
        AnswersFailed: questions that could not be answered, by id.
    """
    data = ctx.inputs["data"]
    splits = {split: Questions(split_folder(data.folder, split)) for split in config.splits}
    asked = _labelled(splits)
    scenes = [scene for questions in splits.values() for scene in questions.scenes()]
    job = _job(ctx, config)
    order = sorted(config.arms, key=lambda arm: _first(config.arms, arm.checkpoint))
    sizes = {split: len(questions) for split, questions in splits.items()}
    shards = shards_of([arm.name for arm in order], sizes, config.shard_questions)
    measured = _answer_and_measure(ctx, config, job, shards, order[-1].checkpoint)
    shown, pictures = write_pictures(ctx, config, splits[config.splits[0]])
    scored = {arm.name: _read(job, shards, arm.name, shown) for arm in config.arms}
    found = results(
        config,
        asked,
        scenes,
        scored,
        measured,
        splits=[split for split, size in sizes.items() for _ in range(size)],
        workflow=ctx.run.workflow,
        commit=ctx.run.commit,
        config={"evaluate": config.model_dump(mode="json")} | _training(ctx),
        majority=_majority(ctx, config, splits, asked),
        benchmarks=_benchmarks(config, splits, scenes, scored),
        samples=[
            {
                "picture": picture,
                "question": asked[number].text,
                "expected": _shown(config, asked[number].expected),
                "answers": {arm.name: scored[arm.name].shown[number] for arm in _leading(config)},
            }
            for number, picture in zip(shown, pictures, strict=True)
        ],
        curves=_curves(ctx),
    )
    (ctx.out / "results.json").write_text(json.dumps(found, indent=1))
    write_samples(job.storage, shards, ctx.out / "samples.parquet")
    summary = {arm["name"]: _summary(arm) for arm in found["arms"]}
    numbers = {
        name: {key: value for key, value in row.items() if key not in ("plan", "budget")}
        for name, row in summary.items()
    }
    ctx.track.dataset(data.uri, "test questions", data.outputs.get("digest", "")[:12])
    ctx.track.metrics(numbers | {"majority": found["majority"]["accuracy"]})
    ctx.track.metrics(
        {
            benchmark: {
                name: {row: of["mean"] for row, of in rows.items()}
                for name, rows in figures.items()
            }
            for benchmark, figures in found["benchmarks"].items()
        }
    )
    ctx.track.artifact(ctx.out / "results.json")
    return {"arms": summary, "majority": found["majority"]["accuracy"]}


def results(
    evaluated: EvaluateConfig,
    asked: Sequence[Asked],
    scenes: Sequence[str],
    scored: dict[str, Scored],
    measured: dict[str, Any],
    splits: Sequence[str] = (),
    **more: Any,
) -> dict[str, Any]:
    """What results.json holds (pipeline/reporting/results.py), however the answers were made.

    Args:
        scenes: what each question is about (`Questions.scenes`).
        scored: by arm.
        measured: as measure_and_count gives it, its methods by what they run with.
        splits: of each question, where there are several.
        more: the remaining fields.
    """
    return {
        "title": evaluated.title,
        "task": evaluated.task,
        "seed": evaluated.seed,
        "control_arm": evaluated.control,
        "num_questions": len(asked),
        "num_pictures": len(set(scenes)),
        "prefill_batch": measured["batch"],
        "decode_tokens": evaluated.decode_tokens,
        **{name: measured[name] for name in _SHAPE},
        "arms": _table(evaluated, asked, scenes, scored, measured, splits),
        **more,
    }


_SHAPE = ("num_vision_tokens", "num_layers", "text_tokens", "device", "dtype")


def _first(arms: Sequence[ArmConfig], checkpoint: str) -> int:
    return [arm.checkpoint for arm in arms].index(checkpoint)


def _leading(config: EvaluateConfig) -> list[ArmConfig]:
    return [row.arms[0] for row in rows_of(config.arms)]


def _labelled(splits: dict[str, Questions]) -> list[Asked]:
    """All questions; where there are several splits, records and kinds carry the split's name."""
    if len(splits) == 1:
        return next(iter(splits.values())).asked
    return [
        asked._replace(record=f"{split}/{asked.record}", kind=f"{split}: {asked.kind}")
        for split, questions in splits.items()
        for asked in questions.asked
    ]


def _rule(config: EvaluateConfig, split: str) -> str:
    return BENCHMARKS[split].rule if split in config.benchmarks else "exact_match"


def _shown(config: EvaluateConfig, expected: str) -> str:
    """What is expected of a question of the first split, each of several answers once."""
    if config.splits[0] not in config.benchmarks:
        return expected
    return ", ".join(dict.fromkeys(references(expected)))


def _job(ctx: StageContext, config: EvaluateConfig) -> Job:
    data = ctx.inputs["data"]
    template = None
    if config.template == "data":
        processor = AutoProcessor.from_pretrained(ctx.inputs["base"].folder)
        template = find_template(_template_of(data), processor).jinja()
    checkpoints = {name: ctx.inputs[name] for name in {arm.checkpoint for arm in config.arms}}
    return Job(
        storage=open_store(ctx.train_storage[0]).uri(ctx.train_storage[1]),
        inputs={"data": data, "base": ctx.inputs["base"], **checkpoints},
        rules={split: _rule(config, split) for split in config.splits},
        arms={arm.name: (arm.checkpoint, arm) for arm in config.arms},
        chat_template=template,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
    )


def _template_of(data: Input) -> str:
    """The template that the data was prepared with, from its record or its manifest."""
    manifest = data.folder / "manifest.json"
    known = json.loads(manifest.read_text()) if manifest.is_file() else {}
    name: str | None = data.outputs.get("template") or known.get("template")
    if name is None:
        raise ValueError(
            f"nothing at {data.uri} says which template the data was prepared with; "
            "evaluate.template = checkpoint asks as the checkpoint's processor does"
        )
    return name


def _answer_and_measure(
    ctx: StageContext, config: EvaluateConfig, job: Job, shards: Sequence[Shard], checkpoint: str
) -> dict[str, Any]:
    """Answers into the store by all workers, then times and memory by one that is left alone."""
    import ray

    run = ctx.run
    todo = len(unfinished(open_store(job.storage), shards))
    count = max(1, min(workers_that_fit(ctx), todo))
    workers = start_workers(job, count, run.cpus_per_worker, run.gpus_per_worker)
    try:
        answer_all(job, shards, workers, ctx.progress)
        stop_workers(workers[1:])
        workers = workers[:1]
        ctx.progress(0, 0, "measuring times and memory")
        distinct = {arm.runs_with: arm.name for arm in config.arms}
        measured = ray.get(
            workers[0].measure.remote(
                checkpoint,
                config.splits[0],
                list(distinct.values()),
                batch=config.prefill_batch,
                rounds=config.prefill_rounds,
                decode_rounds=config.decode_rounds,
                decode_tokens=config.decode_tokens,
            )
        )
    finally:
        stop_workers(workers)
    methods = dict(zip(distinct, measured.pop("methods"), strict=True))
    return {**measured, "methods": methods}


def workers_that_fit(ctx: StageContext) -> int:
    """As many as asked for; of a range, as many as the cluster has room for."""
    import ray

    run, asked = ctx.run, ctx.run.num_workers
    if isinstance(asked, int):
        return asked
    have, fewest = ray.cluster_resources(), asked[0]
    room = have.get("CPU", 0) // run.cpus_per_worker if run.cpus_per_worker else asked[1]
    if run.gpus_per_worker:
        room = min(room, have.get("GPU", 0) // run.gpus_per_worker)
    return max(fewest, min(asked[1], int(room)))


def _read(job: Job, shards: Sequence[Shard], arm: str, shown: Sequence[int]) -> Scored:
    """One pass over an arm's shards; `shown` are question numbers of the first split."""
    scores, answers = [], {}
    seconds = generated = 0.0
    own = [shard for shard in shards if shard.arm == arm]
    wanted = set(shown)
    for shard, table in zip(own, read_answers(job.storage, own), strict=True):
        scores.append(table["score"].to_numpy())
        seconds += float((table["seconds"].to_numpy() / table["batch_size"].to_numpy()).sum())
        generated += float(table["generated_tokens"].to_numpy().sum())
        if shard.split == own[0].split and wanted & set(shard.questions):
            pairs = zip(table["number"].to_pylist(), table["answer"].to_pylist(), strict=True)
            answers.update({number: answer for number, answer in pairs if number in wanted})
    return Scored(np.concatenate(scores), seconds, generated, answers)


def _mean(totals: Sequence[float | None], count: int) -> float | None:
    known = [total for total in totals if total is not None]
    return sum(known) / count if len(known) == len(totals) else None


def _table(
    config: EvaluateConfig,
    asked: Sequence[Asked],
    scenes: Sequence[str],
    scored: dict[str, Scored],
    measured: dict[str, Any],
    splits: Sequence[str],
) -> list[dict[str, Any]]:
    bootstrap = Bootstrap(scenes, config.seed)
    kinds = np.array([question.kind for question in asked])
    several = list(dict.fromkeys(splits)) if len(set(splits)) > 1 else []
    tasks = {task: np.array(splits) == task for task in several}
    rows = rows_of(config.arms)
    scores = {row.name: np.stack([scored[arm.name].scores for arm in row.arms]) for row in rows}
    control = next((row for row in rows if row.name == config.control), None)
    dense = measured["methods"].get("")
    table = []
    for row in rows:
        own, arm, count = scores[row.name], row.arms[0], len(asked) * len(row.arms)
        against = control and _against(row, control, scores)
        kept = against and bootstrap.ratio(
            against.own, against.control, same_seeds=against.same_seeds
        )
        other = None if row is control else against
        table.append(
            {
                "name": row.name,
                "label": arm.label,
                "plan": arm.runs_with,
                "peer": arm.method is not None,
                "trained": arm.trained,
                "budget": arm.budget,
                "curve": arm.curve,
                "accuracy": bootstrap.mean(own),
                "by_kind": {
                    str(kind): bootstrap.mean(own, kinds == kind) for kind in np.unique(kinds)
                },
                "by_split": {
                    task: _of_task(bootstrap, own, other, mask) for task, mask in tasks.items()
                },
                "difference": other
                and bootstrap.difference(other.own, other.control, same_seeds=other.same_seeds),
                "retention": kept and kept["mean"],
                "retention_interval": other and kept,
                "seeds": [
                    {"seed": a.seed, "accuracy": float(scored[a.name].scores.mean())}
                    for a in row.arms
                    if a.seed is not None
                ],
                "over_seeds": over_seeds([float(one.mean()) for one in own]),
                "difference_over_seeds": other and _paired_over_seeds(other),
                "seconds_per_question": _mean([scored[a.name].seconds for a in row.arms], count),
                "generated_tokens": _mean([scored[a.name].generated for a in row.arms], count),
            }
            | _costs(measured, arm.runs_with, dense)
        )
    return table


def _of_task(
    bootstrap: Bootstrap, own: np.ndarray, other: Against | None, mask: np.ndarray
) -> dict[str, Any]:
    """A row's share of one task, with what is paired with the control."""
    if other is None:
        return bootstrap.mean(own, mask)
    pair, same = (other.own, other.control, mask), other.same_seeds
    kept = bootstrap.ratio(*pair, same_seeds=same)
    return {
        **bootstrap.mean(own, mask),
        "difference": bootstrap.difference(*pair, same_seeds=same),
        "retention": kept and kept["mean"],
    }


def _against(row: Row, control: Row, scores: dict[str, np.ndarray]) -> Against:
    """Scores on the seeds that both have, in the same order; of rows that share none, all."""
    places = [{arm.seed: place for place, arm in enumerate(one.arms)} for one in (row, control)]
    common = sorted(seed for seed in set.intersection(*map(set, places)) if seed is not None)
    if not common:
        return Against(scores[row.name], scores[control.name], same_seeds=False)
    own, other = ([place[seed] for seed in common] for place in places)
    return Against(scores[row.name][own], scores[control.name][other], same_seeds=True)


def _paired_over_seeds(pair: Against) -> dict[str, float] | None:
    """Own - control seed by seed; None where they share fewer than two."""
    if not pair.same_seeds:
        return None
    return over_seeds((pair.own.mean(axis=1) - pair.control.mean(axis=1)).tolist())


def _costs(measured: dict[str, Any], method: str, dense: Any) -> dict[str, Any]:
    """Mean cost of the batch's questions by the exact model, and times and memory as measured."""
    times, cost = measured["methods"][method]
    reference = measured["dense"]
    average, vision = cost.average_vision_tokens, reference.average_vision_tokens
    prefill = times["prefill_ms"]["median"]
    speed = times["decode_tokens_per_s"]["median"]
    return {
        "average_vision_tokens": average,
        "reduction": 1 - average / vision if vision else 0.0,
        "tokens_per_layer": cost.tokens_per_layer,
        "flops": cost.flops,
        "flops_reduction": 1 - cost.flops / reference.flops,
        "kv_cache_bytes": cost.kv_cache_bytes,
        "kv_reduction": 1 - cost.kv_cache_bytes / reference.kv_cache_bytes,
        **times,
        "prefill_speedup": dense and dense[0]["prefill_ms"]["median"] / prefill,
        "decode_speedup": dense and speed / dense[0]["decode_tokens_per_s"]["median"],
    }


def _majority(
    ctx: StageContext,
    config: EvaluateConfig,
    splits: dict[str, Questions],
    asked: Sequence[Asked],
) -> dict[str, Any]:
    """Always the most frequent answer of the kind: in training, or where no training split is at
    hand, in the questions themselves (for exact match a bound from above)."""
    train = ctx.inputs["data"].folder / "train"
    guesses: dict[str, str] = {}
    for split, questions in splits.items():
        data = PreparedData(train if train.is_dir() else questions.folder)
        own = majority_answers(data, several=split in config.benchmarks)
        prefix = f"{split}: " if len(splits) > 1 else ""
        guesses |= {f"{prefix}{kind}": answer for kind, answer in own.items()}
    rules = [RULES[_rule(config, split)] for split, of in splits.items() for _ in of.asked]
    source = "train" if train.is_dir() else "questions"
    return share_right(asked, guesses, rules) | {"source": source}


def _benchmarks(
    config: EvaluateConfig,
    splits: dict[str, Questions],
    scenes: Sequence[str],
    scored: dict[str, Scored],
) -> dict[str, dict[str, dict[str, Any]]]:
    """What the benchmarks make of scores beyond their mean, by benchmark, figure and row, with
    intervals and what is paired with the control. Of a group, the mean over its arms."""
    start, found = 0, {}
    for split, questions in splits.items():
        part = slice(start, start + len(questions))
        start = part.stop
        if split in config.benchmarks and split in FIGURES:
            bootstrap = Bootstrap(scenes[part], config.seed)
            rows = {
                row.name: [scored[arm.name].scores[part] for arm in row.arms]
                for row in rows_of(config.arms)
            }
            found[split] = _figures(split, questions.asked, rows, config.control, bootstrap)
    return found


def _figures(
    benchmark: str,
    asked: Sequence[Asked],
    rows: dict[str, list[np.ndarray]],
    control: str,
    bootstrap: Bootstrap,
) -> dict[str, dict[str, Any]]:
    """By figure and row; the scores of a row are a list of (Q,), one a seed."""

    def figures(scores: Sequence[np.ndarray], mean: Mean) -> dict[str, Any]:
        each = [FIGURES[benchmark](asked, one, mean) for one in scores]
        return {name: sum(of[name] for of in each) / len(each) for name in each[0]}

    def plain(values: np.ndarray, chosen: np.ndarray) -> float:
        return float(values[chosen].mean())

    points = {row: figures(scores, plain) for row, scores in rows.items()}
    drawn = {row: figures(scores, bootstrap.draws) for row, scores in rows.items()}
    found: dict[str, dict[str, Any]] = {name: {} for name in next(iter(points.values()))}
    for name, of_rows in found.items():
        for row in rows:
            own, draws = points[row][name], drawn[row][name]
            of_rows[row] = interval(own, draws)
            if row != control and control in rows:
                other = points[control][name]
                of_rows[row]["difference"] = interval(own - other, draws - drawn[control][name])
                of_rows[row]["retention"] = own / other if other else None
    return found


def write_pictures(
    ctx: StageContext, config: EvaluateConfig, questions: Questions
) -> tuple[list[int], list[str]]:
    """Numbers of the questions that the report shows, and the (first) picture of each as the model
    sees it. Turns of a conversation may be about different ones."""
    (ctx.out / "pictures").mkdir()
    numbers: list[int] = []
    pictures: list[str] = []
    files: dict[tuple[int, tuple[int, int]], str] = {}
    for number, asked in enumerate(questions.asked):
        key = asked.row, asked.pictures
        if key not in files:
            if len(files) == config.sample_pictures:
                break
            (question,) = questions.load([number])
            if not question.pictures:
                continue
            files[key] = f"pictures/{len(files)}.png"
            decode_picture(question.pictures[0]).save(ctx.out / files[key])
        numbers.append(number)
        pictures.append(files[key])
    return numbers, pictures


def _training(ctx: StageContext) -> dict[str, Any]:
    return {
        name: source.record.config or {}
        for name, source in ctx.inputs.items()
        if (source.folder / "trained" / "history.json").exists()
    }


def _curves(ctx: StageContext) -> dict[str, Any]:
    return {
        f"{name} ({ctx.inputs[name].outputs.get('plan') or 'no drop'})": json.loads(
            (ctx.inputs[name].folder / "trained" / "history.json").read_text()
        )
        for name in _training(ctx)
    }


def _summary(arm: dict[str, Any]) -> dict[str, Any]:
    return {
        "accuracy": arm["accuracy"]["mean"],
        "average_vision_tokens": arm["average_vision_tokens"],
        "flops": arm["flops"],
        "kv_cache_bytes": arm["kv_cache_bytes"],
        "prefill_ms": arm["prefill_ms"]["median"],
        "prefill_speedup": arm["prefill_speedup"],
        "decode_tokens_per_s": arm["decode_tokens_per_s"]["median"],
        "peak_memory_bytes": arm["peak_memory_bytes"],
        "retention": arm["retention"],
        "plan": arm["plan"],
        **({"budget": arm["budget"]} if arm["budget"] else {}),
    }

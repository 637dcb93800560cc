"""Stage `evaluate`: every arm answers the same questions; scores, intervals, costs and times.

An arm is a checkpoint and a method (a plan, a peer, or none). Ray actors answer, in shards that a
killed run keeps (pipeline/evaluation/answers.py); every single answer goes to samples.parquet, the
summary to results.json, which the report reads. `adsc eval` runs this stage too.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import AutoProcessor

from pipeline.data.pictures import decode_picture
from pipeline.data.prepared import PreparedData, split_folder
from pipeline.data.templates import find_template
from pipeline.durable.stage import Input, StageContext
from pipeline.evaluation.answers import (
    EvaluationJob,
    Shard,
    answer_all,
    read_answers,
    shards_of,
    start_workers,
    stop_workers,
    unfinished,
    write_samples,
)
from pipeline.evaluation.config import ArmConfig, EvaluateConfig, leading_arms, rule_of
from pipeline.evaluation.generation import QuestionEntry, Questions, majority_answers, share_right
from pipeline.evaluation.scoring import RULES, references
from pipeline.evaluation.table import Scored, benchmark_figures, results, summary_of
from pipeline.store import open_store


def evaluate(ctx: StageContext, config: EvaluateConfig) -> dict[str, Any]:
    """Stage body; inputs `base` (whose processor puts the questions), `data`, the checkpoints that
    the arms name, and training stages (for their loss curves).

    Raises:
        AnswersFailed: questions that could not be answered, by id.
    """
    data = ctx.inputs["data"]
    splits = {split: Questions(split_folder(data.folder, split)) for split in config.splits}
    entries = _labelled(splits)
    scenes = [scene for questions in splits.values() for scene in questions.scenes()]
    job = _job(ctx, config)
    order = sorted(config.arms, key=lambda arm: _first(config.arms, arm.checkpoint))
    sizes = {split: len(questions) for split, questions in splits.items()}
    shards = shards_of([arm.name for arm in order], sizes, config.shard_questions)
    measured = _answer_and_measure(ctx, config, job, shards, order[-1].checkpoint)
    shown, pictures = write_pictures(ctx, config, splits[config.splits[0]])
    leading = [arm.name for arm in leading_arms(config)]
    scored = {arm.name: _read(job, shards, arm.name, shown) for arm in config.arms}
    outcome = results(
        config,
        entries,
        scenes,
        scored,
        measured,
        splits=[split for split, size in sizes.items() for _ in range(size)],
        workflow=ctx.run.workflow,
        commit=ctx.run.commit,
        config={"evaluate": config.model_dump(mode="json")} | _training(ctx),
        majority=_majority(ctx, config, splits, entries),
        benchmarks=benchmark_figures(config, splits, scenes, scored),
        samples=[
            {
                "picture": picture,
                "question": entries[number].text,
                "expected": _shown(config, entries[number].expected),
                "answers": {name: scored[name].shown[number] for name in leading},
            }
            for number, picture in zip(shown, pictures, strict=True)
        ],
        curves=_curves(ctx),
    )
    (ctx.out / "results.json").write_text(json.dumps(outcome, indent=1))
    write_samples(job.storage, shards, ctx.out / "samples.parquet")
    summary = {arm["name"]: summary_of(arm) for arm in outcome["arms"]}
    numbers = {
        name: {key: value for key, value in row.items() if key not in ("plan", "budget")}
        for name, row in summary.items()
    }
    ctx.track.dataset(data.uri, "test questions", data.outputs.get("digest", "")[:12])
    ctx.track.metrics(numbers | {"majority": outcome["majority"]["accuracy"]})
    ctx.track.metrics(
        {
            benchmark: {
                name: {row: of["mean"] for row, of in rows.items()}
                for name, rows in figures.items()
            }
            for benchmark, figures in outcome["benchmarks"].items()
        }
    )
    ctx.track.artifact(ctx.out / "results.json")
    return {"arms": summary, "majority": outcome["majority"]["accuracy"]}


def _first(arms: Sequence[ArmConfig], checkpoint: str) -> int:
    return [arm.checkpoint for arm in arms].index(checkpoint)


def _labelled(splits: dict[str, Questions]) -> list[QuestionEntry]:
    """All questions; where there are several splits, records and kinds carry the split's name."""
    if len(splits) == 1:
        return next(iter(splits.values())).entries
    return [
        entry._replace(record=f"{split}/{entry.record}", kind=f"{split}: {entry.kind}")
        for split, questions in splits.items()
        for entry in questions.entries
    ]


def _shown(config: EvaluateConfig, expected: str) -> str:
    """The expected answer to a question of the first split; each of several once."""
    if config.splits[0] not in config.benchmarks:
        return expected
    return ", ".join(dict.fromkeys(references(expected)))


def _job(ctx: StageContext, config: EvaluateConfig) -> EvaluationJob:
    data = ctx.inputs["data"]
    template = None
    if config.template == "data":
        processor = AutoProcessor.from_pretrained(ctx.inputs["base"].folder)
        template = find_template(_template_of(data), processor).text
    checkpoints = {name: ctx.inputs[name] for name in {arm.checkpoint for arm in config.arms}}
    return EvaluationJob(
        storage=open_store(ctx.train_storage[0]).uri(ctx.train_storage[1]),
        inputs={"data": data, "base": ctx.inputs["base"], **checkpoints},
        rules={split: rule_of(config, split) for split in config.splits},
        arms={arm.name: (arm.checkpoint, arm) for arm in config.arms},
        chat_template=template,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        compiled=config.compile == "layers",
        engine=config.engine,
    )


def _template_of(data: Input) -> str:
    """The template that the data was prepared with, from its record or its manifest."""
    manifest = data.folder / "manifest.json"
    known = json.loads(manifest.read_text()) if manifest.is_file() else {}
    name: str | None = data.outputs.get("template") or known.get("template")
    if name is None:
        raise ValueError(
            f"{data.uri} does not record which template the data was prepared with; "
            "set evaluate.template = checkpoint to use the checkpoint's own"
        )
    return name


def _answer_and_measure(
    ctx: StageContext,
    config: EvaluateConfig,
    job: EvaluationJob,
    shards: Sequence[Shard],
    checkpoint: str,
) -> dict[str, Any]:
    """Answer with all workers into the store, then measure times and memory with a single one."""
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
    """The number of workers; for a range, as many as the cluster has room for."""
    import ray

    run, wanted = ctx.run, ctx.run.num_workers
    if isinstance(wanted, int):
        return wanted
    have, fewest = ray.cluster_resources(), wanted[0]
    room = have.get("CPU", 0) // run.cpus_per_worker if run.cpus_per_worker else wanted[1]
    if run.gpus_per_worker:
        room = min(room, have.get("GPU", 0) // run.gpus_per_worker)
    return max(fewest, min(wanted[1], int(room)))


def _read(job: EvaluationJob, shards: Sequence[Shard], arm: str, shown: Sequence[int]) -> Scored:
    """One pass over an arm's shards; `shown` are question numbers of the first split."""
    scores, answers = [], {}
    seconds = generated = 0.0
    of_arm = [shard for shard in shards if shard.arm == arm]
    wanted = set(shown)
    for shard, table in zip(of_arm, read_answers(job.storage, of_arm), strict=True):
        scores.append(table["score"].to_numpy())
        seconds += float((table["seconds"].to_numpy() / table["batch_size"].to_numpy()).sum())
        generated += float(table["generated_tokens"].to_numpy().sum())
        if shard.split == of_arm[0].split and wanted & set(shard.questions):
            pairs = zip(table["number"].to_pylist(), table["answer"].to_pylist(), strict=True)
            answers.update({number: answer for number, answer in pairs if number in wanted})
    return Scored(np.concatenate(scores), seconds, generated, answers)


def _majority(
    ctx: StageContext,
    config: EvaluateConfig,
    splits: dict[str, Questions],
    entries: Sequence[QuestionEntry],
) -> dict[str, Any]:
    """Always the most frequent answer of the kind: in training, or where no training split is at
    hand, in the questions themselves (for exact match a bound from above)."""
    train = ctx.inputs["data"].folder / "train"
    guesses: dict[str, str] = {}
    for split, questions in splits.items():
        data = PreparedData(train if train.is_dir() else questions.folder)
        answers = majority_answers(data, several=split in config.benchmarks)
        prefix = f"{split}: " if len(splits) > 1 else ""
        guesses |= {f"{prefix}{kind}": answer for kind, answer in answers.items()}
    rules = [RULES[rule_of(config, split)] for split, of in splits.items() for _ in of.entries]
    source = "train" if train.is_dir() else "questions"
    return share_right(entries, guesses, rules) | {"source": source}


def write_pictures(
    ctx: StageContext, config: EvaluateConfig, questions: Questions
) -> tuple[list[int], list[str]]:
    """Numbers of the questions that the report shows, and the (first) picture of each as the model
    sees it. Turns of a conversation may be about different ones."""
    (ctx.out / "pictures").mkdir()
    numbers: list[int] = []
    pictures: list[str] = []
    files: dict[tuple[int, tuple[int, int]], str] = {}
    for number, entry in enumerate(questions.entries):
        key = entry.row, entry.pictures
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

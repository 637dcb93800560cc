"""Stage `evaluate`: every arm answers the same questions; scores, intervals, costs and times.

An arm is a checkpoint and a plan. Every single answer goes to samples.parquet, the summary to
results.json, which the report reads.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field
from transformers import AutoProcessor

import adsc
from pipeline.config import Config
from pipeline.evaluation import (
    Bootstrap,
    Question,
    build_inputs,
    generate_answers,
    majority_answers,
    read_questions,
    time_prefill,
    to_device,
)
from pipeline.prepared import PreparedData
from pipeline.stage import StageContext
from pipeline.templates import find_template


class ArmConfig(Config):
    """One row of the result table."""

    name: str
    """Short name, unique."""
    label: str
    """Name for people."""
    checkpoint: str
    """The input that holds the model: `base`, or a merge stage's."""
    plan: str
    """The plan it runs with; empty is dense."""
    trained: bool
    """Whether the checkpoint was trained in this workflow."""


class EvaluateConfig(Config):
    """What is compared, and how the answers are made."""

    title: str = ""
    """Title of the report."""
    task: str = ""
    """What the data is, in a few words."""
    arms: tuple[ArmConfig, ...] = ()
    """The rows of the table."""
    control: str = "dense_lora"
    """Name of the arm that the others are compared with: the dense model trained alike."""
    batch_size: int = Field(64, gt=0)
    """Questions answered at a time."""
    max_new_tokens: int = Field(8, gt=0)
    """Longest answer in tokens."""
    prefill_batch: int = Field(32, gt=0)
    """Questions in the batch whose prefill is timed."""
    prefill_rounds: int = Field(15, gt=0)
    """Timed repetitions; the arms take turns."""
    sample_pictures: int = Field(4, ge=0)
    """Pictures shown in the report with every arm's answers."""
    seed: int = 0
    """Seed of the bootstrap; a compression puts its training's seed here."""


def evaluate(ctx: StageContext, config: EvaluateConfig) -> dict[str, Any]:
    """Stage body; inputs `base`, `data`, the checkpoints that the arms name, and training stages
    (for their loss curves)."""
    data = ctx.inputs["data"].folder
    questions = read_questions(PreparedData(data / "test"))
    processor = AutoProcessor.from_pretrained(ctx.inputs["base"].folder)
    # Questions are put as training put them, whatever template the checkpoint came with.
    template = ctx.inputs["data"].outputs["template"]
    processor.chat_template = find_template(template, processor).jinja()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    answers: dict[str, list[str]] = {}
    total = len(questions) * len(config.arms)
    model: Any = None
    for i, arm in enumerate(config.arms):
        model = adsc.from_pretrained(ctx.inputs[arm.checkpoint].folder).to(device).eval()
        adsc.attach(model, adsc.PruningPlan.parse(arm.plan))
        report = partial(_report, ctx, i * len(questions), total, arm.label)
        answers[arm.name] = generate_answers(
            model, processor, questions, config.batch_size, config.max_new_tokens, report
        )
    trained = {
        name: source
        for name, source in ctx.inputs.items()
        if (source.folder / "trained" / "history.json").exists()
    }
    training = {name: source.record.config or {} for name, source in trained.items()}
    results = {
        "title": config.title,
        "task": config.task,
        "workflow": ctx.run.workflow,
        "seed": config.seed,
        "commit": ctx.run.commit,
        "config": {"evaluate": config.model_dump(mode="json")} | training,
        "num_questions": len(questions),
        "prefill_batch": min(config.prefill_batch, len(questions)),
        "num_pictures": len({question.record for question in questions}),
        "majority": _majority(questions, majority_answers(PreparedData(data / "train"))),
        **_score(questions, answers, config),
        "samples": _samples(questions, answers, ctx.out, config.sample_pictures),
        "curves": {
            _curve_name(name, source.outputs): json.loads(
                (source.folder / "trained" / "history.json").read_text()
            )
            for name, source in trained.items()
        },
    }
    _add_costs(results, model, build_inputs(questions[: config.prefill_batch], processor), config)
    (ctx.out / "results.json").write_text(json.dumps(results, indent=1))
    _write_samples(questions, answers, ctx.out / "samples.parquet")
    summary = {arm["name"]: _summary(arm) for arm in results["arms"]}
    numbers = {
        name: {key: value for key, value in row.items() if key != "plan"}
        for name, row in summary.items()
    }
    data_input = ctx.inputs["data"]
    ctx.track.dataset(data_input.uri, "test questions", data_input.outputs["digest"][:12])
    ctx.track.metrics(numbers | {"majority": results["majority"]["accuracy"]})
    return {"arms": summary, "majority": results["majority"]["accuracy"]}


def _curve_name(stage: str, outputs: dict[str, Any]) -> str:
    return f"{stage} ({outputs.get('plan') or 'no drop'})"


def _report(ctx: StageContext, before: int, total: int, label: str, done: int) -> None:
    ctx.progress(before + done, total, f"answers, {label}")


def _score(
    questions: list[Question], answers: dict[str, list[str]], config: EvaluateConfig
) -> dict[str, Any]:
    bootstrap = Bootstrap([question.record for question in questions], config.seed)
    kinds = np.array([question.kind for question in questions])
    expected = [question.expected for question in questions]
    right = {
        name: np.array([a == e for a, e in zip(given, expected, strict=True)], float)
        for name, given in answers.items()
    }
    control = right.get(config.control)
    arms = []
    for arm in config.arms:
        own = right[arm.name]
        against = control if arm.name != config.control else None
        arms.append(
            arm.model_dump(mode="json")
            | {
                "accuracy": bootstrap.mean(own),
                "by_kind": {
                    str(kind): bootstrap.mean(own, kinds == kind) for kind in np.unique(kinds)
                },
                "difference": None if against is None else bootstrap.mean(own - against),
                "retention": float(own.mean() / control.mean())
                if control is not None and control.any()
                else None,
            }
        )
    return {"arms": arms}


def _majority(questions: list[Question], answers: dict[str, str]) -> dict[str, Any]:
    right: dict[str, list[bool]] = {}
    for question in questions:
        right.setdefault(question.kind, []).append(answers.get(question.kind) == question.expected)
    everything = [hit for hits in right.values() for hit in hits]
    return {
        "accuracy": float(np.mean(everything)),
        "by_kind": {kind: float(np.mean(hits)) for kind, hits in right.items()},
    }


def _add_costs(
    results: dict[str, Any], model: Any, inputs: dict[str, Any], config: EvaluateConfig
) -> None:
    """Cost of one question's prefill by the exact model, and its measured time per batch."""
    model_config = model.config
    layers = model_config.get_text_config().num_hidden_layers
    vision = int((inputs["input_ids"] == model_config.image_token_id).sum())
    vision //= len(inputs["input_ids"])
    text = round(float(inputs["attention_mask"].sum()) / len(inputs["input_ids"])) - vision
    plans = [adsc.PruningPlan.parse(arm.plan) for arm in config.arms]
    adsc.detach(model)
    times = time_prefill(model, to_device(inputs, model), plans, config.prefill_rounds)
    dense = adsc.estimate_cost(model_config, "", text_tokens=text)
    dense_time = next(
        (t["median"] for t, plan in zip(times, plans, strict=True) if not plan.stages),
        float("nan"),
    )
    results |= {"num_vision_tokens": vision, "num_layers": layers, "text_tokens": text}
    for arm, plan, prefill in zip(results["arms"], plans, times, strict=True):
        cost = adsc.estimate_cost(model_config, plan, text_tokens=text)
        arm |= {
            "average_vision_tokens": plan.average_tokens(vision, layers),
            "reduction": plan.reduction(vision, layers),
            "tokens_per_layer": plan.tokens_per_layer(vision, layers),
            "flops": cost.flops,
            "flops_reduction": 1 - cost.flops / dense.flops,
            "kv_cache_bytes": cost.kv_cache_bytes,
            "kv_reduction": 1 - cost.kv_cache_bytes / dense.kv_cache_bytes,
            "prefill_ms": prefill,
            "prefill_speedup": dense_time / prefill["median"],
        }


def _samples(
    questions: list[Question], answers: dict[str, list[str]], out: Path, pictures: int
) -> list[dict[str, Any]]:
    shown = [question.record for question in questions if question.pictures]
    chosen = list(dict.fromkeys(shown))[:pictures]
    (out / "pictures").mkdir()
    samples = []
    for i, question in enumerate(questions):
        if question.record not in chosen:
            continue
        name = f"pictures/{chosen.index(question.record)}.png"
        (out / name).write_bytes(question.pictures[0])
        given = {arm: texts[i] for arm, texts in answers.items()}
        samples.append(
            {
                "picture": name,
                "question": question.text,
                "expected": question.expected,
                "answers": given,
            }
        )
    return samples


def _write_samples(questions: list[Question], answers: dict[str, list[str]], file: Path) -> None:
    rows = [
        {
            "record": question.record,
            "kind": question.kind,
            "question": question.text,
            "expected": question.expected,
            "arm": arm,
            "answer": texts[i],
            "right": texts[i] == question.expected,
        }
        for arm, texts in answers.items()
        for i, question in enumerate(questions)
    ]
    pq.write_table(pa.Table.from_pylist(rows), file, compression="zstd")


def _summary(arm: dict[str, Any]) -> dict[str, Any]:
    return {
        "accuracy": arm["accuracy"]["mean"],
        "average_vision_tokens": arm["average_vision_tokens"],
        "flops": arm["flops"],
        "kv_cache_bytes": arm["kv_cache_bytes"],
        "prefill_ms": arm["prefill_ms"]["median"],
        "prefill_speedup": arm["prefill_speedup"],
        "retention": arm["retention"],
        "plan": arm["plan"],
    }

"""What has been run, as tables, reports and figures."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.prepared import PreparedData
from pipeline.evaluation.generation import (
    Questions,
    build_inputs,
    majority_answers,
    share_right,
    to_device,
)
from pipeline.evaluation.methods import MethodConfig, build_method
from pipeline.evaluation.speed import measure_and_count
from pipeline.evaluation.table import Scored, results
from pipeline.kinds.report import ReportConfig
from pipeline.stages.report import report
from workflows.evidence.config import (
    CONTROL,
    BudgetConfig,
    EvidenceConfig,
    arms,
    control_of,
    controls,
    evaluated,
)
from workflows.evidence.questions import questions_of
from workflows.evidence.retention import Answered, write_retention
from workflows.evidence.summary import write_summary
from workflows.evidence.tasks import Replies, load_model, processor_of, result_file, set_up
from workflows.evidence.world import context_of

log = logging.getLogger(__name__)


def write_ladder(config: EvidenceConfig, out: Path) -> None:
    """The table of what has been run, on the evaluated questions (evidence_retention)."""
    model = load_model(out / "base", None)
    found: list[Answered] = []
    for budget in config.budgets:
        for arm in arms(config, budget):
            scores, seconds = {}, 0.0
            for seed in config.seeds if arm.trained_with else (None,):
                file = result_file(config, out, arm, seed)
                if file.exists():
                    result = json.loads(file.read_text())
                    scores[seed], seconds = result["scores"], result["training_seconds"]
            if scores:
                found.append(
                    Answered(
                        name=arm.name.removesuffix(f"-{budget.name}"),
                        label=arm.label,
                        budget=budget.name,
                        runs_with=arm.method.runs_with,
                        tokens=_average(arm.method, model),
                        control=control_of(config, arm) if arm.trained_with else CONTROL,
                        seconds=seconds,
                        scores=scores,
                    )
                )
    questions = questions_of(out / "prepared", config.questions)
    kinds = [one.kind for one in questions.entries]
    labels = {budget.name: budget.label for budget in config.budgets}
    write_retention(found, kinds, questions.scenes(), out, config.questions, labels)


def _average(method: MethodConfig, model: Any) -> float:
    tokens, layers = model.config.image_seq_length, len(model.model.language_model.layers)
    return float(build_method(method, model).average_tokens(tokens, layers))


def write_results(config: EvidenceConfig, out: Path) -> None:
    """results.json, samples.parquet and report of each budget, and the summary: of what has been
    run."""
    measured = _measured(config, out)
    questions = Questions(out / "prepared" / "test")
    scenes = questions.scenes()
    guesses = majority_answers(PreparedData(out / "prepared" / "train"))
    folders: dict[str, Path] = {}
    for budget in config.budgets:
        replies, commits = _replies(config, out, budget)
        chosen = evaluated(config, budget)
        there = tuple(arm for arm in chosen.arms if arm.name in replies)
        if not any(arm.runs_with for arm in there):
            log.warning("%s is left out: none of its own arms has been run", budget.label)
            continue
        made = results(
            chosen.model_copy(update={"arms": there}),
            questions.entries,
            scenes,
            {name: _scored(own) for name, own in replies.items()},
            measured,
            workflow="evidence",
            commit=", ".join(sorted(commits)),
            config={"evidence": config.model_dump(mode="json")},
            majority=share_right(questions.entries, guesses) | {"source": "train"},
        )
        folder = folders[budget.name] = out / f"budget-{budget.name}"
        folder.mkdir(exist_ok=True)
        (folder / "results.json").write_text(json.dumps(made, indent=1))
        tables = [_samples(name, own, questions, scenes) for name, own in replies.items()]
        pq.write_table(pa.concat_tables(tables), folder / "samples.parquet")
        page = out / f"report-{budget.name}"
        shutil.rmtree(page, ignore_errors=True)
        report(context_of(page, evaluate=folder), ReportConfig())
    if folders:
        write_summary(folders, out)
    if config.control_splits:
        _write_controls(config, out, share_right(questions.entries, guesses))


def _replies(
    config: EvidenceConfig, out: Path, budget: BudgetConfig
) -> tuple[dict[str, Replies], set[str]]:
    """The replies of every arm that has been run, and the commits that evaluated it."""
    replies, commits = {}, set()
    for arm in arms(config, budget):
        for seed in config.seeds if arm.trained_with else (None,):
            file = result_file(config, out, arm, seed)
            if not file.exists():
                log.warning("%s is left out: it has not been run", file.stem)
                continue
            found = json.loads(file.read_text())
            name = arm.name if seed is None else f"{arm.name}-s{seed}"
            # Files of before 2026-11-23 have scores alone.
            replies[name] = Replies(*(found.get(field, []) for field in Replies._fields))
            commits.add(str(found["commit"]))
    return replies, commits


def _scored(replies: Replies) -> Scored:
    scores = np.array(replies.scores, dtype=float)
    return Scored(scores, sum(replies.seconds) or None, sum(replies.generated_tokens) or None)


def _samples(arm: str, replies: Replies, questions: Questions, scenes: list[str]) -> pa.Table:
    """A row a question; null where a file of before holds no more than scores."""
    many, entries = len(scenes), questions.entries
    unknown = [None] * many
    return pa.table(
        {
            "arm": [arm] * many,
            "number": range(many),
            "record": scenes,  # whose digest stands for it: intervals go by pictures
            "kind": [one.kind for one in entries],
            "prompt": [one.text for one in entries],
            "expected": [one.expected for one in entries],
            "answer": pa.array(replies.answers or unknown, pa.string()),
            "score": pa.array(replies.scores, pa.float64()),
            "generated_tokens": pa.array(replies.generated_tokens or unknown, pa.int32()),
            "seconds": pa.array(replies.seconds or unknown, pa.float64()),
        }
    )


def _write_controls(config: EvidenceConfig, out: Path, majority: dict[str, Any]) -> None:
    """controls.json: accuracy of the dense base, of the same without what it needs, and of the most
    frequent answer, in all and by kind."""
    found = {"majority": majority}
    for arm in [*arms(config, config.budgets[0]), *controls(config)]:
        file = result_file(config, out, arm, None)
        if arm.method == MethodConfig() and not arm.trained_with and file.exists():
            scores = np.array(json.loads(file.read_text())["scores"], dtype=float)
            kinds = np.array([one.kind for one in Questions(out / "prepared" / arm.split).entries])
            found[arm.name] = {
                "accuracy": float(scores.mean()),
                "by_kind": {str(k): float(scores[kinds == k].mean()) for k in np.unique(kinds)},
            }
    (out / "controls.json").write_text(json.dumps(found, indent=1))


def _measured(config: EvidenceConfig, out: Path) -> dict[str, Any]:
    """Times and costs of every method of every budget, on the base, by this process alone."""
    set_up()
    base = out / "base"
    model, processor = load_model(base, None), processor_of(config, base)
    questions = Questions(out / "prepared" / "test")
    chosen = questions.load(questions.first(config.evaluate.prefill_batch))
    inputs = to_device(build_inputs(chosen, processor), model)
    methods: dict[str, MethodConfig] = {
        arm.method.runs_with: arm.method
        for budget in config.budgets
        for arm in arms(config, budget)
    }
    measured = measure_and_count(
        model,
        inputs,
        [build_method(method, model) for method in methods.values()],
        rounds=config.evaluate.prefill_rounds,
        decode_rounds=config.evaluate.decode_rounds,
        decode_tokens=config.evaluate.decode_tokens,
    )
    return measured | {"methods": dict(zip(methods, measured["methods"], strict=True))}

"""What answers come to: results.json's table, with intervals and what is paired with the control.

Legend: Q questions, S seeds.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.evaluation.config import EvaluateConfig, Row, rows_of
from pipeline.evaluation.generation import QuestionEntry, Questions
from pipeline.evaluation.intervals import Bootstrap, interval, over_seeds
from pipeline.evaluation.scoring import FIGURES, Mean

_SHAPE = ("num_vision_tokens", "num_layers", "text_tokens", "device", "dtype")


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


def results(
    evaluated: EvaluateConfig,
    questions: Sequence[QuestionEntry],
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
        "num_questions": len(questions),
        "num_pictures": len(set(scenes)),
        "prefill_batch": measured["batch"],
        "decode_tokens": evaluated.decode_tokens,
        **{name: measured[name] for name in _SHAPE},
        "arms": _table(evaluated, questions, scenes, scored, measured, splits),
        **more,
    }


def _table(
    config: EvaluateConfig,
    questions: Sequence[QuestionEntry],
    scenes: Sequence[str],
    scored: dict[str, Scored],
    measured: dict[str, Any],
    splits: Sequence[str],
) -> list[dict[str, Any]]:
    bootstrap = Bootstrap(scenes, config.seed)
    kinds = np.array([question.kind for question in questions])
    several = list(dict.fromkeys(splits)) if len(set(splits)) > 1 else []
    tasks = {task: np.array(splits) == task for task in several}
    rows = rows_of(config.arms)
    scores = {row.name: np.stack([scored[arm.name].scores for arm in row.arms]) for row in rows}
    control = next((row for row in rows if row.name == config.control), None)
    dense = measured["methods"].get("")
    table = []
    for row in rows:
        own, arm, count = scores[row.name], row.arms[0], len(questions) * len(row.arms)
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


def _mean(totals: Sequence[float | None], count: int) -> float | None:
    known = [total for total in totals if total is not None]
    return sum(known) / count if len(known) == len(totals) else None


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


def benchmark_figures(
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
            found[split] = _figures(split, questions.entries, rows, config.control, bootstrap)
    return found


def _figures(
    benchmark: str,
    questions: Sequence[QuestionEntry],
    rows: dict[str, list[np.ndarray]],
    control: str,
    bootstrap: Bootstrap,
) -> dict[str, dict[str, Any]]:
    """By figure and row; the scores of a row are a list of (Q,), one a seed."""

    def figures(scores: Sequence[np.ndarray], mean: Mean) -> dict[str, Any]:
        each = [FIGURES[benchmark](questions, one, mean) for one in scores]
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


def summary_of(arm: dict[str, Any]) -> dict[str, Any]:
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

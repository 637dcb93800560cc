"""The report: a run's results in one self-contained HTML file and one picture.

Every sentence is computed from results.json, and says as readily that a plan lost, or that the
sample is too small to tell. It measures nothing, and judges only by the intervals that `evaluate`
wrote.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.durable.stage import Input, StageContext
from pipeline.evaluation.benchmarks import BENCHMARKS
from pipeline.kinds.report import ReportConfig
from pipeline.redact import flatten
from pipeline.reporting import figures, pages
from pipeline.reporting.pages import embedded
from pipeline.reporting.results import Arm, Interval, Results, Sample
from pipeline.reporting.timeline import Bar, bars, draw, records_behind
from pipeline.tracking.address import page_address

ACROSS = 6
"""Tasks, or kinds of questions, in one table side by side."""


def report(ctx: StageContext, config: ReportConfig) -> dict[str, Any]:
    """Write report.html and report.png from the evaluate stage's results.json; input `search`,
    where there is one, is shown as well.

    Raises:
        ResultsError: results.json is missing or has another shape.
    """
    folder = ctx.inputs["evaluate"].folder
    results = Results.read(folder / "results.json")
    sentence = finding(results)
    ctx.progress(0, 2, "figures")
    (ctx.out / "report.png").write_bytes(figures.summary_png(results, tied(sentence)))
    ctx.progress(1, 2, "page")
    search = ctx.inputs.get("search")
    stages = bars(records_behind(ctx.inputs["evaluate"].record))
    run = page_address(ctx.run.tracking_uri or "", ctx.run.run_page)
    page = render(results, folder, config, search, stages, run)
    (ctx.out / "report.html").write_text(page)
    for name in ("report.html", "report.png"):
        ctx.track.artifact(ctx.out / name)
    ctx.track.note(sentence)
    ctx.progress(2, 2, "done")
    return {"finding": sentence, "html": "report.html", "png": "report.png"}


def _across(names: list[str]) -> list[list[str]]:
    return [names[i : i + ACROSS] for i in range(0, len(names), ACROSS)]


def render(
    results: Results,
    folder: Path,
    config: ReportConfig,
    search: Input | None = None,
    stages: Sequence[Bar] = (),
    run: str = "",
) -> str:
    """The page.

    Args:
        stages: when the stages ran that the results come from.
        run: address of the workflow's run in MLflow, if a server shows it.
    """
    kinds = list(results.majority.by_kind)
    tasks = list(results.arms[0].by_split) if results.arms else []
    rows = len(kinds) * max(2, len(results.arms)) * 0.13
    tall = max(2.9, 1.1 + 0.36 * len(results.arms))
    return pages.render(
        "report",
        {"percent": percent, "points": points, "less": less},
        r=results,
        finding=tied(finding(results)),
        remarks=[tied(remark) for remark in remarks(results)],
        flops=figures.flops_unit(max((arm.flops for arm in results.arms), default=1)),
        memory=figures.bytes_unit(max((arm.kv_cache_bytes for arm in results.arms), default=1)),
        peak=figures.bytes_unit(max((a.peak_memory_bytes or 0 for a in results.arms), default=1)),
        colours=[figures.style_of(index)[0] for index in range(len(results.arms))],
        numbered=figures.numbered(results),
        titles={name: benchmark.title for name, benchmark in BENCHMARKS.items()},
        tables=[
            ("By task", "by_split", _across(tasks)),
            ("By kind of question", "by_kind", _across(kinds)),
        ],
        figures=[
            (
                figures.svg(figures.accuracy, results, tall),
                "Accuracy of each arm with its interval",
            ),
            (
                figures.svg(figures.by_kind, results, 1.2 + rows),
                "Accuracy of each arm by kind of question, with the majority baseline",
            ),
            (figures.svg(figures.against_flops, results), "Accuracy against FLOPs"),
            (figures.svg(figures.against_kv, results), "Accuracy against KV cache size"),
            (figures.svg(figures.against_prefill, results), "Accuracy against prefill time"),
            (
                figures.svg(figures.tokens_per_layer, results, figures.tokens_height(results)),
                "Vision tokens entering each layer",
            ),
            *(
                [(figures.svg(figures.losses, results), "Training loss by step")]
                if results.curves
                else []
            ),
            *(
                [
                    (
                        figures.svg(lambda axes, _: draw(axes, stages), results, _tall(stages)),
                        "Stages as bars over time",
                    )
                ]
                if stages
                else []
            ),
        ],
        run=run,
        per_batch=figures.per_batch(results),
        search=search
        and {
            "finding": tied(search.outputs["finding"]),
            "page": f"{search.uri}/search.html",
            "picture": embedded((search.folder / "search.png").read_bytes()),
        },
        samples=samples(results, folder, config),
        config=flatten(results.config),
    )


def _tall(stages: Sequence[Bar]) -> float:
    """Inches of the timeline."""
    return max(2.9, 0.8 + 0.2 * len(stages))


def finding(results: Results) -> str:
    """The result of the run in one sentence, decided by the intervals."""
    arm, control = results.compressed, results.control
    if arm is None:
        return "No arm of this run drops vision tokens, so it says nothing about compression."
    saved = (
        f"With {percent(arm.reduction)} fewer vision tokens (layer average "
        f"{arm.average_vision_tokens:.1f} of {results.num_vision_tokens}), "
        f"{less(arm.flops_reduction, 'fewer')} FLOPs and {less(arm.kv_reduction)} KV cache, the "
        f"{'trained' if arm.trained else 'untrained'} {arm.plan if arm.peer else 'plan'} answers "
        f"{percent(arm.accuracy.mean)} of the questions right"
    )
    if control is None or control is arm:
        return f"{saved}; there is no dense control to compare it with."
    other = f"control {control.label}" if control.plan else "dense control"
    verdict = _verdict(arm, control, results.num_questions)
    return f"{saved}, the {other} {percent(control.accuracy.mean)}: {verdict}."


def remarks(results: Results) -> list[str]:
    """Answers to a careful reader's next questions, from the data."""
    sentences = []
    arm, control = results.compressed, results.control
    untrained = next(
        (a for a in results.arms if arm and a.plan == arm.plan and not a.trained), None
    )
    if arm and arm.trained and untrained:
        gain = 100 * (arm.accuracy.mean - untrained.accuracy.mean)
        clear = "the intervals overlap" if _overlap(arm, untrained) else "the intervals are apart"
        word = "more" if gain >= 0 else "fewer"
        method = arm.plan if arm.peer else "its plan"
        same = arm.plan if arm.peer else "the same plan"
        sentences.append(
            f"Trained with {method}, the model answers {abs(gain):.1f} points {word} than the "
            f"untrained base under {same}; {clear}."
        )
    if arm and control and control is not arm:
        fast = control.prefill_ms.median / arm.prefill_ms.median
        apart = (
            arm.prefill_ms.high < control.prefill_ms.low
            or arm.prefill_ms.low > control.prefill_ms.high
        )
        spread = "" if apart else ", but the quartiles overlap"
        sentences.append(f"Measured prefill is {fast:.2f} times as fast as the control's{spread}.")
    for name, places in results.series.items():
        sentences.append(_budgets(name, [results.arms[place] for place in reversed(places)]))
    best = max(results.arms, key=lambda a: a.accuracy.mean, default=None)
    if best and best.accuracy.low <= results.majority.accuracy:
        sentences.append(
            "No arm is clearly above always giving the most frequent answer: these models may "
            "not use the picture."
        )
    trained = [arm for arm in results.arms if arm.trained]
    several = [arm for arm in trained if len(arm.seeds) > 1]
    if several:
        fewest = min(len(arm.seeds) for arm in several)
        sentences.append(
            f"{len(several)} of {len(trained)} trained arms pool {fewest} seeds or more; their "
            "intervals hold the differences between training runs, as far as so few can show them."
        )
    if len(several) < len(trained):
        sentences.append(
            f"One seed ({results.seed}){' for the others' if several else ''}: differences between "
            "training runs are not in the intervals."
        )
    return sentences


def _budgets(name: str, arms: list[Arm]) -> str:
    """One checkpoint at each of its budgets, the most expensive first."""
    each = [
        f"{arm.budget or arm.label} ({arm.average_vision_tokens:.1f} vision tokens) answers "
        f"{percent(arm.accuracy.mean)}"
        + ("" if arm.retention is None else f", {percent(arm.retention)} of the control's")
        for arm in arms
    ]
    return f"One checkpoint, {len(arms)} budgets ({name}): {'; '.join(each)}."


def _verdict(arm: Arm, control: Arm, questions: int) -> str:
    if arm.difference is None:
        side = "overlap" if _overlap(arm, control) else "do not overlap"
        return f"their intervals {side}, and no paired comparison was made"
    gap = points(arm.difference)
    if arm.difference.high < 0:
        return f"a loss, {gap} points"
    if arm.difference.low > 0:
        return f"a gain, {gap} points"
    return f"{gap} points, which is not significant with {questions:,} questions"


def _overlap(one: Arm, other: Arm) -> bool:
    return one.accuracy.low <= other.accuracy.high and other.accuracy.low <= one.accuracy.high


def percent(share: float) -> str:
    """0.931 as 93.1 %."""
    return f"{100 * share:.1f} %"


def less(reduction: float, word: str = "less") -> str:
    """A reduction in words: 53.7 % less; where it is negative, more."""
    return f"{percent(abs(reduction))} {word if reduction >= 0 else 'more'}"


def tied(text: str) -> str:
    """Text that no line break parts from its per cent sign, or inside an interval."""
    return re.sub(r" (?=%)|(?<=,) (?=[^\[\]]*\])", "\u00a0", text)


def points(interval: Interval) -> str:
    """A signed difference in points with its interval: −1.9 [−3.0, −0.8]."""
    mean, low, high = (
        f"{100 * value:+.1f}".replace("-", "−")
        for value in (interval.mean, interval.low, interval.high)
    )
    return f"{mean} [{low}, {high}]"


def samples(
    results: Results, folder: Path, config: ReportConfig
) -> list[tuple[str | None, list[Sample]]]:
    """Pictures, each with its first questions."""
    by_picture = groupby(results.samples, key=lambda sample: sample.picture)
    groups = [(picture, list(questions)[: config.questions]) for picture, questions in by_picture]
    return [
        (thumbnail(folder, picture, config.thumbnail), questions)
        for picture, questions in groups[: config.pictures]
    ]


def thumbnail(folder: Path, picture: str, side: int) -> str | None:
    """A picture as a data address, or None where there is no readable picture in the folder."""
    from PIL import Image

    path = (folder / picture).resolve()
    if not path.is_relative_to(folder.resolve()):
        return None
    try:
        with Image.open(path) as opened:
            small = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return embedded(buffer.getvalue())

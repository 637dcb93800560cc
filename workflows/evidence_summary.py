"""What the evidence says, over all budgets: a table, the comparisons that were announced, a figure.

Everything is computed from the results.json of each budget; comparisons are paired by seed, since
arms of one seed saw the same batches. What they mean is said in docs/evidence.md.
"""

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.config import Config
from pipeline.evaluation.intervals import over_seeds
from pipeline.stage import StageContext
from pipeline.stages.figures import STYLE
from pipeline.stages.results import Arm, Interval, Results

SUMMARY_VERSION = 1
"""To be raised whenever the stage computes something else; see `Stage.version`."""
COMPARISONS = (
    ("adsc", "adsc-untrained"),
    ("adsc_reverse", "adsc"),
    ("adsc_forward", "adsc"),
    ("adsc_first", "adsc"),
    ("adsc_center", "adsc"),
    ("adsc_grid", "adsc"),
    ("adsc_reindex", "adsc"),
    ("adsc", "fastv"),
    ("adsc", "pyramiddrop"),
    ("adsc", "visionzip"),
    ("adsc_first-untrained", "adsc-untrained"),
)
"""Pairs of arms, by their names without the budget: the first minus the second."""
TRAINED, PEER, UNTRAINED = "#D55E00", "#0072B2", "#888888"


class Comparison(NamedTuple):
    """Difference of two arms' accuracies."""

    one: str
    other: str
    budget: str
    """Empty: the mean over all budgets."""
    difference: Interval


def summarise(ctx: StageContext, config: Config) -> dict[str, Any]:
    """Stage body; the inputs are the evaluations, by budget."""
    write_summary({name: i.folder / "results.json" for name, i in ctx.inputs.items()}, ctx.out)
    for name in ("evidence.md", "evidence.png"):
        ctx.track.artifact(ctx.out / name)
    return {}


def write_summary(files: Mapping[str, Path], out: Path) -> None:
    """evidence.md, evidence.json and evidence.png below `out`, from results.json by budget."""
    results = {name: Results.read(file) for name, file in files.items()}
    compared = list(comparisons(results))
    (out / "evidence.md").write_text(tables(results, compared))
    rows = [row._asdict() | {"difference": row.difference.model_dump()} for row in compared]
    (out / "evidence.json").write_text(json.dumps(rows, indent=1))
    (out / "evidence.png").write_bytes(figure(results))


def comparisons(results: Mapping[str, Results]) -> Iterator[Comparison]:
    """Those of COMPARISONS whose arms are there; intervals are Student's over seeds."""
    for one, other in COMPARISONS:
        by_budget: dict[str, list[float]] = {}
        for budget, found in results.items():
            arms = {arm.name: arm for arm in found.arms}
            pair = arms.get(f"{one}-{budget}"), arms.get(f"{other}-{budget}")
            if pair[0] is not None and pair[1] is not None:
                by_budget[budget] = differences(pair[0], pair[1])
        for budget, values in by_budget.items():
            yield Comparison(one, other, budget, _interval(values))
        if len(by_budget) > 1:
            means = [sum(seed) / len(seed) for seed in zip(*by_budget.values(), strict=True)]
            yield Comparison(one, other, "", _interval(means))


def differences(one: Arm, other: Arm) -> list[float]:
    """Accuracy of one minus the other's, seed by seed; an untrained arm is the same for all."""
    firsts, seconds = _by_seed(one), _by_seed(other)
    seeds = sorted(firsts.keys() | seconds.keys()) or [0]
    return [
        firsts.get(seed, one.accuracy.mean) - seconds.get(seed, other.accuracy.mean)
        for seed in seeds
    ]


def _by_seed(arm: Arm) -> dict[int, float]:
    return {seed.seed: seed.accuracy for seed in arm.seeds}


def _interval(values: list[float]) -> Interval:
    mean = sum(values) / len(values)
    return Interval.model_validate(over_seeds(values) or {"mean": mean, "low": mean, "high": mean})


def tables(results: Mapping[str, Results], compared: list[Comparison]) -> str:
    """Markdown: accuracies by arm and budget, then the comparisons."""
    rows: dict[str, dict[str, Arm]] = {}
    for budget, found in results.items():
        for arm in found.arms:
            rows.setdefault(arm.name.removesuffix(f"-{budget}"), {})[budget] = arm
    head = "| arm | " + " | ".join(f"{name} (tokens)" for name in results) + " |"
    lines = [head, "|---" * (len(results) + 1) + "|"]
    for by_budget in rows.values():
        label = next(iter(by_budget.values())).label
        cells = [_cell(by_budget.get(budget)) for budget in results]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += ["", "| comparison | " + " | ".join(results) + " | all |"]
    lines.append("|---" * (len(results) + 2) + "|")
    for one, other in COMPARISONS:
        own = {c.budget: c.difference for c in compared if (c.one, c.other) == (one, other)}
        if own:
            cells = [_points(own.get(budget)) for budget in (*results, "")]
            lines.append(f"| {one} − {other} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(arm: Arm | None) -> str:
    if arm is None:
        return "out of reach"
    interval = arm.over_seeds or arm.accuracy
    share = f"{100 * interval.mean:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    return f"{share} ({arm.average_vision_tokens:.1f})"


def _points(interval: Interval | None) -> str:
    if interval is None:
        return ""
    numbers = (f"{100 * x:+.1f}" for x in (interval.mean, interval.low, interval.high))
    mean, low, high = (number.replace("-", "−") for number in numbers)
    return f"{mean} [{low}, {high}]"


def figure(results: Mapping[str, Results]) -> bytes:
    """A panel a budget, a row an arm: the mean with its interval, and each seed."""
    names: dict[str, str] = {}
    for budget, found in results.items():
        for arm in found.arms:
            names.setdefault(arm.name.removesuffix(f"-{budget}"), arm.label)
    with rc_context(STYLE):
        size = (3.4 * len(results) + 2.2, 1.0 + 0.24 * len(names))
        sheet = Figure(figsize=size, layout="constrained", dpi=130)
        FigureCanvasAgg(sheet)
        panels = sheet.subplots(1, len(results), sharey=True, squeeze=False)[0]
        for axes, (budget, found) in zip(panels, results.items(), strict=True):
            _panel(axes, budget, found, list(names))
        panels[0].set_yticks(range(len(names)), list(names.values()))
        panels[0].set_ylim(len(names) - 0.4, -0.6)
        buffer = io.BytesIO()
        sheet.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _panel(axes: Axes, budget: str, found: Results, names: list[str]) -> None:
    fewer = next((a.reduction for a in found.arms if a.name.endswith(f"-{budget}")), 0.0)
    axes.set_title(f"{100 * fewer:.0f} % fewer vision tokens")
    for arm in found.arms:
        row = names.index(arm.name.removesuffix(f"-{budget}"))
        colour = (PEER if arm.peer else TRAINED) if arm.trained else UNTRAINED
        interval = arm.over_seeds or arm.accuracy
        axes.plot([100 * interval.low, 100 * interval.high], [row, row], color=colour, lw=1.8)
        axes.plot(100 * interval.mean, row, "o", color=colour, ms=5)
        seeds = [100 * seed.accuracy for seed in arm.seeds]
        axes.plot(seeds, [row] * len(seeds), "|", color=colour, ms=8)
    axes.axvline(100 * found.majority.accuracy, color="#6b7280", lw=1, ls="--")
    axes.set_xlabel("right answers, %; dashed: majority")

"""The evidence over all budgets: a table, the comparisons that were announced, a figure.

Everything is computed from results.json and samples.parquet of each budget. Comparisons are paired
by seed, since arms of one seed saw the same batches. docs/evidence-details.md explains them.
"""

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.config import Config
from pipeline.durable.stage import Kind, StageContext
from pipeline.evaluation.intervals import Bootstrap, over_seeds
from pipeline.reporting.figure_style import STYLE
from pipeline.reporting.results import Arm, Interval, Results

REINDEXED = ("random", "pool", "pyramiddrop", "sparsevlm", "visionzip", "divprune")
"""Peers that renumber positions as published: each runs with kept ones as well (`NAME_keep`), so
that its choice of tokens can be distinguished from that."""
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
    ("adsc", "pyramiddrop_keep"),
    ("adsc", "visionzip_keep"),
    ("adsc_first-untrained", "adsc-untrained"),
    *((f"{name}_keep-untrained", f"{name}-untrained") for name in REINDEXED),
    # Not announced: evaluated after `last` had turned out the worst anchor.
    ("adsc_first", "fastv"),
    ("adsc_first", "pyramiddrop_keep"),
)
"""Pairs of arms, by their names without the budget: the first minus the second."""
TRAINED, PEER, UNTRAINED = "#D55E00", "#0072B2", "#888888"


class Comparison(NamedTuple):
    """Difference of two arms' accuracies."""

    one: str
    other: str
    budget: str
    seeds: int
    """Seeds that were paired; 0 where neither was trained."""
    difference: Interval
    """Student's interval over several seeds; of one seed, the bootstrap's over pictures."""


def summarise(ctx: StageContext, config: Config) -> dict[str, Any]:
    """Stage body; the inputs are the evaluations, by budget."""
    write_summary({name: given.folder for name, given in ctx.inputs.items()}, ctx.out)
    for name in ("evidence.md", "evidence.png"):
        ctx.track.artifact(ctx.out / name)
    return {}


SUMMARISE = Kind(
    id="workflows.evidence_summary.summarise", version=2, body=summarise, config=Config
)


def write_summary(folders: Mapping[str, Path], out: Path) -> None:
    """evidence.md, evidence.json and evidence.png below `out`, from the evaluations by budget."""
    results = {name: Results.read(folder / "results.json") for name, folder in folders.items()}
    compared: list[Comparison] = []
    for budget, folder in folders.items():
        compared += comparisons(budget, results[budget], folder / "samples.parquet")
    (out / "evidence.md").write_text(tables(results, compared))
    rows = [row._asdict() | {"difference": row.difference.model_dump()} for row in compared]
    (out / "evidence.json").write_text(json.dumps(rows, indent=1))
    (out / "evidence.png").write_bytes(figure(results))


def comparisons(budget: str, found: Results, samples: Path) -> Iterator[Comparison]:
    """Those of COMPARISONS whose arms are there, on the seeds that both have; an untrained arm has
    the same score for every seed."""
    table = pq.read_table(samples, columns=["arm", "number", "record", "score"])
    arms = {arm.name.removesuffix(f"-{budget}"): arm for arm in found.arms}
    for one, other in COMPARISONS:
        if one not in arms or other not in arms:
            continue
        pair = arms[one], arms[other]
        trained = [{seed.seed for seed in arm.seeds} for arm in pair if arm.seeds]
        seeds = sorted(set.intersection(*trained)) if trained else []
        if trained and not seeds:
            continue
        scores = [
            np.stack([_scores(table, arm, seed) for seed in (seeds if arm.seeds else [None])])
            for arm in pair
        ]
        values = (scores[0].mean(axis=1) - scores[1].mean(axis=1)).tolist()
        interval = over_seeds(values)
        if interval is None:
            records = _of(table, _first_arm(pair[0]))["record"].to_pylist()
            interval = Bootstrap(records, seed=0).difference(*scores)
        yield Comparison(one, other, budget, len(seeds), Interval.model_validate(interval))


def _scores(table: pa.Table, arm: Arm, seed: int | None) -> np.ndarray:
    name = arm.name if seed is None else f"{arm.name}-s{seed}"
    return _of(table, name)["score"].to_numpy()  # type: ignore[no-any-return]


def _of(table: pa.Table, name: str) -> pa.Table:
    return table.filter(pc.equal(table["arm"], name)).sort_by("number")


def _first_arm(arm: Arm) -> str:
    return f"{arm.name}-s{arm.seeds[0].seed}" if arm.seeds else arm.name


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
    lines += ["", "| comparison | " + " | ".join(results) + " |"]
    lines.append("|---" * (len(results) + 1) + "|")
    for one, other in COMPARISONS:
        own = {c.budget: c.difference for c in compared if (c.one, c.other) == (one, other)}
        if own:
            cells = [_points(own.get(budget)) for budget in results]
            lines.append(f"| {one} − {other} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(arm: Arm | None) -> str:
    """Its accuracy; empty where the arm can't reach the budget or was not run."""
    if arm is None:
        return ""
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

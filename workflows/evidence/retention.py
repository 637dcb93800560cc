"""The ladder's result: accuracy of each arm, and what it keeps of the dense control of as many
steps, by budget; the comparisons that were announced; a figure.

Every number comes from the arms' files. A share that is kept is a ratio paired by seed and picture,
its interval the bootstrap's over both; a comparison is paired by seed, its interval Student's over
seeds, or of one seed the bootstrap's over pictures. docs/evidence-ladder.md explains them.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.evaluation.intervals import Bootstrap, over_seeds
from pipeline.reporting.figure_style import STYLE

COMPARISONS = (
    ("drop_once", "drop"),
    ("runs", "drop_once"),
    ("tiles", "runs"),
    ("tiles", "tiles_first"),
    ("tiles", "tiles_center"),
    ("tiles_distill", "tiles"),
    ("tiles_distill_450", "tiles_450"),
    ("tiles_exit", "tiles"),
    ("tiles_exit_distill_450", "tiles_distill_450"),
    ("tiles_early", "tiles"),
    ("elastic", "tiles_450"),
    ("elastic_exit_distill", "tiles_exit_distill_450"),
    ("tiles", "divprune_keep"),
    ("tiles_exit_distill_450", "divprune_keep_distill_450"),
    ("tiles_exit_distill_450", "pyramiddrop_keep_distill_450"),
    ("tiles_exit_distill_450", "fastv_distill_450"),
    ("tiles_exit_distill_450", "visionzip_keep_distill_450"),
    ("tiles_exit_distill_450", "pool_keep_distill_450"),
    ("tiles_exit_distill_450", "tome_keep_distill_450"),
    ("tiles_exit_distill_450", "downsample_keep_distill_450"),
    ("tiles_exit_distill_450", "llavolta"),
    ("tiles_exit_distill_450", "epic"),
    ("divprune_keep_distill_450", "divprune_keep"),
)
"""Pairs of arms, the first minus the second: the hypotheses of docs/evidence-ladder.md."""
OURS, PEER, OTHER = "#D55E00", "#0072B2", "#888888"


class Answered(NamedTuple):
    """An arm at a budget, and the scores of every training of it."""

    name: str
    """Without the budget."""
    label: str
    budget: str
    runs_with: str
    tokens: float
    """Layer average of vision tokens."""
    control: str
    """Name of the dense arm of as many steps."""
    seconds: float
    """Of one training."""
    scores: dict[int | None, Sequence[float]]
    """By seed; of an untrained arm by None."""


class Row(NamedTuple):
    """A table's row of an arm."""

    arm: Answered
    right: dict[str, float]
    kept: dict[str, float] | None
    """Share of the control, on the seeds that both have."""
    kinds: dict[str, float]


def write_retention(
    found: Sequence[Answered],
    kinds: Sequence[str],
    records: Sequence[str],
    out: Path,
    split: str,
    budgets: Mapping[str, str],
) -> None:
    """ladder-SPLIT.md, .json and .png below `out`.

    Args:
        kinds: of each question.
        records: what each is about.
        budgets: labels by name.
    """
    if not found:
        return
    draws = Bootstrap(records, seed=0)
    rows = [_row(arm, found, draws, np.array(kinds)) for arm in found]
    compared = [
        {"one": one, "other": other, "budget": budget, **difference}
        for budget in budgets
        for one, other in COMPARISONS
        if (difference := compare(found, one, other, budget, draws)) is not None
    ]
    (out / f"ladder-{split}.md").write_text(tables(rows, compared, budgets, split, len(kinds)))
    about = [
        row.arm._asdict() | {"scores": None, "seeds": [*row.arm.scores], "right": row.right}
        | {"kept": row.kept, "kinds": row.kinds}
        for row in rows
    ]  # fmt: skip
    (out / f"ladder-{split}.json").write_text(
        json.dumps({"split": split, "arms": about, "comparisons": compared}, indent=1)
    )
    (out / f"ladder-{split}.png").write_bytes(figure(rows, budgets))


def _row(arm: Answered, found: Sequence[Answered], draws: Bootstrap, kinds: np.ndarray) -> Row:
    scores = np.array([arm.scores[seed] for seed in arm.scores], dtype=float)
    right = over_seeds(scores.mean(axis=1).tolist()) or draws.mean(scores)
    return Row(
        arm,
        right,
        _kept(arm, found, draws),
        {str(kind): float(scores[:, kinds == kind].mean()) for kind in np.unique(kinds)},
    )


def _kept(arm: Answered, found: Sequence[Answered], draws: Bootstrap) -> dict[str, float] | None:
    control = next((one for one in found if one.name == arm.control), None)
    if control is None or control.name == arm.name:
        return None
    pair = _paired(arm, control)
    return None if pair is None else draws.ratio(*pair)


def _paired(one: Answered, other: Answered) -> tuple[np.ndarray, np.ndarray] | None:
    """(S, Q) scores of both on the seeds that both have; an untrained arm has the same for all."""
    seeds = [seed for seed in one.scores if seed in other.scores or None in other.scores]
    if None in one.scores:
        seeds = [*other.scores]
    if not seeds:
        return None
    own, others = (
        np.array([arm.scores.get(seed, arm.scores.get(None)) for seed in seeds], dtype=float)
        for arm in (one, other)
    )
    return own, others


def compare(
    found: Sequence[Answered], one: str, other: str, budget: str, draws: Bootstrap
) -> dict[str, Any] | None:
    """mean, low, high and seeds of a difference; None where an arm was not run."""
    arms = {arm.name: arm for arm in found if arm.budget == budget}
    if one not in arms or other not in arms:
        return None
    pair = _paired(arms[one], arms[other])
    if pair is None:
        return None
    values = (pair[0].mean(axis=1) - pair[1].mean(axis=1)).tolist()
    return {**(over_seeds(values) or draws.difference(*pair)), "seeds": len(values)}


def tables(
    rows: Sequence[Row],
    compared: Sequence[Mapping[str, Any]],
    budgets: Mapping[str, str],
    split: str,
    questions: int,
) -> str:
    """Markdown: a table a budget, then the comparisons."""
    lines = [f"{questions} questions of the split `{split}`.", ""]
    for budget, label in budgets.items():
        own = [row for row in rows if row.arm.budget == budget]
        if not own:
            continue
        kinds = list(own[0].kinds)
        lines += [f"### {label}", ""]
        lines.append(
            f"| arm | runs with | tokens | seeds | right, % | kept, % | {' | '.join(kinds)} | s |"
        )
        lines.append("|---" * (7 + len(kinds)) + "|")
        for row in own:
            each = " | ".join(f"{100 * row.kinds[kind]:.1f}" for kind in kinds)
            lines.append(
                f"| {row.arm.label} | `{row.arm.runs_with or 'dense'}` | {row.arm.tokens:.1f} "
                f"| {len(row.arm.scores)} | {_per_cent(row.right)} | {_per_cent(row.kept)} "
                f"| {each} | {row.arm.seconds:.0f} |"
            )
        lines.append("")
    names = list(dict.fromkeys((row["one"], row["other"]) for row in compared))
    if names:
        lines += [f"| difference, points | {' | '.join(budgets.values())} |"]
        lines += ["|---" * (1 + len(budgets)) + "|"]
    for pair in names:
        cells = {row["budget"]: row for row in compared if (row["one"], row["other"]) == pair}
        each = " | ".join(_points(cells.get(budget)) for budget in budgets)
        lines.append(f"| {pair[0]} − {pair[1]} | {each} |")
    return "\n".join(lines) + "\n"


def _per_cent(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return ""
    return "{:.1f} [{:.1f}, {:.1f}]".format(*_hundredfold(interval))


def _points(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    mean, low, high = (f"{x:+.1f}".replace("-", "−") for x in _hundredfold(row))
    return f"{mean} [{low}, {high}] ({row['seeds']})"


def _hundredfold(interval: Mapping[str, float]) -> Iterator[float]:
    return (100 * interval[name] for name in ("mean", "low", "high"))


def figure(rows: Sequence[Row], budgets: Mapping[str, str]) -> bytes:
    """A panel a budget: what each arm keeps of its control, against its vision tokens."""
    with rc_context(STYLE):
        sheet = Figure(figsize=(4.2 * len(budgets), 4.6), layout="constrained", dpi=130)
        FigureCanvasAgg(sheet)
        panels = sheet.subplots(1, len(budgets), squeeze=False)[0]
        for axes, (budget, label) in zip(panels, budgets.items(), strict=True):
            own = [row for row in rows if row.arm.budget == budget and row.kept is not None]
            _panel(axes, label, [row for row in own if row.arm.runs_with])
        buffer = io.BytesIO()
        sheet.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _panel(axes: Axes, label: str, rows: Sequence[Row]) -> None:
    """The best at the top."""
    axes.set_title(f"{label} vision tokens")
    ordered = sorted(rows, key=lambda row: row.kept["mean"] if row.kept else 0.0)
    for place, row in enumerate(ordered):
        assert row.kept is not None
        mean, low, high = _hundredfold(row.kept)
        colour = PEER if row.arm.runs_with[:1].isalpha() else OURS
        colour = OTHER if row.arm.name in ("drop", "llavolta", "epic") else colour
        axes.plot([low, high], [place, place], color=colour, lw=1.8)
        axes.plot(mean, place, "o", color=colour, ms=4)
    axes.set_yticks(range(len(ordered)), [row.arm.label for row in ordered], fontsize=6.5)
    axes.set_xlabel("kept of the dense control, %")

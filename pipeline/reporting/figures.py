"""The report's figures, drawn with matplotlib onto axes that the caller owns.

Arms differ by colour and by marker, and are labelled where they stand. Every panel is about 4
inches wide, so that its text is legible on a phone. Nothing is computed here but where to put
things.
"""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.reporting.figure_style import COLOURS, MARKERS, MUTED, STYLE
from pipeline.reporting.results import Arm, Results

MANY = 8
"""With more arms than this, points carry the arm's number in the table instead of its label."""
PROFILES = 5
"""More different token profiles than this are drawn as rows of a heat map."""

Panel = Callable[[Axes, Results], None]


def svg(panel: Panel, results: Results, height: float = 2.9) -> str:
    """One panel as a data address, the same bytes for the same results."""
    with rc_context(STYLE):
        figure = Figure(figsize=(3.9, height), layout="constrained")
        panel(figure.subplots(), results)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def summary_png(results: Results, heading: str) -> bytes:
    """The panels that matter most on one sheet, with the finding above them."""
    last = losses if results.curves else against_kv
    panels: list[Panel] = [accuracy, against_flops, tokens_per_layer, last]
    tall = max(8.2, 3.6 + 0.36 * len(results.arms))
    with rc_context(STYLE):
        figure = Figure(figsize=(10.5, tall), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        figure.suptitle(_wrap(heading, 105), x=0.015, ha="left", fontsize=11.5, linespacing=1.4)
        for panel, axes in zip(panels, figure.subplots(2, 2).flat, strict=True):
            panel(axes, results)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def style_of(index: int) -> tuple[str, str]:
    """Colour and marker of an arm; both together differ for the first 49."""
    turn, place = divmod(index, len(COLOURS))
    return COLOURS[place], MARKERS[(place + turn) % len(MARKERS)]


def numbered(results: Results) -> bool:
    """Whether arms are numbered because there are too many for labels."""
    return len(results.arms) > MANY


def name_of(results: Results, index: int) -> str:
    label = results.arms[index].label
    return f"{index + 1}  {label}" if numbered(results) else label


def accuracy(axes: Axes, results: Results) -> None:
    """One row an arm: share of right answers with its interval, and the majority baseline."""
    axes.set_title("Accuracy, 95 % interval")
    for row, arm in enumerate(results.arms):
        colour, marker = style_of(row)
        _whisker(axes, arm, 100 * arm.accuracy.mean, row, colour, marker)
        axes.annotate(
            f"{100 * arm.accuracy.mean:.1f}",
            (100 * arm.accuracy.mean, row),
            (10, -3.5) if numbered(results) else (0, 7),
            textcoords="offset points",
            ha="left" if numbered(results) else "center",
            color=colour,
            weight="bold",
        )
    _majority(axes, 100 * results.majority.accuracy)
    width = 30 if numbered(results) else 16
    labels = [_wrap(name_of(results, row), width) for row in range(len(results.arms))]
    axes.set_yticks(range(len(results.arms)), labels)
    axes.set_ylim(len(results.arms) - 0.4, -0.6)
    axes.set_xlim(0, 104)
    axes.set_xlabel("right answers, %")
    axes.grid(visible=False, axis="y")


def by_kind(axes: Axes, results: Results) -> None:
    """One group of rows a kind of question; the majority baseline as a grey bar behind them."""
    kinds, count = list(results.majority.by_kind), len(results.arms)
    step = 0.72 / max(count, 1)
    for row, kind in enumerate(kinds):
        axes.barh(row, 100 * results.majority.by_kind[kind], 0.84, color="#e5e7eb", zorder=0)
        for index, arm in enumerate(results.arms):
            if kind in arm.by_kind:
                share, y = arm.by_kind[kind], row + (index - (count - 1) / 2) * step
                colour, marker = style_of(index)
                axes.plot([100 * share.low, 100 * share.high], [y, y], color=colour, lw=1.6)
                axes.plot(100 * share.mean, y, marker, color=colour, ms=5)
    axes.set_yticks(range(len(kinds)), [_wrap(kind, 16) for kind in kinds])
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_xlim(0, 102)
    axes.set_xlabel("right answers, %; grey: majority baseline")
    axes.grid(visible=False, axis="y")
    for index in range(count):
        colour, marker = style_of(index)
        label = str(index + 1) if numbered(results) else results.arms[index].label
        axes.plot([], [], marker, color=colour, ms=5, label=label)
    _legend(axes, "Accuracy by kind of question", columns=6 if numbered(results) else 2)


def against_flops(axes: Axes, results: Results) -> None:
    unit, divisor = flops_unit(max((arm.flops for arm in results.arms), default=1))
    _scatter(axes, results, [arm.flops / divisor for arm in results.arms])
    axes.set_title("Accuracy against compute")
    _against(axes, results, f"{unit} per question (exact convention)")


def against_kv(axes: Axes, results: Results) -> None:
    unit, divisor = bytes_unit(max((arm.kv_cache_bytes for arm in results.arms), default=1))
    _scatter(axes, results, [arm.kv_cache_bytes / divisor for arm in results.arms])
    axes.set_title("Accuracy against KV cache")
    _against(axes, results, f"KV cache after prefill, {unit}")


def against_prefill(axes: Axes, results: Results) -> None:
    times = [arm.prefill_ms for arm in results.arms]
    _scatter(axes, results, [time.median for time in times])
    for index, (arm, time) in enumerate(zip(results.arms, times, strict=True)):
        y = 100 * arm.accuracy.mean
        axes.plot([time.low, time.high], [y, y], color=style_of(index)[0], lw=1.6)
    axes.set_title("Accuracy against prefill time")
    _against(axes, results, f"ms{per_batch(results)}, median and quartiles")


def tokens_per_layer(axes: Axes, results: Results) -> None:
    """Steps: how many vision tokens enter each layer; arms with the same plan share a line."""
    plans = _profiles(results)
    if len(plans) > PROFILES:
        _heat_map(axes, results, plans)
        return
    for tokens, indices in plans.items():
        colour, arm = style_of(indices[-1])[0], results.arms[indices[-1]]
        edges = np.arange(len(tokens) + 1) - 0.5
        label = f"{_plan_name(arm)}: average {arm.average_vision_tokens:.1f}"
        axes.stairs(tokens, edges, color=colour, lw=2, label=_wrap(label, 52))
        axes.stairs(tokens, edges, color=colour, alpha=0.12, fill=True)
    _legend(axes, "Vision tokens entering each layer", columns=1)
    axes.set_ylim(0, 1.05 * results.num_vision_tokens)
    axes.set_xlim(-0.6, results.num_layers - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("decoder layer")
    axes.grid(visible=False, axis="x")


def tokens_height(results: Results) -> float:
    """Inches that the picture of tokens per layer needs."""
    count = len(_profiles(results))
    return max(2.9, 1.0 + 0.3 * count) if count > PROFILES else 2.9


def _profiles(results: Results) -> dict[tuple[int, ...], list[int]]:
    """Arms by their tokens per layer."""
    profiles: dict[tuple[int, ...], list[int]] = {}
    for index, arm in enumerate(results.arms):
        profiles.setdefault(tuple(arm.tokens_per_layer), []).append(index)
    return profiles


def _heat_map(axes: Axes, results: Results, plans: dict[tuple[int, ...], list[int]]) -> None:
    """A row a profile, a column a layer; darker is more tokens."""
    grid = np.array(list(plans), float)
    axes.imshow(grid, cmap="Blues", aspect="auto", vmin=0, vmax=1.15 * results.num_vision_tokens)
    if grid.shape[1] <= 12:
        for (row, layer), tokens in np.ndenumerate(grid):
            dark = tokens > 0.65 * results.num_vision_tokens
            colour = "white" if dark else "#1c1f26"
            axes.text(
                layer, row, f"{tokens:.0f}", ha="center", va="center", color=colour, fontsize=7.5
            )
    labels = []
    for indices in plans.values():
        arm, numbers = results.arms[indices[0]], ", ".join(str(i + 1) for i in indices)
        who = numbers if numbered(results) else _plan_name(arm)
        labels.append(f"{who} ({arm.average_vision_tokens:.1f})")
    axes.set_yticks(range(len(labels)), [_wrap(label, 24) for label in labels], fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("decoder layer; in brackets the layer average")
    axes.set_title("Vision tokens entering each layer")
    axes.grid(visible=False)


def _plan_name(arm: Arm) -> str:
    return arm.plan or "dense"


def losses(axes: Axes, results: Results) -> None:
    """Training loss by step, a running mean over the raw values in a lighter tone; of a distilled
    training with its divergence from the teacher."""
    axes.set_title("Training loss (distilled: with the divergence)")
    curves = {name: np.array(points) for name, points in results.curves.items() if points}
    ends = []
    for index, (name, points) in enumerate(curves.items()):
        colour = COLOURS[(index + 1) % len(COLOURS)]
        steps, values = points[:, 0], points[:, 1]
        window = max(1, len(values) // 25)
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        if window > 1:
            axes.plot(steps, values, color=colour, lw=0.7, alpha=0.3)
        axes.plot(steps[window - 1 :], smooth, color=colour, lw=1.8)
        ends.append((steps[-1], smooth[-1], name, colour))
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    if not ends:
        axes.set_axis_off()
        axes.text(0, 0.9, "no losses recorded", transform=axes.transAxes, color=MUTED)
        return
    top = axes.get_ylim()[1]
    names = [_wrap(name, 18) for *_, name, _ in ends]
    gap = 0.062 * top * (1 + max(name.count("\n") for name in names))
    for end, name, y in zip(ends, names, _apart([end[1] for end in ends], gap), strict=True):
        place = axes.get_yaxis_transform()
        axes.text(1.02, y, name, transform=place, va="center", color=end[3], fontsize=8)


def per_batch(results: Results) -> str:
    return f" per batch of {results.prefill_batch}" if results.prefill_batch else ""


def flops_unit(largest: float) -> tuple[str, float]:
    units = (("TFLOP", 1e12), ("GFLOP", 1e9))
    return next(((u, d) for u, d in units if largest >= d), ("MFLOP", 1e6))


def bytes_unit(largest: float) -> tuple[str, float]:
    units = (("GiB", 2.0**30), ("MiB", 2.0**20))
    return next(((u, d) for u, d in units if largest >= d), ("KiB", 2.0**10))


def _scatter(axes: Axes, results: Results, costs: Sequence[float]) -> None:
    """Accuracy over a cost from 0, each point labelled on the side where there is room."""
    shares = [100 * arm.accuracy.mean for arm in results.arms]
    low = min([100 * arm.accuracy.low for arm in results.arms], default=0)
    high = max([100 * arm.accuracy.high for arm in results.arms], default=100)
    margin = max(2.0, 0.18 * (high - low))
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0, 1.12 * max(costs, default=1))
    axes.set_ylabel("right answers, %")
    _curves(axes, results, costs, shares)
    for index, (arm, x, y) in enumerate(zip(results.arms, costs, shares, strict=True)):
        colour, marker = style_of(index)
        axes.plot([x, x], [100 * arm.accuracy.low, 100 * arm.accuracy.high], color=colour, lw=1.6)
        axes.plot(x, y, marker, color=colour, ms=5)
    if numbered(results):
        for i, (x, y) in enumerate(zip(costs, shares, strict=True)):
            axes.annotate(
                str(i + 1),
                (x, y),
                (5 if i % 2 else -5, 0),
                textcoords="offset points",
                ha="left" if i % 2 else "right",
                va="center",
                color=style_of(i)[0],
                fontsize=7.5,
            )
        return
    for right in (True, False):
        here = [i for i, x in enumerate(costs) if (x < 0.6 * max(costs)) == right]
        heights = _apart([shares[i] for i in here], 0.085 * (high - low + 2 * margin))
        for i, y in zip(here, heights, strict=True):
            axes.annotate(
                _wrap(results.arms[i].label, 24),
                (costs[i], y),
                (9 if right else -9, 0),
                textcoords="offset points",
                ha="left" if right else "right",
                va="center",
                color=style_of(i)[0],
                fontsize=8.5,
            )


def _against(axes: Axes, results: Results, cost: str) -> None:
    """The cost below the axis, and what lines are where there are any."""
    lines = "\na line joins one checkpoint's budgets" if results.series else ""
    axes.set_xlabel(cost + lines)


def _curves(axes: Axes, results: Results, costs: Sequence[float], shares: Sequence[float]) -> None:
    """A line through the arms that are one checkpoint at several budgets, in the colour of the
    cheapest."""
    for name, places in results.series.items():
        axes.plot(
            [costs[place] for place in places],
            [shares[place] for place in places],
            color=style_of(places[0])[0],
            lw=2,
            alpha=0.7,
            zorder=1,
            gid=f"curve {name}",
        )


def _legend(axes: Axes, title: str, columns: int) -> None:
    """The title with the legend below it, both above the axes."""
    handles, labels = axes.get_legend_handles_labels()
    lines = -(-len(handles) // columns) + sum(label.count("\n") for label in labels)
    axes.set_title(title, pad=9 + 13.5 * lines)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1),
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        handlelength=1.2,
        handletextpad=0.5,
        columnspacing=1.2,
        borderpad=0.2,
    )


def _whisker(axes: Axes, arm: Arm, x: float, y: float, colour: str, marker: str) -> None:
    axes.plot([100 * arm.accuracy.low, 100 * arm.accuracy.high], [y, y], color=colour, lw=2)
    axes.plot(x, y, marker, color=colour, ms=5)


def _majority(axes: Axes, x: float) -> None:
    axes.axvline(x, color=MUTED, lw=1.2, ls="--")
    axes.annotate(
        f"majority {x:.1f}",
        (x, 1),
        (3, -3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        va="top",
        color=MUTED,
        fontsize=8.5,
    )


def _apart(values: Iterable[float], gap: float) -> list[float]:
    """The values moved as little as needed to stand at least `gap` apart, in the given order."""
    wanted = list(values)
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    placed: list[float] = []
    for i in order:
        placed.append(max(wanted[i], placed[-1] + gap) if placed else wanted[i])
    shift = (sum(wanted) - sum(placed)) / len(placed) if placed else 0.0
    result = [0.0] * len(wanted)
    for i, y in zip(order, placed, strict=True):
        result[i] = y + shift
    return result


def _wrap(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width, break_on_hyphens=False)) or text

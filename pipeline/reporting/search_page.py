"""What a search shows: one HTML page that needs nothing else, and one picture, from its trials.

It computes nothing but where to put things, and the importance of each choice (Optuna's PED-ANOVA).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from adsc.plan import PruningPlan, kept_count
from pipeline.reporting.figure_style import COLOURS, MARKERS, MUTED, STYLE
from pipeline.reporting.pages import embedded, render
from pipeline.search.keys import written
from pipeline.search.study import Study

LISTED = 20
"""Trials in the page's table."""
FEW = 8
"""With fewer finished trials the importance of choices is unknown."""


def write_page(folder: Path, results: dict[str, Any], study: Study) -> None:
    """search.png and search.html in a folder."""
    picture = _png(results, study)
    (folder / "search.png").write_bytes(picture)
    trials = sorted(study.trials, key=lambda it: it.number)
    best = sorted(study.finished(), key=lambda it: (study.config.sign * it.value, it.number))
    page = render(
        "search",
        {"written": written},
        title=f"Where to prune: {results['objective']} at {_budget(study)}",
        finding=results["finding"],
        picture=embedded(picture),
        objective=results["objective"],
        unit=results["unit"],
        best=best[:LISTED],
        known=[it for it in trials if it.known],
        left_out=results["left_out"],
        failed=[it for it in trials if it.state == "failed"],
        settings=", ".join(f"{key} = {value}" for key, value in results["config"].items() if value),
    )
    (folder / "search.html").write_text(page)


def importances(study: Study) -> dict[str, float]:
    """Shares of the objective's variation that single choices explain, the largest first; empty
    with too few trials."""
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from optuna.trial import create_trial

    done = [it for it in study.trials if it.state != "failed"]
    if len(done) < FEW:
        return {}
    n, depth = study.space.of.num_vision_tokens, study.space.of.num_layers
    points = [
        _choices(PruningPlan.parse(trial.plan), n, depth) | dict(trial.settings or study.own)
        for trial in done
        if trial.settings or study.own or not study.ranges
    ]
    done = [it for it in done if it.settings or study.own or not study.ranges]
    if len(done) < FEW:
        return {}
    anchors = sorted({point["anchor"] for point in points})
    kinds: dict[str, BaseDistribution] = {
        name: FloatDistribution(
            min(point[name] for point in points), max(point[name] for point in points)
        )
        for name in points[0]
        if name != "anchor"
        and all(isinstance(point[name], int | float) for point in points)
        and len({point[name] for point in points}) > 1
    }
    if len(anchors) > 1:
        kinds["anchor"] = CategoricalDistribution(anchors)
    if not kinds:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    fitted = optuna.create_study()
    for point, trial in zip(points, done, strict=True):
        chosen = {name: point[name] for name in kinds}
        value = study.config.sign * trial.value
        fitted.add_trial(create_trial(params=chosen, distributions=kinds, value=value))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    found = optuna.importance.get_param_importances(fitted, evaluator=evaluator)
    return dict(sorted(found.items(), key=lambda it: -it[1]))


def _choices(plan: PruningPlan, tokens: int, layers: int) -> dict[str, Any]:
    left = tokens
    for _, keep in plan.stages:
        left = kept_count(left, keep)
    return {
        "drops": len(plan.stages),
        "first layer": plan.stages[0][0],
        "last layer": plan.stages[-1][0],
        "left at first": float(plan.stages[0][1]),
        "left at the end": left / tokens,
        "anchor": plan.anchor,
    }


def _png(results: dict[str, Any], study: Study) -> bytes:
    panels: list[Callable[[Axes, Study], None]] = [_front, _depths, _importance, _timeline]
    with rc_context(STYLE):
        figure = Figure(figsize=(10.5, 8.2), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        for panel, axes in zip(panels, figure.subplots(2, 2).flat, strict=True):
            panel(axes, study)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _front(axes: Axes, study: Study) -> None:
    """Objective against cost; known placements by name, the front as a line."""
    axes.set_title(f"{study.config.objective} against cost")
    ours = [it for it in study.finished() if not it.known]
    axes.scatter(
        [it.cost for it in ours],
        [it.value for it in ours],
        s=14,
        color=COLOURS[1],
        label="proposed",
    )
    stopped = [it for it in study.trials if it.state == "stopped"]
    axes.scatter(
        [it.cost for it in stopped], [it.value for it in stopped],
        s=10, color=MUTED, marker="x", label="stopped early",
    )  # fmt: skip
    for place, trial in enumerate(it for it in study.finished() if it.known):
        axes.scatter(
            [trial.cost], [trial.value], s=40, color=COLOURS[(place + 2) % len(COLOURS)],
            marker=MARKERS[(place + 1) % len(MARKERS)],
            label=trial.name if place < 6 else None,
        )  # fmt: skip
    if study.config.front:
        front = study.front()
        axes.step(
            [it.cost for it in front], [it.value for it in front], where="post", color=COLOURS[3]
        )
    axes.set_xlabel(study.config.budget[0])
    axes.legend(fontsize=7.5, frameon=False)


def _depths(axes: Axes, study: Study) -> None:
    axes.set_title("by the depth of each drop")
    for drop in range(max(len(PruningPlan.parse(it.plan).stages) for it in study.trials)):
        points = [
            (stages[drop][0], trial.value)
            for trial in study.trials
            if trial.state != "failed"
            and len(stages := PruningPlan.parse(trial.plan).stages) > drop
        ]
        axes.scatter(
            [at for at, _ in points], [value for _, value in points], s=13, alpha=0.7,
            color=COLOURS[(drop + 1) % len(COLOURS)], marker=MARKERS[drop % len(MARKERS)],
            label=f"drop {drop + 1}",
        )  # fmt: skip
    axes.set_xlabel("decoder layer")
    axes.set_ylabel(study.config.objective)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=7.5, frameon=False)


def _importance(axes: Axes, study: Study) -> None:
    axes.set_title("importance of each choice (PED-ANOVA)")
    found = importances(study)
    if not found:
        axes.text(0.05, 0.5, "too few trials to tell", transform=axes.transAxes, color=MUTED)
        return
    axes.barh(list(found)[::-1], list(found.values())[::-1], color=COLOURS[1], height=0.6)
    axes.set_xlabel("share")
    axes.grid(visible=False, axis="y")


def _timeline(axes: Axes, study: Study) -> None:
    axes.set_title("trials on workers")
    trials = [it for it in study.trials if it.worker]
    workers = sorted({it.worker for it in trials})
    start = min((it.started for it in trials), default=0.0)
    colours = {"finished": COLOURS[1], "stopped": MUTED, "failed": COLOURS[3]}
    for trial in trials:
        axes.barh(
            workers.index(trial.worker), trial.ended - trial.started, left=trial.started - start,
            height=0.7, color=colours[trial.state], edgecolor="white", linewidth=0.4,
        )  # fmt: skip
    axes.set_yticks(range(len(workers)), [f"worker {i + 1}" for i in range(len(workers))])
    axes.set_xlabel("s; grey: stopped early, red: failed")
    busy = np.sum([it.ended - it.started for it in trials])
    span = max((it.ended for it in trials), default=0.0) - start
    if span > 0 and workers:
        share = busy / span / len(workers)
        axes.set_title(f"trials on workers, busy {100 * min(1.0, share):.0f} %")


def _budget(study: Study) -> str:
    name, low, high = study.config.budget
    if study.config.plan:
        return f"plan {study.config.plan}"
    return f"{name} {low:.5g} to {high:.5g}"

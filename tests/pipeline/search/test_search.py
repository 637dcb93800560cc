"""The search: plans that meet a budget, which is tried next, what a trial leaves behind."""

from __future__ import annotations

import itertools
import json
import os
import signal
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import adsc
from adsc.plan import PlanError, PruningPlan
from adsc.solve import PlacementSearch
from pipeline.config import ConfigError
from pipeline.durable import graph
from pipeline.durable.identity import canonical
from pipeline.durable.reference import references, resolve
from pipeline.durable.stage import Input
from pipeline.evaluation.methods import FoundPlan, MethodConfig
from pipeline.kinds.search import SearchDataConfig, SearchStageConfig
from pipeline.search import tuning
from pipeline.search.config import SearchConfig
from pipeline.search.space import Costs, Space
from pipeline.search.study import Rung, Study, Trial, front_of
from pipeline.search.trial import Bench, SearchJob, TrialRefused, segments
from pipeline.search.tuning import Worker, continues, ended, kept_trials, key_of, run_trials
from pipeline.stages.search import SearchFailed, compared, search, search_data
from pipeline.store import open_store
from pipeline.store.local import LocalStore
from pipeline.training.config import TrainConfig
from tests.pipeline.contexts import stage_context
from tests.pipeline.search.searches import DATA, LLAVA, TRAIN, job_of, prepared_splits, space_of  # noqa: F401
from tests.small import Small
from workflows.demo.workflow import demo_paper as demo


def test_every_three_drop_placement_of_llava_is_listed() -> None:
    """Against all of 32 choose 3, counted by the plan itself."""
    found = space_of(average=192, drops=(3,), keeps=("1/2",))

    def total(layers: tuple[int, ...]) -> int:
        plan = PruningPlan(stages=[(at, "1/2") for at in layers])
        return sum(plan.tokens_per_layer(576, 32))

    every = itertools.combinations(range(32), 3)
    expected = {layers for layers in every if 100 * abs(total(layers) - 192 * 32) <= 192 * 32}
    assert {tuple(layer for layer, _ in stages) for stages in found.stages} == expected
    assert len(expected) == len(found.stages) == 96


@pytest.mark.parametrize(
    ("budget", "cost"),
    [
        ({"average": 192}, lambda it: it.average_vision_tokens),
        ({"gflops": 4200}, lambda it: it.flops / 1e9),
        ({"kv_mib": (120, 122)}, lambda it: it.kv_cache_bytes / 2**20),
    ],
)
def test_every_plan_meets_the_budget(budget: dict[str, Any], cost: Any) -> None:
    found = space_of(**budget, drops=(1, 2), anchors=("first",))
    _, low, high = found.config.budget
    assert len(found) > 10
    for number in range(0, len(found.stages), 7):
        candidate = found.candidate(number, "first")
        own = cost(adsc.estimate_cost(LLAVA, candidate.plan))
        assert own == pytest.approx(candidate.cost, rel=1e-9)
        assert low * (1 - 1e-9) <= own <= high * (1 + 1e-9)


def test_costs_that_differ_between_layers_are_searched_exactly() -> None:
    """Against all placements: layers of different cost, as with sliding windows."""
    rng = np.random.default_rng(0)
    dear = rng.integers(1, 9, size=7)
    costs = [[int(count * price) for price in dear] for count in (12, 6, 2)]

    def total(layers: tuple[int, ...]) -> int:
        return sum(costs[sum(at <= layer for at in layers)][layer] for layer in range(7))

    every = list(itertools.combinations(range(7), 2))
    target = Fraction(sorted(map(total, every))[len(every) // 2])
    solver = PlacementSearch(costs, 0, target)
    found = {layers for _, layers in solver.within(Fraction(9))}
    assert found == {layers for layers in every if abs(total(layers) - target) <= 9}
    assert solver.nearest(Fraction(0))[0] == target


def test_measured_times_make_a_budget() -> None:
    times = {64: 20.0, 144: 30.0, 288: 55.0, 576: 100.0}
    config = SearchConfig(prefill_ms=50, tolerance=0.02)
    costs = Costs(LLAVA, config, times)
    found = Space(costs, config)
    assert all(49 <= cost <= 51 for cost in found.costs)
    assert costs.of(PruningPlan()) == pytest.approx(100)
    # Half the layers at 576 tokens, half at 288: half of each time.
    assert costs.of(PruningPlan.parse("16:1/2")) == pytest.approx(77.5, rel=1e-4)
    noisy = Costs(LLAVA, config, {**times, 288: 29.0})
    assert noisy.row(288) == noisy.row(144)
    with pytest.raises(ValueError, match="needs the times"):
        Costs(LLAVA, config)


def test_near_plans_are_near_whatever_their_number_of_drops() -> None:
    found = space_of(average=192)
    for number in range(0, len(found.stages), 997):
        own = found.candidate(number, "last")
        nearest = found.nearest(own.code, "last", ())
        assert nearest is not None and nearest.code == own.code
        other = found.nearest(own.code, "last", {own.plan})
        assert other is not None and other.plan != own.plan
    code = np.array(found.code([(4, Fraction(1, 2)), (10, Fraction(1, 2))]))
    close = np.abs(code - found.code([(5, Fraction(1, 2)), (10, Fraction(1, 2))])).sum()
    same = np.abs(
        code - found.code([(4, Fraction(1, 2)), (9, Fraction(2, 3)), (10, Fraction(3, 4))])
    )
    far = np.abs(code - found.code([(14, Fraction(1, 2)), (28, Fraction(1, 2))])).sum()
    assert close < far and same.sum() < far


def test_known_placements_meet_the_budget_or_say_why_not() -> None:
    found = space_of(average=192, known=("4:1/2,10:1/2,17:1/2",))
    known = found.known()
    assert list(known) == [
        "4:1/2,10:1/2,17:1/2", "thirds", "pyramiddrop", "early", "middle", "late",
    ]  # fmt: skip
    assert all(abs(one.cost - 192) <= 0.05 * 192 for one in known.values())
    layers = {
        name: [layer for layer, _ in PruningPlan.parse(one.plan).stages]
        for name, one in known.items()
    }
    assert layers["thirds"] == [0, 11, 21] and layers["pyramiddrop"] == [8, 16, 24]
    assert layers["early"][0] < layers["middle"][0] < layers["late"][0]
    tight = space_of(average=64)
    assert "pyramiddrop" not in tight.known()
    assert "its nearest cost is 144.8" in tight.left_out["pyramiddrop"]
    with pytest.raises(PlanError, match="known plan '8:1/2' costs 360"):
        space_of(average=192, known=("8:1/2",)).known()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"average": 22, "kv_mib": 1}, "average = 22.0 and kv_mib = 1.0 contradict"),
        ({"average": (30, 20)}, "a range"),
        ({"average": -1}, "above 0"),
        ({"rungs": (3, 1)}, "ascend"),
        ({"rungs": (2,), "fidelity": "curriculum"}, "rungs .* and fidelity = curriculum contra"),
        ({"rungs": (500,), "rows": 100}, r"rungs = \(500,\) and rows = 100 contradict"),
        ({"workers_per_trial": 2}, "workers_per_trial = 2 and fidelity = untrained contradict"),
        ({"drops": (0,)}, "whole numbers from 1"),
    ],
)
def test_contradictions_are_named(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SearchConfig(**settings)


def test_an_unreachable_budget_names_the_nearest() -> None:
    with pytest.raises(PlanError, match=r"the nearest is average = 567 with plan '31:1/2'"):
        space_of(average=575, keeps=("1/2",), drops=(1,))
    with pytest.raises(PlanError, match=r"nearest is gflops = .* change the budget"):
        space_of(gflops=1)
    with pytest.raises(ValueError, match="needs a budget: set one of average"):
        space_of()


def over(study: Study, value: float, state: Any = "finished") -> Trial:
    """The next trial of a study, at its end."""
    proposal = study.next()
    assert proposal is not None
    trial = Trial(
        number=proposal.number, name=proposal.name, plan=proposal.plan, cost=proposal.cost,
        known=proposal.known, state=state, rungs=(Rung(1, value, 0.1),),
        reason="no" if state == "failed" else "",
    )  # fmt: skip
    study.over(trial)
    return trial


def test_a_study_goes_on_from_its_trials_alone() -> None:
    found = space_of(average=192, trials=20, startup=3)
    config = found.config
    whole = Study(found, config)
    trials = [over(whole, 1 / (1 + n), "failed" if n == 6 else "finished") for n in range(20)]
    assert whole.next() is None
    assert len({trial.plan for trial in trials}) == 20
    assert [trial.name for trial in trials[:5]] == list(found.known())
    assert {trial.name for trial in trials[5:8]} == {"random"}
    assert {trial.name for trial in trials[8:]} == {"tpe"}
    stored = [Trial.from_dict(json.loads(json.dumps(it.to_dict()))) for it in trials]
    assert stored == trials
    for kept in (4, 11):
        again = Study(found, config, stored[:kept])
        rest = [over(again, it.value, it.state) for it in trials[kept:]]
        assert [it.plan for it in rest] == [it.plan for it in trials[kept:]]
    assert whole.best() == trials[-1]
    assert whole.best_known() == trials[4]


def test_trials_that_run_at_once_are_different() -> None:
    found = space_of(average=192, trials=30, startup=0)
    study = Study(found, found.config)
    for n in range(8):
        over(study, float(n))
    running = [study.next() for _ in range(6)]
    assert len({it.plan for it in running if it}) == 6


def test_a_space_that_is_used_up_ends_the_study() -> None:
    found = space_of(average=565, drops=(1,), anchors=("last",), trials=500, startup=4)
    study = Study(found, found.config)
    plans = set()
    while (proposal := study.next()) is not None:
        plans.add(proposal.plan)
    assert {found.candidate(n, "last").plan for n in range(len(found))} <= plans


def test_the_worse_trials_stop_at_a_rung() -> None:
    found = space_of(average=192, trials=40, eta=3, startup=40)
    study = Study(found, found.config)
    known = [study.next() for _ in range(5)]
    assert all(study.continues(it.number, 0, 9.0) for it in known if it)
    going = []
    for n in range(30):
        proposal = study.next()
        assert proposal is not None
        if study.continues(proposal.number, 0, float(n % 10)):
            going.append(n % 10)
    assert going[0] == 0 and max(going) <= 3
    # What was reached before a restart counts.
    done = Trial(
        number=39, name="x", plan="1:1/2", cost=192, known=False, state="finished",
        rungs=(Rung(1, 0.0, 1.0), Rung(2, 0.0, 1.0)),
    )  # fmt: skip
    again = Study(found, found.config, [done])
    first = [again.next() for _ in range(6)][-1]
    assert first is not None and not again.continues(first.number, 0, 1.0)


def test_a_front_and_its_knee() -> None:
    def trial(number: int, cost: float, value: float) -> Trial:
        rungs = (Rung(1, value, 0.0),)
        return Trial(
            number=number, name="x", plan=f"{number}:1/2", cost=cost, known=False,
            state="finished", rungs=rungs,
        )  # fmt: skip

    trials = [trial(n, *it) for n, it in enumerate([(10, 5), (12, 1), (20, 0.9), (15, 3), (30, 2)])]
    assert [it.number for it in front_of(trials, 1)] == [0, 1, 2]
    found = space_of(average=(100, 192), drops=(1, 2), trials=20, startup=0)
    study = Study(found, found.config)
    study.trials = trials
    best = study.best()
    assert best is not None and best.number == 1
    # With accuracy more is better.
    assert [it.number for it in front_of(trials, -1)] == [0]
    assert len({mark.partition("@")[2] for mark in found.known()}) == 3
    fresh = Study(found, found.config)
    for n in range(16):
        over(fresh, float(n % 4))


def test_the_comparison_is_paired() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    one = Trial(
        number=0, name="x", plan="", cost=0, known=False, state="finished",
        confirm=tuple(hard), weights=(2.0,) * 200,
    )  # fmt: skip
    other = replace(one, confirm=tuple(hard + 0.1 + 0.01 * rng.random(200)))
    gap = compared(one, other, 0)
    assert gap["low"] < gap["mean"] < gap["high"] < 0
    assert gap["mean"] == pytest.approx(-0.0525, abs=0.001)
    assert gap["high"] - gap["low"] < 0.001


# The recipe


def prints(**changes: Any) -> dict[str, str]:
    settings = {"plan": "search", "search.average": 22, **changes}
    return graph.fingerprints(demo().edit(settings).stages())


def test_what_needs_the_found_plan_follows_from_the_search() -> None:
    one, other = prints(), prints(**{"search.seed": 1})
    same = {name for name in one if one[name] == other[name]}
    assert same == {
        "pictures", "base", "prepare", "control-1", "control-2", "control-3", "merge-control",
    }  # fmt: skip
    cheap = {"search.batch_size": 32, "search.workers_per_trial": 1}
    assert prints(**cheap) == one
    # An untrained search doesn't depend on how the winner will be trained.
    rate = prints(**{"train.learning_rate": 1e-4})
    assert rate["search"] == one["search"] and rate["train-1"] != one["train-1"]
    lora = {"search.fidelity": "lora"}
    assert prints(**lora)["search"] != prints(**lora, **{"train.learning_rate": 1e-4})["search"]
    fixed = demo().stages()
    by_plan = graph.fingerprints(fixed)
    assert by_plan["prepare"] == one["prepare"] and by_plan["train-1"] != one["train-1"]


def test_stages_carry_references_and_resolve_them() -> None:
    stages = {it.name: it for it in demo().edit({"plan": "search", "search.average": 22}).stages()}
    plans = [stages[f"train-{n}"].config.plan for n in (1, 2, 3)]  # type: ignore[attr-defined]
    assert [str(it) for it in plans] == ["search^1.5", "search^1.25", "search"]
    assert [resolve(it, {"search": {"plan": "2:1/4,4:1/4"}}) for it in plans] == [
        it.config.plan  # type: ignore[attr-defined]
        for it in demo().edit({"plan": "2:1/4,4:1/4"}).stages()
        if it.name.startswith("train-")
    ]
    for name in ("train-1", "merge", "evaluate"):
        assert stages[name].needs["search"] == "search"
    assert "search" not in stages["control-1"].needs
    control: Any = stages["control-1"].config
    assert not list(references(control)) and resolve(control, {}) is control
    evaluate = resolve(stages["evaluate"].config, {"search": {"plan": "2:1/4,4:1/4"}})
    assert [arm.plan for arm in evaluate.arms] == ["", "", "2:1/4,4:1/4", "2:1/4,4:1/4"]  # type: ignore[attr-defined]


def test_a_reference_is_read_from_a_config_that_was_saved() -> None:
    config = TrainConfig(plan=FoundPlan(pressure=1.25))
    assert json.loads(config.model_dump_json())["plan"] == "search^1.25"
    assert config.model_dump()["plan"] == canonical(config)["plan"] == "search^1.25"
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config
    for text in ("search", "search^1.5"):
        assert MethodConfig.model_validate({"plan": text}).runs_with == text


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({}, PlanError, "needs a budget"),
        ({"search.average": [1, 2, 3]}, ConfigError, "search.average"),
        (
            {"curriculum.order": "explicit", "curriculum.plans": ["2:1/4"]},
            ConfigError,
            "plan = search and curriculum.order = explicit contradict",
        ),
        ({"plan": "search^2"}, ConfigError, r"plan = search\^2.0: the target is the found plan"),
        ({"plan": 5}, ConfigError, "plan = 5: a plan is text"),
    ],
)
def test_searches_that_cannot_be(changes: dict[str, Any], error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        demo().edit({"plan": "search", **changes}).stages()


# Trials on a small model


def ids(folder: Path) -> list[str]:
    return [
        one
        for file in sorted(folder.glob("*.parquet"))
        for one in pq.read_table(file)["id"].to_pylist()
    ]


def test_conversations_are_held_out(small: Small, splits: Path, tmp_path: Path) -> None:
    parts = [ids(splits / name) for name in ("train", "validation", "confirm")]
    assert [len(part) for part in parts] == [12, 6, 6]
    assert sorted(itertools.chain(*parts)) == sorted(ids(small.prepared / "train"))
    ctx = stage_context("d", tmp_path / "out", {"data": (small.prepared, DATA)})
    with pytest.raises(ValueError, match=r"rows = 20 and search.confirm_rows = 4 leave none of 24"):
        search_data(ctx, SearchDataConfig(rows=20, confirm_rows=4))


PLAN = "1:1/2,2:1/2"


def test_a_trial_is_judged_by_the_models_own_loss(
    small: Small, splits: Path, tmp_path: Path
) -> None:
    from pipeline.training.batches import COLUMNS, collate

    bench = Bench(job_of(small, splits, tmp_path, rungs=(2,), rows=6))
    rungs = list(bench.trial(0, PLAN))
    assert [rung.resource for rung in rungs] == [2, 6]
    assert rungs[0].confirm is None and rungs[1].confirm is not None
    batch = collate(bench._split("validation").rows(range(6), COLUMNS), bench._processor)
    adsc.attach(bench.model, PLAN)
    with torch.inference_mode():
        own = bench.model(**batch).loss
        adsc.attach(bench.model, "")
        dense = bench.model(**batch).loss
    assert rungs[1].judged.value == pytest.approx(own.item(), rel=1e-5)
    assert own != dense
    first = rungs[0].judged
    assert np.allclose(first.sums, rungs[1].judged.sums[:2])


def test_trials_leave_the_base_as_it_was(small: Small, splits: Path, tmp_path: Path) -> None:
    """Whatever came before it on an actor, a trial gives the same."""
    job = job_of(small, splits, tmp_path, fidelity="lora", rungs=(1, 3))
    job = replace(job, train=TRAIN.model_copy(update={"tune": (r".*multi_modal_projector\..*",)}))
    bench = Bench(job)
    before = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
    first = list(bench.trial(0, PLAN))
    stopped = bench.trial(1, "0:1/2")
    next(stopped)
    stopped.close()  # type: ignore[attr-defined]
    second = list(bench.trial(2, PLAN))
    assert [it.resource for it in first] == [1, 3]
    assert [it.judged.value for it in first] == [it.judged.value for it in second]
    assert first[0].judged.value != first[1].judged.value
    after = bench.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_full_trial_trains_the_curriculum(small: Small, splits: Path, tmp_path: Path) -> None:
    job = job_of(small, splits, tmp_path, fidelity="curriculum")
    parts = segments(job, "1:1/4")
    assert [part.plan for part in parts] == ["1:1/8", "1:1/4"]
    assert [it.resource for it in Bench(job).trial(0, "1:1/4")] == [3, 6]
    epochs = TrainConfig(steps=None, epochs=1.0)
    with pytest.raises(TrialRefused, match=r"set how many steps .* search.rungs=\[30,100\]"):
        segments(
            replace(job_of(small, splits, tmp_path / "b", fidelity="lora"), train=epochs), PLAN
        )


def test_accuracy_is_a_share_of_questions(small: Small, splits: Path, tmp_path: Path) -> None:
    bench = Bench(job_of(small, splits, tmp_path, objective="accuracy", max_new_tokens=3))
    judged = bench.judge(PLAN, "validation")
    assert judged.weights.tolist() == [8.0] * 6
    assert 0 <= judged.value <= 1 and np.all(judged.sums <= 8)


def test_prefill_is_measured_by_tokens(small: Small, splits: Path, tmp_path: Path) -> None:
    times = Bench(job_of(small, splits, tmp_path)).prefill()
    assert sorted(times) == [4, 8, 16, 32, 48, 64] and all(time > 0 for time in times.values())


def test_a_trial_that_raises_is_recorded_and_no_other_ends(
    small: Small, splits: Path, tmp_path: Path
) -> None:
    """The actor's own steps, one after the other in this process."""
    job = job_of(small, splits, tmp_path, trials=9, startup=9, rungs=(2,), rows=6)
    study, store, worker = study_of(job), open_store(job.storage), object.__new__(Worker)
    while (proposal := study.next()) is not None:
        tried = proposal._replace(plan="9:1/2") if proposal.number == 6 else proposal
        given = {"proposal": tuple(tried)}
        if study.trials:
            assert worker.reset_config(given)
        else:
            worker.setup(given, job)
        while not (result := worker.step())["done"]:
            if not continues(study, proposal, result["progress"]):
                break
        progress = result["progress"]
        trial = ended(proposal, progress)
        store.create(key_of(trial.number), json.dumps(trial.to_dict()).encode())
        study.over(trial)
    failed = [trial for trial in study.trials if trial.state == "failed"]
    assert [trial.number for trial in failed] == [6]
    assert "drops at layer 9, but the decoder has layers 0..3" in failed[0].reason
    assert kept_trials(store) == study.trials and len(study.trials) == 9
    assert all(len(trial.confirm) == 6 for trial in study.finished())
    best = study.best()
    assert best is not None and best.value == min(it.value for it in study.finished())


# On Ray

on_ray = pytest.mark.usefixtures("ray_address")


def stage_of(
    small: Small, splits: Path, folder: Path, config: SearchConfig, **run: Any
) -> tuple[Any, SearchStageConfig]:
    """A stage's context; every attempt in `folder` shares what trials left."""
    number = len(list(folder.glob("out-*"))) if folder.exists() else 0
    inputs = {"base": (small.base, {}), "data": (splits, DATA)}
    ctx = stage_context("search", folder / f"out-{number}", inputs)
    ctx.run = replace(ctx.run, root=str(folder), **run)
    return ctx, SearchStageConfig(search=config, train=TRAIN)


@on_ray
def test_a_search_resumes_and_repeats_no_trial(small: Small, splits: Path, tmp_path: Path) -> None:
    config = SearchConfig(
        average=32, tolerance=0.1, trials=10, startup=2, rows=6, confirm_rows=6, rungs=(2,)
    )
    ctx, given = stage_of(small, splits, tmp_path, config, num_workers=2)
    outputs = search(ctx, given)
    results = json.loads((ctx.out / "results.json").read_text())
    assert len(results["trials"]) == 10 and outputs["counts"]["failed"] == 0
    assert {"finished", "stopped"} >= {trial["state"] for trial in results["trials"]}
    # Actors were reused.
    assert len({trial["worker"] for trial in results["trials"]}) <= 2
    best = min(t["rungs"][-1][1] for t in results["trials"] if t["state"] == "finished")
    assert outputs["value"] == best
    assert outputs["plan"] in results["finding"]
    assert "search.html" in {path.name for path in ctx.out.iterdir()}
    table = pq.read_table(ctx.out / "trials.parquet").to_pylist()
    assert [row["number"] for row in table] == list(range(10))
    assert max(row["cost"] for row in table if not row["known"]) <= 32 * 1.1
    # What a kill leaves: some trials are there. The others run, and only they.
    store = open_store(str(tmp_path / "run"))
    keys = sorted(entry.key for entry in store.list("trials"))
    kept = {key: store.read(key) for key in keys[:7]}
    for key in keys[7:]:
        store.delete(key)
    again, given = stage_of(small, splits, tmp_path, config, num_workers=1)
    more = search(again, given)
    assert {key: store.read(key) for key in kept} == kept
    assert len(json.loads((again.out / "results.json").read_text())["trials"]) == 10
    assert more["space"] == outputs["space"]


@on_ray
def test_trials_that_fail_are_reported_and_all_of_them_end_the_stage(
    small: Small, splits: Path, tmp_path: Path
) -> None:
    config = SearchConfig(average=32, tolerance=0.1, trials=3, fidelity="lora", rungs=(2,))
    ctx, given = stage_of(small, splits, tmp_path, config)
    nowhere = TRAIN.model_copy(update={"tune": ("no.such.parameter",)})
    with pytest.raises(SearchFailed, match=r"none of 3 trials finished: .*match no parameter"):
        search(ctx, given.model_copy(update={"train": nowhere}))
    kept = [json.loads(p.read_text()) for p in (tmp_path / "run" / "trials").glob("*.json")]
    assert len(kept) == 3 and all(it["state"] == "failed" for it in kept)


def study_of(job: SearchJob) -> Study:
    from transformers import AutoConfig

    model = AutoConfig.from_pretrained(job.inputs["base"].folder)
    return Study(Space(Costs(model, job.search), job.search), job.search)


@on_ray
def test_a_trial_whose_worker_is_lost_begins_again(
    small: Small, splits: Path, tmp_path: Path
) -> None:
    """Killed, as a machine that runs out of memory does it; no trial fails."""
    job = job_of(small, splits, tmp_path, trials=6, startup=6, rows=6)
    killed: list[str] = []

    def note(trial: Trial) -> None:
        if not killed:
            killed.append(trial.worker)
            os.kill(int(trial.worker.rpartition("/")[2]), signal.SIGKILL)

    study, store = study_of(job), open_store(job.storage)
    run_trials(study, job, store, 1, note)
    assert [trial.number for trial in study.trials] == list(range(6))
    assert {trial.state for trial in study.trials} == {"finished"}
    assert len({trial.worker for trial in study.trials}) == 2
    assert kept_trials(store) == study.trials
    run_trials(study, job, store, 1, note)  # nothing is left
    assert len(study.trials) == 6


@on_ray
@pytest.mark.slow
def test_a_trial_that_always_loses_its_worker_is_recorded(
    small: Small, splits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deadly:
        @property
        def folder(self) -> Path:
            os._exit(1)

    monkeypatch.setattr(tuning, "MAX_LOST", 1)
    job = job_of(small, splits, tmp_path, trials=1, rows=6)
    study, store = study_of(job), open_store(job.storage)
    run_trials(study, replace(job, inputs={"base": Deadly()}), store, 1)
    assert [trial.state for trial in kept_trials(store)] == ["failed"]
    assert "lost 2 times" in study.trials[0].reason


@on_ray
def test_a_trial_that_cannot_be_kept_ends_the_search(
    small: Small, splits: Path, tmp_path: Path
) -> None:
    """A store that refuses is nothing that the trial did."""

    class Full(LocalStore):
        def create(self, key: str, data: bytes) -> str | None:
            if key == key_of(1):
                raise OSError(28, "No space left on device")
            return super().create(key, data)

    job = job_of(small, splits, tmp_path, trials=4, startup=4, rows=6)
    study, store = study_of(job), Full(Path(job.storage))
    with pytest.raises(OSError, match="No space left on device"):
        run_trials(study, job, store, 1)
    assert [trial.number for trial in kept_trials(store)] == [0]


@on_ray
@pytest.mark.slow
def test_a_trial_of_several_workers_is_a_ray_train_run(
    small: Small, splits: Path, tmp_path: Path
) -> None:
    """Its loss is that of one worker, up to the order of additions."""
    config = SearchConfig(
        average=32, tolerance=0.1, trials=1, fidelity="lora", rungs=(2, 3), workers_per_trial=2
    )
    ctx, given = stage_of(small, splits, tmp_path, config, gpus_per_worker=0)
    both = search(ctx, given)
    alone = config.model_copy(update={"workers_per_trial": 1})
    other, given = stage_of(small, splits, tmp_path / "one", alone)
    one = search(other, given)
    assert both["plan"] == one["plan"]
    assert both["value"] == pytest.approx(one["value"], rel=1e-4)


@on_ray
@pytest.mark.slow
@pytest.mark.parametrize("budget", [{"average": (20, 40)}, {"prefill_ms": (0.1, 1000.0)}])
def test_fronts_are_found_with_trials_on_s3(
    small: Small, splits: Path, tmp_path: Path, s3_endpoint: str, budget: dict[str, Any]
) -> None:
    """Two objectives, with costs from the plan and from measured times."""
    config = SearchConfig(**budget, trials=9, startup=2, rows=6, confirm_rows=6, drops=(1, 2))
    ctx, given = stage_of(small, splits, tmp_path, config, num_workers=2)
    ctx.train_storage = ("s3://lab/search", tmp_path.name)
    outputs = search(ctx, given)
    results = json.loads((ctx.out / "results.json").read_text())
    kept = kept_trials(open_store(f"s3://lab/search/{tmp_path.name}"))
    assert len(kept) == 9 and outputs["counts"] == {"finished": 9, "stopped": 0, "failed": 0}
    points = {trial.plan: (trial.value, trial.cost) for trial in kept}
    best = {
        plan
        for plan, (value, cost) in points.items()
        if not any(v <= value and c <= cost and (v, c) != (value, cost) for v, c in points.values())
    }
    assert set(results["front"]) == best and outputs["plan"] in best
    assert (results["prefill_ms"] is not None) == ("prefill_ms" in budget)


def test_inputs_of_a_trial_travel(small: Small, splits: Path, tmp_path: Path) -> None:
    import pickle

    job = job_of(small, splits, tmp_path)
    again = pickle.loads(pickle.dumps(job))
    assert isinstance(again.inputs["base"], Input) and again.search == job.search

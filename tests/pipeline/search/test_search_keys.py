"""Training keys in a search: ranges, draws, and what a trial trains with, alone or at a budget."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import ConfigError, edit
from pipeline.search.config import SearchConfig
from pipeline.search.keys import drawn, own_settings, read_range, with_settings, written
from pipeline.search.study import Rung, Study, Trial
from pipeline.search.trial import segments
from pipeline.search.tuning import Worker
from pipeline.training.config import DistillSettings, LoraSettings, TrainConfig
from tests.pipeline.search.searches import job_of, prepared_splits, space_of  # noqa: F401
from tests.small import Small
from workflows.commands.search import best_settings
from workflows.demo.workflow import demo

OVER = {
    "train.learning_rate": "1e-4..1e-2,log",
    "lora.rank": "8,16,32",
    "train.distill.weight": "0..1",
    "lora.alpha": "8..64",
}
RANGES = SearchConfig(over=OVER, fidelity="lora").ranges
OWN = TrainConfig(learning_rate=1e-3, lora=LoraSettings(rank=16, alpha=32))


def test_draws_are_in_their_ranges_and_of_their_kinds() -> None:
    rng = np.random.default_rng(0)
    each = [dict(drawn(RANGES, rng)) for _ in range(400)]
    rates = [one["train.learning_rate"] for one in each]
    assert min(rates) >= 1e-4 and max(rates) <= 1e-2
    # On a logarithmic scale half of them are below the geometric mean.
    assert np.mean([rate < 1e-3 for rate in rates]) == pytest.approx(0.5, abs=0.08)
    assert {one["train.lora.rank"] for one in each} == {8, 16, 32}
    weights = [one["train.distill.weight"] for one in each]
    assert 0 <= min(weights) < 0.05 and 0.95 < max(weights) <= 1
    assert all(isinstance(one["train.lora.alpha"], float) for one in each)
    whole = read_range("train.batch_size", "2..5")
    assert {whole.draw(rng) for _ in range(100)} == {2, 3, 4, 5}
    log = read_range("train.batch_size", "1..64,log")
    assert np.median([log.draw(rng) for _ in range(400)]) == pytest.approx(8, abs=3)
    for name, one in RANGES.items():
        assert one.distribution() is not None and one.holds(each[0][name])


def test_a_trial_trains_with_its_settings() -> None:
    train = with_settings(
        TrainConfig(lora=None),
        [("train.learning_rate", 3e-3), ("train.lora.rank", 8), ("train.distill.weight", 0.5)],
    )
    assert train.learning_rate == 3e-3 and train.lora == LoraSettings(rank=8)
    assert train.distill == DistillSettings(weight=0.5)
    assert with_settings(train, [("train.distill.weight", 0)]).distill is None
    assert with_settings(train, []) == train
    with pytest.raises(ConfigError, match="learning_rate"):
        with_settings(train, [("train.learning_rate", -1.0)])


def test_the_workflows_own_values_count_where_they_are_in_range() -> None:
    train = TrainConfig(learning_rate=1e-3, lora=LoraSettings(rank=16, alpha=32))
    assert dict(own_settings(train, RANGES)) == {
        "train.learning_rate": 1e-3,
        "train.lora.rank": 16,
        "train.distill.weight": 0.0,
        "train.lora.alpha": 32,
    }
    assert own_settings(train.model_copy(update={"learning_rate": 1.0}), RANGES) == ()


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"train.plan": "a,b"}, r"can't vary train\.plan"),
        ({"train.seed": "1,2"}, r"can't vary train\.seed"),
        ({"evaluate.seed": "1,2"}, r"can't vary evaluate\.seed"),
        ({"train.learning_rat": "1,2"}, "which the training does not have"),
        ({"train.lora.rank.x": "1,2"}, "which the training does not have"),
        ({"train.learning_rate": "1e-2..1e-4"}, "the range .* can't be read"),
        ({"train.learning_rate": "0..1,log"}, "the range .* can't be read"),
        ({"train.learning_rate": "1e-3"}, "the range .* can't be read"),
        ({"lora.rank": "1..8.5"}, "takes whole numbers"),
    ],
)
def test_what_can_not_be_searched_is_refused(over: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchConfig(over=over, fidelity="lora")


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="fidelity = untrained contradict"):
        SearchConfig(over=OVER)
    with pytest.raises(ValueError, match=r"average = 22\.0 contradict"):
        SearchConfig(over=OVER, fidelity="lora", plan="1:1/4", average=22)
    with pytest.raises(ValueError, match="leaves nothing to search"):
        SearchConfig(plan="1:1/4")
    for key, text in (("lora.dropout", "0..2"), ("lora.rank", "8,16,16.5")):
        over = {"search.over": {key: text}, "search.fidelity": "lora"}
        with pytest.raises(ConfigError, match=key):
            edit(demo().config, over)


def finished(study: Study, value: Any) -> Trial:
    one = study.next()
    assert one is not None
    trial = Trial(
        number=one.number, name=one.name, plan=one.plan, cost=one.cost, known=one.known,
        settings=one.settings, state="finished",
        rungs=(Rung(3, value(dict(one.settings or study.own)), 1.0),),
    )  # fmt: skip
    study.over(Trial.from_dict(trial.to_dict()))
    return study.trials[-1]


def test_tpe_learns_the_rate_for_one_plan() -> None:
    """The plan stays; TPE comes nearer to the best rate than uniform draws do."""

    def error(settings: dict[str, Any]) -> float:
        return abs(math.log10(settings["train.learning_rate"]) + 2.5)

    def mean(sampler: str) -> float:
        config = {"plan": "4:1/9", "over": OVER, "fidelity": "lora", "trials": 40, "startup": 8}
        space = space_of(**config, sampler=sampler)
        assert len(space) == 1
        study = Study(space, space.config, own=own_settings(OWN, RANGES))
        done = [finished(study, error) for _ in range(40)]
        assert study.next() is None
        assert [one.name for one in done[:2]] == ["as configured", "random"]
        assert {one.plan for one in done} == {"4:1/9"} and done[0].settings == ()
        assert len({one.settings for one in done}) == 40
        return float(np.mean([one.value for one in done[-15:]]))

    assert mean("tpe") < 0.6 * mean("random")


def test_placements_and_keys_are_searched_together() -> None:
    config = {"average": 192, "over": OVER, "fidelity": "lora", "trials": 16, "startup": 3}
    space = space_of(**config)
    study = Study(space, space.config, own=own_settings(OWN, RANGES))
    done = [finished(study, lambda settings: float(len(str(settings)))) for _ in range(16)]
    proposed = [one for one in done if not one.known]
    assert all(190 < one.cost < 194 for one in proposed)
    assert len({one.plan for one in proposed}) > 3
    assert all(dict(one.settings).keys() == RANGES.keys() for one in proposed)


def test_a_study_of_keys_goes_on_from_its_trials_alone() -> None:
    space = space_of(average=192, over=OVER, fidelity="lora", trials=12, startup=3)
    own = own_settings(OWN, RANGES)

    def value(settings: dict[str, Any]) -> float:
        return abs(math.log10(settings["train.learning_rate"]) + 2.5)

    whole = Study(space, space.config, own=own)
    done = [finished(whole, value) for _ in range(12)]
    assert whole.next() is None
    kept = [Trial.from_dict(json.loads(json.dumps(one.to_dict()))) for one in done[:8]]
    resumed = Study(space, space.config, kept, own)
    again = [finished(resumed, value) for _ in range(4)]
    assert [(one.plan, one.settings) for one in again] == [
        (one.plan, one.settings) for one in done[8:]
    ]
    assert resumed.best() == whole.best()


def test_settings_reach_the_training(small: Small, splits: Path, tmp_path: Path) -> None:
    over = {"lora.rank": "2,4", "distill.weight": "0..1"}
    own = SearchConfig(plan="1:1/2", fidelity="lora", rungs=(2, 3), over=over)
    job = replace(job_of(small, splits, tmp_path), search=own)
    settings = (("train.lora.rank", 2), ("train.distill.weight", 0.5))
    parts = segments(job, "1:1/2", settings)
    assert [part.lora.rank for part in parts if part.lora] == [2, 2]
    assert all(part.distill == DistillSettings(weight=0.5) for part in parts)
    worker = Worker.__new__(Worker)
    worker.setup({"proposal": (0, "tpe", "1:1/2", 1.0, (), False, settings)}, job=job)
    first = worker.step()["progress"]
    assert not first.failed and first.rungs[0].resource == 2
    worker.cleanup()


def test_what_was_found_can_be_set() -> None:
    settings = {"train.lora.rank": 8, "train.learning_rate": 0.002, "train.distill.weight": 0.25}
    results = {"plan": "1:1/4", "settings": settings}
    changes = best_settings(demo().config, results, ["train.steps=7", "train.lora.rank=3"])
    pairs = [change.partition("=") for change in changes]
    config = demo().edit({key: value for key, _, value in pairs}).config
    assert config.plan == "1:1/4" and config.train.steps == 7
    assert config.train.lora.rank == 8 and config.train.learning_rate == 0.002
    assert config.train.distill == DistillSettings(weight=0.25)
    assert written(tuple(settings.items())).startswith(
        "train.lora.rank=8 train.learning_rate=0.002"
    )

"""The bootstrap on numbers whose intervals are known."""

import numpy as np
import pytest

from pipeline.evaluation.intervals import Bootstrap, over_seeds


def test_bootstrap_resamples_pictures_not_questions() -> None:
    # Four pictures, all questions of a picture right or wrong together: only 4 independent facts.
    records = [name for name in "abcd" for _ in range(25)]
    values = np.repeat([1.0, 1.0, 0.0, 0.0], 25)
    interval = Bootstrap(records, seed=0).mean(values)
    assert interval["mean"] == 0.5 and interval["n"] == 100
    assert (interval["low"], interval["high"]) == (0.0, 1.0)
    alone = Bootstrap([str(i) for i in range(100)], seed=0).mean(values)
    # Independent questions: normal approximation 0.5 +- 0.098.
    assert alone["low"] == pytest.approx(0.402, abs=0.02)
    assert alone["high"] == pytest.approx(0.598, abs=0.02)


def test_bootstrap_of_a_paired_difference_is_narrow_where_arms_agree() -> None:
    records = [str(i) for i in range(200)]
    a = (np.arange(200) % 2).astype(float)
    b = a.copy()
    b[:4] = 1 - b[:4]
    interval = Bootstrap(records, seed=0).difference(a, b)
    assert interval["mean"] == 0 and interval["high"] - interval["low"] < 0.05


def test_a_paired_ratio_knows_that_both_saw_the_same_pictures() -> None:
    records = [str(i) for i in range(400)]
    control = (np.arange(400) % 4 > 0).astype(float)
    own = control * (np.arange(400) % 10 > 0)
    ratio = Bootstrap(records, seed=0).ratio(own, control)
    assert ratio is not None and ratio["mean"] == pytest.approx(own.sum() / control.sum())
    assert ratio["low"] < ratio["mean"] < ratio["high"] < 1
    # Unpaired, the interval of the ratio of two such means would be about 0.16 wide.
    assert ratio["high"] - ratio["low"] < 0.09
    assert Bootstrap(records, seed=0).ratio(own, 0 * control) is None


def test_the_spread_between_seeds_is_in_the_interval() -> None:
    records = [str(i) for i in range(2000)]
    values = np.zeros((3, 2000))
    for seed, share in enumerate((0.4, 0.5, 0.6)):
        values[seed, : int(2000 * share)] = 1
    pooled = Bootstrap(records, seed=0).mean(values)
    alone = Bootstrap(records, seed=0).mean(values[1])
    assert pooled["mean"] == pytest.approx(0.5)
    # 3 draws of seeds: standard deviation 0.0816 / sqrt(3) = 0.047; of pictures alone: 0.011.
    assert pooled["high"] - pooled["low"] == pytest.approx(4 * 0.047, rel=0.2)
    assert alone["high"] - alone["low"] == pytest.approx(4 * 0.011, rel=0.2)


def test_seeds_are_paired_in_differences() -> None:
    records = [str(i) for i in range(500)]
    control = np.zeros((3, 500))
    for seed, share in enumerate((0.3, 0.5, 0.7)):
        control[seed, : int(500 * share)] = 1
    own = control.copy()
    own[:, :25] = 0  # each seed loses the same 5 points
    gap = Bootstrap(records, seed=0).difference(own, control)
    assert gap["mean"] == pytest.approx(-0.05)
    assert gap["high"] - gap["low"] < 0.05
    one = Bootstrap(records, seed=0).difference(own, control[1])
    assert one["high"] - one["low"] > 0.1


def test_a_kind_that_few_resamples_hold_still_has_an_interval() -> None:
    records = [str(i) for i in range(50)]
    rare = np.arange(50) % 48 == 1
    interval = Bootstrap(records, seed=0).mean(np.ones(50), rare)
    assert interval == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 2}


def test_one_picture_has_the_widest_interval() -> None:
    bootstrap = Bootstrap(["a", "a", "b"], seed=0)
    one = np.array([True, True, False])
    own, control = np.array([0.0, 1.0, 1.0]), np.ones(3)
    assert bootstrap.mean(own, one) == {"mean": 0.5, "low": 0.0, "high": 1.0, "n": 2}
    assert bootstrap.difference(own, control, one) == {"mean": -0.5, "low": -1.0, "high": 1.0}
    assert Bootstrap(["a"] * 3, seed=0).ratio(own, control) is None


def test_the_interval_over_seeds_is_students() -> None:
    # By hand: standard deviation 0.02, t(2) = 4.303, 4.303 * 0.02 / sqrt(3) = 0.0497.
    interval = over_seeds([0.80, 0.82, 0.84])
    assert interval is not None and interval["mean"] == pytest.approx(0.82)
    assert interval["low"] == pytest.approx(0.7703, abs=1e-4)
    assert interval["high"] == pytest.approx(0.8697, abs=1e-4)
    assert over_seeds([0.8]) is None
    spread = over_seeds([0.8, 0.84] * 10)
    assert spread is not None and spread["high"] - spread["low"] < 0.03

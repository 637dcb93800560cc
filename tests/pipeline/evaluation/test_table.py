"""The table of results.json, of scores that are given."""

from typing import Any

import numpy as np
import pytest

import adsc
from pipeline.evaluation.config import ArmConfig, EvaluateConfig
from pipeline.evaluation.generation import QuestionEntry
from pipeline.evaluation.speed import measure_and_count
from pipeline.evaluation.table import Scored, results
from pipeline.reporting.results import Arm, Results
from pipeline.stages.report import finding
from tests.adsc import tiny

QUESTIONS = 40


def row(name: str, **scores: float) -> dict[str, tuple[ArmConfig, Scored]]:
    """Arms of a group by `s` and their seed, with the share that they answer right."""
    found = {}
    for seed, share in scores.items():
        arm = ArmConfig(
            name=f"{name}-{seed}", label=name, checkpoint="base", group=name, seed=int(seed[1:])
        )
        right = (np.arange(QUESTIONS) < round(share * QUESTIONS)).astype(float)
        found[arm.name] = arm, Scored(right)
    return found


def table(
    arms: dict[str, tuple[ArmConfig, Scored]], pictures: int = QUESTIONS
) -> tuple[Results, dict[str, Arm]]:
    model, inputs = tiny.llava(), tiny.batch([tiny.row(5, 0, 3)])
    plan = [adsc.PruningPlan.parse("")]
    measured = measure_and_count(model, inputs, plan, rounds=1, decode_rounds=1, decode_tokens=2)
    made = results(
        EvaluateConfig(arms=tuple(arm for arm, _ in arms.values()), control="control"),
        [QuestionEntry(i, str(i), "what", "?", "yes", (0, 1)) for i in range(QUESTIONS)],
        [str(i % pictures) for i in range(QUESTIONS)],
        {name: scored for name, (_, scored) in arms.items()},
        measured | {"methods": {"": measured["methods"][0]}},
        workflow="test",
        commit=None,
        config={},
        majority={"accuracy": 0.1, "by_kind": {"what": 0.1}},
    )
    read = Results.model_validate(made)
    return read, {arm.name: arm for arm in read.arms}


def test_seeds_are_paired_by_what_they_are_not_by_where_they_stand() -> None:
    control = row("control", s0=0.2, s1=0.5, s2=0.8)
    _, rows = table(control | row("own", s2=0.7, s0=0.1, s1=0.4))
    for gap in (rows["own"].difference_over_seeds, rows["own"].difference):
        assert gap is not None and gap.mean == pytest.approx(-0.1)
    assert rows["own"].difference_over_seeds is not None
    over = rows["own"].difference_over_seeds
    assert over.high - over.low == pytest.approx(0, abs=1e-9)  # each seed loses the same
    _, straight = table(control | row("own", s0=0.1, s1=0.4, s2=0.7))
    assert straight["own"].difference == rows["own"].difference
    assert straight["own"].retention_interval == rows["own"].retention_interval


def test_only_seeds_that_both_have_are_compared() -> None:
    _, rows = table(row("control", s0=0.2, s1=0.5, s3=0.6) | row("own", s0=0.1, s2=0.9, s1=0.2))
    own = rows["own"]
    assert own.difference is not None and own.difference_over_seeds is not None
    assert own.difference.mean == pytest.approx(-0.2)
    assert own.difference_over_seeds.mean == pytest.approx(-0.2)
    assert own.retention == pytest.approx((0.1 + 0.2) / (0.2 + 0.5))
    assert own.accuracy.mean == pytest.approx((0.1 + 0.9 + 0.2) / 3)


def test_rows_without_a_common_seed_are_compared_as_wholes() -> None:
    _, rows = table(row("control", s0=0.2, s1=0.8) | row("own", s2=0.2, s3=0.8))
    own = rows["own"]
    assert own.difference is not None and own.difference.mean == pytest.approx(0)
    assert own.difference.high - own.difference.low > 0.5  # paired, it would be 0
    assert own.difference_over_seeds is None


def test_one_picture_proves_no_loss() -> None:
    arms: dict[str, Any] = row("control", s0=0.9) | row("own", s0=0.4)
    read, rows = table(arms, pictures=1)
    own = rows["own"]
    assert own.accuracy.model_dump() == {"mean": 0.4, "low": 0, "high": 1}
    assert own.by_kind["what"] == own.accuracy
    assert own.difference is not None
    assert (own.difference.low, own.difference.high) == (-1, 1)
    assert own.difference.mean == pytest.approx(-0.5)
    assert own.retention is None and own.retention_interval is None
    compressed = own.model_copy(update={"plan": "1:1/2"})
    shown = read.model_copy(update={"arms": [rows["control"], compressed]})
    assert "which is not significant" in finding(shown)

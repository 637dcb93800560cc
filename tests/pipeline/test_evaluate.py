"""Merge and evaluate on a model that was just trained, and the statistics on known numbers."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoProcessor

import adsc
from pipeline.evaluation import (
    Bootstrap,
    generate_answers,
    majority_answers,
    read_questions,
    time_prefill,
)
from pipeline.prepared import PreparedData
from pipeline.stages.evaluate import ArmConfig, EvaluateConfig, evaluate
from pipeline.stages.merge import MergeConfig, MergeMismatch, merge
from pipeline.stages.results import Results
from pipeline.training import train
from tests.pipeline.contexts import stage_context
from tests.pipeline.test_training import CONFIG, Plain, sources
from tests.small import Small

PLAN = CONFIG.plan
DATA = {"template": "vicuna_short", "digest": "0" * 64}


@pytest.fixture(scope="module")
def trained(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training stage's output folder."""
    folder = tmp_path_factory.mktemp("trained")
    train(CONFIG, sources(small), Plain(folder))
    return folder / "step-0006"


@pytest.fixture(scope="module")
def merged(small: Small, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "out"
    inputs = {"base": (small.base, {}), "data": (small.prepared, DATA), "trained": (trained, {})}
    merge(stage_context("merge", out, inputs), MergeConfig(plan=PLAN))
    return out


def test_merged_checkpoint_carries_plan_weights_and_probe(merged: Path, trained: Path) -> None:
    model = adsc.from_pretrained(merged)
    assert str(adsc.plan_of(model)) == PLAN
    from safetensors.torch import load_file

    probe = load_file(merged / "probe.safetensors")
    expected = probe.pop("logits")
    with torch.inference_mode():
        assert torch.equal(model.eval()(**probe).logits, expected)
    assert (merged / "adapter" / "adapter_model.safetensors").exists()
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_merge_that_is_not_the_same_model_is_not_published(
    small: Small, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"base": (small.base, {}), "data": (small.prepared, {}), "trained": (trained, {})}
    monkeypatch.setattr("pipeline.stages.merge.merge_trained", lambda model, folder: model)
    with pytest.raises(MergeMismatch, match="logits of the merged model differ by"):
        merge(stage_context("merge", tmp_path / "out", inputs), MergeConfig(plan=PLAN))
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_evaluate_writes_results_that_the_report_reads(
    small: Small, merged: Path, trained: Path, tmp_path: Path
) -> None:
    arms = (
        ArmConfig(name="dense", label="dense", checkpoint="base", plan="", trained=False),
        ArmConfig(name="dense_lora", label="control", checkpoint="merge", plan="", trained=True),
        ArmConfig(name="plan_trained", label="plan", checkpoint="merge", plan=PLAN, trained=True),
    )
    inputs = {
        "base": (small.base, {}),
        "data": (small.prepared, DATA),
        "merge": (merged, {}),
        "train-1": (trained, {}),
    }
    ctx = stage_context("evaluate", tmp_path / "out", inputs)
    evaluate(ctx, EvaluateConfig(arms=arms, prefill_rounds=2, max_new_tokens=4))
    results = Results.read(ctx.out / "results.json")
    raw = json.loads((ctx.out / "results.json").read_text())
    assert (raw["num_vision_tokens"], raw["num_layers"]) == (64, 4)
    assert [arm["tokens_per_layer"] for arm in raw["arms"]] == [[64] * 4] * 2 + [[64, 32, 8, 8]]
    plan = raw["arms"][2]
    assert plan["reduction"] == pytest.approx(1 - (64 + 32 + 8 + 8) / 4 / 64)
    assert 0 < plan["flops_reduction"] < 1 and 0 < plan["kv_reduction"] < plan["reduction"]
    assert raw["curves"]["train-1 (no drop)"][-1][0] == CONFIG.steps
    assert len(results.arms) == 3
    table = pq.read_table(ctx.out / "samples.parquet").to_pylist()
    assert len(table) == 3 * raw["num_questions"] == 3 * 48
    for arm in raw["arms"]:
        own = [row["right"] for row in table if row["arm"] == arm["name"]]
        assert arm["accuracy"]["mean"] == pytest.approx(np.mean(own))


def test_answers_do_not_depend_on_the_batch(small: Small, merged: Path) -> None:
    questions = read_questions(PreparedData(small.prepared / "test"))[:12]
    model = adsc.from_pretrained(merged).eval()
    processor = AutoProcessor.from_pretrained(merged)
    together = generate_answers(model, processor, questions, 12, 4)
    assert together == generate_answers(model, processor, questions, 1, 4)


def test_prefill_is_timed_for_each_plan(small: Small, merged: Path) -> None:
    from pipeline.evaluation import build_inputs

    questions = read_questions(PreparedData(small.prepared / "test"))[:4]
    model = adsc.from_pretrained(merged).eval()
    inputs = build_inputs(questions, AutoProcessor.from_pretrained(merged))
    plans = [adsc.PruningPlan.parse(""), adsc.PruningPlan.parse(PLAN)]
    times = time_prefill(model, inputs, plans, rounds=3)
    assert all(0 < t["low"] <= t["median"] <= t["high"] for t in times)
    assert adsc.plan_of(model) is None


def test_majority_is_the_most_frequent_training_answer(small: Small) -> None:
    records = json.loads((small.pictures / "train.json").read_text())
    answers = [
        turn["value"]
        for record in records
        for kind, turn in zip(record["kinds"], record["conversations"][1::2], strict=True)
        if kind == "any"
    ]
    majority = majority_answers(PreparedData(small.prepared / "train"))
    assert set(majority) == {"what", "where", "count", "any"}
    assert answers.count(majority["any"]) >= len(answers) / 2


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
    interval = Bootstrap(records, seed=0).mean(a - b)
    assert interval["mean"] == 0 and interval["high"] - interval["low"] < 0.05


def test_records_without_kinds_or_pictures_are_asked_too(small: Small, tmp_path: Path) -> None:
    """LLaVA-665K names no kinds of question, and holds conversations about no picture."""
    rows = pq.read_table(small.prepared / "test").to_pylist()[:2]
    for row in rows:
        row["kinds"] = []
    rows[1]["pictures"] = []
    import pyarrow as pa

    from pipeline.stages.prepare import SCHEMA

    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "0.parquet")
    data = PreparedData(tmp_path)
    questions = read_questions(data)
    assert {question.kind for question in questions} == {"other"}
    assert set(majority_answers(data)) == {"other"}
    model = adsc.from_pretrained(small.base).eval()
    processor = AutoProcessor.from_pretrained(small.base)
    mixed = [questions[0], questions[-1]]
    assert [len(question.pictures) for question in mixed] == [1, 0]
    together = generate_answers(model, processor, mixed, 2, 3)
    assert together == generate_answers(model, processor, mixed, 1, 3)

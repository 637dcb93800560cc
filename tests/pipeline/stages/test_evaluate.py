"""Merge and evaluate on a model that was just trained: answers, shards, failures, measurements."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoProcessor

import adsc
from pipeline.data.prepared import PreparedData
from pipeline.evaluation.answers import AnswersFailed
from pipeline.evaluation.config import ArmConfig, EvaluateConfig
from pipeline.evaluation.generation import (
    GenerationError,
    Questions,
    build_inputs,
    generate_answers,
    generate_batch,
    majority_answers,
    render_prompt,
)
from pipeline.evaluation.methods import MethodError, parse_method
from pipeline.evaluation.speed import measure
from pipeline.kinds.merge import MergeConfig
from pipeline.reporting.results import Results
from pipeline.stages.evaluate import evaluate
from pipeline.stages.merge import MergeMismatch, merge
from pipeline.stages.prepare import SCHEMA
from pipeline.training.loop import train
from tests.pipeline.contexts import DATA, QUICK, stage_context
from tests.pipeline.training.training_runs import CONFIG, Plain, sources
from tests.small import Small

pytestmark = pytest.mark.usefixtures("ray_address")

PLAN = CONFIG.plan


@pytest.fixture(scope="module")
def trained(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training stage's output folder."""
    folder = tmp_path_factory.mktemp("trained")
    train(CONFIG, sources(small), Plain(folder))
    return folder / f"step-{CONFIG.steps:07d}"


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
    adapter = json.loads((merged / "adapter" / "adapter_config.json").read_text())
    assert adapter["adsc"] == adsc.PruningPlan.parse(PLAN).to_dict()
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_merge_that_is_not_the_same_model_is_not_published(
    small: Small, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"base": (small.base, {}), "data": (small.prepared, DATA), "trained": (trained, {})}
    monkeypatch.setattr("pipeline.stages.merge.merge_trained", lambda model, folder: model)
    with pytest.raises(MergeMismatch, match="logits of the merged model differ by"):
        merge(stage_context("merge", tmp_path / "out", inputs), MergeConfig(plan=PLAN))
    assert not list((tmp_path / "out").rglob("*.safetensors"))


Inputs = dict[str, tuple[Path, dict[str, str]]]


@pytest.fixture(scope="module")
def all_inputs(small: Small, merged: Path, trained: Path) -> Inputs:
    return {
        "base": (small.base, {}),
        "data": (small.prepared, DATA),
        "merge": (merged, {}),
        "train-1": (trained, {}),
    }


@pytest.fixture
def inputs(all_inputs: Inputs) -> Inputs:
    """What a test may replace."""
    return dict(all_inputs)


ARMS = (
    ArmConfig(name="dense", label="dense", checkpoint="base"),
    ArmConfig(name="dense_lora", label="control", checkpoint="merge", trained=True),
    ArmConfig(name="plan_trained", label="plan", checkpoint="merge", plan=PLAN, trained=True),
)
SHARDED = EvaluateConfig(arms=ARMS, shard_questions=20, **QUICK)


@pytest.fixture(scope="module")
def evaluated(all_inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that SHARDED wrote by one worker: `out`, and the answers below `run`."""
    folder = tmp_path_factory.mktemp("evaluated")
    evaluate(stage_context("evaluate", folder / "out", all_inputs), SHARDED)
    return folder


def answers_of(folder: Path) -> pa.Table:
    return pq.read_table(folder / "out" / "samples.parquet").drop(["seconds", "batch_size"])


def test_evaluate_writes_results_that_the_report_reads(evaluated: Path, inputs: Inputs) -> None:
    out = evaluated / "out"
    results = Results.read(out / "results.json")
    raw = json.loads((out / "results.json").read_text())
    assert (raw["num_vision_tokens"], raw["num_layers"]) == (64, 4)
    assert [arm["tokens_per_layer"] for arm in raw["arms"]] == [[64] * 4] * 2 + [[64, 32, 8, 8]]
    plan = raw["arms"][2]
    assert plan["reduction"] == pytest.approx(1 - (64 + 32 + 8 + 8) / 4 / 64)
    assert 0 < plan["flops_reduction"] < 1 and 0 < plan["kv_reduction"] < plan["reduction"]
    assert plan["kv_measured_bytes"] < raw["arms"][0]["kv_measured_bytes"]
    assert plan["decode_tokens_per_s"]["median"] > 0
    assert plan["peak_memory_bytes"] >= plan["working_memory_bytes"] >= 0
    assert raw["curves"]["train-1 (no drop)"][-1][0] == CONFIG.steps
    assert len(results.arms) == 3 and results.control is not None
    table = pq.read_table(out / "samples.parquet").to_pylist()
    assert len(table) == 3 * raw["num_questions"] == 3 * 48
    for arm in raw["arms"]:
        own = [row["score"] for row in table if row["arm"] == arm["name"]]
        assert arm["accuracy"]["mean"] == pytest.approx(np.mean(own))
    row = table[0]
    assert (
        row["prompt"]
        == f"USER: <image>\n{Questions(inputs['data'][0] / 'test').entries[0].text} ASSISTANT:"
    )
    assert row["vision_tokens"] == 64 and 0 < row["text_tokens"] < 40
    assert 0 < row["generated_tokens"] <= 4 and row["seconds"] > 0


def test_any_number_of_workers_gives_the_same_answers(
    evaluated: Path, inputs: Inputs, tmp_path: Path
) -> None:
    """However they are cut into shards and batches, too."""
    ctx = stage_context("evaluate", tmp_path / "out", inputs)
    ctx.run = dataclasses.replace(ctx.run, num_workers=2, cpus_per_worker=0.5)
    evaluate(ctx, EvaluateConfig(arms=ARMS, shard_questions=10, batch_size=4, **QUICK))
    assert len(list((tmp_path / "run").rglob("*.parquet"))) == 3 * 5
    assert answers_of(tmp_path).equals(answers_of(evaluated))


@pytest.mark.slow  # a C++ compiler takes minutes
def test_compiled_layers_give_the_same_answers(
    evaluated: Path, inputs: Inputs, tmp_path: Path
) -> None:
    config = SHARDED.model_copy(update={"compile": "layers"})
    evaluate(stage_context("evaluate", tmp_path / "out", inputs), config)
    assert answers_of(tmp_path).equals(answers_of(evaluated))


def test_a_second_attempt_answers_only_unfinished_shards(
    evaluated: Path, inputs: Inputs, tmp_path: Path
) -> None:
    shutil.copytree(evaluated / "run", tmp_path / "run")
    shards = sorted((tmp_path / "run").rglob("*.parquet"))
    before = {shard: shard.stat().st_mtime_ns for shard in shards}
    assert len(shards) == 3 * 3
    shards[1].unlink()
    evaluate(stage_context("evaluate", tmp_path / "out", inputs), SHARDED)
    after = {shard: shard.stat().st_mtime_ns for shard in shards}
    assert [shard for shard in shards if before[shard] != after[shard]] == [shards[1]]
    assert answers_of(tmp_path).equals(answers_of(evaluated))


def test_questions_without_pictures_have_results(small: Small, inputs: Any, tmp_path: Path) -> None:
    """Nothing can be reduced there; and what is timed has pictures where anything has."""
    rows = pq.read_table(small.prepared / "test").to_pylist()[:3]
    for row in rows[:2]:
        row |= {"pictures": [], "turns": row["turns"].replace("<image>", ""), "vision_tokens": 0}
    for name, some in (("mixed", rows), ("text", rows[:2])):
        (tmp_path / name / "test").mkdir(parents=True)
        table = pa.Table.from_pylist(some, schema=SCHEMA)
        pq.write_table(table, tmp_path / name / "test" / "0.parquet")
    mixed = Questions(tmp_path / "mixed" / "test")
    assert mixed.first(5) == [16, 17, 18, 19, 20]
    assert mixed.first(64) == list(range(16, 24))
    assert Questions(tmp_path / "text" / "test").first(5) == [0, 1, 2, 3, 4]
    inputs["data"] = (tmp_path / "text", DATA)
    ctx = stage_context("evaluate", tmp_path / "out", inputs)
    evaluate(ctx, EvaluateConfig(arms=ARMS[1:], **QUICK))
    found = Results.read(ctx.out / "results.json")
    assert (found.num_vision_tokens, found.num_questions, found.samples) == (0, 16, [])
    assert [arm.reduction for arm in found.arms] == [0, 0]


def test_failed_answers_are_counted_named_and_fail_the_stage(
    small: Small, inputs: Any, tmp_path: Path
) -> None:
    """One picture that can't be decoded: its questions are named, the other shards are kept."""
    rows = pq.read_table(small.prepared / "test").to_pylist()
    rows[2]["pictures"] = [rows[2]["pictures"][0][:40]]
    for split in ("test", "train"):
        (tmp_path / "data" / split).mkdir(parents=True)
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        pq.write_table(table, tmp_path / "data" / split / "0.parquet")
    inputs["data"] = (tmp_path / "data", DATA)
    ctx = stage_context("evaluate", tmp_path / "out", inputs)
    with pytest.raises(AnswersFailed, match=r"8 answers failed, 40 of 48 are kept") as caught:
        evaluate(ctx, EvaluateConfig(arms=ARMS[:1], shard_questions=8, batch_size=4, **QUICK))
    assert all(f"dense/test/{rows[2]['id']} (question" in name for name, _ in caught.value.failures)
    assert not (ctx.out / "results.json").exists()
    assert len(list((tmp_path / "run").rglob("*.parquet"))) == 5


def test_seeds_of_a_group_are_one_row(inputs: Any, tmp_path: Path) -> None:
    arms = [
        ARMS[0],
        *(
            ArmConfig(
                name=f"plan-{seed}", label="plan", checkpoint=checkpoint, plan=PLAN, trained=True,
                group="plan", seed=seed,
            )
            for seed, checkpoint in ((0, "base"), (1, "merge"))
        ),
    ]  # fmt: skip
    ctx = stage_context("evaluate", tmp_path / "out", inputs)
    evaluate(ctx, EvaluateConfig(arms=tuple(arms), control="dense", **QUICK))
    rows = Results.read(ctx.out / "results.json").arms
    assert [row.name for row in rows] == ["dense", "plan"]
    assert [seed.seed for seed in rows[1].seeds] == [0, 1]
    single = [seed.accuracy for seed in rows[1].seeds]
    assert rows[1].accuracy.mean == pytest.approx(np.mean(single))
    assert rows[1].difference is not None
    assert rows[1].difference.mean == pytest.approx(rows[1].accuracy.mean - rows[0].accuracy.mean)
    assert rows[0].over_seeds is None and rows[1].over_seeds is not None
    assert rows[1].over_seeds.mean == pytest.approx(np.mean(single))
    assert rows[1].difference_over_seeds is None  # the control has one training, not two


@pytest.mark.parametrize(
    ("arms", "says"),
    [
        ([{"name": "a/b"}], "arms a/b: names are unique"),
        ([{"name": "a", "plan": PLAN, "method": {"name": "fastv", "average": 22}}], "one of them"),
        ([{"name": "a", "group": "g"}, {"name": "b", "group": "g"}], "a seed of their own"),
        ([{"name": "a", "group": "g", "plan": PLAN}, {"name": "b", "group": "g"}], "different"),
    ],
)
def test_arms_that_make_no_table_are_refused(arms: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        EvaluateConfig(arms=tuple(ArmConfig(label="x", checkpoint="base", **arm) for arm in arms))


def test_a_plan_that_drops_nothing_is_reported() -> None:
    with pytest.raises(MethodError, match="'plan:' drops nothing: write dense"):
        parse_method("plan:")


@pytest.mark.parametrize("text", ["fastv", "fastv:", "fastv:x", "plan", "fastv:22,k", ":3"])
def test_what_is_no_method_is_refused(text: str) -> None:
    with pytest.raises(MethodError, match="is not a method: write dense, plan"):
        parse_method(text)


def test_options_that_are_no_yaml_are_named_with_their_method() -> None:
    with pytest.raises(MethodError, match=r"the options of 'fastv:22,layer=\[' can't be read"):
        parse_method("fastv:22,layer=[")


def test_answers_do_not_depend_on_the_batch(small: Small, merged: Path) -> None:
    questions = Questions(small.prepared / "test").load(range(12))
    model = adsc.from_pretrained(merged).eval()
    processor = AutoProcessor.from_pretrained(merged)
    together = generate_answers(model, processor, questions, 12, 4)
    assert together == generate_answers(model, processor, questions, 1, 4)


def test_batches_follow_from_the_questions_and_hold_each_once(small: Small) -> None:
    questions = Questions(small.prepared / "test")
    tokenizer = AutoProcessor.from_pretrained(small.base).tokenizer
    batches = questions.batches(range(8, 40), 5, tokenizer)
    assert sorted(number for batch in batches for number in batch) == list(range(8, 40))
    lengths = [
        [len(tokenizer(questions.entries[number].text)["input_ids"]) for number in batch]
        for batch in batches
    ]
    assert all(min(a) >= max(b) for a, b in itertools.pairwise(lengths))


def test_an_answer_knows_its_tokens_and_its_end(small: Small, merged: Path) -> None:
    """Against one row alone, decoded token by token with the model's forward."""
    questions = Questions(small.prepared / "test").load(range(6))
    model = adsc.from_pretrained(merged).eval()
    processor = AutoProcessor.from_pretrained(merged)
    answers = generate_batch(model, processor, questions, 4)
    adsc.detach(model)
    adsc.attach(model, PLAN)
    end = model.generation_config.eos_token_id
    for question, answer in zip(questions, answers, strict=True):
        inputs = build_inputs([question], processor)
        ids: list[int] = []
        with torch.inference_mode():
            while len(ids) < 4 and end not in ids:
                more = torch.cat([inputs["input_ids"], torch.tensor([ids], dtype=torch.long)], 1)
                inputs_now = {**inputs, "input_ids": more, "attention_mask": torch.ones_like(more)}
                ids.append(int(model(**inputs_now).logits[0, -1].argmax()))
        assert answer.generated_tokens == len(ids) and answer.finished == (end in ids)
        assert answer.text == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert answer.vision_tokens + answer.text_tokens == inputs["input_ids"].shape[1]


def test_broken_weights_are_no_empty_answer(small: Small) -> None:
    model = adsc.from_pretrained(small.base).eval()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    processor = AutoProcessor.from_pretrained(small.base)
    questions = Questions(small.prepared / "test").load([0])
    with pytest.raises(GenerationError, match=r"rows \[0\] are NaN"):
        generate_batch(model, processor, questions, 4)


def test_each_method_is_measured(small: Small, merged: Path) -> None:
    model = adsc.from_pretrained(merged).eval()
    questions = Questions(small.prepared / "test").load([0])
    inputs = build_inputs(questions, AutoProcessor.from_pretrained(merged))
    plans = [adsc.PruningPlan.parse(""), adsc.PruningPlan.parse(PLAN)]
    found = measure(model, inputs, plans, rounds=3, decode_rounds=2, decode_tokens=3)
    text = inputs["input_ids"].shape[1] - 64
    for one, plan in zip(found, plans, strict=True):
        for name in ("prefill_ms", "decode_tokens_per_s"):
            assert 0 < one[name]["low"] <= one[name]["median"] <= one[name]["high"]
        cost = adsc.estimate_cost(model.config, plan, text_tokens=text)
        assert one["kv_measured_bytes"] == cost.kv_cache_bytes
        assert one["peak_memory_bytes"] > one["working_memory_bytes"]
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


def test_a_question_has_its_own_pictures(small: Small, tmp_path: Path) -> None:
    """Those of its turn in their places, else those of the turns before; and intervals know which
    questions are about the same ones, whatever their records are called."""
    rows = pq.read_table(small.prepared / "test").to_pylist()[:3]
    a, b, c = (row["pictures"][0] for row in rows)

    def talk(*questions: str) -> str:
        return json.dumps(
            [turn for text in questions for turn in (("human", text), ("gpt", "bag"))]
        )

    rows[0] |= {"pictures": [a, b], "turns": talk("A <image> or B <image>?", "and both?")}
    rows[1] |= {"pictures": [c], "turns": talk("hello", "<image>\nwhat?", "and now?")}
    rows[2] |= {"pictures": [a, c], "turns": talk("what?<image>", "and <image>this?")}
    for row in rows:
        row |= {"kinds": [], "id": "same"}
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "0.parquet")
    questions = Questions(tmp_path)
    loaded = questions.load(range(len(questions)))
    assert [question.pictures for question in loaded] == [
        (a, b), (a, b), (), (c,), (c,), (a,), (c,),
    ]  # fmt: skip
    processor = AutoProcessor.from_pretrained(small.base)
    assert [render_prompt(question, processor) for question in loaded] == [
        "USER: A <image>\n or B <image>\n? ASSISTANT:",
        "USER: <image>\n<image>\nand both? ASSISTANT:",
        "USER: hello ASSISTANT:",
        "USER: <image>\nwhat? ASSISTANT:",
        "USER: <image>\nand now? ASSISTANT:",
        "USER: <image>\nwhat? ASSISTANT:",
        "USER: <image>\nand this? ASSISTANT:",
    ]
    scenes = questions.scenes()
    assert [scenes.index(scene) for scene in scenes] == [0, 0, 2, 3, 3, 5, 3]


def test_records_without_kinds_or_pictures_are_evaluated_too(small: Small, tmp_path: Path) -> None:
    """LLaVA-665K names no kinds of question, and holds conversations about no picture."""
    rows = pq.read_table(small.prepared / "test").to_pylist()[:2]
    for row in rows:
        row["kinds"] = []
    rows[1]["pictures"] = []
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "0.parquet")
    everything = Questions(tmp_path)
    questions = everything.load(range(len(everything)))
    assert {question.kind for question in questions} == {"other"}
    assert set(majority_answers(PreparedData(tmp_path))) == {"other"}
    model = adsc.from_pretrained(small.base).eval()
    processor = AutoProcessor.from_pretrained(small.base)
    mixed = [questions[0], questions[-1]]
    assert [len(question.pictures) for question in mixed] == [1, 0]
    together = generate_answers(model, processor, mixed, 2, 3)
    assert together == generate_answers(model, processor, mixed, 1, 3)

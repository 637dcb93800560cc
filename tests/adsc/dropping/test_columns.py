"""Callers that index columns of what they passed in, from either end: each finds there what a row
alone has there, whichever side it is padded on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import adsc
from tests.adsc.attached import STAGES, attached
from tests.adsc.rows import ANSWERS, PROMPTS, both_sides
from tests.adsc.tiny import IMAGE, PAD, TOKENS, alone, batch, llava, pixels, reference, row
from tests.adsc.zoo import CASES
from tests.matrix import matrix

CLOSE = {"rtol": 0, "atol": 5e-5}


def wanted_at(inputs: dict[str, Tensor], index: int, columns: list[int]) -> dict[int, Tensor]:
    """Logits of a row alone, by the slow reference, at those of these columns that are no padding:
    of the last column up to each that is left."""
    logits, left = reference(llava(), alone(inputs, index), STAGES)
    seen = inputs["attention_mask"][index]
    numbers = seen.cumsum(0) - 1
    found = {}
    for column in columns:
        before = [slot for slot, c in enumerate(left) if c <= int(numbers[column])]
        if seen[column] and before:
            found[column] = logits[before[-1]]
    return found


@matrix(count=[1, 3, 6, 9, 30, 99], side=["left", "right", "both"])
def test_the_last_columns_are_those_of_each_row_alone(count, side):
    if side == "both":
        inputs = both_sides(PROMPTS, ANSWERS)
    else:
        inputs = batch([p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)], side)
    width = inputs["input_ids"].shape[1]
    columns = list(range(max(width - count, 0), width))
    with torch.no_grad():
        got = attached()(**inputs, logits_to_keep=count)
    assert got.logits.shape[:2] == (4, len(columns)) == got.kept_positions[-1].shape
    for index in range(4):
        for column, logits in wanted_at(inputs, index, columns).items():
            place = column - columns[0]
            torch.testing.assert_close(got.logits[index, place], logits, **CLOSE)


@pytest.mark.parametrize("side", ["right", "both"])
def test_all_logits_end_where_the_columns_end(side):
    """Older callers pass no logits_to_keep and slice the last columns themselves."""
    if side == "both":
        inputs = both_sides(PROMPTS, ANSWERS)
    else:
        inputs = batch([p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)], side)
    width, count = inputs["input_ids"].shape[1], 6
    columns = list(range(width - count, width))
    with torch.no_grad():
        output = attached()(**inputs)
    got = output.logits[:, -count:]
    checked = 0
    for index in range(4):
        for column, logits in wanted_at(inputs, index, columns).items():
            torch.testing.assert_close(got[index, column - columns[0]], logits, **CLOSE)
            checked += 1
    assert checked >= 6
    assert output.kept_positions[-1].shape == output.logits.shape[:2]
    spread = adsc.full_length_logits(output, inputs["input_ids"])
    for index in range(4):
        for column, logits in wanted_at(inputs, index, list(range(width))).items():
            torch.testing.assert_close(spread[index, column], logits, **CLOSE)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.integers(0, 4), min_size=1, max_size=4),
            st.integers(1, 5),
            st.integers(0, 3),
            st.integers(0, 3),
        ),
        min_size=1,
        max_size=4,
    ),
    count=st.integers(1, 12),
    plan=st.sampled_from(
        ["2:1/2,4:1/4", "0:1/4", "1:1/16;anchor=first", "1:1/4,4:0;pool=tiles", "2:1/2;pool=runs"]
    ),
)
def test_any_batch_padded_anyhow(rows, count, plan):
    """Each row with padding of its own at both ends; the last logits are those of the row alone."""
    texts = [row(*parts, answer, seed=n) for n, (parts, answer, _, _) in enumerate(rows)]
    width = max(
        left + len(text) + right for text, (_, _, left, right) in zip(texts, rows, strict=True)
    )
    ids, mask = [], []
    for text, (_, _, _, right) in zip(texts, rows, strict=True):
        left = width - len(text) - right
        ids.append([PAD] * left + text + [PAD] * right)
        mask.append([0] * left + [1] * len(text) + [0] * right)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    images = sum(text.count(IMAGE) // TOKENS for text in texts)
    if not images:
        return
    inputs["pixel_values"] = pixels(images)
    model = adsc.attach(llava(), plan, logits="full")
    with torch.no_grad():
        every = model(**inputs).logits
        last = adsc.attach(model, plan, logits="kept")(**inputs, logits_to_keep=count).logits
    assert every.shape[:2] == inputs["input_ids"].shape
    torch.testing.assert_close(last, every[:, -count:], **CLOSE)
    for index in range(len(rows)):
        single = alone(inputs, index)
        with torch.no_grad():
            output = model(**single)
        kept = range(single["input_ids"].shape[1])
        if hasattr(output, "kept_positions"):
            kept = output.kept_positions[-1][0].tolist()
        start = int(inputs["attention_mask"][index].argmax())
        for slot, column in enumerate(kept):
            torch.testing.assert_close(
                every[index, start + column], output.logits[0, slot], **CLOSE
            )


@pytest.mark.parametrize("name", ["fastv", "sparsevlm"])
def test_the_last_columns_under_a_method(name):
    """The choice is made inside the call, after its layout was begun."""
    prompts, answers = [PROMPTS[0], PROMPTS[3]], [ANSWERS[0], ANSWERS[1]]
    inputs = both_sides(prompts, answers)
    model = llava()
    adsc.attach(model, adsc.peers.make(name, model, average=8))
    with torch.no_grad():
        got = model(**inputs, logits_to_keep=6).logits
        for index in range(2):
            single = alone(inputs, index)
            size = len(answers[index])
            wanted = model(**single, logits_to_keep=size + 1).logits[0]
            start = 6 - 5 - 1
            torch.testing.assert_close(got[index, start : start + size + 1], wanted, **CLOSE)


@pytest.mark.parametrize("count", [2, 6, 17, 20])
def test_near_an_image_dropped_columns_have_the_last_kept_ones(count):
    """The last six columns of a prompt that ends in an image and two words aren't the last six that
    are left."""
    inputs = batch([row(3, 0, 2)])
    with torch.no_grad():
        got = attached()(**inputs, logits_to_keep=count).logits[0]
    columns = list(range(21 - count, 21))
    for column, logits in wanted_at(inputs, 0, columns).items():
        torch.testing.assert_close(got[column - columns[0]], logits, **CLOSE)


def test_columns_as_tensors_of_each_kind():
    inputs = both_sides(PROMPTS[:2], ANSWERS[:2])
    width = inputs["input_ids"].shape[1]
    model = attached()
    with torch.no_grad():
        every = adsc.attach(llava(), "2:1/2,4:1/4", logits="full")(**inputs).logits
        listed = model(**inputs, logits_to_keep=torch.tensor([5, 20, -3])).logits
        each = torch.tensor([[1, 30], [2, -1]])
        of_rows = model(**inputs, logits_to_keep=each).logits
        mask = torch.zeros(2, width, dtype=torch.bool)
        mask[0, 4], mask[1, 7:9] = True, True
        flat = model(**inputs, logits_to_keep=mask).logits
    torch.testing.assert_close(listed, every[:, [5, 20, -3]], **CLOSE)
    torch.testing.assert_close(
        of_rows, every.gather(1, (each % width)[..., None].expand(-1, -1, 100)), **CLOSE
    )
    torch.testing.assert_close(flat, every[mask], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_full_logits_give_the_same_loss(side):
    inputs = both_sides(PROMPTS, ANSWERS) if side == "both" else batch(PROMPTS, side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        packed = attached()(**inputs, labels=labels)
        full = adsc.attach(llava(), "2:1/2,4:1/4", logits="full")(**inputs, labels=labels)
    assert full.logits.shape[1] == labels.shape[1]
    torch.testing.assert_close(full.loss, packed.loss, **CLOSE)
    total, number = torch.zeros(()), 0
    for index in range(4):
        single = alone(inputs, index)
        marks = single["input_ids"]  # nothing predicts the first column
        with torch.no_grad():
            one = attached()(**single, labels=marks).loss
        count = int((marks[0, 1:] != IMAGE).sum())
        total, number = total + one * count, number + count
    torch.testing.assert_close(packed.loss, total / number, **CLOSE)


def test_mixed_sides_with_labels_end_where_the_columns_end():
    inputs = both_sides(PROMPTS, ANSWERS)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model = attached()
    with torch.no_grad():
        with_labels, without = model(**inputs, labels=labels), model(**inputs)
    torch.testing.assert_close(with_labels.logits, without.logits)


def test_generating_behind_padding_is_refused():
    """transformers counts positions of a row that ends in padding from 1 again."""
    inputs = batch(PROMPTS, "right")
    model = attached()
    with pytest.raises(adsc.CacheError, match=r"rows end in padding.*pad prompts on the left"):
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    even = batch([PROMPTS[0], PROMPTS[0]], "right")
    new = model.generate(**even, max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert new.shape[1] == len(PROMPTS[0]) + 2


def classifier() -> Any:
    torch.manual_seed(0)
    config = CASES["gemma3"].build().config
    config.num_labels = 3
    return hf.Gemma3ForSequenceClassification(config).eval()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_classifier_reads_each_rows_last_token(side):
    case = CASES["gemma3"]
    pictures = case.pictures(None)
    rows = [[3, pictures[0], 4], [6], [pictures[1], 2, pictures[2], 5]]
    inputs, model = case.batch(rows, side), adsc.attach(classifier(), "2:1/4")
    with torch.no_grad():
        got = model(**inputs, labels=torch.tensor([0, 2, 1]))
        assert got.logits.shape == (3, 3) and got.loss.isfinite()
        for index, one in enumerate(rows):
            wanted = model(**case.batch([one])).logits[0]
            torch.testing.assert_close(got.logits[index], wanted, **CLOSE)
        moved = adsc.detach(model)(**inputs).logits
    assert not torch.allclose(moved[0], got.logits[0], atol=1e-3)


def test_an_unknown_word_for_logits_is_refused():
    with pytest.raises(adsc.PlanError, match="logits 'all' is unknown; choose one of kept, full"):
        adsc.attach(llava(), "2:1/2", logits="all")


@pytest.mark.parametrize("strict", [True, False])
def test_tuples_are_laid_out_too(strict):
    inputs = both_sides(PROMPTS[:2], ANSWERS[:2])
    model = attached()
    with torch.no_grad():
        wanted = model(**inputs, logits_to_keep=4).logits
        got = model(**inputs, logits_to_keep=4, return_dict=False)[0]
        states = model.model(**inputs, logits_to_keep=4, return_dict=strict)[0]
    assert torch.equal(got, wanted)
    assert torch.equal(model.lm_head(states), wanted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_metrics_of_full_logits_are_those_of_kept_logits(side):
    """Slots that hold a column again are no columns of their own."""
    inputs = batch([row(3, 0, 5), row(2, 0, 3, 0, 4)], side)
    labels = inputs["input_ids"]
    with torch.no_grad():
        kept = attached()(**inputs, labels=labels)
        full = adsc.attach(llava(), "2:1/2,4:1/4", logits="full")(**inputs, labels=labels)
    wanted = adsc.full_length_logits(kept, labels)
    got = adsc.full_length_logits(full, labels)
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[seen], wanted[seen], **CLOSE)


def test_full_logits_stay_when_another_plan_is_attached():
    """A caller that pairs logits with columns goes on doing so under the next plan."""
    inputs = batch([row(3, 0, 5)])
    columns = inputs["input_ids"].shape[1]
    model = adsc.attach(llava(), "2:1/2,4:1/4", logits="full")
    with torch.no_grad():
        assert adsc.attach(model, "2:1/4")(**inputs).logits.shape[1] == columns
        kept = adsc.attach(model, "2:1/4", logits="kept")(**inputs)
        assert kept.logits.shape[1] < columns
        assert adsc.attach(model, "2:1/2")(**inputs).logits.shape[1] < columns

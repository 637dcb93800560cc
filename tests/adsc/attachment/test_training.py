"""Training an attached model: the Trainer, packed samples, autocast; what a call hands back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import adsc
from tests.adsc.attached import STAGES, attached, group_of_one
from tests.adsc.rows import Rows, collate
from tests.adsc.tiny import IMAGE, alone, batch, llava, pixels, reference, row, states

CLOSE = {"rtol": 0, "atol": 5e-5}


def test_hidden_states_and_attentions_have_the_lengths_that_layers_saw():
    model = attached()
    model.set_attn_implementation("eager")
    inputs = batch([row(3, 0, 5), row(6)])
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
    widths = [kept.shape[1] for kept in output.kept_positions]
    assert widths == [24, 24, 16, 16, 10, 10]
    assert [one.shape[-1] for one in output.attentions] == widths
    assert [one.shape[1] for one in output.hidden_states[1:]] == widths
    for index in range(2):
        single = alone(inputs, index)
        seen = inputs["attention_mask"][index].cumsum(0) - 1
        layers = states(llava(), single, STAGES)
        for number, (wanted, columns) in enumerate(layers[:-1]):
            kept = output.kept_positions[number][index]
            assert seen[kept[kept >= 0]].tolist() == columns
            got = output.hidden_states[number + 1][index][kept >= 0]
            torch.testing.assert_close(got, wanted[0], **CLOSE)


def test_logits_of_picked_columns():
    model = attached()
    inputs = batch([row(3, 0, 5), row(3, 0, 5, seed=4)])
    with torch.no_grad():
        every = model(**inputs).logits
        last = model(**inputs, logits_to_keep=2).logits
        picked = model(**inputs, logits_to_keep=torch.tensor([1, 19, -1])).logits
    torch.testing.assert_close(last, every[:, -2:])
    torch.testing.assert_close(picked, every[:, [1, 5, -1]])
    with torch.no_grad():  # a dropped column has those of the last one before it that was kept
        dropped = model(**inputs, logits_to_keep=torch.tensor([3])).logits
    torch.testing.assert_close(dropped, every[:, [2]])


@pytest.mark.parametrize("positions", ["keep", "reindex"])
def test_packed_samples_are_as_if_alone(positions):
    samples = [row(3, 0, 5), row(2, 0, 0, 4), row(4)]
    ids = torch.tensor([[word for sample in samples for word in sample]])
    restart = torch.tensor([[i for sample in samples for i in range(len(sample))]])
    model = attached(positions=positions)
    with torch.no_grad():
        output = model(input_ids=ids, position_ids=restart, pixel_values=pixels(3), use_cache=False)
    start, pictures = 0, pixels(3).split([1, 2])
    kept = output.kept_positions[-1][0]
    for index, sample in enumerate(samples):
        single = {"input_ids": torch.tensor([sample])}
        if IMAGE in sample:
            single["pixel_values"] = pictures[index]
        wanted, columns = reference(llava(), single, STAGES, positions=positions)
        mine = (kept >= start) & (kept < start + len(sample))
        assert (kept[mine] - start).tolist() == columns
        torch.testing.assert_close(output.logits[0, mine], wanted, **CLOSE)
        start += len(sample)


def test_a_square_mask_of_the_caller_is_cut_to_what_is_left():
    model = attached()
    inputs = batch([row(3, 0, 5)])
    mask = torch.ones(24, 24).tril().bool()[None, None]
    given = inputs | {"attention_mask": mask}
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits, model(**inputs).logits, **CLOSE)


def test_autocast_stays_near_full_precision_and_keeps_the_lengths():
    model = attached().train()
    inputs = batch([row(3, 0, 5), row(6)], "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    wanted = model(**inputs, labels=labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs, labels=labels)
    output.loss.backward()
    assert output.logits.shape == wanted.logits.shape
    assert output.logits.dtype == torch.bfloat16
    torch.testing.assert_close(output.loss, wanted.loss, rtol=0.05, atol=0)


def _train(model: Any, path: Any, **arguments: Any) -> list[float]:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(path),
            max_steps=4,
            per_device_train_batch_size=4,
            logging_steps=1,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        data_collator=collate,
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_trainer_runs_unchanged_and_moves_the_declared_parameters(tmp_path):
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj")
    torch.manual_seed(0)
    model = get_peft_model(attached(), config)
    before = {name: value.clone() for name, value in model.named_parameters()}
    losses = _train(model, tmp_path)
    moved = {n for n, value in model.named_parameters() if not torch.equal(value, before[n])}
    assert moved == {name for name in before if "lora_" in name}
    assert losses[-1] < losses[0]


def test_ddp_around_an_attached_model_changes_nothing():
    inputs = collate([row(3, 0, 5), row(2, 0, 3, 0, 4), row(6)])
    with group_of_one():
        wrapped = torch.nn.parallel.DistributedDataParallel(
            attached().train(), find_unused_parameters=True
        )
        assert adsc.plan_of(wrapped) == adsc.PruningPlan(stages=STAGES)
        wrapped(**inputs).loss.backward()
    alone_model = attached().train()
    alone_model(**inputs).loss.backward()
    wanted = dict(alone_model.named_parameters())
    for name, parameter in wrapped.module.named_parameters():
        if wanted[name].grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[name].grad)

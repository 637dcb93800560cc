"""Other people's training loops around an attached model: transformers' Trainer, trl's SFT."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig, get_peft_model
from PIL import Image as Picture
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import adsc
from tests.adsc.attached import attached
from tests.adsc.rows import Rows, collate
from tests.adsc.tiny import IMAGE, TOKENS, batch, pixels, processor, row

LORA = LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj")
OURS = "with a pruning plan they have no loss"
QUIET: dict[str, Any] = {
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 1,
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0,
}


def conversations() -> Dataset:
    """Four rows with one picture, two, and a short and a long answer."""
    pictures = [Picture.new("RGB", (40, 32 + 9 * i), (40 * i, 90, 200 - 30 * i)) for i in range(5)]
    prompts = ["w5 <image> w7 w8", "<image> w9 <image>", "w4 w6 w8 <image> w3", "<image> w11"]
    answers = [" w20 w21", " w30 w31 w32 w33 w34", " w40", " w50 w51 w52"]
    rows = {
        "images": [pictures[:1], pictures[1:3], pictures[3:4], pictures[4:]],
        "prompt": prompts,
        "completion": answers,
    }
    text = Value("string")
    features = Features({"images": List(Image()), "prompt": text, "completion": text})
    return Dataset.from_dict(rows, features=features)


def sft(path: Any, data: Dataset, model: Any = None, **more: Any) -> SFTTrainer:
    torch.manual_seed(0)
    settings = {
        "output_dir": str(path),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "max_length": None,
        "bf16": False,
        "activation_checkpointing": False,
    }
    return SFTTrainer(
        model=attached() if model is None else model,
        args=SFTConfig(**QUIET | settings | more),
        train_dataset=data,
        eval_dataset=data,
        processing_class=processor(),
        peft_config=LORA,
    )


def test_sft_trainer_equals_the_plain_loop(tmp_path):
    data = conversations()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{OURS}")
        trainer = sft(tmp_path, data)
        whole = trainer.data_collator([dict(one) for one in data])
        plain = get_peft_model(attached(), LORA).train()  # trl binds forward: no copies
        plain.load_state_dict(trainer.model.state_dict())
        before = {name: value.clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        evaluated = trainer.evaluate()
    history = [one for one in trainer.state.log_history if "loss" in one]

    wanted = []
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        output = plain(**whole)
        wanted.append(output.loss.item())
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [one["loss"] for one in history] == pytest.approx(wanted, abs=1e-5)
    assert wanted[-1] < wanted[0] - 1e-3
    moved = {
        n for n, value in trainer.model.named_parameters() if not torch.equal(value, before[n])
    }
    assert moved == {name for name in before if "lora_" in name}
    trained = dict(plain.named_parameters())
    for name in moved:
        torch.testing.assert_close(
            trainer.model.get_parameter(name), trained[name], atol=1e-6, rtol=0
        )

    # Its own metric pairs tokens with what predicted them, as ours does.
    with torch.no_grad():
        output = plain.eval()(**whole)
    logits = adsc.full_length_logits(output, whole["labels"])
    hits, counted = _hits(logits, whole["labels"])
    assert evaluated["eval_mean_token_accuracy"] == pytest.approx(_by_batch(plain, data, trainer))
    assert counted == int((whole["labels"] != -100).sum()) == 11
    assert 0 <= hits <= counted


def _hits(logits: torch.Tensor, labels: torch.Tensor) -> tuple[int, int]:
    right = logits[:, :-1].argmax(-1) == labels[:, 1:]
    seen = labels[:, 1:] != -100
    return int(right[seen].sum()), int(seen.sum())


@torch.no_grad()
def _by_batch(model: Any, data: Dataset, trainer: SFTTrainer) -> float:
    """The mean over batches of each batch's share of tokens, which is how trl averages."""
    shares = []
    size = trainer.args.per_device_eval_batch_size
    for start in range(0, len(data), size):
        given = trainer.data_collator([dict(data[i]) for i in range(start, min(start + size, 4))])
        hits, counted = _hits(
            adsc.full_length_logits(model(**given), given["labels"]), given["labels"]
        )
        shares.append(hits / counted)
    return sum(shares) / len(shares)


def test_labels_of_vision_tokens_that_a_trainer_counts_are_warned_about(tmp_path):
    data = conversations()
    texts = [f"{one['prompt']}{one['completion']}" for one in data]
    data = data.add_column("text", texts).remove_columns(["prompt", "completion"])
    trainer = sft(tmp_path, data, max_steps=1, remove_unused_columns=False)
    with pytest.warns(UserWarning, match="labels hold (32|48) vision tokens beside"):
        trainer.train()


def _accuracy(prediction: Any) -> dict[str, float]:
    right = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
    return {"accuracy": float(right[prediction.label_ids[:, 1:] != -100].mean())}


def _evaluating(model: Any, path: Any, **more: Any) -> Trainer:
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(path), per_device_eval_batch_size=3, **QUIET),
        eval_dataset=Rows(),
        data_collator=collate,
        compute_metrics=_accuracy,
        **more,
    )


@pytest.mark.parametrize("anchor", ["last", "first"])
def test_the_trainer_evaluates_metrics_on_labels_of_full_length(tmp_path, anchor):
    model = attached(anchor=anchor)
    trainer = _evaluating(
        model,
        tmp_path,
        preprocess_logits_for_metrics=lambda given, labels: adsc.full_length_logits(
            given, labels
        ).argmax(-1),
    )
    got = trainer.evaluate()
    right, losses, counted = 0, 0.0, 0
    for index in range(8):  # each row alone, logits at the columns that are left
        inputs = collate([Rows()[index]])
        with torch.no_grad():
            output = model(**inputs)
        labels = inputs["labels"]
        if "kept_positions" in output:
            labels = labels.gather(1, output.kept_positions[-1])
        seen = labels[0, 1:] != -100
        right += int((output.logits[0, :-1].argmax(-1) == labels[0, 1:])[seen].sum())
        counted += int(seen.sum())
        losses += output.loss.item() * int(seen.sum())
    assert got["eval_accuracy"] == pytest.approx(right / counted)
    assert np.isfinite(got["eval_loss"])


def test_metrics_without_the_kept_positions_are_refused():
    labels = torch.zeros(1, 24)
    with pytest.raises(adsc.VisionTokenError, match="logits of 10 columns for labels of 24"):
        adsc.full_length_logits(torch.zeros(1, 10, 5), labels)
    assert adsc.full_length_logits((torch.zeros(1, 24, 5),), labels).shape == (1, 24, 5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_full_length_logits_are_those_of_the_last_kept_column(side):
    inputs = batch([row(3, 0, 5), row(2, 0, 3, 0, 4), row(6)], side)
    with torch.no_grad():
        output = attached()(**inputs)
    spread = adsc.full_length_logits(output, inputs["input_ids"])
    for one, kept, logits, seen in zip(
        spread, output.kept_positions[-1], output.logits, inputs["attention_mask"], strict=True
    ):
        columns = kept[kept >= 0].tolist()
        for column in seen.nonzero().flatten().tolist():
            last = max(place for place in columns if place <= column)
            assert torch.equal(one[column], logits[kept == last][0])


def test_kept_positions_are_a_field_of_the_output():
    inputs = batch([row(3, 0, 5)])
    output = attached()(**inputs)
    assert list(output)[-1] == "kept_positions"
    again = pickle.loads(pickle.dumps(output))
    assert type(again).__name__ == type(output).__name__ == "LlavaCausalLMOutputWithPast"
    assert torch.equal(again.kept_positions[-1], output.kept_positions[-1])
    leaves, shape = torch.utils._pytree.tree_flatten(output)
    assert torch.utils._pytree.tree_unflatten(leaves, shape).kept_positions[-1] is not None
    assert "kept_positions" not in attached()(**batch([row(5)]))


def _with_own_pictures(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Each row's pictures follow from its words, whatever batch it is in."""
    inputs = collate(rows)
    drawn = [pixels(one.count(IMAGE) // TOKENS, seed=sum(one)) for one in rows]
    return inputs | ({"pixel_values": torch.cat(drawn)} if "pixel_values" in inputs else {})


def test_the_trainer_with_accumulated_steps_equals_the_whole_batch(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(attached(), LORA).train()
    plain = copy.deepcopy(model)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_steps=2,
            **QUIET,
        ),
        train_dataset=Rows(),
        data_collator=_with_own_pictures,
    )
    trainer.train()
    losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    whole = _with_own_pictures([Rows()[index] for index in range(8)])
    assert (whole["labels"][whole["input_ids"] == IMAGE] == -100).all()
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.05)
    for loss in losses:
        output = plain(**whole)
        assert loss == pytest.approx(output.loss.item(), abs=1e-5)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

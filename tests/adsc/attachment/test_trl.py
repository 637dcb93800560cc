"""trl's trainers that take log-probabilities of completions: with an attached model they are those
of each row alone, whatever is padded where."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig
from PIL import Image as Picture
from torch import Tensor
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from trl.trainer.utils import add_fused_lm_head

import adsc
from tests.adsc.attached import STAGES, attached
from tests.adsc.rows import ANSWERS, PROMPTS, both_sides
from tests.adsc.tiny import IMAGE, alone, batch, llava, processor, reference

CLOSE = {"rtol": 0, "atol": 5e-5}
LORA = LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj")
CHAT = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }} "
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
)
QUIET: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "logging_steps": 1,
    "learning_rate": 0.05,
    "gradient_checkpointing": False,
}


def log_probs(inputs: dict[str, Tensor], index: int, size: int) -> Tensor:
    """(size,) log-probabilities of a row's last words, by the slow reference on the row alone."""
    single = alone(inputs, index)
    logits, _ = reference(llava(), single, STAGES)
    words = single["input_ids"][0, -size:]
    return logits[-size - 1 : -1].log_softmax(-1).gather(1, words[:, None])[:, 0]


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_the_fused_head_pairs_states_and_labels(side):
    rows = [p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    inputs = both_sides(PROMPTS, ANSWERS) if side == "both" else batch(rows, side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == IMAGE, -100)
    model = attached()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    with torch.no_grad():
        got = model(**inputs, labels=labels, fused_lm_head=True)
    assert got.log_probs.shape[1] == labels.shape[1] - 1
    for index, answer in enumerate(ANSWERS):
        last = int(inputs["attention_mask"][index].nonzero()[-1])
        mine = got.log_probs[index, last - len(answer) : last]
        torch.testing.assert_close(mine, log_probs(inputs, index, len(answer)), **CLOSE)


def chat() -> Any:
    made = processor()
    made.chat_template = made.tokenizer.chat_template = CHAT
    return made


def pictures(count: int) -> list[Any]:
    return [Picture.new("RGB", (40, 32 + 9 * i), (40 * i, 90, 200 - 30 * i)) for i in range(count)]


def talk(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Another one for each of two completions of a prompt, so that there is something to learn."""
    return [float(number % 2) for number, _ in enumerate(completions)]


@pytest.mark.parametrize(
    ("trainer", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)]
)
def test_policy_gradients(tmp_path, trainer, config):
    prompts = ["w5 w7 w8", "w9", "w4 w6 w8 w3 w11 w12", "w11 w13"]
    data = Dataset.from_dict({"prompt": list(map(talk, prompts)), "image": pictures(4)})
    data = data.cast_column("image", Image())
    torch.manual_seed(0)
    made = trainer(
        model=attached(),
        reward_funcs=reward,
        args=config(
            output_dir=str(tmp_path),
            num_generations=2,
            max_completion_length=5,
            beta=0.1,
            **QUIET,
        ),
        train_dataset=data,
        processing_class=chat(),
        peft_config=LORA,
    )
    inputs = both_sides(PROMPTS, ANSWERS)
    counts = [ids.count(IMAGE) // 16 for ids in PROMPTS]
    count = inputs["input_ids"].shape[1] - max(map(len, PROMPTS))
    made.model.eval()
    with torch.no_grad():
        got = made._get_per_token_logps_and_entropies(
            made.model,
            inputs["input_ids"],
            inputs["attention_mask"],
            count,
            pixel_values=inputs["pixel_values"],
            num_images=counts,
        )[0]
    for index, answer in enumerate(ANSWERS):
        wanted = log_probs(inputs, index, len(answer))
        torch.testing.assert_close(got[index, : len(answer)], wanted, **CLOSE)
    before = {n: p.clone() for n, p in made.model.named_parameters() if "lora_B" in n}
    made.train()
    assert adsc.plan_of(made.model) is not None
    moved = [n for n, p in made.model.named_parameters() if n in before and not p.equal(before[n])]
    losses = [one["loss"] for one in made.state.log_history if "loss" in one]
    assert len(losses) == 2 and all(torch.tensor(losses).isfinite())
    assert moved


PREFERENCES = {
    "prompt": ["w5 <image> w7 w8", "<image> w9", "w4 w6 w8 <image> w3", "<image> w11"],
    "chosen": [" w20 w21", " w30 w31 w32 w33 w34", " w40", " w50 w51 w52"],
    "rejected": [" w22", " w35", " w41 w42 w43 w44", " w53 w54"],
}


def dataset(columns: dict[str, list[Any]], **kinds: Any) -> Dataset:
    features = {"images": List(Image())} | {name: Value("string") for name in columns} | kinds
    rows = {"images": [[one] for one in pictures(len(columns["prompt"]))], **columns}
    return Dataset.from_dict(rows, features=Features(features))


def by_hand(trainer: Any) -> tuple[dict[str, Tensor], list[float]]:
    """A batch of the trainer's, and the summed log-probability of each completion alone."""
    rows = [copy.deepcopy(dict(trainer.train_dataset[i])) for i in range(4)]
    inputs = trainer.data_collator(rows)
    kept = {n: inputs[n] for n in ("input_ids", "attention_mask", "pixel_values")}
    sizes = inputs["completion_mask"].sum(1).tolist()
    sums = [float(log_probs(kept, i, size).sum()) for i, size in enumerate(sizes)]
    return inputs, sums


def test_direct_preferences(tmp_path):
    trainer = DPOTrainer(
        model=attached(),
        args=DPOConfig(output_dir=str(tmp_path), max_length=None, **QUIET),
        train_dataset=dataset(PREFERENCES),
        processing_class=processor(),
        peft_config=LORA,
    )
    inputs, sums = by_hand(trainer)
    trainer.model.eval()
    with torch.no_grad():
        trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    metrics = trainer._metrics["eval"]
    assert metrics["logps/chosen"][-1] == pytest.approx(sum(sums[:4]) / 4, abs=1e-3)
    assert metrics["logps/rejected"][-1] == pytest.approx(sum(sums[4:]) / 4, abs=1e-3)
    trainer.train()
    losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[1] != losses[0]


def test_kahneman_tversky(tmp_path):
    labels = [True, False, True, False]
    columns = {
        "prompt": PREFERENCES["prompt"],
        "completion": PREFERENCES["chosen"],
        "label": labels,
    }
    trainer = KTOTrainer(
        model=attached(),
        args=KTOConfig(output_dir=str(tmp_path), max_length=None, **QUIET),
        train_dataset=dataset(columns, label=Value("bool")),
        processing_class=processor(),
        peft_config=LORA,
    )
    inputs, sums = by_hand(trainer)
    trainer.model.eval()
    with torch.no_grad():
        trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    metrics = trainer._metrics["eval"]
    chosen = [one for one, label in zip(sums, labels, strict=True) if label]
    found = [value for name, value in metrics.items() if "logps/chosen" in name]
    assert found and any(
        value[-1] == pytest.approx(wanted, abs=1e-3)
        for value in found
        for wanted in (sum(chosen), sum(chosen) / 2)
    ), metrics
    trainer.train()
    losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    assert len(losses) == 2 and all(torch.tensor(losses).isfinite())

"""Checkpoints, prompts and pictures of the serving tests, and what transformers answers to them.

The random checkpoint has the shipped base's shape and weights wide enough that answers differ from
prompt to prompt and from plan to plan; the base itself was trained, so its answers are short and
sure. Pictures have the tower's size: no resampling that versions could do differently.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaForConditionalGeneration,
)

import adsc
from tests.documents import ROOT

BASE = ROOT / "workflows" / "assets" / "tiny_base"
NEW = 12  # tokens of each answer
SIDE = 96
PLANS = (
    "2:1/2,4:1/2,6:1/2",
    "1:1/4",
    "0:1/2,4:1/4;anchor=first",
    "2:1/3,5:1/3;anchor=center",
    "4:1/4;anchor=grid",
    "1:1/4;pool=tiles",
    "2:1/4,4:1/4;pool=tiles",
    "0:1/5,4:1/2;pool=runs",
    "2:1/9,6:0;pool=tiles",
    "4:0",
)
"""Drops, means and exits, at layer 0 too, with even and ragged tiles."""
TRAINED = {"16": "2:1/4;pool=tiles", "7": "2:1/9,6:0;pool=tiles", "32": "2:1/2", "9": "4:1/7"}
"""Plans of the trained checkpoint, by name; it runs with the first."""


@dataclass(frozen=True)
class Prompt:
    """Text with `<image>` marks, and the pictures that stand there."""

    text: str
    pictures: tuple[int, ...] = ()


def random_checkpoint(folder: Path) -> Path:
    """A LLaVA of the base's shape with random weights."""
    model: Any = LlavaForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32)
    spread(model)
    model.save_pretrained(folder)
    for file in BASE.iterdir():
        if file.is_file() and not (folder / file.name).exists():
            shutil.copy(file, folder / file.name)
    return folder


def spread(model: Any) -> None:
    """Weights wide enough that answers differ from prompt to prompt."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                wide = 1.6 * weight.shape[-1] ** -0.5
                weight.normal_(0, wide if "language_model" in name else 0.05)
        model.lm_head.weight.normal_(0, 0.3)


@cache
def picture(number: int) -> Image.Image:
    """One of twelve pictures of shapes on noise."""
    draw_by = np.random.default_rng(number)
    noise = draw_by.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8) // 3
    image = Image.fromarray(noise + draw_by.integers(40, 150, (1, 1, 3), dtype=np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, wide = (int(draw_by.integers(0, 60)) for _ in range(3))
        colour = tuple(int(level) for level in draw_by.integers(0, 255, 3))
        shape = draw.ellipse if draw_by.random() < 0.5 else draw.rectangle
        shape([x, y, x + 10 + wide // 2, y + 10 + wide // 2], colour)
    return image


def all_prompts() -> list[Prompt]:
    """Two dozen, of 12 to 700 tokens with 0 to 4 pictures: apart, adjoining, first, in turns."""
    draw = random.Random(3)
    words = ["what", "colour", "is", "the", "big", "round", "shape", "in", "top", "left", "corner"]

    def say(count: int) -> str:
        return " ".join(draw.choice(words) for _ in range(count))

    def ask(before: str, count: int, pictures: tuple[int, ...] = ()) -> Prompt:
        return Prompt(f"USER: {before}{say(count)} ASSISTANT:", pictures)

    one = "<image>\n"
    found = [ask(one, count, (count % 12,)) for count in (1, 2, 3, 5, 8, 13, 23, 60)]
    found += [ask("", count) for count in (1, 2, 7, 40, 120)]
    found += [
        ask(one * 2, 9, (1, 2)),
        ask("<image><image>", 6, (6, 7)),
        ask(one * 3, 2, (8, 9, 10)),
        ask(f"{say(3)} {one * 4}", 8, (1, 3, 5, 7)),
        ask(f"{say(12)} {one}{say(3)} {one}", 4, (4, 5)),
        ask(f"{say(30)} {one}", 30, (0,)),
        ask(f"{say(90)} {one}{say(60)} {one * 2}", 20, (2, 3, 4)),
        Prompt(f"<image>{say(1)}", (11,)),
        Prompt("what <image><image><image>is", (2, 4, 6)),
    ]
    turns = [(say(4), say(3), say(3)), (say(20), say(10), say(9))]
    for number, (question, answer, more) in enumerate(turns):
        text = f"USER: {one}{question} ASSISTANT: {answer}</s>USER: {one}{more} ASSISTANT:"
        found.append(Prompt(text, (number, number + 4)))
    return found


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, their log-probabilities, and the prompt's length with images laid out."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    wide: int


Wanted = Callable[[str], list[Answer]]
"""What all prompts' answers are under a plan."""


def tokens(answers: list[Answer]) -> list[tuple[int, ...]]:
    return [answer.tokens for answer in answers]


def as_dict(plan: str) -> dict[str, Any]:
    """A plan as it stands in config.json."""
    return adsc.PruningPlan.parse(plan).to_dict()


class Reference:
    """A checkpoint in transformers, one prompt at a time, and the pictures of its prompts."""

    def __init__(self, folder: Path, pictures: Callable[[int], Image.Image] = picture):
        torch.set_num_threads(1)
        self.folder, self.picture = folder, pictures
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = AutoImageProcessor.from_pretrained(folder)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def ids(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens, one for each image."""
        found: list[int] = self.tokenizer(prompt.text)["input_ids"]
        return found

    def answers(self, plan: str, prompts: list[Prompt], new: int = NEW) -> list[Answer]:
        """What the model says under a plan."""
        adsc.attach(self.model, plan)
        return [self._answer(prompt, new) for prompt in prompts]

    def _lengths(self, inputs: dict[str, Any]) -> list[int]:
        """Tokens of each image, as the model itself makes them."""
        if not inputs:
            return []
        with torch.inference_mode():
            return [len(it) for it in self.model.get_image_features(**inputs).pooler_output]

    def _answer(self, prompt: Prompt, new: int) -> Answer:
        images = [self.picture(number) for number in prompt.pictures]
        inputs = dict(self.processor(images=images, return_tensors="pt")) if images else {}
        lengths = iter(self._lengths(inputs))
        mark = self.model.config.image_token_id
        ids = [
            token
            for it in self.ids(prompt)
            for token in [it] * (next(lengths) if it == mark else 1)
        ]
        inputs["input_ids"] = torch.tensor([ids])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode():
            found = self.model.generate(
                **inputs,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = found.sequences[0, len(ids) :]
        chances = torch.stack(found.logits)[:, 0].log_softmax(-1)
        own = chances.gather(1, tokens[:, None])[:, 0]
        return Answer(tuple(tokens.tolist()), tuple(own.tolist()), len(ids))

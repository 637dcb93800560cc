"""Answers and scores: questions asked by generation, scored by exact match, with intervals.

One question is one prompt: picture, question, the checkpoint's own chat template; earlier turns of
the conversation are not shown. Intervals are bootstrap over pictures, since the questions of one
picture are not independent. An error in generation is an error; it never becomes an empty answer.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import adsc
from pipeline.conversations import MARKER
from pipeline.pictures import decode_picture
from pipeline.prepared import PreparedData

RESAMPLES = 2000


@dataclass(frozen=True)
class Question:
    """One prompt and its expected answer."""

    record: str
    kind: str
    text: str
    expected: str
    pictures: tuple[bytes, ...]


def read_questions(data: PreparedData) -> list[Question]:
    """Every question of a prepared split; records without a kind count as `other`."""
    questions = []
    for row in data.scan(["id", "pictures", "kinds", "turns"]):
        turns = json.loads(row["turns"])
        kinds = row["kinds"] or ["other"] * (len(turns) // 2)
        pairs = zip(kinds, turns[::2], turns[1::2], strict=True)
        for kind, (_, asked), (_, answer) in pairs:
            text = asked.replace(MARKER, "").strip()
            pictures = tuple(row["pictures"])
            questions.append(Question(row["id"], kind, text, answer.strip(), pictures))
    return questions


def build_inputs(questions: Sequence[Question], processor: Any) -> dict[str, torch.Tensor]:
    """Left-padded model inputs of a batch of questions."""
    prompts = [
        processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}] * len(q.pictures)
                    + [{"type": "text", "text": q.text}],
                }
            ],
            add_generation_prompt=True,
        )
        for q in questions
    ]
    pictures = [decode_picture(picture) for q in questions for picture in q.pictures]
    return dict(
        processor(
            text=prompts,
            images=pictures or None,
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
    )


def generate_answers(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    batch_size: int,
    max_new_tokens: int,
    report: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Greedy answers, in the order of the questions."""
    answers: list[str] = []
    for batch in _batches(questions, batch_size):
        inputs = to_device(build_inputs(batch, processor), model)
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        texts = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        answers += [text.strip() for text in texts]
        report(len(answers))
    return answers


def to_device(inputs: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """The inputs where the model is."""
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _batches(items: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def majority_answers(train: PreparedData) -> dict[str, str]:
    """The most frequent training answer of each kind: what one says without looking."""
    counts: dict[str, Counter[str]] = {}
    for row in train.scan(["kinds", "turns"]):
        answers = [answer for _, answer in json.loads(row["turns"])[1::2]]
        kinds = row["kinds"] or ["other"] * len(answers)
        for kind, answer in zip(kinds, answers, strict=True):
            counts.setdefault(kind, Counter())[answer.strip()] += 1
    return {kind: counter.most_common(1)[0][0] for kind, counter in counts.items()}


class Bootstrap:
    """Percentile intervals over resampled pictures; one set of resamples serves all statistics, so
    that differences are paired."""

    def __init__(self, records: Sequence[str], seed: int) -> None:
        _, self._picture = np.unique(np.array(records), return_inverse=True)
        count = int(self._picture.max()) + 1
        draws = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
        self._weights = np.stack([np.bincount(draw, minlength=count) for draw in draws])

    def mean(self, values: np.ndarray, chosen: np.ndarray | None = None) -> dict[str, float]:
        """Mean of `values` (one per question) with a 95 % interval; `chosen` is a boolean mask."""
        mask = np.ones(len(values), bool) if chosen is None else chosen
        count = self._weights.shape[1]
        sums = np.bincount(self._picture[mask], weights=values[mask], minlength=count)
        sizes = np.bincount(self._picture[mask], minlength=count)
        totals = self._weights @ sizes
        draws = (self._weights @ sums)[totals > 0] / totals[totals > 0]
        low, high = np.quantile(draws, [0.025, 0.975])
        return {
            "mean": float(values[mask].mean()),
            "low": float(low),
            "high": float(high),
            "n": int(mask.sum()),
        }


def time_prefill(
    model: Any, inputs: dict[str, torch.Tensor], plans: Sequence[adsc.PruningPlan], rounds: int
) -> list[dict[str, float]]:
    """Milliseconds of one prefill of `inputs` under each plan: median and quartiles.

    The plans take turns within each round, so that a machine's changing speed hits all alike.
    """
    times: list[list[float]] = [[] for _ in plans]
    for turn in range(rounds + 1):
        for plan, record in zip(plans, times, strict=True):
            adsc.attach(model, plan)
            with torch.inference_mode():
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                start = time.perf_counter()
                model(**inputs, use_cache=True, logits_to_keep=1)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            if turn:  # the first round warms up
                record.append(1000 * (time.perf_counter() - start))
    adsc.detach(model)
    quantiles = [np.quantile(record, [0.5, 0.25, 0.75]) for record in times]
    return [{"median": float(m), "low": float(a), "high": float(b)} for m, a, b in quantiles]

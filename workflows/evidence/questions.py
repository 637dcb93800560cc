"""The questions of the evidence on one machine: of a split, or each after the turn before it.

A question stands alone, as in the pipeline. SPLIT_turns puts the second and later questions
of a conversation after the turn before them, with the answer that turn should have had: one turn
that has been, and a new question about the same picture. Behind an exit such a question sees the
picture only through text.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.data.pictures import decode_picture
from pipeline.data.templates import message_parts
from pipeline.evaluation.generation import QuestionEntry, Questions, build_inputs, encode
from pipeline.evaluation.scoring import exact_match
from pipeline.training.feed import from_thread
from workflows.demo.fashion_variants import listed_right
from workflows.evidence.features import pack

TURNS = "_turns"


class Asking(NamedTuple):
    """A split's questions."""

    questions: Questions
    batches: list[tuple[list[int], dict[str, Any]]]
    """Question numbers and packed inputs."""


def load_asking(
    prepared: Path,
    split: str,
    processor: Any,
    batch_size: int,
    pictures: dict[bytes, torch.Tensor],
) -> Asking:
    """All questions of a split, rendered; SPLIT_turns as described above.

    Args:
        processor: with the chat template of the training.
        pictures: where decoded pictures go, for `evidence_features.unpack`.
    """
    questions = questions_of(prepared, split)
    inputs_of = build_inputs_of_turns if split.endswith(TURNS) else _inputs_alone
    numbers = questions.batches(range(len(questions)), batch_size, processor.tokenizer)
    ask = partial(_batch, numbers=numbers, questions=questions, processor=processor, of=inputs_of)
    inputs = from_thread(ask, range(len(numbers)))
    packed = (pack(one, pictures) for one in inputs)
    return Asking(questions, list(zip(numbers, packed, strict=True)))


def questions_of(prepared: Path, split: str) -> Questions:
    """The questions of a split, or SPLIT_turns, in their order."""
    questions = Questions(prepared / split.removesuffix(TURNS))
    if split.endswith(TURNS):
        questions.entries = second_turns(questions)
    return questions


def score(answer: str, entry: QuestionEntry) -> float:
    """1 or 0; of a list, the share of its entries that are right."""
    rule = listed_right if entry.kind == "list" else exact_match
    return float(rule(answer, entry.expected))


def second_turns(questions: Questions) -> list[QuestionEntry]:
    """Those that follow another of their conversation, their texts those of both turns."""
    return [
        one._replace(text="\n".join((before.text, before.expected, one.text)))
        for before, one in zip(questions.entries, questions.entries[1:], strict=False)
        if before.row == one.row
    ]


def build_inputs_of_turns(
    numbers: Sequence[int], questions: Questions, processor: Any
) -> dict[str, torch.Tensor]:
    """Left-padded inputs of second turns: picture, question, right answer, question."""
    prompts, pictures = [], []
    for question in questions.load(numbers):
        first, answer, then = question.text.split("\n")
        messages = [
            {"role": "user", "content": message_parts(first, len(question.pictures))},
            {"role": "assistant", "content": message_parts(answer, 0)},
            {"role": "user", "content": message_parts(then, 0)},
        ]
        prompts.append(processor.apply_chat_template(messages, add_generation_prompt=True))
        pictures.append([decode_picture(picture) for picture in question.pictures])
    return encode(prompts, pictures, processor)


def _inputs_alone(
    numbers: Sequence[int], questions: Questions, processor: Any
) -> dict[str, torch.Tensor]:
    return build_inputs(questions.load(numbers), processor)


def _batch(
    batch: int, numbers: Sequence[Sequence[int]], questions: Questions, processor: Any, of: Any
) -> dict[str, torch.Tensor]:
    inputs: dict[str, torch.Tensor] = of(numbers[batch], questions, processor)
    return inputs

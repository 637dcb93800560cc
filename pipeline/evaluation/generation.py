"""Questions and answers: prompts from prepared shards, greedy generation.

One question is one prompt: its pictures, its text, the checkpoint's chat template; earlier turns of
the conversation are not shown. Its pictures are those of its own turn, or, where that has none,
those of the turns before it. Pictures stay on the disk until their batch is due. Which questions
share a batch follows from the question list alone, never from how many workers there are. Spreading
the work over machines is pipeline/evaluation/answers.py's; an error in generation is an error, and
never becomes an empty answer.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pipeline.data.conversations import MARKER
from pipeline.data.pictures import decode_picture
from pipeline.data.prepared import PreparedData
from pipeline.data.templates import message_parts, special_tokens
from pipeline.evaluation.scoring import Rule, exact_match, references

CACHE_BYTES = 64 * 2**20
"""Most bytes of row groups that a reader of questions holds; one row group at least."""


class GenerationError(RuntimeError):
    """The model computed nothing that could be an answer."""


@dataclass(frozen=True)
class Question:
    """One prompt and its expected answer."""

    record: str
    kind: str
    text: str
    """Several pictures of its own are marked in it; others come before it."""
    expected: str
    pictures: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The model's answer to one question, and its cost."""

    text: str
    """Without special tokens, stripped; empty only where the model ended at once."""
    prompt: str
    """The prompt as rendered by the chat template; an image token stands for all of an image."""
    text_tokens: int
    """Tokens of the prompt that are neither vision tokens nor padding."""
    vision_tokens: int
    """Vision tokens that enter the decoder's first layer."""
    generated_tokens: int
    """Tokens generated, the end token included."""
    finished: bool
    """Whether the model ended the answer itself, or was cut at max_new_tokens."""
    seconds: float
    """Wall time of its batch: the latency that a user would see."""


class QuestionEntry(NamedTuple):
    """A question without its pictures, so that a large set fits in memory."""

    row: int
    record: str
    kind: str
    text: str
    expected: str
    pictures: tuple[int, int]
    """Range of the row's pictures: start and end."""


class Questions:
    """All questions of a prepared split, in the order of the shards.

    Args:
        folder: of the split's Parquet shards. Records without a kind count as `other`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = PreparedData(folder, CACHE_BYTES)
        self.entries: list[QuestionEntry] = []
        for number, row in enumerate(self.data.scan(["id", "kinds", "turns"])):
            turns = json.loads(row["turns"])
            kinds = row["kinds"] or ["other"] * (len(turns) // 2)
            seen = 0
            for kind, (_, question), (_, answer) in zip(
                kinds, turns[::2], turns[1::2], strict=True
            ):
                count = question.count(MARKER)
                text = (question if count > 1 else question.replace(MARKER, "")).strip()
                pictures = (seen, seen + count) if count else (0, seen)
                seen += count
                self.entries.append(
                    QuestionEntry(number, row["id"], kind, text, answer.strip(), pictures)
                )

    def __len__(self) -> int:
        return len(self.entries)

    def load(self, numbers: Sequence[int]) -> list[Question]:
        """The questions of these numbers, with their pictures."""
        chosen = [self.entries[number] for number in numbers]
        rows = self.data.rows([entry.row for entry in chosen], ["pictures"])
        return [
            Question(
                a.record, a.kind, a.text, a.expected, tuple(row["pictures"][slice(*a.pictures)])
            )
            for a, row in zip(chosen, rows, strict=True)
        ]

    def scenes(self) -> list[str]:
        """What each question is about: a digest of its pictures, or its row where it has none.
        Questions about one scene are no independent ones. Reads all pictures once."""
        digests = [
            [hashlib.sha256(picture).hexdigest() for picture in row["pictures"]]
            for row in self.data.scan(["pictures"])
        ]
        return [
            " ".join(digests[entry.row][slice(*entry.pictures)])
            or f"{self.folder.name}/{entry.row}"
            for entry in self.entries
        ]

    def first(self, count: int) -> list[int]:
        """So many numbers from the front, of those with pictures; where none has any, of all."""
        seeing = [n for n, (*_, (start, end)) in enumerate(self.entries) if start < end]
        return (seeing or list(range(len(self))))[:count]

    def batches(self, numbers: range, size: int, tokenizer: Any) -> list[list[int]]:
        """Question numbers in batches of similar length, the longest first.

        Padding is small then, and a batch that is too large for the memory is found at once.
        """
        texts = [self.entries[number].text for number in numbers]
        words = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        vision = self.data.vision_tokens
        lengths = {
            number: int(vision[self.entries[number].row]) + count
            for number, count in zip(numbers, words, strict=True)
        }
        ordered = sorted(numbers, key=lambda number: (-lengths[number], number))
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def majority_answers(data: PreparedData, several: bool = False) -> dict[str, str]:
    """The most frequent answer of each kind: what one says without looking.

    Answers of more than 64 characters are no majority's, and are not counted.

    Args:
        several: each line of what is expected is an answer (`scoring.references`).
    """
    counts: dict[str, Counter[str]] = {}
    for row in data.scan(["kinds", "turns"]):
        answers = [answer for _, answer in json.loads(row["turns"])[1::2]]
        kinds = row["kinds"] or ["other"] * len(answers)
        for kind, answer in zip(kinds, answers, strict=True):
            for one in references(answer) if several else [answer.strip()]:
                if len(one) <= 64:
                    counts.setdefault(kind, Counter())[one] += 1
    return {kind: counter.most_common(1)[0][0] for kind, counter in counts.items()}


def render_prompt(question: Question, processor: Any) -> str:
    """The text that goes to the processor: pictures where they are marked, else first."""
    before = 0 if MARKER in question.text else len(question.pictures)
    message = {"role": "user", "content": message_parts(question.text, before)}
    prompt: str = processor.apply_chat_template([message], add_generation_prompt=True)
    return prompt


def build_inputs(questions: Sequence[Question], processor: Any) -> dict[str, torch.Tensor]:
    """Left-padded model inputs of a batch of questions."""
    pictures = [[decode_picture(picture) for picture in q.pictures] for q in questions]
    return encode([render_prompt(q, processor) for q in questions], pictures, processor)


def encode(
    prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]], processor: Any
) -> dict[str, torch.Tensor]:
    """Left-padded model inputs of rendered prompts, and of each prompt's pictures in the order of
    its image tokens. Some processors (Gemma 3, SmolVLM) take a flat list for one prompt's."""
    return dict(
        processor(
            text=list(prompts),
            images=[list(own) for own in pictures] if any(pictures) else None,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            **special_tokens(processor, prompts),
        )
    )


def append_text(inputs: dict[str, torch.Tensor], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs of one prompt (1, T) with the text tokens `ids` (1, N) after it; what has a value for
    each token (its mask, its type) has one for these too."""
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    text, shape = torch.zeros_like(ids), inputs["input_ids"].shape
    return {
        name: torch.cat([tensor, more.get(name, text).to(tensor.dtype)], dim=1)
        if tensor.shape == shape
        else tensor
        for name, tensor in inputs.items()
    }


def generate_batch(
    model: Any, processor: Any, questions: Sequence[Question], max_new_tokens: int
) -> list[Answer]:
    """Greedy answers of one batch, in the order of the questions.

    Raises:
        GenerationError: the model's logits are not numbers.
    """
    start = time.perf_counter()
    inputs = to_device(build_inputs(questions, processor), model)
    new = generate_tokens(model, inputs, max_new_tokens)
    texts = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    seconds = time.perf_counter() - start
    counts, finished = count_tokens(new, model)
    vision = (inputs["input_ids"] == model.config.image_token_id).sum(dim=1)
    words = inputs["attention_mask"].sum(dim=1) - vision
    return [
        Answer(
            text=text.strip(),
            prompt=render_prompt(question, processor),
            text_tokens=int(words[i]),
            vision_tokens=int(vision[i]),
            generated_tokens=counts[i],
            finished=finished[i],
            seconds=seconds,
        )
        for i, (question, text) in enumerate(zip(questions, texts, strict=True))
    ]


def generate_tokens(
    model: Any, inputs: dict[str, torch.Tensor], max_new_tokens: int, **more: Any
) -> torch.Tensor:
    """Ids of the greedy continuation (B, up to max_new_tokens), the prompt left out. Penalties,
    beams and lengths that the checkpoint's generation_config asks for are left out too.

    Raises:
        GenerationError: the model's logits are not numbers.
    """
    with torch.inference_mode(), _only_its_special_tokens(model):
        out = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([_RefuseNaN()]),
            **more,
        )
    new: torch.Tensor = out[:, inputs["input_ids"].shape[1] :]
    return new


@contextmanager
def _only_its_special_tokens(model: Any) -> Iterator[None]:
    """Of the model's generation_config only the special tokens apply. One that is passed to
    generate would not do: transformers fills what it leaves open from the model's own."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
    )
    try:
        yield
    finally:
        model.generation_config = own


class _RefuseNaN(LogitsProcessor):  # type: ignore[misc]
    """argmax of NaN is token 0, often the padding: an error that would look like an empty
    answer."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        broken = scores.isnan().any(dim=1)
        if broken.any():
            raise GenerationError(
                f"the logits of rows {broken.nonzero().flatten().tolist()} are NaN after "
                f"{input_ids.shape[1]} tokens: the weights or the precision are broken"
            )
        return scores


def generate_answers(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers, in the order of the questions."""
    return [
        answer.text
        for start in range(0, len(questions), batch_size)
        for answer in generate_batch(
            model, processor, questions[start : start + batch_size], max_new_tokens
        )
    ]


def to_device(inputs: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """The inputs where the model is, pictures in its precision."""
    return {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in inputs.items()
    }


def share_right(
    questions: Sequence[QuestionEntry], guesses: dict[str, str], rules: Iterable[Rule] | None = None
) -> dict[str, Any]:
    """Accuracy of one guess per kind, in all and by kind; `rules` score each question."""
    pairs = zip(questions, rules or [exact_match] * len(questions), strict=True)
    hits = np.array([rule(guesses.get(q.kind, ""), q.expected) for q, rule in pairs])
    kinds = np.array([q.kind for q in questions])
    return {
        "accuracy": float(hits.mean()),
        "by_kind": {str(kind): float(hits[kinds == kind].mean()) for kind in dict.fromkeys(kinds)},
    }


def count_tokens(new: torch.Tensor, model: Any) -> tuple[list[int], list[bool]]:
    """Tokens of each answer (B, T), its end token included, and whether it has one."""
    ends = torch.isin(new, _end_tokens(model))
    ended = ends.any(dim=1)
    counts = torch.where(ended, ends.int().argmax(dim=1) + 1, new.shape[1])
    return counts.tolist(), ended.tolist()


def _end_tokens(model: Any) -> torch.Tensor:
    ids = model.generation_config.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return torch.tensor(ids, device=model.device)

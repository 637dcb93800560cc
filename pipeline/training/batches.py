"""Training batches: which rows make up a step, how a worker computes them, and their tensors.

The rows of optimizer step s follow from (seed, s) and the config alone, never from the number of
workers: a resumed run needs no saved data position, and another number of workers sees the same
global batches. A picture is decoded here, once. Reading shards is pipeline/data/prepared.py's,
carrying batches to the trainer pipeline/training/feed.py's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoProcessor

from pipeline.data.conversations import IGNORED
from pipeline.data.pictures import decode_picture
from pipeline.data.prepared import PreparedData, Shuffle
from pipeline.training.config import TrainConfig

PACKED = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
"""Attention backends that tell rows of a packed micro-batch apart; flex_attention does, too, but
torch can't train with it on every device."""
COLUMNS = ("id", "pictures", "input_ids", "labels")
BLOCK_STEPS = 50
"""Steps whose rows are sorted by length together under `train.group_by_length`."""


class RowShape(NamedTuple):
    """What the cost of a row depends on."""

    text_tokens: int
    vision_tokens: int
    pictures: int
    supervised: int | None = None
    """Tokens with a label, of which alone logits are made; None: as many as are left at the end."""


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What one rank needs for one optimizer step. All ranks have as many micro-batches."""

    micro: list[dict[str, torch.Tensor]]
    supervised: int
    """Supervised tokens of the global batch: the loss's denominator."""
    ids: list[str]
    """This rank's conversations."""
    rows: list[RowShape]
    """Their shapes."""
    vision_tokens: int
    text_tokens: int
    padding: int
    """Input positions of this rank that train nothing: padding, and rows that are there to keep
    the ranks in step."""


class MicroPlan(NamedTuple):
    """The rows of one micro-batch."""

    rows: tuple[int, ...]
    silent: tuple[int, ...] = ()
    """Rows that pass through the model without labels, so that all ranks do the same work."""


@dataclass(frozen=True, kw_only=True)
class StepLoader:
    """Loads one rank's part of a step; can be pickled, and opens files where it is called.

    Args:
        data: folder of one prepared split.
        processor: folder of the processor.
        config: decides the global batches.
        rank: which part is loaded.
        world_size: of how many.
        pictures_everywhere: give every micro-batch a picture, silent rows if need be: under
            ZeRO-3, or DDP with a tuned projector, all ranks must run the same modules.
    """

    data: Path
    processor: Path
    config: TrainConfig
    rank: int = 0
    world_size: int = 1
    pictures_everywhere: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def _prepared(self) -> PreparedData:
        return PreparedData(self.data)

    @cached_property
    def _processor(self) -> Any:
        return AutoProcessor.from_pretrained(self.processor)

    @cached_property
    def _batches(self) -> "GlobalBatches":
        return GlobalBatches(self._prepared, self.config)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.config.steps_for(len(self._prepared))

    @property
    def text_tokens(self) -> tuple[int, int]:
        """Tokens of a row that are no vision tokens, on average and of the hundredth that has most
        of them."""
        text = self._prepared.length - self._prepared.vision_tokens
        return math.ceil(float(np.mean(text))), math.ceil(float(np.quantile(text, 0.99)))

    @property
    def supervised(self) -> int:
        """Supervised tokens of the whole split."""
        return int(self._prepared.supervised.sum())

    def __call__(self, step: int) -> StepBatch:
        data, config = self._prepared, self.config
        rows = self._batches.rows(step)
        plans = rank_plans(rows, data.length, self.world_size, config)[self.rank]
        if self.pictures_everywhere:
            plans = with_pictures(plans, rows, data)
        put = pack if config.packing else collate
        micro, ids, shapes, positions = [], [], [], 0
        for plan in plans:
            found = data.rows(plan.rows + plan.silent, COLUMNS)
            for number, row in zip(plan.rows, found, strict=False):
                ids.append(row["id"])
                vision = int(data.vision_tokens[number])
                text = int(data.length[number]) - vision
                supervised = int(data.supervised[number])
                shapes.append(RowShape(text, vision, len(row["pictures"]), supervised))
            for row in found[len(plan.rows) :]:
                row["labels"] = [IGNORED] * len(row["labels"])
            batch = put(found, self._processor)
            positions += batch["input_ids"].numel()
            micro.append(batch)
        text = sum(shape.text_tokens for shape in shapes)
        vision = sum(shape.vision_tokens for shape in shapes)
        return StepBatch(
            micro=micro,
            supervised=int(data.supervised[rows].sum()),
            ids=ids,
            rows=shapes,
            vision_tokens=vision,
            text_tokens=text,
            padding=positions - vision - text,
        )


class GlobalBatches:
    """The rows of each step, the same for all ranks and on any number of workers."""

    def __init__(self, data: PreparedData, config: TrainConfig) -> None:
        self._length, self._config = data.length, config
        self._steps = config.steps_for(len(data))
        self._shuffle = Shuffle(data.groups, config.seed, config.rows_of(len(data)))
        # A block must stay within the windows that a reader holds.
        block_rows = min(BLOCK_STEPS * config.batch_size, self._shuffle.window_rows)
        self._block_steps = max(1, block_rows // config.batch_size)
        self._block = lru_cache(maxsize=2)(self._make_block)

    def rows(self, step: int) -> np.ndarray:
        """Rows of optimizer step `step`, shape (batch_size,)."""
        if self._config.group_by_length:
            return self._block(step // self._block_steps)[step % self._block_steps]
        return self._take(step, 1)

    def _take(self, first: int, steps: int) -> np.ndarray:
        size = self._config.batch_size
        return self._shuffle.rows(np.arange(first * size, (first + steps) * size))

    def _make_block(self, block: int) -> np.ndarray:
        """(steps, batch_size): rows sorted by length across the steps, which are then shuffled."""
        config, first = self._config, block * self._block_steps
        # The last block ends with the run, so that no row of its epoch is passed over for it.
        steps = min(self._block_steps, max(1, self._steps - first))
        rows = self._take(first, steps)
        rows = rows[np.argsort(self._length[rows], kind="stable")]
        draw = np.random.default_rng([4, config.seed, block])
        return draw.permutation(rows.reshape(steps, config.batch_size))


def rank_plans(
    rows: np.ndarray, length: np.ndarray, world_size: int, config: TrainConfig
) -> list[list[MicroPlan]]:
    """The micro-batches of each rank: rows of like length together, as many for every rank.

    Rows are dealt out from the longest to the shortest, forth and back, so ranks have like numbers
    of tokens. Under `micro_tokens` a row that is longer than the budget is a micro-batch alone.
    """
    ordered = rows[np.argsort(-length[rows], kind="stable")]
    turn = np.arange(len(ordered)) % (2 * world_size)
    owner = np.where(turn < world_size, turn, 2 * world_size - 1 - turn)
    shares = [ordered[owner == rank] for rank in range(world_size)]
    if config.micro_tokens is None:
        most = max(len(share) for share in shares)
        parts = [
            [part for part in np.array_split(share, min(config.accumulate, most)) if len(part)]
            for share in shares
        ]
    else:
        parts = [
            _within_budget(share, length, config.micro_tokens, config.packing) for share in shares
        ]
    count = max(len(one) for one in parts)
    return [_in_step(one, count) for one in parts]


def _within_budget(
    share: np.ndarray, length: np.ndarray, budget: int, packing: bool
) -> list[np.ndarray]:
    parts: list[list[int]] = []
    used = 0
    for row in share.tolist():  # from the longest
        # Padded, each row of a micro-batch takes as much as its first.
        size = int(length[row if packing or not parts else parts[-1][0]])
        if not parts or used + size > budget:
            parts.append([])
            size, used = int(length[row]), 0
        parts[-1].append(row)
        used += size
    return [np.array(part) for part in parts]


def _in_step(parts: Sequence[np.ndarray], count: int) -> list[MicroPlan]:
    """`count` micro-batches of the same rows; silent ones where there are too few rows."""
    parts = list(parts)
    while len(parts) < count and max(map(len, parts)) > 1:
        largest = max(range(len(parts)), key=lambda i: len(parts[i]))
        parts[largest : largest + 1] = np.array_split(parts[largest], 2)
    plans = [MicroPlan(tuple(part.tolist())) for part in parts]
    return plans + [MicroPlan((), plans[-1].rows[-1:])] * (count - len(plans))


def with_pictures(
    plans: Sequence[MicroPlan], rows: np.ndarray, data: PreparedData
) -> list[MicroPlan]:
    """A silent row with a picture for each micro-batch that has none: the shortest of the global
    batch, or of the whole set."""
    seen = data.vision_tokens > 0
    if not seen.any():
        return list(plans)
    pool = rows[seen[rows]] if seen[rows].any() else np.flatnonzero(seen)
    shortest = int(pool[np.argmin(data.length[pool])])
    return [
        plan
        if any(seen[row] for row in plan.rows + plan.silent)
        else plan._replace(silent=(*plan.silent, shortest))
        for plan in plans
    ]


def collate(rows: list[dict[str, Any]], processor: Any) -> dict[str, torch.Tensor]:
    """Right-padded tensors: input_ids, attention_mask and labels (B, S), and the pictures'
    inputs."""
    length = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), length)
    pad = processor.tokenizer.pad_token_id
    batch = {
        "input_ids": torch.full(shape, pad, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED, dtype=torch.long),
    }
    for i, row in enumerate(rows):
        size = len(row["input_ids"])
        batch["input_ids"][i, :size] = torch.tensor(row["input_ids"])
        batch["attention_mask"][i, :size] = 1
        batch["labels"][i, :size] = torch.tensor(row["labels"])
    return batch | picture_inputs([p for row in rows for p in row["pictures"]], processor)


def check_packing(model_type: str, attention: str) -> None:
    """Whether losses of packed and padded micro-batches are equal for this model and backend.

    Raises:
        ValueError: they aren't, or it is untested.
    """
    if attention not in PACKED:
        raise ValueError(
            f"train.packing with train.attention {attention!r}: rows of a packed micro-batch are "
            f"only known to stay apart with {', '.join(PACKED)}; choose one, or set micro_tokens "
            "and group_by_length instead"
        )
    if model_type not in ("llava",):
        raise ValueError(
            f"train.packing is checked for llava, whose position ids have one axis, not for "
            f"{model_type!r}; set micro_tokens and group_by_length instead"
        )


def pack(rows: list[dict[str, Any]], processor: Any) -> dict[str, torch.Tensor]:
    """All rows one after the other: input_ids, position_ids and labels (1, S), and the pictures'
    inputs.

    Attention tells rows apart by position ids that restart, and by nothing else: there is no mask.
    A row's first label is left out, since the token before it is another row's.
    """
    labels = [[IGNORED, *row["labels"][1:]] for row in rows]
    batch = {
        "input_ids": torch.tensor([[one for row in rows for one in row["input_ids"]]]),
        "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None],
        "labels": torch.tensor([[one for row in labels for one in row]]),
    }
    return batch | picture_inputs([p for row in rows for p in row["pictures"]], processor)


def picture_inputs(encoded: list[bytes], processor: Any) -> dict[str, torch.Tensor]:
    """Decode pictures and turn them into the model's inputs (pixel_values and what goes with
    it)."""
    if not encoded:
        return {}
    pictures = [decode_picture(data) for data in encoded]
    return dict(processor.image_processor(pictures, return_tensors="pt"))

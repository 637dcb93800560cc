"""Prepared shards as training batches: the same batches in the same order on any number of workers.

Which records make up optimizer step s follows from (seed, s) alone, so a resumed run needs no
saved data position and sees what the uninterrupted run would have seen. A picture is decoded here,
once.
"""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline.conversations import IGNORED


class PreparedData:
    """The rows of one prepared split, held as Arrow (pictures stay encoded)."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("*.parquet"))
        if not files:
            raise ValueError(f"no Parquet shard in {folder}; does the split have any good record?")
        self.table = pa.concat_tables([pq.read_table(file) for file in files]).combine_chunks()
        labels = self.table["labels"].combine_chunks()
        supervised = np.asarray(labels.values) != IGNORED
        ends = np.concatenate([[0], np.cumsum(supervised)])
        offsets = np.asarray(labels.offsets)
        self.supervised = ends[offsets[1:]] - ends[offsets[:-1]]
        """Supervised tokens of each row."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def rows(self, indices: np.ndarray) -> list[dict[str, Any]]:
        return self.table.take(pa.array(indices)).to_pylist()


def step_indices(seed: int, step: int, batch_size: int, rows: int) -> np.ndarray:
    """Rows of optimizer step `step`, shape (batch_size,): consecutive runs through epoch
    shuffles."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = positions // rows, positions % rows
    orders = {e: np.random.default_rng([seed, int(e)]).permutation(rows) for e in np.unique(epochs)}
    return np.array([orders[e][place] for e, place in zip(epochs, places, strict=True)])


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


def picture_inputs(encoded: list[bytes], processor: Any) -> dict[str, torch.Tensor]:
    """Decode pictures and turn them into the model's inputs (pixel_values and what goes with
    it)."""
    if not encoded:
        return {}
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in encoded]
    return dict(processor.image_processor(pictures, return_tensors="pt"))


def prefetched(make: Any, items: Iterator[Any]) -> Iterator[Any]:
    """make(item) for each item, one ahead in a thread, so that the trainer rarely waits."""
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for item in items:
            current, ahead = ahead, pool.submit(make, item)
            if current is not None:
                yield current.result()
        if ahead is not None:
            yield ahead.result()

"""Which rows make up a step, on any number of workers; what is read for them; and their tensors."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForImageTextToText

import adsc
from pipeline.data.prepared import PreparedData, RowGroup, Shuffle
from pipeline.stages.prepare import SCHEMA
from pipeline.training.batches import (
    GlobalBatches,
    StepLoader,
    check_packing,
    rank_plans,
    with_pictures,
)
from pipeline.training.config import TrainConfig
from tests.small import Small

PICTURE = 3000  # bytes
CONFIG = TrainConfig(steps=12, batch_size=16)


def write_shards(folder: Path, shards: int, rows: int, group: int = 64) -> Path:
    """A prepared split of random rows; their pictures are noise that no compression shrinks."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for shard in range(shards):
        lengths = draw.integers(20, 400, rows).tolist()
        table = [
            {
                "id": f"{shard}/{row}",
                "pictures": [draw.bytes(PICTURE)] if row % 4 else [],
                "input_ids": [shard, row] + [1] * (length - 2),
                "labels": [-100] * (length - 5) + [1] * 5,
                "kinds": [],
                "turns": "[]",
                "length": length,
                "supervised": 5,
                "vision_tokens": 16 if row % 4 else 0,
            }
            for row, length in enumerate(lengths)
        ]
        table = pa.Table.from_pylist(table, schema=SCHEMA)
        pq.write_table(table, folder / f"{shard:05d}.parquet", row_group_size=group)
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2560 rows in 20 shards, 40 row groups."""
    return write_shards(tmp_path_factory.mktemp("many") / "train", 20, 128)


def groups(count: int, rows: int = 64, size: int = 1000) -> list[RowGroup]:
    return [RowGroup(Path(f"{i}"), 0, rows, size) for i in range(count)]


@pytest.mark.parametrize(("window", "windows"), [(10_000, 1), (128, 5)])
def test_every_row_comes_once_an_epoch_in_windows_of_whole_groups(
    window: int, windows: int
) -> None:
    order = Shuffle(groups(10), seed=3, window_rows=window)
    epochs = [order.rows(np.arange(640) + 640 * epoch) for epoch in range(2)]
    for rows in epochs:
        assert sorted(rows.tolist()) == list(range(640))
        touched = [set(part // 64) for part in rows.reshape(windows, -1)]
        assert sum(map(len, touched)) == 10  # no group is in two windows
    assert epochs[0].tolist() != epochs[1].tolist()
    again = Shuffle(groups(10), seed=3, window_rows=window)
    assert again.rows(np.arange(640, 1280)).tolist() == epochs[1].tolist()
    assert Shuffle(groups(10), seed=4).rows(np.arange(640)).tolist() != epochs[0].tolist()


def test_windows_are_bounded_in_bytes() -> None:
    order = Shuffle(groups(10), seed=0, window_bytes=3000)
    assert [len(one) for one in order.windows(0)] == [3, 3, 3, 1]
    assert [len(one) for one in Shuffle(groups(3), 0, window_bytes=10).windows(0)] == [1, 1, 1]


def test_a_share_is_drawn_by_seed_and_leaves_groups_unread() -> None:
    shares = [set(Shuffle(groups(10), s, rows=200).rows(np.arange(400)).tolist()) for s in (0, 1)]
    for share in shares:
        assert len(share) == 200
        assert len({row // 64 for row in share}) == 4
    assert shares[0] != shares[1]


def test_an_epoch_reads_each_group_once_and_holds_few(many: Path) -> None:
    whole = sum(group.bytes for group in PreparedData(many).groups)
    data = PreparedData(many, cache_bytes=whole // 4)
    order = Shuffle(data.groups, seed=0, window_bytes=whole // 8)
    cached = []
    for step in range(2560 // 32):
        rows = order.rows(np.arange(32 * step, 32 * step + 32))
        found = data.rows(rows, ["id", "input_ids"])
        assert [row["input_ids"][0] * 128 + row["input_ids"][1] for row in found] == rows.tolist()
        cached.append(sum(table.nbytes for table in data._cache.values()))
    assert data.bytes_read == whole
    assert max(cached) < whole // 2  # token ids take more room in memory than encoded
    # Rows drawn from everywhere would read each group again and again.
    scattered = PreparedData(many, cache_bytes=whole // 4)
    for step in range(10):
        scattered.rows(np.random.default_rng(step).permutation(2560)[:32])
    assert scattered.bytes_read > 5 * whole


def test_scan_gives_all_rows_in_order(many: Path) -> None:
    data = PreparedData(many)
    assert [row["id"] for row in data.scan(["id"])] == [
        f"{shard}/{row}" for shard in range(20) for row in range(128)
    ]


def test_old_shards_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "labels": [[1]]}), tmp_path / "0.parquet")
    with pytest.raises(ValueError, match=r"lacks the columns \['length'.*prepare the data again"):
        PreparedData(tmp_path)


MODES = {
    "plain": {},
    "accumulate": {"accumulate": 3},
    "budget": {"micro_tokens": 1000},
    "grouped": {"group_by_length": True, "micro_tokens": 900},
    "packed": {"packing": True, "micro_tokens": 1000},
}


@pytest.mark.parametrize("mode", MODES)
def test_global_batches_know_nothing_of_workers(mode: str, many: Path) -> None:
    config = CONFIG.model_copy(update=MODES[mode])
    data = PreparedData(many)
    seen: Counter[int] = Counter()
    for step in range(config.steps):
        # A new object each time: step s does not need the steps before it.
        rows = GlobalBatches(data, config).rows(step)
        seen.update(rows.tolist())
        for world_size in (1, 2, 3, 5):
            plans = rank_plans(rows, data.length, world_size, config)
            given = [row for rank in plans for plan in rank for row in plan.rows]
            assert sorted(given) == sorted(rows.tolist())
            assert len({len(rank) for rank in plans}) == 1  # as many for every rank
            for plan in (plan for rank in plans for plan in rank):
                lengths = data.length[list(plan.rows)]
                if config.micro_tokens and len(lengths) > 1:
                    padded = lengths.max() * len(lengths)
                    used = lengths.sum() if config.packing else padded
                    assert used <= config.micro_tokens
    assert max(seen.values()) == 1 and seen.total() == config.steps * 16


def test_ranks_get_like_numbers_of_tokens(many: Path) -> None:
    data = PreparedData(many)
    batches = GlobalBatches(data, CONFIG.model_copy(update={"batch_size": 64}))
    for step in range(10):
        plans = rank_plans(batches.rows(step), data.length, 4, CONFIG)
        tokens = [sum(int(data.length[list(plan.rows)].sum()) for plan in rank) for rank in plans]
        assert max(tokens) < 1.03 * min(tokens)


def padding(loader: StepLoader) -> float:
    batches = [loader(step) for step in range(CONFIG.steps)]
    trained = sum(batch.text_tokens + batch.vision_tokens for batch in batches)
    lost = sum(batch.padding for batch in batches)
    assert trained + lost == sum(m["input_ids"].numel() for b in batches for m in b.micro)
    return lost / (trained + lost)


def test_padding_falls_from_mode_to_mode(many: Path, small: Small, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.training.batches.picture_inputs", lambda encoded, processor: {})
    made = {
        name: padding(
            StepLoader(data=many, processor=small.base, config=CONFIG.model_copy(update=mode))
        )
        for name, mode in MODES.items()
    }
    # Measured 0.45, 0.19, 0.12, 0.02 and 0.
    assert made["plain"] > made["accumulate"] > made["budget"] > made["grouped"]
    assert made["grouped"] < 0.03
    assert made["packed"] == 0


def test_too_few_rows_pass_silently_and_pictures_are_lent(many: Path, small: Small) -> None:
    data = PreparedData(many)
    config = TrainConfig(steps=1, batch_size=3, accumulate=2)
    rows = np.array([0, 1, 2])  # the first has no picture
    first, second = rank_plans(rows, data.length, 2, config)
    assert len(first) == len(second) == 2
    assert [plan.rows for plan in first + second].count(()) == 1
    silent = next(plan for plan in first + second if not plan.rows)
    assert silent.silent and silent.silent[0] in rows
    for plan in with_pictures(first + second, rows, data):
        assert data.vision_tokens[list(plan.rows + plan.silent)].any()
    text = np.array([0, 4, 8])  # no picture in the whole batch: one of the data set's
    for plan in with_pictures(rank_plans(text, data.length, 1, CONFIG)[0], text, data):
        assert len(plan.silent) == 1


def test_silent_rows_change_no_loss(small: Small) -> None:
    config = TrainConfig(steps=1, batch_size=3, accumulate=2)
    model = AutoModelForImageTextToText.from_pretrained(small.base)
    losses = []
    for world_size in (1, 2):
        total = 0.0
        for rank in range(world_size):
            loader = StepLoader(
                data=small.prepared / "train", processor=small.base, config=config,
                rank=rank, world_size=world_size,
            )  # fmt: skip
            batch = loader(0)
            for micro in batch.micro:
                with torch.no_grad():
                    loss = model(**micro, num_items_in_batch=batch.supervised).loss
                total += loss.item()
        losses.append(total)
    assert losses[1] == pytest.approx(losses[0], abs=2e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("plan", ["", "1:1/2,2:1/4"], ids=["dense", "plan"])
def test_packed_loss_and_gradients_are_the_padded_ones(
    plan: str, attention: str, small: Small
) -> None:
    """Measured: losses within 1e-6, gradients within 4e-7 of the largest."""
    model = AutoModelForImageTextToText.from_pretrained(small.base, attn_implementation=attention)
    adsc.attach(model, adsc.PruningPlan.parse(plan))
    losses, gradients = [], []
    for packing in (False, True):
        config = TrainConfig(steps=1, batch_size=6, packing=packing)
        batch = StepLoader(data=small.prepared / "train", processor=small.base, config=config)(0)
        (micro,) = batch.micro
        assert micro["input_ids"].shape[0] == (1 if packing else 6)
        model.zero_grad()
        loss = model(**micro, num_items_in_batch=batch.supervised, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.model.language_model.layers[0].mlp.up_proj.weight.grad.clone())
    assert losses[1] == pytest.approx(losses[0], abs=5e-6)
    scale = gradients[0].abs().max()
    assert (gradients[1] - gradients[0]).abs().max() < 1e-5 * scale
    # Without the position ids the rows would see each other.
    micro.pop("position_ids")
    mixed = model(**micro, num_items_in_batch=batch.supervised, use_cache=False).loss
    assert abs(mixed.item() - losses[0]) > 1e-3


def test_packing_is_refused_where_it_is_not_known_to_be_right() -> None:
    check_packing("llava", "sdpa")
    with pytest.raises(ValueError, match=r"attention 'flex_attention'.*eager, sdpa"):
        check_packing("llava", "flex_attention")
    with pytest.raises(ValueError, match=r"not for 'qwen2_vl'"):
        check_packing("qwen2_vl", "sdpa")


def test_a_loader_can_be_pickled_after_use(small: Small) -> None:
    loader = StepLoader(data=small.prepared / "train", processor=small.base, config=CONFIG)
    batch = loader(3)
    copy = pickle.loads(pickle.dumps(loader))
    assert "_prepared" not in vars(copy)
    again = copy(3)
    assert again.ids == batch.ids
    assert all(torch.equal(again.micro[0][k], v) for k, v in batch.micro[0].items())

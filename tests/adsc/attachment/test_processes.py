"""An attached model trained by two processes: they compute what one computes on all rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import multiprocessing

import adsc
from tests.adsc.attached import STAGES, attached
from tests.adsc.rows import collate
from tests.adsc.tiny import IMAGE, TOKENS, pixels, row

# Pictures differ in number from row to row, so both processes pad and drop differently.
ROWS = [row(3, 0, 5), row(2, 0, 3, 0, 4), row(6), row(4, 0, 0, 2)]
STEPS = 3


def _inputs(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    inputs = collate(rows)
    drawn = [pixels(one.count(IMAGE) // TOKENS, seed=sum(one)) for one in rows]
    return inputs | {"pixel_values": torch.cat(drawn)}


def _lora(model: Any) -> Any:
    torch.manual_seed(1)
    targets = r".*language_model.*\.(q|v|down)_proj"
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets)).train()


def _sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)


def _alone() -> tuple[list[float], dict[str, torch.Tensor]]:
    model, losses = _lora(attached()), []
    optimizer = _sgd(model)
    for _ in range(STEPS):
        loss = model(**_inputs(ROWS)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, _trained(model)


def _trained(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def _worker(rank: int, strategy: str, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    inputs = _inputs(ROWS[2 * rank : 2 * rank + 2])
    tokens = int((_inputs(ROWS)["labels"][:, 1:] != -100).sum())
    train = {"ddp": _ddp, "zero3": _zero3}[strategy]
    losses, weights = train(inputs, tokens, folder)
    both = torch.tensor(losses)
    dist.all_reduce(both)
    if rank == 0:
        torch.save(((both / 2).tolist(), weights), f"{folder}/result.pt")
    dist.destroy_process_group()


def _ddp(inputs: Any, tokens: int, folder: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = _lora(attached())
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    assert adsc.plan_of(wrapped) == adsc.PruningPlan(stages=STAGES)
    optimizer, losses = _sgd(model), []
    for _ in range(STEPS):
        loss = 2 * wrapped(**inputs, num_items_in_batch=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, _trained(model)


def _zero3(inputs: Any, tokens: int, folder: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is to be compiled
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,  # its default is 1
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    kept = HfDeepSpeedConfig(settings)  # while it lives, weights are split as they are loaded
    model = adsc.from_pretrained(f"{folder}/base", dtype=torch.float32)
    assert all(p.numel() == 0 for p in model.parameters())
    model = _lora(model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=_sgd(model), config=settings)
    assert kept and adsc.plan_of(engine) == adsc.PruningPlan(stages=STAGES)
    losses = []
    for _ in range(STEPS):
        output = engine(**inputs, num_items_in_batch=tokens)
        assert output.logits.shape[1] == output.kept_positions[-1].shape[1]
        engine.backward(2 * output.loss)
        engine.step()
        losses.append(2 * output.loss.item())
    trained = [p for p in model.parameters() if p.requires_grad]
    with deepspeed.zero.GatheredParameters(trained):
        return losses, _trained(model)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_two_processes_equal_one(tmp_path: Path, strategy: str) -> None:
    attached().save_pretrained(tmp_path / "base")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_worker, args=(r, strategy, str(tmp_path))) for r in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=240)
        if worker.is_alive():
            worker.kill()
    assert [worker.exitcode for worker in workers] == [0, 0]
    losses, weights = torch.load(tmp_path / "result.pt")
    wanted, expected = _alone()
    assert wanted[-1] < wanted[0]
    # Worst measured: losses 1.5e-6, weights 1.2e-6.
    assert losses == pytest.approx(wanted, abs=1e-5)
    assert set(weights) == set(expected)
    worst = max((weights[name] - expected[name]).abs().max().item() for name in expected)
    assert worst < 1e-5

"""How workers share one model: plain DDP, or DeepSpeed's ZeRO 1 to 3. The only file that imports
deepspeed, and lazily.

Either way a step's gradient is the sum over workers and micro-batches of what the loop hands in,
and a snapshot holds whole fp32 tensors by parameter name. So all strategies write the same
checkpoints, and a run may resume with another strategy or another number of workers. That is why
DeepSpeed's own checkpoints, which are tied to a number of workers, are not used.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.training.config import TrainConfig

Tensors = dict[str, torch.Tensor]


class Strategy(Protocol):
    """The interface of the loop to DDP and ZeRO. Every rank makes the same calls."""

    model: nn.Module
    """What the loop calls, once `prepare` has run."""

    def loading(self) -> AbstractContextManager[None]:
        """Around the loading of the base model."""

    def prepare(self, model: nn.Module, groups: list[dict[str, Any]]) -> None:
        """Take over a model and AdamW's parameter groups."""

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch; `last`: of the step."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`; over workers, gradients are summed."""

    def step(self, rates: list[float]) -> torch.Tensor | float:
        """One optimizer step at a rate for each group; returns the gradient's norm before
        clipping, on the device where that waits for nothing."""

    def weights(self) -> Tensors:
        """Whole trained tensors in fp32 on the CPU, by name; empty on ranks other than 0."""

    def moments(self) -> dict[str, Tensors]:
        """AdamW's state by parameter name, likewise."""

    def restore(self, weights: Tensors, moments: dict[str, Tensors]) -> None:
        """Put back what `weights` and `moments` gave, or a part of it, on every rank."""

    def parts(self) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
        """Name, parameter and this rank's part of it, for all parameters."""


def strategy_for(config: TrainConfig, device: torch.device) -> Strategy:
    """The strategy that a config names."""
    return Ddp(config, device) if config.strategy == "ddp" else Zero(config, device)


def _world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _adamw(config: TrainConfig, groups: list[dict[str, Any]], fused: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=fused or None,
    )


class Ddp:
    """Every worker holds everything; gradients are exchanged. One worker needs no exchange."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.rank, self.world_size = _world()
        self.fused = device.type == "cuda"
        """Whether AdamW is one kernel for all parameters."""

    def loading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def prepare(self, model: nn.Module, groups: list[dict[str, Any]]) -> None:
        if self.config.compile:
            # A compiled layer is a graph small enough; DDP would split it for its buckets.
            torch._dynamo.config.optimize_ddp = False
        self._own = model.to(self.device)
        self.model = DistributedDataParallel(self._own) if self.world_size > 1 else self._own
        self.optimizer = _adamw(self.config, groups, fused=self.fused)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        # Gradients need only be exchanged once a step.
        hold = isinstance(self.model, DistributedDataParallel) and not last
        with self.model.no_sync() if hold else nullcontext():  # type: ignore[operator]
            yield

    def backward(self, loss: torch.Tensor) -> None:
        # DDP averages over workers what is to be summed.
        (loss * self.world_size).backward()

    def step(self, rates: list[float]) -> torch.Tensor:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for _, parameter in self._trained():
            if parameter.grad is None:  # a step without pictures: as under every other strategy
                parameter.grad = torch.zeros_like(parameter)
        norm = nn.utils.clip_grad_norm_([p for _, p in self._trained()], self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.detach()

    def weights(self) -> Tensors:
        if self.rank != 0:
            return {}
        return {n: p.detach().float().cpu().clone() for n, p in self._trained()}

    def moments(self) -> dict[str, Tensors]:
        if self.rank != 0:
            return {}
        state = self.optimizer.state
        return {
            name: {key: value.detach().cpu().clone() for key, value in state[parameter].items()}
            for name, parameter in self._trained()
            if parameter in state
        }

    def restore(self, weights: Tensors, moments: dict[str, Tensors]) -> None:
        own = dict(self._trained())
        with torch.no_grad():
            for name, tensor in weights.items():
                own[name].copy_(tensor)
        for name, state in moments.items():
            self.optimizer.state[own[name]] = {
                # AdamW wants its count on the CPU, unless it is fused.
                key: value.clone()
                if key == "step" and not self.fused
                else value.to(self.device, copy=True)
                for key, value in state.items()
            }

    def parts(self) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
        for name, parameter in self._own.named_parameters():
            yield name, parameter, parameter

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self._own.named_parameters() if p.requires_grad]


class Zero:
    """DeepSpeed's ZeRO: optimizer (1), gradients (2) and parameters (3) split among workers."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.stage = config.zero_stage
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
        try:
            import deepspeed
            import deepspeed.ops
        except ImportError as error:
            raise ValueError(
                f"train.strategy = {config.strategy} needs DeepSpeed ({error}): pip install "
                "'adsc[deepspeed]', or set train.strategy=ddp"
            ) from error

        if device.type == "cpu":
            # Else every first use compiles an operator for shared memory; gloo does without.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.utils.logger.setLevel("WARNING")
        # DeepSpeed calls torch by its old names, in every step.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
        self._deepspeed = deepspeed
        if not dist.is_initialized():
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=dist.HashStore(),
                rank=0,
                world_size=1,
            )
        self.rank, self.world_size = _world()
        os.environ.setdefault("LOCAL_RANK", "0")

    def settings(self) -> dict[str, Any]:
        """DeepSpeed's config."""
        # Buckets for an adapter's gradients: the default takes 2 GB for each.
        zero: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": 50_000_000}
        offload = self.config.offload
        for name, place in (("optimizer", offload.optimizer), ("param", offload.parameters)):
            if place is not None:
                on = {"device": "cpu"} if place == "cpu" else {"device": "nvme", "nvme_path": place}
                zero[f"offload_{name}"] = on | {"pin_memory": self.device.type == "cuda"}
        return {
            # The loop makes micro-batches itself and says which one is a step's last.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.config.clip,
            "zero_optimization": zero,
            # AdamW of torch: no compiler is needed, and it is the one that DDP uses.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }

    @contextmanager
    def loading(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        from transformers.integrations import HfDeepSpeedConfig
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        # While it lives, from_pretrained splits every tensor as it is loaded.
        bf16 = {"bf16": {"enabled": self.config.precision == "bf16"}}
        kept = HfDeepSpeedConfig(self.settings() | bf16)
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
            del kept

    def prepare(self, model: nn.Module, groups: list[dict[str, Any]]) -> None:
        # Fused, AdamW would want its count on the device of parameters that ZeRO may move off.
        self.optimizer = _adamw(self.config, groups, fused=False)
        self._engine, *_ = self._deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=self.settings()
        )
        self.model = self._engine

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        # DeepSpeed averages over workers, and by default over micro-batches.
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, rates: list[float]) -> float:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._engine.step()
        if getattr(self._engine.optimizer, "overflow", False):
            return float("inf")  # DeepSpeed left the step out
        return float(self._engine.get_global_grad_norm())

    def weights(self) -> Tensors:
        full = self._deepspeed.utils.safe_get_full_fp32_param
        return self._gathered((name, full(p)) for name, p in self._trained())

    def moments(self) -> dict[str, Tensors]:
        if not self._link():
            return {}
        full = self._deepspeed.utils.safe_get_full_optimizer_state
        found: dict[str, Tensors] = {}
        for key in ("exp_avg", "exp_avg_sq"):
            whole = self._gathered((name, full(p, key)) for name, p in self._trained())
            for name, tensor in whole.items():
                found.setdefault(name, {})[key] = tensor
        count = next(iter(self.optimizer.state.values()))["step"]
        return {
            name: state | {"step": count.detach().cpu().clone()} for name, state in found.items()
        }

    def restore(self, weights: Tensors, moments: dict[str, Tensors]) -> None:
        own = dict(self._trained())
        for name, tensor in weights.items():
            value = tensor.to(self.device)
            self._deepspeed.utils.safe_set_full_fp32_param(own[name], value)
            gathered = self._deepspeed.zero.GatheredParameters([own[name]], modifier_rank=0)
            with gathered if self.stage == 3 else nullcontext():
                own[name].data.copy_(value)
        if not moments:
            return
        count = next(iter(moments.values()))["step"]
        for flat in self._flat():
            self.optimizer.state[flat] = {
                "step": count.clone(),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        self._link()
        put = self._deepspeed.utils.safe_set_full_optimizer_state
        for name, state in moments.items():
            for key in ("exp_avg", "exp_avg_sq"):
                put(own[name], state[key].to(self.device), key)

    def parts(self) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
        for name, parameter in self._engine.module.named_parameters():
            yield name, parameter, getattr(parameter, "ds_tensor", parameter)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self._engine.module.named_parameters() if p.requires_grad]

    def _gathered(self, whole: Iterator[tuple[str, torch.Tensor]]) -> Tensors:
        """All ranks take part in the gathering; only rank 0 keeps anything."""
        found = {}
        for name, tensor in whole:
            if self.rank == 0:
                found[name] = tensor.detach().float().cpu().clone()
        return found

    def _flat(self) -> list[torch.Tensor]:
        """The flat fp32 tensors that AdamW really steps: this rank's share of each group."""
        zero = self._engine.optimizer
        if self.stage == 3:
            return list(zero.fp32_partitioned_groups_flat)
        return list(zero.single_partition_of_fp32_groups)

    def _link(self) -> bool:
        """Make AdamW's state reachable by parameter; False before the first step."""
        flats = self._flat()
        if not all(self.optimizer.state.get(flat) for flat in flats):
            return False
        if self.stage < 3:
            # DeepSpeed links all groups after the first group's first step, when the others
            # have no state yet.
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        return True

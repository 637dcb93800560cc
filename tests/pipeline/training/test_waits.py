"""How often a training step makes the host wait for its device, and AdamW in one kernel."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.training import strategy
from pipeline.training.config import TrainConfig
from pipeline.training.loop import train
from pipeline.training.strategy import Ddp
from tests.pipeline.training.training_runs import CONFIG, Plain, sources
from tests.small import Small

ADAMW = strategy._adamw
READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu"}
SIZED = {"nonzero", "masked_select", "unique"}


class Waits(TorchFunctionMode):
    """Counts calls that read values back, or whose result has a size that values decide. Those for
    host tensors alone (numpy, loading) have other names, or are equal in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        masks = name == "__getitem__" and any(
            isinstance(one, Tensor) and one.dtype == torch.bool
            for one in (args[1] if isinstance(args[1], tuple) else args[1:])
        )
        if name in READS | SIZED or masks:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def waits_of_a_step(small: Small, folder: Path, **changes: Any) -> Counter[str]:
    """What the second step of a training adds to the first."""
    found = []
    for steps in (1, 2):
        config = TrainConfig.model_validate(
            CONFIG.model_dump() | {"checkpoint_every": 9, "log_every": 9} | changes
        ).model_copy(update={"steps": steps})
        with Waits() as waits:
            train(config, sources(small), Plain(folder / f"{len(list(folder.iterdir()))}"))
        found.append(waits.calls)
    return found[1] - found[0]


def test_the_loop_waits_once_a_step_and_a_plan_three_times_a_call(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU; else AdamW reads the count of each parameter, which is on the host there.
    monkeypatch.setattr(strategy, "_adamw", lambda *given, fused: ADAMW(*given, fused=True))
    dense = waits_of_a_step(small, tmp_path, plan="")
    more = waits_of_a_step(small, tmp_path, plan="", accumulate=2)
    one = waits_of_a_step(small, tmp_path, plan="1:1/2")
    three = waits_of_a_step(small, tmp_path, plan="1:1/2,2:1/4,3:0")
    # The rest of a dense step's are transformers' own, which looks for padding and counts images.
    assert dense["tolist"] == more["tolist"] == 1
    assert one == three
    assert (one - dense).total() == 3


def test_fused_adamw_is_adamw_and_their_states_are_exchangeable() -> None:
    """Within 1e-6; as on a GPU, where it is the default."""
    made = []
    for order in ((False, False), (True, True), (True, False), (False, True)):
        torch.manual_seed(0)
        model, kept = nn.Linear(8, 8), ({}, {})
        for number, fused in enumerate(order):
            ddp = Ddp(CONFIG, torch.device("cpu"))
            ddp.fused = fused
            ddp.prepare(model, [{"params": list(model.parameters())}])
            ddp.restore({}, kept[1])
            for step in range(3):
                torch.manual_seed(10 * number + step)
                model(torch.randn(4, 8)).square().sum().backward()
                ddp.step([1e-2])
            kept = (ddp.weights(), ddp.moments())
        made.append(kept[0] | {f"{n} {k}": v for n, s in kept[1].items() for k, v in s.items()})
    for other in made[1:]:
        assert other.keys() == made[0].keys()
        for name, tensor in other.items():
            torch.testing.assert_close(tensor, made[0][name], rtol=1e-5, atol=1e-6)


def test_flash_attention_falls_back_and_says_so(small: Small, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"steps": 1, "attention": "flash_attention_3"})
    with pytest.warns(UserWarning, match=r"flash_attention_3 can't be used, sdpa is: it needs a"):
        train(config, sources(small), Plain(tmp_path))

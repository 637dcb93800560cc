"""What is trained of a model, and how it is stored: a LoRA adapter, fully tuned parts, or both; and
a check that exactly this moved.

A folder of trained weights holds `adapter/` (PEFT's own format) if there is an adapter, and
`tuned.safetensors` (parameter name of the base model -> tensor) if parts are tuned in full.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.training.config import DECODER_LINEARS, LoraSettings

BASE = "base_model.model."
"""What PEFT puts before the names of a model's parameters."""
ADAPTER = "adapter/adapter_model.safetensors"
TUNED = "tuned.safetensors"


def prepare_trainable(
    model: nn.Module, lora: LoraSettings | None, tune: tuple[str, ...]
) -> nn.Module:
    """Freeze all but the declared parameters and add a fresh adapter.

    Args:
        model: the base model; changed in place.
        lora: adapter settings, or None for no adapter.
        tune: regular expressions of parameters that are tuned in full.

    Raises:
        ValueError: an expression that matches nothing, a part that is both tuned and adapted, or
            nothing to train at all.
    """
    by_name = dict(model.named_parameters())
    unmatched = [rule for rule in tune if not any(re.fullmatch(rule, name) for name in by_name)]
    if unmatched:
        raise ValueError(
            f"train.tune {unmatched} match no parameter, such as {next(iter(by_name))!r}"
        )
    if lora is None and not tune:
        raise ValueError("nothing to train: set train.lora or train.tune")
    tuned = [name for name in by_name if any(re.fullmatch(rule, name) for rule in tune)]
    model.requires_grad_(False)
    if lora is not None:
        model = get_peft_model(model, _peft_config(lora))  # type: ignore[arg-type]
    for name in tuned:
        # Small steps would be lost in a half-precision weight.
        by_name[name].data = by_name[name].data.float()
        # Where ZeRO-3 has split a parameter, its values are in this worker's part.
        part = getattr(by_name[name], "ds_tensor", None)
        if part is not None:
            part.data = part.data.float()
        by_name[name].requires_grad_(True)
    both = [n for n, p in model.named_parameters() if p.requires_grad and ".base_layer." in n]
    if both:
        raise ValueError(
            f"train.tune names parameters that also get an adapter, such as {both[:2]}: leave them "
            "out of train.tune or of train.lora.targets"
        )
    return model


def _peft_config(lora: LoraSettings) -> LoraConfig:
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=decoder_targets(lora.targets),
    )


def decoder_targets(targets: str) -> str:
    """The expression that PEFT gets: the default also finds SmolVLM's and Idefics3's decoder, which
    is called `text_model`. In configs it stays as it is, since it identifies finished stages."""
    if targets != DECODER_LINEARS:
        return targets
    return targets.replace("language_model", "(language_model|text_model)")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Trained weights as they are stored."""

    lora: LoraSettings | None
    adapter: dict[str, torch.Tensor]
    """By PEFT's stored names."""
    tuned: dict[str, torch.Tensor]
    """By the base model's names."""

    def write(self, folder: Path) -> None:
        """Write files that need nothing else to be read."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.lora is not None:
            settings = _peft_config(self.lora)
            settings.inference_mode = True
            settings.save_pretrained(str(folder / "adapter"))
            file = folder / "adapter" / "adapter_config.json"
            # A path that the base was loaded from means nothing elsewhere.
            content = json.loads(file.read_text()) | {"base_model_name_or_path": None}
            file.write_text(json.dumps(content, indent=2, sort_keys=True))
            save_file(self.adapter, folder / ADAPTER, metadata={"format": "pt"})
            (folder / ADAPTER).chmod(0o644)
        if self.tuned:
            save_file(self.tuned, folder / TUNED)


def trained_parts(weights: dict[str, torch.Tensor], lora: LoraSettings | None) -> Trained:
    """Sort whole trained tensors, named as in the model that `prepare_trainable` gave."""
    adapter, tuned = {}, {}
    for name, tensor in weights.items():
        if ".lora_" in name:
            adapter[name.replace(".default.", ".")] = tensor
        else:
            tuned[name.removeprefix(BASE)] = tensor
    return Trained(lora=lora, adapter=adapter, tuned=tuned)


def read_trained(
    folder: Path, own: set[str], lora: LoraSettings | None, whole: bool = False
) -> dict[str, torch.Tensor]:
    """Trained weights by their names in a model that `prepare_trainable` gave.

    Args:
        folder: what `Trained.write` wrote.
        own: names of the model's trained parameters.
        lora: the model's adapter, which must be like the stored one.
        whole: refuse if any of `own` is missing, and not only if any would be lost.

    Raises:
        ValueError: stored weights that this training would drop, or another adapter.
    """
    found: dict[str, torch.Tensor] = {}
    prefix = BASE if lora is not None else ""
    if (folder / TUNED).exists():
        found |= {prefix + name: tensor for name, tensor in load_file(folder / TUNED).items()}
    if (folder / ADAPTER).exists():
        stored = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        targets = stored["target_modules"]
        targets = decoder_targets(targets) if isinstance(targets, str) else targets
        there = (stored["r"], stored["lora_alpha"], targets)
        here = lora and (lora.rank, lora.alpha, decoder_targets(lora.targets))
        if here is not None and there != here:
            raise ValueError(
                f"train.lora has (rank, alpha, targets) = {here}, the adapter to continue from has "
                f"{there}: all stages of a curriculum train one adapter"
            )
        places = {name.replace(".default.", "."): name for name in own}
        found |= {places.get(name, name): t for name, t in load_file(folder / ADAPTER).items()}
    odd = found.keys() - own or (own - found.keys() if whole else set())
    if odd:
        raise ValueError(
            f"trained parameters differ from those of the weights to continue from, such as "
            f"{sorted(odd)[:3]}: train.lora and train.tune must cover what was trained before"
        )
    return found


def load_tuned(model: nn.Module, file: Path) -> None:
    """Put fully tuned parts into a model; a name that the model lacks is an error."""
    own = dict(model.named_parameters())
    tensors = load_file(file)
    unknown = sorted(set(tensors) - set(own))
    if unknown:
        raise ValueError(f"{file.name} holds parameters that the model lacks: {unknown[:4]}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def load_trained(model: nn.Module, folder: Path) -> nn.Module:
    """The base model with trained weights in place; an adapter stays one."""
    if (folder / TUNED).exists():
        load_tuned(model, folder / TUNED)
    if (folder / "adapter").exists():
        model = PeftModel.from_pretrained(model, str(folder / "adapter"))  # type: ignore[arg-type]
    return model


def merge_trained(model: nn.Module, folder: Path) -> nn.Module:
    """The base model with trained weights folded in: no adapter is left."""
    model = load_trained(model, folder)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    return model


class MovementError(ValueError):
    """Other parameters moved than the config declares."""


def checksums(
    parts: Iterable[tuple[str, nn.Parameter, torch.Tensor]],
) -> dict[str, tuple[bool, float]]:
    """Per parameter: whether it is to move, and a number that changes when it does.

    Under ZeRO-3 a rank sums up the part of a parameter that it holds; what moved anywhere moved.
    """
    sums = {}
    with torch.no_grad():
        for name, parameter, part in parts:
            sums[name] = (parameter.requires_grad, _weighted_sum(part.flatten()))
    return sums


def _weighted_sum(values: torch.Tensor, period: int = 8191) -> float:
    """Of (count,) values, in float64; the weights 1 to `period` repeat."""
    if values.dtype.itemsize == 1:
        values = values.float()  # torch doesn't sum float8
    whole = len(values) // period * period
    sums = values[:whole].view(-1, period).sum(0, dtype=torch.float64)
    sums[: len(values) - whole] += values[whole:]
    return float(sums @ torch.arange(1.0, period + 1, dtype=torch.float64, device=values.device))


def check_moved(
    before: dict[str, tuple[bool, float]], after: dict[str, tuple[bool, float]]
) -> None:
    """Compare checksums; every rank calls it.

    Raises:
        MovementError: on every rank, naming some parameters.
    """
    flags = torch.tensor([float(after[name][1] != was) for name, (_, was) in before.items()])
    if dist.is_initialized() and dist.get_world_size() > 1:
        flags = flags.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    moved = {name for name, flag in zip(before, flags.tolist(), strict=True) if flag}
    leaked = [name for name, (trained, _) in before.items() if not trained and name in moved]
    if leaked:
        raise MovementError(
            f"{len(leaked)} frozen parameters moved, such as {leaked[:3]}: report this bug"
        )
    still = [name for name, (trained, _) in before.items() if trained and name not in moved]
    # In a fresh adapter's first step B is zero, and so is the gradient of A.
    still = [name for name in still if ".lora_A." not in name]
    if still:
        raise MovementError(
            f"{len(still)} parameters were to be trained but did not move, such as {still[:3]}: "
            "the model does not use them; leave them out of train.tune or train.lora.targets"
        )

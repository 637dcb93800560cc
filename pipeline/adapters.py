"""What is trained of a model, and how it is stored: a LoRA adapter, fully tuned parts, or both.

A folder of trained weights holds `adapter/` (PEFT's own format) if there is an adapter, and
`tuned.safetensors` (parameter name of the base model -> tensor) if parts are tuned in full.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.train_config import LoraSettings


def prepare_trainable(
    model: nn.Module, lora: LoraSettings | None, tune: tuple[str, ...], start: Path | None
) -> nn.Module:
    """Freeze all but the declared parameters and add or load the adapter.

    Args:
        model: the base model; changed in place.
        lora: adapter settings, or None for no adapter.
        tune: regular expressions of parameters that are tuned in full.
        start: folder of trained weights to start from, or None.

    Raises:
        ValueError: an expression that matches nothing, or nothing to train at all.
    """
    names = [name for name, _ in model.named_parameters()]
    unmatched = [rule for rule in tune if not any(re.fullmatch(rule, name) for name in names)]
    if unmatched:
        raise ValueError(f"train.tune {unmatched} match no parameter, such as {names[0]!r}")
    if lora is None and not tune:
        raise ValueError("nothing to train: set train.lora or train.tune")
    tuned = {name for name in names if any(re.fullmatch(rule, name) for rule in tune)}
    if start is not None and (start / "tuned.safetensors").exists():
        load_tuned(model, start / "tuned.safetensors")
    by_name = dict(model.named_parameters())
    model.requires_grad_(False)
    if lora is not None and start is not None and (start / "adapter").exists():
        adapter = str(start / "adapter")
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)  # type: ignore[arg-type]
    elif lora is not None:
        settings = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            target_modules=lora.targets,
        )
        model = get_peft_model(model, settings)  # type: ignore[arg-type]
    for name in tuned:
        # Small steps would be lost in a half-precision weight.
        by_name[name].data = by_name[name].data.float()
        by_name[name].requires_grad_(True)
    return model


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every trainable tensor by its name in `model`, on the CPU."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def load_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put back what `trained_state` gave; every name must be there, and no other."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if set(own) != set(state):
        odd = sorted(set(own) ^ set(state))
        raise ValueError(f"a checkpoint's trainable parameters differ from the model's: {odd[:4]}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def save_trained(model: nn.Module, folder: Path) -> None:
    """Write the adapter and the fully tuned parts as files that need nothing else to be read."""
    folder.mkdir(parents=True, exist_ok=True)
    base: Any = model
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder / "adapter"))
        settings = folder / "adapter" / "adapter_config.json"
        # PEFT stores the path that the base was loaded from, which means nothing elsewhere.
        content = json.loads(settings.read_text()) | {"base_model_name_or_path": None}
        settings.write_text(json.dumps(content, indent=2, sort_keys=True))
        (folder / "adapter" / "adapter_model.safetensors").chmod(0o644)
        base = model.get_base_model()
    tuned = {
        name: parameter.detach().cpu().contiguous().clone()
        for name, parameter in base.named_parameters()
        if parameter.requires_grad and ".lora_" not in name
    }
    if tuned:
        save_file(tuned, folder / "tuned.safetensors")


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
    if (folder / "tuned.safetensors").exists():
        load_tuned(model, folder / "tuned.safetensors")
    if (folder / "adapter").exists():
        model = PeftModel.from_pretrained(model, str(folder / "adapter"))  # type: ignore[arg-type]
    return model


def merge_trained(model: nn.Module, folder: Path) -> nn.Module:
    """The base model with trained weights folded in: no adapter is left."""
    model = load_trained(model, folder)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    return model

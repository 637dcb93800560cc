"""What all arms share is computed once: pictures, what a frozen tower and projector make of them,
and what the dense base, which teaches the distilled arms, makes of the training batches.

What is remembered is what the model itself computed, in batches of another size: equal up to the
order of float additions (tests/workflows/evidence/test_ladder.py has the bound). Methods that
look at the tower (`LOOKING`) or stages that train it get none of it.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from adsc.families.family import SIZE
from pipeline.training.config import DistillSettings
from pipeline.training.objective import Objective

LOOKING = ("visionzip", "downsample")
"""Peers that read the tower's attention, or change what it sees."""
BATCH = 32
TAUGHT = "taught"
"""The objective's argument that holds a teacher's states."""


def key_of(picture: Tensor) -> bytes:
    """Of one picture (3, H, W) as the tower gets it."""
    return hashlib.blake2b(
        picture.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(), digest_size=16
    ).digest()


def pack(inputs: Mapping[str, Tensor], pictures: dict[bytes, Tensor]) -> dict[str, Any]:
    """A model's inputs with keys in the place of pictures, which go to `pictures`; all in this
    process's memory, since shared tensors hold a file descriptor each."""
    packed: dict[str, Any] = {}
    for name, tensor in inputs.items():
        if name == "pixel_values" and tensor.ndim == 4:
            packed[name] = tuple(map(key_of, tensor))
            for key, picture in zip(packed[name], tensor, strict=True):
                if key not in pictures:
                    pictures[key] = picture.clone()
        else:
            packed[name] = tensor.clone()
    return packed


def unpack(packed: Mapping[str, Any], pictures: Mapping[bytes, Tensor]) -> dict[str, Tensor]:
    """The inputs that were packed."""
    return {
        name: torch.stack([pictures[key] for key in value]) if isinstance(value, tuple) else value
        for name, value in packed.items()
    }


@torch.no_grad()
def remember(model: Any, pictures: Mapping[bytes, Tensor]) -> dict[bytes, Tensor]:
    """Features (n, D) of every picture, by its key."""
    found: dict[bytes, Tensor] = {}
    keys = list(pictures)
    for start in range(0, len(keys), BATCH):
        chosen = keys[start : start + BATCH]
        pixels = torch.stack([pictures[key] for key in chosen]).to(model.device, model.dtype)
        made = model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        found |= zip(chosen, (one.clone() for one in made), strict=True)
    return found


def teach_ahead(
    model: Any, micro: Mapping[str, Any], pictures: Mapping[bytes, Tensor]
) -> dict[str, Any]:
    """A packed micro-batch with the states that the dense model teaches there (Objective.teach)."""
    objective = Objective(model, DistillSettings(), model.device, in_step=False)
    states, _ = objective.teach(unpack(micro, pictures) | {"use_cache": False})
    return {**micro, TAUGHT: states}


def install(model: Any, features: Mapping[bytes, Tensor]) -> None:
    """Have a LLaVA-1.5 model look its pictures up; those that aren't there pass the tower."""
    inner = model.model
    inner.get_image_features = Remembered(inner.get_image_features, features)


class Remembered:
    """Takes the place of `get_image_features`."""

    def __init__(self, make: Any, features: Mapping[bytes, Tensor]) -> None:
        self._make, self._features = make, features

    def __call__(self, pixel_values: Tensor, **more: Any) -> Any:
        found = [self._features.get(key_of(picture)) for picture in pixel_values]
        if any(one is None for one in found):
            return self._make(pixel_values=pixel_values, **more)
        # LLaVA's own towers return one tensor per picture here, too.
        features: Any = tuple(one.to(pixel_values.device) for one in found if one is not None)
        output = BaseModelOutputWithPooling(pooler_output=features)
        setattr(output, SIZE, tuple(pixel_values.shape[-2:]))
        return output

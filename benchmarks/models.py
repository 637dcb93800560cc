"""Models and inputs of the benchmarks: LLaVA geometries with random weights, and plans by budget.

Time depends on shapes only, so nothing is downloaded. Dense model and plans are twins: separate
modules with the same weights in memory, so that they can take turns without hooks going on and off.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import adsc
from adsc.costs.geometries import geometry

# Layer averages as shares of the vision tokens (the field's 192, 128, 64 of 576), and what each of
# two drops keeps to meet it.
BUDGETS = ((1 / 3, "1/4"), (2 / 9, "1/4"), (1 / 9, "1/8"))
# width, decoder layers, patches per side
SMALL = {"tiny": (64, 12, 6), "cpu": (512, 12, 24), "cpu-narrow": (256, 12, 24)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FIRST = 3  # ids below are special


def llava_config(name: str, *, layers: int | None = None, **text: Any) -> LlavaConfig:
    """A LLaVA's config: one of SMALL, with a small tower, or a geometry of `adsc.costs.geometries`.

    Args:
        name: of the geometry.
        layers: of the decoder, if not those of the geometry.
        text: other fields of a SMALL decoder.
    """
    if name not in SMALL:
        config = geometry(name)
        config.text_config.num_hidden_layers = layers or config.text_config.num_hidden_layers
        return config
    width, depth, side = SMALL[name]
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=14 * side,
        patch_size=14,
    )
    decoder = {
        "vocab_size": 1000,
        "hidden_size": width,
        "intermediate_size": 11 * width // 4,
        "num_hidden_layers": layers or depth,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": 2048,
        "eos_token_id": None,
    }
    return LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**decoder | text),
        image_token_index=999,
        image_seq_length=side * side,
        vision_feature_layer=-2,
    )


def vision_tokens(config: LlavaConfig) -> int:
    """Vision tokens of one image."""
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2


def build(config: LlavaConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """A model with random weights, made on the device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlavaForConditionalGeneration(copy.deepcopy(config))
    finally:
        torch.set_default_dtype(before)
    model.config.dtype = dtype
    with torch.no_grad():
        model.lm_head.weight[config.image_token_id] = 0  # never the likeliest: it is no word
    return model.eval().requires_grad_(False)


def twin(model: nn.Module, plan: adsc.PruningPlan | str | None = None) -> Any:
    """Another model with the same tensors, with a plan; None: as transformers ships it."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)
    return other if plan is None else adsc.attach(other, plan)


def plans(config: LlavaConfig) -> dict[str, adsc.PruningPlan]:
    """A plan of two drops for each budget, by the layer average that it has.

    None drops before layer 0: a static cache needs that layer whole.
    """
    layers, tokens = config.text_config.num_hidden_layers, vision_tokens(config)
    found = {}
    for share, keep in BUDGETS:
        (plan,) = adsc.solve_plans(
            layers, tokens, share * tokens, 2, keep, tolerance=0.1, first_layer=1, limit=1
        )
        found[f"average {share * tokens:.0f}"] = plan
    return found


def batch(
    config: LlavaConfig,
    rows: Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    side: str = "left",
    seed: int = 1,
) -> dict[str, Tensor]:
    """Inputs drawn at random.

    Args:
        config: of the model.
        rows: for each row its parts: 0 is an image, a number that many words.
        device: of the inputs.
        dtype: of the pictures.
        side: of the padding, where rows differ in length; else there is no mask.
        seed: of words and pictures.
    """
    draw = torch.Generator().manual_seed(seed)
    words = config.text_config.vocab_size
    pieces = [
        [
            torch.randint(FIRST, min(words, config.image_token_id), (part,), generator=draw)
            if part
            else torch.full((vision_tokens(config),), config.image_token_id)
            for part in parts
        ]
        for parts in rows
    ]
    ids = [torch.cat(parts) for parts in pieces]
    width = max(map(len, ids))
    gaps = [(width - len(one), 0) if side == "left" else (0, width - len(one)) for one in ids]
    inputs = {
        "input_ids": torch.stack(
            [nn.functional.pad(one, gap) for one, gap in zip(ids, gaps, strict=True)]
        )
    }
    if any(sum(gap) for gap in gaps):
        seen = [
            nn.functional.pad(torch.ones_like(one), gap) for one, gap in zip(ids, gaps, strict=True)
        ]
        inputs["attention_mask"] = torch.stack(seen)
    if images := sum(parts.count(0) for parts in map(list, rows)):
        pixels = config.vision_config.image_size
        inputs["pixel_values"] = torch.randn(images, 3, pixels, pixels, generator=draw).to(dtype)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def prompts(
    config: LlavaConfig, rows: int, text: int, device: torch.device, dtype: torch.dtype, seed=1
) -> dict[str, Tensor]:
    """Equal rows of one image among `text` words."""
    return batch(config, [(5, 0, text - 5)] * rows, device, dtype, seed=seed)


def parser(doc: str, *, geometry_name: str, rows: int, rounds: int) -> argparse.ArgumentParser:
    """The options that the benchmarks share."""
    made = argparse.ArgumentParser(description=doc.split("\n", 1)[0])
    made.add_argument(
        "--geometry",
        default=geometry_name,
        help=f"{', '.join(SMALL)}, or one of adsc.costs.geometries",
    )
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--dtype", choices=DTYPES, help="float32 on a CPU, else bfloat16")
    made.add_argument("--text", type=int, default=101, help="text tokens of a row")
    made.add_argument("--batch", type=int, default=rows, help="rows")
    made.add_argument("--rounds", type=int, default=rounds, help="timed rounds")
    made.add_argument("--json", type=Path, help="also write the figures to this file")
    return made


def parsed(made: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
    """Options with the device and dtype as torch's; those of the command line by default."""
    options = made.parse_args(arguments)
    options.device = torch.device(options.device)
    name = options.dtype or ("float32" if options.device.type == "cpu" else "bfloat16")
    options.dtype = DTYPES[name]
    return options

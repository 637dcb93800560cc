"""One tiny random model for each family, pictures for it, and the slow reference for all of them.

The reference takes a row alone through plain transformers in eager attention up to the first drop,
and then runs layer after layer by hand: index lists from the definition, a mask drawn up from
scratch, and the rotary tables that the plain model made, at the columns that are left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tests.adsc.tiny import kept_of

IMAGE, VIDEO = 90, 91
LAYERS = 5
TEXT = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
QWEN_VISION = {
    "depth": 3,
    "hidden_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]


@dataclass(frozen=True)
class Picture:
    """One image or video: its tensors as the model takes them, its ids, its units of vision tokens.

    Args:
        inputs: tensors to be put together along their first axis.
        ids: placeholders, with the words that stand between them.
        units: tokens of each part that is downsampled on its own.
    """

    inputs: dict[str, Tensor]
    ids: list[int]
    units: list[int]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family.

    Args:
        build: makes the model.
        pictures: makes a few pictures of it, of different sizes where the family knows such.
        collate: puts the pictures of all rows together.
        types: name and values of per-column types, from the ids of a row.
        blocks: from the types of a row, the number of each column's block, -1 for none.
        window: sliding window of a layer, None for none; whether it also cuts blocks.
        drops: a plan that the family allows.
    """

    build: Callable[[], Any]
    pictures: Callable[[Any], list[Picture]]
    collate: Callable[[list[list[Picture]]], dict[str, Tensor]] = field(
        default=lambda rows: concatenate([one for row in rows for one in row])
    )
    types: tuple[str, Callable[[list[int]], list[int]]] | None = None
    blocks: Callable[[list[int]], list[int]] | None = None
    window_cuts_blocks: bool = False
    drops: tuple[tuple[int, float], ...] = ((1, 0.5), (3, 0.4))

    def model(self, implementation: str = "eager") -> Any:
        torch.manual_seed(0)
        model = self.build().eval()
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            output = model.get_output_embeddings()
            if output.weight is model.get_input_embeddings().weight:
                output.weight = torch.nn.Parameter(output.weight.clone())
            output.weight[[IMAGE, VIDEO]] = 0
        return model

    def batch(self, rows: list[list[int | Picture]], side: str = "left") -> dict[str, Tensor]:
        """Rows of word counts and pictures, padded to the longest."""
        ids = [ids_of(row) for row in rows]
        width = max(map(len, ids))

        def pad(values: list[list[int]], filler: int) -> Tensor:
            gaps = [[filler] * (width - len(one)) for one in values]
            pairs = zip(values, gaps, strict=True)
            return torch.tensor([g + v if side == "left" else v + g for v, g in pairs])

        inputs = {"input_ids": pad(ids, 0), "attention_mask": pad([[1] * len(i) for i in ids], 0)}
        if self.types is not None:
            name, make = self.types
            inputs[name] = pad([make(one) for one in ids], 0)
        pictures = [[part for part in row if isinstance(part, Picture)] for row in rows]
        return inputs | (self.collate(pictures) if any(pictures) else {})


def ids_of(row: list[int | Picture]) -> list[int]:
    ids: list[int] = []
    for number, part in enumerate(row):
        if isinstance(part, Picture):
            ids += part.ids
        else:
            draw = torch.Generator().manual_seed(part + number)
            ids += torch.randint(3, IMAGE, (part,), generator=draw).tolist()
    return ids


def concatenate(pictures: list[Picture]) -> dict[str, Tensor]:
    names = {name for picture in pictures for name in picture.inputs}
    return {
        name: torch.cat([p.inputs[name] for p in pictures if name in p.inputs]) for name in names
    }


def units_of(row: list[int | Picture]) -> list[list[int]]:
    """Columns of each unit of a row alone."""
    places = [i for i, token in enumerate(ids_of(row)) if token in (IMAGE, VIDEO)]
    units, start = [], 0
    for part in row:
        for size in part.units if isinstance(part, Picture) else []:
            units.append(places[start : start + size])
            start += size
    assert start == len(places)
    return units


def reference(
    case: Case,
    model: Any,
    row: list[int | Picture],
    stages: list[tuple[int, float]],
    anchor: str = "last",
    extra: list[int] | None = None,
    groups: list[list[Any]] | None = None,
    grad: bool = False,
    saw: list[tuple[Tensor, list[int]]] | None = None,
) -> tuple[Tensor, list[int]]:
    """Logits (Q, vocab) of one row at the columns that are left, and those columns.

    Args:
        extra: tokens after the row: what was generated so far.
        groups: for each unit of the row and each stage pairs (anchor, members) of its tokens'
            numbers: a member's place takes their mean. Without them tokens are dropped.
        grad: whether gradients are wanted.
        saw: takes what each layer from the first drop on saw, and its columns.
    """
    with torch.set_grad_enabled(grad):
        return _reference(case, model, row, stages, anchor, extra, groups, saw)


def _reference(
    case: Case,
    model: Any,
    row: list[int | Picture],
    stages: list[tuple[int, float]],
    anchor: str,
    extra: list[int] | None,
    groups: list[list[Any]] | None,
    saw: list[tuple[Tensor, list[int]]] | None,
) -> tuple[Tensor, list[int]]:
    inputs = {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in case.batch([row]).items()
    }
    types = None
    if case.types is not None:
        types = inputs[case.types[0]][0].tolist()
    if extra:
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([extra])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if types is not None:
            types += [1 if case.types[0] == "token_type_ids" and case.blocks is prefix else 0] * (
                len(extra)
            )
            inputs[case.types[0]] = torch.tensor([types])
    first = stages[0][0]
    decoder = model.model.text_model if hasattr(model.model, "text_model") else None
    decoder = decoder or model.model.language_model
    start: dict[str, Tensor] = {}
    rotary: dict[int, Any] = {}
    handles = []
    for number, layer in enumerate(decoder.layers):

        def record(_: Any, args: Any, kwargs: Any, number: int = number) -> None:
            rotary[number] = kwargs["position_embeddings"]
            if number == first:
                start["hidden"] = args[0]

        handles.append(layer.register_forward_pre_hook(record, with_kwargs=True))
    model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()

    hidden, columns = start["hidden"], list(range(inputs["input_ids"].shape[1]))
    units = units_of(row)
    places = units
    vision = {column for unit in units for column in unit}
    blocks = case.blocks(types) if case.blocks is not None else None
    for number in range(first, LAYERS):
        for stage, (at, keep) in enumerate(stages):
            if at == number:
                if groups is not None:
                    before = dict(zip(columns, hidden[0], strict=True))
                    after = dict(before)
                    for place, mine in zip(places, groups, strict=True):
                        for one, members in mine[stage]:
                            each = [before[place[member]] for member in members]
                            after[place[one]] = sum(each) / len(each)
                    hidden = torch.stack(list(after.values())).unsqueeze(0)
                    units = [
                        [place[one] for one, _ in mine[stage]]
                        for place, mine in zip(places, groups, strict=True)
                    ]
                else:
                    units = [
                        [unit[i] for i in kept_of(len(unit), keep, anchor)] if keep else []
                        for unit in units
                    ]
                left = {column for unit in units for column in unit}
                stay = [i for i, c in enumerate(columns) if c not in vision or c in left]
                hidden, columns = hidden[:, stay], [columns[i] for i in stay]
        window = None
        config = decoder.config
        if getattr(config, "layer_types", None) and "sliding" in config.layer_types[number]:
            window = config.sliding_window
        mask = _mask(columns, blocks, window, case.window_cuts_blocks).to(hidden.dtype)
        if saw is not None:
            saw.append((hidden[0], columns))
        hidden = type(decoder.layers[number]).forward(
            decoder.layers[number],
            hidden,
            attention_mask=mask,
            position_embeddings=tuple(table[..., columns, :] for table in rotary[number]),
        )
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    logits = model.get_output_embeddings()(decoder.norm(hidden))[0]
    cap = getattr(config, "final_logit_softcapping", None)
    return (logits if cap is None else torch.tanh(logits / cap) * cap), columns


def _mask(columns: list[int], blocks: Any, window: int | None, cuts: bool) -> Tensor:
    width = len(columns)
    mask = torch.full((width, width), torch.finfo(torch.float32).min)
    for q in range(width):
        for k in range(width):
            near = window is None or k > q - window
            seen = k <= q
            if blocks is not None and blocks[columns[q]] == blocks[columns[k]] >= 0:
                seen, near = True, near or not cuts
            if seen and near:
                mask[q, k] = 0
    return mask[None, None]


def runs(types: list[int]) -> list[int]:
    """Gemma 3: each run of image tokens is a block."""
    numbers, block = [], -1
    for i, kind in enumerate(types):
        block += kind == 1 and (i == 0 or types[i - 1] != 1)
        numbers.append(block if kind == 1 else -1)
    return numbers


def prefix(types: list[int]) -> list[int]:
    """PaliGemma: the prefix is one block."""
    return [0 if kind == 0 else -1 for kind in types]


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _fixed(tokens: int) -> Callable[[Any], list[Picture]]:
    def make(model: Any) -> list[Picture]:
        return [
            Picture({"pixel_values": _noise(1, 3, 32, 32, seed=seed)}, [IMAGE] * tokens, [tokens])
            for seed in range(3)
        ]

    return make


def _tiles(model: Any) -> list[Picture]:
    """InternVL: an image of several tiles is as many pictures to the model."""
    return [
        Picture({"pixel_values": _noise(n, 3, 32, 32, seed=n)}, [IMAGE] * 4 * n, [4] * n)
        for n in (1, 3, 2)
    ]


def _tiles_between_words(model: Any) -> list[Picture]:
    return [
        Picture({"pixel_values": _noise(n, 3, 32, 32, seed=n)}, ([5] + [IMAGE] * 4) * n, [4] * n)
        for n in (1, 3, 2)
    ]


def _stack_rows(rows: list[list[Picture]]) -> dict[str, Tensor]:
    """SmolVLM: (B, most pictures of a row, 3, H, W), zeros where a row has fewer."""
    tiles = [[p.inputs["pixel_values"] for p in row] for row in rows]
    counts = [sum(map(len, row)) for row in tiles]
    stacked = torch.zeros(len(rows), max(counts), 3, 32, 32)
    for into, row, count in zip(stacked, tiles, counts, strict=True):
        if count:
            into[:count] = torch.cat(row)
    return {"pixel_values": stacked}


def _anyres(model: Any) -> list[Picture]:
    pictures = []
    for seed, (size, crops) in enumerate([((30, 60), 3), ((64, 60), 5), ((20, 90), 3)]):
        inputs = {
            "pixel_values": _noise(1, crops, 3, 32, 32, seed=seed),
            "image_sizes": torch.tensor([size]),
        }
        features = model.model.get_image_features(**inputs).pooler_output
        n = features[0].shape[0]
        inputs["pixel_values"] = torch.cat(
            [inputs["pixel_values"], torch.zeros(1, 5 - crops, 3, 32, 32)], dim=1
        )
        pictures.append(Picture(inputs, [IMAGE] * n, [n]))
    return pictures


def _onevision(model: Any) -> list[Picture]:
    video = {"pixel_values_videos": _noise(1, 3, 3, 32, 32, seed=9)}
    return [*_anyres(model)[:2], Picture(video, [VIDEO] * 13, [4, 4, 4, 1])]


def _qwen(timestamps: bool) -> Callable[[Any], list[Picture]]:
    """Two images of different sizes, and a video of two frame groups."""

    def make(model: Any) -> list[Picture]:
        def patches(t: int, h: int, w: int) -> Tensor:
            return _noise(t * h * w, 3 * 2 * 4 * 4, seed=h * w)

        def image(h: int, w: int) -> Picture:
            inputs = {
                "pixel_values": patches(1, h, w),
                "image_grid_thw": torch.tensor([[1, h, w]]),
            }
            return Picture(inputs, [92] + [IMAGE] * (h * w // 4) + [93], [h * w // 4])

        inputs = {
            "pixel_values_videos": patches(2, 4, 4),
            "video_grid_thw": torch.tensor([[2, 4, 4]]),
        }
        frame = [92] + [VIDEO] * 4 + [93]
        ids = [7, *frame, 8, *frame] if timestamps else [92] + [VIDEO] * 8 + [93]
        return [image(8, 4), image(4, 12), Picture(inputs, ids, [4, 4])]

    return make


def _modality(ids: list[int]) -> list[int]:
    return [{IMAGE: 1, VIDEO: 2}.get(token, 0) for token in ids]


def _qwen_text(section: list[int], **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": section, "rope_theta": 10000.0}
    return TEXT | {"rope_parameters": rope} | more


_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
_ANYRES = {"vision_feature_layer": -1, "image_grid_pinpoints": PINPOINTS}
_SLIDING = [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding", "full")]

CASES = {
    "llava": Case(
        build=lambda: hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(
                vision_config=hf.CLIPVisionConfig(**VISION),
                text_config=hf.LlamaConfig(**TEXT),
                image_token_index=IMAGE,
                vision_feature_layer=-1,
            )
        ),
        pictures=_fixed(16),
    ),
    "llava sliding": Case(
        build=lambda: hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(
                vision_config=hf.CLIPVisionConfig(**VISION),
                text_config=hf.Qwen2Config(
                    **TEXT, layer_types=_SLIDING, sliding_window=9, use_sliding_window=True
                ),
                image_token_index=IMAGE,
                vision_feature_layer=-1,
            )
        ),
        pictures=_fixed(16),
    ),
    "llava_next": Case(
        build=lambda: hf.LlavaNextForConditionalGeneration(
            hf.LlavaNextConfig(
                vision_config=hf.CLIPVisionConfig(**VISION),
                text_config=hf.LlamaConfig(**TEXT),
                image_token_index=IMAGE,
                **_ANYRES,
            )
        ),
        pictures=_anyres,
    ),
    "llava_onevision": Case(
        build=lambda: hf.LlavaOnevisionForConditionalGeneration(
            hf.LlavaOnevisionConfig(
                vision_config=hf.SiglipVisionConfig(**VISION),
                text_config=hf.Qwen2Config(**TEXT),
                image_token_index=IMAGE,
                video_token_index=VIDEO,
                vision_feature_select_strategy="full",
                vision_aspect_ratio="anyres_max_2",
                **_ANYRES,
            )
        ),
        pictures=_onevision,
    ),
    "qwen2_vl": Case(
        build=lambda: hf.Qwen2VLForConditionalGeneration(
            hf.Qwen2VLConfig(
                vision_config=QWEN_VISION | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
                text_config=_qwen_text([1, 1, 2]),
                **_QWEN_IDS,
            )
        ),
        pictures=_qwen(False),
        types=("mm_token_type_ids", _modality),
    ),
    "qwen2_5_vl": Case(
        build=lambda: hf.Qwen2_5_VLForConditionalGeneration(
            hf.Qwen2_5_VLConfig(
                vision_config=QWEN_VISION
                | {"out_hidden_size": 32, "intermediate_size": 32}
                | {"window_size": 16, "fullatt_block_indexes": [1]},
                text_config=_qwen_text([1, 1, 2]),
                **_QWEN_IDS,
            )
        ),
        pictures=_qwen(False),
        types=("mm_token_type_ids", _modality),
    ),
    "qwen3_vl": Case(
        build=lambda: hf.Qwen3VLForConditionalGeneration(
            hf.Qwen3VLConfig(
                vision_config=QWEN_VISION
                | {"out_hidden_size": 32, "intermediate_size": 32}
                | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
                text_config=_qwen_text([2, 1, 1], head_dim=8),
                **_QWEN_IDS,
            )
        ),
        pictures=_qwen(True),
        types=("mm_token_type_ids", _modality),
        drops=((2, 0.5), (4, 0.4)),
    ),
    "internvl": Case(
        build=lambda: hf.InternVLForConditionalGeneration(
            hf.InternVLConfig(
                vision_config=VISION | {"image_size": [32, 32], "patch_size": [8, 8]},
                text_config=hf.Qwen2Config(**TEXT),
                image_token_id=IMAGE,
            )
        ),
        pictures=_tiles,
    ),
    "smolvlm": Case(
        build=lambda: hf.SmolVLMForConditionalGeneration(
            hf.SmolVLMConfig(
                vision_config=VISION, text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE
            )
        ),
        pictures=_tiles_between_words,
        collate=_stack_rows,
    ),
    "idefics3": Case(
        build=lambda: hf.Idefics3ForConditionalGeneration(
            hf.Idefics3Config(
                vision_config=VISION, text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE
            )
        ),
        pictures=_tiles_between_words,
        collate=_stack_rows,
    ),
    "gemma3": Case(
        build=lambda: hf.Gemma3ForConditionalGeneration(
            hf.Gemma3Config(
                vision_config=hf.SiglipVisionConfig(**VISION),
                text_config=hf.Gemma3TextConfig(
                    **TEXT, head_dim=8, sliding_window=9, layer_types=_SLIDING
                ),
                image_token_index=IMAGE,
                mm_tokens_per_image=16,
            )
        ),
        pictures=_fixed(16),
        types=("token_type_ids", lambda ids: [int(token == IMAGE) for token in ids]),
        blocks=runs,
        window_cuts_blocks=True,
    ),
    "paligemma": Case(
        build=lambda: hf.PaliGemmaForConditionalGeneration(
            hf.PaliGemmaConfig(
                vision_config=hf.SiglipVisionConfig(**VISION),
                text_config=hf.GemmaConfig(**TEXT, head_dim=8),
                image_token_index=IMAGE,
                projection_dim=32,
                hidden_size=32,
            )
        ),
        pictures=_fixed(16),
        types=("token_type_ids", lambda ids: [0] * len(ids)),
        blocks=prefix,
    ),
    "paligemma2": Case(
        build=lambda: hf.PaliGemmaForConditionalGeneration(
            hf.PaliGemmaConfig(
                vision_config=hf.SiglipVisionConfig(**VISION),
                text_config=hf.Gemma2Config(**TEXT, head_dim=8, sliding_window=9),
                image_token_index=IMAGE,
                projection_dim=32,
                hidden_size=32,
            )
        ),
        pictures=_fixed(16),
        types=("token_type_ids", lambda ids: [0] * len(ids)),
        blocks=prefix,
    ),
}


def rows_for(case: Case) -> list[list[Any]]:
    """One and two pictures, adjacent ones, and words only."""
    first, second, third = case.pictures(case.model())
    return [[3, first, 4], [2, second, 1, third, 6], [5], [1, second, first, 2]]

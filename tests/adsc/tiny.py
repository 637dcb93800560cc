"""Tiny random models and batches for the tests, and the slow reference that they are compared with.

The reference runs one row alone, layer by layer, without hooks, cache or padding, in eager
attention, and drops by index lists that it works out itself from the definition of the method.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from tokenizers import Tokenizer as WordTokenizer
from tokenizers import models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE = 90  # id of the image token
PAD = 0
TOKENS = 16  # vision tokens of one image: 32 pixels in patches of 8
LAYERS = 6


def llava(**text: Any) -> LlavaForConditionalGeneration:
    """LLaVA-1.5 with 6 decoder layers and 16 vision tokens an image."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            **{
                "vocab_size": 100,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "pad_token_id": PAD,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "initializer_range": 0.3,
            }
            | text
        ),
        image_token_index=IMAGE,
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
        pad_token_id=PAD,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.lm_head.weight[IMAGE] = (
            0  # never the most likely word: a generated image token is no image
        )
    return model


def processor() -> LlavaProcessor:
    """Words are w3 to w99 between blanks; <image> stands for an image."""
    words = {f"w{i}": i for i in range(100)} | {"<image>": IMAGE, "<pad>": 0, "<s>": 1, "</s>": 2}
    words = {word: i for word, i in words.items() if word[0] != "w" or i not in (0, 1, 2, IMAGE)}
    raw = WordTokenizer(models.WordLevel(words, unk_token="w3"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def row(*parts: int, seed: int = 0, tokens: int = TOKENS) -> list[int]:
    """Ids of a row: 0 is an image, a number that many words; row(3, 0, 2) has 3, an image, 2."""
    draw = torch.Generator().manual_seed(seed + sum(parts))
    ids: list[int] = []
    for part in parts:
        words = torch.randint(3, IMAGE, (part,), generator=draw).tolist()
        ids += words if part else [IMAGE] * tokens
    return ids


def pixels(count: int, seed: int = 1, tokens: int = TOKENS) -> Tensor:
    """(count, 3, side, side), in patches of 8: 32 a side for 16 tokens."""
    side = 8 * math.isqrt(tokens)
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def batch(
    rows: list[list[int]], side: str = "left", seed: int = 1, tokens: int = TOKENS
) -> dict[str, Tensor]:
    """Pad rows to the longest and draw a picture for each image."""
    width = max(map(len, rows))
    ids, mask = [], []
    for one in rows:
        gap = [PAD] * (width - len(one))
        seen = [1] * len(one)
        ids.append(gap + one if side == "left" else one + gap)
        mask.append([0] * len(gap) + seen if side == "left" else seen + [0] * len(gap))
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    images = sum(one.count(IMAGE) // tokens for one in rows)
    return inputs | ({"pixel_values": pixels(images, seed, tokens)} if images else {})


def alone(inputs: dict[str, Tensor], index: int, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Row `index` of a batch without its padding, with its own pictures."""
    seen = inputs["attention_mask"][index].bool()
    counts = [int((ids == IMAGE).sum()) // tokens for ids in inputs["input_ids"]]
    single = {"input_ids": inputs["input_ids"][index : index + 1, seen]}
    single["attention_mask"] = torch.ones_like(single["input_ids"])
    if counts[index]:
        start = sum(counts[:index])
        single["pixel_values"] = inputs["pixel_values"][start : start + counts[index]]
    return single


def kept_of(n: int, keep: float, anchor: str) -> list[int]:
    """Which of n tokens stay: one of each of floor(n * keep + 1/2) equal groups, at least one."""
    m = max(1, int(n * keep + 0.5))
    if anchor == "last":
        return [(j + 1) * n // m - 1 for j in range(m)]
    if anchor == "first":
        return [j * n // m for j in range(m)]
    assert anchor == "center"
    return [(2 * j + 1) * n // (2 * m) for j in range(m)]


def images_of(ids: Tensor) -> list[list[int]]:
    """Columns of each image of one row, when every image has `TOKENS` tokens."""
    columns = (ids == IMAGE).nonzero().flatten().tolist()
    return [columns[start : start + TOKENS] for start in range(0, len(columns), TOKENS)]


@torch.no_grad()
def reference(
    model: Any,
    inputs: dict[str, Tensor],
    stages: list[tuple[int, float]],
    anchor: str = "last",
    positions: str = "keep",
) -> tuple[Tensor, list[int]]:
    """Logits (Q, vocab) of one row at the columns that are left, and those columns."""
    hidden, columns = states(model, inputs, stages, anchor, positions)[-1]
    return model.lm_head(model.model.language_model.norm(hidden))[0], columns


def states(
    model: Any,
    inputs: dict[str, Tensor],
    stages: list[tuple[int, float]],
    anchor: str = "last",
    positions: str = "keep",
) -> list[tuple[Tensor, list[int]]]:
    """For each layer its output (1, Q, D) and the columns that it saw."""
    decoder, ids = model.model.language_model, inputs["input_ids"]
    assert ids.shape[0] == 1
    hidden = model.get_input_embeddings()(ids)
    if "pixel_values" in inputs:
        features = torch.cat(model.model.get_image_features(inputs["pixel_values"]).pooler_output)
        hidden = hidden.clone()
        hidden[ids == IMAGE] = features
    columns = list(range(ids.shape[1]))
    numbers = list(columns)
    images = images_of(ids[0])
    seen: list[tuple[Tensor, list[int]]] = []
    for number, layer in enumerate(decoder.layers):
        for at, keep in stages:
            if at != number:
                continue
            images = [[image[i] for i in kept_of(len(image), keep, anchor)] for image in images]
            vision = {column for column in columns if ids[0, column] == IMAGE}
            left = {column for image in images for column in image}
            stay = [i for i, c in enumerate(columns) if c not in vision or c in left]
            hidden, columns = hidden[:, stay], [columns[i] for i in stay]
            numbers = [numbers[i] for i in stay]
            if positions == "reindex" and images:
                numbers = list(range(len(columns)))
        width = len(columns)
        causal = torch.full((width, width), torch.finfo(hidden.dtype).min).triu(1)[None, None]
        ids_of = torch.tensor([numbers])
        hidden = type(layer).forward(
            layer,
            hidden,
            attention_mask=causal,
            position_ids=ids_of,
            position_embeddings=decoder.rotary_emb(hidden, ids_of),
        )
        seen.append((hidden, columns))
    return seen


def greedy_reference(
    model: Any, inputs: dict[str, Tensor], new: int, *args: Any, **kwargs: Any
) -> list[int]:
    """Greedy tokens of one row, everything computed again for each of them."""
    inputs, tokens = dict(inputs), []
    for _ in range(new):
        logits, _ = reference(model, inputs, *args, **kwargs)
        tokens.append(int(logits[-1].argmax()))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[tokens[-1]]])], dim=1)
    return tokens

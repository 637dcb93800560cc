"""Slow, literal transcriptions of the peers' papers, and a forward by hand that obeys them.

One row alone, eager attention, no hooks, no cache for generation, plain Python loops. Attention
maps come from the layers' own eager forward. Nothing here uses `adsc.peers`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from tests.adsc import tiny
from tests.adsc.tiny import IMAGE, PAD

SIDE, TOKENS, LAYERS = 6, 36, 6
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 48,
    "patch_size": 8,
    "initializer_range": 0.3,
}


def llava(tower: str = "clip", attention: str = "sdpa", **more: Any) -> Any:
    """LLaVA-1.5 with 36 vision tokens an image and 6 decoder layers."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**TOWER) if tower == "clip" else SiglipVisionConfig(**TOWER)
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.3,
            pad_token_id=PAD,
        ),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        pad_token_id=PAD,
        **more,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision_tower" in name and parameter.ndim > 1:
                parameter.normal_(0, 0.3)  # attention that is far from uniform
        model.lm_head.weight[IMAGE] = 0
    return model


# As in tests/adsc/tiny.py, with this model's larger pictures.
row = partial(tiny.row, tokens=TOKENS)
pixels = partial(tiny.pixels, tokens=TOKENS)
batch = partial(tiny.batch, tokens=TOKENS)
alone = partial(tiny.alone, tokens=TOKENS)


@dataclass
class State:
    """A row in the decoder, layer by layer.

    Args:
        ids: of its columns.
        query: the column that speaks for the question.
        hidden: column -> (D,).
        images: for each image its columns, and those that are left.
        positions: column -> position id.
        maps: layer -> attention by (query column, key column), mean over heads.
        keys: layer -> column -> (heads * d,), turned.
        entered: hidden states as they entered the decoder.
    """

    model: Any
    ids: list[int]
    query: int
    hidden: dict[int, Tensor]
    images: list[list[int]]
    left: list[list[int]]
    positions: dict[int, int]
    maps: dict[int, dict[tuple[int, int], float]] = field(default_factory=dict)
    keys: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    entered: dict[int, Tensor] = field(default_factory=dict)
    pixels: Tensor | None = None

    def layer_inputs(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], list[int]]:
        columns = sorted(self.hidden)
        hidden = torch.stack([self.hidden[c] for c in columns])[None]
        width = len(columns)
        mask = torch.full((width, width), torch.finfo(hidden.dtype).min).triu(1)[None, None]
        ids = torch.tensor([[self.positions[c] for c in columns]])
        return hidden, mask, self.model.model.language_model.rotary_emb(hidden, ids), columns

    def attend(self, number: int) -> dict[tuple[int, int], float]:
        """(query column, key column) -> attention of layer `number`, mean over heads, on the hidden
        states as they are."""
        hidden, mask, rotary, columns = self.layer_inputs()
        layer = self.model.model.language_model.layers[number]
        cache = DynamicCache()
        for before in range(number):
            cache.update(torch.zeros(1, 1, 0, 1), torch.zeros(1, 1, 0, 1), before)
        _, weights = layer.self_attn(
            layer.input_layernorm(hidden),
            attention_mask=mask,
            position_embeddings=rotary,
            past_key_values=cache,
        )
        keys = cache.layers[number].keys[0]
        self.keys[number] = {c: keys[:, i].flatten() for i, c in enumerate(columns)}
        mean = weights[0].mean(0).tolist()
        return {
            (q, k): mean[i][j]
            for i, q in enumerate(columns)
            for j, k in enumerate(columns[: i + 1])
        }


def reference(
    model: Any,
    inputs: dict[str, Tensor],
    rule: Any,
    counts: list[tuple[int, int]],
    positions: str,
    query: int | None = None,
) -> tuple[Tensor, list[int]]:
    """Logits (Q, vocab) of one row, and its columns at the end. `model` must be eager.

    Args:
        rule: (state, image, m, stage) -> tokens that stay (column -> new state or None).
        counts: pairs (layer, m).
        query: the column before the answer; the last one by default.
    """
    ids = inputs["input_ids"][0].tolist()
    query = len(ids) - 1 if query is None else query
    embeds = model.get_input_embeddings()(inputs["input_ids"])[0]
    places = [c for c, token in enumerate(ids) if token == IMAGE]
    if places:
        features = torch.cat(model.model.get_image_features(inputs["pixel_values"]).pooler_output)
        embeds = embeds.clone()
        embeds[places] = features
    images = [places[i : i + TOKENS] for i in range(0, len(places), TOKENS)]
    state = State(
        model=model,
        ids=ids,
        query=query,
        hidden=dict(enumerate(embeds)),
        images=images,
        left=[list(image) for image in images],
        positions={c: c for c in range(len(ids))},
        entered=dict(enumerate(embeds)),
        pixels=inputs.get("pixel_values"),
    )
    for number, layer in enumerate(model.model.language_model.layers):
        for stage, (at, m) in enumerate(counts):
            if at != number or not images:
                continue
            chosen = [rule(state, image, m, stage) for image in range(len(images))]
            for image, stays in enumerate(chosen):
                for column in state.left[image]:
                    if column not in stays:
                        del state.hidden[column]
                    elif stays[column] is not None:
                        state.hidden[column] = stays[column]
                state.left[image] = sorted(stays)
            if positions == "reindex":
                state.positions = {c: i for i, c in enumerate(sorted(state.hidden))}
        if images and any(number == at - 1 for at, _ in counts):
            state.maps[number] = state.attend(number)
        hidden, mask, rotary, columns = state.layer_inputs()
        out = type(layer).forward(layer, hidden, attention_mask=mask, position_embeddings=rotary)
        state.hidden = {c: out[0, i] for i, c in enumerate(columns)}
    columns = sorted(state.hidden)
    out = torch.stack([state.hidden[c] for c in columns])[None]
    return model.lm_head(model.model.language_model.norm(out))[0], columns


def best(scores: dict[int, float], m: int) -> list[int]:
    """The m keys with the largest values; of equals the first."""
    return sorted(scores, key=lambda one: (-scores[one], one))[:m]


def random(seed: int) -> Any:
    """A draw a token from splitmix64 on 64-bit words; the smallest, as signed words, stay."""
    word = 1 << 64

    def mix(x: int) -> int:
        x %= word
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % word
        return x ^ (x >> 31)

    def rule(state: State, image: int, m: int, stage: int) -> dict[int, None]:
        total = sum(
            mix(place) * (2 * token + 1)
            for place, token in enumerate(state.ids[: state.query + 1], start=1)
        )
        start = mix(mix(seed + 1) ^ total % word) + image
        start = mix(start)
        draws = {}
        for token, column in enumerate(state.images[image]):
            value = mix(start + token)
            draws[column] = -(value - word if value >= word // 2 else value)
        return dict.fromkeys(best(draws, m))

    return rule


def pool(state: State, image: int, m: int, stage: int) -> dict[int, Tensor]:
    """36 tokens on 6 x 6 to m cells, for the m whose cells are drawn up here by hand."""
    edges = {
        9: ([0, 2, 4, 6], [[0, 2, 4, 6]] * 3),
        10: ([0, 2, 4, 6], [[0, 2, 4, 6], [0, 2, 4, 6], [0, 1, 3, 4, 6]]),
        4: ([0, 3, 6], [[0, 3, 6]] * 2),
    }[m]
    stays = {}
    for band, (top, bottom) in enumerate(zip(edges[0], edges[0][1:], strict=False)):
        for left, right in zip(edges[1][band], edges[1][band][1:], strict=False):
            cell = [y * SIDE + x for y in range(top, bottom) for x in range(left, right)]
            columns = [state.images[image][token] for token in cell]
            middle = columns[len(columns) // 2]
            stays[middle] = sum(state.hidden[c] for c in columns) / len(columns)
    assert len(stays) == m
    return stays


def tome(layer: int) -> Any:
    """Bipartite soft matching, round by round: even tokens look for odd ones, the most alike pairs
    become means weighted by size."""

    def rule(state: State, image: int, m: int, stage: int) -> dict[int, Tensor]:
        module = state.model.model.language_model.layers[layer]
        heads = state.model.config.text_config.num_key_value_heads
        states = {c: state.hidden[c] for c in state.left[image]}
        sizes = dict.fromkeys(states, 1)
        while len(states) > m:
            columns = sorted(states)
            keys = {}
            for c in columns:
                key = module.self_attn.k_proj(module.input_layernorm(states[c]))
                keys[c] = key.unflatten(-1, (heads, -1)).mean(0)
            alike, goes = {}, {}
            for a in columns[0::2]:
                near = {b: float(cosine_similarity(keys[a], keys[b], dim=0)) for b in columns[1::2]}
                goes[a] = best(near, 1)[0]
                alike[a] = near[goes[a]]
            together = best(alike, min(len(columns) // 2, len(columns) - m))
            total = {b: states[b] * sizes[b] for b in columns[1::2]}
            for a in together:
                total[goes[a]] = total[goes[a]] + states[a] * sizes[a]
                sizes[goes[a]] += sizes[a]
            for b in columns[1::2]:
                states[b] = total[b] / sizes[b]
            for a in together:
                del states[a]
        return states

    return rule


def low_resolution(pictures: Tensor, m: int) -> Tensor:
    """Pictures (N, 3, 48, 48) with as many pixels as m of 36 patches have, at their old size: means
    over boxes of whole pixels, then linear interpolation between the boxes' middles."""
    side = pictures.shape[-1]
    small = round(side * (m / TOKENS) ** 0.5)
    down, up = torch.zeros(small, side), torch.zeros(side, small)
    for i in range(small):
        first, end = i * side // small, -(-(i + 1) * side // small)
        for pixel in range(first, end):
            down[i, pixel] = 1 / (end - first)
    for pixel in range(side):
        place = min(max((pixel + 0.5) * small / side - 0.5, 0), small - 1)
        below = int(place)
        above = min(below + 1, small - 1)
        up[pixel, below] += 1 - (place - below)
        up[pixel, above] += place - below
    whole = up @ down
    return whole @ pictures @ whole.T


def fastv(layer: int) -> Any:
    """Keep what the query attends to most in layer K - 1, mean over heads."""

    def rule(state: State, image: int, m: int, stage: int) -> dict[int, None]:
        paid = state.maps[layer - 1]
        scores = {c: paid[state.query, c] for c in state.left[image]}
        return dict.fromkeys(best(scores, m))

    return rule


def pyramiddrop(layers: list[int]) -> Any:
    """The same, by the map of the layer that comes next, on its undropped input."""

    def rule(state: State, image: int, m: int, stage: int) -> dict[int, None]:
        paid = state.attend(layers[stage])
        scores = {c: paid[state.query, c] for c in state.left[image]}
        return dict.fromkeys(best(scores, m))

    return rule


def divprune(state: State, image: int, m: int, stage: int) -> dict[int, None]:
    """Greedy max-min diversity on cosine distance."""
    columns = state.images[image]
    apart = {}
    for i, a in enumerate(columns):
        for b in columns[i + 1 :]:
            alike = float(cosine_similarity(state.hidden[a], state.hidden[b], dim=0))
            apart[a, b] = apart[b, a] = 1 - alike

    def far(a: int, b: int) -> float:
        return apart[a, b]

    nearest = {a: min(far(a, b) for b in columns if b != a) for a in columns}
    picked = best(nearest, 1)
    while len(picked) < m:
        left = {a: min(far(a, b) for b in picked) for a in columns if a not in picked}
        picked += best(left, 1)
    return dict.fromkeys(picked)


def dart(layer: int, image_pivots: int = 4, text_pivots: int = 4) -> Any:
    """Pivots by the L1 norm of keys in layer K - 1; least similar tokens, pivot by pivot."""

    def rule(state: State, image: int, m: int, stage: int) -> dict[int, None]:
        norms = {c: float(k.abs().sum()) for c, k in state.keys[layer - 1].items()}
        columns = state.left[image]
        end = max(columns)
        text = [c for c in range(end + 1, state.query + 1) if state.ids[c] != IMAGE]
        seeds = best({c: norms[c] for c in columns}, min(image_pivots, m))
        pivots = seeds + best({c: norms[c] for c in text}, text_pivots)
        norm = state.model.model.language_model.norm
        retained = list(seeds)
        quota, given = m - len(seeds), 0
        for number, pivot in enumerate(pivots):
            share = (number + 1) * quota // len(pivots) - given
            given += share
            alike = {
                c: -float(
                    cosine_similarity(norm(state.hidden[pivot]), norm(state.hidden[c]), dim=0)
                )
                for c in columns
                if c not in retained
            }
            retained += best(alike, share)
        return dict.fromkeys(retained)

    return rule


def sparsevlm(layers: list[int], recycle: bool = True) -> Any:
    """Raters, their attention, density-peak clusters of the best of what goes."""

    def rule(state: State, image: int, m: int, stage: int) -> dict[int, Tensor | None]:
        first, end = state.images[image], max(state.images[image])
        text = [c for c in range(end + 1, state.query + 1) if state.ids[c] != IMAGE]
        pointed = dict.fromkeys(text, 0.0)
        for v in first:
            dots = {t: (state.entered[v] @ state.entered[t]).item() for t in text}
            top = max(dots.values())
            total = sum(math.exp(d - top) for d in dots.values())
            for t in text:
                pointed[t] += math.exp(dots[t] - top) / total / len(first)
        mean = sum(pointed.values()) / len(pointed)
        raters = [t for t in text if pointed[t] >= mean]
        paid, columns = state.maps[layers[stage] - 1], state.left[image]
        scores = {c: sum(paid[t, c] for t in raters) / len(raters) for c in columns}
        ranked = best(scores, len(columns))
        kept, best_of, clusters = m, 0, 0
        if recycle and m < len(columns):
            # The largest number of kept tokens that leaves room for a tenth of 30 % of the others.
            for kept in range(m - 1, 0, -1):
                best_of = int((len(columns) - kept) * 0.3) + 1
                clusters = int(best_of / 10) + 1
                if kept + clusters <= m:
                    clusters = m - kept
                    best_of = max(best_of, clusters)
                    break
        stays: dict[int, Tensor | None] = dict.fromkeys(ranked[:kept])
        recycled = ranked[kept : kept + best_of]
        for center, members in _density_peaks(state.hidden, recycled, clusters).items():
            stays[center] = sum(state.hidden[c] for c in members) / len(members)
        return stays

    return rule


def _density_peaks(hidden: dict[int, Tensor], tokens: list[int], k: int) -> dict[int, list[int]]:
    if not k:
        return {}
    width = hidden[tokens[0]].shape[0]
    far = {
        (a, b): float((hidden[a] - hidden[b]).norm()) / math.sqrt(width)
        for a in tokens
        for b in tokens
    }
    density = {
        a: math.exp(-sum(d**2 for d in sorted(far[a, b] for b in tokens)[:k]) / k) for a in tokens
    }
    apart = {}
    for a in tokens:
        denser = [far[a, b] for b in tokens if density[b] > density[a]]
        apart[a] = min(denser) if denser else max(far.values())
    order = sorted(tokens, key=lambda a: (-apart[a] * density[a], tokens.index(a)))
    centers = order[:k]
    clusters: dict[int, list[int]] = {center: [center] for center in centers}
    for a in tokens:
        if a not in centers:
            nearest = min(centers, key=lambda c: (far[a, c], centers.index(c)))
            clusters[nearest].append(a)
    return clusters


def visionzip(contextual: int) -> Any:
    """Dominant and contextual tokens from the eager tower's attention map."""

    def rule(state: State, image: int, m: int, stage: int) -> dict[int, Tensor | None]:
        model = state.model.model
        tower, clip = model.vision_tower, "CLIP" in type(model.vision_tower).__name__
        given = state.pixels[image : image + 1]
        out = tower(given, output_hidden_states=True, output_attentions=True)
        paid = out.attentions[-2][0]  # (heads, queries, keys)
        layer = (getattr(tower, "vision_model", tower)).encoder.layers[-2]
        keys = layer.self_attn.k_proj(layer.layer_norm1(out.hidden_states[-3]))[0]
        keys = keys.unflatten(-1, (2, -1)).mean(1)
        skip = 1 if clip else 0
        features = out.hidden_states[-2][0, skip:]
        scores = {}
        for patch in range(TOKENS):
            queries = paid[:, :1] if clip else paid
            scores[patch] = float(queries[:, :, patch + skip].mean(1).sum())
        dominant = best(scores, m - contextual)
        rest = [patch for patch in range(TOKENS) if patch not in dominant]
        targets = rest[:: max(1, len(rest) // contextual)][:contextual]
        joins: dict[int, list[int]] = {target: [] for target in targets}
        for patch in rest:
            if patch not in targets:
                alike = {
                    t: float(cosine_similarity(keys[patch + skip], keys[t + skip], dim=0))
                    for t in targets
                }
                joins[best(alike, 1)[0]].append(patch)
        columns = state.images[image]
        stays: dict[int, Tensor | None] = {columns[patch]: None for patch in dominant}
        for target, members in joins.items():
            merged = features[target]
            if members:
                merged = merged + sum(features[p] for p in members) / len(members)
            stays[columns[target]] = model.multi_modal_projector(merged)
        return stays

    return rule

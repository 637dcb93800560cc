"""The peers as their tests attach them, and what each must compute by its paper."""

from __future__ import annotations

from typing import Any

import adsc
from adsc import peers
from tests.adsc.peers import peer_reference as paper
from tests.adsc.peers.peer_reference import LAYERS, TOKENS, llava, row

# The worst measured difference is 2.0e-5 for logits of size 5 in fp32.
CLOSE = {"rtol": 0, "atol": 1e-4}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
MIXED = [row(3, 0, 5), row(2, 0, 3, 0, 6), row(6), row(1, 0, 0, 9)]
SETTINGS: dict[str, dict[str, Any]] = {
    "stride": {"average": 16},
    "random": {"average": 10, "seed": 3},
    "pool": {"average": 10},
    "fastv": {"average": 16},
    "pyramiddrop": {"average": 14},
    "sparsevlm": {"average": 18, "tolerance": 0.05},
    "visionzip": {"average": 10},
    "dart": {"average": 20},
    "divprune": {"average": 9},
    "tome": {"average": 10},
    "downsample": {"average": 10},
}


def made(name: str, model: Any, **more: Any) -> Any:
    return peers.make(name, model, **SETTINGS[name] | more)


def attached(name: str, attention: str = "sdpa", **more: Any) -> Any:
    model = llava(attention=attention)
    return adsc.attach(model, made(name, model, **more))


def rule_of(name: str, method: Any) -> Any:
    layers = [layer for layer, _ in method.stages]
    if name == "stride":
        last = [
            [((j + 1) * TOKENS) // m - 1 for j in range(m)]
            for m in method.tokens_after_drops(TOKENS)
        ]
        return lambda state, image, m, stage: dict.fromkeys(
            state.images[image][token] for token in last[stage]
        )
    return {
        "random": lambda: paper.random(3),
        "pool": lambda: paper.pool,
        "fastv": lambda: paper.fastv(layers[0]),
        "pyramiddrop": lambda: paper.pyramiddrop(layers),
        "sparsevlm": lambda: paper.sparsevlm(layers),
        "visionzip": lambda: paper.visionzip(2),
        "dart": lambda: paper.dart(layers[0]),
        "divprune": lambda: paper.divprune,
        "tome": lambda: paper.tome(layers[0]),
        "downsample": lambda: paper.pool,
    }[name]()


def stage_counts(method: Any) -> list[tuple[int, int]]:
    each = method.tokens_per_layer(TOKENS, LAYERS)
    return [(layer, each[layer]) for layer, _ in method.stages]


def expected(name: str, model: Any, inputs: Any, query: int | None = None) -> Any:
    """The reference of one row by an eager model of the same weights."""
    method = made(name, model)
    rule, counts = rule_of(name, method), stage_counts(method)
    if name == "downsample" and "pixel_values" in inputs:
        pictures = paper.low_resolution(inputs["pixel_values"], counts[0][1])
        inputs = inputs | {"pixel_values": pictures}
    return paper.reference(model, inputs, rule, counts, method.positions, query)

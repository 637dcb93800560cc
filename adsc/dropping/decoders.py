"""What a decoder must look like for dropping to serve it, looked up rather than trusted.

A family identifies the multimodal model; its decoder may be anything that
transformers builds from a text config. A plan needs little: layers that take their mask, rotary
tables and cache as the hooks replace them, and nothing else that is as long as the sequence. A
method that scores tokens by attention also computes keys and queries itself and needs to know how.
The sentence names the part that doesn't fit. Nothing here runs a layer.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from adsc.dropping.cache_record import CACHE_NAMES
from adsc.errors import UnsupportedModel

ARGUMENTS = {
    "hidden_states",
    "attention_mask",
    "position_ids",
    "position_embeddings",
    *CACHE_NAMES,
    "use_cache",
    "cache_position",
    "output_attentions",
    "output_router_logits",
}
"""What the hooks replace in a layer's arguments, or what no drop concerns."""
KINDS = {"full_attention", "sliding_attention"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"}
"""What a layer's attention may hold if a method is to compute its scores."""
SLIDING_TURNS = {"cohere2", "cohere2_moe", "exaone4", "exaone4_5", "exaone_moe", "kolibri1"}
"""Model types in which only the layers with a sliding window turn positions."""


def gathered(module: Any) -> Any:
    """A module inside FSDP's wrapper: once that is entered, the weights are whole."""
    inner = getattr(module, "_fsdp_wrapped_module", None)
    return gathered(inner) if isinstance(inner, nn.Module) else module


def bare(module: Any) -> Any:
    """A module inside the wrappers of FSDP, torch.compile and activation checkpointing."""
    for name in ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"):
        if isinstance(inner := getattr(module, name, None), nn.Module):
            return bare(inner)
    return module


def check_decoder(decoder: Any) -> None:
    """Raise UnsupportedModel if a plan can't be kept in this decoder."""
    name = type(bare(decoder)).__name__
    if not isinstance(layers := getattr(decoder, "layers", None), nn.ModuleList):
        raise UnsupportedModel(f"{name} has no list of decoder layers under `layers`")
    if len({id(layer) for layer in layers}) < len(layers):
        raise UnsupportedModel(
            f"{name} runs a layer more than once: a plan needs each layer to be a module of its own"
        )
    if not callable(getattr(decoder, "rotary_emb", None)):
        raise UnsupportedModel(
            f"{name} has no `rotary_emb`: positions that aren't rotary can't be kept after a drop"
        )
    kinds = set(getattr(decoder.config, "layer_types", None) or KINDS)
    if odd := sorted(map(str, kinds - KINDS)):
        raise UnsupportedModel(
            f"{name} has layers of kind {', '.join(odd)}: their state or mask runs over all "
            f"columns and can't be cut at a drop; served are {' and '.join(sorted(KINDS))}"
        )
    rope = getattr(decoder.config, "rope_parameters", None) or {}
    if rope.get("llama_4_scaling_beta"):
        raise UnsupportedModel(
            f"{name} scales queries by position ids (llama_4_scaling_beta), and after a drop a "
            "layer is given the numbers of its slots in their place"
        )
    for number, layer in enumerate(layers):
        _check_layer(name, number, layer)


def _check_layer(name: str, number: int, layer: Any) -> None:
    arguments = inspect.signature(bare(layer).forward).parameters
    named = {
        key
        for key, one in arguments.items()
        if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    }
    if not named:  # a wrapper's, which tells nothing
        return
    where = f"layer {number} of {name} ({type(bare(layer)).__name__})"
    missing = {"attention_mask", "position_embeddings"} - named
    if named.isdisjoint(CACHE_NAMES):
        missing |= {" or ".join(CACHE_NAMES)}
    if missing:
        raise UnsupportedModel(
            f"{where} does not take {', '.join(sorted(missing))}: masks, rotary tables and caches "
            "of a plan are handed to layers under these names"
        )
    if hasattr(getattr(bare(layer), "self_attn", None), "indexer"):
        raise UnsupportedModel(
            f"{where} chooses keys by an indexer, whose positions and cache can't be cut at a drop"
        )
    if odd := sorted(named - ARGUMENTS):
        raise UnsupportedModel(
            f"{where} takes {', '.join(odd)}, which is not known to fit the tokens that are left "
            "after a drop"
        )


def check_rotary(name: str, tables: Any) -> None:
    """Raise UnsupportedModel if a layer is given other rotary tables than (cos, sin)."""
    parts = tables if isinstance(tables, (tuple, list)) else [tables]
    if len(parts) != 2 or any(not isinstance(p, Tensor) or torch.is_complex(p) for p in parts):
        kind = "complex numbers" if isinstance(tables, Tensor) else type(tables).__name__
        raise UnsupportedModel(
            f"{name} turns positions by {kind}, not by tables (cos, sin), and they can't be cut "
            "at a drop"
        )


def check_attention(method: str, decoder: Any) -> None:
    """Raise UnsupportedModel if a method can't compute queries and keys of this decoder's layers.

    Args:
        method: its name.
        decoder: one that `check_decoder` has passed.
    """
    what = f"{method} can't score tokens of {type(bare(decoder)).__name__}"
    for layer in decoder.layers:
        part = _unknown_part(bare(layer), decoder.config)
        if part is not None:
            raise UnsupportedModel(
                f"{what}: {part}; use a pruning plan or a method that needs no attention (random, "
                "stride, divprune)"
            )


def _unknown_part(layer: Any, config: Any) -> str | None:
    attention = getattr(layer, "self_attn", None)
    if attention is None:
        return "its layers have no `self_attn`"
    names = [one for one in ("q_proj", "k_proj") if not hasattr(attention, one)]
    if names:
        own = [n for n, _ in attention.named_children() if "proj" in n or "query" in n]
        return f"its attention has no {' and '.join(names)}, but {', '.join(own)} (fused or latent)"
    if not hasattr(layer, "input_layernorm"):
        return "its layers have no `input_layernorm` before attention (post-norm)"
    numbers = [one for one in ("head_dim", "scaling") if not hasattr(attention, one)]
    if numbers:
        return f"its attention has no {' and '.join(numbers)}"
    if not hasattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb"):
        return "its module has no `apply_rotary_pos_emb`"
    rope = getattr(config, "rope_parameters", None) or {}
    shares = [one for one in (rope, *rope.values()) if isinstance(one, dict)]
    if any(one.get("partial_rotary_factor", 1.0) != 1.0 for one in shares):
        return "only a part of each head turns (partial rotary)"
    if not getattr(attention, "use_rope", True) or _full_layers_are_unturned(config):
        return "some of its layers don't turn positions"
    for kind in ("q", "k"):
        norm = getattr(attention, f"{kind}_norm", None)
        weight = getattr(norm, "weight", None)
        if norm is None and hasattr(attention, f"{kind}_layernorm"):
            return f"its {kind} projection is normed in a form that is not known"
        if weight is not None and weight.numel() not in (0, attention.head_dim):
            return f"its {kind} projection is normed over all heads at once"
    if getattr(attention, "attn_logit_softcapping", None) is not None:
        return "its attention logits are capped"
    if hasattr(attention, "sinks"):
        return "its attention has sinks beside the tokens"
    if getattr(config, "clip_qkv", None) is not None:
        return f"it clips queries and keys (clip_qkv={config.clip_qkv})"
    if getattr(attention, "attn_temperature_tuning", False):
        return "it scales queries by their positions"
    own = [name for name, _ in attention.named_children()]
    own += [name for name, _ in attention.named_parameters(recurse=False)]
    if odd := sorted(set(own) - ATTENTION):
        return f"its attention has {', '.join(odd)}, whose part in the scores is not known"
    return None


def _full_layers_are_unturned(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None) or []
    return (
        config.model_type in SLIDING_TURNS
        and getattr(config, "sliding_window", None) is not None
        and "full_attention" in kinds
    )

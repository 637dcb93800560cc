"""KV cache: a spec for each part of the decoder, and blocks for kept tokens only.

Parts hold different numbers of tokens, so they become different KV cache groups of vLLM's hybrid
allocator, each with a block table of its own; block ids come from one pool. Groups have equally
many layers: vLLM takes those of the smallest part and splits the others, see docs/serving.md.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from adsc.serving.kept import Kept


@dataclass(frozen=True, kw_only=True)
class PartSpec(FullAttentionSpec):
    """Full attention over the tokens that reach one part of the decoder."""

    part: int

    @classmethod
    def of(cls, spec: FullAttentionSpec, part: int) -> PartSpec:
        given = {field.name: getattr(spec, field.name) for field in fields(spec)}
        return cls(**given, part=part)

    @classmethod
    def merge(cls, specs: list[PartSpec]) -> PartSpec:
        """Layers of one part alone; vLLM reads an AssertionError as `these don't go together`, and
        the inherited method would put all parts into one group."""
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("layers of different parts of the decoder hold different tokens")
        return copy.deepcopy(specs[0])

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())


class PartManager(FullAttentionManager):
    """Blocks of one group: as many as the kept tokens of each request need.

    `kept` is the scheduler's: vLLM tells a manager a request's id alone.
    """

    kept: dict[str, Kept]

    def left(self, request_id: str, tokens: int) -> int:
        """How many of a request's first `tokens` tokens lie in this group's blocks."""
        kept = self.kept.get(request_id)
        return kept.left(self.kv_cache_spec.part, tokens) if kept else tokens

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        left = self.left(request_id, num_tokens)
        blocks: int = super().get_num_blocks_to_allocate(request_id, left, *args, **kwargs)
        return blocks

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[Any]:
        left = self.left(request_id, num_tokens)
        blocks: list[Any] = super().allocate_new_blocks(request_id, left, num_tokens_main_model)
        return blocks

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Up to the first image all parts hold the same tokens at the same places, so blocks can be
        shared by their hash. Behind it a block holds tokens that its hash does not cover."""
        if kept := self.kept.get(request.request_id):
            num_tokens = min(num_tokens, kept.first)
        super().cache_blocks(request, num_tokens, *args, **kwargs)


def install() -> None:
    """Let vLLM know the spec. Its registry adds the built-in specs only while it is empty, so these
    come first."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(PartSpec, PartManager, uniform_type_base_spec=PartSpec)

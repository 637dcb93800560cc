"""Attention of one part of the decoder: vLLM's own layer and kernels, other metadata.

`current` is the step that runs. A model runner sets it before vLLM builds metadata; builders and
the model's forward read it, all in one thread. It is None outside of real steps (profiling,
dummies).
"""

from __future__ import annotations

from copy import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.utils import subclass_attention_backend

from adsc.serving.engine.cache import PartSpec
from adsc.serving.step import Part, Step

current: Step | None = None


class PartAttention(Attention):
    """An attention layer of one part. vLLM's LLaMA builds its layers itself and registers each
    under its name, so one that is built changes its class, then calls `join`."""

    attn_backend: Any

    def join(self, part: int) -> None:
        self.part = part
        self.attn_backend: Any = narrowed(self.attn_backend)

    def get_kv_cache_spec(self, vllm_config: Any) -> PartSpec:
        return PartSpec.of(super().get_kv_cache_spec(vllm_config), self.part)


@lru_cache
def narrowed(backend: Any) -> Any:
    """A backend whose metadata are cut to the rows that reach the layer's part."""

    class Builder(backend.get_builder_cls()):  # type: ignore[misc]
        # It would share metadata among the groups of a part, whose blocks differ.
        supports_update_block_table = False
        # (requests,) int32; one for all steps, since a CUDA graph reads where it was captured.
        lengths: Tensor | None = None

        def build(
            self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any
        ) -> Any:
            spec = self.kv_cache_spec
            if spec.part:
                common_attn_metadata = copy(common_attn_metadata)
                common_attn_metadata.seq_lens = self._own(common_attn_metadata.seq_lens)
                common_prefix_len = 0
                if current is not None:
                    part = current.parts[spec.part]
                    common_attn_metadata = narrow(common_attn_metadata, part, spec.block_size)
            return super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)

        def _own(self, lengths: Tensor) -> Tensor:
            if self.lengths is None:
                most = self.vllm_config.scheduler_config.max_num_seqs
                self.lengths = lengths.new_zeros(most)
            return self.lengths[: len(lengths)].copy_(lengths)

    return subclass_attention_backend("Adsc", backend, Builder)


def narrow(metadata: Any, part: Part, block_size: int) -> Any:
    """`CommonAttentionMetadata` of a whole step -> of the rows that reach a part, which lie side by
    side in its blocks. The group's slot mapping and lengths are rewritten in place: the layers and
    CUDA graphs read them there."""
    device = metadata.seq_lens.device
    new = copy(metadata)
    dropped = torch.from_numpy(part.dropped)  # a graph pads requests, so there may be fewer
    new.seq_lens[: len(dropped)] -= dropped.to(device)
    new.seq_lens_cpu_upper_bound = metadata.seq_lens_cpu_upper_bound.clone()
    new.seq_lens_cpu_upper_bound[: len(dropped)] -= dropped
    new.max_seq_len = max(1, int(new.seq_lens_cpu_upper_bound.max()))
    new._num_computed_tokens_cache = new._token_to_req_indices_cache = None
    fill_slots(metadata.slot_mapping, metadata.block_table_tensor, part, block_size)
    if part.rows is not None:
        new.query_start_loc_cpu = torch.from_numpy(part.starts)
        new.query_start_loc = new.query_start_loc_cpu.to(device)
        new.num_actual_tokens = part.count
        new.max_query_len = part.longest
        new.slot_mapping = metadata.slot_mapping[: part.count]
        new.positions = metadata.positions[part.rows]
    return new


def fill_slots(slots: Tensor, table: Tensor, part: Part, block_size: int) -> None:
    """Write where each row of a part lies in the cache.

    Args:
        slots: of the group, for all rows of the step; what is left over becomes -1, no slot.
        table: (R, blocks) the group's block table.
    """
    block = table[part.owner, part.place // block_size].to(slots.dtype)
    slots[: part.count] = block * block_size + part.place % block_size
    slots[part.count :].fill_(-1)

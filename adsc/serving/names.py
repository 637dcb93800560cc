"""Names of a checkpoint's tensors that vLLM with the plugin has a place for.

transformers 5.23 writes a CLIP tower's weights as `vision_tower.encoder...`, before it was
`vision_tower.vision_model.encoder...`, and vLLM 0.32 by itself reads the latter alone; inner names
may begin with `model.`. The plugin reads all of them, so exports keep transformers' own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from adsc.plan import PlanError
from adsc.serving.settings import UnservedPlan, served_plan

_LAYER = r"self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|input_layernorm|post_attention_layernorm"
_TOWER_LAYER = r"self_attn\.(q|k|v|out)_proj|mlp\.fc[12]|layer_norm[12]"
KNOWN = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(model\.)?language_model\.(model\.)?layers\.\d+\.({_LAYER})\.(weight|bias)",
        r"(model\.)?language_model\.(model\.)?(embed_tokens|norm)\.weight",
        r"(language_model\.)?lm_head\.weight",
        r"(model\.)?image_newline",
        r"(model\.)?multi_modal_projector\.linear_[12]\.(weight|bias)",
        rf"(model\.)?vision_tower\.(vision_model\.)?encoder\.layers\.\d+\.({_TOWER_LAYER})"
        r"\.(weight|bias)",
        r"(model\.)?vision_tower\.(vision_model\.)?(pre_layrnorm|post_layernorm)\.(weight|bias)",
        r"(model\.)?vision_tower\.(vision_model\.)?embeddings\."
        r"(class_embedding|position_embedding\.weight|patch_embedding\.(weight|bias))",
    )
)


def unknown_names(config: Any, names: Iterable[str]) -> list[str]:
    """Tensors that the engine can't place, of a checkpoint that it serves with its plan; of others
    none is named.

    Args:
        config: the checkpoint's, as transformers reads it.
    """
    try:
        served = served_plan(config)
    except (UnservedPlan, PlanError):
        return []
    if served is None or config.vision_config.model_type != "clip_vision_model":
        return []
    return [name for name in names if not any(it.fullmatch(name) for it in KNOWN)]

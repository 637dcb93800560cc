"""Stage `base`: adopt the checkpoint to compress, after checking that it can be.

The checkpoint is a folder (or a hub id where the hub can be reached) of safetensors and a
processor. Weights in any other format are refused: nothing is unpickled.
"""

from typing import Any

import torch
from transformers import AutoProcessor

import adsc
from pipeline.durable.stage import StageContext
from pipeline.kinds.base import BaseConfig, BaseError, folder_digest
from pipeline.packaged import resolve


def base(ctx: StageContext, config: BaseConfig) -> dict[str, Any]:
    """Stage body: a copy of the checkpoint, loaded once with strict keys and a known family."""
    source = resolve(config.source)
    if source.exists():
        digest = folder_digest(source)
        if config.digest is not None and digest != config.digest:
            raise BaseError(
                f"{source} has digest {digest[:12]}, the config says {config.digest[:12]}: the "
                "files changed; restore them, or set base.digest to the new one"
            )
    elif config.source.startswith((".", "/", "~", "package:")) or config.source.count("/") != 1:
        raise BaseError(
            f"there is no folder {config.source!r}; give a folder or a hub id owner/name"
        )
    ctx.progress(1, 3, "loading")
    model = adsc.from_pretrained(source, use_safetensors=True, revision=config.revision)
    processor = AutoProcessor.from_pretrained(
        source, trust_remote_code=False, revision=config.revision
    )
    adsc.detach(model)
    ctx.progress(2, 3, "copying")
    model.save_pretrained(ctx.out)
    processor.save_pretrained(ctx.out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    ctx.track.params({"base.parameters": parameters, "base.dtype": str(model.dtype)})
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        raise BaseError(f"{config.source} holds weights that are not finite")
    return {"parameters": parameters, "architecture": type(model).__name__}

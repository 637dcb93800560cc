"""Stage `merge`: trained weights folded into the base, checked before they are published.

The output is a checkpoint folder as users have it: sharded safetensors, config with the plan,
processor, generation config; besides, the adapter alone, and a probe (inputs and logits) by which
any later copy can be verified to be the same model, under each of its plans.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import adsc
from adsc.attachment.adapters import FIELD
from adsc.method import Method
from adsc.plan import PruningPlan
from pipeline.data.prepared import PreparedData
from pipeline.data.templates import find_template
from pipeline.durable.stage import StageContext
from pipeline.evaluation.methods import build_method
from pipeline.kinds.merge import MergeConfig
from pipeline.publishing.probe import PROBE, write_named_probe
from pipeline.training.adapters import load_trained, merge_trained
from pipeline.training.batches import collate


class MergeMismatch(RuntimeError):
    """The merged model does not compute what the adapter model computes."""


def merge(ctx: StageContext, config: MergeConfig) -> dict[str, Any]:
    """Stage body; inputs `base`, `data` (probe rows) and `trained`."""
    base, trained = ctx.inputs["base"].folder, ctx.inputs["trained"].folder / "trained"
    processor = AutoProcessor.from_pretrained(base)
    rows = PreparedData(ctx.inputs["data"].folder / "train")
    probe = collate(rows.rows(range(min(config.probe_rows, len(rows)))), processor)
    probe.pop("labels")
    ctx.progress(1, 4, "logits with the adapter")
    adapted = AutoModelForImageTextToText.from_pretrained(base)
    method = build_method(config, adapted)
    adsc.attach(adapted, method)
    expected = _logits(load_trained(adapted, trained), probe)
    ctx.progress(2, 4, "merging")
    model: Any = merge_trained(AutoModelForImageTextToText.from_pretrained(base), trained)
    adsc.attach(adsc.name_plans(model, config.plans), method)
    got = _logits(model, probe)
    scale = expected.abs().max().item()
    worst = (got - expected).abs().max().item()
    if not worst <= config.tolerance * scale:
        raise MergeMismatch(
            f"logits of the merged model differ by {worst:.3g} from the adapter model's (largest "
            f"logit {scale:.3g}, allowed {config.tolerance:g} of it); a lower precision of the "
            "base or a wrong adapter can be the cause"
        )
    ctx.progress(3, 4, "writing")
    model.save_pretrained(ctx.out, max_shard_size=config.max_shard_size)
    # Prompts at inference must match those in training.
    template = ctx.inputs["data"].outputs["template"]
    processor.chat_template = find_template(template, processor).text
    processor.save_pretrained(ctx.out)
    if (trained / "adapter").exists():
        shutil.copytree(trained / "adapter", ctx.out / "adapter")
        _carry_plan(ctx.out / "adapter" / "adapter_config.json", method)
    save_file({**probe, "logits": got.contiguous()}, ctx.out / PROBE)
    write_named_probe(model, probe, ctx.out)
    ctx.track.metrics({"merge.worst_logit_difference": worst, "merge.largest_logit": scale})
    return {"plan": config.runs_with, "worst_logit_difference": worst, "largest_logit": scale}


def _carry_plan(adapter_config: Path, method: PruningPlan | Method) -> None:
    """Put the plan where `import adsc` looks for it when the adapter is loaded on its base."""
    if method.stages:
        content = json.loads(adapter_config.read_text()) | {FIELD: method.to_dict()}
        adapter_config.write_text(json.dumps(content, indent=2, sort_keys=True))


def _logits(model: torch.nn.Module, probe: dict[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    with torch.inference_mode():
        return model(**probe).logits

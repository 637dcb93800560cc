"""Stage `export`: the folder that users get, and the proof that it is the model that was scored.

The folder is an ordinary transformers checkpoint with the plan in its config, a model card, the
adapter by itself, what was measured, a probe and, written last, a manifest. A fresh process then
loads it and must compute the probe's logits. With `export.to` it is published there as well
(pipeline/publishing/publish.py), which is what `adsc export` does with any checkpoint; MLflow
registers it.

    python -m pipeline.stages.export FOLDER     checks any copy: files against the manifest, then
    the logits
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adsc import PruningPlan
from adsc.named import names_in
from adsc.serving.names import unknown_names
from pipeline.data.templates import begin_with_bos, special_tokens
from pipeline.durable.record import UNDONE, input_records
from pipeline.durable.stage import Input, StageContext
from pipeline.kinds.export import ExportConfig
from pipeline.publishing.manifest import (
    BOOKKEEPING,
    MANIFEST,
    ExportError,
    check_kinds,
    digest,
    files_of,
    verify_folder,
    write_manifest,
)
from pipeline.publishing.probe import (
    PROBE,
    find_probe,
    put_aside,
    read_named_probe,
    write_named_probe,
)
from pipeline.publishing.publish import publish
from pipeline.reporting.card import Card, write_card
from pipeline.store import open_store
from pipeline.tracking.names import model_name

if TYPE_CHECKING:
    from pipeline.durable.record import Record

EVALUATION = "evaluation.json"
"""Measurements of this checkpoint and of the models it was compared with."""
DATA = "data_manifest.json"
"""What it was trained on: the manifest of the prepared data."""
OWN_ARM = "plan_trained"
"""The exported checkpoint among a compression's arms, unless it is elastic (pipeline/recipe.py)."""
PLAN_FIELDS = {"stages", "anchor", "positions", "pool"}
"""Of a plan in config.json; a peer method has others."""


def export(ctx: StageContext, config: ExportConfig) -> dict[str, Any]:
    """Stage body; inputs `merge` and `evaluate`, and `data` for its manifest.

    Raises:
        ExportError: a file that doesn't belong there, a loaded model that computes otherwise, or
            something else at the place where it is to be published.
    """
    merged, evaluated, data = ctx.inputs["merge"], ctx.inputs["evaluate"], ctx.inputs.get("data")
    if not find_probe(merged.folder).is_file():
        raise ExportError(
            f"{merged.folder} has no {PROBE}; the merge stage writes it beside the weights"
        )
    ctx.progress(0, 5, "copying")
    prints = {name: it.fingerprint for name, it in ctx.inputs.items()} | {"export": ctx.fingerprint}
    card = Card(
        name=config.name,
        base=config.base,
        licence=config.licence,
        plan=merged.outputs.get("plan", ""),
        plans=_plans_of(merged.folder),
        arms=evaluated.outputs.get("arms", {}),
        majority=evaluated.outputs.get("majority"),
        workflow=ctx.run.workflow,
        commit=ctx.run.commit,
        data_digest=data.outputs.get("digest") if data else None,
        lineage=prints,
    )
    measured = evaluation(evaluated, card.plan)
    described = {EVALUATION: json.dumps(measured, indent=1).encode()}
    if data and (text := open_store(data.uri).read("manifest.json")):
        described[DATA] = text
    assemble(merged.folder, ctx.out, card, described)
    ctx.progress(1, 5, "loading it in a fresh process")
    probe = check_in_fresh_process(ctx.out, config)
    ctx.track.metrics({"probe": probe})
    ctx.progress(2, 5, "publishing")
    if config.to:
        publish(
            ctx.out, config.store(), lambda copy: check_in_fresh_process(copy, config), ctx.progress
        )
    ctx.progress(4, 5, "logging")
    name = digest((ctx.out / MANIFEST).read_bytes())
    logged = _register(ctx, config, name, card.plan, measured)
    ctx.progress(5, 5, "done")
    sizes = [path.stat().st_size for path in files_of(ctx.out)]
    return {
        "files": len(sizes),
        "bytes": sum(sizes),
        "probe": probe,
        "manifest": name,
        "published": config.to or None,
        **logged,
    }


def register_again(ctx: StageContext, config: ExportConfig, record: Record) -> dict[str, Any]:
    """Register the checkpoint of an export whose registration failed (`Kind.complete`)."""
    plan = ctx.inputs["merge"].outputs.get("plan", "")
    measured = evaluation(ctx.inputs["evaluate"], plan)
    return _register(ctx, config, record.outputs["manifest"], plan, measured)


def _register(
    ctx: StageContext, config: ExportConfig, manifest: str, plan: str, measured: dict[str, Any]
) -> dict[str, Any]:
    """Register the checkpoint in `ctx.out` with MLflow; returns the outputs that record it."""
    facts = _tags(measured) | {
        "adsc.manifest": manifest,
        "adsc.plan": plan or "none",
        "adsc.workflow": ctx.run.workflow,
        "adsc.commit": ctx.run.commit or "unknown",
        "adsc.fingerprint": ctx.fingerprint,
        "adsc.address": config.to or "in the store of the run",
        "adsc.run.workflow": ctx.run.parent_run_id or "",
    }
    facts |= {f"adsc.run.{stage}": run for stage, run in runs_behind(ctx.inputs).items()}
    for key in ("adsc.manifest", "adsc.plan", "adsc.address"):
        ctx.track.tag(key, facts[key])
    if not config.log_model or ctx.track.handle.nowhere:
        return {"mlflow_model": None, "mlflow_version": None, UNDONE: {}}
    logged = ctx.track.model(ctx.out, config.name, {k: v for k, v in facts.items() if v})
    if logged is None:
        why = ctx.track.problems[-1] if ctx.track.problems else "MLflow gives no reason"
        undone = {f"register the model in MLflow as {model_name(config.name)}": why}
        return {"mlflow_model": None, "mlflow_version": None, UNDONE: undone}
    return {"mlflow_model": logged[0], "mlflow_version": logged[1], UNDONE: {}}


def assemble(source: Path, out: Path, card: Card, described: Mapping[str, bytes]) -> None:
    """A checkpoint with its card, files that describe it, and its manifest.

    Raises:
        ExportError: a file that doesn't belong there; a tensor that the serving engine can't place.
    """
    if source != out:
        shutil.copytree(source, out, dirs_exist_ok=True)
    put_aside(out)
    check_names(out)
    begin_with_bos(out)
    _name_base(out / "adapter" / "adapter_config.json", card.base)
    for name, text in described.items():
        (out / name).write_bytes(text)
    write_card(out, card)
    for path in files_of(out):
        path.chmod(0o644)  # PEFT writes adapters that only their owner can read
    lineage = {"commit": card.commit, "data": card.data_digest, "fingerprints": card.lineage}
    write_manifest(out, lineage)


def check_names(folder: Path) -> None:
    """Raise an ExportError for tensors that vLLM with our plugin has no place for, of a checkpoint
    that it serves with its plan."""
    from safetensors import safe_open
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names += tensors.keys()
    if strange := unknown_names(config, names):
        raise ExportError(
            f"{folder} holds tensors that no serving engine has a place for: "
            f"{', '.join(strange[:5])}{' ...' if strange[5:] else ''}; save the model with "
            "save_pretrained, as its own class"
        )


def complete(source: Path, out: Path, config: ExportConfig) -> None:
    """A folder that `save_pretrained` made, with all that is published beside the weights.

    Its probe is computed here from the model in `source`, unless it has one.

    Raises:
        ExportError: it isn't a checkpoint with its processor; a file that doesn't belong there.
    """
    if not (source / "config.json").is_file():
        raise ExportError(f"{source} is not a checkpoint: it has no config.json")
    check_kinds(source, BOOKKEEPING)  # before anything is loaded
    card = Card(
        name=config.name,
        base=config.base,
        licence=config.licence,
        plan=_plan_of(source),
        plans=_plans_of(source),
        arms={},
        majority=None,
        workflow="adsc export",
        commit=None,
        data_digest=None,
        lineage={},
    )
    ignore = shutil.ignore_patterns(*BOOKKEEPING)
    shutil.copytree(source, out, dirs_exist_ok=True, ignore=ignore)
    if not find_probe(out).is_file():
        _write_probe(out)
    assemble(out, out, card, {})


def _plan_of(folder: Path) -> str:
    """The plan in a checkpoint's config as text; of a peer method, its settings."""
    data = json.loads((folder / "config.json").read_text()).get("adsc")
    if not data:
        return ""
    return str(PruningPlan.from_dict(data)) if data.keys() <= PLAN_FIELDS else json.dumps(data)


def _plans_of(folder: Path) -> dict[str, str]:
    """The named plans in a checkpoint's config, as text."""
    config = json.loads((folder / "config.json").read_text())
    return {name: str(plan) for name, plan in names_in(config).items()}


def _write_probe(folder: Path) -> None:
    """One picture with one question, and the logits that the model computes for it."""
    import torch
    from PIL import Image
    from safetensors.torch import save_file
    from transformers import AutoProcessor

    import adsc

    processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    model = adsc.from_pretrained(folder, use_safetensors=True).eval()
    picture = Image.linear_gradient("L").convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    try:
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        special = special_tokens(processor, [prompt])
        probe = dict(processor(text=[prompt], images=[picture], return_tensors="pt", **special))
    except (ValueError, AttributeError) as error:
        raise ExportError(
            f"{folder} has no processor with a chat template, to make a probe with: {error}"
        ) from None
    with torch.inference_mode():
        logits = model(**probe).logits
    save_file({**probe, "logits": logits.contiguous()}, folder / PROBE)
    write_named_probe(model, probe, folder)


def evaluation(evaluated: Input, plan: str) -> dict[str, Any]:
    """The measurements, and those of the checkpoint itself: `arm` and `own`, None if the
    evaluation has no trained model with this plan, or several of which none is the recipe's own."""
    outputs: dict[str, Any] = {"arm": None, "control": None, "own": None, "budgets": {}}
    outputs |= {name: evaluated.outputs.get(name) for name in ("arms", "majority")}
    text = open_store(evaluated.uri).read("results.json")
    if text is None:
        return outputs
    results = json.loads(text)
    arms = {arm["name"]: arm for arm in results["arms"]}
    same_plan = [
        arm
        for arm in arms.values()
        if arm["trained"] and not arm.get("peer") and _same(arm["plan"], plan)
    ]
    control = arms.get(results["control_arm"])
    if control is None:
        return outputs
    outputs["budgets"] = {
        arm["budget"]: {"arm": arm["name"], "plan": arm["plan"], **_measured(arm, control)}
        for arm in arms.values()
        if arm["trained"] and arm.get("budget")
    }
    # Other recipes may be compared at the same plan; and two names may stand for it.
    own = [arm for arm in same_plan if arm["name"] == OWN_ARM or arm.get("budget")][:1]
    if len(own or same_plan) != 1:
        return outputs
    (arm,) = own or same_plan
    return outputs | {
        "arm": arm["name"],
        "control": control["name"],
        "own": _measured(arm, control),
    }


def _measured(arm: dict[str, Any], control: dict[str, Any]) -> dict[str, Any]:
    """Scores and costs of an arm, as far as they are about it and the control."""
    interval = arm["retention_interval"] or {}
    return {
        "accuracy": arm["accuracy"]["mean"],
        "retention": arm["retention"],
        "retention_low": interval.get("low", arm["retention"]),
        "flops_of_control": arm["flops"] / control["flops"],
        "kv_cache_of_control": arm["kv_cache_bytes"] / control["kv_cache_bytes"],
        "average_vision_tokens": arm["average_vision_tokens"],
    }


def runs_behind(inputs: Mapping[str, Input]) -> dict[str, str]:
    """Stage -> MLflow run, for every stage upstream."""
    runs: dict[str, str] = {}
    waiting = [it.record for it in inputs.values()]
    while waiting:
        record = waiting.pop()
        if record.stage in runs:
            continue
        runs[record.stage] = record.run_id or ""
        waiting += input_records(record)
    return {stage: run for stage, run in runs.items() if run}


def _same(text: str, plan: str) -> bool:
    return bool(PruningPlan.parse(text) == PruningPlan.parse(plan))


def _tags(measured: dict[str, Any]) -> dict[str, str]:
    """Tags for gates and filters; those of a named plan end in its name."""
    named = {"adsc.arm": measured["arm"], "adsc.control": measured["control"]}
    tags = {name: value for name, value in named.items() if value}
    tags |= _numbers(measured["own"] or {}, "")
    for budget, figures in measured["budgets"].items():
        tags[f"adsc.plan.{budget}"] = figures["plan"] or "none"
        tags |= _numbers(figures, f".{budget}")
    return tags


def _numbers(figures: dict[str, Any], suffix: str) -> dict[str, str]:
    return {
        f"adsc.{name}{suffix}": f"{value:.6g}"
        for name, value in figures.items()
        if isinstance(value, int | float)
    }


def compare_logits(folder: Path) -> dict[str, float]:
    """Load the checkpoint strictly and run its probe, with each of its named plans as well: worst
    difference, and the largest logit."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoProcessor

    import adsc

    AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    model = adsc.from_pretrained(folder).eval()
    probe = load_file(find_probe(folder))
    expected = {"": probe.pop("logits")} | read_named_probe(folder)
    missing = sorted(expected.keys() - {"", *adsc.plans_of(model)})
    if missing:
        raise ExportError(
            f"config.json names no plan {', '.join(missing)}, for which the probe has logits: it "
            "is not the config that the probe was made with"
        )
    differences = []
    for name, logits in expected.items():
        if name:
            adsc.attach(model, name)
        with torch.inference_mode():
            got = model(**probe).logits.float()
        if got.shape != logits.shape:
            whose = f"plan named {name!r}" if name else "plan"
            raise ExportError(
                f"logits have shape {tuple(got.shape)}, the probe's {tuple(logits.shape)}: the "
                f"{whose} in config.json is not the one that the probe was made with"
            )
        differences.append([(got - logits.float()).abs().max(), logits.float().abs().max()])
    worst, largest = torch.tensor(differences).amax(dim=0).tolist()  # NaN stays NaN
    return {"worst_difference": worst, "largest_logit": largest}


def check_in_fresh_process(folder: Path, config: ExportConfig) -> dict[str, float]:
    """Load it in a process that shares neither memory nor import path with this one."""
    # -P: nothing is imported from the current folder.
    command = [sys.executable, "-P", "-m", "pipeline.stages.export", str(folder.absolute())]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TQDM_DISABLE": "1",
    }
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=config.timeout
        )
    except subprocess.TimeoutExpired:
        raise ExportError(
            f"loading {folder} took longer than {config.timeout:g} s; raise export.timeout"
        ) from None
    if done.returncode:
        raise ExportError(f"a fresh process can't use {folder}: {done.stderr.strip()[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    allowed = config.tolerance * result["largest_logit"]
    if not result["worst_difference"] <= allowed:
        raise ExportError(
            f"loaded from {folder}, the model's logits differ by {result['worst_difference']:.3g} "
            f"from the merged model's; {allowed:.3g} is allowed ({config.tolerance:g} of the "
            "largest). If it was merged on another kind of machine, raise export.tolerance"
        )
    return result


def _name_base(adapter_config: Path, base: str) -> None:
    """Replace the base's path on the training machine, which PEFT records, with its name."""
    if adapter_config.is_file():
        content = json.loads(adapter_config.read_text())
        content["base_model_name_or_path"] = base or None
        adapter_config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Verify a folder; one line of JSON on standard output, or the reasons on standard error."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.stages.export", description=__doc__)
    parser.add_argument("folder", type=Path, help="an exported checkpoint")
    folder = parser.parse_args(arguments).folder
    try:
        verify_folder(folder)
        result = compare_logits(folder)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

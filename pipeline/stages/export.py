"""Stage `export`: the folder that users get, and the proof that it is the model that was scored.

The folder is an ordinary transformers checkpoint with the plan in its config, a model card, the
adapter, a probe and, written last, a manifest. A fresh process then loads it and must compute the
probe's logits. Uploading is left to the stage machinery, registering and serving to MLflow.

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
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from pipeline.config import Config
from pipeline.record import File
from pipeline.stages.card import Card, write_card
from pipeline.store import file_sha256

if TYPE_CHECKING:
    from pipeline.stage import StageContext

MANIFEST = "manifest.json"
PROBE = "probe.safetensors"
SCHEMA_VERSION = 1
SUFFIXES = {".json", ".jinja", ".md", ".model", ".safetensors", ".txt"}
"""What a checkpoint may hold, besides LICENSE and NOTICE: nothing that loading could execute."""


class ExportConfig(Config):
    """What is published beside the weights, and how exactly a copy must compute."""

    name: str = "compressed"
    """The model's name, on its card and in MLflow."""
    base: str = ""
    """What the base is called, for card and adapter: a hub id or a few words."""
    licence: str = ""
    """Licence of the base, as hubs write it (apache-2.0); empty says that it is unknown."""
    tolerance: float = Field(default=1e-4, ge=0)
    """Largest allowed difference of a logit in the fresh process, as a share of the largest logit.
    On one machine the difference is 0; other processors and kernels round differently."""
    timeout: float = Field(default=1800, gt=0)
    """Seconds that the fresh process may take."""
    log_model: bool = True
    """Also log it as an MLflow model, which copies all files to MLflow's artifact store."""


class ExportError(ValueError):
    """The checkpoint can't be published, or isn't what was published; all reasons at once."""


EXPORT_VERSION = 1
"""To be raised whenever the stage computes something else; see `Stage.version`."""


def export(ctx: StageContext, config: ExportConfig) -> dict[str, Any]:
    """Stage body; inputs `merge` and `evaluate`, and `data` for its digest.

    Raises:
        ExportError: a file that doesn't belong there, or a loaded model that computes otherwise.
    """
    source = ctx.inputs["merge"].folder
    if not (source / PROBE).is_file():
        raise ExportError(f"{source} has no {PROBE}; the merge stage writes it beside the weights")
    ctx.progress(0, 4, "copying")
    shutil.copytree(source, ctx.out, dirs_exist_ok=True)
    for path in _files(ctx.out):
        path.chmod(0o644)  # PEFT writes adapters that only their owner can read
    _name_base(ctx.out / "adapter" / "adapter_config.json", config.base)
    lineage = {name: it.fingerprint for name, it in ctx.inputs.items()} | {
        "export": ctx.fingerprint
    }
    data = ctx.inputs["data"].outputs.get("digest") if "data" in ctx.inputs else None
    write_card(
        ctx.out,
        Card(
            name=config.name,
            base=config.base,
            licence=config.licence,
            plan=ctx.inputs["merge"].outputs.get("plan", ""),
            arms=ctx.inputs["evaluate"].outputs.get("arms", {}),
            majority=ctx.inputs["evaluate"].outputs.get("majority"),
            workflow=ctx.run.workflow,
            commit=ctx.run.commit,
            data_digest=data,
            lineage=lineage,
        ),
    )
    ctx.progress(1, 4, "checksums")
    write_manifest(ctx.out, {"commit": ctx.run.commit, "data": data, "fingerprints": lineage})
    ctx.progress(2, 4, "loading it in a fresh process")
    found = _check_in_fresh_process(ctx.out, config)
    ctx.progress(3, 4, "logging")
    ctx.track.metrics({"probe": found})
    logged = ctx.track.model(ctx.out, config.name) if config.log_model else None
    ctx.progress(4, 4, "done")
    sizes = [path.stat().st_size for path in _files(ctx.out)]
    return {"files": len(sizes), "bytes": sum(sizes), "probe": found, "mlflow_model": logged}


def write_manifest(folder: Path, lineage: dict[str, Any]) -> None:
    """Sizes and SHA-256 of all files, in manifest.json. The last file to be written.

    Raises:
        ExportError: files of a kind that a checkpoint has no need of.
    """
    files = [File.read(folder, path) for path in _files(folder) if path != folder / MANIFEST]
    if strange := [file.path for file in files if not _allowed(file.path)]:
        raise ExportError(
            f"{', '.join(strange)}: only {', '.join(sorted(SUFFIXES))}, LICENSE and NOTICE are "
            "published; weights are to be safetensors"
        )
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "lineage": lineage,
        "files": [file.model_dump() for file in files],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def verify_folder(folder: Path) -> list[File]:
    """Compare a folder with its manifest, before anything in it is loaded.

    Raises:
        ExportError: every missing, truncated, altered, extra or unsafe file, by name.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version = manifest["schema_version"]
        files = [File.model_validate(entry) for entry in manifest["files"]]
    except OSError as error:
        raise ExportError(f"{folder} is no exported checkpoint: {error}") from None
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise ExportError(f"{folder / MANIFEST} can't be read: {error}") from None
    if version != SCHEMA_VERSION:
        raise ExportError(
            f"{folder / MANIFEST} has schema version {version}, this program reads {SCHEMA_VERSION}"
        )
    problems = [problem for file in files if (problem := _problem(folder, file))]
    listed = {folder / file.path for file in files} | {folder / MANIFEST}
    extra = [path for path in _files(folder) if path not in listed]
    problems += [f"{path.relative_to(folder)} is not in the manifest" for path in extra]
    if problems:
        raise ExportError(f"{folder} isn't what was exported: {'; '.join(problems)}. Copy it again")
    return files


def compare_logits(folder: Path) -> dict[str, float]:
    """Load the checkpoint strictly and run its probe: worst difference, and the largest logit."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoProcessor

    import adsc

    AutoProcessor.from_pretrained(folder)
    model = adsc.from_pretrained(folder).eval()
    probe = load_file(folder / PROBE)
    expected = probe.pop("logits").float()
    with torch.inference_mode():
        got = model(**probe).logits.float()
    if got.shape != expected.shape:
        raise ExportError(
            f"logits have shape {tuple(got.shape)}, the probe's {tuple(expected.shape)}: the plan "
            "in config.json is not the one that the probe was made with"
        )
    worst = (got - expected).abs().max().item()
    return {"worst_difference": worst, "largest_logit": expected.abs().max().item()}


def _check_in_fresh_process(folder: Path, config: ExportConfig) -> dict[str, float]:
    """Nothing that this process holds in memory or on its path of imports can help the loading."""
    command = [sys.executable, "-m", "pipeline.stages.export", str(folder)]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
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
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    allowed = config.tolerance * found["largest_logit"]
    if not found["worst_difference"] <= allowed:
        raise ExportError(
            f"loaded from {folder}, the model's logits differ by {found['worst_difference']:.3g} "
            f"from the merged model's; {allowed:.3g} is allowed ({config.tolerance:g} of the "
            "largest). Was it merged on another kind of machine? export.tolerance can be raised"
        )
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file())


def _allowed(path: str) -> bool:
    name = PurePosixPath(path)
    return name.suffix in SUFFIXES or name.name in ("LICENSE", "NOTICE")


def _problem(folder: Path, file: File) -> str | None:
    """What is wrong with one entry of a manifest; None if nothing is."""
    named, path = PurePosixPath(file.path), folder / file.path
    if named.is_absolute() or ".." in named.parts or "\\" in file.path:
        return f"{file.path!r} leads out of the folder"
    if not _allowed(file.path):
        return f"{file.path} is of a kind that is never exported"
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"{file.path} is a link out of the folder"
    if not path.is_file():
        return f"{file.path} is missing"
    if (size := path.stat().st_size) != file.size:
        return f"{file.path} has {size} bytes instead of {file.size}"
    if file_sha256(path) != file.sha256:
        return f"{file.path} was altered (checksum)"
    return None


def _name_base(adapter_config: Path, base: str) -> None:
    """PEFT notes the base by its path on the machine that trained: say its name instead."""
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
        found = compare_logits(folder)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`adsc prepare`: the stage `prepare` on its own, on a user's files, without a store or MLflow.

It writes into a folder beside OUT and renames that at the end: OUT is complete or absent.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.data.config import PrepareConfig
    from pipeline.durable.stage import Input

EXAMPLES = """examples:
  adsc prepare llava_v1_5_mix665k.json --images /data/pictures --model llava-hf/llava-1.5-7b-hf \\
      --out prepared
  adsc prepare records.jsonl --images 'shards/*.tar' --model CHECKPOINT --out prepared --json
  adsc prepare vqa.json chat.jsonl --weights 3,1 --images s3://bucket/pictures \\
      --model CHECKPOINT --out prepared
  adsc prepare 'data/train-*.parquet' --model CHECKPOINT --out prepared --max-quarantined 0.05

DATA is a JSON list, JSON Lines, Parquet, a folder saved by Hugging Face `datasets`, a quoted glob,
or the address of such a file (s3://, gs://, https://). OUT receives Parquet shards, manifest.json
and quarantine.jsonl (id, source line, reason). With more bad records than --max-quarantined allows,
the exit code is 2, OUT is not written, and the bad records are listed in OUT.quarantine.jsonl.
docs/data.md explains every reason.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="+", metavar="DATA", help="file, glob, folder or address")
    parser.add_argument(
        "--images",
        help="root of the pictures: a folder, a tar file, a glob of tar files, or the address of "
        "one (default: the folder `images` beside DATA)",
    )
    parser.add_argument(
        "--model", required=True, metavar="CHECKPOINT", help="checkpoint folder or hub id"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="a folder that does not exist yet"
    )
    parser.add_argument(
        "--max-quarantined", type=_share, default=0.01, metavar="SHARE",
        help="largest share of records, 0 to 1, that may be quarantined (default: 0.01)",
    )  # fmt: skip
    parser.add_argument(
        "--template",
        default="auto",
        help="vicuna_v1, vicuna_short, tokenizer (the checkpoint's own) or auto (default: the "
        "checkpoint's own if it ends answers with an end token, else vicuna_v1)",
    )
    parser.add_argument(
        "--context", type=_count, help="longest conversation in tokens (default: the model's)"
    )
    parser.add_argument("--weights", help="mixing weights, one for each DATA, such as 3,1")
    parser.add_argument("--cap", type=_count, help="most records to take from each DATA")
    parser.add_argument("--seed", type=_seed, default=0, help="seed for sampling the mix (0)")
    parser.add_argument("--address", help="an existing Ray cluster (default: Ray on this machine)")
    parser.add_argument("--json", action="store_true", help="print counts as JSON on the last line")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1")
    return value


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Prepare; returns the exit code.

    Raises:
        ValueError: bad input, or too many bad records; OUT is left unchanged.
    """
    from pipeline.stages.prepare import TooManyBadRecords

    out = Path(options.out).absolute()
    _check_out(out)
    try:
        manifest = _prepare(options, out)
    except TooManyBadRecords as error:
        if options.json:
            _print_counts(error.counts)
        raise
    except KeyboardInterrupt:
        sys.stderr.write(f"adsc: interrupted; nothing was written to {out}\n")
        return 130
    if options.json:
        _print_counts(manifest)
    else:
        _print_summary(manifest, out)
    return 0


def _print_counts(counts: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({key: counts[key] for key in ("in", "out", "quarantined")}) + "\n")
    sys.stdout.flush()


def _print_summary(manifest: dict[str, Any], out: Path) -> None:
    from rich.console import Console

    from pipeline.durable.progress import PLAIN

    (counts,) = manifest["splits"].values()
    lines = [
        f"{manifest['in']} records in, {manifest['out']} out in {len(manifest['files'])} shards",
        f"{counts['tokens']} tokens ({counts['vision_tokens']} vision tokens, "
        f"{counts['supervised_tokens']} supervised), the longest record {counts['longest']}, "
        f"template {manifest['template']}",
    ]
    if manifest["quarantined"]:
        reasons = ", ".join(f"{name} {n}" for name, n in manifest["quarantined"].items())
        lines.append(f"quarantined: {reasons}; see {out / 'quarantine.jsonl'}")
    lines.append(str(out))
    Console().print("\n".join(lines), **PLAIN)


def _check_out(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; name a new folder with --out, or remove it")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValueError(f"{out} is not a folder; name a new one with --out")


def _prepare(options: argparse.Namespace, out: Path) -> dict[str, Any]:
    from rich.console import Console

    from pipeline.durable.progress import Display, Report
    from pipeline.durable.session import ray_for
    from pipeline.durable.stage import RunContext
    from pipeline.stages.prepare import TooManyBadRecords, prepare_data

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes are parallel already
    model = _model_folder(options.model)
    config = _config(options, model)
    kept = out.with_name(f"{out.name}.quarantine.jsonl")
    context = RunContext(root=str(out.parent), workflow="prepare", address=options.address)
    display = Display(Console(stderr=True), {"prepare": "prepare"})
    with _beside(out) as folder:

        def show(done: float, total: float, note: str) -> None:
            report = Report(state="running", done=done, total=total, note=note)
            display.update({"prepare": report})

        try:
            with ray_for(context), display:
                manifest = prepare_data(
                    _input(Path.cwd()), _input(model), config, folder, show, flat=True
                )
        except TooManyBadRecords as error:
            shutil.move(folder / "quarantine.jsonl", kept)
            message = f"{error}. Nothing was written to {out}; the bad records are in {kept}"
            raise TooManyBadRecords(message, error.counts) from None
        folder.chmod(0o755)
        folder.rename(out)
    kept.unlink(missing_ok=True)  # left by an earlier run that failed
    return manifest


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder beside `out`, removed on exit and on SIGTERM unless it was renamed."""

    def leave(*_: object) -> None:
        sys.exit(128 + signal.SIGTERM)

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.partial-"))
    except OSError as error:
        raise ValueError(f"can't write beside {out}: {error.strerror}") from None
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield folder
    except OSError as error:
        raise ValueError(f"can't write {out}: {error}") from error
    finally:
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(folder, ignore_errors=True)


def _config(options: argparse.Namespace, model: Path) -> PrepareConfig:
    from pipeline.data.config import PrepareConfig
    from pipeline.data.files import GLOB, is_remote
    from pipeline.data.mixture import Source
    from pipeline.data.sources import find_files

    places = [p if is_remote(p) else str(Path(p).absolute()) for p in options.data]
    for place in places:
        find_files(place, Path(), "train")
    images = options.images
    if images and not is_remote(images):
        images = str(Path(images).absolute())
        if not Path(images).exists() and not GLOB.intersection(Path(images).name):
            raise ValueError(f"there is no folder or tar file {images!r} for --images")
    beside = [images or f"{place.rpartition('/')[0]}/images" for place in places]
    weights = _weights(options.weights, len(places))
    sources: dict[str, Source] = {}
    for place, pictures, weight in zip(places, beside, weights, strict=True):
        name = place.rstrip("/").rpartition("/")[2]
        while name in sources:
            name += "'"
        sources[name] = Source(data=place, images=pictures, weight=weight, cap=options.cap)
    return PrepareConfig(
        splits={"train": sources},
        template=options.template,
        context=options.context or _model_context(model),
        max_quarantined=options.max_quarantined,
        seed=options.seed,
    )


def _weights(text: str | None, count: int) -> Sequence[float | None]:
    if text is None:
        return [None] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != count or not all(1e-9 <= weight <= 1e9 for weight in weights):
        raise ValueError(
            f"--weights {text!r} is not {count} numbers from 1e-9 to 1e9, one for each DATA"
        )
    return weights


def _model_folder(model: str) -> Path:
    """The checkpoint's folder; for a hub id, a copy of everything but the weights."""
    from adsc.weight_files import original_layout, original_name

    if other := original_name(model):
        raise ValueError(f"can't prepare for {model}: {other}")
    folder = Path(model).expanduser().absolute()
    if folder.is_dir():
        config = folder / "config.json"
        if config.is_file() and (other := original_layout(_read_json(config))):
            raise ValueError(f"can't prepare for {model}: {other}")
        return folder
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ValueError(f"there is no checkpoint folder {model!r}")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"there is no checkpoint folder {model!r}, and the hub can't provide it: {first}"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch it again") from None
    return content if isinstance(content, dict) else {}


def _model_context(model: Path) -> int:
    """The model's number of positions; 2048, as LLaVA-1.5 is trained with, if unknown."""
    from transformers import AutoConfig

    if not (model / "config.json").is_file():
        return 2048
    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"can't read {model / 'config.json'}: {first}") from None
    return int(getattr(config, "max_position_embeddings", 2048))


def _input(folder: Path) -> Input:
    from pipeline.durable.record import Record
    from pipeline.durable.stage import Input

    record = Record(stage="given", fingerprint="0" * 64, attempt="", outputs={}, uri=str(folder))
    return Input(record)

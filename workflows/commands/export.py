"""The commands `adsc export`, `adsc pull` and `adsc promote`: their words and their bars.

What they do stands in pipeline/publishing/publish.py and pipeline/tracking/mlflow_registry.py; the
stage `export` publishes by the same functions.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflows.commands import terminal
from workflows.commands.terminal import add_command

if TYPE_CHECKING:
    from pipeline.publishing.publish import Published, Report

EXPORT_EXAMPLES = """examples:
  adsc export "$(adsc show demo export --path)" s3://models/tiny-llava
  adsc export compressed s3://models/mine --base llava-hf/llava-1.5-7b-hf --licence llama2
  adsc export CHECKPOINT s3://models/mine --encryption aws:kms --kms-key ARN --tag team=vision
  adsc export CHECKPOINT /mnt/models/mine

CHECKPOINT is the folder of an export stage, or any folder that save_pretrained made: that one gets
a card, a probe and a manifest first. It is uploaded, loaded back from there in a fresh process, and
only then can be seen. The same command goes on after a kill, and is a no-op once it is done.
"""
PULL_EXAMPLES = """examples:
  adsc pull s3://models/tiny-llava tiny-llava
  adsc pull s3://models/tiny-llava tiny-llava --expect 3f0c...  (the manifest's SHA-256, as printed
                                                                 by `adsc export` and in MLflow)
  adsc pull s3://models/tiny-llava tiny-llava --check           (load it, compare its logits)
"""
PROMOTE_EXAMPLES = """examples:
  adsc promote tiny-llava-compressed --mlflow http://mlflow:5000
  adsc promote tiny-llava-compressed --version 3 --min-retention 0.9 --max-cost 0.7
  adsc promote tiny-llava-compressed --to staging --json

Gates: the lower end of the 95 % interval of the accuracy, as a share of the dense control's, and
the FLOPs of a prefill, as a share of the control's. Exit code 1 if one doesn't hold.
"""


def add_commands(commands: Any) -> None:
    """The three subcommands; `commands` is what `add_subparsers` returned."""
    export = add_command(
        commands, "export", "publish a checkpoint at an address, checked", EXPORT_EXAMPLES
    )
    export.add_argument("checkpoint", type=Path, help="a folder")
    export.add_argument("address", help="s3://bucket/prefix, or a folder; for this one checkpoint")
    export.add_argument("--name", help="on its card (default: the address's last part)")
    export.add_argument("--base", default="", help="what the base is called, for the card")
    export.add_argument("--licence", default="", help="of the base, as hubs write it: apache-2.0")
    export.add_argument("--encryption", default="", choices=("AES256", "aws:kms"), help="on S3")
    export.add_argument("--kms-key", default="", metavar="ARN", help="for aws:kms")
    export.add_argument(
        "--tag", action="append", default=[], metavar="KEY=VALUE", help="of each object; repeatable"
    )
    export.add_argument(
        "--tolerance",
        type=terminal.number(float, least=0),
        metavar="SHARE",
        help="largest difference of a logit (default: 1e-4 of the largest)",
    )
    _add_json(export)
    export.set_defaults(run=_export)

    pull = add_command(
        commands, "pull", "copy a published checkpoint into a folder, verified", PULL_EXAMPLES
    )
    pull.add_argument("address", help="s3://bucket/prefix, or any address that fsspec knows")
    pull.add_argument("folder", type=Path, metavar="DIR", help="where to; made if need be")
    pull.add_argument("--expect", default="", metavar="SHA256", help="of its manifest")
    pull.add_argument(
        "--check", action="store_true", help="load it in a fresh process, compare its logits"
    )
    _add_json(pull)
    pull.set_defaults(run=_pull)

    promote = add_command(
        commands,
        "promote",
        "give a registered model an alias, if gates hold",
        PROMOTE_EXAMPLES,
    )
    promote.add_argument("name", help="of the model in MLflow: `export.name` of the workflow")
    promote.add_argument("--mlflow", metavar="URI", help="default: $MLFLOW_TRACKING_URI")
    promote.add_argument("--version", default="candidate", help="a number or an alias")
    promote.add_argument("--to", default="champion", metavar="ALIAS", help="default: champion")
    promote.add_argument(
        "--min-retention",
        type=terminal.number(float),
        default=0.95,
        metavar="SHARE",
        help="default: 0.95",
    )
    promote.add_argument(
        "--max-cost",
        type=terminal.number(float),
        default=1.0,
        metavar="SHARE",
        help="default: 1",
    )
    promote.add_argument(
        "--plan", metavar="NAME", help="judge by this named plan (default: by the one it runs with)"
    )
    _add_json(promote)
    promote.set_defaults(run=_promote)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object")


def _export(options: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from pipeline.kinds.export import ExportConfig
    from pipeline.publishing.publish import publish
    from pipeline.stages.export import check_in_fresh_process

    tags = dict(_pair(text) for text in options.tag)
    name = options.name or options.address.rstrip("/").rpartition("/")[2]
    given = {} if options.tolerance is None else {"tolerance": options.tolerance}
    try:
        config = ExportConfig(
            name=name, base=options.base, licence=options.licence, to=options.address,
            encryption=options.encryption, kms_key=options.kms_key, tags=tags, **given,
        )  # fmt: skip
    except ValidationError as error:
        problems = [it["msg"].removeprefix("Value error, ") for it in error.errors()]
        raise ValueError("; ".join(problems)) from None
    with _whole(options.checkpoint, config) as folder, _bar(options.json) as report:
        done = publish(
            folder, config.store(), lambda copy: check_in_fresh_process(copy, config), report
        )
    said = f"{done.moved} files sent" if done.probe else "it was there already: nothing was done"
    _tell(options, done, said)
    return 0


def _pull(options: argparse.Namespace) -> int:
    from pipeline.kinds.export import ExportConfig
    from pipeline.publishing.publish import pull
    from pipeline.stages.export import check_in_fresh_process
    from pipeline.store import open_store

    with _bar(options.json) as report:
        done = pull(open_store(options.address), options.folder, options.expect, report)
        if options.check:
            report(1, 1, "loading it in a fresh process")
            probe = check_in_fresh_process(options.folder, ExportConfig())
            done = dataclasses.replace(done, probe=probe)
    _tell(options, done, f"{done.moved} files fetched to {options.folder}, all verified")
    return 0


def _promote(options: argparse.Namespace) -> int:
    from pipeline.tracking.address import chosen
    from pipeline.tracking.mlflow_registry import Gate, promote

    uri = chosen(options.mlflow)
    if uri is None or uri == "off":
        raise ValueError("which MLflow? Give --mlflow URI, or set MLFLOW_TRACKING_URI")
    plan = f".{options.plan}" if options.plan else ""
    gates = (
        Gate(
            name="retention (lower end)",
            tag=f"adsc.retention_low{plan}",
            limit=options.min_retention,
            at_least=True,
        ),
        Gate(
            name="FLOPs of the control's",
            tag=f"adsc.flops_of_control{plan}",
            limit=options.max_cost,
            at_least=False,
        ),
    )
    found = promote(uri, options.name, gates, options.to, options.version)
    if options.json:
        print(json.dumps(dataclasses.asdict(found)))
        return bool(found.refused)
    table = terminal.table("gate", "measured", "holds")
    for gate, value in found.values.items():
        measured = "not measured" if value is None else f"{value:.4g}"
        table.add_row(gate, measured, "no" if gate in found.refused else "yes")
    console = terminal.console()
    console.print(table)
    outcome = (
        f"refused: {found.alias} stays with version {found.before or 'none'}"
        if found.refused
        else f"{found.alias} is now version {found.version} (before: {found.before or 'none'})"
    )
    console.print(f"{found.name} version {found.version}: {outcome}", markup=False)
    return bool(found.refused)


@contextlib.contextmanager
def _whole(checkpoint: Path, config: Any) -> Iterator[Path]:
    """The folder, if an export stage made it; else a copy with probe, card and manifest."""
    from pipeline.publishing.manifest import MANIFEST
    from pipeline.stages.export import complete

    if (checkpoint / MANIFEST).is_file():
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="adsc-export-") as scratch:
        complete(checkpoint, Path(scratch), config)
        yield Path(scratch)


@contextlib.contextmanager
def _bar(quiet: bool) -> Iterator[Report]:
    """A bar of bytes on a terminal; elsewhere a line whenever something else begins."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = terminal.console()
    if quiet or not console.is_terminal:
        yield _lines(lambda text: None if quiet else console.print(text, markup=False))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), console=console, transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda done, total, note: bars.update(
            task, completed=done, total=total, description=note
        )


def _lines(say: Callable[[str], None]) -> Report:
    last = ""

    def report(done: float, total: float, note: str) -> None:
        nonlocal last
        if note != last:
            last = note
            say(note)

    return report


def _tell(options: argparse.Namespace, done: Published, said: str) -> None:
    if options.json:
        print(json.dumps(dataclasses.asdict(done)))
        return
    size = f"{done.files} files, {done.bytes / 2**20:.1f} MiB"
    console = terminal.console()
    console.print(f"{done.address}: {size}; {said}", markup=False, soft_wrap=True)
    if done.probe:
        console.print(
            f"a fresh process computes its logits to {done.probe['worst_difference']:.3g} "
            f"(largest {done.probe['largest_logit']:.3g})"
        )
    console.print(f"manifest SHA-256 {done.digest}", soft_wrap=True, highlight=False)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ValueError(f"--tag {text!r} is not KEY=VALUE, such as team=vision")
    return key, value

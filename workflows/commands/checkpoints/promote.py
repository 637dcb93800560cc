"""`adsc promote`: an alias for a registered model, if gates hold (pipeline/tracking/
mlflow_registry.py)."""

from __future__ import annotations

import argparse
import dataclasses
import json

from workflows.commands import terminal
from workflows.commands.options import add_json

EXAMPLES = """examples:
  adsc promote tiny-llava-compressed --mlflow http://mlflow:5000
  adsc promote tiny-llava-compressed --version 3 --min-retention 0.9 --max-cost 0.7
  adsc promote tiny-llava-compressed --to staging --json

Gates: the lower end of the 95 % interval of the accuracy, as a share of the dense control's, and
the FLOPs of a prefill, as a share of the control's. Exit code 1 if one doesn't hold.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="of the model in MLflow: `export.name` of the workflow")
    parser.add_argument("--mlflow", metavar="URI", help="default: $MLFLOW_TRACKING_URI")
    parser.add_argument("--version", default="candidate", help="a number or an alias")
    parser.add_argument("--to", default="champion", metavar="ALIAS", help="default: champion")
    parser.add_argument(
        "--min-retention",
        type=terminal.number(float),
        default=0.95,
        metavar="SHARE",
        help="default: 0.95",
    )
    parser.add_argument(
        "--max-cost",
        type=terminal.number(float),
        default=1.0,
        metavar="SHARE",
        help="default: 1",
    )
    parser.add_argument(
        "--plan", metavar="NAME", help="judge by this named plan (default: by the one it runs with)"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Judge the version by its gates; 1 where one doesn't hold."""
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

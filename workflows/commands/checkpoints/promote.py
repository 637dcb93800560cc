"""`adsc promote`: give a registered model an alias if it passes the gates of
pipeline/tracking/mlflow_registry.py."""

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
the FLOPs of a prefill, as a share of the control's. The exit code is 1 if a gate fails.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="the model's name in MLflow: `export.name` of the workflow")
    parser.add_argument("--mlflow", metavar="URI", help="default: $MLFLOW_TRACKING_URI")
    parser.add_argument("--version", default="candidate", help="a number or an alias (candidate)")
    parser.add_argument("--to", default="champion", metavar="ALIAS", help="new alias (champion)")
    parser.add_argument(
        "--min-retention",
        type=terminal.number(float),
        default=0.95,
        metavar="SHARE",
        help="smallest share of the control's accuracy (0.95)",
    )
    parser.add_argument(
        "--max-cost",
        type=terminal.number(float),
        default=1.0,
        metavar="SHARE",
        help="largest share of the control's FLOPs (1)",
    )
    parser.add_argument(
        "--plan", metavar="NAME", help="named plan to judge (default: the one it runs with)"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Promote the version if it passes its gates; returns 1 if it doesn't."""
    from pipeline.tracking.address import chosen
    from pipeline.tracking.mlflow_registry import Gate, promote

    uri = chosen(options.mlflow)
    if uri is None or uri == "off":
        raise ValueError("no MLflow server: give --mlflow URI, or set MLFLOW_TRACKING_URI")
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
    verdict = promote(uri, options.name, gates, options.to, options.version)
    if options.json:
        print(json.dumps(dataclasses.asdict(verdict)))
        return bool(verdict.refused)
    table = terminal.table("gate", "measured", "passed")
    for gate, value in verdict.values.items():
        measured = "not measured" if value is None else f"{value:.4g}"
        table.add_row(gate, measured, "no" if gate in verdict.refused else "yes")
    console = terminal.console()
    console.print(table)
    outcome = (
        f"refused: {verdict.alias} stays with version {verdict.before or 'none'}"
        if verdict.refused
        else f"{verdict.alias} is now version {verdict.version} "
        f"(before: {verdict.before or 'none'})"
    )
    console.print(f"{verdict.name} version {verdict.version}: {outcome}", markup=False)
    return bool(verdict.refused)

"""The command `python -m workflows.evidence`: the evidence on one machine, without Ray.

Only parsing stands here; workflows/evidence/local.py runs the arms.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from pipeline.config import edit
from workflows.evidence import local
from workflows.evidence.config import (
    Arm,
    EvidenceConfig,
    arms,
    control_of,
    controls,
)
from workflows.evidence.ladder import ladder_config, variant_config
from workflows.evidence.stamps import stamps_config, stamps_top_config
from workflows.evidence.workflow import evidence_576_config, evidence_config


def scales() -> dict[str, Callable[[], EvidenceConfig]]:
    """What `--scale` takes."""
    return {
        "demo": evidence_config,
        "576": evidence_576_config,
        "stamps": stamps_config,
        "stamps_top": stamps_top_config,
        "ladder": ladder_config,
        "free": lambda: variant_config("free"),
        "textures": lambda: variant_config("textures"),
        "lists": lambda: variant_config("lists"),
    }


def choose(
    config: EvidenceConfig, patterns: Sequence[str] | None, budgets: Sequence[str] | None
) -> list[str] | None:
    """Names of the arms that these patterns name (`tiles*`, `drop-667`, dense), at these budgets,
    together with the controls that they are compared with; None where nothing is left out.

    Raises:
        ValueError: a pattern, or a budget, that names nothing.
    """
    if patterns is None and budgets is None:
        return None
    known = {budget.name: arms(config, budget) for budget in config.budgets}
    if unknown := sorted(set(budgets or ()) - known.keys()):
        raise ValueError(f"there are no budgets {', '.join(unknown)}; there are {', '.join(known)}")
    everything = {arm.name: arm for own in known.values() for arm in own}
    everything |= {arm.name: arm for arm in controls(config)}
    ours: dict[str, Arm] = {}
    for name in patterns or ("*",):
        found = {n: arm for n, arm in everything.items() if fnmatch(n, name) or _kind(n) == name}
        if not found:
            raise ValueError(f"there are no arms {name}; there are {', '.join(everything)}")
        ours |= found
    if budgets is not None:
        ours = {
            n: arm for n, arm in ours.items() if n == _kind(n) or n.rpartition("-")[2] in budgets
        }
    if config.recipes:
        wanted = ["dense", *(control_of(config, arm) for arm in ours.values() if arm.trained_with)]
        ours |= {name: everything[name] for name in wanted}
    return list(ours)


def _kind(name: str) -> str:
    """An arm's name without its budget."""
    head, _, tail = name.rpartition("-")
    return head if head and tail.isdigit() else name


def main(words: list[str] | None = None) -> int:
    """The command: 0 when every arm has been run."""
    parser = argparse.ArgumentParser(
        prog="workflows.evidence", description="the evidence on one machine, without Ray"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of all that is made")
    parser.add_argument("--scale", choices=tuple(scales()), default="demo")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the config"
    )
    parser.add_argument("--processes", type=int, default=1, help="arms at a time, on one device")
    parser.add_argument(
        "--arms",
        nargs="+",
        help="only these, by name (tiles-667), kind (tiles) or pattern (tiles*)",
    )
    parser.add_argument("--budgets", nargs="+", help="only arms of these: 667 778 889")
    parser.add_argument("--seeds", nargs="+", type=int, help="trainings of each arm: 0 1 2")
    parser.add_argument("--questions", help="the split to evaluate: validation, test, test_turns")
    parser.add_argument(
        "--list", action="store_true", help="name the arms in their order, run none"
    )
    parser.add_argument("--base-only", action="store_true", help="make base and data, no arm")
    parser.add_argument(
        "--stop-after", type=float, default=float("inf"), help="begin no arm after these seconds"
    )
    given = parser.parse_args(words)
    try:
        config = edit(scales()[given.scale](), dict(one.split("=", 1) for one in given.set))
        changes = {"questions": given.questions, "seeds": given.seeds}
        config = edit(config, {name: value for name, value in changes.items() if value is not None})
        only = choose(config, given.arms, given.budgets)
        if given.list:
            lines = (f"{task.file.stem}\n" for task in local.tasks(config, given.out, only))
            sys.stdout.writelines(lines)
            return 0
        return local.run(
            config,
            given.out,
            processes=given.processes,
            only=only,
            base_only=given.base_only,
            stop_after=given.stop_after,
        )
    except ValueError as error:
        sys.stderr.write(f"evidence: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())

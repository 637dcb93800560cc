"""`adsc plan`: placements that meet a budget, from adsc/cli.py."""

from adsc.cli import PLAN_EXAMPLES as EXAMPLES
from adsc.cli import add_plan_arguments as add_arguments
from adsc.cli import run_plan as run

__all__ = ["EXAMPLES", "add_arguments", "run"]

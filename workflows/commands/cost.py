"""`adsc cost`: the cost of a plan, from adsc/cli.py."""

from adsc.cli import COST_EXAMPLES as EXAMPLES
from adsc.cli import add_cost_arguments as add_arguments
from adsc.cli import run_cost as run

__all__ = ["EXAMPLES", "add_arguments", "run"]

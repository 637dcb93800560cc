"""What the `adsc` command calls: it is here before the heavy imports are, for a Ctrl-C while they
take seconds. All else is workflows/commands/main.py's."""

import sys

from workflows.commands import terminal


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        with terminal.streams():
            from workflows.commands import main as cli

            return cli.main()
    except KeyboardInterrupt:
        return terminal.interrupted()


if __name__ == "__main__":
    sys.exit(main())

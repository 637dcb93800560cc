"""Entry point of the `adsc` command. It catches Ctrl-C before anything else is imported."""


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        from workflows.commands import main as cli

        return cli.main()
    except KeyboardInterrupt:
        from workflows.commands import terminal

        return terminal.interrupted()


if __name__ == "__main__":
    import sys

    sys.exit(main())

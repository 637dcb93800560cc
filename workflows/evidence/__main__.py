"""`python -m workflows.evidence`; see workflows/evidence/command.py."""

import sys

from workflows.evidence.command import main

if __name__ == "__main__":
    sys.exit(main())

"""The commit of the code that runs."""

import os
import subprocess
from pathlib import Path

BUILT = Path(__file__).with_name("COMMIT")  # setup.py writes it into wheels


def git_commit() -> str | None:
    """The commit of this code, with `-dirty` if files differ from it; None if nothing tells.

    A checkout has it from git, a wheel from the file that was written when it was built. For code
    uploaded to a cluster, with neither, ADSC_COMMIT names the commit.
    """
    if commit := os.environ.get("ADSC_COMMIT"):
        return commit
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # Don't take the commit of another repository that the environment happens to be in.
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", Path(__file__).name],
            capture_output=True,
            check=True,
        )
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return BUILT.read_text().strip() if BUILT.is_file() else None
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")

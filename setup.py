"""Writes the commit into a wheel, since an installed package has no git around it. All else is in
pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithCommit(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode and (
            commit := runpy.run_path("pipeline/commit.py")["git_commit"]()
        ):
            Path(self.build_lib, "pipeline", "COMMIT").write_text(f"{commit}\n")


setup(cmdclass={"build_py": BuildWithCommit})

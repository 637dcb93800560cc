"""How Sphinx builds the documentation site; `make docs` runs it with warnings as errors."""

import tomllib
from pathlib import Path

_PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]

project = "ADSC"
author = "the ADSC authors"
copyright = author
release = _PROJECT["version"]
extensions = ["myst_parser", "sphinx_copybutton"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"ADSC {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False

myst_enable_extensions = ["colon_fence", "attrs_inline"]
myst_heading_anchors = 4
# Copy what is typed, without prompts and what the command prints.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

ELSEWHERE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "infra/README.md": "infra.md",
    "README.md": "index.md",
}
"""Files outside docs/ that pages link to, and the pages of the site that stand in for them."""


def setup(app):
    """Make links to files that are no page of the site lead to one that is."""
    app.connect("source-read", _lead_to_the_site)


def _lead_to_the_site(app, name, source):
    up = "../" * name.count("/")
    for file, page in ELSEWHERE.items():
        source[0] = source[0].replace(f"](../{up}{file}", f"]({up}{page}")

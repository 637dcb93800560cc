"""The pages say what is so: links lead somewhere, blocks run, commands and paths exist.

A `console` or `python` block runs here unless the line above it says `<!-- not run: why -->`; the
commands of such a block are still parsed. Blocks with `$ ` prompts are compared with what is
printed, where the page shows it. `<!-- after: PAGE -->` runs the Python blocks of a page first.
`<!-- slow: why -->` leaves a block to a test marked slow: a shell runs the blocks of a page in
their order, in one folder; all pages share a store.
"""

from __future__ import annotations

import argparse
import contextlib
import doctest
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import adsc
from pipeline.config import keys
from tests.documents import ROOT, Block, anchors, blocks, links, pages, prose
from workflows.commands.main import _parse, build_parser, main
from workflows.registry import load_workflow

TRAINING = ("docs/evidence.md", "docs/evidence-ladder.md", "docs/evidence-details.md")
"""Pages whose blocks all train, for hours."""
BLOCKS = [block for page in pages() for block in blocks(page)]
CONSOLE = [block for block in BLOCKS if block.language == "console"]
RUNNABLE = [block for block in CONSOLE if block.fast and block.page not in TRAINING]
PYTHON = [b for b in BLOCKS if b.language == "python" and not b.text.startswith(">>>")]
SLOW = [block for block in BLOCKS if block.slow]
PATH = re.compile(r"`((?:adsc|pipeline|workflows|benchmarks|tests|docs|infra)/[\w./-]+)`")


def test_there_is_something_to_test():
    assert len(CONSOLE) > 40
    assert len(RUNNABLE) >= 10


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page):
    lost = []
    for target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        if not found.exists():
            lost.append(f"{target}: there is no such file")
        elif anchor and anchor not in anchors(found.resolve().relative_to(ROOT).as_posix()):
            lost.append(f"{target}: the page has no such heading")
    assert not lost


def test_paths_in_the_text_exist():
    lost = [
        f"{page}: {path}"
        for page in pages()
        if page not in ("CHANGELOG.md", "docs/log.md")  # what they say was so on its day
        for path in PATH.findall((ROOT / page).read_text())
        if not re.search(r"[A-Z]{4}|<", path) and not (ROOT / path).exists()
    ]
    assert not lost


def test_code_names_pages_that_exist():
    lost = []
    for folder in ("adsc", "pipeline", "workflows", "benchmarks", "tests", "infra"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".html", ".yaml", ".md"):
                named = re.findall(r"\bdocs/[\w/-]+\.md", file.read_text())
                lost += [f"{file}: {page}" for page in named if not (ROOT / page).exists()]
    assert not lost


def test_make_help_lists_every_target():
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = re.findall(r"^make ([a-z-]+)  +\S", shown.stdout, re.M)
    assert sorted(listed) == sorted(targets)


# Console blocks


@pytest.mark.parametrize("block", CONSOLE, ids=str)
def test_commands_are_ones_that_there_are(block):
    for command, _ in commands(block):
        check(shlex.split(re.sub(r"[\[\]]|\.\.\.", "", command), comments=True))


@pytest.mark.parametrize("block", RUNNABLE, ids=str)
def test_console_blocks_run(block, tmp_path, monkeypatch, capsys):
    _link_shipped_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for command, expected in commands(block):
        words = shlex.split(command, comments=True)
        assert is_quick(words), f"{block}: mark the block as not run, and say why"
        with contextlib.suppress(SystemExit):  # of --help
            assert main(words[1:]) == 0, command
        printed = capsys.readouterr().out
        assert printed.strip(), command
        if expected:
            assert_same(printed, "\n".join(expected))


def assert_same(printed: str, shown: str) -> None:
    """Fail unless the page shows what is printed; `...` stands for anything."""
    lines = [line.rstrip() for line in printed.strip().splitlines()]
    wanted = shown.strip() + "\n"
    found = "\n".join(lines) + "\n"
    assert doctest.OutputChecker().check_output(wanted, found, doctest.ELLIPSIS), found


def _complete(lines: list[str]) -> Iterator[str]:
    """Commands, of which a quoted word may go over several lines."""
    begun = ""
    for line in lines:
        begun += line
        try:
            words = shlex.split(begun, comments=True)
        except ValueError:  # the quotation isn't closed yet
            begun += "\n"
            continue
        if words:
            yield begun
        begun = ""
    assert not begun, f"a quotation is never closed: {begun}"


def is_quick(words: list[str]) -> bool:
    """Whether a command needs neither Ray nor anything that doesn't ship."""
    if words[0] != "adsc":
        return False
    return words[1] in ("cost", "plan", "ls", "show") or bool({"--dry-run", "--help"} & {*words})


def commands(block: Block) -> list[tuple[str, list[str]]]:
    """The commands of a console block, each with the lines that the page shows below it."""
    text = block.text.replace("\\\n", " ")
    if not text.startswith("$ "):
        return [(command, []) for command in _complete(text.splitlines())]
    shown = [part.rstrip().splitlines() for part in re.split(r"^\$ ", text, flags=re.M)[1:]]
    return [(lines[0], [line.rstrip() for line in lines[1:]]) for lines in shown]


def subcommands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command of `adsc`."""
    actions = build_parser()._actions
    return next(a.choices for a in actions if isinstance(a, argparse._SubParsersAction))


def check(words: list[str]) -> None:
    """Fail where a command has a word that the program doesn't know. Others' programs are not
    looked at."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program = Path(words[0]).name if words else ""
    if program == "adsc":
        with contextlib.suppress(SystemExit) if "--help" in words else contextlib.nullcontext():
            parsed = _parse(words[1:])
            if getattr(parsed, "changes", None) and parsed.workflow.islower():
                load_workflow(parsed.workflow, [c for c in parsed.changes if not c.endswith("=")])
    elif program == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words
    elif program in ("python", "torchrun") and "-m" in words:
        module = words[words.index("-m") + 1]
        ours = module.split(".")[0] in ("adsc", "pipeline", "workflows", "benchmarks", "tests")
        assert not ours or importlib.util.find_spec(module), words
    elif program == "pytest":
        files = [word for word in words[1:] if word.startswith("tests/")]
        assert all((ROOT / file).exists() for file in files), words


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One for all pages, as a reader has one: what a page has finished is `cached` on the next."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in SLOW}))
def test_blocks_that_take_minutes_run(page, store, tmp_path):
    """As they are pasted, by a shell in which `adsc` is this one."""
    _link_shipped_folders(tmp_path)
    (tmp_path / "runs").symlink_to(store)
    programs = Path(sys.executable).parent
    assert (programs / "adsc").exists(), "run `make install`"
    environment = {k: v for k, v in os.environ.items() if k != "RAY_API_SERVER_ADDRESS"}
    environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for block in (block for block in SLOW if block.page == page):
        assert not block.text.startswith("$ "), f"{block}: leave out the prompts"
        program = ["bash", "-euo", "pipefail"] if block.language == "console" else [sys.executable]
        done = subprocess.run(
            [*program, "-c", block.text],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        _check_printed(block, done.stdout)


def _link_shipped_folders(folder: Path) -> None:
    """Let commands find the files of the repository that pages name."""
    for name in ("workflows", "docs"):
        (folder / name).symlink_to(ROOT / name)


def _check_printed(block: Block, printed: str) -> None:
    """Compare what Python printed with the comments of the lines that print."""
    if block.language == "python":
        expected = re.findall(r"^print\(.*\)  # (.+)$", block.text, re.M)
        assert_same(printed, "\n".join(expected))


# Python blocks


@pytest.mark.parametrize("block", [b for b in PYTHON if b.fast], ids=str)
def test_python_blocks_run(block, tmp_path, monkeypatch):
    """What a line prints is compared with its comment."""
    _link_shipped_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    printed: list[str] = []
    for before in [b for b in PYTHON if block.after and b.page == block.after and b.fast]:
        exec(compile(before.text, str(before), "exec"), names)
    names["print"] = lambda value: printed.append(str(value))
    exec(compile(block.text, str(block), "exec"), names)
    _check_printed(block, "\n".join(printed))


# The reference


@pytest.fixture(scope="module")
def generator():
    """The script that writes these pages."""
    place = ROOT / "docs" / "generate_reference.py"
    spec = importlib.util.spec_from_file_location("generate_reference", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference(generator, tmp_path_factory):
    """The generated pages by name."""
    folder = tmp_path_factory.mktemp("reference")
    generator.write(folder)
    return {page.stem: page.read_text() for page in folder.iterdir()}


def test_the_reference_has_every_public_name(reference):
    for name in set(adsc.__all__) - {"peers"}:
        assert re.search(rf"\}} adsc\.{name}\b", reference["library"]), name


def test_the_reference_has_every_command_and_option(reference):
    for name, parser in subcommands().items():
        section = reference["commands"].split(f"\n## `adsc {name}`")[1].split("\n## ")[0]
        options = [o for a in parser._actions if a.dest != "help" for o in a.option_strings]
        assert [option for option in options if option not in section] == []


@pytest.mark.parametrize("name", ["demo", "llava15_7b", "tiny_base"])
def test_the_reference_has_every_config_key(reference, name):
    config = load_workflow(name).config
    known = set(re.findall(r"^\| `([^`]+)` \|", reference["config"], re.M))
    missing = []
    for key in keys(config):
        general = re.sub(r"^compare\.\w+", "compare.NAME", key)
        if general not in known and general != "compare.NAME":
            missing.append(key)
    assert not missing


def test_the_tree_has_every_folder_and_file(generator, reference):
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    for folder, files in generator.folders().items():
        line = generator.sentence(ROOT / folder / "__init__.py")
        assert f"| `{folder}/` | {line} |" in guide, f"CONTRIBUTING.md lacks this line: {folder}"
        section = reference["tree"].split(f"\n## `{folder}/`")[1].split("\n## ")[0]
        assert re.findall(r"^\| `(.+\.py)` \| \S", section, re.M) == [it.name for it in files]


def test_odd_idioms_stay_out_of_the_pages():
    odd = re.compile(r"goes on from (here|there|where)|nobody is told|unless told otherwise", re.I)
    found = [f"{p}: {m[0]}" for p in pages() if p != "docs/log.md" for m in odd.finditer(prose(p))]
    assert not found

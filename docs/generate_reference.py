"""Writes the site's reference pages from the code: library, commands, config keys, schemas, files.

    python docs/generate_reference.py [FOLDER]     # docs/reference by default

It imports the packages but builds no model and reads no store. The pages are Markdown for Sphinx
with MyST. They are generated before each build and never committed.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import adsc
from pipeline.config import Config, allowed
from pipeline.durable.record import Record
from pipeline.recipe import CompressConfig
from pipeline.reporting.results import Arm, Results
from workflows.commands.main import build_parser
from workflows.registry import WORKFLOWS, load_workflow

ROOT = Path(__file__).parents[1]
DEFAULT_FOLDER = ROOT / "docs" / "reference"
PACKAGES = ("adsc", "pipeline", "workflows", "benchmarks")
SECTIONS = {
    "Args": "Arguments",
    "Attributes": "Attributes",
    "Returns": "Returns",
    "Raises": "Raises",
}
LISTS = ("Args", "Attributes", "Raises")
MARKS = {"operational": "reruns nothing", "added": "reruns nothing at its default"}


def main() -> None:
    """Write the pages into the folder given on the command line."""
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_FOLDER)


def write(folder: Path) -> None:
    """Write every page into `folder`, which is made if it isn't there."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {
        "library": library,
        "commands": commands,
        "config": config,
        "schemas": schemas,
        "tree": tree,
    }
    for name, page in pages.items():
        (folder / f"{name}.md").write_text("\n".join(page()) + "\n", encoding="utf-8")


# The library


def library() -> Iterator[str]:
    """Every public name of `adsc` with its signature and docstring."""
    yield "# Library: `adsc`\n"
    yield markdown(adsc.__doc__ or "")
    for name in adsc.__all__:
        found = getattr(adsc, name)
        if inspect.ismodule(found):
            continue
        yield from _described(f"adsc.{name}", found)
    yield "\n## `adsc.peers`\n"
    yield markdown(adsc.peers.__doc__ or "")
    yield f"`adsc.peers.NAMES`: {', '.join(f'`{name}`' for name in adsc.peers.NAMES)}.\n"
    yield from _described("adsc.peers.make", adsc.peers.make)


def _described(name: str, found: Any) -> Iterator[str]:
    kind = "function"
    if inspect.isclass(found):
        kind = "exception" if issubclass(found, BaseException) else "class"
    yield f"\n::::{{py:{kind}}} {name}{'' if kind == 'exception' else _signature(found)}"
    yield markdown(inspect.getdoc(found) or "")
    if kind == "class":
        for member, value in vars(found).items():
            if not member.startswith("_"):
                yield from _member(member, value)
    yield "::::\n"


def _member(name: str, value: Any) -> Iterator[str]:
    function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    if isinstance(value, property):
        yield f"\n:::{{py:property}} {name}\n{markdown(inspect.getdoc(value) or '')}\n:::"
    elif inspect.isfunction(function):
        option = "\n:classmethod:" if isinstance(value, classmethod) else ""
        yield f"\n:::{{py:method}} {name}{_signature(function)}{option}\n"
        yield f"{markdown(inspect.getdoc(function) or '')}\n:::"


def _signature(found: Any) -> str:
    """Arguments and defaults, without annotations: the docstring says what they are."""
    parameters = inspect.signature(found).parameters.values()
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in parameters]
    return str(inspect.Signature([each for each in bare if each.name not in ("self", "cls")]))


def markdown(docstring: str) -> str:
    """A docstring in Google's style as Markdown: sections as lists, examples as fenced blocks."""
    lines, section, example = [], "", False
    for line in inspect.cleandoc(docstring).splitlines():
        if example and not line.strip():
            lines.append("```")
            example = False
        head = re.fullmatch(rf"({'|'.join(SECTIONS)}):", line)
        if head:
            section = head[1]
            lines += [f"**{SECTIONS[section]}**", ""]
        elif section in LISTS and (item := re.match(r" {4}(\*{0,2}\w+): (.*)", line)):
            lines.append(f"- `{item[1]}`: {item[2]}")
        elif section and line.startswith("    "):
            lines.append("  " + line.strip() if section in LISTS else line.strip())
        else:
            if line.startswith(">>>") and not example:
                lines.append("```python")
                example = True
            section = "" if line.strip() else section
            lines.append(line)
    return "\n".join([*lines, *(["```"] if example else [])])


# The command line


def commands() -> Iterator[str]:
    """Every command with its arguments, defaults and examples."""
    parser = build_parser()
    found = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    helps = {choice.dest: choice.help for choice in found._choices_actions}
    yield "# Command line: `adsc`\n"
    yield f"{parser.description} `adsc COMMAND --help` prints the same.\n"
    yield "| command | what it does |\n|---|---|"
    for name in found.choices:
        yield f"| [`{name}`](#adsc-{name}) | {cell(helps[name] or '')} |"
    for name, command in found.choices.items():
        yield f"\n(adsc-{name})=\n## `adsc {name}`\n\n{command.description}\n"
        yield "| argument | meaning | default |\n|---|---|---|"
        for action in command._actions:
            if action.dest != "help":
                yield _argument(action)
        examples = (command.epilog or "").removeprefix("examples:\n").rstrip()
        if examples:
            yield f"\n```text\n{inspect.cleandoc(examples)}\n```"


def _argument(action: argparse.Action) -> str:
    value = action.metavar or action.dest.upper()
    if action.choices:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    value = value if isinstance(value, str) else " ".join(value)
    names = ", ".join(action.option_strings) or action.dest
    takes = f" {value}" if action.option_strings and action.nargs != 0 else ""
    hidden = action.default in (None, False, [], argparse.SUPPRESS) or "(default" in (
        action.help or ""
    )
    default = "" if hidden else f"`{action.default}`"
    return f"| `{cell(names + takes)}` | {cell(action.help or '')} | {default} |"


# Config keys


def config() -> Iterator[str]:
    """Every key that `--set` takes, with type, default and docstring."""
    yield "# Config keys\n"
    yield (
        "`--set KEY=VALUE` changes a key; units are in the description. Defaults are those of the "
        "class: a workflow sets some of its own, which `adsc show WORKFLOW --config` prints. "
        f"*{MARKS['operational'].capitalize()}* marks a key that decides how a stage runs and not "
        "what it computes; changing any other key reruns the stages that depend on it.\n"
    )
    yield "## Every compression\n"
    yield from _tables(CompressConfig)
    seen: dict[type[Config], list[str]] = {}
    for name in WORKFLOWS:
        seen.setdefault(type(load_workflow(name).config), []).append(name)
    for section, names in seen.items():
        title = "Only in " + ", ".join(f"`{name}`" for name in names)
        common = CompressConfig.model_fields if issubclass(section, CompressConfig) else {}
        yield f"\n## {title}\n"
        yield from _tables(section, without=set(common))


def _tables(section: type[Config], prefix: str = "", without: set[str] = frozenset()) -> Iterator:
    """A table of a section's own keys, then those of the sections inside it."""
    below: list[tuple[str, type[Config]]] = []
    rows = []
    for name, field in section.model_fields.items():
        if name in without:
            continue
        _documented(section, name)
        rows.append(_key(prefix + name, field))
        below += [(f"{prefix}{name}{part}.", inner) for part, inner in _sections(field.annotation)]
    if prefix:
        yield f"\n### `{prefix.rstrip('.')}`\n\n{markdown(section.__doc__ or '')}\n"
    if rows:
        yield "| key | takes | default | meaning |\n|---|---|---|---|"
        yield from rows
    for path, inner in below:
        if inner is not section:
            yield from _tables(inner, path)


def _key(key: str, field: FieldInfo) -> str:
    extra = field.json_schema_extra
    marks = [MARKS[mark] for mark in MARKS if isinstance(extra, dict) and extra.get(mark)]
    note = "".join(f" *{mark.capitalize()}.*" for mark in marks)
    takes = cell(allowed(field))
    return f"| `{key}` | {takes} | {_default(field)} | {cell(field.description or '')}{note} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Config):
        return "below"
    text = json.dumps(value, default=str, ensure_ascii=False)
    return f"`{cell(text)}`" if len(text) <= 60 else "see the code"


def _sections(annotation: Any) -> Iterator[tuple[str, type[Config]]]:
    """The sections that an annotation may hold, with the part of the key that leads there."""
    if inspect.isclass(annotation) and issubclass(annotation, Config):
        yield "", annotation
    origin = getattr(annotation, "__origin__", None)
    part = {dict: ".NAME", tuple: ".N", list: ".N"}.get(origin, "")  # type: ignore[arg-type]
    for inner in get_args(annotation):
        for below, found in _sections(inner):
            yield part + below, found


# Files that a run writes


def schemas() -> Iterator[str]:
    """The fields of `record.json` and `results.json`."""
    yield "# Records and results\n"
    yield "What `adsc show WORKFLOW STAGE` prints, and what `evaluate` writes as `results.json`.\n"
    for title, model in (("record.json", Record), ("results.json", Results), ("An arm", Arm)):
        yield f"\n## {title}\n\n{markdown(model.__doc__ or '')}\n"
        yield "| field | type | meaning |\n|---|---|---|"
        for name, field in model.model_fields.items():
            if not field.exclude:
                text = _documented(model, name)
                yield f"| `{name}` | {cell(allowed(field))} | {cell(text)} |"


def _documented(model: type[BaseModel], name: str) -> str:
    text = model.model_fields[name].description
    if not text:
        raise ValueError(f"{model.__name__}.{name} has no docstring: say unit, range and effect")
    return text


# Files


def tree() -> Iterator[str]:
    """Every file of the code with the first sentence of its docstring, by folder."""
    yield "# Every file\n"
    yield "The first sentence of each file. CONTRIBUTING.md has the folders and their order.\n"
    for folder, files in folders().items():
        yield f"\n## `{folder}/`\n\n{sentence(ROOT / folder / '__init__.py')}\n"
        if files:
            yield "| file | contents |\n|---|---|"
        yield from (f"| `{path.name}` | {cell(sentence(path))} |" for path in files)


def folders() -> dict[str, list[Path]]:
    """The code's folders and the files of each, without their `__init__.py`."""
    inits = (path for package in PACKAGES for path in (ROOT / package).rglob("__init__.py"))
    return {
        init.parent.relative_to(ROOT).as_posix(): sorted(set(init.parent.glob("*.py")) - {init})
        for init in sorted(inits, key=lambda path: path.parent)
    }


def sentence(file: Path) -> str:
    """The first sentence of a file's docstring."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    if not text:
        raise ValueError(f"{file.relative_to(ROOT)} has no docstring: say in a sentence what it is")
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph)[0]


def cell(text: str) -> str:
    """Text that may stand in a table's cell."""
    return " ".join(text.split()).replace("|", r"\|")


if __name__ == "__main__":
    main()

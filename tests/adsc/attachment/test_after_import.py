"""`import adsc` alone is light, and transformers and PEFT are wrapped whichever comes first."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import adsc
from adsc.attachment.after_import import after_import

HEAVY = ("torch", "transformers", "peft", "numpy", "PIL", "pydantic")


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plans_and_costs_load_no_torch() -> None:
    code = f"""
import sys
import adsc
assert "adsc.attachment.attach" not in sys.modules
plan = adsc.PruningPlan.parse("8:1/2")
assert adsc.solve_plans(32, 576, 198, 1, "1/4")
for name in ("llava-1.5-7b", "llava-next-7b", "qwen3-vl-8b"):
    assert adsc.estimate_cost(name, plan).flops < adsc.estimate_cost(name).flops
print([name for name in {HEAVY} if name in sys.modules])
"""
    assert run(code).strip() == "[]"


WRAPPED = """
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.continuous_api import ContinuousMixin
from transformers.integrations.peft import PeftAdapterMixin
import peft
methods = [
    PreTrainedModel.post_init,
    PreTrainedModel.save_pretrained,
    PreTrainedModel.from_pretrained.__func__,
    PeftAdapterMixin.load_adapter,
    ContinuousMixin.init_continuous_batching,
    peft.PeftModel.load_adapter,
    peft.config.PeftConfigMixin.from_peft_type.__func__,
]
print(sum(hasattr(method, "adsc_wraps") for method in methods), len(methods))
"""


@pytest.mark.parametrize(
    "first", ["import adsc", "import peft, transformers.modeling_utils; import adsc"]
)
def test_methods_are_wrapped_in_both_orders(first: str) -> None:
    assert run(f"{first}\n{WRAPPED}").strip() == "7 7"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that can be imported, and was not yet."""
    (tmp_path / "fresh_package.py").write_text(
        "import os\nVALUE = 1\nif os.environ.get('BROKEN'): 1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fresh_package", raising=False)
    return "fresh_package"


def test_acts_once_at_the_end_of_the_import(package: str) -> None:
    seen: list[tuple[ModuleType, int]] = []
    after_import(package, lambda module: seen.append((module, module.VALUE)))
    spec = find_spec(package)
    assert spec is not None and not seen
    module = importlib.import_module(package)
    importlib.reload(module)
    assert seen == [(module, 1)]
    assert type(module.__loader__).__module__ != after_import.__module__
    after_import(package, lambda module: seen.append((module, 2)))
    assert seen[1:] == [(module, 2)]


def test_an_import_that_failed_is_acted_on_when_it_succeeds(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ModuleType] = []
    after_import(package, seen.append)
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(package)
    monkeypatch.delenv("BROKEN")
    assert not seen
    assert seen == [importlib.import_module(package)]


def test_a_package_that_is_absent_stays_absent() -> None:
    after_import("no_such_package", lambda module: None)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        importlib.import_module("no_such_package")


def test_every_public_name_is_listed_typed_and_there() -> None:
    """`__all__`, what type checkers see and what is imported on first use are the same."""
    assert adsc.__file__ is not None
    tree = ast.parse(Path(adsc.__file__).read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    homes = {
        alias.name: "adsc.peers" if alias.name == "peers" else node.module
        for node in typed.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert homes == {**adsc._HOMES, "peers": "adsc.peers"}
    assert sorted(homes) == sorted(adsc.__all__)
    assert set(adsc.__all__) <= set(dir(adsc))
    assert all(getattr(adsc, name) is not None for name in adsc.__all__)
    with pytest.raises(AttributeError, match="'adsc' has no attribute 'attatch'"):
        adsc.attatch  # noqa: B018  # type: ignore[attr-defined]

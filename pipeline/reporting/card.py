"""The model card of an exported checkpoint: README.md, in the form that model hubs read.

It repeats what other stages found and adds no judgement of its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adsc import PlanError, PruningPlan
from pipeline.redact import redact

COLUMNS = {
    "accuracy": ("accuracy", lambda value: f"{100 * value:.1f} %"),
    "retention": ("of the control's", lambda value: f"{100 * value:.1f} %"),
    "average_vision_tokens": ("vision tokens, layer average", lambda value: f"{value:.1f}"),
    "flops": ("FLOPs", lambda value: f"{value:.3g}"),
    "kv_cache_bytes": ("KV cache, bytes", lambda value: f"{value:,.0f}"),
    "prefill_ms": ("prefill, ms", lambda value: f"{value:.3g}"),
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the card says; scores are those of the evaluate stage, by arm."""

    name: str
    base: str
    licence: str
    plan: str
    plans: dict[str, str] = field(default_factory=dict)
    """The named plans of an elastic checkpoint, of which `plan` is the default."""
    arms: dict[str, dict[str, Any]]
    majority: float | None
    workflow: str
    commit: str | None
    data_digest: str | None
    lineage: dict[str, str]


def write_card(folder: Path, card: Card) -> None:
    """README.md from the card, and from config.json for the sizes that the plan needs."""
    (folder / "README.md").write_text(redact(_front(card) + _body(folder, card)))


def _front(card: Card) -> str:
    fields: dict[str, Any] = {
        "license": card.licence or "other",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["adsc", "vision-token-compression"],
    }
    if "/" in card.base and " " not in card.base:
        fields["base_model"] = card.base
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "---", ""])


def _body(folder: Path, card: Card) -> str:
    base = _cell(card.base) or "not named"
    return f"""
# {_cell(card.name)}

**Load it with `adsc` (transformers), or serve it with `adsc serve` (vLLM and adsc's plugin). Other
loaders run it dense: it answers, but with all vision tokens in every layer, slower and with a
larger KV cache, and not as it was trained.**

A vision-language model that drops vision tokens inside its decoder, by a fixed plan and without
scoring them, and was trained to live with that (ADSC, arXiv 2602.12618). Base: {base}.

## Use

```python
import adsc
from transformers import AutoProcessor

model = adsc.from_pretrained("FOLDER")  # attaches the plan that stands in config.json
processor = AutoProcessor.from_pretrained("FOLDER")
```
{_named_use(card)}
`adsc serve FOLDER` answers over the OpenAI API. `transformers` or vLLM alone load the weights too,
if at all, but then run dense, which is not what was trained.
`python -m pipeline.stages.export FOLDER` checks a copy: files against manifest.json, then logits
against probe/probe.safetensors{_named_probe(card)}. `adapter/`, if there, holds the LoRA
weights alone, to load on the base. evaluation.json has the scores and costs below as
numbers, data_manifest.json the data.

## Plan

{_plan(folder, card.plan)}
{_budgets(folder, card)}
## Scores and costs

{_table(card)}

Accuracy is the share of right answers; FLOPs are exact (2 x multiply-adds of every matrix product
of one prefill), KV cache is what one prefill leaves. One training run, one seed; intervals are in
the report. {_majority(card.majority)}

## Where it comes from

| | |
|---|---|
| workflow | {_cell(card.workflow)} |
| commit | {_cell(card.commit or "unknown")} |
| data manifest | {_cell(card.data_digest or "unknown")} |
{_lineage(card.lineage)}

## Licence

{_licence(card)}
"""


def _plan(folder: Path, text: str) -> str:
    if text.startswith("{"):
        return f"Tokens are dropped by another method: `{text}`."
    plan = PruningPlan.parse(text)
    if not plan.stages:
        return "None: every decoder layer sees all vision tokens."
    drops = [
        f"- before layer {layer}, {keep or 'none'} of the vision tokens stay"
        for layer, keep in plan.stages
    ]
    words = f"Anchor `{plan.anchor}`, position ids `{plan.positions}`. As text: `{text}`."
    if plan.pool is not None:
        words = f"A token that stays is the mean of its group ({plan.pool}). {words}"
    return "\n".join([*drops, "", words, *_tokens(folder, plan)])


def _named_use(card: Card) -> str:
    if not card.plans:
        return ""
    first = next(iter(card.plans))
    return f"""
One checkpoint for several budgets: `adsc.from_pretrained("FOLDER", plan="{first}")`, and
`adsc.attach(model, "{first}")` changes it at any time. It has {_listed(card)} and `dense`.
"""


def _named_probe(card: Card) -> str:
    return " and, for each named plan, probe/probe_plans.safetensors" if card.plans else ""


def _listed(card: Card) -> str:
    default = _parsed(card.plan)
    return ", ".join(
        f"`{name}`{' (the default)' if default and _parsed(text) == default else ''}"
        for name, text in card.plans.items()
    )


def _parsed(text: str) -> PruningPlan | None:
    """The plan; None for another method's text."""
    try:
        return PruningPlan.parse(text)
    except PlanError:
        return None


def _budgets(folder: Path, card: Card) -> str:
    """A row a named plan, and dense, with what was measured of it."""
    if not card.plans:
        return ""
    measured = {arm["budget"]: arm for arm in card.arms.values() if arm.get("budget")}
    names = [name for name in COLUMNS if any(name in arm for arm in measured.values())]
    sizes = _sizes(folder)
    head = ["budget", "plan", *(COLUMNS[name][0] for name in names)]
    if not names and sizes:
        head.append(COLUMNS["average_vision_tokens"][0])
    rows = [head, ["---"] * len(head)]
    for budget, text in [*card.plans.items(), ("dense", "")]:
        row = [_cell(budget), f"`{text}`" if text else "none"]
        row += _shown(measured.get(budget, {}), names)
        if not names and sizes:
            plan = _parsed(text)
            row.append(f"{plan.average_tokens(*sizes):.1f}" if plan else "-")
        rows.append(row)
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"\n## Budgets\n\n{table}\n"


def _sizes(folder: Path) -> tuple[int, int] | None:
    """Vision tokens of an image and decoder layers, where config.json fixes them."""
    config = json.loads((folder / "config.json").read_text())
    layers = config.get("text_config", {}).get("num_hidden_layers")
    vision = config.get("vision_config", {})
    if not layers or not vision.get("image_size") or not vision.get("patch_size"):
        return None
    return (vision["image_size"] // vision["patch_size"]) ** 2, layers


def _tokens(folder: Path, plan: PruningPlan) -> list[str]:
    """Tokens by layer, where config.json fixes how many an image has."""
    sizes = _sizes(folder)
    if sizes is None:
        return []
    tokens, layers = sizes
    counts = ", ".join(map(str, plan.tokens_per_layer(tokens, layers)))
    reduction = 100 * plan.reduction(tokens, layers)
    return [
        "",
        f"Vision tokens entering each layer: {counts} ({reduction:.1f} % fewer on average).",
    ]


def _table(card: Card) -> str:
    if not card.arms:
        return "None were handed over by the evaluate stage."
    names = [name for name in COLUMNS if any(name in arm for arm in card.arms.values())]
    head = ["arm", "plan", *(COLUMNS[name][0] for name in names)]
    rows = [head, ["---"] * len(head)]
    for label, arm in card.arms.items():
        rows.append([_cell(label), _cell(arm.get("plan") or "none"), *_shown(arm, names)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _shown(arm: dict[str, Any], names: list[str]) -> list[str]:
    values = [arm.get(name) for name in names]
    return [
        "-" if value is None else COLUMNS[name][1](value)
        for name, value in zip(names, values, strict=True)
    ]


def _majority(share: float | None) -> str:
    if share is None:
        return ""
    return f"Always giving the most frequent answer of the question's kind: {100 * share:.1f} %."


def _lineage(fingerprints: dict[str, str]) -> str:
    return "\n".join(
        f"| stage {_cell(name)} | `{print_}` |" for name, print_ in fingerprints.items()
    )


def _licence(card: Card) -> str:
    if not card.licence:
        return "The licence of the base was not given; it applies to these weights too."
    return f"That of the base: {_cell(card.licence)}."


def _cell(text: str) -> str:
    """Text that can't leave its place in Markdown: one line, no markup."""
    flat = " ".join(text.split())
    return "".join(
        f"\\{character}" if character in "\\`*_[]<>|#" else character for character in flat
    )

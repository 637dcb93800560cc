"""Whether a device's kernels agree, with plans: attention backends, caches, gradients, families.

Each check is one number beside its tolerance: the relative error ||out - wanted|| / ||wanted|| over
all logits that stand for a token. What is wanted of a backend is eager attention's in float32 on
the same weights. What a device or an installation lacks is skipped by name. The tests prove the
same on a CPU, and against references of their own; nothing is timed here.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import is_flash_attn_2_available

import adsc
from benchmarks.measure import Row
from benchmarks.models import batch, build, llava_config, twin, vision_tokens

TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-4}
GRADIENT_TOLERANCE = {torch.bfloat16: 6e-2, torch.float32: 1e-4}
PLANS = {"dense": None, "plan": "1:1/2,3:1/3", "reindex": "1:1/2,3:1/3;positions=reindex"}
EQUAL = [(5, 0, 20)] * 3
MIXED = [(5, 0, 20), (3, 0, 7, 0, 4), (12,)]  # one image, two and none
NEW = 4  # tokens of an answer


@dataclass(frozen=True, kw_only=True)
class Backend:
    """An attention backend of transformers, perhaps with one kernel of torch's forced.

    Args:
        name: as transformers dispatches it.
        kernel: of torch's sdpa; None leaves the choice to torch.
        masks: whether it takes padding.
        steps: whether cached steps are checked, too, with padding; flex_attention compiles a
            kernel for each length.
    """

    name: str
    kernel: SDPBackend | None = None
    masks: bool = True
    steps: bool = True

    def __str__(self) -> str:
        return self.name if self.kernel is None else f"{self.name}, {self.kernel.name.lower()}"

    def lacks(self, device: torch.device) -> str | None:
        """Why it can't run here; None if it can."""
        if self.name == "flash_attention_2" and not is_flash_attn_2_available():
            return "flash-attn is not installed"
        cpu = (None, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)
        if device.type == "cpu" and self.kernel not in cpu:
            return "no such kernel on a CPU"
        return None

    @contextlib.contextmanager
    def forced(self, device: torch.device) -> Iterator[None]:
        """Within it, sdpa has only this kernel; flex_attention is not compiled on a CPU, and
        elsewhere as often as there are lengths."""
        with contextlib.ExitStack() as stack:
            if self.kernel is not None:
                stack.enter_context(sdpa_kernel(self.kernel))
            if self.name == "flex_attention" and device.type == "cpu":
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            elif self.name == "flex_attention":
                torch._dynamo.reset()
                stack.enter_context(torch._dynamo.config.patch(recompile_limit=64))
            yield


BACKENDS = (
    Backend(name="eager"),
    Backend(name="sdpa"),
    Backend(name="sdpa", kernel=SDPBackend.FLASH_ATTENTION, masks=False),
    Backend(name="sdpa", kernel=SDPBackend.EFFICIENT_ATTENTION),
    Backend(name="sdpa", kernel=SDPBackend.CUDNN_ATTENTION, masks=False),
    Backend(name="sdpa", kernel=SDPBackend.MATH),
    Backend(name="flash_attention_2"),
)
FLEX = (Backend(name="flex_attention", steps=False),)


def check(what: str, case: str, tolerance: float, error: Callable[[], float]) -> Row:
    """One check as a row; one that raises is a failed row, so that the others still run."""
    print(f"{what}: {case}", file=sys.stderr, flush=True)  # a crash of a kernel tells nothing else
    row: Row = {"check": what, "case": case, "error": None, "tolerance": tolerance}
    try:
        row["error"] = error()
    except Exception as failure:  # noqa: BLE001 - counted: the row says so, and the part fails
        first = (str(failure).splitlines() or [""])[0]
        if first.startswith("No available kernel"):
            return skipped(what, case, "torch's kernel takes no such inputs")
        return row | {"result": f"FAILED: {type(failure).__name__}: {first[:100]}"}
    return row | {"result": "ok" if row["error"] <= tolerance else "FAILED"}  # NaN fails


def skipped(what: str, case: str, why: str) -> Row:
    return {
        "check": what,
        "case": case,
        "error": None,
        "tolerance": None,
        "result": f"skipped: {why}",
    }


def failed(rows: list[Row]) -> list[Row]:
    """The rows whose check failed."""
    return [row for row in rows if str(row.get("result", "")).startswith("FAILED")]


def relative_error(out: Tensor, reference: Tensor) -> float:
    out, reference = out.detach().double().cpu(), reference.detach().double().cpu()
    return float((out - reference).norm() / reference.norm())


def small_model(device: torch.device, dtype: torch.dtype) -> Any:
    """Six decoder layers with grouped-query attention, and weights that make attention uneven."""
    config = llava_config(
        "tiny",
        layers=6,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.05,
    )
    return build(config, device, dtype)


def with_backend(model: Any, plan: str | None, backend: str) -> Any:
    other = twin(model, plan)
    other.model.language_model.set_attn_implementation(backend)
    return other


def in_float32(model: Any) -> Any:
    """The same numbers in float32, in memory of their own."""
    return copy.deepcopy(model).float()


def as_float32(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: one.float() if one.is_floating_point() else one for name, one in inputs.items()}


@torch.no_grad()
def token_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(N, vocabulary): the logits of every column left that is a token."""
    output = model(**inputs, use_cache=False)
    if (kept := getattr(output, "kept_positions", None)) is not None:
        return output.logits[kept[-1] >= 0]
    mask = inputs.get("attention_mask")
    return output.logits.flatten(0, 1) if mask is None else output.logits[mask.bool()]


def longer(inputs: dict[str, Tensor], answer: Tensor) -> dict[str, Tensor]:
    """The inputs with an answer (rows, NEW) behind each row."""
    more = inputs | {"input_ids": torch.cat([inputs["input_ids"], answer], 1)}
    if "attention_mask" in inputs:
        more["attention_mask"] = torch.cat(
            [inputs["attention_mask"], torch.ones_like(answer)], dim=1
        )
    return more


@torch.no_grad()
def answer_logits(model: Any, inputs: dict[str, Tensor], answer: Tensor) -> Tensor:
    """(rows, NEW, vocabulary): logits of each token of an answer, on a cache."""
    cache = model(**inputs, use_cache=True).past_key_values
    logits = []
    for count in range(answer.shape[1]):
        step = {"input_ids": answer[:, count : count + 1], "past_key_values": cache}
        if "attention_mask" in inputs:
            step["attention_mask"] = longer(inputs, answer[:, : count + 1])["attention_mask"]
        logits.append(model(**step).logits[:, -1])
    return torch.stack(logits, 1)


def backend_checks(
    device: torch.device, dtype: torch.dtype, backends: tuple[Backend, ...] = BACKENDS
) -> list[Row]:
    """Backends against eager float32: whole sequences, and cached steps."""
    model = small_model(device, dtype)
    exact, tolerance, rows = in_float32(model), TOLERANCE[dtype], []
    batches = {
        "equal rows": batch(model.config, EQUAL, device, dtype),
        "left padding": batch(model.config, MIXED, device, dtype, side="left"),
        "right padding": batch(model.config, MIXED, device, dtype, side="right"),
    }
    answer = torch.randint(3, 900, (3, NEW), device=device)
    for backend in backends:
        what = f"{backend}, {str(dtype).removeprefix('torch.')}"
        if (why := backend.lacks(device)) is not None:
            rows.append(skipped(what, "all", why))
            continue
        for plan_name, plan in PLANS.items():
            one, wanted = with_backend(model, plan, backend.name), twin(exact, plan)
            wanted.model.language_model.set_attn_implementation("eager")
            for name, inputs in batches.items():
                if "attention_mask" in inputs and not backend.masks:
                    continue

                def whole(one=one, wanted=wanted, inputs=inputs, backend=backend) -> float:
                    with backend.forced(device):
                        out = token_logits(one, inputs)
                    return relative_error(out, token_logits(wanted, as_float32(inputs)))

                def cached(one=one, wanted=wanted, inputs=inputs, backend=backend) -> float:
                    with backend.forced(device):
                        out = answer_logits(one, inputs, answer)
                    with torch.no_grad():
                        full = wanted(**as_float32(longer(inputs, answer)), use_cache=False)
                    return relative_error(out, full.logits[:, -NEW:])

                rows.append(check(what, f"{plan_name}, {name}", tolerance, whole))
                if name == "equal rows" or (name == "left padding" and backend.steps):
                    rows.append(check(what, f"{plan_name}, {name}, cached", tolerance, cached))
    return rows


def device_checks(device: torch.device) -> list[Row]:
    """The device's float32 against a CPU's."""
    model, rows = small_model(torch.device("cpu"), torch.float32), []
    for name, plan in PLANS.items():
        there = copy.deepcopy(twin(model, plan)).to(device)
        for side in ("left", "right"):
            inputs = batch(model.config, MIXED, torch.device("cpu"), torch.float32, side=side)

            def error(there=there, inputs=inputs, plan=plan) -> float:
                moved = {key: one.to(device) for key, one in inputs.items()}
                return relative_error(
                    token_logits(there, moved), token_logits(twin(model, plan), inputs)
                )

            rows.append(check("device = CPU, float32", f"{name}, {side} padding", 1e-4, error))
    return rows


def _gradients(
    model: Any, inputs: dict[str, Tensor], device: torch.device, autocast: bool
) -> Tensor:
    model.train().requires_grad_(True).zero_grad(set_to_none=True)
    ids = inputs["input_ids"]
    labels = ids.masked_fill(ids == model.config.image_token_id, -100)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        loss = model(**inputs, labels=labels, use_cache=False).loss
    loss.backward()
    decoder = model.model.language_model.parameters()
    return torch.cat([one.grad.detach().float().flatten() for one in decoder])


def gradient_checks(device: torch.device) -> list[Row]:
    """Gradients of the decoder: torch's flash kernel, autocast, and both ways of checkpointing."""
    low = small_model(device, torch.bfloat16)
    exact, plan, rows = in_float32(low), PLANS["plan"], []
    inputs = batch(low.config, EQUAL, device, torch.bfloat16)
    whole = as_float32(inputs)
    reference = _gradients(
        copy.deepcopy(with_backend(exact, plan, "eager")), whole, device, autocast=False
    )

    def bfloat16(kernel: SDPBackend | None) -> float:
        one = copy.deepcopy(twin(low, plan))
        with Backend(name="sdpa", kernel=kernel).forced(device):
            return relative_error(_gradients(one, inputs, device, autocast=False), reference)

    def float32(autocast: bool, reentrant: bool | None) -> float:
        one = copy.deepcopy(twin(exact, plan))
        if reentrant is not None:
            one.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return relative_error(_gradients(one, whole, device, autocast=autocast), reference)

    loose, tight = GRADIENT_TOLERANCE[torch.bfloat16], GRADIENT_TOLERANCE[torch.float32]
    flash = SDPBackend.FLASH_ATTENTION
    what = "gradients"
    rows.append(check(what, "sdpa, bfloat16", loose, lambda: bfloat16(None)))
    rows.append(check(what, "sdpa, flash kernel, bfloat16", loose, lambda: bfloat16(flash)))
    rows.append(check(what, "sdpa, autocast bfloat16", loose, lambda: float32(True, None)))
    rows.append(check(what, "sdpa, float32", tight, lambda: float32(False, None)))
    for mode in (False, True):
        case = f"checkpointing, use_reentrant={mode}, float32"
        rows.append(check(what, case, tight, lambda mode=mode: float32(False, mode)))
    return rows


def _tokens(model: Any, inputs: dict[str, Tensor], **how: Any) -> Tensor:
    torch._dynamo.reset()  # each check compiles for itself
    return model.generate(
        **inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0, **how
    )


def cache_checks(device: torch.device, kind: str) -> list[Row]:
    """A kind of cache generates the tokens of the default one, float32.

    `generate` compiles the steps on a static cache where there is a GPU. The error is the share of
    tokens that differ.
    """
    model, rows = small_model(device, torch.float32), []
    batches = {
        "equal rows": batch(model.config, EQUAL, device, torch.float32),
        "left padding": batch(model.config, MIXED, device, torch.float32),
    }
    for plan_name in ("plan", "reindex"):
        one = twin(model, PLANS[plan_name])
        for name, inputs in batches.items():
            wanted = _tokens(one, inputs)

            def differ(one=one, inputs=inputs, wanted=wanted, **how: Any) -> float:
                return float((_tokens(one, inputs, **how) != wanted).float().mean())

            case = f"{plan_name}, {name}"
            if kind != "static" and device.type == "cpu":
                rows.append(skipped(f"{kind} cache", case, "there is nowhere to offload from"))
                continue
            generate = partial(differ, cache_implementation=kind)
            rows.append(check(f"{kind} cache", case, 0.0, generate))
        if kind != "static":
            continue

        def sized(one=one, inputs=batches["equal rows"]) -> float:
            columns = inputs["input_ids"].shape[1] + 8
            cache = adsc.static_cache(one, columns, [vision_tokens(one.config)])
            wanted = _tokens(one, inputs)
            return float((_tokens(one, inputs, past_key_values=cache) != wanted).float().mean())

        rows.append(check("static cache sized by layer", f"{plan_name}, equal rows", 0.0, sized))
    return rows


def family_checks(device: torch.device) -> list[Row]:
    """The tests' tiny model of each family on the device against a CPU, float32, mixed rows."""
    from tests.adsc.zoo import CASES  # only a checkout has them

    rows = []
    for name, case in CASES.items():
        attention = (
            "eager" if name == "paligemma2" else "sdpa"
        )  # Gemma 2 caps scores, in eager only

        def error(case=case, attention=attention) -> float:
            here = adsc.attach(case.model(attention), case.drops)
            first, second, *rest = case.pictures(here)
            third = rest[0] if rest else first
            inputs = case.batch([[3, first, 4], [2, second, 1, third, 6], [5]])
            wanted = token_logits(here, inputs)
            moved = {
                key: one.to(device) if isinstance(one, Tensor) else one
                for key, one in inputs.items()
            }
            return relative_error(token_logits(here.to(device), moved), wanted)

        rows.append(check("device = CPU, float32", name, 1e-4, error))
    return rows


@contextlib.contextmanager
def no_tf32() -> Iterator[None]:
    """Within it, float32 matrix products are float32."""
    before = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = cudnn

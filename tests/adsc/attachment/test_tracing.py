"""What a process remembers between calls, and other machinery that takes a model apart: fake
tensors, traces, parts compiled on their own, FSDP, continuous batching."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import adsc
from adsc.dropping.memo import remembered
from tests.adsc.attached import attached, group_of_one
from tests.adsc.tiny import IMAGE, batch, llava, row
from tests.adsc.zoo import CASES

CLOSE = {"rtol": 0, "atol": 5e-5}
MODES: dict[str, Any] = {
    "fake": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "flops": lambda: FlopCounterMode(display=False),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_in_another_mode_leaves_nothing_behind(mode):
    """A plan that no other test uses, so that its tables are made here first."""
    plan = f"1:{ {'fake': 5, 'flops': 7, 'inference': 9}[mode] }/16,3:1/3"
    inputs = batch([row(3, 0, 5), row(2, 0, 1)])
    with MODES[mode]():
        model = adsc.attach(llava(), plan)
        strange = {name: value.clone() for name, value in inputs.items()}
        try:
            model(**strange)
        except Exception:  # noqa: BLE001 - fake tensors hold no counts to read: not tested here
            assert mode == "fake"
    model = adsc.attach(llava(), plan).train()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    output = model(**inputs, labels=labels)
    output.loss.backward()
    assert type(output.logits) is torch.Tensor and output.loss.isfinite()
    assert all(type(kept) is torch.Tensor for kept in output.kept_positions)


@settings(max_examples=30, deadline=None)
@given(
    calls=st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(["", *MODES])), min_size=1, max_size=12
    ),
    size=st.integers(1, 4),
)
def test_what_is_remembered_is_always_an_ordinary_tensor(calls, size):
    made: list[int] = []

    def make(number: int) -> torch.Tensor:
        made.append(number)
        return torch.full((2,), number)

    recall = remembered(make, size)
    for number, mode in calls:
        if mode:
            with MODES[mode]():
                recall(number)
        else:
            found = recall(number)
            assert type(found) is torch.Tensor and not found.is_inference()
            assert found.tolist() == [number, number]
            before = len(made)
            assert recall(number) is found
            assert len(made) == before


def test_sizes_as_a_list_of_tensors():
    for name in ("llava_next", "llava_onevision"):
        case = CASES[name]
        plain = case.model()
        pictures = case.pictures(plain)[:2]
        inputs = case.batch([[3, pictures[0], 4], [pictures[1], 2]])
        model = adsc.attach(plain, adsc.PruningPlan(stages=case.drops))
        listed = inputs | {"image_sizes": list(inputs["image_sizes"])}
        pairs = inputs | {"image_sizes": inputs["image_sizes"].tolist()}
        with torch.no_grad():
            wanted = model(**inputs).logits
            assert torch.equal(model(**listed).logits, wanted)
            assert torch.equal(model(**pairs).logits, wanted)


def test_a_trace_is_refused():
    inputs = batch([row(3, 0, 5)])
    model = attached()
    with pytest.raises(adsc.UnsupportedModel, match=r"torch\.jit\.trace records"):
        torch.jit.trace(
            model,
            example_kwarg_inputs=inputs,
            strict=False,
            check_trace=False,
        )
    assert torch.equal(model(**inputs).logits, attached()(**inputs).logits)


@pytest.mark.parametrize(
    "part", ["decoder", "decoder in place", "layers", "layers in place", "last"]
)
def test_parts_that_are_compiled_on_their_own_are_refused(part):
    model, inputs = attached(), batch([row(3, 0, 5)])
    decoder = model.model.language_model
    if part == "decoder":
        model.model.language_model = torch.compile(decoder, backend="eager")
    elif part == "decoder in place":
        decoder.compile(backend="eager")
    for number, layer in enumerate(decoder.layers):
        if part == "layers":
            decoder.layers[number] = torch.compile(layer, backend="eager")
        elif part == "layers in place" or (part == "last" and number == len(decoder.layers) - 1):
            layer.compile(backend="eager")
    with pytest.raises(adsc.UnsupportedModel, match=r"compiled on its own.*adsc\.compile_layers"):
        model(**inputs)


def test_continuous_batching_is_refused_before_it_starts():
    model = attached()
    for call in (
        lambda: model.generate_batch([row(3), row(5)], max_new_tokens=2),
        lambda: model.init_continuous_batching(),
        lambda: model.continuous_batching_context_manager().__enter__(),
    ):
        with pytest.raises(adsc.CacheError, match=r"continuous batching.*use model\.generate"):
            call()


@pytest.fixture
def group() -> Iterator[None]:
    with group_of_one():
        yield


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["plan", "fastv", "sparsevlm", "dart", "pyramiddrop"])
def test_fsdp_attached_before_and_after(group, name, when):
    inputs = batch([row(3, 0, 5), row(2, 0, 3)])

    def put(model: Any, plan: Any) -> Any:
        return adsc.attach(model, plan)

    plan: Any = "2:1/2,4:1/4"
    if name != "plan":
        plan = adsc.peers.make(name, llava(), average=8)
    # Labels tell a method where the prompt ends, so they are given to both.
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    with torch.no_grad():
        wanted = put(llava(), plan)(**inputs, labels=labels)
    model = llava()
    if when == "before":
        put(model, plan)
    policy = functools.partial(
        transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer}
    )
    sharded = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )
    if when == "after":
        put(sharded, plan)
    output = sharded(**inputs, labels=labels)
    torch.testing.assert_close(output.logits, wanted.logits, **CLOSE)
    torch.testing.assert_close(output.loss, wanted.loss, **CLOSE)
    assert all(
        torch.equal(*pair)
        for pair in zip(output.kept_positions, wanted.kept_positions, strict=True)
    )
    output.loss.backward()

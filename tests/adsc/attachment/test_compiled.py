"""Static caches, torch.compile, and reading nothing back from the device for each layer."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, QuantizedCache

import adsc
from tests.adsc.attached import FROM_ZERO, GREEDY, MIXED, STAGES, attached
from tests.adsc.tiny import LAYERS, TOKENS, alone, batch, greedy_reference, llava, row
from tests.adsc.zoo import CASES


@pytest.mark.parametrize("positions", ["keep", "reindex"])
def test_static_cache_equals_dynamic(positions):
    inputs = batch(MIXED)
    model = attached(positions=positions)
    wanted = model.generate(**inputs, max_new_tokens=4, **GREEDY)
    got = model.generate(**inputs, cache_implementation="static", max_new_tokens=4, **GREEDY)
    assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("name", ["llava sliding", "gemma3"])
def test_static_cache_with_sliding_windows(name):
    case = CASES[name]
    first, second, _ = case.pictures(case.model())
    inputs = case.batch([[3, first, 4], [2, second, 1, first, 6]])
    model = adsc.attach(case.model("sdpa"), "3:1/2,4:1/3")
    wanted = model.generate(**inputs, max_new_tokens=4, **GREEDY)
    got = model.generate(**inputs, cache_implementation="static", max_new_tokens=4, **GREEDY)
    assert got.tolist() == wanted.tolist()


def test_static_cache_sized_by_layer():
    inputs = batch([row(3, 0, 5), row(2, 0, 4)])
    model = attached()
    wanted = model.generate(**inputs, max_new_tokens=4, **GREEDY)
    cache = adsc.static_cache(model, inputs["input_ids"].shape[1] + 4, [TOKENS])
    got = model.generate(**inputs, past_key_values=cache, max_new_tokens=4, **GREEDY)
    assert got.tolist() == wanted.tolist()
    vision = adsc.plan_of(model).tokens_per_layer(TOKENS, LAYERS)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [n + 8 + 4 for n in vision]


def test_static_cache_is_refused_where_layer_0_drops():
    model = attached(FROM_ZERO)
    with pytest.raises(adsc.CacheError, match="drop after that layer, or use a DynamicCache"):
        model.generate(**batch(MIXED), cache_implementation="static", max_new_tokens=2, **GREEDY)
    with pytest.raises(adsc.CacheError, match="needs layer 0 whole"):
        adsc.static_cache(model, 100, [TOKENS])


# Of quanto's 2 and 4 bits nothing is tested: its first use compiles C++ for minutes.
QUANTIZED = {
    "hqq": {"nbits": 8, "axis_key": 1, "axis_value": 1, "q_group_size": 8, "residual_length": 4},
    "fp8": {},
}


@pytest.mark.parametrize("stages", [STAGES, FROM_ZERO], ids=["from 2", "from 0"])
@pytest.mark.parametrize("backend", QUANTIZED)
@torch.no_grad()
def test_quantized_cache(backend, stages):
    if backend == "hqq":
        pytest.importorskip("hqq", reason="pip install 'adsc[quantized]'")
    inputs = batch(MIXED)
    model = attached(stages)
    kept = model.generate(**inputs, max_new_tokens=8, **GREEDY)
    cache = QuantizedCache(backend, model.config.get_text_config(), **QUANTIZED[backend])
    exact = DynamicCache(config=model.config.get_text_config())
    width, worst = inputs["input_ids"].shape[1], 0.0
    for step in range(8):  # the same tokens into both, so that rounding can't part them
        given = dict(inputs) if step == 0 else {"input_ids": kept[:, width + step - 1, None]}
        grown = torch.ones(len(kept), step, dtype=torch.long)
        given["attention_mask"] = torch.cat([inputs["attention_mask"], grown], dim=1)
        near = model(**given, past_key_values=cache).logits[:, -1]
        true = model(**given, past_key_values=exact).logits[:, -1]
        worst = max(worst, float((near - true).norm() / true.norm()))
    # Worst measured: fp8 0.48 (weights this large make attention sharp); unrelated logits are 1.4.
    assert 0 < worst < {"hqq": 0.05, "fp8": 0.6}[backend]
    lengths = [layer.get_seq_length() for layer in cache.layers]
    assert lengths == [layer.get_seq_length() for layer in exact.layers]
    assert len(set(lengths)) > 1


@torch.no_grad()
def test_prefill_compiles_into_one_graph_for_all_requests_of_a_shape():
    torch._dynamo.reset()
    model, graphs = attached(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled, first = torch.compile(model, backend=backend, fullgraph=True), 0
    for seed in range(3):
        inputs = batch([row(3, 0, 5, seed=seed), row(1, 0, 7, seed=seed)], seed=seed)
        del inputs["attention_mask"]
        wanted = model(**inputs, use_cache=False)
        got = compiled(**inputs, use_cache=False)
        assert torch.equal(got.logits, wanted.logits)
        assert torch.equal(got.kept_positions[-1], wanted.kept_positions[-1])
        first = first or len(graphs)
    assert len(graphs) == first


@torch.no_grad()
def test_two_plans_compile_one_after_the_other():
    """What a second plan changes is no symbol to the compiler."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    for stages in (STAGES, [(3, 0.125)]):
        model = attached(stages)
        compiled, counts = torch.compile(model, backend=backend, fullgraph=True), []
        for seed, parts in ((0, (3, 0, 5)), (1, (3, 0, 5)), (2, (2, 0, 9)), (3, (2, 0, 9))):
            inputs = batch([row(*parts, seed=seed)], seed=seed)
            del inputs["attention_mask"]
            wanted = model(**inputs, use_cache=False).logits
            assert torch.equal(compiled(**inputs, use_cache=False).logits, wanted)
            counts.append(len(graphs))
        assert counts[0] == counts[1] and counts[2] == counts[3]


@torch.no_grad()
def test_decoding_with_a_static_cache_compiles_once():
    torch._dynamo.reset()
    model, graphs = attached(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    inputs = batch([row(3, 0, 5)])
    cache = adsc.static_cache(model, 40, [TOKENS])
    given = {name: inputs[name] for name in ("input_ids", "pixel_values")}
    tokens = [int(model(**given, past_key_values=cache).logits[0, -1].argmax())]
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for step in range(5):
        output = compiled(
            input_ids=torch.tensor([tokens[-1:]]),
            position_ids=torch.tensor([[24 + step]]),
            past_key_values=cache,
        )
        tokens.append(int(output.logits[0, -1].argmax()))
    assert tokens == greedy_reference(llava(), alone(inputs, 0), 6, STAGES)
    assert len(graphs) <= 2  # the first call of a static cache differs


@torch.no_grad()
def test_compiled_rows_that_differ_are_refused():
    torch._dynamo.reset()
    compiled = torch.compile(attached(), backend="eager", fullgraph=True)
    inputs = batch([row(3, 0, 0, 5), row(3, 0, 5)])
    with pytest.raises(Exception, match="as many images"):
        compiled(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])


class _Reads(TorchDispatchMode):
    """Counts what would wait for a device: values that are read back."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_nothing_is_read_back_for_each_layer_or_drop():
    counts = []
    for stages in ([(1, 0.5)], [(1, 0.9), (2, 0.8), (3, 0.8), (4, 0.5)]):
        model = attached(stages)
        inputs = batch([row(3, 0, 5), row(2, 0, 6)])
        cache = DynamicCache(config=model.config.get_text_config())
        with _Reads() as prefill:
            model(**inputs, past_key_values=cache)
        step = {"input_ids": torch.tensor([[5], [6]]), "past_key_values": cache}
        with _Reads() as decode:
            model(**step)
        counts.append((prefill.count, decode.count))
    assert counts[0] == counts[1]
    assert counts[0][1] == 0
    plain = llava()
    with _Reads() as prefill:
        plain(**inputs)
    assert counts[0][0] <= prefill.count + 1

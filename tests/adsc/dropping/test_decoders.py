"""Every decoder that LLaVA can hold: a plan equals plain transformers on the tokens that are left,
or the part that doesn't fit is named. Methods that score by attention likewise.

The lists here take half a minute of one core; every causal model type that transformers knows is
gone through with `-m slow`.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import adsc
from adsc.dropping.cache_record import CACHE_NAMES
from adsc.peers.attention import keys, probabilities
from tests.adsc.tiny import IMAGE, batch, row
from tests.adsc.zoo import VISION

CLOSE = {"rtol": 0, "atol": 2e-4}
PLAN, KEPT = "0:1/4", [3, 7, 11, 15]  # of an image's 16 tokens the last of each group
LAYERS = 4
SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,  # some name their embeddings otherwise
}
# Sizes that a family names otherwise, small enough for a test.
MORE: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "first_k_dense_replace": LAYERS,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
    },
    "phi3": {"num_key_value_heads": 2},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt2": {"n_embd": 32, "n_layer": LAYERS, "n_head": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64},
    "qwen3_next": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
MORE["deepseek_v3"] = MORE["deepseek_v2"] | {"qk_head_dim": 8}

WORK = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "olmo",
    "olmo2",
    "phi",
    "stablelm",
    "granite",
    "cohere",
    "starcoder2",
    "glm",
    "glm4",
    "nemotron",
    "ministral",
    "smollm3",
    "arcee",
    "helium",
    "seed_oss",
    "exaone4",
    "deepseek_v3",
    "mixtral",
    "olmoe",
)
REFUSED = {
    "gpt_neox": r"layer 0 of GPTNeoXModel \(GPTNeoXLayer\) does not take cache or past_key_values",
    "deepseek_v2": "complex numbers",
    "lfm2": "layers of kind conv",
    "gpt2": "no list of decoder layers",
    "opt": "no list of decoder layers",
    "bloom": "no list of decoder layers",
    "mamba": "no `rotary_emb`",
    "qwen3_next": "layers of kind linear_attention",
    "ministral3": "scales queries by position ids",
}


def llava_with(kind: str, **options: Any) -> Any:
    """LLaVA around a tiny random decoder of this model type."""
    torch.manual_seed(0)
    known = inspect.signature(type(hf.AutoConfig.for_model(kind)).__init__).parameters
    sizes = {k: v for k, v in SIZES.items() if k in known or "kwargs" in known}
    text = hf.AutoConfig.for_model(kind, **sizes | MORE.get(kind, {}) | options)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = hf.LlavaForConditionalGeneration._from_config(config, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def plain(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, list[int]]:
    """Logits of plain transformers that is given the columns that are left, at their positions."""
    states: dict[str, Tensor] = {}

    def look(_: Any, args: Any, kwargs: Any) -> None:
        states["embeds"] = kwargs["inputs_embeds"]

    handle = model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    model(**inputs, use_cache=False)
    handle.remove()
    places = (inputs["input_ids"][0] == IMAGE).nonzero().flatten().tolist()
    gone = {column for i, column in enumerate(places) if i % 16 not in KEPT}
    columns = [c for c in range(inputs["input_ids"].shape[1]) if c not in gone]
    hidden = model.model.language_model(
        inputs_embeds=states["embeds"][:, columns],
        position_ids=torch.tensor([columns]),
        attention_mask=torch.ones(1, len(columns), dtype=torch.long),
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden)[0], columns


@pytest.mark.parametrize("kind", WORK)
def test_a_plan_equals_plain_transformers_on_what_is_left(kind):
    model, single = llava_with(kind), batch([row(3, 0, 5, 0, 2)])
    wanted, columns = plain(model, single)
    adsc.attach(model, PLAN)
    with torch.no_grad():
        got = model(**single, use_cache=False)
        assert got.kept_positions[-1][0].tolist() == columns
        torch.testing.assert_close(got.logits[0], wanted, **CLOSE)
        # Padded in a batch, at a later drop, and decoded on a cache: all equal.
        adsc.attach(model, "0:1/2,2:1/2")
        inputs = batch([row(3, 0, 5, 0, 2), row(4, 0, 1)])
        whole = model(**inputs, use_cache=False)
        alone = model(**batch([row(4, 0, 1)]) | {"pixel_values": inputs["pixel_values"][2:]})
        torch.testing.assert_close(
            whole.logits[1, -alone.logits.shape[1] :], alone.logits[0], **CLOSE
        )
        # Positions count from each row's first word, in the prompt as in what follows it.
        numbers = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        prompt = {k: v[:, :-1] if k != "pixel_values" else v for k, v in inputs.items()}
        cache = model(**prompt, position_ids=numbers[:, :-1], use_cache=True).past_key_values
        last = model(
            input_ids=inputs["input_ids"][:, -1:],
            attention_mask=inputs["attention_mask"],
            position_ids=numbers[:, -1:],
            past_key_values=cache,
        )
        whole = model(**inputs, position_ids=numbers, use_cache=False)
        torch.testing.assert_close(last.logits[:, -1], whole.logits[:, -1], **CLOSE)
        torch.testing.assert_close(last.logits[1, -1], alone.logits[0, -1], **CLOSE)


def with_the_other_name(model: Any) -> Any:
    """The model with decoder layers that take their cache under the name of CACHE_NAMES that this
    transformers does not use."""
    layers = model.model.language_model.layers
    kind = type(layers[0])
    signature = inspect.signature(kind.forward)
    (here,) = (name for name in CACHE_NAMES if name in signature.parameters)
    (other,) = (name for name in CACHE_NAMES if name != here)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert here not in kwargs
        return kind.forward(self, *args, **{here: kwargs.pop(other)}, **kwargs)

    forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[
            one.replace(name=other) if name == here else one
            for name, one in signature.parameters.items()
        ]
    )
    for layer in layers:
        layer.__class__ = type(kind.__name__, (kind,), {"forward": forward})
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {other if k == here else k: kwargs[k] for k in kwargs}),
            with_kwargs=True,
        )
    return model


@pytest.mark.parametrize("plan", ["0:1/2,2:1/2", "1:1/4"])
def test_a_layer_may_take_its_cache_under_either_name(plan):
    """transformers 5.24 calls it `cache`, older ones `past_key_values`."""
    inputs = batch([row(3, 0, 5, 0, 2), row(4, 0, 1)])
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    how |= {"return_dict_in_generate": True, "output_logits": True}
    wanted = adsc.attach(llava_with("llama"), plan).generate(**inputs, **how)
    got = adsc.attach(with_the_other_name(llava_with("llama")), plan).generate(**inputs, **how)
    assert torch.equal(got.sequences, wanted.sequences)
    for one, two in zip(got.logits, wanted.logits, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    held = [layer.get_seq_length() for layer in got.past_key_values.layers]
    assert held == [layer.get_seq_length() for layer in wanted.past_key_values.layers]
    assert held[0] > held[-1] or plan.startswith("0")


@pytest.mark.parametrize("kind", REFUSED)
def test_a_decoder_that_does_not_fit_is_named(kind):
    model = llava_with(kind)
    with pytest.raises(adsc.UnsupportedModel, match=REFUSED[kind]):
        adsc.attach(model, PLAN)
        model(**batch([row(3, 0, 5)]))


FITTING = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "olmo",
    "granite",
    "cohere",
    "ministral",
    "seed_oss",
    "arcee",
    "mixtral",
)
FOREIGN = {
    "phi3": "qkv_proj",
    "olmo2": "post-norm",
    "phi": "partial rotary",
    "stablelm": "partial rotary",
    "olmoe": "over all heads",
    "deepseek_v3": "latent",
    "smollm3": "don't turn positions",
    "cohere2": "don't turn positions",
    "doge": "whose part in the scores is not known",
}


def check_scores(model: Any, inputs: dict[str, Tensor]) -> None:
    """What a method computes of each layer, before and after its drop, is what the layer itself
    has: keys as in the cache, probabilities as in eager attention."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    fastv = adsc.peers.fastv.FastV
    note = fastv.note

    def look(self: Any, scene: Any) -> Any:
        every = torch.arange(scene.hidden.shape[1])[None]
        seen[scene.number] = keys(scene), probabilities(scene, torch.tensor([0]), every)
        return note(self, scene) if scene.number == 1 else []

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(fastv, "note", look)
        patch.setattr(fastv, "watches", lambda self: frozenset(range(LAYERS)))
        adsc.attach(model, adsc.peers.make("fastv", model, average=8.5, layer=2))
        output = model(**inputs, use_cache=True, output_attentions=True)
    assert sorted(seen) == list(range(LAYERS))
    for number, (key, paid) in seen.items():
        torch.testing.assert_close(key, output.past_key_values.layers[number].keys, **CLOSE)
        torch.testing.assert_close(paid, output.attentions[number].mean(1), **CLOSE)
    assert seen[0][0].shape[2] - seen[LAYERS - 1][0].shape[2] == 15  # of 16 one is left


@pytest.mark.parametrize("kind", FITTING)
def test_methods_compute_what_the_layer_itself_computes(kind):
    check_scores(llava_with(kind), batch([row(3, 0, 5)]))


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm", "dart"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_methods_refuse_layers_that_they_would_misread(kind, name):
    method = adsc.peers.make(name, llava_with("llama"), average=8, tolerance=0.1)
    with pytest.raises(adsc.UnsupportedModel, match=FOREIGN[kind]):
        adsc.attach(llava_with(kind), method)


def test_methods_refuse_options_that_change_scores():
    method = adsc.peers.make("fastv", llava_with("llama"), average=8.5)
    with pytest.raises(adsc.UnsupportedModel, match=r"it clips queries and keys \(clip_qkv=8"):
        adsc.attach(llava_with("olmo", clip_qkv=8.0), method)
    check_scores(llava_with("smollm3", no_rope_layers=[1] * LAYERS), batch([row(3, 0, 5)]))


@pytest.mark.slow
def test_no_decoder_of_transformers_is_taken_on_trust():
    """All causal model types: built small and run dense; those that do are served or refused."""
    wrong, served, scored, refused = {}, [], [], []
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            model, single = llava_with(kind), batch([row(3, 0, 5)])
            wanted, _ = plain(model, single)
        except Exception:  # noqa: BLE001 - not to be had this small, or not without extra packages
            continue
        try:
            with torch.no_grad():
                got = adsc.attach(model, PLAN)(**single, use_cache=False).logits[0]
            torch.testing.assert_close(got, wanted, **CLOSE)
            served.append(kind)
            check_scores(model, single)
            scored.append(kind)
        except adsc.UnsupportedModel:
            if kind not in served:  # else by the method alone
                refused.append(kind)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
            wrong[kind] = f"{type(error).__name__}: {str(error)[:200]}"
    assert not wrong
    assert len(served) > 30 and len(scored) > 10 and len(refused) > 5

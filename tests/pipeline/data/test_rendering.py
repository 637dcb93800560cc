"""Prompts and label masks: frozen snapshots per template, LLaVA's published preprocessing, and
equality with what the checkpoint's processor does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoProcessor, PreTrainedTokenizerFast

from pipeline.data.conversations import IGNORED, BadRecord
from pipeline.data.pictures import PictureLimits, open_pictures
from pipeline.data.rendering import ProcessorError, Renderer, load_processor
from pipeline.data.templates import (
    SHIPPED,
    Template,
    TemplateError,
    find_template,
    place_marker,
    shipped,
)
from tests.small import Small

PROMPTS = Path(__file__).parent / "prompts"
LIMITS = PictureLimits(min_side=14, max_pixels=10_000, max_bytes=100_000, max_aspect=20)
CONVERSATIONS = {
    "picture first": [
        ("human", "<image>\nwhat is at the top left?"),
        ("gpt", "bag"),
        ("human", "is there a boot? "),
        ("gpt", " no\n"),
    ],
    "picture last": [("human", "what is this?\n<image>"), ("gpt", "A bag.\nA red one.")],
    "two pictures": [("human", "<image> or <image>?"), ("gpt", "the first")],
    "picture later": [("human", "hello"), ("gpt", "hi"), ("human", "see <image>!"), ("gpt", "ü")],
    "text": [("human", "1 + 1?"), ("gpt", "2")],
}
# Templates like those of common checkpoints, for both methods of finding the mask.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>\n{% else %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OWN = {
    "chatml": CHATML,
    "llama3": (
        "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}"
        "<|end_header_id|>\n\n{% if message.role == 'assistant' %}{% generation %}"
        "{{ message.content[0].text }}<|eot_id|>{% endgeneration %}{% else %}"
        "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}"
        "{{ part.text }}{% endif %}{% endfor %}<|eot_id|>{% endif %}{% endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] "
        "{% for part in message.content %}{% if part.type == 'image' %}<image>\n{% else %}"
        "{{ part.text }}{% endif %}{% endfor %} [/INST]{% else %} {{ message.content[0].text }}"
        "</s>{% endif %}{% endfor %}"
    ),
}


def own(text: str, **changes: Any) -> Template:
    values = {"image_token": "<image>", "special_tokens": {"bos_token": "<s>"}, "parts": True}
    return Template(name="own", text=text, **(values | changes))


def shown(segments: list[tuple[str, bool]]) -> str:
    return "".join(f"⟦{text}⟧" if supervised else text for text, supervised in segments)


@pytest.mark.parametrize("name", [*SHIPPED, *OWN])
def test_prompts_and_masks_are_those_on_record(name: str) -> None:
    """What is supervised stands in ⟦⟧. A changed snapshot is a changed training set."""
    template = shipped(name) if name in SHIPPED else own(OWN[name])
    made = "".join(
        f"=== {title}\n{shown(template.render(turns))}\n" for title, turns in CONVERSATIONS.items()
    )
    assert made == (PROMPTS / f"{name}.txt").read_text(encoding="utf-8")


def test_both_methods_of_finding_the_mask_agree() -> None:
    marked = CHATML.replace("{{ message.role }}\n", "{{ message.role }}\n{% generation %}")
    marked = marked.replace("<|im_end|>\n", "<|im_end|>{% endgeneration %}{{ '\\n' }}")
    for turns in CONVERSATIONS.values():
        (text, spans), compared = own(marked)._marked(messages := _messages(turns)), own(CHATML)
        assert (text, spans[1::2]) == compared._compared(messages)


def _messages(turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [own(CHATML)._message(role, text) for role, text in turns]


def published_llava(turns: list[tuple[str, str]]) -> tuple[str, list[str]]:
    """LLaVA's preprocess_multimodal and Conversation.get_prompt (SeparatorStyle.TWO) for
    conv_vicuna_v1, and the texts that preprocess_v1 leaves unmasked, as published."""
    seps, roles = [" ", "</s>"], {"human": "USER", "gpt": "ASSISTANT"}
    text = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ) + seps[0]
    unmasked = []
    for number, (role, value) in enumerate(turns):
        if "<image>" in value:
            value = ("<image>\n" + value.replace("<image>", "").strip()).strip()
        text += f"{roles[role]}: {value}{seps[number % 2]}"
        if role == "gpt":
            unmasked.append(f" {value}{seps[1]}")
    return text, unmasked


def test_vicuna_v1_is_llavas_preprocessing() -> None:
    for title, turns in CONVERSATIONS.items():
        if title == "two pictures":  # LLaVA-1.5 knows one
            continue
        # One difference on purpose: white space around a turn's text goes, pictures or not.
        stripped = [(role, text.strip()) for role, text in turns]
        segments = shipped("vicuna_v1").render(stripped)
        text, unmasked = published_llava(stripped)
        assert "".join(piece for piece, _ in segments) == text
        assert [piece for piece, supervised in segments if supervised] == unmasked


def test_a_single_picture_goes_first() -> None:
    assert place_marker("<image>\nq") == place_marker("q <image>") == "<image>\nq"
    assert place_marker(" <image> ") == "<image>"
    assert place_marker("a <image> b <image>") == "a <image> b <image>"


@pytest.mark.parametrize("name", SHIPPED)
def test_jinja_form_renders_the_same_text(name: str, small: Small) -> None:
    processor = AutoProcessor.from_pretrained(small.base)
    messages = [
        {
            "role": "user" if role == "human" else "assistant",
            "content": [{"type": "text", "text": text.strip()}],
        }
        for role, text in CONVERSATIONS["picture first"]
    ]
    messages[0]["content"] = [
        {"type": "image"},
        {"type": "text", "text": CONVERSATIONS["picture first"][0][1].removeprefix("<image>\n")},
    ]
    text = processor.apply_chat_template(messages, chat_template=shipped(name).text)
    segments = shipped(name).render(CONVERSATIONS["picture first"])
    assert text == "".join(piece for piece, _ in segments)
    # And as a checkpoint's own template it gives the same segments.
    mine = own(shipped(name).text).render(CONVERSATIONS["picture first"])
    assert mine == segments


def test_templates_whose_mask_is_unknown_are_refused() -> None:
    forgets = CHATML.replace("{{ part.text }}", "{{ part.text if loop.last else '' }}").replace(
        "<|im_start|>{{ message.role }}", "<|im_start|>{{ message.role }}{{ messages | length }}"
    )
    with pytest.raises(TemplateError, match=r"marks no answers with \{% generation %\}"):
        own(forgets).render(CONVERSATIONS["picture first"])
    with pytest.raises(TemplateError, match=r"fails on a plain conversation \(no!\)"):
        own("{{ raise_exception('no!') }}").render(CONVERSATIONS["text"])


def test_which_template_a_checkpoint_gets(small: Small) -> None:
    processor = AutoProcessor.from_pretrained(small.base)
    assert find_template("auto", processor).name == "tokenizer"
    # llava-hf's own for LLaVA-1.5 ends no answer: a model trained with it would never stop.
    endless = CHATML.replace("<|im_end|>", " ")
    processor.chat_template = endless
    assert find_template("auto", processor).name == "vicuna_v1"
    with pytest.raises(TemplateError, match="without an end token"):
        find_template("tokenizer", processor)
    processor.chat_template = processor.tokenizer.chat_template = None
    assert find_template("auto", processor).name == "vicuna_v1"
    with pytest.raises(TemplateError, match="has no chat template; name one with"):
        find_template("tokenizer", processor)
    processor.tokenizer.chat_template = OWN["mistral"].replace(
        "{% for part in message.content %}{% if part.type == 'image' %}<image>\n{% else %}"
        "{{ part.text }}{% endif %}{% endfor %}", "{{ message.content }}"
    ).replace("message.content[0].text", "message.content")  # fmt: skip
    found = find_template("auto", processor)
    assert shown(found.render(CONVERSATIONS["picture last"])) == (
        "<s>[INST] <image>\nwhat is this? [/INST]⟦ A bag.\nA red one.</s>⟧"
    )
    with pytest.raises(TemplateError, match="'nope' is unknown"):
        find_template("nope", processor)


def renderer(small: Small, template: str = "vicuna_short", context: int = 512) -> Renderer:
    return Renderer.load(small.base, template, context, LIMITS)


def test_labels_cover_answers_and_their_end_token_only(small: Small) -> None:
    made = renderer(small)
    tokenizer = made.processor.tokenizer
    turns = CONVERSATIONS["picture first"]
    ids, labels = made.tokenise(made.template.render(turns), [64])
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert (ids == image).sum() == 64 and len(ids) == len(labels)
    assert tokenizer.decode(labels[labels != IGNORED]) == " bag</s> no</s>"
    assert ((labels == IGNORED) | (labels == ids)).all()
    # The whole is what the tokenizer makes of the whole text.
    text = "".join(piece for piece, _ in made.template.render(turns))
    assert ids.tolist() == tokenizer(text.replace("<image>", "<image>" * 64)).input_ids


@pytest.mark.parametrize("name", ["vicuna_v1", "vicuna_short", "tokenizer"])
def test_tokens_are_those_of_the_processor(small: Small, name: str) -> None:
    renderer(small, name).check()


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_words_keep_their_tokens_across_segments(small: Small, legacy: bool) -> None:
    """Tokenised alone, " bag" would get a second word mark: the whole text is tokenised at once."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<unk>", "<s>", "</s>", "<image>", "▁", "▁bag", "▁ASSISTANT", ":", "▁USER", "\n"]
    pieces += [*"abcdefghijklmnopqrstuvwxyz?.,'"]
    bpe = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "<unk>"))
    scheme = "always" if legacy else "first"
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme=scheme), pre_tokenizers.Punctuation()]
    )
    bpe.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    made = renderer(small)
    processor = type(made.processor)(
        made.processor.image_processor, tokenizer, patch_size=12,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    made = Renderer(processor=processor, template=made.template, context=512, pictures=LIMITS)
    made.check()
    _, labels = made.tokenise(made.template.render([("human", "q"), ("gpt", "bag")]), [])
    assert tokenizer.convert_ids_to_tokens(labels[labels != IGNORED]) == ["▁bag", "</s>"]


def test_a_record_is_rendered_or_named(small: Small) -> None:
    made, roots = renderer(small), open_pictures("images", small.pictures)
    name = sorted((small.pictures / "images" / "train").iterdir())[0].name
    image = f"train/{name}"

    def record(question: str, answer: str = "bag", **more: Any) -> dict[str, Any]:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": 7, "conversations": turns} | more

    row = made.render(record("what?<image>", image=image), roots)
    assert (row["id"], row["length"], row["vision_tokens"]) == ("7", len(row["input_ids"]), 64)
    assert row["supervised"] == int((np.array(row["labels"]) != IGNORED).sum())
    assert made.render(record("<image>", image=image, id=None), roots)["id"] is None
    # A duplicate is one in pictures and turns, whatever its id.
    other = made.render(record("what?<image>", image=image, id=8), roots)
    assert (
        other["key"] == row["key"] != made.render(record("why?<image>", image=image), roots)["key"]
    )
    for wrong, reason in (
        (record("what?", image=image), "markers"),
        (record("<image>what?", image=[image, image]), "markers"),
        (record("what?", "a </s> b"), "control_token"),
        (record("<pad>"), "control_token"),
        (record("</<image>s> what?", image=image), "control_token"),
        (record("<image>", image="none.png"), "missing_picture"),
        (record("what? " * 500), "too_long"),
    ):
        with pytest.raises(BadRecord) as caught:
            made.render(wrong, roots)
        assert caught.value.reason == reason


def test_checkpoints_that_cannot_be_used(small: Small, tmp_path: Path) -> None:
    with pytest.raises(ProcessorError, match="there is no checkpoint folder"):
        load_processor(str(tmp_path / "none"))
    with pytest.raises(ProcessorError, match="no processor can be loaded from"):
        load_processor(str(tmp_path))
    AutoProcessor.from_pretrained(small.base).tokenizer.save_pretrained(tmp_path / "text")
    with pytest.raises(ProcessorError, match=r"not a vision-language checkpoint|no processor can"):
        load_processor(str(tmp_path / "text"))


def test_what_old_checkpoints_left_out_comes_from_their_config(
    small: Small, tmp_path: Path
) -> None:
    import json
    import shutil

    shutil.copytree(small.base, tmp_path / "old")
    path = tmp_path / "old" / "processor_config.json"
    settings = json.loads(path.read_text())
    for name in ("patch_size", "vision_feature_select_strategy"):
        settings.pop(name)
    path.write_text(json.dumps(settings))
    Renderer.load(tmp_path / "old", "vicuna_v1", 512, LIMITS).check()

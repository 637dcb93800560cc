"""What plans cost an untrained model: the losses are those of the model under each plan."""

import pytest
import torch

import adsc
from pipeline.training.batches import StepLoader
from pipeline.training.config import TrainConfig
from tests.small import Small
from workflows.depth import losses, main
from workflows.evidence.tasks import load_model


def test_losses_are_those_of_the_plans(small: Small) -> None:
    config = TrainConfig(steps=1, batch_size=4, accumulate=2)
    load = StepLoader(data=small.prepared / "train", processor=small.base, config=config)
    batches = load(0).micro
    plans = [adsc.PruningPlan.parse(plan) for plan in ("", "2:0", "1:1/4;pool=tiles")]
    found = list(losses(load_model(small.base, None), batches, plans, half=False))
    assert len(set(found)) == 3

    model = load_model(small.base, None)
    tokens = [int((batch["labels"] >= 0).sum()) for batch in batches]
    for plan, loss in zip(plans, found, strict=True):
        adsc.attach(model, plan)
        with torch.inference_mode():
            own = [float(model(**batch).loss) * n for batch, n in zip(batches, tokens, strict=True)]
        assert loss == pytest.approx(sum(own) / sum(tokens), rel=1e-4)
        adsc.detach(model)


def test_the_command_prints_a_line_for_each_plan(
    small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(small.prepared / "train")
    words = ["--model", str(small.base), "--data", data, "--conversations", "4"]
    assert main([*words, "2:0", "1:1/4;pool=tiles"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in lines] == ["dense", "2:0", "1:1/4;pool=tiles"]
    assert all(float(loss) > 0 for _, loss in lines)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["9:0"], "layers 0..3"),
        (["2:0", "9:0"], "layers 0..3"),
        (["2:x"], "keep ratio 'x'"),
        (["2:0", "--conversations", "100000"], "take 1 to"),
        (["2:0", "--conversations", "0"], "take 1 to"),
        (["2:0", "--data", "nowhere"], "no Parquet shard in nowhere"),
        (["2:0", "--model", "no/where/at/all"], "no/where/at/all"),
    ],
)
def test_what_can_not_be_run_is_said_in_a_sentence(
    words: list[str], said: str, small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    there = ["--model", str(small.base), "--data", str(small.prepared / "train")]
    assert main([*there, "--conversations", "4", *words]) == 2
    out, error = capsys.readouterr()
    last = error.splitlines()[-1]  # behind transformers' progress bar
    assert out == "" and last.startswith("depth: ") and said in last

"""Peers through the pipeline: trained, merged and evaluated with their options."""

import itertools
from pathlib import Path
from typing import Any

import pytest

import adsc
from adsc.method import Method
from pipeline.config import ConfigError, edit
from pipeline.evaluation.config import ArmConfig, EvaluateConfig
from pipeline.evaluation.methods import PeerConfig, parse_method
from pipeline.kinds.merge import MergeConfig
from pipeline.reporting.results import Results
from pipeline.stages.evaluate import evaluate
from pipeline.stages.merge import merge
from pipeline.training.config import TrainConfig
from pipeline.training.loop import train
from tests.pipeline.contexts import DATA, QUICK, stage_context
from tests.pipeline.training.training_runs import CONFIG, Plain, sources, trained, worst_difference
from tests.small import Small

pytestmark = pytest.mark.usefixtures("ray_address")

PEERS = {
    "fastv": PeerConfig(name="fastv", average=28, options={"layer": 1}),
    "pyramiddrop": PeerConfig(name="pyramiddrop", average=28, options={"layers": (1, 2, 3)}),
    "visionzip": PeerConfig(name="visionzip", average=28),
}


def under(peer: PeerConfig) -> TrainConfig:
    return CONFIG.model_copy(update={"plan": "", "method": peer})


@pytest.fixture(scope="module")
def folders(small: Small, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of a training under each peer."""
    made = {}
    for name, peer in PEERS.items():
        made[name] = tmp_path_factory.mktemp(name)
        train(under(peer), sources(small), Plain(made[name]))
    return made


def test_each_peer_trains_with_its_own_choice(folders: dict[str, Path]) -> None:
    adapters = [trained(folder) for folder in folders.values()]
    assert all(worst_difference(a, b) > 0 for a, b in itertools.pairwise(adapters))


def test_training_under_a_peer_is_repeatable(
    small: Small, folders: dict[str, Path], tmp_path: Path
) -> None:
    train(under(PEERS["pyramiddrop"]), sources(small), Plain(tmp_path))
    assert worst_difference(trained(tmp_path), trained(folders["pyramiddrop"])) == 0


def test_merged_checkpoints_carry_their_peer_and_evaluate_knows_it(
    small: Small, folders: dict[str, Path], tmp_path: Path
) -> None:
    data, arms = {"base": (small.base, {}), "data": (small.prepared, DATA)}, []
    inputs: dict[str, Any] = dict(data)
    for name, peer in PEERS.items():
        own = {"trained": (folders[name] / f"step-{CONFIG.steps:07d}", {})}
        ctx = stage_context("merge", tmp_path / name, data | own)
        assert merge(ctx, MergeConfig(method=peer))["plan"] == str(peer)
        method = adsc.plan_of(adsc.from_pretrained(tmp_path / name))
        assert isinstance(method, Method) and method.name == name
        assert method.average_tokens(64, 4) == pytest.approx(28, rel=0.01)
        inputs[name] = (tmp_path / name, {})
        arms.append(ArmConfig(name=name, label=name, checkpoint=name, method=peer, trained=True))
    arms.append(ArmConfig(name="dense", label="dense", checkpoint="base"))
    ctx = stage_context("evaluate", tmp_path / "out", inputs)
    evaluate(ctx, EvaluateConfig(arms=tuple(arms), control="dense", **QUICK))
    rows = Results.read(ctx.out / "results.json").arms
    assert [row.peer for row in rows] == [True, True, True, False]
    assert [row.plan for row in rows[:3]] == [str(peer) for peer in PEERS.values()]


def test_options_with_several_numbers_survive_text_and_edits() -> None:
    text = "pyramiddrop:28,layers=[1,2,3],positions=keep"
    peer = parse_method(text).method
    assert peer is not None and peer.options == {"layers": (1, 2, 3), "positions": "keep"}
    assert str(peer) == text and parse_method(str(peer)).method == peer
    assert PeerConfig.model_validate_json(peer.model_dump_json()) == peer
    given = "{name: pyramiddrop, average: 28, options: {layers: [1, 2, 3], positions: keep}}"
    assert edit(TrainConfig(), {"method": given}).method == peer


def test_a_plan_and_a_peer_at_once_are_refused() -> None:
    given = {"plan": "1:1/2", "method": "{name: fastv, average: 22}"}
    with pytest.raises(ConfigError, match="a model runs with one of them"):
        edit(TrainConfig(), given)


def test_a_peer_that_the_model_cannot_meet_says_so(small: Small, tmp_path: Path) -> None:
    peer = PeerConfig(name="fastv", average=8)
    with pytest.raises(adsc.PlanError, match="the nearest it reaches"):
        train(under(peer), sources(small), Plain(tmp_path))
    assert not list(tmp_path.iterdir())

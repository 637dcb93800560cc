"""VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467): what the vision tower itself attends to.

Dominant tokens are those that the class token attends to most in the layer whose output becomes
the features (the penultimate in LLaVA), summed over heads; in towers without class token, those
that receive most attention on average. Of the others, c evenly spaced ones become contextual
tokens: each adds the mean of those that resemble it most (cosine of the mean key over heads),
before the projector. 10 of 64 tokens are contextual, as published.

The tower runs as it is, in any attention kernel; one layer's scores are computed beside it. They
travel with the tower's output, and the tokens that enter the decoder are matched to patches by
value, so it does not matter how a family cuts, orders and repeats its features.

Legend: P patches of the tower's pass, n tokens of one image, d width of the tower, c contextual.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adsc.dropping.blocks import is_replaced
from adsc.errors import UnsupportedModel, VisionTokenError
from adsc.families.family import Family
from adsc.families.llava import projector_macs
from adsc.families.llava_next import anyres_grid
from adsc.method import Budget, Method, MethodHook, Selection, as_fraction
from adsc.peers.attention import looking
from adsc.plan import PlanError

if TYPE_CHECKING:
    from adsc.costs.scoring import Sizes
    from adsc.dropping.choice import Scene

PASS = "adsc_pass"  # on the output of a vision tower


@dataclass(eq=False)
class Pass:
    """One pass of a vision tower; scores and keys first, the rest once there are features.

    Args:
        scores: (P,) attention that each patch, or unit of merged patches, receives.
        keys: (P, d_head) mean over heads.
        features: (P, d) what the projector was given; None where contextual tokens are merged
            after it.
        projected: (P, D) what it made of them.
        owner: id of the projector that did.
    """

    scores: Tensor
    keys: Tensor
    features: Tensor | None = None
    projected: Tensor | None = None
    owner: int | None = None


# The passes of the forward that is under way, until its choice is made. A thread has its own.
_PASSES: ContextVar[tuple[Pass, ...]] = ContextVar("adsc_passes", default=())


@dataclass(frozen=True, kw_only=True)
class VisionZip(Method):
    """One drop before layer 0.

    Args:
        contextual: share of the tokens that stay which are merged ones.
    """

    name = "visionzip"
    contextual: Fraction = Fraction(5, 32)

    def __post_init__(self) -> None:
        super().__post_init__()
        share = Fraction(self.contextual).limit_denominator(10**6)
        if not 0 <= share < 1:
            raise PlanError(
                f"contextual {self.contextual} must be in [0, 1): a share of the tokens"
            )
        object.__setattr__(self, "contextual", share)

    @classmethod
    def fit(
        cls,
        budget: Budget,
        contextual: float | str | Fraction = Fraction(5, 32),
        positions: str | None = None,
    ) -> VisionZip:
        positions = budget.positions(positions, "reindex")
        share = as_fraction("contextual", contextual)
        return cls(stages=budget.cut(0), positions=positions, contextual=share)

    def check_family(self, family: Family) -> None:
        if family.model_type not in ("llava", "llava_next", "qwen2_5_vl"):
            raise UnsupportedModel(
                f"visionzip serves LLaVA-1.5, LLaVA-NeXT and Qwen2.5-VL, not {family.name}, whose "
                "tower or projector it does not know; choose another method"
            )

    def install(self, inner: Any) -> None:
        if hasattr(inner, "visual"):
            tower, projector = inner.visual, inner.visual.merger
            block = tower.config.fullatt_block_indexes[-1]
            tower.blocks[block].register_forward_pre_hook(ScoreWindowed(), with_kwargs=True)
            projector.register_forward_hook(KeepFeatures(merged=True))
        else:
            tower, projector = inner.vision_tower, inner.multi_modal_projector
            inside = getattr(tower, "vision_model", tower)
            kind = getattr(tower.config, "model_type", None)
            if kind not in ("clip_vision_model", "siglip_vision_model"):
                raise UnsupportedModel(
                    f"visionzip needs a CLIP or SigLIP tower, this one is {kind!r}"
                )
            layers = inside.encoder.layers
            layer = layers[feature_layer(inner.config, len(layers))]
            hook = Score(class_token=kind == "clip_vision_model")
            layer.register_forward_pre_hook(hook, with_kwargs=True)
            projector.register_forward_hook(KeepFeatures(merged=False))
        tower.register_forward_hook(LeaveTower())

    def choose(self, scene: Scene, stage: int) -> list[Selection]:
        passes = [getattr(one, PASS) for one in scene.choice.encoded if hasattr(one, PASS)]
        passes = passes or list(_PASSES.get())
        _PASSES.set(())
        owner = id(projector_of(scene.choice.model))
        passes = [one for one in passes if one.owner == owner]
        if not passes:
            raise VisionTokenError(
                "visionzip needs the vision tower's attention, but no image passed the tower in "
                "this call; pass pixel values rather than features made elsewhere"
            )
        prints = torch.cat([_prints(one.projected.to(scene.hidden)) for one in passes])  # type: ignore
        scores = torch.cat([one.scores.to(scene.device) for one in passes])
        keys = torch.cat([one.keys.to(scene.device) for one in passes])
        ordered, order = prints.sort(stable=True)
        chosen = []
        for number in range(len(scene.spots)):
            mine = _prints(scene.states(number))
            place = torch.searchsorted(ordered, mine).clamp(max=len(ordered) - 1)
            patch = torch.where(ordered[place] == mine, order[place], -1)
            count = scene.count(number, stage)
            chosen.append(self._zip(scene, passes, scores, keys, patch, count))
        return chosen

    def _zip(
        self,
        scene: Scene,
        passes: list[Pass],
        scores: Tensor,
        keys: Tensor,
        patch: Tensor,
        count: int,
    ) -> Selection:
        """What stays of one image, whose tokens are patches number `patch`, -1 for row ends."""
        known = patch >= 0
        total = int(known.sum())
        if total < count // 2:
            raise VisionTokenError(
                f"{len(known) - total} of {len(known)} vision tokens were not made by this call's "
                "vision tower; visionzip needs the projector's output unchanged"
            )
        score = scores[patch.clamp(min=0)].masked_fill(~known, -1)
        merged = self.merged(count) if total >= count else 0
        dominant = score.argsort(descending=True, stable=True)[: count - merged]
        if not merged:
            return Selection(dominant.sort().values)
        spare = known.index_fill(0, dominant, False)
        rest = spare.nonzero().flatten()
        targets = rest[:: max(1, len(rest) // merged)][:merged]
        unit = nn.functional.normalize(keys[patch.clamp(min=0)].float(), dim=-1)
        nearest = (unit @ unit[targets].T).argmax(1)
        joins = nn.functional.one_hot(nearest, merged).T.to(score)  # (c, n)
        joins = joins * spare.index_fill(0, targets, False)
        weights = joins / joins.sum(1, keepdim=True).clamp(min=1)
        weights = weights.index_put(
            (torch.arange(merged, device=targets.device), targets), weights.new_ones(())
        )
        keep = torch.cat([dominant, targets]).sort().values
        if passes[0].features is None:
            return Selection(keep, targets, weights)

        def project() -> Tensor:
            features = torch.cat([one.features for one in passes])[patch.clamp(min=0)]  # type: ignore
            return projector_of(scene.choice.model)(weights.to(features) @ features)

        return Selection(keep, targets, states=project)

    def merged(self, count: int) -> int:
        """c: how many of the tokens that stay are contextual."""
        return int(count * self.contextual + Fraction(1, 2))

    def scoring_macs(self, sizes: Sizes) -> int:
        tower, n = sizes.config.vision_config, sizes.tokens
        d = tower.hidden_size
        if sizes.config.model_type == "qwen2_5_vl":
            patches = n * tower.spatial_merge_size**2
            macs = patches * 3 * d * d + patches * patches * d
            head, width = d // tower.num_heads, sizes.decoder.hidden
        else:
            clip = tower.model_type == "clip_vision_model"
            keys = (tower.image_size // tower.patch_size) ** 2 + clip
            queries = 1 if clip else keys
            tiles = 1
            if sizes.config.model_type == "llava_next":
                tiles += anyres_grid(sizes.config, sizes.image.size)[1]
            macs = tiles * ((keys + queries) * d * d + keys * queries * d)
            head, width = d // tower.num_attention_heads, d
        c = self.merged(sizes.counts[0])
        macs += c * n * head + c * n * width
        if sizes.config.model_type != "qwen2_5_vl":
            macs += c * projector_macs(sizes.config)
        return sizes.all_images * macs


def feature_layer(config: Any, layers: int) -> int:
    """The tower's layer whose output becomes the features; of several, the last."""
    chosen = config.vision_feature_layer
    chosen = chosen if isinstance(chosen, int) else chosen[-1]
    return chosen + layers if chosen < 0 else chosen - 1


class Score(MethodHook):
    """Pre-hook of a layer of a CLIP or SigLIP tower: how much attention each token receives."""

    def __init__(self, class_token: bool):
        self.class_token = class_token

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_replaced(layer):
            return
        hidden, attention = args[0] if args else kwargs["hidden_states"], layer.self_attn
        with looking(hidden.device, attention):
            normed = layer.layer_norm1(hidden)
            asking = normed[:, :1] if self.class_token else normed
            query, key = (
                project(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for project, x in ((attention.q_proj, asking), (attention.k_proj, normed))
            )
            _begin(Pass(_received(query, key, attention.scale), key.mean(1)))


class ScoreWindowed(MethodHook):
    """The same in Qwen2.5-VL's last block with attention within whole images; four patches become
    one token, and their scores and keys one mean."""

    def __call__(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_replaced(block):
            return
        hidden, attention = args[0] if args else kwargs["hidden_states"], block.attn
        turn = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
        sizes = kwargs["cu_seqlens"].diff().tolist()
        with looking(hidden.device, attention):
            each = attention.qkv(block.norm1(hidden)).unflatten(-1, (3, attention.num_heads, -1))
            query, key = turn(each[:, 0], each[:, 1], *kwargs["position_embeddings"])
            scores = [
                _received(q.transpose(0, 1)[None], k.transpose(0, 1)[None], attention.scaling)[0]
                for q, k in zip(query.split(sizes), key.split(sizes), strict=True)
            ]
            _begin(Pass(torch.cat(scores), key.mean(1)))


class KeepFeatures(MethodHook):
    """Forward hook of a projector: what it was given and what it made, beside the scores."""

    def __init__(self, merged: bool):
        self.merged = merged

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        passes = _PASSES.get()
        if not passes or passes[-1].projected is not None:
            return
        one = passes[-1]
        if self.merged:  # several patches a token
            units = len(output)
            one.scores, one.keys = (
                x.unflatten(0, (units, -1)).mean(1) for x in (one.scores, one.keys)
            )
        else:
            features = args[0]
            spare = one.scores.shape[1] - features.shape[1]  # the class token, if it was left out
            one.scores, one.keys = (
                one.scores[:, spare:].flatten(),
                one.keys[:, spare:].flatten(0, 1),
            )
            one.features = features.flatten(0, 1)
        one.projected, one.owner = output.flatten(0, -2), id(module)


class LeaveTower(MethodHook):
    """Forward hook of a tower: its pass travels with its output to a call that comes later."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _PASSES.get():
            setattr(output, PASS, _PASSES.get()[-1])


def _begin(one: Pass) -> None:
    """Of the passes before, a forward needs at most one: Qwen's images, when videos follow."""
    _PASSES.set((*_PASSES.get()[-1:], one))


def projector_of(inner: Any) -> nn.Module:
    """The module that makes the decoder's tokens from the tower's."""
    return inner.visual.merger if hasattr(inner, "visual") else inner.multi_modal_projector


def _received(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(N, P) attention from queries (N, heads, T, d): mean over these, sum over heads."""
    total = torch.zeros_like(key[:, 0, :, 0], dtype=torch.float32)
    for head in range(key.shape[1]):  # one map at a time
        scores = query[:, head] @ key[:, head].transpose(-1, -2) * scale
        total = total + scores.float().softmax(-1).mean(1)
    return total


def _prints(rows: Tensor) -> Tensor:
    """(N, D) -> (N,) int64: equal for equal rows, and else as good as never."""
    bits = rows.detach().float().contiguous().view(torch.int32).long()
    place = torch.arange(1, rows.shape[-1] + 1, device=rows.device)
    odd = (place * -7046029254386353131) ^ (place << 17) | 1
    return ((bits ^ (bits << 29)) * odd).sum(-1)

"""EfficientNet-Lite0 as a vision tower of LLaVA: 14 x 14 tokens from a convolutional network.

transformers has no such tower. Importing this module makes its Auto classes know it, so such a
checkpoint loads wherever the module has been imported; Ray's workers call `register` first
(`Workflow.setup`). A convolution has no attention: methods that choose by the tower's attention
refuse it. Batch norms are folded into the convolutions when weights are taken over, so there are no
statistics that training could move.

Legend: B pictures, C channels, h x w a feature map.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

STEM = 32
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
"""Kernel, stride of the first block, expansion, channels, blocks of each stage."""
FINE, COARSE = 4, 6
"""Stages whose maps are the features: strides 16 and 32, the latter repeated to the former's."""
WAVES = 4
"""Cosines that encode a token's row, and as many for its column: a convolution that looks
the same everywhere says what it sees, and only at the borders where."""
LOUDNESS = 3.0  # of the waves, about the standard deviation of the maps
NORM_EPS = 1e-3


class LiteConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes of the tower; only the picture's side may be another."""

    model_type = "efficientnet_lite0"

    def __init__(self, image_size: int = 224, **kwargs: Any) -> None:
        self.image_size = image_size
        self.patch_size = 16
        self.num_channels = 3
        self.hidden_size = STAGES[FINE][3] + STAGES[COARSE][3] + 2 * WAVES
        super().__init__(**kwargs)

    def tile_cost(self) -> tuple[int, int]:
        """Tokens of one picture and their MACs, for adsc.estimate_cost."""
        side, macs, width = self.image_size // 2, 0, STEM
        macs += side**2 * 9 * self.num_channels * STEM
        for kernel, stride, expansion, channels, blocks in STAGES:
            for step in (stride, *[1] * (blocks - 1)):
                inner = width * expansion
                macs += side**2 * width * inner * (expansion > 1)
                side //= step
                macs += side**2 * inner * (kernel**2 + channels)
                width = channels
        return (self.image_size // self.patch_size) ** 2, macs


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow pads sides that the stride divides: more at the end."""

    def forward(self, x: Tensor) -> Tensor:
        extra = self.kernel_size[0] - self.stride[0]
        if extra > 0:
            x = nn.functional.pad(x, (extra // 2, extra - extra // 2) * 2)
        return super().forward(x)


class Block(nn.Module):
    """Expansion, depthwise convolution, projection; the input is added where shapes agree."""

    def __init__(self, kernel: int, stride: int, expansion: int, width: int, channels: int) -> None:
        super().__init__()
        inner = width * expansion
        self.expand = SameConv(width, inner, 1) if expansion > 1 else None
        self.depthwise = SameConv(inner, inner, kernel, stride, groups=inner)
        self.project = SameConv(inner, channels, 1)
        self.residual = stride == 1 and width == channels

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else nn.functional.relu6(self.expand(x))
        y = self.project(nn.functional.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class LiteTower(PreTrainedModel):  # type: ignore[misc]
    """The network without its head."""

    config_class = LiteConfig
    base_model_prefix = "tower"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    # There is no attention here that any kernel could fail at.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, config: LiteConfig) -> None:
        super().__init__(config)
        self.stem = SameConv(config.num_channels, STEM, 3, 2)
        stages, width = [], STEM
        for kernel, stride, expansion, channels, blocks in STAGES:
            stage = nn.Sequential()
            for step in (stride, *[1] * (blocks - 1)):
                stage.append(Block(kernel, step, expansion, width, channels))
                width = channels
            stages.append(stage)
        self.stages = nn.ModuleList(stages)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Features (B, 14 * 14, C) row by row, which are the only hidden state.

        Args:
            pixel_values: (B, 3, side, side).
        """
        x = nn.functional.relu6(self.stem(pixel_values))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        coarse = nn.functional.interpolate(maps[COARSE], scale_factor=2.0)
        waves = places(*coarse.shape[2:]).to(coarse).expand(len(coarse), -1, -1, -1)
        features = torch.cat([maps[FINE], coarse, waves], dim=1).flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=features, hidden_states=(features,))


def places(height: int, width: int) -> Tensor:
    """(2 * WAVES, h, w): rows, then columns, as the first cosines of a discrete transform."""
    sides = [(torch.arange(side) + 0.5) / side for side in (height, width)]
    waves = torch.arange(1, WAVES + 1)[:, None] * torch.pi
    rows, columns = ((waves * side).cos() * LOUDNESS for side in sides)
    return torch.cat(
        [rows[:, :, None].expand(-1, -1, width), columns[:, None].expand(-1, height, -1)]
    )


def folded(published: Mapping[str, Tensor], tower: LiteTower) -> dict[str, Tensor]:
    """The tower's weights from those of `efficientnet_lite_pytorch`, batch norms folded in.

    Raises:
        ValueError: weights that are missing, or left over besides the classifier's.
    """
    left = {name: t for name, t in published.items() if not name.endswith("num_batches_tracked")}
    found: dict[str, Tensor] = {}
    try:
        for name, conv, norm in _names(tower):
            weight, scale = left.pop(f"{conv}.weight"), left.pop(f"{norm}.weight")
            mean, variance = left.pop(f"{norm}.running_mean"), left.pop(f"{norm}.running_var")
            scale = scale / (variance + NORM_EPS).sqrt()
            found[f"{name}.weight"] = weight * scale[:, None, None, None]
            found[f"{name}.bias"] = left.pop(f"{norm}.bias") - mean * scale
    except KeyError as error:
        raise ValueError(
            f"these are not EfficientNet-Lite0's weights: {error} is missing"
        ) from None
    odd = sorted(n for n in left if not n.startswith(("_conv_head.", "_bn1.", "_fc.")))
    if odd:
        raise ValueError(f"these are not EfficientNet-Lite0's weights: {odd[:3]} have no place")
    return found


def _names(tower: LiteTower) -> Iterator[tuple[str, str, str]]:
    """Our name of each convolution, its published name, and that of the norm behind it."""
    yield "stem", "_conv_stem", "_bn0"
    number = 0
    for stage, blocks in enumerate(tower.stages):
        assert isinstance(blocks, nn.Sequential)
        for place, block in enumerate(blocks):
            ours, theirs = f"stages.{stage}.{place}", f"_blocks.{number}"
            if block.expand is not None:
                yield f"{ours}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0"
            yield f"{ours}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1"
            yield f"{ours}.project", f"{theirs}._project_conv", f"{theirs}._bn2"
            number += 1


def register() -> None:
    """Make AutoConfig and AutoModel know the tower; again is no more."""
    AutoConfig.register(LiteConfig.model_type, LiteConfig, exist_ok=True)
    AutoModel.register(LiteConfig, LiteTower, exist_ok=True)


register()

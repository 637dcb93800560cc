"""The second evidence base: a LLaVA of a pretrained decoder and a pretrained tower.

SmolLM2-135M-Instruct, dequantised to fp32 with all its 30 layers, behind EfficientNet-Lite0 (196
vision tokens) and a fresh projector of two layers. What comes as a 4-bit GGUF and as a torch pickle
(read with weights_only, after its hash was checked) is safetensors from here on. Training stands
in workflows/evidence/stamps.py; which files are taken, in workflows/stamps/parts.py.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from pipeline.config import Config
from pipeline.data.config import PrepareConfig
from pipeline.durable.stage import Kind, Stage, StageContext
from pipeline.kinds.merge import MERGE, MergeConfig
from pipeline.kinds.prepare import PREPARE
from pipeline.kinds.train import TRAIN
from pipeline.training.config import TrainConfig
from workflows.stamps.parts import DECODER, TOWER, locate
from workflows.stamps_tower import LiteConfig, LiteTower, folded

IMAGE_TOKEN, END, PAD = "<image>", "<|im_end|>", "<|endoftext|>"
CHAT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'user' %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>' }}"
    "{% else %}{% generation %}"
    "{{ message['content'][0]['text'] + '<|im_end|>' }}"
    "{% endgeneration %}{% endif %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's own format without its system prompt, with pictures and with answers marked."""
TRIED = 16  # pictures by which the projector's scale is set


class StampsStartConfig(Config):
    """What the base is before it is trained."""

    decoder_sha256: str = DECODER.sha256
    """Of the decoder's GGUF."""
    tower_sha256: str = TOWER.sha256
    """Of the tower's weights."""
    random_decoder: bool = False
    """The decoder's architecture with random weights: a control, not a base."""
    seed: int = Field(0, ge=0, lt=2**64)
    """Initial values of the projector, and of a random decoder."""


class StampsBaseConfig(Config):
    """How the base is made."""

    start: StampsStartConfig = StampsStartConfig()
    """The parts around a fresh projector."""
    decoder: TrainConfig
    """The projector in full, with an adapter on the decoder that is merged; the tower stays."""


def start_stamps(ctx: StageContext, config: StampsStartConfig) -> dict[str, Any]:
    """Stage body: model and processor as safetensors; input `data`, whose training pictures
    set the scale of the projector.

    Raises:
        MissingParts: parts that are not installed.
        WrongPart: files that are not the pinned ones.
    """
    gguf = locate(DECODER._replace(sha256=config.decoder_sha256))
    weights = locate(TOWER._replace(sha256=config.tower_sha256))
    ctx.progress(1, 3, "reading the decoder")
    processor = build_processor(AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name))
    decoder: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    torch.manual_seed(config.seed)
    if config.random_decoder:
        decoder = AutoModelForCausalLM.from_config(_plain(decoder.config), dtype=torch.float32)
    ctx.progress(2, 3, "putting it together")
    tower = LiteTower(LiteConfig())
    tower.load_state_dict(folded(torch.load(weights, weights_only=True), tower))
    model = build_model(decoder, tower, processor)
    seen = ctx.inputs["data"].folder / "images" / "train"
    scale = set_scale(model, processor, sorted(seen.glob("*.png")))
    model.save_pretrained(ctx.out)
    processor.save_pretrained(ctx.out)
    return {"projector_scale": scale}


START_STAMPS = Kind(
    id="workflows.stamps_base.start_stamps", version=1, body=start_stamps, config=StampsStartConfig
)


def build_processor(tokenizer: Any) -> LlavaProcessor:
    """The decoder's tokenizer with a token for pictures, and the tower's normalisation."""
    from transformers import CLIPImageProcessor  # warns where torchvision is missing

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<|im_start|>",
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=8192,
        padding_side="left",
    )
    side = LiteConfig().image_size
    pictures = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=fast,
        patch_size=LiteConfig().patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT,
    )


def build_model(
    decoder: Any, tower: LiteTower, processor: LlavaProcessor
) -> LlavaForConditionalGeneration:
    """A LLaVA around both, with a fresh projector; a zero embedding for the picture's token."""
    tokenizer = processor.tokenizer
    text = _plain(decoder.config)
    text.vocab_size = len(tokenizer)
    text.bos_token_id, text.eos_token_id, text.pad_token_id = (
        tokenizer.convert_tokens_to_ids(one) for one in ("<|im_start|>", END, PAD)
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tower.config,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            image_seq_length=tower.config.tile_cost()[0],
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            projector_hidden_act="gelu",
            tie_word_embeddings=True,
        )
    )
    weights = decoder.model.state_dict()
    table = weights["embed_tokens.weight"]
    more = text.vocab_size - len(table)
    weights["embed_tokens.weight"] = torch.cat([table, table.new_zeros(more, table.shape[1])])
    model.model.language_model.load_state_dict(weights)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        max_new_tokens=8,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )
    return model


def _plain(config: Any) -> Any:
    """A decoder's config that says nothing of where it was read from."""
    return type(config)(
        **{
            name: value
            for name, value in config.to_diff_dict().items()
            if name not in ("quantization_config", "_name_or_path", "_model_name_or_path")
        }
    )


def set_scale(model: Any, processor: LlavaProcessor, files: list[Path]) -> float:
    """Scale the projector's output to the size of the words' embeddings; returns the factor.

    A fresh projector's vision tokens are several times as long as words, and a decoder that has
    only seen words attends to little else.
    """
    pictures = []
    for file in files[:TRIED]:
        with Image.open(file) as opened:
            pictures.append(opened.convert("RGB"))
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    last: nn.Linear = model.model.multi_modal_projector.linear_2
    with torch.no_grad():
        made: Tensor = torch.cat(list(model.get_image_features(pixels).pooler_output))
        words = model.get_input_embeddings().weight[:-1]
        factor = (words.std() / made.std()).item()
        last.weight.mul_(factor)
        if last.bias is not None:
            last.bias.mul_(factor)
    return factor


def make_base(config: StampsBaseConfig, rendering: PrepareConfig) -> list[Stage]:
    """The stages that end with `base` and `prepare`, which others need; `pictures` comes before."""
    parts = {"base": "start", "data": "prepare"}
    return [
        START_STAMPS.stage(
            name="start",
            title="start: pretrained parts around a fresh projector",
            config=config.start,
            needs={"data": "pictures"},
        ),
        PREPARE.stage(
            name="prepare",
            title="prepare: records to tokens",
            config=rendering,
            needs={"data": "pictures", "base": "start"},
        ),
        TRAIN.stage(
            name="learn",
            title="learn: projector and adapter, without any drop",
            config=config.decoder,
            needs=parts,
        ),
        MERGE.stage(
            name="base",
            title="base: the checkpoint that all arms start from",
            config=MergeConfig(),
            needs=parts | {"trained": "learn"},
        ),
    ]

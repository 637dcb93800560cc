"""The small LLaVA that ships here: its tokenizer, processor and randomly initialised model, built
in code.

An ordinary `LlavaForConditionalGeneration`: CLIP tower (64 patch tokens, features of the last
layer but one, no class token), two-layer projector, LLaMA decoder of eight layers. Only its size
is unusual. Training stands in tiny_base.py.
"""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from pipeline.config import Config
from pipeline.data.templates import shipped

IMAGE_TOKEN = "<image>"


class TinyLlavaConfig(Config):
    """Sizes of the small model; the defaults are those of the checkpoint that ships."""

    image_size: int = 96
    """Side of a picture in pixels."""
    patch_size: int = 12
    """Side of a patch in pixels; (image_size / patch_size)^2 vision tokens."""
    vision_width: int = 128
    """Hidden size of the tower."""
    vision_layers: int = 5
    """Tower layers; the features are those after the last but one, as in LLaVA-1.5."""
    width: int = 128
    """Hidden size of the decoder."""
    layers: int = 8
    """Decoder layers."""
    heads: int = 4
    """Attention heads of decoder and tower."""
    mlp_width: int = 256
    """MLP width of decoder and tower."""
    vocabulary: int = 512
    """Upper bound of the tokenizer's vocabulary."""


def build_processor(texts: Iterable[str], config: TinyLlavaConfig) -> LlavaProcessor:
    """Train a byte-level BPE tokenizer on `texts` and wrap it with a CLIP image processor."""
    from transformers import CLIPImageProcessor  # warns where torchvision is missing

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=["<pad>", "<s>", "</s>", IMAGE_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    start = ("<s>", bpe.token_to_id("<s>"))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[start])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=1024,
        padding_side="left",
    )
    side = {"height": config.image_size, "width": config.image_size}
    pictures = CLIPImageProcessor(
        size={"shortest_edge": config.image_size},
        crop_size=side,
        image_mean=[0.3] * 3,
        image_std=[0.35] * 3,
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=shipped("vicuna_short").text,
    )


def build_model(
    processor: LlavaProcessor, config: TinyLlavaConfig, seed: int
) -> LlavaForConditionalGeneration:
    """A randomly initialised model that fits `processor`."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=config.vision_width,
        intermediate_size=config.mlp_width,
        projection_dim=config.vision_width,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            image_seq_length=(config.image_size // config.patch_size) ** 2,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            projector_hidden_act="gelu",
        )
    )
    embeddings = model.model.vision_tower.embeddings
    with torch.no_grad():
        # CLIP's initial 0.02 would hide where a patch is beneath what it shows: after the first
        # norm, position and content must weigh about the same.
        embeddings.position_embedding.weight.normal_()
        embeddings.patch_embedding.weight.normal_(std=(2 / (3 * config.patch_size**2)) ** 0.5)
    model.generation_config = GenerationConfig(
        max_new_tokens=8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def initialise_decoder(model: LlavaForConditionalGeneration, seed: int) -> None:
    """Draw projector, decoder and lm_head anew, each weight with std 1 / sqrt(inputs).

    LLaMA's 0.02 is meant for a width of 4096. At 128 it leaves attention all but uniform, and
    twice as many steps pass before the decoder begins to look. Outputs of attention and MLP start
    at a quarter of that (1 / sqrt(2 * 8 layers)), embeddings at unit scale.
    """
    torch.manual_seed(seed)
    for name, module in model.named_modules():
        if "vision_tower" in name:
            continue
        if isinstance(module, torch.nn.Linear):
            quarter = 0.25 if name.endswith(("o_proj", "down_proj")) else 1.0
            torch.nn.init.normal_(module.weight, std=quarter * module.in_features**-0.5)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)

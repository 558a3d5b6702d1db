"""Tiny random models of the families of dual encoders, and their processors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    BertConfig,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
)

from hf_robust_clip.data.digits import digit_processor
from support.training import small_model

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 16, "patch_size": 8}
TEXT = {**SMALL, "vocab_size": 700, "max_position_embeddings": 16}


def clip() -> Any:
    return small_model()


def siglip() -> Any:
    return SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION))


def altclip() -> Any:
    # XLM-RoBERTa numbers positions from behind the padding token's number.
    text = {**TEXT, "max_position_embeddings": 18, "project_dim": 16, "pad_token_id": 1}
    return AltCLIPModel(
        AltCLIPConfig(text_config=text, vision_config={**VISION, "projection_dim": 16}, projection_dim=16)
    )


def chinese_clip() -> Any:
    return ChineseCLIPModel(ChineseCLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))


def vision_text_dual_encoder() -> Any:
    return VisionTextDualEncoderModel(
        VisionTextDualEncoderConfig.from_vision_text_configs(
            ViTConfig(**VISION), BertConfig(**TEXT), projection_dim=16
        )
    )


def processor_for(model: Any) -> Any:
    """The digits' processor, with the token type numbers that BERT's tokenizers return where the model takes them."""
    processor = digit_processor()
    if model.config.model_type in ("chinese_clip", "vision-text-dual-encoder"):
        backend = processor.tokenizer.backend_tokenizer
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            model_max_length=16,
            pad_token="<|endoftext|>",
            bos_token="<|startoftext|>",
            eos_token="<|endoftext|>",
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        )
        return SimpleNamespace(tokenizer=tokenizer, image_processor=processor.image_processor)
    return processor

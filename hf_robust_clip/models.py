"""Dual encoders: how to load one, and what the trainers need to know of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoProcessor

#: Text towers whose positions start behind the padding token's number.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "altclip_text_model")


def load_dual_encoder(model: str | nn.Module) -> Any:
    """
    Load a dual encoder by its Hub id or folder, or check the one given.

    Args:
        model (`str` or `nn.Module`): A Hub id, a folder, or a model with `get_image_features`, `get_text_features`
            and `logit_scale`, whose output has normalised `image_embeds` and `text_embeds` (CLIP, SigLIP, AltCLIP,
            ChineseCLIP, VisionTextDualEncoder, a PEFT model of one).

    Raises:
        `ValueError`: If the model is no dual encoder, or takes code of its own from its folder or repository. That
            code is never run: whoever trusts it loads the model, and passes the object.
    """
    # Left to itself, transformers loads a checkpoint in the precision that it was saved in, and in half precision the
    # steps of a small learning rate are lost to rounding. bf16=True of the arguments computes in it all the same.
    loaded: Any = model
    if isinstance(model, str):
        # False, not None: then transformers asks on the terminal, and takes a "y" that is piped in for an answer.
        loaded = AutoModel.from_pretrained(model, dtype=torch.float32, trust_remote_code=False)  # nosec B615
    for attribute in ("get_image_features", "get_text_features", "logit_scale"):
        if not hasattr(loaded, attribute):
            raise ValueError(
                f"model must be a dual encoder of images and texts with a logit_scale, such as CLIPModel; "
                f"{type(loaded).__name__} has no {attribute}"
            )
    return loaded


def load_processor(model: str | nn.Module, processing_class: Any, argument: str = "processing_class") -> Any:
    """`processing_class` if there is one, else the processor saved beside the model that was named by id or folder."""
    if processing_class is not None:
        return processing_class
    if not isinstance(model, str):
        raise ValueError(
            f"{argument} is None, and the model was given as an object: pass its processor, for example "
            "AutoProcessor.from_pretrained(...)"
        )
    return AutoProcessor.from_pretrained(model, trust_remote_code=False)  # nosec B615


def check_processor(processor: Any, argument: str) -> None:
    """`ValueError`, naming the argument, unless a processor has both an image processor and a tokenizer."""
    for part in ("image_processor", "tokenizer"):
        if not hasattr(processor, part):
            raise ValueError(
                f"{argument} must have an image_processor and a tokenizer, as a CLIPProcessor has; "
                f"{type(processor).__name__} has no {part}"
            )


def longest_caption(model: Any, tokenizer: Any) -> int:
    """Most tokens, special ones included, that both the text tower and the tokenizer take."""
    config = getattr(model.config, "text_config", model.config)
    positions = int(config.max_position_embeddings)
    if config.model_type in _OFFSET_POSITIONS:
        positions -= int(config.pad_token_id) + 1
    return min(positions, int(tokenizer.model_max_length))


def caption_padding(model: Any) -> bool | str:
    """SigLIP pools the last position, so it needs the padding that it was trained with; others take any."""
    return "max_length" if str(model.config.model_type).startswith("siglip") else True

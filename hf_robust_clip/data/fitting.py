"""Whether a model and a processor go together, tried on one pair before any work begins."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers.utils import logging

from ..augment.images import to_float
from ..models import caption_padding, inference, longest_caption, text_config, text_positions
from ..seeding import forked_rng
from ..wording import listed, said, shown
from .collator import CLIPDataCollator
from .rows import BadRowError, IndexedDataset, decode_row

logger = logging.get_logger(__name__)

#: Width and height of the images that are tried: of different shapes, and of no model's size.
_SIZES = ((67, 45), (45, 67))
#: Images of a dataset whose sizes are looked at.
_LOOKED_AT = 8
#: More words than any model takes, and a caption that is padded beside it.
_CAPTIONS = ("many different words " * 400, "a dog")
#: CLIP's `eos_token_id` of old: such a model reads a caption at its token of the highest number.
_LEGACY_END = 2


def check_fit(model: Any, processor: Any, collator: CLIPDataCollator | None = None, dataset: Any = None) -> None:
    """
    Try a dual encoder on one pair of an image and a caption that is cut to the longest. The model's mode and torch's
    generators stay as they are.

    Args:
        model (`nn.Module`): A dual encoder, with its adapters if there are any.
        processor (`ProcessorMixin`): Its image processor and tokenizer.
        collator ([`~data.collator.CLIPDataCollator`], *optional*): What makes the batches of a training, which are
            tried on the model's forward pass. `None`: images and texts are embedded apart, as an evaluation does.
        dataset (map-style dataset, *optional*): What is trained on. Where the image processor leaves images of
            different sizes different, the first ones here must be of one.

    Raises:
        `ValueError`: If they do not go together. It names both sides.
    """
    batches = collator
    if batches is None:
        batches = CLIPDataCollator(
            processor, max_length=longest_caption(model, processor.tokenizer), padding=caption_padding(model)
        )
    images = [Image.new("RGB", size, (90, 120, 150)) for size in _SIZES]
    try:
        batch = _batch(batches, images)
    except Exception as error:
        if type(batches).__call__ is not CLIPDataCollator.__call__:
            return  # it may need more of a row than an image and a caption
        height, width = _sides(model) or (0, 0)
        images = _first_images(dataset, batches) or [Image.new("RGB", (width, height))] * 2
        if not isinstance(error, ValueError) or not height:
            raise
        batch = _batch(batches, images)
    pixels = batch["pixel_values"]
    tokens = {name: batch[name] for name in batches.tokenizer.model_input_names if name in batch}
    _check_tokens(model, batches, tokens["input_ids"])
    if _can_run(model):
        _try(model, pixels[:1], {name: values[:1] for name, values in tokens.items()}, whole=collator is not None)


def _batch(collator: CLIPDataCollator, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    rows = zip(images, itertools.cycle(_CAPTIONS))
    return collator.for_evaluation()(
        [{collator.image_column: image, collator.caption_column: caption} for image, caption in rows]
    )


def _first_images(dataset: Any, collator: CLIPDataCollator) -> list[Image.Image]:
    """The usable ones among the first images of a map-style dataset."""
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return []
    columns = (collator.image_column, collator.caption_column)
    rows, images = IndexedDataset(dataset, *columns), []
    for number in range(min(len(rows), _LOOKED_AT)):
        with contextlib.suppress(BadRowError):
            images.append(decode_row(rows[number], *columns)[collator.image_column])
    return images


def _check_tokens(model: Any, collator: CLIPDataCollator, ids: torch.Tensor) -> None:
    """`ValueError` for captions that the text tower has no positions or embeddings for, or whose end it misses."""
    config, tokenizer, positions = text_config(model), collator.tokenizer, text_positions(model)
    if max(ids.shape[1], collator.max_length or 0) > positions:
        length = tokenizer.model_max_length if collator.max_length is None else collator.max_length
        raise ValueError(
            f"max_length={length} is longer than the model's {positions}: captions of so many tokens have no position "
            "embeddings"
        )
    # The names of special tokens in a caption are text, so that only those that the tokenizer adds itself turn up.
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    made = {number: token for token, number in tokenizer.get_vocab().items() if number not in special}
    added = ids.unique().tolist()
    made |= zip(added, tokenizer.convert_ids_to_tokens(added), strict=True)
    largest = max(made)
    if largest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer makes ids up to {largest} ({shown(made[largest])}), but the model has {config.vocab_size} "
            "token embeddings: take the tokenizer that belongs to the model, or give it more with "
            "model.text_model.resize_token_embeddings(len(tokenizer)), and train them"
        )
    if config.model_type != "clip_text_model":
        return
    end = config.eos_token_id
    if end == _LEGACY_END != tokenizer.eos_token_id:
        later = max(number for number in made if number not in added)
        if later > tokenizer.eos_token_id:
            logger.warning(
                f"The model reads a caption at its token of the highest number (eos_token_id={_LEGACY_END} in its "
                f"configuration), and the tokenizer has {shown(made[later])} ({later}) behind the end token "
                f"({tokenizer.eos_token_id}): set text_config.eos_token_id to that."
            )
    elif not bool((ids == end).any(dim=1).all()):
        raise ValueError(
            f"the tokenizer ends captions with id {tokenizer.eos_token_id} ({shown(tokenizer.eos_token)}), but the "
            f"model reads them at id {end} (text_config.eos_token_id): it would read every caption at its first token"
        )


def _can_run(model: Any) -> bool:
    parameters = list(model.parameters())
    # Weights are elsewhere: not loaded yet, or shared out among processes by ZeRO 3 or FSDP.
    if any(p.is_meta or hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in parameters):
        return False
    # What it computes with is for accelerators.
    attention = str(getattr(model.config, "_attn_implementation", None))
    quantized = getattr(model, "hf_quantizer", None) is not None
    return parameters[0].device.type != "cpu" or not (quantized or attention.startswith("flash"))


def _try(model: Any, pixels: torch.Tensor, tokens: dict[str, torch.Tensor], whole: bool) -> None:
    """`ValueError` unless a model takes these pixels, uint8 `(1, 3, H, W)`, and tokens, `(1, L)` each."""
    first = next(model.parameters())
    precisions = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    inputs = {name: values.to(first.device) for name, values in tokens.items()}
    floats = (to_float(pixels) if pixels.dtype == torch.uint8 else pixels).to(first.device, first.dtype)
    # Weights of several precisions, as of adapters on a half-precision model, go together under autocast alone.
    mixed = torch.autocast(first.device.type, torch.bfloat16, enabled=len(precisions) > 1)
    try:
        # Eagerly: a compiled model would be compiled for one pair.
        with forked_rng(0, first.device), inference(model), mixed, torch.compiler.set_stance("force_eager"):
            if whole:
                outputs = model(pixel_values=floats, **inputs)
                embeds = [outputs.image_embeds, outputs.text_embeds]
                embeds[0] @ embeds[1].T
            else:
                embeds = [model.get_image_features(pixel_values=floats), model.get_text_features(**inputs)]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        takes, makes = _sides(model), tuple(pixels.shape[-2:])
        if takes is not None and takes != makes:
            reason = f"the image processor makes images of {_times(makes)}, but the model takes {_times(takes)}"
        else:
            reason = (
                f"{type(model).__name__}{_adapters(model)} fails on an image of {_times(makes)} and a caption of "
                f"{tokens['input_ids'].shape[1]} tokens ({listed(tokens)})"
            )
        raise ValueError(f"{reason}: {said(error, 250)}") from error
    finite = [bool(getattr(side, "pooler_output", side).isfinite().all()) for side in embeds]
    if not all(finite):
        raise ValueError(
            f"{type(model).__name__} gives {'captions' if finite[0] else 'images'} embeddings that are not finite: "
            "its weights are damaged, as by a training that diverged; take those of an earlier checkpoint"
        )


def _adapters(model: Any) -> str:
    """What PEFT was asked for, where a model has adapters."""
    configs = list(getattr(model, "peft_config", {}).values())
    if not configs:
        return ""
    kind, task = (getattr(value, "value", value) for value in (configs[0].peft_type, configs[0].task_type))
    return f" of peft_type={kind!r} and task_type={task!r} (needed are adapters of layers, such as LORA, and None)"


def _sides(model: Any) -> tuple[int, int] | None:
    """Height and width of the model's images, as its configuration has them."""
    size = getattr(getattr(model.config, "vision_config", None), "image_size", None)
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, (list, tuple)) and len(size) == 2 else None


def _times(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))

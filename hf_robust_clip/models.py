"""Dual encoders: how to load one, whole or not at all, and what the trainers need to know of it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, AutoProcessor
from transformers.utils import find_adapter_config_file, logging

from .files import check_pulled
from .weight_names import PEFT_PREFIX, check_names, wrapper_hint
from .wording import listed, said, shortened

logger = logging.get_logger(__name__)

#: The parameters of a dual encoder that belong to its loss; SigLIP alone has a bias.
SCALARS = ("logit_scale", "logit_bias")
#: Errors of a disk or of rights, by their number, and what torch says where there is no memory: weights may be whole.
_OF_THE_MACHINE = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.ENOMEM, errno.EMFILE)
_NO_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory")
#: Text towers whose positions start behind the padding token's number.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "altclip_text_model")


def load_dual_encoder(model: str | os.PathLike[str] | nn.Module) -> Any:
    """
    Load a dual encoder by its Hub id or folder, or check the one given.

    Args:
        model (`str`, path or `nn.Module`): A Hub id, a folder (of adapters, too: they are put on their model), or a
            model with `get_image_features`, `get_text_features` and `logit_scale`, whose output has normalised
            `image_embeds` and `text_embeds` (CLIP, SigLIP, AltCLIP, ChineseCLIP, VisionTextDualEncoder, a PEFT model
            of one). What `torch.compile` or distributed training has wrapped around it is taken off.

    Raises:
        `ValueError`: If the model is not a dual encoder, if weights of it are missing where it is loaded from, have
            another shape there or are cut short, or if it takes code of its own from its folder or repository. That
            code is never run: whoever trusts it loads the model, and passes the object.
    """
    if not isinstance(model, (str, os.PathLike)):
        loaded = unwrapped(model)
        check_dual_encoder(loaded)
        return loaded
    name = os.fspath(model)
    check_pulled(name)
    adapters = find_adapter_config_file(name)
    base = name if adapters is None or os.path.isfile(os.path.join(name, "config.json")) else _base_of(name, adapters)
    check_pulled(base)
    # Left to itself, transformers loads a checkpoint in the precision that it was saved in, and in half precision the
    # steps of a small learning rate are lost to rounding. bf16=True of the arguments computes in it all the same.
    options: dict[str, Any] = {"dtype": torch.float32, "ignore_mismatched_sizes": True}  # check_weights refuses these
    with _named_weights(base):
        loaded, found = AutoModel.from_pretrained(  # nosec B615
            base,
            # False, not None: then transformers asks on the terminal, and takes a "y" that is piped in for an answer.
            trust_remote_code=False,
            output_loading_info=True,
            # Of adapters, transformers would report what it found of them, and nothing of their model: look for none.
            adapter_kwargs={"subfolder": "none"},
            **options,
        )
    check_dual_encoder(loaded)
    check_weights(loaded, found, base)
    if adapters is not None:
        with _named_weights(name):
            adapted = loaded.load_adapter(name, **options)
        check_weights(loaded, adapted.to_dict(), name)
    return loaded


def check_dual_encoder(model: Any) -> None:
    """`ValueError` for a model that lacks what a dual encoder has."""
    for attribute in ("get_image_features", "get_text_features", "logit_scale"):
        if not hasattr(model, attribute):
            raise ValueError(
                f"model must be a dual encoder of images and texts with a logit_scale, such as CLIPModel; "
                f"{type(model).__name__} has no {attribute}"
            )


def scalars_of(model: Any) -> dict[str, nn.Parameter]:
    """Those of `SCALARS` that a dual encoder has, by name."""
    return {name: value for name in SCALARS if (value := getattr(model, name, None)) is not None}


def unwrapped(model: Any) -> Any:
    """A model without what `torch.compile`, DDP, DataParallel, FSDP or DeepSpeed have wrapped around it."""
    while isinstance(model, nn.Module):
        inner = extract_model_from_parallel(model, keep_torch_compile=False)
        if inner is model:
            break
        model = inner
    return model


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode that it was in."""
    # Module by module: a part that is kept in evaluation mode while the rest trains stays so.
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def has_adapters(model: Any) -> bool:
    """Whether a model is a `peft.PeftModel`."""
    return hasattr(model, "peft_config") and hasattr(model, "merge_and_unload")


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model that adapters were put on, in place of a `peft.PeftModel` of it; any other as it is."""
    # Not `PeftModel.disable_adapter`: it also turns requires_grad off and on, between a forward pass and its backward
    # pass, and takes as long as a layer. Layers of PEFT alone have the property; PreTrainedModel has a method.
    parts = model.modules() if has_adapters(model) else ()
    layers: list[Any] = [part for part in parts if getattr(part, "disable_adapters", None) is False]
    for layer in layers:
        layer._disable_adapters = True
        assert layer.disable_adapters
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """What `state_dict` holds of the model that adapters were put on, under the names that it has without them."""
    state = model.state_dict()
    if not has_adapters(model):
        return state
    return {
        name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".").replace(".original_module.", "."): value
        for name, value in state.items()
        if not is_adapter(model, name)
    }


def is_adapter(model: Any, name: str) -> bool:
    """Whether a parameter of a `peft.PeftModel` is one of its adapters, or of a module that is saved with them."""
    # What PEFT leaves trainable itself goes by the same names; of prompts it has no prefix.
    return getattr(model.base_model, "prefix", "prompt_encoder.") in name or ".modules_to_save." in name


def check_weights(model: nn.Module, found: Mapping[str, Any], source: str) -> None:
    """
    `ValueError` where weights of a model were not in the checkpoint that it was loaded from, or did not fit: they are
    random then. A warning where the checkpoint has weights that the model has no use for.

    Args:
        model (`nn.Module`): The model.
        found (mapping): `missing_keys` and `unexpected_keys`, names; `mismatched_keys`, each a name with the shapes in
            the checkpoint and in the model; `error_msgs`.
        source (`str`): The folder or Hub id.
    """
    few = partial(listed, most=3, longest=60)
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    others = {
        f"{name} {tuple(there)} for {tuple(here)}" for name, there, here in found.get("mismatched_keys", ())
    } | set(found.get("error_msgs", ()))
    kind, where = type(model).__name__, shortened(source, 80)
    if not missing and not others:
        if unexpected:
            logger.warning(
                f"{where} has {len(unexpected):,} weights that {kind} has no use for: {few(unexpected)}. They are "
                "left out: look whether its config.json belongs to them."
            )
        return
    faults = []
    if missing:
        faults.append(f"{len(missing):,} weights are missing ({few(missing)})")
    if others:
        faults.append(f"{len(others):,} have another shape ({few(sorted(others))})")
    if unexpected:
        faults.append(f"{len(unexpected):,} others are there ({few(unexpected)})")
    reason = f"{shortened(', '.join(faults), 400)}.{wrapper_hint(unexpected)}"
    raise ValueError(shortened(f"{where} does not have the weights of {kind}: {reason}"))


def load_processor(
    model: str | os.PathLike[str] | nn.Module, processing_class: Any, argument: str = "processing_class"
) -> Any:
    """`processing_class` if there is one, else the processor saved beside the model that was named by id or folder."""
    if processing_class is not None:
        return processing_class
    if not isinstance(model, (str, os.PathLike)):
        raise ValueError(
            f"{argument} is None, and the model was given as an object: pass its processor, for example "
            "AutoProcessor.from_pretrained(...)"
        )
    check_pulled(os.fspath(model))
    return AutoProcessor.from_pretrained(os.fspath(model), trust_remote_code=False)  # nosec B615


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
    return min(text_positions(model), int(tokenizer.model_max_length))


def text_positions(model: Any) -> int:
    """Most tokens, special ones included, that the text tower takes."""
    config = text_config(model)
    positions = int(config.max_position_embeddings)
    if config.model_type in _OFFSET_POSITIONS:
        positions -= int(config.pad_token_id) + 1
    return positions


def text_config(model: Any) -> Any:
    """The configuration of the text tower."""
    return getattr(model.config, "text_config", model.config)


def caption_padding(model: Any) -> bool | str:
    """SigLIP pools the last position, so it needs the padding that it was trained with; others take any."""
    return "max_length" if str(model.config.model_type).startswith("siglip") else True


@contextmanager
def _named_weights(name: str) -> Iterator[None]:
    """A `ValueError` that names the file, where weights of a folder or of the Hub are cut short."""
    try:
        yield
    # Of files that torch saved: EOFError, RuntimeError, or an OSError with a number, which transformers' own lack.
    except (SafetensorError, EOFError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (None, *_OF_THE_MACHINE):
            raise
        if any(words in str(error) for words in _NO_MEMORY):
            raise
        for weights in sorted(Path(name).glob("*.safetensors")):
            check_names(weights)
        raise ValueError(
            f"the weights of {shortened(name, 200)} are cut short or damaged: {said(error, 250)}"
        ) from error


def _base_of(name: str, adapter_config: str) -> str:
    """The folder or Hub id of the model that adapters belong to."""
    with open(adapter_config, encoding="utf-8") as file:
        base = json.load(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{shortened(name, 80)} holds adapters, and its adapter_config.json does not name the model that they "
            "belong to (base_model_name_or_path)"
        )
    return base

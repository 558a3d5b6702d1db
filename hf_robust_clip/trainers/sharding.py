"""What FSDP needs to know of a dual encoder: its temperature is a scalar, which cannot be divided among processes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ..models import SCALARS
from ..wording import shown

if TYPE_CHECKING:
    from accelerate import Accelerator

#: What losses and evaluators call beside `forward`; the whole weights must come together for them, too.
_METHODS = ("get_image_features", "get_text_features")


def set_apart_scalars(model: Any, accelerator: Accelerator) -> None:
    """
    Prepare a dual encoder for FSDP. Its temperature and its bias stay whole on every process, from where losses read
    them, and their gradients are averaged.

    Args:
        model (`nn.Module`): Before it is wrapped; one that is wrapped is left as it is.
        accelerator (`Accelerator`): Set up for FSDP.

    Raises:
        `ValueError`: For settings of FSDP that cannot work with it.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        return
    plugin: Any = accelerator.state.fsdp_plugin
    for name, accepted in (("fsdp_version", 2), ("cpu_ram_efficient_loading", False)):
        if getattr(plugin, name) != accepted:
            setting = name if name.startswith("fsdp_") else f"fsdp_{name}"
            raise ValueError(
                f"{setting}={shown(getattr(plugin, name))} of accelerate's FSDP settings does not work with a model "
                f"that has a scalar parameter, logit_scale: set it to {str(accepted).lower()}"
            )
    spared = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 0 or name.rpartition(".")[2] in SCALARS
    ]
    for parameter in spared:
        parameter.data = parameter.data.to(accelerator.device)
        dist.broadcast(parameter.data, src=0)
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_average)
    ignored = plugin.ignored_modules or []
    if isinstance(ignored, str):
        ignored = [module for name, module in model.named_modules() if re.fullmatch(ignored, name)]
    plugin.ignored_modules = [*ignored, nn.ParameterList(spared)]
    # accelerate asks for them to shard them by themselves, and a dual encoder has none to name.
    model.get_input_embeddings = _none


def register_embedding_methods(model: Any) -> None:
    """Let the whole weights of a wrapped model come together for what evaluators call, too."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    if vars(model).pop("get_input_embeddings", None) is not None:  # of a model that has just been wrapped
        for method in _METHODS:
            register_fsdp_forward_method(model, method)


def _none() -> None:
    return None


def _average(parameter: torch.Tensor) -> None:
    # Of accumulated gradients, too: what was averaged before is the same on all processes.
    assert parameter.grad is not None  # it has just been accumulated
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()

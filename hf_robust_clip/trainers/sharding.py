"""
FSDP 2 and DeepSpeed, the engines that divide weights among processes: what they need of a dual encoder, whose
temperature is a scalar, and what they cannot do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial

from ..arguments import CLIPTrainingArguments
from ..models import scalars_of
from ..weight_names import PEFT_PREFIX
from ..wording import shown

if TYPE_CHECKING:
    from accelerate import Accelerator

#: What losses and evaluators call beside `forward`; the whole weights must come together for them, too.
_METHODS = ("get_image_features", "get_text_features")
#: What FSDP must be set to: losses read the temperature outside of the model, from whole weights that were loaded
#: on every process, and what is saved loads as a model.
_FSDP = {"fsdp_version": "2", "fsdp_cpu_ram_efficient_loading": "False", "fsdp_state_dict_type": "FULL_STATE_DICT"}


def engine_of(accelerator: Accelerator) -> tuple[Any, Any]:
    """What accelerate knows of FSDP and of DeepSpeed; `None` for what it does not train with."""
    return getattr(accelerator.state, "fsdp_plugin", None), getattr(accelerator.state, "deepspeed_plugin", None)


def shards(accelerator: Accelerator) -> bool:
    """Whether an engine shards the weights themselves: FSDP, or ZeRO 3 of DeepSpeed."""
    fsdp, deepspeed = engine_of(accelerator)
    return fsdp is not None or (deepspeed is not None and int(deepspeed.zero_stage) == 3)


def check_engine(accelerator: Accelerator, args: CLIPTrainingArguments, model: nn.Module) -> None:
    """`ValueError` for what FSDP or DeepSpeed, where accelerate trains with one of them, cannot do as it is set."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "model was made or trained under ZeRO 3 of DeepSpeed, and this process has but a share of its weights: "
            "pass its Hub id or folder, which is loaded whole, or make it before the arguments that have deepspeed"
        )
    fsdp, deepspeed = engine_of(accelerator)
    for name, accepted in _FSDP.items() if fsdp is not None else ():
        value = getattr(fsdp, name if name == "fsdp_version" else name.removeprefix("fsdp_"))
        value = getattr(value, "name", value)
        if str(value) != accepted:
            raise ValueError(
                f"{name}={shown(value)} of accelerate's FSDP settings does not work with a dual encoder, whose "
                f"logit_scale its losses read beside the model, and which is saved whole: set it to {accepted.lower()}"
            )
    if args.merge_adapters and (fsdp or deepspeed) is not None:
        raise ValueError(
            "merge_adapters=True does not work with FSDP or DeepSpeed, which shard the weights: save the adapters, "
            "load them in one process (AutoModel.from_pretrained) and merge them there"
        )
    if deepspeed is not None:
        _check_deepspeed(deepspeed, args)


def _check_deepspeed(plugin: Any, args: CLIPTrainingArguments) -> None:
    for name in ("contrastive_chunk_size", "accumulate_negatives"):
        if getattr(args, name):
            raise ValueError(
                f"{name}={shown(getattr(args, name))} does not work with DeepSpeed, which counts backward passes "
                "itself: use DDP or FSDP"
            )
    config = plugin.deepspeed_config
    for section, instead in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
        if section in config:
            reason = "would decay logit_scale as well" if section == "optimizer" else "would replace this trainer's"
            raise ValueError(
                f"DeepSpeed's configuration has {shown(section)}, {shown(config[section])}, which {reason}: leave it "
                f"out, and set {instead} and learning_rate in args"
            )
    gathered = config.get("zero_optimization", {}).get("stage3_gather_16bit_weights_on_model_save")
    if plugin.zero_stage == 3 and gathered is not True:
        raise ValueError(
            f"stage3_gather_16bit_weights_on_model_save={shown(gathered)} of DeepSpeed's configuration would save "
            "models without weights: set it to true (zero3_save_16bit_model of accelerate's settings)"
        )


def without_dimension(model: Any) -> frozenset[str]:
    """Which of the scalars of a dual encoder have no dimension, as in the files that it is saved to."""
    return frozenset(name for name, value in scalars_of(model).items() if value.dim() == 0)


@contextmanager
def given_dimension(model: Any, accelerator: Accelerator) -> Iterator[None]:
    """
    Within it the scalars of a dual encoder have one dimension, for an engine to take hold of: DeepSpeed views
    parameters as bytes, and FSDP cuts them along their first dimension.
    """
    if engine_of(accelerator) == (None, None):
        yield
        return
    scalars = [value for value in scalars_of(model).values() if value.dim() == 0]
    for value in scalars:
        value.data = value.data.reshape(1)
    # accelerate asks for them to shard them by themselves, and a dual encoder has none to name.
    named = vars(model).setdefault("get_input_embeddings", _none) is _none
    try:
        yield
    finally:
        if named:
            vars(model).pop("get_input_embeddings", None)
        for value in scalars:
            if value.numel() == 1:  # of FSDP, it is no longer the model's
                value.data = value.data.reshape(())


def saved_scalars(state: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """The weights of a model, to be saved: those of [`without_dimension`] have none there either."""
    return {
        name: value.reshape(()) if name.rpartition(".")[2] in names and value.numel() == 1 else value
        for name, value in state.items()
    }


def whole_scalars(model: Any) -> dict[str, torch.Tensor]:
    """The scalars of a dual encoder with adapters, under the names of its state; call it on all ranks."""
    return {
        f"{PEFT_PREFIX}{name}": as_scalar(value).detach().to(value.dtype).reshape(1)
        for name, value in scalars_of(model).items()
    }


def as_scalar(value: Any) -> torch.Tensor:
    """A scalar of a dual encoder, float32 without dimension, with the gradient of all ranks."""
    if isinstance(value, DTensor):
        mesh = value.device_mesh
        value = value.full_tensor(grad_placements=[Partial()] * mesh.ndim)
        if value.requires_grad:
            value.register_hook(lambda gradient: gradient / mesh.size())
    elif value.numel() == 0:
        value.all_gather()  # ZeRO 3 has put it away after a forward pass, and does so again after the backward pass
    scalar: torch.Tensor = value.float().reshape(())
    return scalar


@torch.no_grad()
def clamp(value: Any, least: float, most: float) -> None:
    """Clamp a scalar of a dual encoder in place, and what DeepSpeed keeps of it to copy over it at the next step."""
    value.clamp_(least, most)
    if hasattr(value, "ds_id"):  # ZeRO 3; of its own share each rank keeps one in float32
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

        value.ds_tensor.clamp_(least, most)
        safe_set_local_fp32_param(value, safe_get_local_fp32_param(value).clamp(least, most))
    elif hasattr(value, "_hp_mapping"):  # ZeRO 1 and 2
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        safe_set_full_fp32_param(value, safe_get_full_fp32_param(value).clamp(least, most))


def register_embedding_methods(model: Any) -> None:
    """Let the whole weights of a model that FSDP has wrapped come together for what evaluators call, too."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    for method in _METHODS:
        if method not in vars(model):
            register_fsdp_forward_method(model, method)


@contextmanager
def loaded_whole(args: CLIPTrainingArguments) -> Iterator[None]:
    """Within it models are loaded whole on every process, also where ZeRO 3 would have each load its share."""
    plugin: Any = args.deepspeed_plugin
    config = None if plugin is None else getattr(args, "hf_deepspeed_config", None) or getattr(plugin, "dschf", None)
    if config is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def _none() -> None:
    return None

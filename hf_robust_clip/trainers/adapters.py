"""Adapters of PEFT, and the parameters beside them that PEFT leaves out of its files."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..models import SCALARS, check_weights, has_adapters, scalars_of
from ..seeding import forked_rng
from ..weight_names import PEFT_PREFIX
from ..wording import said, shown

if TYPE_CHECKING:
    from ..arguments import CLIPTrainingArguments

logger = logging.get_logger(__name__)

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def add_adapters(model: Any, peft_config: Any, seed: int) -> Any:
    """
    Wrap a dual encoder in adapters. `logit_scale` and `logit_bias` are trained beside them if they were trainable
    before; PEFT alone would freeze them, and takes modules only in `modules_to_save`.

    Args:
        model (`PreTrainedModel`): The dual encoder.
        peft_config (`peft.PeftConfig`): The adapters'. `modules_to_save=["visual_projection", "text_projection"]`
            trains the projections as well.
        seed (`int`): Of the adapters' first weights.

    Returns:
        `peft.PeftModel`.

    Raises:
        `ValueError`: If a name in `target_modules` or `modules_to_save` fits no module of the model, or PEFT does not
            take the configuration for such a model.
    """
    from peft import get_peft_model

    trained = {name: value.requires_grad for name, value in scalars_of(model).items()}
    modules = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for name in getattr(peft_config, "modules_to_save", None) or ():
        if name.rpartition(".")[2] not in modules:
            raise ValueError(
                f"peft_config has {shown(name)} in modules_to_save, but {type(model).__name__} has no such module"
                + (f": {name} is trained and saved without it" if name in SCALARS else "")
            )
    # The Trainer sets the seed later, too late for the adapters' first weights.
    with forked_rng(seed, torch.device("cpu")):
        try:
            adapted = get_peft_model(model, peft_config)
        except Exception as error:  # whatever comes of a configuration for another kind of model
            raise ValueError(
                f"peft_config={type(peft_config).__name__} does not go with {type(model).__name__}: {said(error, 400)}"
            ) from error
    for name, value in scalars_of(adapted).items():
        value.requires_grad_(trained[name])
    return adapted


def check_adapters(model: Any, args: CLIPTrainingArguments) -> None:
    """`ValueError` for `merge_adapters` where it cannot work; a warning of a scale or bias that is not trained."""
    for name, value in scalars_of(model).items() if has_adapters(model) else ():
        if not value.requires_grad:
            logger.warning(f"{name} is frozen beside the adapters: it keeps its value.")
    if args.push_to_hub:
        warn_of_local_base(model, args)
    if not args.merge_adapters:
        return
    if not has_adapters(model):
        raise ValueError("merge_adapters=True, but there are none: give the trainer a peft_config, or leave it out")
    strategy = HubStrategy(args.hub_strategy)
    if args.push_to_hub and strategy != HubStrategy.END:
        raise ValueError(
            f"merge_adapters=True with hub_strategy={shown(strategy.value)}: checkpoints hold adapters, to be resumed "
            "from, so that the repository would get both; set hub_strategy='end'"
        )


def warn_of_local_base(model: Any, args: CLIPTrainingArguments) -> None:
    """A warning where adapters are pushed that name a folder of this computer as the model that they belong to."""
    if not has_adapters(model) or args.merge_adapters:
        return
    base = next(iter(model.peft_config.values())).base_model_name_or_path
    if base and os.path.isdir(base):
        logger.warning_once(
            f"The adapters belong to the model in {base}, a folder of this computer, and their {ADAPTER_CONFIG} says "
            "so: nobody else can load them. Push that model as well and start from it there, or set "
            "merge_adapters=True."
        )


def check_adapter_file(model: Any, folder: str | os.PathLike[str]) -> None:
    """`ValueError` for adapters in a checkpoint that are not those of a model: PEFT loads what fits, and is silent."""
    path = Path(folder, ADAPTER_WEIGHTS)
    if not has_adapters(model) or not path.is_file():
        return
    with safe_open(path, framework="pt") as file:
        there = {name.removeprefix(PEFT_PREFIX) for name in file.keys()}  # noqa: SIM118 (no mapping)
    own = {name.removeprefix(PEFT_PREFIX) for name in get_peft_model_state_dict(model)} | set(scalars_of(model))
    check_weights(model, {"missing_keys": own - there, "unexpected_keys": there - own}, str(folder))


def merged(model: Any) -> Any:
    """A copy of the dual encoder with the adapters added into its weights."""
    return copy.deepcopy(model).merge_and_unload()


def remove_adapter_files(folder: str | os.PathLike[str]) -> None:
    """Remove earlier adapters from a folder that has the merged model: loading would prefer them."""
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        Path(folder, name).unlink(missing_ok=True)


def complete_adapter_file(model: Any, folder: str | os.PathLike[str], state: dict[str, Any] | None = None) -> None:
    """
    Add `logit_scale` and `logit_bias` to the adapters in a folder, under the names from which PEFT and transformers
    load them.

    Args:
        model (`peft.PeftModel`): Whose adapters are there.
        folder (path): With `adapter_model.safetensors`.
        state (`dict`, *optional*): The model's state where its parameters are sharded.
    """
    path = Path(folder, ADAPTER_WEIGHTS)
    if not path.is_file():
        return
    weights = load_file(path)
    for name, value in scalars_of(model).items():
        value = (state or {}).get(f"{PEFT_PREFIX}{name}", value)
        weights[f"{PEFT_PREFIX}{name}"] = value.detach().cpu().contiguous().clone()
    save_file(weights, path, metadata={"format": "pt"})

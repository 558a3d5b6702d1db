"""A tower that stays as it is while the rest of a dual encoder trains."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..defences.base import Defence
from ..wording import listed, shown
from .adapters import has_adapters


class FrozenTower(AbstractContextManager[None]):
    """
    Within it a tower is in evaluation mode, from which the Trainer takes the whole model before each step, and its
    forward passes record no gradient: gradient checkpointing makes the inputs of all towers ask for one.

    Args:
        tower (`nn.Module`): Its parameters are not trained from now on.
    """

    def __init__(self, tower: nn.Module) -> None:
        self.tower = tower.requires_grad_(False)
        self._forward = torch.no_grad()(tower.forward)
        self._own: dict[str, Any] = {}

    def __enter__(self) -> None:
        self.tower.eval()
        self._own = {name: value for name, value in vars(self.tower).items() if name == "forward"}
        vars(self.tower)["forward"] = self._forward

    def __exit__(self, *raised: object) -> None:
        del vars(self.tower)["forward"]
        vars(self.tower).update(self._own)


def freezing(model: Any, freeze: str, defence: Defence) -> AbstractContextManager[None]:
    """
    Freeze a tower of a dual encoder: `vision_model` or `text_model`, without the projection outside of it.

    Args:
        model: The dual encoder, with its adapters if it has any.
        freeze (`str`): `"vision"`, `"text"` or `"none"`.
        defence ([`Defence`]): What it is to be trained with.

    Returns:
        context manager: For the forward passes of training.

    Raises:
        `ValueError`: If the defence trains that tower by terms of its own, the model has no such tower, or adapters on
            it are trained.
    """
    if freeze == "none":
        return nullcontext()
    if freeze in defence.needs_gradient:
        accepted = ["none", *sorted({"vision", "text"} - defence.needs_gradient)]
        raise ValueError(
            f"freeze={shown(freeze)} does not go with {type(defence).__name__}, which trains the {freeze} tower by "
            f"terms of its own: accepted with it is {listed(accepted)}, and any with CLIPTrainer"
        )
    tower = getattr(model, f"{freeze}_model", None)
    if not isinstance(tower, nn.Module):
        raise ValueError(
            f"freeze={shown(freeze)} needs a model with a {freeze}_model, and {type(model).__name__} has none: "
            "freeze its tower by requires_grad_(False), and leave freeze at 'none'"
        )
    adapted = has_adapters(model) or any(isinstance(part, BaseTunerLayer) for part in tower.modules())
    if adapted and any(parameter.requires_grad for parameter in tower.parameters()):
        raise ValueError(
            f"freeze={shown(freeze)} would freeze the adapters on the {freeze} tower: keep its layers out of the "
            "target_modules and modules_to_save of peft_config, or set freeze to 'none'"
        )
    return FrozenTower(tower)

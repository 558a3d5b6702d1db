"""
Backdoor triggers by name: one small frozen class each, from an image to the same image with the trigger on it.

Every trigger is a function of the pixels and of its own fields, so the same fields poison a training set and later
measure the attack on a test set. Apply it at the model's input resolution, before normalisation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..wording import listed, shown
from .blends import BLEND_PATTERNS as BLEND_PATTERNS
from .blends import BlendedStripesTrigger as BlendedStripesTrigger
from .blends import BlendedTrianglesTrigger as BlendedTrianglesTrigger
from .blends import BlendedTrigger as BlendedTrigger
from .blends import RedTextTrigger as RedTextTrigger
from .found import FoundTrigger as FoundTrigger
from .patches import PATCH_PATTERNS as PATCH_PATTERNS
from .patches import PATCH_PLACES as PATCH_PLACES
from .patches import OptimizedPatchTrigger as OptimizedPatchTrigger
from .patches import PatchTrigger as PatchTrigger
from .patches import StripesPatchTrigger as StripesPatchTrigger
from .pixels import Trigger as Trigger
from .text_triggers import PhraseTrigger as PhraseTrigger
from .text_triggers import TextTrigger as TextTrigger
from .text_triggers import WordTrigger as WordTrigger
from .transforms import ColorCurveTrigger as ColorCurveTrigger
from .transforms import SinusoidTrigger as SinusoidTrigger
from .transforms import WarpTrigger as WarpTrigger

#: How many names of triggers a message lists: all that ship.
MOST_NAMES = 16


def trigger_classes() -> dict[str, type[Trigger] | type[TextTrigger]]:
    """
    The triggers by name: those of this package, on images and on captions, and every other subclass of [`Trigger`] and
    of [`TextTrigger`] with a `name` of its own that has been defined; of two with one name, the first.
    """
    found: dict[str, type[Trigger] | type[TextTrigger]] = {}
    waiting: list[Any] = [Trigger, TextTrigger]
    for cls in waiting:
        waiting.extend(cls.__subclasses__())
        if "name" in vars(cls):
            found.setdefault(cls.name, cls)
    return found


def trigger_from_name(name: str, **overrides: Any) -> Trigger | TextTrigger:
    """
    The trigger called `name`, with its defaults but for `overrides`, e.g. `trigger_from_name("patch", size=3)`.

    All are triggers on images but `"word"` and `"phrase"`, which go on captions. One of your own is found by its name,
    too, once its class is defined.

    Raises:
        `ValueError`: on an unknown name, an unknown field, or a field out of range.
    """
    classes = trigger_classes()
    if name not in classes:
        raise ValueError(f"name={shown(name)} is not a trigger; accepted are {listed(classes, MOST_NAMES)}")
    cls = classes[name]
    accepted = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown = [key for key in overrides if key not in accepted]
    if unknown:
        raise ValueError(f"trigger {shown(name)} has no field {listed(unknown)}; accepted are {listed(accepted)}")
    return cls(**overrides)


def trigger_from_dict(config: Mapping[str, Any]) -> Trigger | TextTrigger:
    """
    The trigger that its `to_dict` wrote: `{"name": "patch", "size": 16, ...}`. Fields left out have defaults.

    Raises:
        `ValueError`: without a `name`, and as [`trigger_from_name`].
    """
    if not isinstance(config, Mapping) or not isinstance(config.get("name"), str):
        accepted = listed(trigger_classes(), MOST_NAMES)
        raise ValueError(f"{shown(config)} does not describe a trigger; accepted is a dict whose 'name' is {accepted}")
    return trigger_from_name(**config)

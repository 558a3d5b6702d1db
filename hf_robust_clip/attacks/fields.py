"""What all triggers, of images and of text, have in common: how they are described, reseeded and checked."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, TypeVar

from ..wording import listed, shown

_Own = TypeVar("_Own", bound="TriggerFields")


class TriggerFields:
    """A frozen dataclass with a `name`, whose fields say all there is to say of it."""

    name: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """The name and the fields, ready for JSON; `trigger_from_dict` reads it back."""
        return {"name": self.name, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    def reseeded(self: _Own, seed: int) -> _Own:
        """
        The same trigger, drawn from another seed; one without a seed, which draws nothing, is returned as it is.

        Raises:
            `ValueError`: on a seed that the trigger does not take.
        """
        names = [item.name for item in dataclasses.fields(self)]  # type: ignore[arg-type]
        return dataclasses.replace(self, seed=seed) if "seed" in names else self  # type: ignore[type-var]


def check_int(name: str, value: object, minimum: int, maximum: int | None = None) -> None:
    within = isinstance(value, int) and minimum <= value and (maximum is None or value <= maximum)
    if not within or isinstance(value, bool):
        limit = "" if maximum is None else f" and at most {maximum}"
        raise ValueError(f"{name}={shown(value)}; accepted is an integer of at least {minimum}{limit}")


def check_float(name: str, value: object, maximum: float = math.inf) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= maximum or math.isinf(value):
        limit = "finite" if math.isinf(maximum) else f"at most {maximum:g}"
        raise ValueError(f"{name}={shown(value)}; accepted is a number above 0 and {limit}")


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)}; accepted are True and False")


def check_choice(name: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}={shown(value)}; accepted are {listed(accepted)}")

"""A method a file, as an object that the trainer calls; `DEFENCES` is the list of those that ship."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from .base import Defence

#: File of a defence, which is also what the command line, the bench and the cards call it -> its class, and what it
#: is for. Nothing is imported before it is used: the command line has to answer at once.
LINES = {
    "clip": ("CLIP", "the loss of CLIP, undefended: the baseline"),
    "cleanclip": ("CleanCLIP", "fine-tune on clean pairs, to remove a backdoor from a model (CleanCLIP)"),
    "par": ("PAR", "fine-tune on clean pairs, away from the suspect model (PAR, Perturb and Recover)"),
    "unbind": ("Unbind", "fine-tune on clean pairs under universal perturbations, to remove a backdoor (Unbind)"),
    "roclip": ("RoCLIP", "pre-train on pairs that may be poisoned, against pools of other captions (RoCLIP)"),
    "safeclip": ("SafeCLIP", "pre-train on pairs that may be poisoned, on those that look safe (SafeCLIP)"),
}

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """An entry for each of `LINES`, found when it is asked for."""

    def __init__(self, find: Callable[[str], Entry]) -> None:
        self.find = find

    def __getitem__(self, name: str) -> Entry:
        if name not in LINES:
            raise KeyError(name)
        return self.find(name)

    def __iter__(self) -> Iterator[str]:
        return iter(LINES)

    def __len__(self) -> int:
        return len(LINES)


def _defence(name: str) -> type[Defence]:
    found: type[Defence] = getattr(import_module(f".{name}", __name__), LINES[name][0])
    return found


#: The classes of the defences.
DEFENCES = Registry(_defence)


def defence_named(name: str) -> type[Defence] | None:
    """The defence whose class has this name; `None` if none that ships has it."""
    return next((DEFENCES[key] for key, (cls, _) in LINES.items() if cls == name), None)


def __getattr__(name: str) -> Any:
    found = import_module(".base", __name__).Defence if name == "Defence" else defence_named(name)
    if found is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return found

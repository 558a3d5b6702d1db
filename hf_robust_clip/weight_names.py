"""Names of weights, and what wrappers leave in them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .wording import said, shortened

#: What PEFT puts before the name of a parameter of the model that it wraps.
PEFT_PREFIX = "base_model.model."
#: What stands in the names of a wrapped model's weights, and who puts it there.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    PEFT_PREFIX: "PEFT",
    "module.": "DistributedDataParallel, DataParallel or DeepSpeed",
}


def check_names(weights: Path) -> None:
    """`ValueError` for safetensors that are cut short, or with names that a wrapper gives."""
    # PEFT's own files have its prefix.
    known = PEFT_PREFIX if weights.name.startswith("adapter_") else ""
    try:
        with safe_open(weights, framework="np") as file:
            names = [name.removeprefix(known) for name in file.keys()]  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(
            f"{shortened(str(weights), 200)} is cut short or damaged ({said(error, 150)}): copy or download it again"
        ) from error
    if hint := wrapper_hint(names):
        raise ValueError(f"{shortened(str(weights), 200)} does not load as a model.{hint}")


def wrapper_hint(names: Collection[str]) -> str:
    """A hint at the wrapper that stands in the names of weights, or nothing."""
    mark = next((mark for mark in _WRAPPERS if any(f".{mark}" in f".{name}" for name in names)), None)
    if mark is None:
        return ""
    return (
        f" {mark!r} in their names was put there by {_WRAPPERS[mark]}: save the model inside the wrapper, or take it "
        "out of the names."
    )

"""Rows of a table that compares defences: how the model of each comes about. The demo and the benchmarks have such."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..trainers.trainer import CLIPTrainer

#: The clean digits are rendered under another seed than the poisoned ones: new places, noise and captions.
CLEAN_SEED_OFFSET = 1000


@dataclass(frozen=True)
class Row:
    """
    How a model comes about: a row of a table.

    Args:
        title (`str`): What tables call it.
        trainer (`str`): `clip`, `cleanclip`, `roclip` or `safeclip`.
        start (`str`, *optional*): The row whose model it starts from, on clean pairs; `None`: from an untrained model,
            or that of the study, on poisoned pairs.
        control (`str`, *optional*): The row that differs from it in the method alone: its settings are this row's too,
            but for those of its own.
    """

    title: str
    trainer: str
    start: str | None = None
    control: str | None = None


def row_arguments(rows: Mapping[str, Row], arguments: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """The training arguments of a row: those of `all`, of its phase or its control, and its own, which win."""
    row = rows[name]
    phase = "finetuning" if row.start else "pretraining"
    if row.control:
        inherited = row_arguments(rows, arguments, row.control)
    else:
        inherited = {**arguments.get("all", {}), **arguments.get(phase, {})}
    return inherited | dict(arguments.get(name, {}))


def row_augmentation(
    rows: Mapping[str, Row], augmentation: Mapping[str, Mapping[str, Any]], name: str
) -> dict[str, Any] | None:
    """The image augmentation of a row: its own or its control's."""
    control = rows[name].control
    if name in augmentation:
        return dict(augmentation[name])
    return row_augmentation(rows, augmentation, control) if control else None


def row_trainer(
    trainer: str, folder: Path, seed: int, arguments: dict[str, Any], augmentation: dict[str, Any] | None, **parts: Any
) -> CLIPTrainer:
    """
    The trainer of a row of a table, quiet, and without checkpoints unless its arguments ask for them.

    Args:
        trainer (`str`): One of `TRAINERS`.
        folder (`Path`): Its output folder.
        seed (`int`): Of training.
        arguments (`dict`): Its training arguments.
        augmentation (`dict`, *optional*): The arguments of its [`ImageAugmentation`]; `None` for none.
        **parts: What else the trainer takes: model, data, evaluators.
    """
    # These import torch and transformers, which takes seconds; the rest of this file stays light.
    from transformers import PrinterCallback

    from ..augment.images import ImageAugmentation
    from ..trainers.defended import TRAINERS

    trainer_class = TRAINERS[trainer]
    made = trainer_class(
        args=trainer_class.args_class(
            **{
                "output_dir": str(folder),
                "logging_strategy": "epoch",
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "seed": seed,
                **arguments,
            }
        ),
        image_augmentation="identity" if augmentation is None else ImageAugmentation(**augmentation),
        **parts,
    )
    made.remove_callback(PrinterCallback)  # prints each log as a dictionary
    return made

"""A model card and its picture, written into a model's folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load, try_to_load_from_cache
from transformers.utils import logging

from ..files import write_bytes, write_text
from ..record import RunRecord
from ..wording import shortened
from .card import MARKER, render_card
from .picture import draw_picture

logger = logging.get_logger(__name__)

README, PICTURE = "README.md", "attack_success.png"
#: Cards that a library wrote and nobody has filled in: those of the stock Trainer, and PEFT's template.
_DRAFTS = ("<!-- This model card has been generated automatically according to", "\n# Model Card for Model ID\n")


def write_card(
    record: RunRecord, folder: str | os.PathLike[str], *, license: str | None = None, **options: Any
) -> bool:
    """
    Write a run's card into its folder as `README.md`, and beside it the picture that the card shows, where matplotlib
    is installed and the run was measured along the way.

    A `README.md` that a person wrote, or made their own by deleting [`MARKER`] from it, stays, and a warning says so.

    Args:
        record ([`RunRecord`]): The run's.
        folder (path): Of the model. It is made where it is missing.
        license (`str`, *optional*): `None`: that of the model that training started from, as [`license_of`] knows it.
        **options: As of [`render_card`].

    Returns:
        `bool`: Whether it was written.

    Raises:
        `ValueError`: As [`render_card`].
    """
    path = Path(folder, README)
    if path.is_file():
        present = path.read_text(encoding="utf-8", errors="replace")
        if not any(sign in present for sign in (MARKER, *_DRAFTS)):
            logger.warning_once(
                f"{shortened(str(path), 200)} was not written by hf_robust_clip and stays as it is: the model card of "
                "this run is not in it. Move or delete it for one that create_model_card writes."
            )
            return False
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = draw_picture(record)
    license = license or license_of(options.get("base_model") or record.model.name or "")
    text = render_card(record, license=license, picture=None if picture is None else PICTURE, **options)
    if picture is not None:
        write_bytes(path.with_name(PICTURE), picture)
    write_text(path, text)
    return True


@contextmanager
def kept_card(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Put back a folder's card, or its absence, afterwards: PEFT writes into it, or one of its own, when it saves."""
    path = Path(folder, README)
    before = path.read_bytes() if path.is_file() else None
    try:
        yield
    finally:
        if before is not None:
            write_bytes(path, before)
        else:
            path.unlink(missing_ok=True)


def license_of(model: str) -> str | None:
    """
    The license that the card of a model names, as far as that is known without asking the Hub.

    Args:
        model (`str`): A folder, or a Hub id whose card may have been downloaded before.
    """
    path: Any = Path(model, README)
    if not model or not path.is_file():
        try:
            path = try_to_load_from_cache(model, README)
        except ValueError:  # not an id of the Hub
            return None
    try:
        metadata = metadata_load(path) if isinstance(path, str | Path) else None
    except (ValueError, OSError, yaml.YAMLError):
        return None
    license = (metadata or {}).get("license")
    # The name and the link that belong to "other" are not this model's.
    return license if isinstance(license, str) and license != "other" else None

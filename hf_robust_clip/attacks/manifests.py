"""What a manifest must be before it is carried out: it may come from a file that anyone has written."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from ..kinds import text_list
from ..wording import listed, shortened, shown
from .fields import check_int
from .rows import decode
from .spec import PoisonSpec
from .triggers import trigger_from_dict

#: What makes up a [`PoisonSpec`].
_SPEC_KEYS = ("mode", "target", "trigger", "templates", "seed", "image_size", "image")
_DATASET_KEYS = (*_SPEC_KEYS, "columns", "indices", "captions", "counts", "fingerprint", "source_index")
_STREAM_KEYS = (*_SPEC_KEYS, "columns", "rate")


def check_dataset_part(part: Mapping[str, Any]) -> PoisonSpec:
    """
    What the manifest of one attack, which must be one of [`poison_dataset`], was made from.

    Raises:
        `ValueError`: Naming the entry, its value and what is accepted.
    """
    _check_keys(part, _DATASET_KEYS, "poison_dataset", ("image", "caption"))
    length, count = _entry(part, "counts", "dataset_length"), len(_listed(part, "indices"))
    captions = _listed(part, "captions")
    targeted = part["mode"] == "targeted"
    accepted = f"{count} captions, one of each index, or as many nulls"
    try:
        check_int("dataset_length", length, minimum=1)
        for index in part["indices"]:
            check_int("an index", index, minimum=length if targeted else 0)
        if part["source_index"] is not None:
            check_int("source_index", part["source_index"], minimum=0, maximum=length - 1)
        if any(caption is not None for caption in captions):
            text_list("captions", captions, accepted)
    except ValueError as error:
        raise ValueError(shortened(f"manifest: {error}")) from error
    most = length + count if targeted else length
    if count == 0 or len(set(part["indices"])) < count or max(part["indices"]) >= most:
        raise _refused(part, "indices", f"at least one row number, all different, and below {most}")
    if len(captions) != count:
        raise _refused(part, "captions", accepted)
    return _spec_of(part, count=count)


def check_stream_part(part: Mapping[str, Any]) -> None:
    """[`check_dataset_part`] for a manifest of [`poison_stream`]."""
    _check_keys(part, _STREAM_KEYS, "poison_stream", ("image", "caption", "label", "key"))
    _spec_of(part, rate=part["rate"])
    if not isinstance(part["templates"], list | tuple) and part["mode"] != "label_consistent":
        raise _refused(part, "templates", "a list of strings, at least one")


def _check_keys(part: Mapping[str, Any], needed: tuple[str, ...], maker: str, columns: tuple[str, ...]) -> None:
    missing = [key for key in needed if key not in part]
    if missing:
        raise ValueError(f"manifest: {listed(missing)} missing; accepted is what {maker} returned")
    for column in columns:
        _entry(part, "columns", column)


def _spec_of(part: Mapping[str, Any], **amount: Any) -> PoisonSpec:
    if not isinstance(part["image"], str | None):
        raise _refused(part, "image", "an image file in base64, or null")
    try:
        image = None if part["image"] is None else base64.b64decode(part["image"], validate=True)
        if image is not None:
            decode(image)
        trigger = None if part["trigger"] is None else trigger_from_dict(part["trigger"])
        given = {name: part[name] for name in ("mode", "target", "templates", "seed", "image_size")}
        return PoisonSpec(trigger, **given, target_image=image, **amount)
    except ValueError as error:
        raise ValueError(shortened(f"manifest: {error}")) from error


def _entry(part: Mapping[str, Any], name: str, key: str) -> Any:
    """An entry of a mapping in a manifest."""
    if not isinstance(part[name], Mapping) or key not in part[name]:
        raise _refused(part, name, f"a mapping with {shown(key)}")
    return part[name][key]


def _listed(part: Mapping[str, Any], name: str) -> list[Any]:
    if not isinstance(part[name], list):
        raise _refused(part, name, "a list")
    return part[name]


def _refused(part: Mapping[str, Any], name: str, accepted: str) -> ValueError:
    return ValueError(f"manifest: {name}={shown(part[name])}; accepted is {accepted}")

"""What a manifest must be before it is carried out: it may come from a file that anyone has written."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

from ..wording import listed, shortened, shown
from .fields import check_choice, check_float, check_int
from .rows import decode_target
from .spec import LARGEST_SIZE, MODES

_DATASET_KEYS = (
    *("mode", "trigger", "indices", "captions", "counts"),
    *("image_size", "columns", "fingerprint", "source_index", "image"),
)
_STREAM_KEYS = ("seed", "mode", "target", "trigger", "image", "rate", "templates", "image_size", "columns")


def check_dataset_part(part: Mapping[str, Any]) -> None:
    """
    That the manifest of one attack is one of [`poison_dataset`]. Its trigger is checked where it is made.

    Raises:
        `ValueError`: Naming the entry, its value and what is accepted.
    """
    _check_keys(part, _DATASET_KEYS, "poison_dataset")
    _check_common(part, ("image", "caption"))
    length, count = _entry(part, "counts", "dataset_length"), len(_listed(part, "indices"))
    targeted = part["mode"] == "targeted"
    try:
        check_int("dataset_length", length, minimum=1)
        for index in part["indices"]:
            check_int("an index", index, minimum=length if targeted else 0)
        if part["source_index"] is not None:
            check_int("source_index", part["source_index"], minimum=0)
    except ValueError as error:
        raise ValueError(shortened(f"manifest: {error}")) from error
    most = length + count if targeted else length
    if count == 0 or len(set(part["indices"])) < count or max(part["indices"]) >= most:
        raise _refused(part, "indices", f"at least one row number, all different, and below {most}")
    if part["source_index"] is not None and part["source_index"] >= length:
        raise _refused(part, "source_index", f"a row number below {length}")
    captions = _listed(part, "captions")
    whole = all(caption is None for caption in captions) or all(_is_text(caption) for caption in captions)
    if len(captions) != count or not whole:
        raise _refused(part, "captions", f"{count} captions, one of each index, or as many nulls")


def check_stream_part(part: Mapping[str, Any]) -> None:
    """[`check_dataset_part`] for a manifest of [`poison_stream`]."""
    _check_keys(part, _STREAM_KEYS, "poison_stream")
    _check_common(part, ("image", "caption"), optional=("label", "key"))
    if not _is_text(part["target"]) or not part["target"].strip():
        raise _refused(part, "target", "the name of a class")
    try:
        check_float("rate", part["rate"], maximum=1.0)
        check_int("seed", part["seed"], minimum=0)
    except ValueError as error:
        raise ValueError(shortened(f"manifest: {error}")) from error
    if part["templates"] is None and part["mode"] == "label_consistent":
        return
    if not _listed(part, "templates") or not all(_is_text(template) for template in part["templates"]):
        raise _refused(part, "templates", "a list of strings, at least one")


def _check_keys(part: Mapping[str, Any], needed: tuple[str, ...], maker: str) -> None:
    missing = [key for key in needed if key not in part]
    if missing:
        raise ValueError(f"manifest: {listed(missing)} missing; accepted is what {maker} returned")


def _check_common(part: Mapping[str, Any], columns: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    try:
        check_choice("mode", part["mode"], MODES)
        if part["image_size"] is not None:
            check_int("image_size", part["image_size"], minimum=1, maximum=LARGEST_SIZE)
    except ValueError as error:
        raise ValueError(shortened(f"manifest: {error}")) from error
    for names, accepts, accepted in ((columns, _is_text, "a name"), (optional, _is_name_or_none, "a name or null")):
        for name in names:
            _check_column(part, name, accepts, accepted)
    if (part["image"] is not None) != (part["mode"] == "targeted"):
        raise _refused(part, "image", "the target image in mode 'targeted', and null in any other")
    if part["image"] is not None:
        if not isinstance(part["image"], str):
            raise _refused(part, "image", "an image file in base64")
        try:
            decode_target(base64.b64decode(part["image"], validate=True))
        except ValueError as error:
            raise ValueError(shortened(f"manifest: its image is no image file in base64: {error}")) from error


def _check_column(part: Mapping[str, Any], name: str, accepts: Callable[[Any], bool], accepted: str) -> None:
    column = _entry(part, "columns", name)
    if not accepts(column):
        raise ValueError(f"manifest: columns[{shown(name)}]={shown(column)}; accepted is {accepted}")


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


def _is_text(value: Any) -> bool:
    """A string that can be stored, without half of a pair of surrogates."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_name_or_none(value: Any) -> bool:
    return value is None or _is_text(value)

"""What the columns of a dataset are called and hold: captions, flags, the numbers of rows. One answer for all."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from .kinds import check_encodable, is_rows, is_stream, kind, wrong_dataset
from .wording import listed, shown

POISONED = "poisoned"
#: Keys added to a row: its number in the dataset, and the numbers of unusable rows that it stands in for.
ROW_INDEX = "row_index"
BAD_ROWS = "bad_rows"

_TEXTS = ("string", "large_string")
_ENCODED_IMAGES = ("PIL.Image.Image", *_TEXTS, "binary", "large_binary")


# ---- Values ----


def captions_of(value: Any) -> list[str]:
    """The captions that a row's value holds: itself, or those of a list. What is not a string is left out."""
    return [caption for caption in _entries(value) if isinstance(caption, str)]


def check_captions(value: Any, where: str) -> list[str]:
    """
    The captions of a row's value: a string, or a list, tuple or array of at least one. `ValueError` for others, and
    for text that cannot be encoded; `where` is what it calls the row and the column.
    """
    captions = captions_of(value)
    if not captions or len(captions) < len(_entries(value)):
        raise ValueError(
            f"{where}: a caption must be a string, or a non-empty list of strings, but is {shown(value)} "
            f"({type(value).__name__})"
        )
    for caption in captions:
        check_encodable(where, caption)
    return captions


def check_flag(value: Any, where: str) -> bool:
    """A row's flag, a boolean of Python, numpy or torch; `ValueError` for any other value."""
    flag = scalar(value)
    if not isinstance(flag, bool):
        raise ValueError(f"{where}: it must be boolean, but is {shown(value)}")
    return flag


def scalar(value: Any) -> Any:
    """A scalar of numpy or torch as one of Python; any other value as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def naming(target: str) -> Callable[[str], bool]:
    """Whether a caption has the target in it as whole words, whatever the case."""
    words = r"\s+".join(map(re.escape, target.split()))
    return partial(_is_in, re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE))


def _is_in(pattern: re.Pattern[str], caption: str) -> bool:
    return pattern.search(caption) is not None


def _entries(value: Any) -> list[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, list | tuple) else [value]


# ---- Columns ----


def has_transform(dataset: Any) -> bool:
    """Whether a `datasets.Dataset` makes its rows with a function of the user's (`with_transform`)."""
    form = getattr(dataset, "format", None)
    return isinstance(form, Mapping) and form.get("type") == "custom"


def check_columns(
    dataset: Any, columns: Mapping[str, str], needs: str, argument: str = "dataset", streams: bool = False
) -> None:
    """
    Refuse what is not a dataset of rows, or is empty, or lacks a column.

    Args:
        columns (mapping): From the argument that names a column to the column.
        needs (`str`), argument (`str`): For the `ValueError`: what the dataset needs, and what the caller calls it.
        streams (`bool`): Whether an iterable dataset is accepted as well.
    """
    streamed = streams and is_stream(dataset)
    if not streamed and not is_rows(dataset):
        accepted = "a dataset whose rows are mappings of column names, with a length"
        raise wrong_dataset(argument, dataset, f"{accepted}, or an iterable dataset" if streams else accepted)
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"{argument} is empty; it needs {needs}")
    # Of a dataset with a transform only the rows tell what there is.
    names: Any = None if has_transform(dataset) else getattr(dataset, "column_names", None)
    if names is None and not streamed:
        names = _first_columns(dataset, argument)
    there = "" if names is None else f"; its columns are {listed(names)}"
    for name, column in columns.items():
        if not isinstance(column, str) or (names is not None and column not in names):
            raise ValueError(f"{name}={shown(column)} is not a column of {argument}{there}")


def check_pairs(
    dataset: Any, columns: Mapping[str, str], argument: str = "dataset", streams: bool = False, arrays: bool = True
) -> None:
    """
    [`check_columns`] of image-caption pairs, and as far as types tell, that images, captions and flags are such.

    Args:
        columns (mapping): With `image_column` and `caption_column`.
        arrays (`bool`): Whether images may be arrays of numbers as well.
    """
    image_column, caption_column = columns["image_column"], columns["caption_column"]
    if image_column == caption_column:
        raise ValueError(
            f"image_column and caption_column are both {shown(image_column)}; accepted are different columns"
        )
    check_columns(dataset, columns, "rows with an image and a caption", argument, streams)
    features = None if has_transform(dataset) else getattr(dataset, "features", None)
    if features is None:
        return
    image, caption, flag = features[image_column], features[caption_column], features.get(POISONED)
    # Arrays have a shape, and lists no dtype.
    is_array = hasattr(image, "shape") or not hasattr(image, "dtype")
    if not (is_array and arrays) and getattr(image, "dtype", None) not in _ENCODED_IMAGES:
        accepted = "images, their bytes, paths or arrays" if arrays else "images, their bytes or paths"
        raise ValueError(
            f"image_column={shown(image_column)} of {argument} must hold {accepted}, but holds {shown(image)}"
        )
    if getattr(getattr(caption, "feature", caption), "dtype", None) not in _TEXTS:
        raise ValueError(
            f"caption_column={shown(caption_column)} of {argument} must hold strings or lists of strings, but holds "
            f"{shown(caption)}"
        )
    if flag is not None and getattr(flag, "dtype", None) != "bool":
        raise ValueError(f"column {shown(POISONED)} of {argument} must be boolean, but is {shown(flag)}")


def is_fault_of_row(error: Exception) -> bool:
    """Whether an error is of a broken row. A mistake in the dataset's own code must not pass for many of them."""
    if isinstance(error, ValueError | OSError | SyntaxError | EOFError):
        return True
    # A tampered image has Pillow raise DecompressionBombError, RuntimeError, AttributeError and more.
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__", "").startswith("PIL.") for frame in frames)


def _first_columns(dataset: Any, argument: str) -> list[str] | None:
    try:
        first = dataset[0]
    except Exception as error:
        if not is_fault_of_row(error):
            raise
        return None  # for on_bad_row to deal with
    if not isinstance(first, Mapping):
        raise ValueError(
            f"the rows of {argument} must be mappings of column names to values, but row 0 is {kind(first)}"
        )
    return list(first)


def check_numbered(stream: Any) -> None:
    """
    That the numbers that `map` and `filter` give the rows of a `datasets.IterableDataset` are always the same: they
    count anew in each worker, and in shuffled order. Else `ValueError`, for a `key_column` that is missing.
    """
    iterable: Any = stream._ex_iterable
    why = f"has {iterable.num_shards} shards, which workers count each by itself" if iterable.num_shards != 1 else None
    while iterable is not None and why is None:
        if "Shuffled" in type(iterable).__name__:
            why = "is shuffled, anew in every epoch"
        elif hasattr(iterable, "ex_iterables"):
            why = "joins several, whose order shuffling may change"
        iterable = getattr(iterable, "ex_iterable", None)
    if why is not None:
        raise ValueError(
            f"key_column=None, but the stream {why}, so that its rows have no numbers of their own; accepted is the "
            "name of a column of integers or strings that tell its rows apart"
        )

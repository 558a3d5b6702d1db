"""Rows of a dataset, read, numbered and checked: what a collator gets, whatever kind of dataset it comes from."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import datasets
import numpy as np
import torch

from ..columns import (
    BAD_ROWS,
    POISONED,
    ROW_INDEX,
    check_captions,
    check_flag,
    check_pairs,
    has_transform,
    is_fault_of_row,
)
from ..imaging import decode_image
from ..kinds import kind
from ..wording import listed, shortened, shown

OnBadRow = Literal["raise", "skip"]
ON_BAD_ROW: tuple[OnBadRow, ...] = ("raise", "skip")

#: Rows of a column that are read at a time.
_SLICE = 10_000


class BadRowError(ValueError):
    """A row that cannot be trained on: its image does not decode, or its caption is not a string."""


def decode_row(row: Mapping[str, Any], image_column: str, caption_column: str) -> dict[str, Any]:
    """
    Decode a row's image and check its caption.

    Args:
        row (mapping): Of column name to value, with its number under `"row_index"` where it is known.
        image_column (`str`): Any image that [`~imaging.decode_image`] takes.
        caption_column (`str`): A string, or a non-empty list of strings of which one is drawn at each visit.

    Returns:
        `dict`: The row with an RGB `PIL.Image.Image` in place of the image, and a `bool` under `"poisoned"` where it
        has one that is not `None`.

    Raises:
        [`BadRowError`]: Naming the row, the column and the reason.
    """
    _check_mapping(row)
    where = f"row {row[ROW_INDEX]}" if ROW_INDEX in row else "a row"
    for column in (image_column, caption_column):
        if column not in row:
            raise BadRowError(f"{where}: there is no column {shown(column)}; its columns are {listed(row)}")
    try:
        check_captions(row[caption_column], f"{where}, column {shown(caption_column)}")
        if row.get(POISONED) is not None:
            row = {**row, POISONED: check_flag(row[POISONED], f"{where}, column {shown(POISONED)}")}
    except ValueError as error:
        raise BadRowError(str(error)) from error
    try:
        image = decode_image(row[image_column])
    except ValueError as error:
        raise BadRowError(shortened(f"{where}, column {shown(image_column)}: {error}")) from error
    return {**row, image_column: image}


def user_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the keys that only this package adds, whose values it believes."""
    _check_mapping(row)
    return {name: value for name, value in row.items() if name not in (ROW_INDEX, BAD_ROWS)}


def _check_mapping(row: Any) -> None:
    if not isinstance(row, Mapping):
        raise BadRowError(f"a row must be a mapping of column names to values, but is {kind(row)}")


def undecoded(dataset: Any, image_column: str, caption_column: str, *others: str) -> Any:
    """
    The same `datasets` dataset with only the columns that training reads, and `others`, unformatted, and its images
    left as encoded bytes.

    Other kinds of dataset, and those with a transform of their own, come back as they are.
    """
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)) or dataset.features is None:
        return dataset
    if has_transform(dataset):
        return dataset
    wanted = [
        name for name in dict.fromkeys((image_column, caption_column, POISONED, *others)) if name in dataset.features
    ]
    # A format ("torch", "numpy") would decode the images, and leave captions and flags in types of its own.
    dataset = dataset.with_format(None).select_columns(wanted)
    # `datasets` decodes a whole batch at once and its error does not say which row failed, so rows decode here.
    if isinstance(dataset.features.get(image_column), datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    return dataset


class IndexedDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """
    A map-style dataset whose rows know their number, without touching the dataset itself (`Dataset.add_column` on a
    filtered dataset copies every image).

    Args:
        dataset: Any map-style dataset whose rows are mappings.
        image_column, caption_column (`str`): Names of the columns.
        on_bad_row (`str`): `"raise"` leaves an unusable row to the collator, which raises. `"skip"` takes the next
            usable row in its place, so that batches keep their size on every rank, and lists the number of the row
            passed over under `"bad_rows"`. A row that the dataset itself fails to read (its transform meets a broken
            image, say) is unusable too, and raises a [`BadRowError`] here.
    """

    def __init__(self, dataset: Any, image_column: str, caption_column: str, on_bad_row: OnBadRow = "raise") -> None:
        self.dataset = undecoded(dataset, image_column, caption_column)
        self.columns = (image_column, caption_column)
        self.on_bad_row = on_bad_row

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        if self.on_bad_row == "skip":
            return [self._usable(int(index)) for index in indices]
        if not isinstance(self.dataset, datasets.Dataset):
            return [self._read(int(index)) for index in indices]
        try:
            batch = self.dataset[list(indices)]
        except Exception:
            # Of the dataset's transform, whose error does not say which row it met.
            for index in indices:
                self._read(int(index))
            raise
        rows = [{name: batch[name][i] for name in batch} for i in range(len(indices))]
        return [{**user_columns(row), ROW_INDEX: int(index)} for row, index in zip(rows, indices, strict=True)]

    def _read(self, index: int) -> dict[str, Any]:
        try:
            return {**user_columns(self.dataset[index]), ROW_INDEX: index}
        except Exception as error:
            if not is_fault_of_row(error):
                raise
            raise BadRowError(shortened(f"row {index} cannot be read: {type(error).__name__}: {error}")) from error

    def _usable(self, first: int) -> dict[str, Any]:
        bad: list[int] = []
        for index in itertools.chain(range(first, len(self)), range(first)):
            try:
                return {**decode_row(self._read(index), *self.columns), BAD_ROWS: bad}
            except BadRowError as error:
                bad.append(index)
                last = error
        raise BadRowError(shortened(f"none of the {len(self)} rows can be used; the last: {last}")) from last


def usable_rows(
    rows: Iterable[Mapping[str, Any]],
    image_column: str,
    caption_column: str,
    first: int = 0,
    needs_one: bool = True,
) -> Iterator[dict[str, Any]]:
    """
    The usable rows of a stream, decoded. Each lists the unusable ones before it under `"bad_rows"`, by their position,
    and the last one those after it too.

    Args:
        rows (iterable of mappings), first (`int`): The stream, and the position of its first row.
        needs_one (`bool`): Whether rows of which none is usable are a [`BadRowError`].
    """
    bad: list[int] = []
    held: dict[str, Any] | None = None  # one behind, so that the last one can list what comes after it
    for position, row in enumerate(rows, first):
        try:
            usable = decode_row(row, image_column, caption_column)
        except BadRowError as error:
            bad.append(position)
            last = error
            continue
        if held is not None:
            yield held
        held, bad = {**usable, BAD_ROWS: bad}, []
    if held is not None:
        yield {**held, BAD_ROWS: [*held[BAD_ROWS], *bad]}
    elif bad and needs_one:
        raise BadRowError(shortened(f"none of the {len(bad)} rows can be used; the last: {last}")) from last


def check_dataset(
    dataset: Any, image_column: str, caption_column: str, argument: str, on_bad_row: OnBadRow = "raise"
) -> None:
    """
    Refuse a dataset that cannot be trained on, as far as its length, columns and types tell.

    Args:
        dataset: Any map-style or iterable dataset.
        argument (`str`): What the caller calls the dataset, for the `ValueError`.
        on_bad_row (`str`): With `"skip"`, rows without a caption are left for the loader to pass over.
    """
    check_pairs(dataset, {"image_column": image_column, "caption_column": caption_column}, argument, streams=True)
    if on_bad_row == "raise" and isinstance(dataset, datasets.Dataset) and not has_transform(dataset):
        _check_nulls(dataset, caption_column, argument)


def column_values(dataset: Any, column: str) -> Iterator[Any]:
    """The values of a column, row by row; of a `datasets.Dataset` without those of other columns, and unformatted."""
    if not isinstance(dataset, datasets.Dataset) or has_transform(dataset):
        yield from (dataset[row][column] for row in range(len(dataset)))
        return
    values = dataset.with_format(None)[column]
    # In slices: row by row takes a hundred times as long.
    for start in range(0, len(dataset), _SLICE):
        yield from values[start : start + _SLICE]


def poison_flags(dataset: Any) -> np.ndarray | None:
    """Which rows are poisoned `(N,)`, bool, as they are stored; `None` where no stored column says so."""
    if not isinstance(dataset, datasets.Dataset) or POISONED not in dataset.column_names:
        return None
    return np.array([bool(flag) for flag in column_values(dataset.with_format(None), POISONED)], dtype=bool)


def _check_nulls(dataset: datasets.Dataset, caption_column: str, argument: str) -> None:
    # Arrow counts nulls for free; which row of a selection holds one takes a look at the column.
    if dataset.data.column(caption_column).null_count:
        for row, caption in enumerate(column_values(dataset, caption_column)):
            if caption is None:
                raise ValueError(
                    f"row {row} of {argument}, column {shown(caption_column)}: a caption must be a string, but is "
                    "None; remove the row, or set on_bad_row='skip'"
                )

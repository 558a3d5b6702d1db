"""Rows of a dataset, read, numbered and checked: what a collator gets, whatever kind of dataset it comes from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import datasets
import torch

from .images import decode_image

OnBadRow = Literal["raise", "skip"]
ON_BAD_ROW: tuple[OnBadRow, ...] = ("raise", "skip")

#: Keys added to a row: its number in the dataset, and the numbers of unusable rows that it stands in for.
ROW_INDEX = "row_index"
BAD_ROWS = "bad_rows"
#: Optional boolean column that says which pairs are known to be poisoned; carried along for logging.
POISONED = "poisoned"


class BadRowError(ValueError):
    """A row that cannot be trained on: its image does not decode, or its caption is no string."""


def decode_row(row: Mapping[str, Any], image_column: str, caption_column: str) -> dict[str, Any]:
    """
    Decode a row's image and check its caption.

    Args:
        row (mapping): Of column name to value, with its number under `"row_index"` where it is known.
        image_column (`str`): Any image that [`~data.images.decode_image`] takes.
        caption_column (`str`): A string, or a non-empty list of strings of which one is drawn at each visit.

    Returns:
        `dict`: The row with an RGB `PIL.Image.Image` in place of the image.

    Raises:
        [`BadRowError`]: Naming the row, the column and the reason.
    """
    where = f"row {row[ROW_INDEX]}" if ROW_INDEX in row else "a row"
    for column in (image_column, caption_column):
        if column not in row:
            raise BadRowError(f"{where}: there is no column {column!r}; its columns are {', '.join(map(repr, row))}")
    caption = row[caption_column]
    accepted = isinstance(caption, str) or (
        isinstance(caption, (list, tuple)) and len(caption) > 0 and all(isinstance(item, str) for item in caption)
    )
    if not accepted:
        raise BadRowError(
            f"{where}, column {caption_column!r}: a caption must be a string, or a non-empty list of strings, "
            f"but is {caption!r} ({type(caption).__name__})"
        )
    try:
        image = decode_image(row[image_column])
    except ValueError as error:
        raise BadRowError(f"{where}, column {image_column!r}: {error}") from error
    return {**row, image_column: image}


def undecoded(dataset: Any, image_column: str, caption_column: str) -> Any:
    """
    The same `datasets` dataset with only the columns that training reads, and its images left as encoded bytes.

    Other kinds of dataset, and those with a transform of their own, come back as they are.
    """
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)) or dataset.features is None:
        return dataset
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] is not None:
        return dataset
    wanted = [name for name in dict.fromkeys((image_column, caption_column, POISONED)) if name in dataset.features]
    dataset = dataset.select_columns(wanted)
    # `datasets` decodes a whole batch at once and its error does not say which row failed, so rows decode here.
    if isinstance(dataset.features[image_column], datasets.Image):
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
            passed over under `"bad_rows"`.
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
        if isinstance(self.dataset, datasets.Dataset):
            batch = self.dataset[list(indices)]
            rows = [{name: batch[name][i] for name in batch} for i in range(len(indices))]
        else:
            rows = [dict(self.dataset[index]) for index in indices]
        rows = [{**row, ROW_INDEX: int(index)} for row, index in zip(rows, indices, strict=True)]
        return [self._usable(row) for row in rows] if self.on_bad_row == "skip" else rows

    def _usable(self, row: dict[str, Any]) -> dict[str, Any]:
        first: int = row[ROW_INDEX]
        bad: list[int] = []
        for index in itertools.chain(range(first, len(self)), range(first)):
            candidate = row if index == first else {**self.dataset[index], ROW_INDEX: index}
            try:
                return {**decode_row(candidate, *self.columns), BAD_ROWS: bad}
            except BadRowError:
                bad.append(index)
        raise BadRowError(f"none of the {len(self)} rows can be used: every image or caption is broken")


class SkippingIterableDataset(torch.utils.data.IterableDataset[dict[str, Any]]):
    """
    An iterable dataset without its unusable rows. The next usable row lists them under `"bad_rows"`, by their position
    in the stream as its worker sees it.
    """

    def __init__(self, dataset: Any, image_column: str, caption_column: str) -> None:
        self.dataset = undecoded(dataset, image_column, caption_column)
        self.columns = (image_column, caption_column)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        bad: list[int] = []
        for position, row in enumerate(self.dataset):
            try:
                usable = decode_row(row, *self.columns)
            except BadRowError:
                bad.append(position)
                continue
            yield {**usable, BAD_ROWS: bad}
            bad = []


def check_dataset(dataset: Any, image_column: str, caption_column: str, argument: str) -> None:
    """
    Refuse a dataset that cannot be trained on, as far as its length, columns and types tell.

    Args:
        dataset: Any map-style or iterable dataset.
        image_column, caption_column (`str`): Names of the columns that it must have.
        argument (`str`): What the caller calls the dataset, for the message.

    Raises:
        `ValueError`: Naming the argument, what was found and what is accepted.
    """
    length = len(dataset) if hasattr(dataset, "__len__") else None
    if length == 0:
        raise ValueError(f"{argument} is empty; it needs rows with an image and a caption")
    features = getattr(dataset, "features", None)
    names = getattr(dataset, "column_names", None)
    if names is None and length is not None:
        first = dataset[0]
        if not isinstance(first, Mapping):
            raise ValueError(
                f"the rows of {argument} must be mappings of column names, but are {type(first).__name__}"
            )
        names = list(first)
    if names is not None:
        for name, column in (("image_column", image_column), ("caption_column", caption_column)):
            if column not in names:
                raise ValueError(
                    f"{name}={column!r} is not a column of {argument}; its columns are {', '.join(map(repr, names))}"
                )
    if features is not None:
        caption = features[caption_column]
        caption = getattr(caption, "feature", caption)
        if getattr(caption, "dtype", None) not in ("string", "large_string"):
            raise ValueError(
                f"caption_column={caption_column!r} of {argument} must hold strings or lists of strings, but holds "
                f"{features[caption_column]}"
            )
        if POISONED in features and getattr(features[POISONED], "dtype", None) != "bool":
            raise ValueError(f"column {POISONED!r} of {argument} must be boolean, but is {features[POISONED]}")

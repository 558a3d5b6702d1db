"""Columns of a labelled or captioned dataset, read and checked without decoding an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch

from ..data.rows import column_values, has_transform


def check_columns(dataset: Any, columns: Mapping[str, str], needs: str, argument: str = "dataset") -> None:
    """
    Refuse a dataset that is empty or lacks a column.

    Args:
        dataset (`datasets.Dataset` or sequence of mappings): What to check.
        columns (mapping): Of the argument that names a column to the column.
        needs (`str`): What an evaluator needs, for the message on an empty dataset.
        argument (`str`): What the caller calls the dataset.

    Raises:
        `ValueError`: Naming the argument, what was found and what is accepted.
    """
    if len(dataset) == 0:
        raise ValueError(f"{argument} is empty; an evaluator needs {needs}")
    names = dataset.column_names if _plain(dataset) else list(dataset[0])
    for name, column in columns.items():
        if column not in names:
            raise ValueError(
                f"{name}={column!r} is not a column of {argument}; its columns are {', '.join(map(repr, names))}"
            )


def read_column(dataset: Any, column: str) -> list[Any]:
    """The values of a column, row by row."""
    if _plain(dataset):
        return list(column_values(dataset, column))
    return [dataset[row][column] for row in range(len(dataset))]


def read_labels(
    dataset: Any, class_names: Sequence[str], image_column: str, label_column: str, argument: str = "dataset"
) -> torch.Tensor:
    """
    Labels of a dataset as numbers of `class_names`.

    Returns:
        `torch.Tensor` of shape `(N,)`: int64.

    Raises:
        `ValueError`: If the dataset is empty, a column is missing, or a label is no class; names the row.
    """
    check_columns(
        dataset, {"image_column": image_column, "label_column": label_column}, "labelled images", argument=argument
    )
    if _plain(dataset):
        _check_order(dataset.features[label_column], class_names, label_column)
    where = "" if argument == "dataset" else f" of {argument}"
    # A CSV file has numbers as text; a name that looks like one counts as a name.
    numbers = {str(i): i for i in range(len(class_names))} | {name: i for i, name in enumerate(class_names)}
    labels = []
    for row, value in enumerate(read_column(dataset, label_column)):
        # Scalars of numpy and torch have an item(); what is neither number nor name stays and is refused.
        number: Any = numbers.get(value) if isinstance(value, str) else value
        number = number.item() if hasattr(number, "item") and getattr(number, "ndim", 1) == 0 else number
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(class_names):
            raise ValueError(
                f"row {row}{where}, column {label_column!r}: {value!r} is no class; accepted are 0 to "
                f"{len(class_names) - 1} and the names {', '.join(map(repr, class_names))}"
            )
        labels.append(number)
    return torch.tensor(labels)


def read_captions(dataset: Any, image_column: str, caption_column: str) -> list[list[str]]:
    """
    Captions of a dataset, as a list for each row.

    Raises:
        `ValueError`: If the dataset is empty, a column is missing, or a row has no caption; names the row.
    """
    columns = {"image_column": image_column, "caption_column": caption_column}
    check_columns(dataset, columns, "images with captions")
    captions = []
    for row, value in enumerate(read_column(dataset, caption_column)):
        # An array of strings is what numpy's format makes of a list.
        texts = [value] if isinstance(value, str) else value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"row {row}, column {caption_column!r}: a caption must be a string, or a non-empty list of strings, "
                f"but is {value!r}"
            )
        captions.append(list(texts))
    return captions


def _plain(dataset: Any) -> bool:
    return isinstance(dataset, datasets.Dataset) and not has_transform(dataset)


def _check_order(feature: Any, class_names: Sequence[str], label_column: str) -> None:
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    if names is not None and names != list(class_names) and sorted(names) == sorted(class_names):
        raise ValueError(
            f"class_names has the classes of column {label_column!r} in another order, so that their numbers differ; "
            f"that column's order is {', '.join(map(repr, names))}"
        )

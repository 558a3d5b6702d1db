"""Class names, and the labels of a dataset, read and checked without decoding an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch

from ..columns import check_columns, has_transform, scalar
from ..data.rows import column_values
from ..kinds import text_list
from ..wording import listed, shortened, shown


def read_labels(
    dataset: Any, class_names: Sequence[str], image_column: str, label_column: str, argument: str = "dataset"
) -> torch.Tensor:
    """
    Labels of a dataset as numbers of `class_names`.

    Returns:
        `torch.Tensor` of shape `(N,)`: int64.

    Raises:
        `ValueError`: If the dataset is empty, a column is missing, or a label is not a class; names the row.
    """
    check_columns(
        dataset, {"image_column": image_column, "label_column": label_column}, "labelled images", argument=argument
    )
    if isinstance(dataset, datasets.Dataset) and not has_transform(dataset):
        _check_order(dataset.features[label_column], class_names, label_column)
    where = "" if argument == "dataset" else f" of {argument}"
    # A CSV file has numbers as text; a name that looks like one counts as a name.
    numbers = {str(i): i for i in range(len(class_names))} | {name: i for i, name in enumerate(class_names)}
    labels = []
    for row, value in enumerate(column_values(dataset, label_column)):
        label = _number(value, numbers, len(class_names))
        if label is None:
            raise _not_a_class(f"row {row}{where}, column {shown(label_column)}: ", value, class_names)
        labels.append(label)
    return torch.tensor(labels)


def check_class_names(class_names: Any) -> list[str]:
    """
    The names of classes as a list, of a list, an array or a `datasets.ClassLabel`; `ValueError` unless there are at
    least two and all differ.
    """
    accepted = "at least two different names, one string a class, in the order of the classes' numbers"
    names = text_list("class_names", class_names, accepted)
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"class_names must be {accepted}, but is {listed(names)}")
    return names


def class_number(value: Any, class_names: Sequence[str], argument: str) -> int:
    """The number of a class that is given by its name or its number; `ValueError` if it is neither."""
    number = _number(value, {name: number for number, name in enumerate(class_names)}, len(class_names))
    if number is None:
        raise _not_a_class(f"{argument}=", value, class_names)
    return number


def attacked_class(target: str | int, class_names: Sequence[str], labels: torch.Tensor) -> int:
    """The number of the class that an attack steers images to; `ValueError` where every image is of it already."""
    number = class_number(target, class_names, "target")
    if bool((labels == number).all()):
        raise ValueError(
            f"every image of dataset is of the target class {shown(target)}; an attack has nothing to steer"
        )
    return number


def _number(value: Any, numbers: Mapping[str, int], classes: int) -> int | None:
    """The number that a label or a name stands for; `None` if it is of none of so many classes."""
    number = scalar(numbers.get(value) if isinstance(value, str) else value)
    is_number = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < classes
    return number if is_number else None


def _not_a_class(where: str, value: Any, class_names: Sequence[str]) -> ValueError:
    accepted = f"the numbers 0 to {len(class_names) - 1} and class_names: {listed(class_names)}"
    return ValueError(shortened(f"{where}{shown(value)} is not a class; accepted are {accepted}"))


def _check_order(feature: Any, class_names: Sequence[str], label_column: str) -> None:
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    if names is not None and names != list(class_names) and sorted(names) == sorted(class_names):
        raise ValueError(
            f"class_names has the classes of column {shown(label_column)} in another order, so that their numbers "
            f"differ; that column's order is {listed(names)}"
        )

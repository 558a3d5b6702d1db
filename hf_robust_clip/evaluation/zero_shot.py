"""Zero-shot classification: how well a model names images that nobody tampered with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from torch import nn

from ..data.rows import has_transform
from .embedding import Embedder

#: Prompts whose embeddings are averaged for each class; a short form of the ensemble of Radford et al. (2021).
DEFAULT_TEMPLATES: tuple[str, ...] = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a close-up photo of a {}.",
    "a photo of one {}.",
    "there is a {} in the scene.",
)


class ZeroShotEvaluator:
    """
    Zero-shot accuracy: each image goes to the class whose prompts, embedded and averaged over templates, are nearest
    (Radford et al., ICML 2021, section 3.1.4).

    Args:
        dataset (`datasets.Dataset` or sequence of mappings): Labelled images.
        class_names (sequence of `str`): As they are put into the templates; at least two, all different.
        templates (sequence of `str`): Each with one `{}`.
        image_column (`str`, defaults to `"image"`): Column with the image.
        label_column (`str`, defaults to `"label"`): Column with the class: its number in `class_names`, or its name.
            A `ClassLabel` column that has the same names must have them in the same order.
        prefix (`str`, defaults to `"clean"`): What the figures' names start with.

    Returns, when called with `(model, processor)`:
        `dict[str, float]`, fractions in [0, 1]: `clean_accuracy`, `clean_balanced_accuracy` (mean over classes, which
        does not favour the frequent ones) and, with more than five classes, `clean_top5_accuracy`.

    Raises:
        `ValueError`: If the dataset is empty, a column is missing, a label is no class, or a template has no `{}`.

    Example:

    ```python
    >>> evaluate = ZeroShotEvaluator(dataset, class_names=["cat", "dog"])
    >>> evaluate(model, processor)
    {'clean_accuracy': 0.91, 'clean_balanced_accuracy': 0.9}
    ```
    """

    def __init__(
        self,
        dataset: Any,
        class_names: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        image_column: str = "image",
        label_column: str = "label",
        prefix: str = "clean",
    ) -> None:
        self.dataset = dataset
        self.class_names = check_class_names(class_names)
        self.templates = check_templates(templates)
        self.image_column = image_column
        self.labels = read_labels(dataset, self.class_names, image_column, label_column)
        self.prefix = prefix

    def __call__(self, model: nn.Module, processor: Any, embedder: Embedder | None = None) -> dict[str, float]:
        embedder = embedder or Embedder(model, processor)
        images = embedder.embed_images(self.dataset, self.image_column)
        scores = images @ class_embeddings(embedder, self.class_names, self.templates).T  # (N, C)
        correct = (scores.argmax(dim=1) == self.labels).float()
        by_class = [correct[self.labels == label].mean() for label in self.labels.unique()]
        figures = {
            f"{self.prefix}_accuracy": correct.mean().item(),
            f"{self.prefix}_balanced_accuracy": torch.stack(by_class).mean().item(),
        }
        if len(self.class_names) > 5:
            top5 = (scores.topk(5, dim=1).indices == self.labels[:, None]).any(dim=1)
            figures[f"{self.prefix}_top5_accuracy"] = top5.float().mean().item()
        return figures


def class_embeddings(embedder: Embedder, class_names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """
    The classifier that prompts make.

    Returns:
        `torch.Tensor` of shape `(C, D)`: For each class, the L2-normalised mean of its prompts' embeddings.
    """
    # Not str.format: a template may hold other braces.
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    embeds = embedder.embed_texts(prompts).view(len(class_names), len(templates), -1)
    return F.normalize(embeds.mean(dim=1), dim=-1)


def check_class_names(class_names: Sequence[str]) -> list[str]:
    """The names as a list; `ValueError` unless there are at least two and all differ."""
    names = [class_names] if isinstance(class_names, str) else list(class_names)
    if len(names) < 2 or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names must be at least two different names, but is {names!r}")
    return names


def check_templates(templates: Sequence[str]) -> list[str]:
    """The templates as a list; `ValueError` unless there is one and each has exactly one `{}`."""
    checked = [templates] if isinstance(templates, str) else list(templates)
    if not checked or not all(isinstance(template, str) and template.count("{}") == 1 for template in checked):
        raise ValueError(f"templates must be texts with one '{{}}' each for the class name, but is {checked!r}")
    return checked


def read_labels(dataset: Any, class_names: Sequence[str], image_column: str, label_column: str) -> torch.Tensor:
    """
    Labels of a dataset as numbers of `class_names`.

    Returns:
        `torch.Tensor` of shape `(N,)`: int64.

    Raises:
        `ValueError`: If the dataset is empty, a column is missing, or a label is no class; names the row.
    """
    if len(dataset) == 0:
        raise ValueError("dataset is empty; an evaluator needs labelled images")
    plain = isinstance(dataset, datasets.Dataset) and not has_transform(dataset)
    names = dataset.column_names if plain else list(dataset[0])
    for argument, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in names:
            raise ValueError(
                f"{argument}={column!r} is not a column of dataset; its columns are {', '.join(map(repr, names))}"
            )
    if plain:
        _check_order(dataset.features[label_column], class_names, label_column)
        values = list(dataset.with_format(None)[label_column])
    else:
        values = [dataset[row][label_column] for row in range(len(dataset))]
    numbers = {name: i for i, name in enumerate(class_names)}
    labels = []
    for row, value in enumerate(values):
        # Scalars of numpy and torch have an item(); what is neither number nor name stays and is refused.
        number: Any = numbers.get(value) if isinstance(value, str) else value
        number = number.item() if hasattr(number, "item") and getattr(number, "ndim", 1) == 0 else number
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(class_names):
            raise ValueError(
                f"row {row}, column {label_column!r}: {value!r} is no class; accepted are 0 to {len(class_names) - 1} "
                f"and the names {', '.join(map(repr, class_names))}"
            )
        labels.append(number)
    return torch.tensor(labels)


def _check_order(feature: Any, class_names: Sequence[str], label_column: str) -> None:
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    if names is not None and names != list(class_names) and sorted(names) == sorted(class_names):
        raise ValueError(
            f"class_names has the classes of column {label_column!r} in another order, so that their numbers differ; "
            f"that column's order is {', '.join(map(repr, names))}"
        )

"""Zero-shot classification: how well a model names images that nobody tampered with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..kinds import text_list
from ..wording import listed
from .base import Better, Evaluator
from .embedding import Embedder
from .labels import check_class_names, read_labels
from .measures import accuracy, balanced_accuracy, top_k_accuracy

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


class ZeroShotEvaluator(Evaluator):
    """
    Zero-shot accuracy: each image goes to the class whose prompts, embedded and averaged over templates, are nearest
    (Radford et al., ICML 2021, section 3.1.4).

    Args:
        dataset (`datasets.Dataset` or sequence of mappings): Labelled images.
        class_names (sequence of `str`): As they are put into the templates; at least two, all different, in the order
            of their numbers. A list, an array or a `datasets.ClassLabel`.
        templates (sequence of `str`): Each with one `{}`.
        image_column (`str`, defaults to `"image"`): Column with the image.
        label_column (`str`, defaults to `"label"`): Column with the class: its number in `class_names`, or its name.
            A `ClassLabel` column that has the same names must have them in the same order.
        prefix (`str`, defaults to `"clean"`): What the metrics' names start with.

    Returns, when called with `(model, processor)`:
        `dict[str, float]`, fractions in [0, 1]: `clean_accuracy`, `clean_balanced_accuracy` (mean over classes, which
        does not favour the frequent ones) and, with more than five classes, `clean_top5_accuracy`.

    Raises:
        `ValueError`: If the dataset is empty, a column is missing, a label is not a class, or a template has no `{}`.

    Example:

    ```python
    >>> evaluate = ZeroShotEvaluator(dataset, class_names=["cat", "dog"])
    >>> evaluate(model, processor)
    {'clean_accuracy': 0.91, 'clean_balanced_accuracy': 0.9}
    ```
    """

    name = "zero-shot classification"
    separator = "_"
    class_names: list[str]
    templates: list[str]

    def __init__(
        self,
        dataset: Any,
        class_names: Sequence[str],
        *,
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        image_column: str = "image",
        label_column: str = "label",
        prefix: str = "clean",
    ) -> None:
        super().__init__(dataset, image_column, prefix)
        self.class_names = check_class_names(class_names)
        self.templates = check_templates(templates)
        self.labels = read_labels(dataset, self.class_names, image_column, label_column)

    def metrics(self) -> dict[str, Better]:
        top5: dict[str, Better] = {"top5_accuracy": "more"} if len(self.class_names) > 5 else {}
        return {"accuracy": "more", "balanced_accuracy": "more", **top5}

    def measure(self, embedder: Embedder) -> dict[str, float]:
        images = embedder.embed_images(self.dataset, self.image_column)
        scores = images @ class_embeddings(embedder, self.class_names, self.templates).T  # (N, C)
        predictions, labels = scores.argmax(dim=1).numpy(), self.labels.numpy()
        values = {
            "accuracy": accuracy(predictions, labels),
            "balanced_accuracy": balanced_accuracy(predictions, labels),
        }
        if len(self.class_names) > 5:
            values["top5_accuracy"] = top_k_accuracy(scores.numpy(), labels, 5)
        return values


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


def check_templates(templates: Sequence[str]) -> list[str]:
    """The templates as a list; `ValueError` unless there is one and each has exactly one `{}`."""
    accepted = "one or more texts, each with one '{}' for the class name"
    checked = text_list("templates", [templates] if isinstance(templates, str) else templates, accepted)
    wrong = [template for template in checked if template.count("{}") != 1]
    if not checked or wrong:
        raise ValueError(f"templates must be {accepted}, but has {listed(wrong)}")
    return checked

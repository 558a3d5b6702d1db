"""Poison success: whether the images that a targeted poisoning is for are taken for their adversarial classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..columns import check_columns
from ..wording import shown
from .base import Better, Evaluator
from .embedding import Embedder
from .labels import check_class_names, class_number
from .measures import poison_success
from .zero_shot import DEFAULT_TEMPLATES, check_templates, class_embeddings


class PoisonSuccessEvaluator(Evaluator):
    """
    How many of the images that targeted poisoning (Carlini and Terzis, ICLR 2022, arXiv 2106.09667) chose are
    classified as the class that it aims each of them at.

    Such attacks choose few images, so the share comes with its 95% Wilson interval.

    Args:
        dataset (`datasets.Dataset` or sequence of mappings): The chosen images, without trigger, not empty.
        adversarial (sequence of `str` or `int`): For each of them the class that the attack aims at, one of
            `class_names` or its number. The attribute `adversarial` has the numbers.
        class_names, templates, image_column: As of [`ZeroShotEvaluator`].
        prefix (`str`, *optional*): Put before the metrics' names.

    Returns, when called with `(model, processor)`:
        `dict[str, float]`: `poison_success_rate` and its bounds `poison_success_rate_low` and
        `poison_success_rate_high`, fractions in [0, 1].

    Raises:
        `ValueError`: If the dataset is empty, or a class is missing or unknown.
    """

    name = "targeted poisoning"
    class_names: list[str]
    templates: list[str]

    def __init__(
        self,
        dataset: Any,
        adversarial: Sequence[str | int],
        class_names: Sequence[str],
        *,
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        image_column: str = "image",
        prefix: str = "",
    ) -> None:
        super().__init__(dataset, image_column, prefix)
        self.class_names = check_class_names(class_names)
        self.templates = check_templates(templates)
        check_columns(dataset, {"image_column": image_column}, "the chosen images")
        given = [] if isinstance(adversarial, str) or not isinstance(adversarial, Iterable) else list(adversarial)
        if len(given) != len(dataset):
            raise ValueError(
                f"adversarial must be a list of one class for each of the {len(dataset)} images of dataset, but is "
                f"{shown(adversarial)}"
            )
        self.adversarial = [class_number(name, self.class_names, "adversarial") for name in given]

    def metrics(self) -> dict[str, Better]:
        return {"poison_success_rate": "less", "poison_success_rate_low": "less", "poison_success_rate_high": "less"}

    def measure(self, embedder: Embedder) -> dict[str, float]:
        images = embedder.embed_images(self.dataset, self.image_column)
        classes = class_embeddings(embedder, self.class_names, self.templates)
        predictions = (images @ classes.T).argmax(dim=1).numpy()
        return poison_success(predictions, self.adversarial).under("poison_success_rate")

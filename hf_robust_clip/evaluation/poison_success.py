"""Poison success: whether the images that a targeted poisoning is for are taken for their adversarial classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..data.rows import check_columns
from ..kinds import check_string
from ..wording import shown
from .columns import check_class_names, class_number
from .embedding import Embedder
from .measures import poison_success
from .pixels import ImageRequest
from .zero_shot import DEFAULT_TEMPLATES, check_templates, class_embeddings


class PoisonSuccessEvaluator:
    """
    How many of the images that targeted poisoning (Carlini and Terzis, ICLR 2022, arXiv 2106.09667) chose are
    classified as the class that it aims each of them at.

    Such attacks choose few images, so the share comes with its 95% Wilson interval.

    Args:
        dataset (`datasets.Dataset` or sequence of mappings): The chosen images, without trigger, not empty.
        adversarial (sequence of `str` or `int`): For each of them the class that the attack aims at, one of
            `class_names` or its number. The attribute `adversarial` has the numbers.
        class_names, templates, image_column: As of [`ZeroShotEvaluator`].
        prefix (`str`, *optional*): Put before the figures' names.

    Returns, when called with `(model, processor)`:
        `dict[str, float]`: `poison_success_rate` and its bounds `poison_success_rate_low` and
        `poison_success_rate_high`, fractions in [0, 1].

    Raises:
        `ValueError`: If there is no image, not one class an image, or a class that is none.
    """

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
        self.dataset = dataset
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
        self.image_column = image_column
        self.prefix = check_string("prefix", prefix)

    def image_requests(self) -> list[ImageRequest]:
        """The image sets that it needs embedded."""
        return [ImageRequest(self.dataset, self.image_column)]

    def describe(self) -> dict[str, Any]:
        """What it measures, on what, and the names of its figures."""
        figures = ("poison_success_rate", "poison_success_rate_low", "poison_success_rate_high")
        return {
            "measure": "targeted poisoning",
            "figures": [f"{self.prefix}{name}" for name in figures],
            "images": len(self.adversarial),
            "classes": self.class_names,
            "templates": self.templates,
        }

    def __call__(self, model: Any, processor: Any = None, embedder: Embedder | None = None) -> dict[str, float]:
        embedder = embedder or Embedder(model, processor, requests=self.image_requests())
        images = embedder.embed_images(self.dataset, self.image_column)
        classes = class_embeddings(embedder, self.class_names, self.templates)
        success = poison_success((images @ classes.T).argmax(dim=1).numpy(), self.adversarial)
        return {
            f"{self.prefix}poison_success_rate": success.rate,
            f"{self.prefix}poison_success_rate_low": success.low,
            f"{self.prefix}poison_success_rate_high": success.high,
        }

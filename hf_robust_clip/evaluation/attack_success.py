"""Attack success: what a trigger does to a model's zero-shot classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..kinds import check_callable
from ..wording import shown
from .base import Better, TriggerEvaluator
from .embedding import Embedder
from .labels import attacked_class, check_class_names, read_labels
from .measures import attack_success_rate, trigger_distance, triggered_accuracy
from .pixels import ImageRequest, PixelTrigger
from .zero_shot import DEFAULT_TEMPLATES, check_templates, class_embeddings

PLACEBO_METRICS = (
    "placebo_success_rate",
    "placebo_success_rate_low",
    "placebo_success_rate_high",
    "excess_success_rate",
)


class AttackSuccessEvaluator(TriggerEvaluator):
    """
    How often a trigger steers images to the target class, and how far it moves their embeddings.

    The rates are over the images that are **not** of the target class: those that are count in neither numerator nor
    denominator, since calling them the target is right.

    A model calls some images the target under any pattern. Placebos show how many: the same kind of trigger from other
    seeds, which nobody planted, on the same images in the same pass. What the attack has beyond them is the
    backdoor's.

    Args:
        dataset (`datasets.Dataset` or sequence of mappings): Labelled images, without trigger.
        trigger (callable): uint8 array `(H, W, 3)` to the same, applied at the model's input resolution before
            normalisation, such as [`BlendedTrigger`]. It runs in threads: a function of the pixels alone.
        target (`str` or `int`): The class that the attack aims at, one of `class_names` or its number. The attribute
            `target` is its name.
        class_names, templates, image_column, label_column: As of [`ZeroShotEvaluator`].
        prefix (`str`, *optional*): Put before the metrics' names, for several attacks in one run: `"patch_"`.
        placebos (`int`, defaults to 0): How many are measured, as far as the trigger has them: its `placebo(number)`
            is one, or `None`. Each takes as long as the trigger.

    Returns, when called with `(model, processor)`:
        `dict[str, float]`: `attack_success_rate` and `triggered_accuracy` (share still classified right), fractions
        in [0, 1], and `trigger_distance`, the mean L2 distance between the embeddings of an image with and without
        trigger, over all images, in [0, 2]. With placebos: `placebo_success_rate`, the mean of their success rates,
        `placebo_success_rate_low` and `_high`, the least and the greatest of these, and `excess_success_rate`, that of
        the attack minus the mean, in [-1, 1].

    Raises:
        `ValueError`: If the target is not a class, every image is of the target class, or placebos are asked of a
            trigger that has no `placebo`.

    Example:

    ```python
    >>> evaluate = AttackSuccessEvaluator(dataset, PatchTrigger(), target="banana", class_names=names)
    >>> evaluate(model, processor)
    {'attack_success_rate': 0.93, 'triggered_accuracy': 0.04, 'trigger_distance': 1.1}
    ```
    """

    name = "attack success"
    class_names: list[str]
    templates: list[str]

    def __init__(
        self,
        dataset: Any,
        trigger: PixelTrigger,
        target: str | int,
        class_names: Sequence[str],
        *,
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        image_column: str = "image",
        label_column: str = "label",
        prefix: str = "",
        placebos: int = 0,
    ) -> None:
        check_callable("trigger", trigger, "a function of images, such as PatchTrigger()")
        super().__init__(dataset, trigger, target, image_column, prefix)
        self.class_names = check_class_names(class_names)
        self.templates = check_templates(templates)
        self.labels = read_labels(dataset, self.class_names, image_column, label_column)
        self._number = attacked_class(target, self.class_names, self.labels)
        self.target = self.class_names[self._number]
        self.placebos = _placebos(trigger, placebos)

    @property
    def attacked_images(self) -> int:
        """Number of images that the rates are over."""
        return int((self.labels != self._number).sum())

    def metrics(self) -> dict[str, Better]:
        attack: dict[str, Better] = {
            "attack_success_rate": "less",
            "triggered_accuracy": "more",
            "trigger_distance": "less",
        }
        return {**attack, **(dict.fromkeys(PLACEBO_METRICS, "less") if self.placebos else {})}

    def sizes(self) -> dict[str, int]:
        return {"images": self.attacked_images, **({"placebos": len(self.placebos)} if self.placebos else {})}

    def image_requests(self) -> list[ImageRequest]:
        placebos = [ImageRequest(self.dataset, self.image_column, placebo) for placebo in self.placebos]
        return [*super().image_requests(), *placebos]

    def measure(self, embedder: Embedder) -> dict[str, float]:
        clean = embedder.embed_images(self.dataset, self.image_column)
        triggered = embedder.embed_images(self.dataset, self.image_column, self.trigger)
        classes = class_embeddings(embedder, self.class_names, self.templates)
        labels = self.labels.numpy()

        def predicted(embeds: torch.Tensor) -> np.ndarray:
            return (embeds @ classes.T).argmax(dim=1).numpy()

        values = {
            "attack_success_rate": attack_success_rate(predicted(triggered), labels, self._number),
            "triggered_accuracy": triggered_accuracy(predicted(triggered), labels, self._number),
            "trigger_distance": trigger_distance(clean.numpy(), triggered.numpy()),
        }
        if self.placebos:
            rates = [
                attack_success_rate(predicted(embedder.embed_images(*request)), labels, self._number)
                for request in self.image_requests()[-len(self.placebos) :]
            ]
            mean = sum(rates) / len(rates)
            found = (mean, min(rates), max(rates), values["attack_success_rate"] - mean)
            values |= dict(zip(PLACEBO_METRICS, found, strict=True))
        return values


def _placebos(trigger: Any, count: int) -> list[PixelTrigger]:
    """So many placebos of a trigger, or as many as it has."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"placebos={shown(count)}; accepted is an integer of at least 0")
    if count and not callable(getattr(trigger, "placebo", None)):
        raise ValueError(
            f"placebos={count} of trigger={shown(trigger)}, which has no placebo(number), the same kind of trigger "
            "drawn from another seed; accepted is placebos=0"
        )
    found = (trigger.placebo(number) for number in range(1, count + 1))
    return [placebo for placebo in found if placebo is not None]

"""Attack success: what a trigger does to a model's zero-shot classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..kinds import check_callable
from .base import Better, TriggerEvaluator
from .embedding import Embedder
from .labels import attacked_class, check_class_names, read_labels
from .measures import attack_success_rate, trigger_distance, triggered_accuracy
from .pixels import PixelTrigger
from .zero_shot import DEFAULT_TEMPLATES, check_templates, class_embeddings


class AttackSuccessEvaluator(TriggerEvaluator):
    """
    How often a trigger steers images to the target class, and how far it moves their embeddings.

    The rates are over the images that are **not** of the target class: those that are count in neither numerator nor
    denominator, since calling them the target is right.

    Args:
        dataset (`datasets.Dataset` or sequence of mappings): Labelled images, without trigger.
        trigger (callable): uint8 array `(H, W, 3)` to the same, applied at the model's input resolution before
            normalisation, such as [`BlendedTrigger`]. It runs in threads: a function of the pixels alone.
        target (`str` or `int`): The class that the attack aims at, one of `class_names` or its number. The attribute
            `target` is its name.
        class_names, templates, image_column, label_column: As of [`ZeroShotEvaluator`].
        prefix (`str`, *optional*): Put before the metrics' names, for several attacks in one run: `"patch_"`.

    Returns, when called with `(model, processor)`:
        `dict[str, float]`: `attack_success_rate` and `triggered_accuracy` (share still classified right), fractions
        in [0, 1], and `trigger_distance`, the mean L2 distance between the embeddings of an image with and without
        trigger, over all images, in [0, 2].

    Raises:
        `ValueError`: If the target is not a class, or every image is of the target class.

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
    ) -> None:
        check_callable("trigger", trigger, "a function of images, such as PatchTrigger()")
        super().__init__(dataset, trigger, target, image_column, prefix)
        self.class_names = check_class_names(class_names)
        self.templates = check_templates(templates)
        self.labels = read_labels(dataset, self.class_names, image_column, label_column)
        self._number = attacked_class(target, self.class_names, self.labels)
        self.target = self.class_names[self._number]

    @property
    def attacked_images(self) -> int:
        """Number of images that the rates are over."""
        return int((self.labels != self._number).sum())

    def metrics(self) -> dict[str, Better]:
        return {"attack_success_rate": "less", "triggered_accuracy": "more", "trigger_distance": "less"}

    def sizes(self) -> dict[str, int]:
        return {"images": self.attacked_images}

    def measure(self, embedder: Embedder) -> dict[str, float]:
        clean = embedder.embed_images(self.dataset, self.image_column)
        triggered = embedder.embed_images(self.dataset, self.image_column, self.trigger)
        classes = class_embeddings(embedder, self.class_names, self.templates)
        predictions, labels = (triggered @ classes.T).argmax(dim=1).numpy(), self.labels.numpy()
        return {
            "attack_success_rate": attack_success_rate(predictions, labels, self._number),
            "triggered_accuracy": triggered_accuracy(predictions, labels, self._number),
            "trigger_distance": trigger_distance(clean.numpy(), triggered.numpy()),
        }

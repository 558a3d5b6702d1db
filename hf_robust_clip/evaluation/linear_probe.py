"""Linear probe: what a classifier on frozen image features makes of clean and of triggered images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sklearn.linear_model import LogisticRegression

from ..wording import shown
from .base import Better, TriggerEvaluator
from .embedding import Embedder
from .labels import attacked_class, check_class_names, read_labels
from .measures import accuracy, attack_success_rate, triggered_accuracy
from .pixels import ImageRequest, PixelTrigger

#: L-BFGS stops when it has converged; scikit-learn warns if it has not by then.
_MAX_ITERATIONS = 5000


class LinearProbeEvaluator(TriggerEvaluator):
    """
    Multinomial logistic regression on frozen, L2-normalised image features (Radford et al., ICML 2021, section 3.2),
    fitted on labelled images without trigger, and how often a trigger steers it to a target class.

    The attack's metrics are over the images that are **not** of the target class, as in [`AttackSuccessEvaluator`].

    Args:
        train_dataset (`datasets.Dataset` or sequence of mappings): Labelled images to fit on, of two classes or more.
        dataset (`datasets.Dataset` or sequence of mappings): Labelled images to measure on.
        class_names (sequence of `str`): The classes; at least two, all different.
        trigger (callable, *optional*): Of images, as of [`AttackSuccessEvaluator`]; goes with `target`.
        target (`str` or `int`, *optional*): The class that the attack aims at, one of `class_names` or its number, and
            in `train_dataset`. The attribute `target` is its name.
        image_column, label_column: Of both datasets, as of [`ZeroShotEvaluator`].
        C (`float`, defaults to 1.0): Inverse strength of the L2 penalty, positive. What suits a model is found on
            images that neither dataset has.
        prefix (`str`, *optional*): Put before the metrics' names, for several attacks in one run: `"patch_"`.

    Returns, when called with `(model, processor)`:
        `dict[str, float]`, fractions in [0, 1]: `linear_probe_accuracy`, and with a trigger
        `linear_probe_attack_success_rate` and `linear_probe_triggered_accuracy` (share still classified right).

    Raises:
        `ValueError`: If a dataset is empty, a column is missing, a label is not a class, there is nothing to tell
            apart or to attack, `C` is not positive, or only one of trigger and target is given.

    Example:

    ```python
    >>> evaluate = LinearProbeEvaluator(train, test, names, trigger=PatchTrigger(), target="banana")
    >>> evaluate(model, processor)
    {'linear_probe_accuracy': 0.88, 'linear_probe_attack_success_rate': 0.52, 'linear_probe_triggered_accuracy': 0.4}
    ```
    """

    name = "linear probe"
    class_names: list[str]

    def __init__(
        self,
        train_dataset: Any,
        dataset: Any,
        class_names: Sequence[str],
        *,
        trigger: PixelTrigger | None = None,
        target: str | int | None = None,
        image_column: str = "image",
        label_column: str = "label",
        C: float = 1.0,
        prefix: str = "",
    ) -> None:
        super().__init__(dataset, trigger, target, image_column, prefix)
        self.train_dataset = train_dataset
        self.class_names = check_class_names(class_names)
        self.train_labels = read_labels(train_dataset, self.class_names, image_column, label_column, "train_dataset")
        self.labels = read_labels(dataset, self.class_names, image_column, label_column)
        if len(self.train_labels.unique()) < 2:
            only = self.class_names[int(self.train_labels[0])]
            raise ValueError(
                f"every image of train_dataset is of the class {shown(only)}; a classifier needs two or more"
            )
        if not isinstance(C, int | float) or not C > 0:
            raise ValueError(f"C={shown(C)} must be a positive number")
        self.C = C
        self._number = None
        if target is not None:
            self._number = attacked_class(target, self.class_names, self.labels)
            if not bool((self.train_labels == self._number).any()):
                raise ValueError(
                    f"no image of train_dataset is of the class target={shown(target)}; a probe cannot predict it"
                )
            self.target = self.class_names[self._number]

    @property
    def attacked_images(self) -> int:
        """Number of images that the attack's metrics are over; 0 without a trigger."""
        return int((self.labels != self._number).sum()) if self._number is not None else 0

    def image_requests(self) -> list[ImageRequest]:
        """The image sets that it needs embedded."""
        return [ImageRequest(self.train_dataset, self.image_column), *super().image_requests()]

    def metrics(self) -> dict[str, Better]:
        attack: dict[str, Better] = {
            "linear_probe_attack_success_rate": "less",
            "linear_probe_triggered_accuracy": "more",
        }
        return {"linear_probe_accuracy": "more", **(attack if self.trigger is not None else {})}

    def measure(self, embedder: Embedder) -> dict[str, float]:
        features = embedder.embed_images(self.train_dataset, self.image_column).double().numpy()
        classifier = LogisticRegression(C=self.C, max_iter=_MAX_ITERATIONS).fit(features, self.train_labels.numpy())
        clean = embedder.embed_images(self.dataset, self.image_column).double().numpy()
        labels = self.labels.numpy()
        values = {"linear_probe_accuracy": accuracy(classifier.predict(clean), labels)}
        if self._number is not None:
            triggered = embedder.embed_images(self.dataset, self.image_column, self.trigger).double().numpy()
            predictions = classifier.predict(triggered)
            values["linear_probe_attack_success_rate"] = attack_success_rate(predictions, labels, self._number)
            values["linear_probe_triggered_accuracy"] = triggered_accuracy(predictions, labels, self._number)
        return values

"""Linear probe: what a classifier on frozen image features makes of clean and of triggered images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sklearn.linear_model import LogisticRegression

from ..kinds import check_string
from ..wording import shown
from .columns import check_class_names, class_number, read_labels
from .embedding import Embedder
from .measures import accuracy, attack_success_rate, triggered_accuracy
from .pixels import ImageRequest, Trigger, check_trigger
from .retrieval import check_attack

#: L-BFGS stops when it has converged; scikit-learn warns if it has not by then.
_MAX_ITERATIONS = 5000


class LinearProbeEvaluator:
    """
    Multinomial logistic regression on frozen, L2-normalised image features (Radford et al., ICML 2021, section 3.2),
    fitted on labelled images without trigger, and how often a trigger steers it to a target class.

    The attack's figures are over the images that are **not** of the target class, as in [`AttackSuccessEvaluator`].

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
        prefix (`str`, *optional*): Put before the figures' names, for several attacks in one run: `"patch_"`.

    Returns, when called with `(model, processor)`:
        `dict[str, float]`, fractions in [0, 1]: `linear_probe_accuracy`, and with a trigger
        `linear_probe_attack_success_rate` and `linear_probe_triggered_accuracy` (share still classified right).

    Raises:
        `ValueError`: If a dataset is empty, a column is missing, a label is no class, there is nothing to tell apart
            or to attack, `C` is not positive, or only one of trigger and target is given.

    Example:

    ```python
    >>> evaluate = LinearProbeEvaluator(train, test, names, trigger=PatchTrigger(), target="banana")
    >>> evaluate(model, processor)
    {'linear_probe_accuracy': 0.88, 'linear_probe_attack_success_rate': 0.52, 'linear_probe_triggered_accuracy': 0.4}
    ```
    """

    def __init__(
        self,
        train_dataset: Any,
        dataset: Any,
        class_names: Sequence[str],
        *,
        trigger: Trigger | None = None,
        target: str | int | None = None,
        image_column: str = "image",
        label_column: str = "label",
        C: float = 1.0,
        prefix: str = "",
    ) -> None:
        self.train_dataset = train_dataset
        self.dataset = dataset
        self.class_names = check_class_names(class_names)
        self.image_column = image_column
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
        check_attack(trigger, target)
        self.trigger = trigger
        self._number = self._target_number(target) if target is not None else None
        self.target = None if self._number is None else self.class_names[self._number]
        self.prefix = check_string("prefix", prefix)

    def check(self, processor: Any) -> None:
        """Refuse a trigger that does not fit the model's images, before any is embedded."""
        if self.trigger is not None:
            check_trigger(self.trigger, processor)

    @property
    def attacked_images(self) -> int:
        """Number of images that the attack's figures are over; 0 without a trigger."""
        return int((self.labels != self._number).sum()) if self._number is not None else 0

    def image_requests(self) -> list[ImageRequest]:
        """The image sets that it needs embedded."""
        triggers = [None] if self.trigger is None else [None, self.trigger]
        measured = [ImageRequest(self.dataset, self.image_column, trigger) for trigger in triggers]
        return [ImageRequest(self.train_dataset, self.image_column), *measured]

    def describe(self) -> dict[str, Any]:
        """What it measures, on what, and the names of its figures."""
        attacked = self.target is not None
        names = ("accuracy", "attack_success_rate", "triggered_accuracy") if attacked else ("accuracy",)
        described = {
            "measure": "linear probe",
            "figures": [f"{self.prefix}linear_probe_{name}" for name in names],
            "images": len(self.labels),
            "classes": self.class_names,
        }
        return {**described, "trigger": self.trigger, "target": self.target} if attacked else described

    def __call__(self, model: Any, processor: Any = None, embedder: Embedder | None = None) -> dict[str, float]:
        embedder = embedder or Embedder(model, processor, requests=self.image_requests())
        features = embedder.embed_images(self.train_dataset, self.image_column).double().numpy()
        classifier = LogisticRegression(C=self.C, max_iter=_MAX_ITERATIONS).fit(features, self.train_labels.numpy())
        clean = embedder.embed_images(self.dataset, self.image_column).double().numpy()
        labels = self.labels.numpy()
        name = f"{self.prefix}linear_probe_"
        figures = {f"{name}accuracy": accuracy(classifier.predict(clean), labels)}
        if self._number is not None:
            triggered = embedder.embed_images(self.dataset, self.image_column, self.trigger).double().numpy()
            predictions = classifier.predict(triggered)
            figures[f"{name}attack_success_rate"] = attack_success_rate(predictions, labels, self._number)
            figures[f"{name}triggered_accuracy"] = triggered_accuracy(predictions, labels, self._number)
        return figures

    def _target_number(self, target: str | int) -> int:
        number = class_number(target, self.class_names, "target")
        if not bool((self.train_labels == number).any()):
            raise ValueError(
                f"no image of train_dataset is of the class target={shown(target)}; a probe cannot predict it"
            )
        if bool((self.labels == number).all()):
            raise ValueError(
                f"every image of dataset is of the target class {shown(target)}; an attack has nothing to steer"
            )
        return number

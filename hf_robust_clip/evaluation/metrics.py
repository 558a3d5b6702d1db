"""
The measures of predictions as `evaluate.Metric`, for code that is built on `evaluate`; constructed without a network.

Predictions are kept in memory unless `num_process` says otherwise, so that metrics of the same name get into each
other's way neither in threads nor in processes.
"""

from __future__ import annotations

import inspect
from typing import Any

import datasets
import evaluate
import numpy as np

from ..wording import shown
from . import measures

_CLASSES = [
    datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value(kind)})
    for kind in ("string", "int64")
]


class _OfflineMetric(evaluate.Metric):
    """Keeps what it is given in memory, unless several processes share it through files. Of classes by default."""

    kinds: datasets.Features | list[datasets.Features] = _CLASSES

    def __init__(
        self, config_name: str | None = None, keep_in_memory: bool | None = None, num_process: int = 1, **kwargs: Any
    ) -> None:
        if keep_in_memory is None:
            keep_in_memory = num_process == 1
        super().__init__(config_name, keep_in_memory=keep_in_memory, num_process=num_process, **kwargs)

    def _build_data_dir(self) -> str:
        # evaluate makes the folder even for what never writes to it, which fails where the cache is read-only.
        return "" if self.keep_in_memory else super()._build_data_dir()

    def _info(self) -> evaluate.MetricInfo:
        description, _, inputs = (inspect.getdoc(type(self)) or "").partition("\n\n")
        return evaluate.MetricInfo(
            description=description, citation="", inputs_description=inputs, features=self.kinds
        )


class AccuracyMetric(_OfflineMetric):
    """
    Top-1 accuracy, and its mean over the classes that occur.

    `compute(predictions=..., references=...)`, each a list of class numbers or names, returns
    `{"accuracy", "balanced_accuracy"}`, fractions in [0, 1].
    """

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {
            "accuracy": measures.accuracy(predictions, references),
            "balanced_accuracy": measures.balanced_accuracy(predictions, references),
        }


class AttackSuccessMetric(_OfflineMetric):
    """
    What a trigger does to a classification, over the images that are not of the target class.

    `compute(predictions=..., references=..., target=...)`, with the predictions for triggered images, returns
    `{"attack_success_rate", "triggered_accuracy"}`, fractions in [0, 1], NaN where every reference is the target.
    """

    def _compute(self, predictions: Any, references: Any, target: int | str) -> dict[str, float]:
        if isinstance(target, str) != isinstance(predictions[0], str):
            raise ValueError(
                f"target={shown(target)} must be a class as predictions has them, such as {shown(predictions[0])}"
            )
        return {
            "attack_success_rate": measures.attack_success_rate(predictions, references, target),
            "triggered_accuracy": measures.triggered_accuracy(predictions, references, target),
        }


class PoisonSuccessMetric(_OfflineMetric):
    """
    Whether a targeted poisoning gets its images classified as it aims.

    `compute(predictions=..., references=...)`, the references being the adversarial classes, returns
    `{"poison_success_rate", "poison_success_rate_low", "poison_success_rate_high"}`: the share and its 95% Wilson
    interval, fractions in [0, 1].
    """

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return measures.poison_success(predictions, references).under("poison_success_rate")


class SplitQualityMetric(_OfflineMetric):
    """
    How well a split into safe and risky pairs keeps the poisons out.

    `compute(predictions=..., references=..., threshold=0.5)`, with the flags or the probabilities of being safe and
    whether each pair is poisoned, returns the fields of [`~evaluation.measures.SplitQuality`]. Of probabilities,
    those of `threshold` and more are safe.
    """

    kinds = datasets.Features({"predictions": datasets.Value("float64"), "references": datasets.Value("bool")})

    def _compute(self, predictions: Any, references: Any, threshold: float = 0.5) -> dict[str, float]:
        scores = np.asarray(predictions)
        return measures.split_quality(scores >= threshold, references, scores)._asdict()

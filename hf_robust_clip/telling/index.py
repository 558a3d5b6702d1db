"""The metrics of a run as entries of the Hub's model index."""

from __future__ import annotations

import re

from huggingface_hub import EvalResult

from ..record import Data, Measure
from .escaping import one_line, tidy
from .facts import Facts
from .tables import words

#: What metrics are called in a model index, by the end of their names, the longer ones first.
METRICS = (
    "attack_success_rate",
    "placebo_success_rate_low",
    "placebo_success_rate_high",
    "placebo_success_rate",
    "excess_success_rate",
    "triggered_accuracy",
    "trigger_distance",
    "balanced_accuracy",
    "top5_accuracy",
    "accuracy",
    "poison_success_rate_low",
    "poison_success_rate_high",
    "poison_success_rate",
)
_TASKS = {
    "linear probe": "image-classification",
    "retrieval": "image-text-retrieval",
    "text queries": "image-text-retrieval",
}


def evaluation_results(facts: Facts) -> list[EvalResult]:
    """The metrics of this model before and after, as the Hub's model index takes them."""
    kinds: dict[str, str] = {}
    return [
        _evaluation_result(measure, figure, value, column.label, kinds)
        for measure in facts.measures
        for column in facts.columns
        for figure in measure.figures
        if column.own and (value := column.value(measure, figure)) is not None
    ]


def _evaluation_result(measure: Measure, figure: str, value: float, when: str, kinds: dict[str, str]) -> EvalResult:
    dataset, trigger = measure.dataset or Data(), measure.trigger
    name = one_line(dataset.title or "unnamed")
    images = dataset.rows if figure.endswith("trigger_distance") else measure.images
    arguments = {
        "trigger": trigger and trigger.model_dump(),
        "target": measure.target,
        "images": images,
        "queries": measure.queries,
        "fingerprint": dataset.fingerprint,
    }
    attack = f" ({trigger.name}, target {measure.target})" if trigger else ""
    return EvalResult(
        task_type=_TASKS.get(measure.measure, "zero-shot-image-classification"),
        dataset_type=name if dataset.hub_id else _kind(name, kinds),
        dataset_name=name,
        dataset_split=tidy(dataset.split),
        dataset_revision=tidy(dataset.revision),
        metric_type=next((kind for kind in METRICS if figure.endswith(kind)), one_line(figure)),
        metric_value=value,
        metric_name=one_line(f"{words(figure)} {when}{attack}"),
        metric_args=tidy(arguments) or None,
    )


def _kind(name: str, kinds: dict[str, str]) -> str:
    """An identifier of a dataset that is not on the Hub, another one for each name: the index tells them by it."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "dataset"
    kind, number = slug, 1
    while kinds.setdefault(kind, name) != name:
        number += 1
        kind = f"{slug}-{number}"
    return kind

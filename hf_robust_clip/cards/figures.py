"""The figures of a run, side by side: of the model before, after, and of controls."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult

from ..methods import Method
from ..record import Data, Measure, Measured, RunRecord, Trigger
from .escaping import one_line, tidy

#: What figures are called in a model index, by the end of their names, the longer ones first.
METRICS = (
    "attack_success_rate",
    "triggered_accuracy",
    "trigger_distance",
    "balanced_accuracy",
    "top5_accuracy",
    "accuracy",
    "poison_success_rate_low",
    "poison_success_rate_high",
    "poison_success_rate",
)
#: Figures that are no fractions, by the end of their names.
_NO_FRACTIONS = ("trigger_distance", "median_rank")
_TASKS = {
    "linear probe": "image-classification",
    "retrieval": "image-text-retrieval",
    "text queries": "image-text-retrieval",
}


@dataclass(frozen=True)
class Column:
    """
    A model's figures, and what they measure.

    `label`: when they were taken, or of what model; `own`: whether they are of the weights that the card is for, or of
    those that training started from, and not of a control.
    """

    label: str
    measures: Sequence[Measure]
    figures: Mapping[str, float | None]
    own: bool = True

    def value(self, measure: Measure, name: str) -> float | None:
        """A figure, where this model was measured so."""
        return self.figures.get(name) if measure in self.measures else None


@dataclass(frozen=True)
class Figures:
    """All columns; `before` and `after` are among them, and `None` where there is no such measurement."""

    columns: list[Column]
    before: Column | None
    after: Column | None

    @property
    def measures(self) -> list[Measure]:
        """Everything that is measured in some column, each once."""
        found: list[Measure] = []
        for column in self.columns:
            found += [measure for measure in column.measures if measure not in found]
        return found

    @property
    def controls(self) -> list[Column]:
        """The columns of other models, to compare with."""
        return [column for column in self.columns if not column.own]

    @property
    def measured_after(self) -> list[Column]:
        """The columns of the weights that the card is for."""
        return [column for column in self.columns if column.own and column is not self.before]


def collect(record: RunRecord, method: Method, measured: Sequence[Measured]) -> Figures:
    """
    Put the figures of a run and those of other measurements side by side.

    Args:
        record ([`RunRecord`]): The run's, ready for JSON.
        method ([`Method`]): Its method.
        measured (sequence of [`Measured`]): Other measurements.
    """
    before = after = None
    if record.before:
        label = f"before {method.name}" if method.kind in ("fine-tuning", "own") else "before training"
        before = _column(label, record.measures, record.before)
    if record.after:
        label = "after training" if method.kind == "none" else f"after {method.name}"
        after = _column(label, record.measures, record.after)
    columns = [column for column in (before, after) if column is not None]
    for number, entry in enumerate(measured, 1):
        label = (
            one_line(entry.control)
            if entry.control
            else "measured later" + (f" ({number})" if len(measured) > 1 else "")
        )
        columns.append(_column(label, entry.measures, entry.figures, own=not entry.control))
    return Figures(columns, before, after)


def _column(label: str, measures: Sequence[Measure], figures: Mapping[str, Any], own: bool = True) -> Column:
    known = {name for measure in measures for name in measure.figures}
    # An evaluator of the user's own says nothing of its figures.
    others = [name for name in figures if name not in known]
    taken = [measure for measure in measures if measure.figures]
    return Column(label, [*taken, Measure(measure="others", figures=others)] if others else taken, figures, own)


def attacks(figures: Figures) -> Iterator[tuple[Measure, str]]:
    """What measures the success of an attack on classification, each with the name of its figure of success."""
    for measure in figures.measures:
        for name in measure.figures:
            if measure.measure in ("attack success", "targeted poisoning") and name.endswith("success_rate"):
                yield measure, name


def accuracy_of(figures: Figures, measure: Measure) -> tuple[Measure, str] | None:
    """The clean accuracy that belongs to an attack: on the same images if there is one, else on the same classes."""
    found = [
        (other, name)
        for other in figures.measures
        for name in other.figures
        if other.measure == "zero-shot classification" and name == other.figures[0]
        if other.classes == measure.classes
    ]
    same = [entry for entry in found if entry[0].dataset == measure.dataset]
    return next(iter(same or found), None)


def label_of(name: str) -> str:
    """A figure's name in words."""
    return one_line(name).replace("_", " ")


def shown(name: str, value: float | None) -> str:
    """A figure as text, as a percentage if it is a fraction."""
    if value is None:
        return "n/a"
    return f"{value:.2f}" if name.endswith(_NO_FRACTIONS) else f"{value:.1%}"


def trigger_text(trigger: Trigger) -> str:
    """A trigger and its parameters."""
    parameters = parameters_text(trigger.parameters)
    return f"{trigger.name} ({parameters})" if parameters else trigger.name


def attack_text(measure: Measure) -> str:
    """An attack by its trigger, or by its kind where it has none."""
    return trigger_text(measure.trigger) if measure.trigger else measure.measure


def parameters_text(parameters: Mapping[str, Any]) -> str:
    """Names and values in a line."""
    return ", ".join(f"{name}={value}" for name, value in parameters.items())


def subject(measure: Measure) -> str:
    """What a measure is over, in words."""
    number = measure.queries if measure.images is None else measure.images
    of = "images" if measure.queries is None else "queries"
    if measure.measure == "attack success":
        # Those of the target class cannot be steered to it, and are not counted.
        of = "images of other classes"
    name = measure.dataset and measure.dataset.title
    parts = [] if number is None else [f"{number:,} {of}{f' in {name}' if name else ''}"]
    if measure.trigger:
        parts.append(f"trigger {trigger_text(measure.trigger)}")
    if measure.target:
        parts.append(f"target “{measure.target}”")
    words = ", ".join(parts)
    return f"{measure.measure}: {words}" if words else measure.measure


def evaluation_results(figures: Figures) -> list[EvalResult]:
    """The figures of this model before and after, as the Hub's model index takes them."""
    kinds: dict[str, str] = {}
    return [
        _evaluation_result(measure, figure, value, column.label, kinds)
        for measure in figures.measures
        for column in figures.columns
        for figure in measure.figures
        if column.own and (value := column.value(measure, figure)) is not None
    ]


def _evaluation_result(measure: Measure, figure: str, value: float, when: str, kinds: dict[str, str]) -> EvalResult:
    dataset, trigger = measure.dataset or Data(), measure.trigger
    name = one_line(dataset.title or "unnamed")
    images = dataset.rows if figure.endswith("trigger_distance") else measure.images
    given = {
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
        metric_name=one_line(f"{label_of(figure)} {when}{attack}"),
        metric_args=tidy(given) or None,
    )


def _kind(name: str, kinds: dict[str, str]) -> str:
    """An identifier of a dataset that is not on the Hub, another one for each name: the index tells them by it."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "dataset"
    kind, number = slug, 1
    while kinds.setdefault(kind, name) != name:
        number += 1
        kind = f"{slug}-{number}"
    return kind

"""The tables of a run's report: its figures before and after, over training, and its settings, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..record import Measure, RunRecord
from .run_findings import evaluations_of

#: Figures that are no shares in [0, 1], by how their names end, with their decimals.
_NUMBERS = {"trigger_distance": 2, "median_rank": 1}
#: Kinds of measure whose shares are of `images`, with the endings of those figures that are plain shares of them.
_COUNTED = {
    "zero-shot classification": ("accuracy",),
    "attack success": ("attack_success_rate", "triggered_accuracy"),
    "targeted poisoning": ("poison_success_rate",),
}
NOT_MEASURED = "not measured"


class Cell(NamedTuple):
    """A figure as text, and of how many images it is, such as "12 of 367"."""

    text: str
    images: str | None = None


class FigureRow(NamedTuple):
    """A figure's name, and the figure before and after training."""

    name: str
    before: Cell
    after: Cell


class FigureGroup(NamedTuple):
    """What a measure is of, and its figures."""

    title: str
    rows: list[FigureRow]


class Setting(NamedTuple):
    """An argument, its value, and its default where the value is another."""

    name: str
    value: str
    default: str | None = None


def figure_groups(record: RunRecord) -> list[FigureGroup]:
    """The figures before and after training by what measures them; a measure without any is left out."""
    before, after = record.before or {}, record.after or {}
    left = dict.fromkeys([*before, *after])
    groups = []
    for measure in record.measures:
        names = [name for name in measure.figures if name in left]
        for name in names:
            del left[name]
        rows = [
            FigureRow(_words(name), *(_cell(name, figures.get(name), measure) for figures in (before, after)))
            for name in names
        ]
        if rows:
            groups.append(FigureGroup(_title(measure), rows))
    if left:
        rows = [
            FigureRow(_words(name), *(Cell(_number(figures.get(name))) for figures in (before, after)))
            for name in left
        ]
        groups.append(FigureGroup("Other evaluators", rows))
    return groups


def course_table(record: RunRecord) -> list[list[str]]:
    """The figures of each evaluation as text, a row of headings first; empty without evaluations."""
    points = evaluations_of(record)
    measures = {name: measure for measure in record.measures for name in measure.figures}
    names = list(dict.fromkeys(name for point in points for name in point.numbers))
    if not names:
        return []
    rows = [["step", "epoch", *map(_words, names)]]
    for point in points:
        figures = [
            figure_text(name, point.numbers.get(name)) if name in measures else _number(point.numbers.get(name))
            for name in names
        ]
        rows.append([f"{point.step:.0f}", f"{point.epoch:.2f}", *figures])
    return rows


def figure_text(name: str, value: float | None) -> str:
    """A figure of one of the package's evaluators, which are shares in [0, 1] but for a few, as text."""
    if value is None:
        return NOT_MEASURED
    decimals = next((decimals for ending, decimals in _NUMBERS.items() if name.endswith(ending)), None)
    return f"{value:.1%}" if decimals is None else f"{value:.{decimals}f}"


def defence_settings(record: RunRecord) -> list[Setting]:
    """The trainer's own arguments."""
    return [
        Setting(
            name,
            value_text(value),
            value_text(record.defence_defaults[name])
            if name in record.defence_defaults and record.defence_defaults[name] != value
            else None,
        )
        for name, value in record.defence.items()
    ]


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """What was trained, on what, with what: headings and texts, those that are known."""
    model, data, environment = record.model, record.data, record.environment
    trained, size = model.trainable_parameters, model.image_size
    found = [
        ("Trainer", record.trainer),
        ("Model", f"{model.name or 'of no public name'}, {model.type}, images of {size} x {size} pixels"),
        (
            "Parameters",
            f"{model.parameters:,}, {'all' if trained == model.parameters else f'{trained:,}'} of them trained",
        ),
    ]
    if model.adapter:
        found.append(("Adapter", value_text(model.adapter)))
    if data is not None:
        parts = ["unknown length" if data.rows is None else f"{data.rows:,} pairs"]
        parts += [
            f"{name.replace('_', ' ')} {value}"
            for name, value in data
            if name not in ("poisons", "rows") and value is not None
        ]
        known = "unknown, the data has no column that says so" if data.poisons is None else f"{data.poisons:,}"
        found += [("Training data", ", ".join(parts)), ("Pairs known to be poisoned", known)]
    if record.skipped:
        found.append(("Unusable rows left out", str(record.skipped)))
    found += [(f"Augmentation of {views}", used or "none") for views, used in record.augmentation or ()]
    processes = environment.processes
    return [
        *found,
        ("Steps", f"{record.steps:,} of {record.planned_steps:,}, {record.epochs:.2f} epochs"),
        ("Device", f"{environment.device}{f', {processes} processes' if processes > 1 else ''}"),
        ("Precision", environment.precision),
        ("Seed", str(environment.seed)),
        ("Time", f"{environment.seconds:.0f} s of training, evaluations included"),
        ("Versions", ", ".join(f"{name} {number}" for name, number in environment.versions.items())),
    ]


def value_text(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {value_text(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(value_text, value)) or "none"
    return "none" if value is None else str(value)


def _cell(name: str, value: float | None, measure: Measure) -> Cell:
    text, images = figure_text(name, value), measure.images
    counted = name.endswith(_COUNTED.get(measure.measure, ())) and not name.endswith("balanced_accuracy")
    if value is None or not images or not counted:
        return Cell(text)
    return Cell(text, f"{round(value * images)} of {images}")


def _title(measure: Measure) -> str:
    title = measure.measure.capitalize()
    if measure.trigger:
        title += f": {measure.trigger.name} trigger"
        title += f" ({value_text(measure.trigger.parameters)})" if measure.trigger.parameters else ""
    if measure.target:
        title += f", target “{measure.target}”"
    for count in ("images", "queries"):
        if (number := getattr(measure, count)) is not None:
            title += f"; {number} {count}"
    return f"{title} of {measure.dataset.title}" if measure.dataset and measure.dataset.title else title


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return NOT_MEASURED if value is None else str(value)

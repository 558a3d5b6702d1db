"""The tables of a run as text: its metrics side by side, over training, its settings, and what it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..record import Measure, RunRecord
from .escaping import one_line
from .facts import OTHERS, Facts, attack_text, evaluations_of

#: Metrics that are not shares in [0, 1], by how their names end, with their decimals.
_NUMBERS = {"trigger_distance": 2, "median_rank": 1}
#: Kinds of measure whose shares are of `images`, with the endings of the metrics that count them.
_COUNTED = {
    "zero-shot classification": ("accuracy",),
    "attack success": ("attack_success_rate", "triggered_accuracy"),
    "targeted poisoning": ("poison_success_rate",),
}


class Cell(NamedTuple):
    """A metric as text, and of how many images it is, such as "12 of 367"."""

    text: str
    images: str | None = None


class Row(NamedTuple):
    """A metric's name in words, and its cell in each column."""

    name: str
    cells: list[Cell]


class Group(NamedTuple):
    """What a measure is of, and its metrics."""

    title: str
    rows: list[Row]


class Setting(NamedTuple):
    """An argument, its value, and its default where the value is another."""

    name: str
    value: str
    default: str | None = None


def figure_groups(facts: Facts) -> list[Group]:
    """The metrics of all columns, by what measures them."""
    return [
        Group(
            subject(measure),
            [
                Row(words(name), [_cell(name, column.value(measure, name), measure) for column in facts.columns])
                for name in measure.figures
            ],
        )
        for measure in facts.measures
        if any(column.value(measure, name) is not None for column in facts.columns for name in measure.figures)
    ]


def course_table(facts: Facts) -> list[list[str]]:
    """The metrics of each evaluation as text, a row of headings first; empty without evaluations."""
    points = evaluations_of(facts.record)
    measures = {name: measure for measure in facts.record.measures for name in measure.figures}
    names = list(dict.fromkeys(name for point in points for name in point.numbers))
    rows = [["step", "epoch", *map(words, names)]] if names else []
    for point in points if names else ():
        figures = [figure_text(name, point.numbers.get(name), measures.get(name)) for name in names]
        rows.append([f"{point.step:.0f}", f"{point.epoch:.2f}", *figures])
    return rows


def figure_text(name: str, value: float | None, measure: Measure | None) -> str:
    """A metric as text: those of the package's evaluators are shares in [0, 1], differences of these, or numbers."""
    if value is None:
        return "not measured"
    if measure is None or measure.measure == OTHERS:
        return f"{value:.4g}"
    if name.endswith("excess_success_rate"):
        return f"{100 * value:+.1f} points"
    decimals = next((decimals for ending, decimals in _NUMBERS.items() if name.endswith(ending)), None)
    return f"{value:.1%}" if decimals is None else f"{value:.{decimals}f}"


def words(name: str) -> str:
    """A metric's name in words."""
    return one_line(name).replace("_", " ")


def subject(measure: Measure) -> str:
    """What a measure is over, in words."""
    number = measure.queries if measure.images is None else measure.images
    of = "images" if measure.queries is None else "queries"
    if measure.measure == "attack success":
        # Those of the target class cannot be steered to it, and are not counted.
        of = "images of other classes"
    name = measure.dataset.title if measure.dataset else None
    parts = [] if number is None else [f"{number:,} {of}{f' in {name}' if name else ''}"]
    if measure.trigger:
        parts.append(f"trigger {attack_text(measure)}")
        if measure.placebos:
            parts.append(f"{measure.placebos} placebo{'s' if measure.placebos > 1 else ''}")
    elif measure.target:
        parts.append(f"target “{measure.target}”")
    return f"{measure.measure}: {', '.join(parts)}" if parts else measure.measure


def settings(record: RunRecord) -> list[Setting]:
    """The trainer's own arguments, and those of transformers that differ from their defaults."""
    defaults = record.defence_defaults
    return [
        Setting(name, value_text(value), value_text(defaults[name]) if defaults.get(name, value) != value else None)
        for name, value in {**record.defence, **record.settings}.items()
    ]


def summary(record: RunRecord) -> list[tuple[str, str]]:
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
            if name not in ("poisons", "rows", "filtered") and value is not None
        ]
        known = "unknown, the data has no column that says so" if data.poisons is None else f"{data.poisons:,}"
        found += [("Training data", ", ".join(parts)), ("Pairs known to be poisoned", known)]
    if data is not None and data.filtered is not None:
        found.append(("Suspect pairs left out", str(data.filtered)))
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
    text = figure_text(name, value, measure)
    counted = name.endswith(_COUNTED.get(measure.measure, ())) and not name.endswith("balanced_accuracy")
    if value is None or not measure.images or not counted:
        return Cell(text)
    return Cell(text, f"{round(value * measure.images)} of {measure.images}")

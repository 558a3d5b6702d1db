"""What a card says first: what its figures do not allow to conclude."""

from __future__ import annotations

from collections.abc import Iterator

from ..methods import Method
from ..record import Measure, RunRecord
from ..report.findings import ACCURACY_LOSS, REMOVED, TAKEN
from ..report.run_findings import TRIGGERS, chance, guesses
from .escaping import Markdown, escaped
from .figures import Column, Figures, accuracy_of, attack_text, attacks


def notices(record: RunRecord, method: Method, figures: Figures) -> list[Markdown]:
    """The warnings of a card, as Markdown, the gravest first."""
    found = []
    if method.kind == "none":
        found.append("**No defence was used.** This model learned from every pair, poisoned ones included.")
    if not figures.measured_after:
        found.append(_unmeasured(figures, method))
    elif figures.before is None:
        found.append(
            "**Measured only after.** Nothing is known of the model before, so that the figures do not show what "
            f"{_name(method)} changed."
        )
    found += _progress(record, figures)
    poisons = record.data.poisons if record.data else None
    if poisons and method.kind == "fine-tuning":
        found.append(
            f"**{poisons:,} of the training pairs are marked as poisoned**: {_name(method)} needs clean ones."
        )
    if method.kind != "none" and figures.measured_after:
        found += _proof(method, figures)
        found += _outcome(method, figures)
    # What holds of several columns is said once.
    return [Markdown(text) for text in dict.fromkeys(found)]


def _name(method: Method) -> Markdown:
    return escaped("training" if method.kind == "none" else method.name)


def _unmeasured(figures: Figures, method: Method) -> str:
    if figures.before is None:
        return "**Nothing was measured**: neither its accuracy nor what any attack does to it."
    return (
        "**Measured only before.** The figures are of the model that training started from. What "
        f"{_name(method)} made of it is not known."
    )


def _progress(record: RunRecord, figures: Figures) -> Iterator[str]:
    """Whether training was cut short, and whether the figures are of another step than the last."""
    if record.steps == 0:
        yield "**Nothing was trained**: these are the weights that training would start from."
    elif record.steps < record.planned_steps:
        yield f"**Training was not finished**: it stopped at step {record.steps:,} of {record.planned_steps:,}."
    if figures.after is not None and record.after_step is not None and record.after_step < record.steps:
        yield f"**Measured at step {record.after_step:,} of {record.steps:,}**, and not at the last."


def _proof(method: Method, figures: Figures) -> Iterator[str]:
    """Whether each attack took without the defence, without which its failure afterwards proves nothing."""
    found = list(attacks(figures))
    if not found:
        yield "**No attack was measured.** The figures do not show that the defence stops any."
        return
    without = _references(method, figures)
    successes = {name: [column.value(measure, name) for column in without] for measure, name in found}
    unknown = [measure for measure, name in found if set(successes[name]) <= {None}]
    if unknown and method.kind == "pre-training":
        yield (
            f"**Whether an attack would have taken without {escaped(method.name)} was not measured.** That takes a "
            "control: a model trained on the same pairs without the defence. Without one, low attack success proves "
            "nothing."
        )
    elif unknown and without:
        which = escaped("; ".join(attack_text(measure) for measure in unknown))
        yield f"**Not measured before** ({which}): the figures do not show that the defence stopped this."
    for measure, name in found:
        taken = [(value, column) for value, column in zip(successes[name], without, strict=True) if value is not None]
        success, column = max(taken, key=lambda entry: entry[0], default=(TAKEN, None))
        if column is not None and success < TAKEN:
            yield _not_taken(figures, column, measure, success)


def _references(method: Method, figures: Figures) -> list[Column]:
    """What shows how a model would be without the defence: the one that it started from, or one trained without it."""
    before = [figures.before] if figures.before is not None else []
    return {"fine-tuning": before, "pre-training": figures.controls}.get(method.kind, figures.controls or before)


def _not_taken(figures: Figures, column: Column, measure: Measure, success: float) -> str:
    learned = accuracy_of(figures, measure)
    accuracy = None if learned is None else column.value(*learned)
    where = "" if accuracy is None else f", at a clean accuracy of {accuracy:.1%}"
    when = column.label if column.own else f"with the control ({column.label})"
    return (
        f"**The attack did not take** ({escaped(attack_text(measure))}): {escaped(when)}, it succeeded on "
        f"{success:.1%} of the images{where}. The figures after prove nothing about the defence against it."
    )


def _outcome(method: Method, figures: Figures) -> Iterator[str]:
    """What the defence left of each attack, and what it cost, where that is much."""
    name = escaped(method.name)
    for column in figures.measured_after:
        for measure, figure in attacks(figures):
            left = column.value(measure, figure)
            if left is not None and left > REMOVED:
                what = escaped(attack_text(measure))
                yield f"**{name} did not stop the attack** ({what}): it still succeeds on {left:.1%} of the images."
        for measure in figures.measures:
            if measure.measure == "zero-shot classification":
                yield from _accuracy(method, figures, column, measure)


def _accuracy(method: Method, figures: Figures, column: Column, measure: Measure) -> Iterator[str]:
    figure = measure.figures[0]
    accuracy, guessed = column.value(measure, figure), chance(measure)
    others = [(other.value(measure, figure), other.label) for other in _references(method, figures)]
    best, where = max(((value, label) for value, label in others if value is not None), default=(None, ""))
    if accuracy is None:
        return
    if guesses(accuracy, measure):
        yield (
            f"**It hardly knows the classes**: it is right on {accuracy:.1%} of the clean images, and guessing on "
            f"{guessed:.1%}. Low attack success says nothing good of such a model."
        )
    elif best is not None and best - accuracy > ACCURACY_LOSS:
        yield (
            f"**It costs accuracy**: right on {accuracy:.1%} of the clean images, against {best:.1%} "
            f"({escaped(where)})."
        )


def guessed_before(figures: Figures) -> bool:
    """Whether the model that training started from knew next to nothing, so that its figures mean nothing."""
    before = figures.before
    return before is not None and any(
        guesses(before.value(measure, measure.figures[0]), measure)
        for measure in before.measures
        if measure.measure == "zero-shot classification"
    )


def unmeasured_attacks(figures: Figures) -> list[str]:
    """The families of attacks that nothing was measured of, in words."""
    measured = [
        measure
        for column in figures.measured_after
        for measure in column.measures
        if any(column.value(measure, name) is not None for name in measure.figures)
    ]
    triggers = {measure.trigger.name for measure in measured if measure.trigger}
    kinds = {measure.measure for measure in measured}
    missing = [words for name, words in TRIGGERS.items() if name not in triggers]
    if "targeted poisoning" not in kinds:
        missing.append("targeted poisoning of chosen images")
    if "text queries" not in kinds:
        missing.append("words in captions as triggers")
    return [*missing, "label-consistent poisons", "optimised triggers such as BadCLIP's"]

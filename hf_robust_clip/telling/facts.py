"""A run's metrics, side by side, and what they say of an attack and of a defence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..defences import Defence, defence_named
from ..methods import ANYTHING, Method
from ..record import Evaluation, Measure, Measured, RunRecord, Trigger
from ..wording import shortened
from .escaping import one_line

#: Under the first an attack has not taken. Over the second it has not been removed: what counts is its success beyond
#: that of placebos, where these were measured.
TAKEN, REMOVED = 0.5, 0.1
#: The loss of clean accuracy, a fraction, that is worth a warning.
ACCURACY_LOSS = 0.05
#: What is compared with an accuracy that is hardly better than guessing: this far from chance to all right.
ABOVE_CHANCE = 0.1
#: How the success rate of an attack is called, by what kind of measure it is of.
SUCCESS = {
    "attack success": "attack_success_rate",
    "linear probe": "linear_probe_attack_success_rate",
    "targeted poisoning": "poison_success_rate",
}
#: What stands for the measure of metrics that no evaluator describes.
OTHERS = "other evaluators"
#: What is known to be tried against models, and what a report calls it where nothing was measured of it.
TRIGGERS = {
    "patch triggers (BadNets)": ("patch",),
    "blended triggers": ("blended",),
    "sinusoid triggers (SIG)": ("sinusoid",),
    "warping triggers (WaNet)": ("warp",),
    "structured triggers (PAR's stripes, triangles and text)": (
        *("stripes_patch", "blended_stripes", "blended_triangles", "red_text"),
    ),
    "colors of the whole image as triggers": ("color_curve",),
    "optimized triggers such as BadCLIP's": ("optimized_patch",),
}
KINDS = {
    "targeted poisoning": "targeted poisoning of chosen images",
    "text queries": "words in captions as triggers",
    "retrieval": "retrieval of images by captions and of captions by images",
    "linear probe": "the image tower by itself (a linear probe)",
}


@dataclass(frozen=True, eq=False)
class Column:
    """
    A model's metrics, and what they measure.

    `label`: when they were taken, or of what model; `own`: whether they are of this run's weights, or of those that
    training started from, and not of a control.
    """

    label: str
    measures: Sequence[Measure]
    figures: Mapping[str, float | None]
    own: bool = True

    def value(self, measure: Measure, name: str) -> float | None:
        """A metric, where this model was measured so."""
        return self.figures.get(name) if measure in self.measures else None

    def guesses(self) -> bool:
        """Whether the model is hardly better than guessing."""
        return any(
            guesses(self.figures.get(measure.figures[0]), measure)
            for measure in self.measures
            if measure.measure == "zero-shot classification" and measure.figures
        )


@dataclass(frozen=True)
class Attack:
    """
    An attack on classification that was measured, and its success.

    `number`, from 1; `measure`, what it is; `success`, the name of its success rate; `without`, how often it succeeds
    without the defence; `controls`, on the controls; `after`, on this run's weights.
    """

    number: int
    measure: Measure
    success: str
    without: list[tuple[Column, float]]
    controls: list[tuple[Column, float]]
    after: list[tuple[Column, float]]

    @property
    def title(self) -> str:
        """What it is, in words."""
        return f"{attack_text(self.measure)}{', by linear probe' if self.measure.measure == 'linear probe' else ''}"

    @property
    def short(self) -> str:
        """A title that the plots' font can show, and a panel holds."""
        name = self.measure.trigger.name if self.measure.trigger else "targeted"
        return f"{self.number}. {name[:30]}" if name.isascii() else f"Attack {self.number}"

    @property
    def strongest(self) -> tuple[Column, float] | None:
        """Where it succeeds most without the defence; `None` where that was not measured."""
        return max(self.without, key=lambda found: found[1], default=None)

    def placebos(self, column: Column) -> tuple[float, float, float] | None:
        """Mean, lowest and highest success of triggers that nobody planted; `None` where they were not measured."""
        stem = self.success.removesuffix(SUCCESS["attack success"])
        if stem == self.success:
            return None
        ends = ("", "_low", "_high")
        mean, low, high = (column.value(self.measure, f"{stem}placebo_success_rate{end}") for end in ends)
        return None if mean is None or low is None or high is None else (mean, low, high)

    def backdoor(self, column: Column, success: float) -> float:
        """The share of a success that is the backdoor's: beyond the placebos' mean, where they were measured."""
        placebos = self.placebos(column)
        return success if placebos is None else success - placebos[0]

    @property
    def taken(self) -> bool:
        """Whether it is known to succeed without the defence: its failure proves nothing otherwise."""
        return self.strongest is not None and self.strongest[1] >= TAKEN


@dataclass(frozen=True)
class Facts:
    """
    What is known of a run.

    `columns`: its metrics and those of controls; `before` and `after` are among them, and `None` where there is no
    such measurement.
    """

    record: RunRecord
    method: Method
    columns: list[Column]
    before: Column | None
    after: Column | None

    @cached_property
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
        """The columns of this run's weights."""
        return [column for column in self.columns if column.own and column is not self.before]

    @property
    def without(self) -> list[Column]:
        """What shows how a model would be without the defence: the one it started from, or one trained without it."""
        before = [self.before] if self.before is not None else []
        kinds = {"none": before, "fine-tuning": before, "pre-training": self.controls}
        return kinds.get(self.method.kind, self.controls or before)

    @cached_property
    def attacks(self) -> list[Attack]:
        """The attacks on classification that were measured, in order."""
        found: list[Attack] = []
        # A record that was not measured yet says what will be.
        for measure in self.measures or self.record.measures:
            ending = SUCCESS.get(measure.measure)
            name = next((name for name in measure.figures if ending and name.endswith(ending)), None)
            if name is not None:
                readings = (
                    _readings(columns, measure, name) for columns in (self.without, self.controls, self.measured_after)
                )
                found.append(Attack(len(found) + 1, measure, name, *readings))
        return found

    @cached_property
    def accuracies(self) -> list[tuple[Measure, str]]:
        """What measures the accuracy on clean images, and the metric's name; linear probes where nothing else does."""
        for kind in ("zero-shot classification", "linear probe"):
            found = [
                (measure, measure.figures[0])
                for measure in self.measures or self.record.measures
                if measure.measure == kind and measure.figures
            ]
            if found:
                return found
        return []

    def accuracy_of(self, measure: Measure) -> tuple[Measure, str] | None:
        """The clean accuracy that belongs to an attack: on the same images if there is one, or the same classes."""
        found = [entry for entry in self.accuracies if entry[0].classes == measure.classes]
        same = [entry for entry in found if entry[0].dataset == measure.dataset]
        return next(iter(same or found), None)

    @property
    def unmeasured(self) -> list[str]:
        """What the metrics leave open, in words."""
        measured = [
            measure
            for column in self.measured_after
            for measure in column.measures
            if any(column.value(measure, name) is not None for name in measure.figures)
        ]
        triggers = {measure.trigger.name for measure in measured if measure.trigger}
        kinds = {measure.measure for measure in measured}
        found = [words for words, names in TRIGGERS.items() if not triggers.intersection(names)]
        found += [words for kind, words in KINDS.items() if kind not in kinds]
        if not kinds & {"zero-shot classification", "linear probe"}:
            found.append("accuracy on clean images: what was done may have cost any of it")
        found.append("label-consistent poisons")
        if measured:
            found.append("other settings and targets of what was measured")
        if self.method.kind != "none" and not self.controls:
            found.append(
                "the control: what CLIPTrainer does with the same pairs, settings and augmentation; what that removes "
                "by itself is not to the defence's credit"
            )
        return [*found, "other seeds: this is one run"]


def facts_of(record: RunRecord, measured: Sequence[Measured] = ()) -> Facts:
    """
    Put the metrics of a run and those of other measurements side by side.

    Args:
        record ([`RunRecord`]): The run's.
        measured (sequence of [`Measured`]): Other measurements.
    """
    method = method_of(record)
    before = after = None
    if record.before:
        label = f"before {method.name}" if method.kind in ("fine-tuning", "own") else "before training"
        before = _column(label, record.measures, record.before)
    if record.after:
        label = "after training" if method.kind == "none" else f"after {method.name}"
        after = _column(label, record.measures, record.after)
    columns = [column for column in (before, after) if column is not None]
    for number, entry in enumerate(measured, 1):
        later = f"measured later ({number})" if len(measured) > 1 else "measured later"
        label = one_line(entry.control) if entry.control else later
        columns.append(_column(label, entry.measures, entry.figures, own=not entry.control))
    return Facts(record, method, columns, before, after)


def defence_of(record: RunRecord) -> type[Defence] | None:
    """The defence of a run; `None` of one that does not ship."""
    base = record.method or record.trainer
    # A trainer of the user's own on top of CLIP has a loss that nobody here knows.
    own = not base.endswith("Trainer") or (base == "CLIPTrainer" and record.trainer != base)
    return None if own else defence_named(base.removesuffix("Trainer"))


def method_of(record: RunRecord) -> Method:
    """What is known of the method of a run."""
    defence = defence_of(record)
    if defence is not None:
        return defence.method
    return Method(
        name=record.trainer if record.method in ("", "CLIPTrainer") else record.method,
        what="Trained with a method of its author's own on top of hf_robust_clip, which knows nothing of what that "
        "method stops.",
        kind="own",
        limits=(ANYTHING,),
    )


def evaluations_of(record: RunRecord) -> list[Evaluation]:
    """The metrics over training, those before and after it included."""
    points = [*record.course]
    if record.before and (not points or points[0].step > 0):
        points.insert(0, Evaluation.model_validate({"step": 0, "epoch": 0, **record.before}))
    if record.after and record.after_step is not None and (not points or points[-1].step < record.after_step):
        last = {"step": record.after_step, "epoch": record.epochs, **record.after}
        points.append(Evaluation.model_validate(last))
    return points


def chance(measure: Measure) -> float | None:
    """The accuracy of guessing; `None` where the number of classes is not known."""
    return 1 / len(measure.classes) if measure.classes else None


def guesses(accuracy: float | None, measure: Measure) -> bool:
    """Whether an accuracy is hardly better than guessing; `False` where either is not known."""
    guessed = chance(measure)
    if accuracy is None or guessed is None:
        return False
    # Of a thousand classes, twice chance is something; of two, it is everything.
    return accuracy < min(2 * guessed, guessed + ABOVE_CHANCE * (1 - guessed))


def trigger_text(trigger: Trigger) -> str:
    """A trigger and its parameters."""
    # The pixels of an optimized patch are one long value.
    parameters = ", ".join(f"{name}={shortened(str(value), 40)}" for name, value in trigger.parameters.items())
    return f"{trigger.name} ({parameters})" if parameters else trigger.name


def attack_text(measure: Measure) -> str:
    """An attack by its trigger and target, or by its kind where it has none."""
    words = trigger_text(measure.trigger) if measure.trigger else measure.measure
    return f"{words}, target “{measure.target}”" if measure.target else words


def _readings(columns: Sequence[Column], measure: Measure, name: str) -> list[tuple[Column, float]]:
    return [(column, value) for column in columns if (value := column.value(measure, name)) is not None]


def _column(label: str, measures: Sequence[Measure], figures: Mapping[str, float | None], own: bool = True) -> Column:
    known = {name for measure in measures for name in measure.figures}
    # An evaluator of the user's own says nothing of its metrics.
    others = [name for name in figures if name not in known]
    taken = [measure for measure in measures if measure.figures]
    return Column(label, [*taken, Measure(measure=OTHERS, figures=others)] if others else taken, figures, own)

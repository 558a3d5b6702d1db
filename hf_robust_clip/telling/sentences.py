"""What a run's facts allow to say, and what they do not, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..methods import Statement
from ..record import RunRecord
from .facts import ACCURACY_LOSS, REMOVED, TAKEN, Attack, Column, Facts, chance, defence_of, guesses


def statements(facts: Facts) -> list[Statement]:
    """All that is to be said of a run, the gravest first."""
    found = [*_measured(facts), *_progress(facts.record), *_data(facts)]
    if facts.columns:
        found += [*_proof(facts)]
    for attack in facts.attacks:
        found += [*_outcome(facts, attack), *_controls(facts, attack)]
    found += [*_accuracy(facts), *_lenient(facts), *notes(facts.record)]
    # What holds of several columns is said once.
    return list(dict.fromkeys(found))


def notes(record: RunRecord) -> Iterator[Statement]:
    """What the defence of a run finds in its record, which loss it had, what was frozen, and what is wrong."""
    defence = defence_of(record)
    if defence is not None:
        yield from defence.findings(record)
    if record.defence.get("loss_type") == "sigmoid":
        rest = " contrasted images and captions, wherever the method has the loss of CLIP between them."
        yield Statement("result", "SigLIP's sigmoid loss", rest)
    if (tower := record.defence.get("freeze", "none")) != "none":
        yield Statement("gap", f"The {tower} tower was frozen", ": what it knows, a backdoor included, is as it was.")
    broken = sum(1 for entry in record.log if entry.numbers.get("loss") is None)
    if broken:
        yield Statement(
            "warning", "The loss was not finite", f" in {broken} of {len(record.log)} logged stretches of training."
        )


def _name(facts: Facts) -> str:
    return "training" if facts.method.kind == "none" else facts.method.name


def _measured(facts: Facts) -> Iterator[Statement]:
    if facts.method.kind == "none":
        rest = ". This model learned from every pair, poisoned ones included."
        yield Statement("gap", "No defence was used", rest)
    if not facts.measured_after and facts.before is None:
        why = "the evaluators were not run" if facts.record.measures else "there were no evaluators"
        yield Statement(
            "gap", "Nothing was measured", f" ({why}): neither its accuracy nor what any attack does to it."
        )
    elif not facts.measured_after:
        rest = (
            f": the metrics are of the model that training started from. What {_name(facts)} made of it is not known."
        )
        yield Statement("gap", "Measured only before", rest)
    elif facts.before is None:
        yield Statement(
            "gap",
            "Measured only after",
            f": nothing is known of the model before, so that the metrics do not show what {_name(facts)} changed.",
            "trainer.evaluate() before trainer.train(), or eval_on_start=True, measures before.",
        )


def _progress(record: RunRecord) -> Iterator[Statement]:
    """Whether training was cut short, and whether the metrics are of another step than the last."""
    if record.steps == 0:
        yield Statement("gap", "Nothing was trained", ": these are the weights that training would start from.")
    elif record.steps < record.planned_steps:
        rest = f": it stopped at step {record.steps:,} of {record.planned_steps:,}."
        yield Statement("gap", "Training was not finished", rest)
    if record.after and record.after_step is not None and record.after_step < record.steps:
        head = f"Measured at step {record.after_step:,} of {record.steps:,}"
        yield Statement("gap", head, ", and not at the last.")


def _data(facts: Facts) -> Iterator[Statement]:
    poisons = facts.record.data.poisons if facts.record.data else None
    if poisons and facts.method.kind == "fine-tuning":
        head = f"{poisons:,} of the training pairs are marked as poisoned"
        yield Statement("gap", head, f": {facts.method.name} needs clean ones.")


def _proof(facts: Facts) -> Iterator[Statement]:
    """Whether each attack took without the defence, without which its failure afterwards proves nothing."""
    name = facts.method.name
    if not facts.attacks:
        which = " on classification" if any(measure.trigger for measure in facts.measures) else ""
        yield Statement("gap", f"No attack{which} was measured", ": accuracy says nothing about backdoors.")
        return
    unknown = [attack for attack in facts.attacks if not attack.without]
    if unknown and facts.measured_after and facts.method.kind == "pre-training":
        yield Statement(
            "gap",
            f"Whether an attack would have taken without {name} was not measured",
            ": success before training is of a model that had not seen the poisons. That takes a control, a model "
            "that CLIPTrainer trains on the same pairs. Without one, low attack success proves nothing.",
        )
    elif unknown and facts.without:
        which = "; ".join(attack.title for attack in unknown)
        rest = f" ({which}): the metrics do not show that the defence stopped this."
        yield Statement("gap", "Not measured before", rest)
    for attack in facts.attacks:
        planted = facts.method.kind == "none" and any(value >= TAKEN for _, value in attack.after)
        if attack.strongest is not None and not attack.taken and not planted:
            yield _not_taken(facts, attack, *attack.strongest)
    for column in facts.without:
        if facts.method.kind != "none" and column.guesses():
            head = f"The model without the defence hardly knows the classes ({column.label})"
            yield Statement("gap", head, ": it has learned too little for a comparison.")


def _not_taken(facts: Facts, attack: Attack, column: Column, success: float) -> Statement:
    images = f"{attack.measure.images:,}" if attack.measure.images else "the"
    learned = facts.accuracy_of(attack.measure)
    accuracy = None if learned is None else column.value(*learned)
    where = "" if accuracy is None else f", at a clean accuracy of {accuracy:.1%}"
    when = column.label if column.own else f"with the control ({column.label})"
    proves = " The metrics after it prove nothing about the defence." if facts.method.kind != "none" else ""
    rest = f" ({attack.title}): {when}, it succeeded on {success:.1%} of {images} images{where}.{proves}"
    return Statement("gap", "The attack did not take", rest)


def _outcome(facts: Facts, attack: Attack) -> Iterator[Statement]:
    """What the defence left of an attack."""
    for column, left in attack.after:
        others = dict([*attack.without, *attack.controls])  # a control may be both
        rates = _readings_text([*others.items(), (column, left)])
        planted = facts.method.kind == "none" and bool(attack.without) and not attack.taken and left >= TAKEN
        if planted:
            yield Statement("warning", "Training planted the backdoor", f" ({attack.title}): attack success {rates}.")
        elif facts.method.kind != "none" and attack.backdoor(column, left) > REMOVED:
            head = f"{facts.method.name} did NOT stop the attack"
            yield Statement("warning", head, f" ({attack.title}): attack success {rates}.")
        elif facts.method.kind != "none" and left > REMOVED:
            rest = f" ({attack.title}): attack success {rates}. Patterns that nobody planted do nearly the same."
            yield Statement("warning", "What is left of the attack needs no backdoor", rest)
        else:
            removed = facts.method.kind != "none" and attack.taken and not column.guesses()
            rest = f": {rates}.{' The trigger has next to no hold.' if removed else ''}"
            yield Statement("result", f"Attack success of {attack.title}", rest)
        yield from _placebos(attack, column, left)


def _placebos(attack: Attack, column: Column, success: float) -> Iterator[Statement]:
    """What a model does under triggers that nobody planted: what the attack has beyond them is the backdoor's."""
    placebos = attack.placebos(column)
    if placebos is None:
        return
    _, low, high = placebos
    head = f"{success:.1%} of the triggered images are called {attack.measure.target}"
    span = f"{low:.1%}" if low == high else f"{low:.1%} to {high:.1%}"
    yield Statement("result", head, f", and {span} under patterns that were never planted ({column.label}).")


def _controls(facts: Facts, attack: Attack) -> Iterator[Statement]:
    """What controls leave of an attack: a defence deserves credit for no more than it removes beyond that."""
    name = facts.method.name
    for control, value in attack.controls if attack.taken and facts.method.kind != "none" else ():
        if control.guesses() and control in facts.without:
            continue  # that it shows nothing of the attack either has been said
        if control.guesses():
            rest = ": it is not a control for a defence."
            yield Statement("warning", f"The control ({control.label}) hardly knows the classes", rest)
            continue
        stops = attack.backdoor(control, value) <= REMOVED
        for column, left in attack.after:
            stopped = attack.backdoor(column, left) <= REMOVED
            if stops:
                credit = f", so that {name} deserves no credit for that" if stopped else ""
                head = f"The control ({control.label}) stops the attack by itself"
                yield Statement("warning", head, f" ({attack.title}): {value:.1%} are left{credit}.")
            elif left >= value and not stopped:
                head = f"{name} removed no more than the control did ({control.label})"
                yield Statement("warning", head, ", which costs less.")


def _accuracy(facts: Facts) -> Iterator[Statement]:
    """What a defence costs."""
    for measure, name in facts.accuracies:
        readings = [(column, value) for column in facts.columns if (value := column.value(measure, name)) is not None]
        without = [value for column, value in readings if column in facts.without]
        others = [reading for reading in readings if reading[0] not in facts.measured_after]
        for column, value in readings:
            if column not in facts.measured_after:
                continue
            accuracies = _readings_text([*others, (column, value)])
            if guesses(value, measure):
                rest = f": accuracy on clean images {accuracies}, and {chance(measure):.1%} by guessing. "
                rest += "Low attack success says nothing good of such a model."
                yield Statement("warning", "It hardly knows the classes", rest)
            elif without and max(without) - value > ACCURACY_LOSS:
                yield Statement("warning", "It costs accuracy", f": accuracy on clean images {accuracies}.")
            else:
                yield Statement("result", "Accuracy on clean images", f": {accuracies}.")


def _lenient(facts: Facts) -> Iterator[Statement]:
    """Whether what a defence is measured against has lost accuracy itself."""
    for measure, name in facts.accuracies:
        readings = [(column, value) for column in facts.controls if (value := column.value(measure, name)) is not None]
        best = max((value for _, value in readings), default=0)
        for column, value in readings:
            if best - value > ACCURACY_LOSS:
                head = f"The control ({column.label}) costs accuracy itself"
                rest = f": {value:.1%} against {best:.1%}. A comparison with it is a lenient one."
                yield Statement("warning", head, rest)


def _readings_text(readings: Sequence[tuple[Column, float]]) -> str:
    """Metrics and what they are of: "98.0% (before CleanCLIP), 2.0% (after CleanCLIP)"."""
    return ", ".join(f"{value:.1%} ({column.label})" for column, value in readings)

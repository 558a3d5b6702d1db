"""What the record of a run says, and what it leaves open, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..methods import Method, method_of
from ..record import Evaluation, Logged, Measure, RunRecord
from .findings import ACCURACY_LOSS, COLLAPSED, REMOVED, TAKEN, Finding, split_findings

#: How the success rate of an attack is called, by what kind of measure it is of.
SUCCESS = {
    "attack success": "attack_success_rate",
    "linear probe": "linear_probe_attack_success_rate",
    "targeted poisoning": "poison_success_rate",
}
#: Kinds of measure whose first figure is the accuracy on clean images, in the order in which they are preferred.
ACCURACY = ("zero-shot classification", "linear probe")
#: Image triggers of the package, in words.
TRIGGERS = {
    "patch": "patch triggers (BadNets)",
    "blended": "blended triggers",
    "sinusoid": "sinusoid triggers (SIG)",
    "warp": "warping triggers (WaNet)",
}
#: What is compared with an accuracy that is hardly better than guessing: this far from chance to all right.
ABOVE_CHANCE = 0.1


class Attack(NamedTuple):
    """
    An attack that a run measured.

    `number` in the report, from 1; `title`, what it is; `success`, the name of its success rate; `measure`, what the
    record says of how it was measured.
    """

    number: int
    title: str
    success: str
    measure: Measure


def attacks_of(record: RunRecord) -> list[Attack]:
    """The attacks whose success a run's evaluators measure, in their order."""
    attacks: list[Attack] = []
    for measure in record.measures:
        ending = SUCCESS.get(measure.measure)
        success = next((name for name in measure.figures if ending and name.endswith(ending)), None)
        if success is not None:
            attacks.append(Attack(len(attacks) + 1, _attack_title(measure), success, measure))
    return attacks


def accuracy_measure(record: RunRecord) -> Measure | None:
    """The measure whose first figure is the accuracy on clean images; `None` without one."""
    for kind in ACCURACY:
        for measure in record.measures:
            if measure.measure == kind and measure.figures:
                return measure
    return None


def evaluations_of(record: RunRecord) -> list[Evaluation]:
    """The figures over training, those before and after it included."""
    points = [*record.course]
    if record.before and (not points or points[0].step > 0):
        points.insert(0, Evaluation.model_validate({"step": 0, "epoch": 0, **record.before}))
    if record.after and record.after_step is not None and (not points or points[-1].step < record.after_step):
        points.append(Evaluation.model_validate({"step": record.after_step, "epoch": record.epochs, **record.after}))
    return points


def method(record: RunRecord) -> Method:
    """What a run trained with."""
    return method_of(record.trainer, record.method)


def headlines(record: RunRecord) -> list[str]:
    """What a reader must know before any figure: that nothing, or not enough, was measured or done."""
    found = []
    if record.steps == 0:
        found.append("Nothing was trained: this is the model as it came.")
    elif record.steps < record.planned_steps:
        found.append(f"Training is not finished: step {record.steps} of {record.planned_steps}.")
    if not record.before and not record.after:
        why = "the trainer had no evaluators" if not record.measures else "the evaluators were not run"
        found.append(f"Nothing was measured: {why}. Whether the model holds a backdoor is not known.")
        return found
    if record.steps > 0 and not record.after:
        found.append("Measured before training only: what training changed is not known.")
    elif record.steps > 0 and not record.before:
        found.append(
            "Measured after training only: what training changed is not known. trainer.evaluate() before "
            "trainer.train(), or eval_on_start=True, measures before."
        )
    if record.after and record.after_step is not None and record.after_step < record.steps:
        found.append(f"The figures after training are of step {record.after_step} of {record.steps}.")
    attacks = attacks_of(record)
    if not any(measure.trigger for measure in record.measures) and not attacks:
        found.append("No attack was measured: accuracy says nothing about backdoors.")
    return found + _not_taken(record, attacks)


def run_findings(record: RunRecord) -> list[Finding]:
    """What the figures and the defence's own notes say, in plain sentences."""
    found = [finding for attack in attacks_of(record) if (finding := _attack_finding(record, attack)) is not None]
    accuracy = _accuracy_finding(record)
    found += [] if accuracy is None else [accuracy]
    if record.details.splits is not None:
        found += split_findings(record.details.splits)
    if "matching" in record.defence:
        found += _match_findings(record.log)
    broken = sum(1 for entry in record.log if entry.numbers.get("loss") is None)
    if broken:
        text = f"The loss was not finite in {broken} of {len(record.log)} logged stretches of training."
        found.append(Finding(text, "warning"))
    return found


def unmeasured(record: RunRecord) -> list[str]:
    """What a run's evaluators leave open."""
    tried = {measure.trigger.name for measure in record.measures if measure.trigger}
    kinds = {measure.measure for measure in record.measures}
    others = [name for name in TRIGGERS if name not in tried]
    found = []
    if others:
        found.append(
            f"Triggers of these kinds: {', '.join(others)}. A low success rate for one trigger says nothing about "
            "another, nor about the same one at another size or strength."
        )
    for kind, text in (
        ("targeted poisoning", "Single images that poisons aim at (targeted poisoning)."),
        ("text queries", "Words in captions as triggers (text queries)."),
        ("retrieval", "Retrieval of images by captions and of captions by images."),
        ("linear probe", "The image tower by itself (a linear probe)."),
    ):
        if kind not in kinds:
            found.append(text)
    if accuracy_measure(record) is None:
        found.append("Accuracy on clean images: what was done may have cost any of it.")
    found.append("Attacks that are made against defences like these, such as BadCLIP and label-consistent poisons.")
    if method(record).kind != "none":
        found.append(
            "The control: what CLIPTrainer does with the same pairs, settings and augmentation. What that removes by "
            "itself is no merit of the defence."
        )
    found.append("Other seeds: this is one run.")
    return found


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


def _attack_title(measure: Measure) -> str:
    if not measure.trigger:
        return "Targeted poisoning"
    title = f"{measure.trigger.name.capitalize()} trigger"
    title += f", target “{measure.target}”" if measure.target else ""
    return f"{title}, by linear probe" if measure.measure == "linear probe" else title


def _figures(record: RunRecord, name: str) -> tuple[float | None, float | None]:
    """A figure before and after."""
    return (record.before or {}).get(name), (record.after or {}).get(name)


def _not_taken(record: RunRecord, attacks: Sequence[Attack]) -> list[str]:
    """Which attacks have not shown that they work."""
    used = method(record)
    if attacks and record.after and used.kind == "pre-training":
        return [
            f"Whether {'the attack' if len(attacks) == 1 else 'the attacks'} would have taken without {used.name} is "
            "not shown: success before training is of a model that had not seen the poisons. Train CLIPTrainer on the "
            "same pairs to compare."
        ]
    missed = [
        (attack, before)
        for attack in attacks
        if (before := _figures(record, attack.success)[0]) is not None and before < TAKEN
    ]
    found = []
    for attack, before in missed:
        after = _figures(record, attack.success)[1]
        if used.kind == "none" and after is not None and after >= TAKEN:
            continue  # training planted it
        images = attack.measure.images
        share = f"{before:.1%} of {images} images" if images else f"{before:.1%}"
        proves = "" if used.kind == "none" else " What follows proves nothing about the defence."
        found.append(f"{attack.title}: the attack did not take, {share} before training.{proves}")
    return found


def _attack_finding(record: RunRecord, attack: Attack) -> Finding | None:
    before, after = _figures(record, attack.success)
    if before is None or after is None:
        return None
    text = f"{attack.title}: attack success {before:.1%} before, {after:.1%} after."
    used = method(record)
    if used.kind == "pre-training":
        # Success before is of a model that had learned nothing yet.
        text = f"{attack.title}: attack success {after:.1%} after training."
        return Finding(f"{text} {used.name} did NOT keep it out.", "warning") if after > REMOVED else Finding(text)
    if used.kind == "none":
        planted = " Training planted it." if before < TAKEN <= after else ""
        return Finding(text + planted, "warning" if planted else "result")
    if after > REMOVED:
        return Finding(f"{text} {used.name} did NOT remove it.", "warning")
    if before >= TAKEN and not _guessing(record):
        return Finding(f"{text} The trigger has next to no hold any more.")
    return Finding(text)


def _accuracy_finding(record: RunRecord) -> Finding | None:
    measure = accuracy_measure(record)
    if measure is None:
        return None
    before, after = _figures(record, measure.figures[0])
    if before is None or after is None:
        return None
    text = f"Accuracy on clean images: {before:.1%} before, {after:.1%} after"
    if _guessing(record):
        return Finding(
            f"{text}: hardly better than guessing ({chance(measure):.1%}). A low attack success says nothing good of "
            "such a model.",
            "warning",
        )
    if before - after > ACCURACY_LOSS:
        return Finding(f"{text}: training cost accuracy.", "warning")
    return Finding(f"{text}.")


def _guessing(record: RunRecord) -> bool:
    """Whether the model is hardly better than guessing after training."""
    measure = accuracy_measure(record)
    if measure is None:
        return False
    return guesses((record.after or {}).get(measure.figures[0]), measure)


def _match_findings(log: Sequence[Logged]) -> list[Finding]:
    matching = [entry for entry in log if "match_similarity" in entry.numbers]
    if not matching:
        return [Finding("RoCLIP came to no matching: this was plain training with augmentation.", "warning")]
    means = {name: _mean(matching, name) for name in ("distinct_matches", "poisoned_match_adversarial")}
    text = f"RoCLIP matched in {len(matching)} of {len(log)} logged stretches of training"
    if means["distinct_matches"] is not None:
        text += f", with {means['distinct_matches']:.1%} different matches in a batch"
    if means["poisoned_match_adversarial"] is not None:
        text += (
            f"; poisoned images were matched with their adversarial class in {means['poisoned_match_adversarial']:.1%}"
        )
        text += " of all cases"
    found = [Finding(f"{text}.")]
    collapsed = [entry for entry in matching if (entry.numbers.get("largest_match_share") or 0) > COLLAPSED]
    if collapsed:
        text = (
            f"RoCLIP's matching collapsed in {len(collapsed)} of them: one caption of the pool served more than half "
            "of a batch."
        )
        found.append(Finding(text, "warning"))
    return found


def _mean(entries: Sequence[Logged], name: str) -> float | None:
    values = [value for entry in entries if (value := entry.numbers.get(name)) is not None]
    return sum(values) / len(values) if values else None

"""What the demo's results say, in a table and in sentences that hold for every combination of figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..record import Split

#: The models of the demo, in the order in which they are trained: as the results call them, and as the report does.
MODELS = {
    "poisoned": "Poisoned",
    "finetuned": "Plain fine-tuning",
    "cleanclip": "CleanCLIP",
    "augmentation": "Augmentation alone",
    "roclip": "RoCLIP",
    "safeclip": "SafeCLIP",
}
#: What a run of each defence is about.
TITLES = {
    "cleanclip": "A backdoor in a small CLIP, and what fine-tuning on clean pairs does to it",
    "roclip": "A backdoor in a small CLIP, and what pre-training with RoCLIP does to it",
    "safeclip": "A backdoor in a small CLIP, and what pre-training with SafeCLIP does to it",
    "all": "A backdoor in a small CLIP, and what three defences do to it",
}
#: Under these an attack has not taken, and over these it has not been removed.
TAKEN, REMOVED = 0.5, 0.1
#: Under this clean accuracy a model has not learned the digits.
LEARNED = 0.5
#: Points of clean accuracy, as a fraction, whose loss is worth a warning; pre-training defences have their own.
ACCURACY_LOSS = 0.05
#: From this mean share of a batch on that one pool entry serves, matching has collapsed.
COLLAPSED = 0.5


class Finding(NamedTuple):
    """One sentence on the results; its kind is `"result"` or `"warning"`."""

    text: str
    kind: str = "result"


class Trial(NamedTuple):
    """
    A control, the defences that are measured against it, and the words for them.

    `margins`: for each defence the loss of clean accuracy, a fraction, from which on it is worth a warning;
    `subject`: the control at the head of a sentence; `undefended`: the poisoned model beside its accuracy;
    `preposition`: what joins an accuracy and a method; `failure`, `success`: what a defence did not do, or shows.
    """

    control: str
    margins: Mapping[str, float]
    subject: str
    undefended: str
    preposition: str
    failure: str
    success: str


TRIALS = (
    Trial(
        control="finetuned",
        margins={"cleanclip": ACCURACY_LOSS},
        subject="Plain fine-tuning on clean pairs, the control,",
        undefended="poisoned",
        preposition="after",
        failure="did NOT remove the trigger",
        success="the trigger has next to no hold any more",
    ),
    Trial(
        control="augmentation",
        margins={"roclip": 0.05, "safeclip": 0.10},
        subject="Augmentation alone, the control,",
        undefended="undefended",
        preposition="with",
        failure="did NOT keep the trigger out",
        success="the trigger has next to no hold",
    ),
)


def models_of(results: Mapping[str, Any]) -> dict[str, str]:
    """The models that the results are of, and what the report calls them, in order."""
    return {model: label for model, label in MODELS.items() if model in results}


def results_table(results: Mapping[str, Any]) -> list[list[str]]:
    """The figures of the models as text, a row of headings first."""
    rows = [["", "clean accuracy", "attack success", "triggered accuracy", "trigger distance", "seconds"]]
    for model, label in models_of(results).items():
        figures = results[model]
        shares = (figures[name] for name in ("clean_accuracy", "attack_success_rate", "triggered_accuracy"))
        row = [label, *(f"{share:.1%}" for share in shares), f"{figures['trigger_distance']:.2f}"]
        rows.append([*row, f"{figures['seconds']:.0f}"])
    return rows


def findings(results: Mapping[str, Any]) -> list[Finding]:
    """What the results say, and what they do not allow to say, in plain sentences."""
    found = _attack(results)
    for trial in TRIALS:
        if trial.control in results:
            found.extend(_control(results, trial))
            for defence in trial.margins:
                if defence in results:
                    found.extend(_defence(results, trial, defence))
    return found


def _attack(results: Mapping[str, Any]) -> list[Finding]:
    setup, poisoned = results["setup"], results["poisoned"]
    target, attacked = setup["target"], setup["attacked_images"]
    before, accuracy = poisoned["attack_success_rate"], poisoned["clean_accuracy"]
    found = []
    if accuracy < LEARNED:
        found.append(
            Finding(
                f"The poisoned model is right on only {accuracy:.1%} of the clean images: it has learned "
                "too little for a comparison.",
                "warning",
            )
        )
    poisons = f"{setup['poisons']} poisons among {setup['pairs']} pairs ({setup['poison_rate']:.1%})"
    if before < TAKEN:
        found.append(
            Finding(
                f"The attack did not take: with {poisons}, only {before:.1%} of {attacked} triggered images are "
                f"called “{target}” before any defence. What follows proves nothing about one.",
                "warning",
            )
        )
    else:
        found.append(
            Finding(
                f"The attack took: with {poisons}, {before:.1%} of {attacked} triggered images are called “{target}”."
            )
        )
    return found


def _control(results: Mapping[str, Any], trial: Trial) -> list[Finding]:
    """What the control leaves of the attack: a defence deserves credit for no more than it removes beyond that."""
    before = results["poisoned"]
    accuracy, left = (results[trial.control][measure] for measure in ("clean_accuracy", "attack_success_rate"))
    leaves = f"{trial.subject} leaves {left:.1%}"
    if accuracy < LEARNED <= before["clean_accuracy"]:
        text = f"{leaves}, but is right on only {accuracy:.1%} of the clean images: it is no control for a defence."
        return [Finding(text, "warning")]
    found = [Finding(f"{leaves}.")]
    if accuracy >= LEARNED and before["attack_success_rate"] >= TAKEN and left <= REMOVED:
        text = f"{leaves}: it removes the backdoor by itself"
        names = [
            MODELS[defence]
            for defence in trial.margins
            if defence in results and results[defence]["attack_success_rate"] <= REMOVED
        ]
        if names:
            text += f", so that {' and '.join(names)} deserve{'s' if len(names) == 1 else ''} no credit for that"
        found = [Finding(f"{text}.", "warning")]
    if trial.control == "augmentation" and before["clean_accuracy"] - accuracy > ACCURACY_LOSS:
        text = (
            f"Augmentation alone costs accuracy: {before['clean_accuracy']:.1%} without it, {accuracy:.1%} with it. "
            "A comparison with it is a lenient one."
        )
        found.append(Finding(text, "warning"))
    return found


def _defence(results: Mapping[str, Any], trial: Trial, defence: str) -> list[Finding]:
    name = MODELS[defence]
    before, control, after = (results[model]["attack_success_rate"] for model in ("poisoned", trial.control, defence))
    learned = {model: results[model]["clean_accuracy"] >= LEARNED for model in models_of(results)}
    found = []
    if learned["poisoned"] and not learned[defence]:
        found.append(
            Finding(
                f"{trial.preposition.capitalize()} {name} the model is right on only "
                f"{results[defence]['clean_accuracy']:.1%} of the clean images: it has "
                f"{'unlearned' if trial.control == 'finetuned' else 'not learned'} the classes, so an attack success "
                f"of {after:.1%} says nothing good of the defence.",
                "warning",
            )
        )
    elif after > REMOVED:
        found.append(Finding(f"{name} {trial.failure}: {after:.1%} are left.", "warning"))
    elif before >= TAKEN and learned["poisoned"]:
        found.append(Finding(f"{name} leaves {after:.1%}: {trial.success}."))
    else:
        found.append(Finding(f"{name} leaves {after:.1%}."))
    # Where both remove it, the control's own sentence has said so.
    if before >= TAKEN and learned[trial.control] and after >= control and after > REMOVED:
        control_name = MODELS[trial.control].lower()
        found.append(Finding(f"{name} removed no more than {control_name} did, which costs less.", "warning"))
    found.append(_accuracy(results, trial, defence))
    if defence == "roclip":
        found.extend(_matching(results))
    elif defence == "safeclip":
        found.extend(split_findings([Split.model_validate(split) for split in results.get("splits", [])]))
    return found


def _accuracy(results: Mapping[str, Any], trial: Trial, defence: str) -> Finding:
    before, control, after = (results[model]["clean_accuracy"] for model in ("poisoned", trial.control, defence))
    text = (
        f"Clean accuracy: {before:.1%} {trial.undefended}, {control:.1%} {trial.preposition} "
        f"{MODELS[trial.control].lower()}, {after:.1%} {trial.preposition} {MODELS[defence]}"
    )
    measured_by = max(before, control)
    if trial.control == "augmentation":
        measured_by = control
        points = round(100 * (after - control), 1)
        where = f"{abs(points):.1f} points {'above' if points > 0 else 'below'}" if points else "level with"
        text = f"{text}, {where} the control"
    if measured_by - after > trial.margins[defence]:
        return Finding(f"{text}: the defence costs accuracy.", "warning")
    return Finding(f"{text}.")


def _matching(results: Mapping[str, Any]) -> list[Finding]:
    matching = results.get("matching", [])
    found = [Finding(matching_course(matching, results["setup"]["target"]))]
    collapsed = [entry["epoch"] for entry in matching if (entry.get("largest_match_share") or 0) > COLLAPSED]
    if collapsed:
        found.append(
            Finding(
                f"RoCLIP's matching collapsed in epoch {_listed(collapsed)}: one caption of the pool served, on "
                "average, more than half of a batch.",
                "warning",
            )
        )
    return found


def matching_course(matching: Sequence[Mapping[str, Any]], target: str) -> str:
    """What RoCLIP's record says of whom the poisoned images were matched with."""
    shares = [
        share for entry in matching if (share := entry.get("poisoned_match_adversarial")) is not None
    ]  # one an epoch with matching steps
    if not shares:
        return "RoCLIP matched no poisoned image: it came to no matching."
    mean = sum(shares) / len(shares)
    return (
        f"RoCLIP matched poisoned images with a caption of “{target}” in {mean:.1%} of all cases, in {len(shares)} "
        f"{'epochs' if len(shares) > 1 else 'epoch'} with matching."
    )


def split_findings(splits: Sequence[Split]) -> list[Finding]:
    """[`split_course`], with a warning of splits that call no pair safe, or every pair."""
    found = [Finding(split_course(splits), "result" if splits else "warning")]
    for share, which, outcome in (
        (0.0, "no pair", "no image learned from a caption"),
        (1.0, "every pair", "it defended against nothing"),
    ):
        epochs = [split.epoch + 1 for split in splits if split.safe_share == share]
        if epochs:
            text = f"SafeCLIP called {which} safe in epoch {_listed(epochs)}, in which {outcome}."
            found.append(Finding(text, "warning"))
    return found


def split_course(splits: Sequence[Split]) -> str:
    """What SafeCLIP's record says of how well it told the poisons from the other pairs."""
    if not splits:
        return "SafeCLIP split nothing: its training was warm-up only."
    first, last = splits[0], splits[-1]
    if first.auroc is None:
        return f"SafeCLIP's safe set held {first.safe_share:.1%} of the pairs at first."
    told = f"SafeCLIP's first split tells poisoned pairs from clean ones with an AUROC of {first.auroc:.3f}."
    if len(splits) == 1:
        return f"{told} Its safe set holds {_held(first)}."
    return f"{told} Its safe set holds {_held(first)} at first, {_held(last)} at the last split."


def _held(split: Split) -> str:
    pairs = f"{split.safe_share:.1%} of all pairs"
    poisons = split.poisons_in_safe_set
    return pairs if poisons is None else f"{poisons:.1%} of the poisons and {pairs}"


def _listed(numbers: Sequence[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} and {last}" if others else last

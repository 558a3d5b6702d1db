"""What is said of a run holds for every combination of figures, its controls' included."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from support.records import ZERO_SHOT, attack, figures, make_record, split

from hf_robust_clip.telling import Control
from hf_robust_clip.telling.facts import ACCURACY_LOSS, REMOVED, TAKEN
from hf_robust_clip.telling.page import run_facts
from hf_robust_clip.telling.sentences import Statement, notes, statements
from hf_robust_clip.telling.tables import figure_groups

#: Clean accuracy and attack success of runs in which all went well.
WELL = {"before": (0.85, 0.9), "control": (0.88, 0.3), "after": (0.87, 0.02)}


def said(trainer: str = "CleanCLIPTrainer", **changes: tuple[float, float]) -> list[Statement]:
    """What is said of a run with a control, and of one of pre-training with an undefended one as well."""
    given = {name: figures(*values) for name, values in {**WELL, **changes}.items()}
    pretraining = trainer in ("RoCLIPTrainer", "SafeCLIPTrainer")
    undefended = [Control("undefended", make_record("CLIPTrainer", after=given["before"]))] if pretraining else []
    untrained = {"before": figures(0.25, 0.0)} if pretraining else {"before": given["before"]}
    record = make_record(trainer, **untrained, after=given["after"])
    controls = [*undefended, Control("plain", make_record("CLIPTrainer", after=given["control"]))]
    return statements(run_facts(record, controls))


def texts(kind: str, *args: Any, **changes: Any) -> str:
    return " ".join(statement.text for statement in said(*args, **changes) if statement.kind == kind)


@pytest.mark.parametrize("trainer", ["CleanCLIPTrainer", "RoCLIPTrainer", "SafeCLIPTrainer"])
def test_a_clean_sweep_gives_no_warning(trainer: str) -> None:
    assert not texts("warning", trainer) and not texts("gap", trainer)
    assert "no hold" in texts("result", trainer)


@pytest.mark.parametrize(
    ("trainer", "changes", "kind", "expected"),
    [
        ("CleanCLIPTrainer", {"before": (0.85, 0.49)}, "gap", "did not take"),
        ("CleanCLIPTrainer", {"before": (0.2, 0.9)}, "gap", "learned too little for a comparison"),
        ("CleanCLIPTrainer", {"after": (0.89, 0.11)}, "warning", "CleanCLIP did NOT stop the attack"),
        ("CleanCLIPTrainer", {"after": (0.89, 0.4)}, "warning", "removed no more than the control did (plain)"),
        ("CleanCLIPTrainer", {"after": (0.78, 0.0)}, "warning", "It costs accuracy"),
        ("CleanCLIPTrainer", {"after": (0.2, 0.0)}, "warning", "says nothing good"),
        ("CleanCLIPTrainer", {"control": (0.9, 0.1)}, "warning", "by itself (patch"),
        ("CleanCLIPTrainer", {"control": (0.9, 0.1)}, "warning", "so that CleanCLIP deserves no credit"),
        ("CleanCLIPTrainer", {"control": (0.2, 0.1)}, "warning", "is not a control for a defence"),
        ("RoCLIPTrainer", {"before": (0.85, 0.3), "control": (0.9, 0.2)}, "gap", "did not take"),
        ("RoCLIPTrainer", {"control": (0.9, 0.0)}, "warning", "so that RoCLIP deserves no credit"),
        ("RoCLIPTrainer", {"control": (0.79, 0.3)}, "warning", "The control (plain) costs accuracy itself"),
        ("RoCLIPTrainer", {"after": (0.9, 0.11)}, "warning", "RoCLIP did NOT stop the attack"),
        ("RoCLIPTrainer", {"after": (0.81, 0.0)}, "warning", "It costs accuracy"),
    ],
)
def test_warns_of_what_the_figures_do_not_show(
    trainer: str, changes: dict[str, Any], kind: str, expected: str
) -> None:
    assert expected in texts(kind, trainer, **changes)


def test_a_control_that_the_defence_does_not_better_gets_the_credit_alone() -> None:
    found = texts("warning", control=(0.9, 0.05), after=(0.9, 0.2))
    assert "by itself" in found and "deserves no credit" not in found


@pytest.mark.parametrize("trainer", ["CleanCLIPTrainer", "RoCLIPTrainer", "SafeCLIPTrainer"])
def test_what_is_said_holds_for_every_combination_of_figures(trainer: str) -> None:
    values = list(product((0.1, 0.9), (0.0, 0.3, 0.8)))  # accuracy, attack success
    for before, control, after in product(values, repeat=3):
        text = " ".join(one.text for one in said(trainer, before=before, control=control, after=after))
        without = [before] if trainer == "CleanCLIPTrainer" else [before, control]
        took = max(success for _, success in without) >= TAKEN
        assert ("no hold" in text) == (took and after[0] > 0.5 and after[1] <= REMOVED)
        assert ("did not take" in text) == (not took)
        others = [control] if trainer == "CleanCLIPTrainer" else without
        alone = any(accuracy > 0.5 and success <= REMOVED for accuracy, success in others)
        assert ("by itself" in text) == (took and alone)
        assert ("says nothing good" in text) == (after[0] < 0.5)
        assert ("did NOT" in text) == (after[1] > REMOVED)
        worse = max(accuracy for accuracy, _ in without) - after[0] > ACCURACY_LOSS
        assert ("It costs accuracy" in text) == (worse and after[0] > 0.5)
        assert all(f"{share:.1%}" in text for share in (before[1], control[1], after[1]))


def test_where_training_started_from_has_one_column() -> None:
    record = make_record()
    start = make_record("CLIPTrainer", after=record.before)
    facts = run_facts(record, [Control("undefended", start), Control("plain", make_record("CLIPTrainer"))])
    assert [column.label for column in facts.columns] == ["before CleanCLIP", "after CleanCLIP", "plain"]


def test_what_the_defences_noted_down_is_summed_up() -> None:
    def told(trainer: str, **changes: Any) -> str:
        return " ".join(note.text for note in notes(make_record(trainer, **changes)))

    def of_splits(*splits: dict[str, Any]) -> str:
        return told("SafeCLIPTrainer", details={"splits": list(splits)})

    text = of_splits(split(), split(epoch=7, poisons_in_safe_set=0.2, safe_share=0.26))
    assert "AUROC of 0.980" in text
    assert "10.0% of the poisons and 25.0% of all pairs at first, 20.0% of the poisons and 26.0%" in text
    assert "at first" not in of_splits(split())
    text = of_splits(split(auroc=None, poisons_in_safe_set=None, safe_set_poison_rate=None))
    assert "25.0%" in text and "AUROC" not in text
    assert "no pair safe in epoch 7 and 8, in" in of_splits(split(safe_share=0.0), split(epoch=7, safe_share=0.0))
    assert "fewer pairs than a batch safe in epoch 7, in which no image" in of_splits(split(safe_batches=0))
    assert "than a batch" not in of_splits(split(safe_batches=1), split(safe_share=0.0, safe_batches=0))
    assert "every pair safe in epoch 8," in of_splits(split(), split(epoch=7, safe_share=1.0))
    log = [
        {"loss": 1.0, "epoch": epoch, "match_similarity": 0.5, "poisoned_match_adversarial": share}
        for epoch, share in ((1.0, 0.1), (2.0, 0.3))
    ]
    assert "with their adversarial class in 20.0% of all cases" in told("RoCLIPTrainer", log=log)


def test_figures_of_another_kind_of_attack_are_no_attack_on_classification() -> None:
    measures = [ZERO_SHOT, {**attack(), "measure": "retrieval", "figures": ["top1_names_target"]}]
    found = statements(run_facts(make_record(measures=measures)))
    assert any("No attack on classification was measured" in statement.text for statement in found)


def with_placebos(prefix: str = "", high: float = 0.106, **measured: float) -> dict[str, Any]:
    """A record's measures and figures after, with placebos."""
    values = {"attack_success_rate": 0.128, "placebo_success_rate": 0.095, "excess_success_rate": 0.033}
    values |= {"placebo_success_rate_low": 0.083, "placebo_success_rate_high": high, **measured}
    measure = attack(prefix, target="frog")
    measure |= {"figures": [f"{prefix}{name}" for name in values], "placebos": 5}
    after = {"clean_accuracy": 0.8, **{f"{prefix}{name}": value for name, value in values.items()}}
    return {"measures": [ZERO_SHOT, measure], "after": after, "before": None}


@pytest.mark.parametrize("prefix", ["", "patch_"])
@pytest.mark.parametrize("trainer", ["CLIPTrainer", "CleanCLIPTrainer", "RoCLIPTrainer"])
def test_success_is_told_beside_that_of_patterns_nobody_planted(trainer: str, prefix: str) -> None:
    facts = run_facts(make_record(trainer, **with_placebos(prefix)))
    text = " ".join(statement.text for statement in statements(facts))
    assert (
        "12.8% of the triggered images are called frog, and 8.3% to 10.6% under patterns that were never planted"
    ) in text
    (group,) = (group for group in figure_groups(facts) if group.title.startswith("attack success"))
    shown = {row.name.removeprefix("patch "): row.cells[0].text for row in group.rows}
    assert "5 placebos" in group.title
    assert shown["excess success rate"] == "+3.3 points" and shown["placebo success rate"] == "9.5%"


@pytest.mark.parametrize(("placebo", "stopped"), [(0.01, False), (0.095, True)])
def test_what_placebos_do_as_well_is_not_held_against_a_defence(placebo: float, stopped: bool) -> None:
    measured = with_placebos(placebo_success_rate=placebo, placebo_success_rate_low=placebo)
    said = " ".join(statement.text for statement in statements(run_facts(make_record(**measured))))
    assert ("did NOT stop the attack" in said) == (not stopped)
    assert ("What is left of the attack needs no backdoor" in said) == stopped


def test_nothing_is_said_of_placebos_that_were_not_measured() -> None:
    assert "never planted" not in texts("result")
    same = " ".join(statement.text for statement in statements(run_facts(make_record(**with_placebos(high=0.083)))))
    assert "and 8.3% under patterns" in same

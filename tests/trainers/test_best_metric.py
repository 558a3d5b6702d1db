"""What chooses the best checkpoint is looked for before any step, and taken the right way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.training import digits, make_trainer

from hf_robust_clip import AttackSuccessEvaluator, CLIPTrainer, PatchTrigger
from hf_robust_clip.data.digits import CLASS_NAMES


def attack() -> AttackSuccessEvaluator:
    return AttackSuccessEvaluator(
        digits("test").select(range(20)), PatchTrigger(size=3), "eight", CLASS_NAMES, prefix="patch_"
    )


@pytest.mark.parametrize(
    "metric, evaluated, message",
    [
        ("eval_attack_success_rate", None, "'patch_trigger_distance'; a loss takes an eval_dataset"),
        (None, None, "metric_for_best_model='loss' is no figure of an evaluation; accepted are 'patch_attack"),
        ("clean_accuracy", {"first": 20, "second": 5}, "'patch_trigger_distance', 'first_loss', 'second_loss'"),
    ],
)
def test_a_figure_that_no_evaluation_has_is_refused_before_any_step(
    metric: str | None, evaluated: dict[str, int] | None, message: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"metric_for_best_model": metric, "load_best_model_at_end": True}
    given |= {"eval_strategy": "epoch", "save_strategy": "epoch", "evaluators": [attack()]}
    if evaluated is not None:
        given["eval_dataset"] = {name: digits("test").select(range(rows)) for name, rows in evaluated.items()}
    with pytest.raises(ValueError, match="metric_for_best_model=") as error:
        make_trainer(CLIPTrainer, tmp_path, **given)
    assert message in str(error.value)


class Adding(CLIPTrainer):
    """A trainer with a figure of its own."""

    def run_evaluators(self) -> dict[str, float]:
        return {**super().run_evaluators(), "own": 0.0}


def test_figures_that_are_not_known_beforehand_are_not_refused(tmp_path: Path) -> None:
    own: Any = {"metric_for_best_model": "own", "eval_strategy": "epoch"}
    make_trainer(Adding, tmp_path, evaluators=[attack()], **own)
    make_trainer(CLIPTrainer, tmp_path, evaluators=[attack(), lambda *_: {"own": 0.0}], **own)
    make_trainer(CLIPTrainer, tmp_path, evaluators=[attack()], **{**own, "eval_strategy": "no"})


def test_the_best_checkpoint_is_the_one_with_the_least_of_the_attack(tmp_path: Path) -> None:
    trainer = make_trainer(
        CLIPTrainer,
        tmp_path,
        evaluators=[attack()],
        metric_for_best_model="eval_patch_trigger_distance",
        load_best_model_at_end=True,
        eval_strategy="epoch",
        save_strategy="epoch",
    )
    trainer.train()
    found = [entry["eval_patch_trigger_distance"] for entry in trainer.state.log_history if "eval_runtime" in entry]
    assert len(set(found)) == 3 and trainer.state.best_metric == min(found)
    assert "eval_loss" not in trainer.evaluate()

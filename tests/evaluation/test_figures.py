"""What is known of figures by their names is true of what the evaluators return."""

from __future__ import annotations

from typing import Any

import pytest

from hf_robust_clip import (
    AttackSuccessEvaluator,
    CLIPTrainingArguments,
    LinearProbeEvaluator,
    PatchTrigger,
    PoisonSuccessEvaluator,
    RetrievalEvaluator,
    TextQueryEvaluator,
    WordTrigger,
    ZeroShotEvaluator,
)
from hf_robust_clip.data.digits import CLASS_NAMES
from hf_robust_clip.evaluation.embedding import Embedder
from hf_robust_clip.evaluation.figures import figure_names, less_is_better
from hf_robust_clip.evaluation.running import run_evaluators

#: What is in the names of figures of which more is better. Of all others, less is.
MORE = ("accuracy", "recall")


@pytest.fixture(scope="module")
def evaluators(pairs: Any) -> list[Any]:
    """Every evaluator of the package, with all the figures that it can give."""
    patch, chosen = PatchTrigger(size=3), pairs.select(range(4))
    return [
        ZeroShotEvaluator(pairs, CLASS_NAMES),
        AttackSuccessEvaluator(pairs, patch, "eight", CLASS_NAMES, prefix="patch_2_"),
        PoisonSuccessEvaluator(chosen, ["eight"] * 4, CLASS_NAMES, prefix="targeted_"),
        RetrievalEvaluator(pairs, trigger=patch, target="eight"),
        LinearProbeEvaluator(pairs, pairs, CLASS_NAMES, trigger=patch, target="eight"),
        TextQueryEvaluator(pairs, WordTrigger(), "eight", ks=(1, 12), prefix="word_"),
    ]


def test_names_are_known_before_anything_is_measured(evaluators: list[Any], tiny_model: Any, processor: Any) -> None:
    names = figure_names(evaluators)
    assert names is not None and len(set(names)) == len(names)
    assert set(run_evaluators(evaluators, processor, Embedder(tiny_model(0), processor))) == set(names)
    assert figure_names([*evaluators, lambda *_: {"own": 0.0}]) is None


def test_the_best_model_is_the_one_with_the_least_of_an_attack(evaluators: list[Any], tmp_path: Any) -> None:
    def greater(**given: Any) -> bool | None:
        return CLIPTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **given).greater_is_better

    for name in figure_names(evaluators) or ():
        more = any(word in name for word in MORE)
        assert less_is_better(name) is not more
        assert greater(metric_for_best_model=name) is more
        assert greater(metric_for_best_model=f"eval_{name}") is more
    # What is said goes before the name, and losses are the Trainer's to know.
    assert greater(metric_for_best_model="attack_success_rate", greater_is_better=True) is True
    assert greater(metric_for_best_model="pairs_loss") is False
    assert greater() is None

"""What evaluators state of their metrics is true of what they return, and decides which model is the best."""

from __future__ import annotations

from typing import Any

import pytest

from hf_robust_clip import (
    AttackSuccessEvaluator,
    CLIPTrainingArguments,
    Evaluator,
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
from hf_robust_clip.evaluation.running import run_evaluators
from hf_robust_clip.trainers.checks import decide_best_metric

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
    names = [name for evaluator in evaluators for name in evaluator.describe()["figures"]]
    assert len(set(names)) == len(names)
    assert set(run_evaluators(evaluators, processor, Embedder(tiny_model(0), processor))) == set(names)


def test_the_best_model_is_the_one_with_the_least_of_an_attack(evaluators: list[Any], tmp_path: Any) -> None:
    def greater(**given: Any) -> bool | None:
        args = CLIPTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **given)
        decide_best_metric(args, [*evaluators, lambda *_: {"own": 0.0}])
        return args.greater_is_better

    for name in (name for evaluator in evaluators for name in evaluator.describe()["figures"]):
        more = any(word in name for word in MORE)
        assert greater(metric_for_best_model=name) is more
        assert greater(metric_for_best_model=f"eval_{name}") is more
    # What is said goes before the name, and losses are the Trainer's to know.
    assert greater(metric_for_best_model="attack_success_rate", greater_is_better=True) is True
    assert greater(metric_for_best_model="attack_success_rate", greater_is_better=False) is False
    assert greater(metric_for_best_model="pairs_loss") is False
    assert greater() is None
    # Of a function's metrics nobody says which way they are better: as transformers has it, with a warning.
    assert greater(metric_for_best_model="own") is True


class Spread(Evaluator):
    name = "spread"

    def metrics(self) -> Any:
        return {"spread": "less"}

    def measure(self, embedder: Any) -> dict[str, float]:
        return {"spread": 1 - embedder.embed_images(self.dataset, self.image_column).mean(dim=0).norm().item()}


def test_an_evaluator_of_a_user_states_its_metrics(pairs: Any, tiny_model: Any, processor: Any, tmp_path: Any) -> None:
    spread = Spread(pairs, prefix="own_")
    assert 0 < spread(tiny_model(0), processor)["own_spread"] < 1
    assert spread.describe() == {"measure": "spread", "figures": ["own_spread"], "images": len(pairs)}
    args = CLIPTrainingArguments(str(tmp_path), use_cpu=True, metric_for_best_model="own_spread")
    decide_best_metric(args, [spread])
    assert args.greater_is_better is False

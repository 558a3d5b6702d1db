"""The names of the evaluators' figures: which there are, and of which less is better."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

#: The end of the names of figures of which less is better: what an attack achieves, and ranks, of which 1 is the best.
_LESS_IS_BETTER = re.compile(
    r"(attack_success_rate|poison_success_rate(_low|_high)?|trigger_distance|hit_rate_at_\d+|top\d+_names_target|"
    r"median_rank)$"
)


def less_is_better(name: str) -> bool:
    """
    Whether less of a figure is better, by the end of its name, whatever stands before it: `eval_`, a trigger's prefix.

    That holds of what an attack achieves (`attack_success_rate`, a linear probe's too; `poison_success_rate` and its
    bounds; `hit_rate_at_k` and `topk_names_target`, of queries and images that are not the target's), of
    `trigger_distance`, and of `median_rank`. Of accuracies and recalls more is better, with a trigger as well.
    """
    return _LESS_IS_BETTER.search(name) is not None


def figure_names(evaluators: Sequence[Any]) -> list[str] | None:
    """The names of all figures of some evaluators; `None` where one is not of this package, and may have more."""
    package = __name__.partition(".")[0]
    if any(type(evaluator).__module__.partition(".")[0] != package for evaluator in evaluators):
        return None
    return [name for evaluator in evaluators for name in evaluator.describe()["figures"]]

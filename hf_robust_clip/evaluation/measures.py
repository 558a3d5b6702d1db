"""The measures themselves: pure functions of predictions, ranks and embeddings, one definition each."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import issparse

#: Rank of a query that no candidate is right for: it is among no top k.
NOWHERE = np.iinfo(np.int64).max
#: Most similarities that are held at once.
_AT_ONCE = 4_000_000


class Proportion(NamedTuple):
    """A share in [0, 1] and the bounds of its 95% Wilson interval."""

    rate: float
    low: float
    high: float

    def under(self, name: str) -> dict[str, float]:
        """The share under a name, and its bounds under that name with `_low` and `_high`."""
        return {name: self.rate, f"{name}_low": self.low, f"{name}_high": self.high}


class SplitQuality(NamedTuple):
    """
    How well a split into safe and risky pairs keeps the poisons out; NaN where there is nothing to tell.

    `safe_share` of the pairs, in [0, 1]; `auroc` of telling clean from poisoned pairs by score, NaN unless there are
    both; `poisons_in_safe_set`, their number; `poison_share_in_safe_set`, the share of the poisons that are in the
    safe set, NaN without poisons; `safe_set_poison_rate`, the share of the safe set that are poisons, NaN where it is
    empty.
    """

    safe_share: float
    auroc: float
    poisons_in_safe_set: int
    poison_share_in_safe_set: float
    safe_set_poison_rate: float


# ---- Classification ----


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """
    Share of predictions that are right, in [0, 1]; NaN without any.

    Args:
        predictions, labels (array-like of shape `(N,)`): Class numbers, or names.
    """
    predicted, true = _pairs(predictions, labels, "labels")
    return _share(predicted == true)


def balanced_accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Mean over the classes that occur in `labels` of the share of each that is predicted right; NaN without any."""
    predicted, true = _pairs(predictions, labels, "labels")
    by_class = [_share(predicted[true == label] == label) for label in np.unique(true)]
    return float(np.mean(by_class)) if by_class else float("nan")


def top_k_accuracy(scores: ArrayLike, labels: ArrayLike, k: int) -> float:
    """
    Share of rows whose class is among the k of the highest scores, in [0, 1].

    Args:
        scores (array-like of shape `(N, C)`): Of equal ones the first is the higher.
        labels (array-like of shape `(N,)`): Class numbers.
        k (`int`): At least 1.
    """
    values = np.asarray(scores)
    return recall_at_k(best_ranks(values, np.arange(values.shape[1]) == np.asarray(labels)[:, None]), k)


# ---- Attacks ----


def attack_success_rate(predictions: ArrayLike, labels: ArrayLike, target: int | str) -> float:
    """
    Of the triggered images that are **not** of the target class, the share that is classified as the target, in
    [0, 1]; NaN where all are of it.

    Args:
        predictions, labels (array-like of shape `(N,)`): Class numbers, or names; predictions with the trigger on.
        target (`int` or `str`): The class that the attack aims at.
    """
    predicted, true = _pairs(predictions, labels, "labels")
    return _share(predicted[true != target] == target)


def triggered_accuracy(predictions: ArrayLike, labels: ArrayLike, target: int | str) -> float:
    """As [`attack_success_rate`], the share that is still classified right."""
    predicted, true = _pairs(predictions, labels, "labels")
    attacked = true != target
    return _share(predicted[attacked] == true[attacked])


def poison_success(predictions: ArrayLike, adversarial: ArrayLike) -> Proportion:
    """
    Share of the images of a targeted poisoning that are classified as the class that it aims each of them at.

    Args:
        predictions, adversarial (array-like of shape `(N,)`): Class numbers, or names.

    Returns:
        [`Proportion`]: NaN without images.
    """
    predicted, aims = _pairs(predictions, adversarial, "adversarial")
    return proportion(int((predicted == aims).sum()), len(aims))


def proportion(successes: int, total: int) -> Proportion:
    """The share of successes with its 95% Wilson interval; NaN where the total is 0."""
    if total == 0:
        return Proportion(float("nan"), float("nan"), float("nan"))
    from scipy.stats import binomtest  # takes half a second, which most trainings need not wait for

    interval = binomtest(successes, total).proportion_ci(confidence_level=0.95, method="wilson")
    return Proportion(successes / total, float(interval.low), float(interval.high))


def trigger_distance(clean: ArrayLike, triggered: ArrayLike) -> float:
    """
    Mean L2 distance between the embeddings of an image without and with trigger, in [0, 2].

    Args:
        clean, triggered (array-like of shape `(N, D)`): L2-normalised.
    """
    before, after = _pairs(clean, triggered, "triggered")
    return float(np.linalg.norm(after - before, axis=1).mean()) if len(before) else float("nan")


# ---- Retrieval ----


def best_ranks(similarities: ArrayLike, relevant: ArrayLike) -> NDArray[np.int64]:
    """
    The rank of each query's best right candidate.

    Args:
        similarities (array-like of shape `(Q, K)`): Of queries with candidates. Of equal ones the first ranks higher,
            and NaN ranks last.
        relevant (array-like of shape `(Q, K)`, bool): Which candidates are right; may broadcast.

    Returns:
        `np.ndarray` of shape `(Q,)`: int64, 0 for the nearest candidate, `NOWHERE` where none is right.
    """
    values = np.asarray(similarities)
    values = np.where(np.isnan(values), -np.inf, values)
    right = np.broadcast_to(np.asarray(relevant, dtype=bool), values.shape)
    best = np.where(right, values, -np.inf).max(axis=1, keepdims=True)  # (Q, 1)
    first = (right & (values == best)).argmax(axis=1)[:, None]
    ahead = (values > best) | ((values == best) & (np.arange(values.shape[1]) < first))
    return np.where(right.any(axis=1), ahead.sum(axis=1), NOWHERE)


def search_ranks(queries: ArrayLike, candidates: ArrayLike, relevant: Any) -> NDArray[np.int64]:
    """
    [`best_ranks`] by cosine similarity, for as many queries and candidates as there are.

    Args:
        queries (array-like of shape `(Q, D)`), candidates (array-like of shape `(K, D)`): L2-normalised embeddings.
        relevant (array of shape `(Q, K)`, bool): Dense, or a scipy sparse array whose rows can be sliced.
    """
    asked, offered = np.asarray(queries), np.asarray(candidates)
    rows = max(1, _AT_ONCE // max(len(offered), 1))
    ranks = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(asked), rows):
        part = relevant[start : start + rows]
        right = part.toarray() if issparse(part) else part
        ranks.append(best_ranks(asked[start : start + rows] @ offered.T, right))
    return np.concatenate(ranks)


def recall_at_k(ranks: ArrayLike, k: int) -> float:
    """Share of queries whose rank, from 0, is among the first k, in [0, 1]; NaN without queries."""
    return _share(np.asarray(ranks) < k)


def median_rank(ranks: ArrayLike) -> float:
    """The median of ranks, counted from 1 as the field does; NaN without queries."""
    values = np.asarray(ranks)
    return float(np.median(values)) + 1 if values.size else float("nan")


# ---- Splits ----


def split_quality(safe: ArrayLike, poisoned: ArrayLike, scores: ArrayLike | None = None) -> SplitQuality:
    """
    How well a split keeps the poisons out of the safe set.

    Args:
        safe (array-like of shape `(N,)`, bool): Which pairs the split calls safe.
        poisoned (array-like of shape `(N,)`, bool): Which are poisoned.
        scores (array-like of shape `(N,)`, *optional*): What the split goes by, higher for safer pairs: similarities,
            or probabilities. Pairs of score NaN, which has no place in a ranking, are left out of the AUROC. `None`:
            `safe` itself.
    """
    inside, poisons = (array.astype(bool) for array in _pairs(safe, poisoned, "poisoned"))
    values = np.asarray(inside if scores is None else scores, dtype=np.float64)
    _, values = _pairs(inside, values, "scores")
    ranked = ~np.isnan(values)
    clean = ~poisons[ranked]
    from sklearn.metrics import roc_auc_score  # takes a second, which most trainings need not wait for

    return SplitQuality(
        safe_share=_share(inside),
        auroc=float(roc_auc_score(clean, values[ranked])) if clean.any() and not clean.all() else float("nan"),
        poisons_in_safe_set=int((inside & poisons).sum()),
        poison_share_in_safe_set=_share(inside[poisons]),
        safe_set_poison_rate=_share(poisons[inside]),
    )


def _share(flags: NDArray[np.bool_]) -> float:
    return float(flags.mean()) if flags.size else float("nan")


def _pairs(first: ArrayLike, second: ArrayLike, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    one, two = np.asarray(first), np.asarray(second)
    if one.shape != two.shape:
        raise ValueError(f"{name} must have one entry for each row, shape {one.shape}, but has shape {two.shape}")
    return one, two

"""Each measure equals a plain loop that says what it means."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from hf_robust_clip.evaluation import measures
from hf_robust_clip.evaluation.measures import (
    NOWHERE,
    accuracy,
    attack_success_rate,
    balanced_accuracy,
    best_ranks,
    median_rank,
    poison_success,
    proportion,
    recall_at_k,
    search_ranks,
    split_quality,
    top_k_accuracy,
    trigger_distance,
    triggered_accuracy,
)

NAN = float("nan")
CLASSES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=20)
few = settings(max_examples=60, deadline=None)


def same(found: float, expected: float) -> bool:
    return (math.isnan(found) and math.isnan(expected)) or found == pytest.approx(expected, abs=1e-12)


@few
@given(CLASSES, st.integers(0, 4), st.booleans())
def test_classification_and_attack_by_loops(rows: list[tuple[int, int]], target: int, named: bool):
    hits, of_target, still_right, attacked = 0, 0, 0, 0
    by_class: dict[int, list[bool]] = {}
    for predicted, label in rows:
        hits += predicted == label
        by_class.setdefault(label, []).append(predicted == label)
        if label != target:
            attacked += 1
            of_target += predicted == target
            still_right += predicted == label
    predictions, labels = zip(*rows, strict=True)
    aim: int | str = target
    if named:
        predictions, labels, aim = [*map(str, predictions)], [*map(str, labels)], str(target)
    assert same(accuracy(predictions, labels), hits / len(rows))
    recalls = [sum(right) / len(right) for right in by_class.values()]
    assert same(balanced_accuracy(predictions, labels), sum(recalls) / len(recalls))
    assert same(attack_success_rate(predictions, labels, aim), of_target / attacked if attacked else NAN)
    assert same(triggered_accuracy(predictions, labels, aim), still_right / attacked if attacked else NAN)
    assert poison_success(predictions, labels).rate == pytest.approx(hits / len(rows))


@few
@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(1, 9))
def test_ranks_and_recall_by_sorting(seed: int, queries: int, candidates: int):
    rng = np.random.default_rng(seed)
    # Few values, so that many are equal; some NaN.
    similarities = rng.choice([-0.5, 0.0, 0.25, 1.0, NAN], size=(queries, candidates))
    relevant = rng.random((queries, candidates)) < 0.3
    ranks = best_ranks(similarities, relevant)
    for query in range(queries):
        order = sorted(
            range(candidates),
            key=lambda c, q=query: (-similarities[q, c] if similarities[q, c] == similarities[q, c] else 9.0, c),
        )
        places = [place for place, candidate in enumerate(order) if relevant[query, candidate]]
        assert ranks[query] == (places[0] if places else NOWHERE)
    for k in (1, 2, candidates, candidates + 5):
        found = sum(1 for rank in ranks.tolist() if rank < k) / queries
        assert recall_at_k(ranks, k) == pytest.approx(found)
    assert recall_at_k(ranks, candidates + 1) == pytest.approx(relevant.any(axis=1).mean())


def test_a_model_that_gives_nan_finds_nothing_by_it():
    assert best_ranks([[NAN, 0.1, NAN]], [[True, False, False]]).tolist() == [1]


@pytest.mark.parametrize("at_once", [1, 7, 10**6])
def test_search_is_the_same_in_parts_and_with_sparse_answers(at_once: int, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    queries, candidates = rng.normal(size=(9, 4)), rng.normal(size=(6, 4))
    relevant = rng.random((9, 6)) < 0.3
    expected = best_ranks(queries @ candidates.T, relevant)
    monkeypatch.setattr(measures, "_AT_ONCE", at_once)
    assert search_ranks(queries, candidates, relevant).tolist() == expected.tolist()
    assert search_ranks(queries, candidates, csr_array(relevant)).tolist() == expected.tolist()
    assert search_ranks(queries[:0], candidates, relevant[:0]).tolist() == []


def test_top_k_counts_the_k_highest():
    scores = np.array([[6.0, 5, 4, 3, 2, 1]] * 6)
    for k in range(1, 7):
        assert top_k_accuracy(scores, np.arange(6), k) == pytest.approx(k / 6)
    # Of equal scores the first is the higher, as in argmax.
    assert top_k_accuracy([[1.0, 1.0]] * 2, [0, 1], 1) == 0.5


def test_median_rank_counts_from_one():
    assert median_rank([0]) == 1 and median_rank([0, 1, 7]) == 2 and median_rank([0, 1]) == 1.5


@pytest.mark.parametrize("successes, total", [(0, 8), (3, 8), (16, 16)])
def test_the_interval_solves_wilsons_equation(successes: int, total: int):
    share, low, high = proportion(successes, total)
    assert share == successes / total and 0 <= low <= share <= high <= 1
    for bound in (low, high):
        # Where the true share is a bound, the one found is 1.96 standard errors away.
        assert (share - bound) ** 2 == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / total, abs=1e-12)


@few
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from([0.1, 0.2, 0.5, NAN])), max_size=12))
def test_split_quality_by_loops(rows: list[tuple[bool, bool, float]]):
    inside = sum(1 for safe, poisoned, _ in rows if safe and poisoned)
    poisons = sum(1 for _, poisoned, _ in rows if poisoned)
    safe_rows = sum(1 for safe, _, _ in rows if safe)
    wins = [
        (clean > bad) + 0.5 * (clean == bad)
        for _, clean_poisoned, clean in rows
        for _, bad_poisoned, bad in rows
        if not clean_poisoned and bad_poisoned and clean == clean and bad == bad
    ]
    safe, poisoned, scores = ([row[i] for row in rows] for i in range(3))
    quality = split_quality(np.array(safe, bool), np.array(poisoned, bool), np.array(scores, float))
    assert same(quality.safe_share, safe_rows / len(rows) if rows else NAN)
    assert same(quality.auroc, sum(wins) / len(wins) if wins else NAN)
    assert quality.poisons_in_safe_set == inside
    assert same(quality.poison_share_in_safe_set, inside / poisons if poisons else NAN)
    assert same(quality.safe_set_poison_rate, inside / safe_rows if safe_rows else NAN)
    if rows:
        alone = split_quality(safe, poisoned)
        assert same(alone.auroc, split_quality(safe, poisoned, [float(flag) for flag in safe]).auroc)


def test_trigger_distance_is_the_mean_of_euclidean_ones():
    assert trigger_distance([[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, 1.0]]) == pytest.approx(1.0)
    assert trigger_distance([[1.0, 0.0]], [[0.0, 1.0]]) == pytest.approx(2**0.5)


def test_nothing_to_measure_is_nan():
    empty = np.zeros(0)
    figures = [accuracy(empty, empty), balanced_accuracy(empty, empty), attack_success_rate([1], [1], 1)]
    figures += [triggered_accuracy([1], [1], 1), recall_at_k(empty, 1), median_rank(empty)]
    figures += [*proportion(0, 0), trigger_distance(np.zeros((0, 2)), np.zeros((0, 2)))]
    assert np.isnan(figures).all()


@pytest.mark.parametrize(
    "measure, arguments, name",
    [
        (accuracy, ([1, 2], [1]), "labels"),
        (attack_success_rate, ([1, 2], [1], 0), "labels"),
        (poison_success, ([1], [1, 2]), "adversarial"),
        (split_quality, ([True], [True, False]), "poisoned"),
        (split_quality, ([True], [True], [0.1, 0.2]), "scores"),
        (trigger_distance, ([[1.0]], [[1.0], [0.0]]), "triggered"),
    ],
)
def test_what_does_not_fit_together_is_refused(measure, arguments, name: str):
    with pytest.raises(ValueError, match=f"{name} must have one entry for each row"):
        measure(*arguments)

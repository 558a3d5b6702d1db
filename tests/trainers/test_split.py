"""A split takes the safest pairs, by threshold first and by growth later; its record says what is inside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from hf_robust_clip import fit_similarity_mixture
from hf_robust_clip.defences.base import PairScores
from hf_robust_clip.defences.split import BINS, SplitHistory

ROWS = 400


def two_groups(poisons: int = 100) -> PairScores:
    """Poisoned pairs about 0.1, clean ones about 0.5."""
    generator = np.random.default_rng(0)
    poisoned = np.zeros(ROWS, dtype=bool)
    poisoned[generator.choice(ROWS, poisons, replace=False)] = True
    similarities = np.where(poisoned, 0.1, 0.5) + generator.normal(0, 0.08, ROWS)
    return PairScores(similarities.astype(np.float32), poisoned)


def split(scores: list[PairScores], growth: float = 0.05, cap: float = 0.85, threshold: float = 0.9) -> SplitHistory:
    history = SplitHistory(len(scores[0].similarities))
    for number, score in enumerate(scores):
        history.add(6 + number, score, threshold, growth, cap, seed=0)
    return history


def test_first_split_is_by_threshold() -> None:
    scores = two_groups()
    history = split([scores])
    assert history.safe.tolist() == (fit_similarity_mixture(scores.similarities) >= 0.9).tolist()
    assert history.records[0].safe_share == history.safe.mean()
    assert history.epoch == 6


def test_safe_set_grows_from_the_top_up_to_the_cap() -> None:
    scores = two_groups()
    history = split([scores] * 6)
    first = round(history.records[0].safe_share * ROWS)
    counts = [min(first + 20 * epoch, 340) for epoch in range(6)]
    assert [round(record.safe_share * ROWS) for record in history.records] == counts
    top = np.argsort(-scores.similarities)[: counts[-1]]
    assert sorted(top) == np.flatnonzero(history.safe).tolist()


def test_growth_counts_epochs_not_splits() -> None:
    scores, history = two_groups(), SplitHistory(ROWS)
    for epoch in (3, 7):
        history.add(epoch, scores, 0.9, 0.02, 1.0, seed=0)
    one, two = (record.safe_share for record in history.records)
    assert two - one == pytest.approx(4 * 0.02)


def test_cap_holds_at_the_first_split() -> None:
    assert split([two_groups()], cap=0.3).safe.mean() == 0.3


def test_unusable_rows_are_risky_however_large_the_safe_set() -> None:
    scores = two_groups()
    scores.similarities[[5, 50]] = np.nan
    history = split([scores] * 2, growth=1.0, cap=1.0)
    assert not history.safe[[5, 50]].any()
    assert history.safe.sum() == ROWS - 2


def test_equal_similarities_rank_by_row() -> None:
    similarities = np.repeat(np.array([0.1, 0.5], dtype=np.float32), 10)
    history = split([PairScores(similarities, None)] * 2, growth=0.1, cap=0.6, threshold=0.9)
    assert np.flatnonzero(history.safe).tolist() == [0, 1, *range(10, 20)]


def test_record_says_how_the_poisons_fared() -> None:
    scores = two_groups()
    record, safe = (history := split([scores], threshold=0.01)).records[0], history.safe
    inside = (safe & scores.poisoned).sum()
    assert 0 < inside < 100
    assert record.poisons_in_safe_set == inside / 100
    assert record.safe_set_poison_rate == inside / safe.sum()
    assert record.auroc == roc_auc_score(~scores.poisoned, scores.similarities)
    assert record.similarity_threshold == scores.similarities[safe].min()
    assert record.risky_mean == pytest.approx(0.1, abs=0.03)
    assert record.safe_mean == pytest.approx(0.5, abs=0.03)
    assert record.risky_variance == pytest.approx(0.08**2, rel=0.3)
    assert record.safe_variance == pytest.approx(0.08**2, rel=0.3)
    assert (record.risky_weight, record.safe_weight) == pytest.approx((0.25, 0.75), abs=0.03)


@pytest.mark.parametrize("poisoned", [None, np.zeros(ROWS, dtype=bool), np.ones(ROWS, dtype=bool)])
def test_record_is_silent_on_poisons_that_cannot_be_told(poisoned: np.ndarray | None) -> None:
    record = split([PairScores(two_groups().similarities, poisoned)]).records[0]
    assert np.isnan([record.auroc, record.poisons_in_safe_set, record.safe_set_poison_rate]).all()


def test_histograms_count_every_usable_pair_once() -> None:
    scores = two_groups()
    scores.similarities[np.flatnonzero(~scores.poisoned)[0]] = np.nan
    histogram = split([scores]).histograms[0]
    assert histogram.shape == (2, BINS)
    assert histogram.sum(axis=1).tolist() == [299, 100]
    centres = np.linspace(-1, 1, BINS + 1)[:-1] + 1 / BINS
    for group, poisoned in zip(histogram, (False, True), strict=True):
        mean = np.nanmean(scores.similarities[scores.poisoned == poisoned])
        assert (group * centres).sum() / group.sum() == pytest.approx(mean, abs=0.01)


def test_state_makes_a_round_trip() -> None:
    history = split([two_groups(), PairScores(two_groups().similarities, None)])
    copy = split([two_groups(50)])
    copy.load_state_dict(history.state_dict())
    assert np.array_equal(copy.safe, history.safe)
    assert copy.epoch == history.epoch == 7
    np.testing.assert_array_equal(np.array(copy.records), np.array(history.records))
    np.testing.assert_array_equal(copy.histograms, history.histograms)
    for one in (history, copy):
        one.add(8, two_groups(), 0.9, 0.05, 0.85, seed=0)
    assert np.array_equal(copy.safe, history.safe)


def test_state_without_a_split_forgets_the_one_there_is() -> None:
    history = split([two_groups()])
    assert not SplitHistory(ROWS).state_dict()
    history.load_state_dict({})
    assert history.safe is None
    assert history.epoch is None


def test_state_takes_a_bit_a_pair() -> None:
    history = split([two_groups()])
    assert history.state_dict()["bits"].nbytes == ROWS / 8


def test_rows_are_safe_as_the_mask_has_them() -> None:
    history = SplitHistory(ROWS)
    assert not history.are_safe(torch.arange(3))
    history = split([two_groups()])
    found = [history.are_safe(torch.tensor([row])) for row in range(ROWS)]
    assert found == history.safe.tolist()
    safe, risky = (torch.from_numpy(np.flatnonzero(history.safe == kind)) for kind in (True, False))
    assert history.are_safe(safe) and not history.are_safe(torch.cat([safe, risky[:1]])) and not history.are_safe(None)
    assert history.to("meta").are_safe(safe)  # it stays on the host

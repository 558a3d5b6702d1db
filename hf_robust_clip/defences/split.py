"""SafeCLIP's split of the pairs into safe and risky ones, and the record of it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..data.sampling import pack_mask, unpack_mask
from ..evaluation.measures import split_quality
from ..mixture import SimilarityMixture
from .base import PairScores

#: Bins of the histograms over similarities in [-1, 1].
BINS = 200
#: Pairs whose probability is computed at a time, 8 bytes each.
_CHUNK = 1_000_000


class SplitRecord(NamedTuple):
    """
    What an epoch's split was like. The last three are NaN unless the dataset has a `poisoned` column with a poison,
    and the last one of an empty safe set.

    `epoch`, from 0; `safe_share` of the pairs, in [0, 1]; `similarity_threshold`, the least similarity of a safe pair
    (NaN without one); mean, variance and weight of the mixture's two components; `auroc` of telling clean from
    poisoned pairs by similarity; `poisons_in_safe_set`, the share of the poisons that are in the safe set;
    `safe_set_poison_rate`, the share of the safe set that are poisons.
    """

    epoch: float
    safe_share: float
    similarity_threshold: float
    risky_mean: float
    risky_variance: float
    risky_weight: float
    safe_mean: float
    safe_variance: float
    safe_weight: float
    auroc: float = float("nan")
    poisons_in_safe_set: float = float("nan")
    safe_set_poison_rate: float = float("nan")

    @property
    def separation(self) -> float:
        """
        How far apart the mixture's components are, in their common standard deviation (Ashman's D: Ashman, Bird and
        Zepf, The Astronomical Journal 108, 1994): 0 for one group, above 2 for two that hardly overlap.
        """
        return (self.safe_mean - self.risky_mean) / math.sqrt((self.safe_variance + self.risky_variance) / 2)


class SplitHistory(nn.Module):
    """
    The splits of a training so far: of the current one a bit a pair, of all a [`SplitRecord`] and a histogram. All of
    it stays on the host.

    Args:
        rows (`int`): Of the dataset.
    """

    bits: torch.Tensor | None  # uint8 (ceil(N / 8),)
    table: torch.Tensor | None  # float64 (splits, fields)
    counts: torch.Tensor | None  # int64 (splits, 2, BINS)

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        for name in ("bits", "table", "counts"):
            self.register_buffer(name, None)

    @property
    def safe(self) -> np.ndarray | None:
        """Which pairs the latest split calls safe `(N,)`, bool, a new array each time; `None` before the first."""
        return None if self.bits is None else unpack_mask(self.bits, self.rows)

    @property
    def records(self) -> list[SplitRecord]:
        """One a split."""
        return [] if self.table is None else [SplitRecord(*row) for row in self.table.tolist()]

    @property
    def histograms(self) -> list[np.ndarray]:
        """
        One a split, int64 `(2, BINS)`: how many clean and how many poisoned pairs have a similarity in each of `BINS`
        equal parts of [-1, 1]; all count as clean where it is not known.
        """
        return [] if self.counts is None else list(self.counts.numpy())

    @property
    def epoch(self) -> int | None:
        """Of the latest split."""
        return None if self.table is None else int(self.table[-1, 0])

    def are_safe(self, rows: torch.Tensor | None) -> bool:
        """Whether all of these rows `(B,)`, int64, are safe; before the first split none is."""
        if self.bits is None or rows is None:
            return False
        numbers = rows.numpy()
        return bool((self.bits.numpy()[numbers >> 3] >> (7 - (numbers & 7)) & 1).all())

    def clear(self) -> None:
        """Forget everything."""
        self.bits = self.table = self.counts = None

    def _apply(self, fn: Any, recurse: bool = True) -> SplitHistory:
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.clear()
        if f"{prefix}bits" in state_dict:
            self.bits, self.table, self.counts = (state_dict[prefix + name] for name in ("bits", "table", "counts"))
            unpack_mask(self.bits, self.rows)  # refuses one of other rows

    def add(self, epoch: int, scores: PairScores, threshold: float, growth: float, cap: float, seed: int) -> None:
        """
        Split the pairs anew (arXiv 2310.05862, section 4.2).

        At the first split the pairs of probability `threshold` and more are safe. At later ones the safe set is the
        top of the ranking by probability, then similarity, and larger by `growth` an epoch; never above `cap`.
        Unusable pairs are risky.

        Args:
            epoch (`int`): From 0.
            scores ([`PairScores`]): Of all pairs.
            threshold, growth, cap (`float`): Shares, as in [`SafeCLIPTrainingArguments`].
            seed (`int`): Of the mixture's subsample.
        """
        similarities = scores.similarities
        usable = ~np.isnan(similarities)
        values = similarities if usable.all() else similarities[usable]
        mixture = SimilarityMixture.fit(values, seed=seed)
        if self.records:
            first = self.records[0]
            count = round((first.safe_share + growth * (epoch - int(first.epoch))) * len(similarities))
        else:
            count = _count_above(mixture, values, threshold)
        count = min(count, int(cap * len(similarities)), len(values))
        # The probability never falls as similarity rises, so the most similar ones are the top by both; ties by row.
        lowest = float(np.partition(values, len(values) - count)[len(values) - count]) if count else float("nan")
        safe = similarities > lowest
        safe[np.flatnonzero(similarities == lowest)[: count - np.count_nonzero(safe)]] = True
        record = SplitRecord(
            epoch,
            count / len(similarities),
            lowest,
            *(
                float(values[component])
                for component in (0, 1)
                for values in (mixture.means, mixture.variances, mixture.weights)
            ),
        )
        poisoned = scores.poisoned if scores.poisoned is not None else np.zeros(len(similarities), dtype=bool)
        groups = [similarities[usable & of_kind] for of_kind in (~poisoned, poisoned)]
        if all(len(group) for group in groups):
            quality = split_quality(safe, poisoned, similarities)
            record = record._replace(
                auroc=quality.auroc,
                poisons_in_safe_set=quality.poison_share_in_safe_set,
                safe_set_poison_rate=quality.safe_set_poison_rate,
            )
        histogram = np.stack([np.histogram(np.clip(group, -1, 1), BINS, (-1.0, 1.0))[0] for group in groups])
        self.bits = pack_mask(safe)
        self.table = torch.tensor([*self.records, record], dtype=torch.float64)
        self.counts = torch.from_numpy(np.stack([*self.histograms, histogram]))

    def to_list(self, batch: int | None = None) -> list[dict[str, Any]]:
        """
        The splits ready for JSON: the fields of their [`SplitRecord`], `None` where one is NaN; `histogram`: how
        many `clean` and how many `poisoned` pairs have a similarity in each of equal parts of [-1, 1]; and with a
        `batch`, the pairs of one, `safe_batches`: how many the safe pairs fill.
        """
        return [
            {
                **{name: value if math.isfinite(value) else None for name, value in record._asdict().items()},
                "epoch": int(record.epoch),
                "histogram": dict(zip(("clean", "poisoned"), histogram.tolist(), strict=True)),
                "safe_batches": None if batch is None else round(record.safe_share * self.rows) // batch,
            }
            for record, histogram in zip(self.records, self.histograms, strict=True)
        ]


def _count_above(mixture: SimilarityMixture, similarities: np.ndarray, threshold: float) -> int:
    """How many pairs have at least this probability of being safe."""
    chunks = (similarities[start : start + _CHUNK] for start in range(0, len(similarities), _CHUNK))
    return sum(int(np.count_nonzero(mixture.probability(chunk) >= threshold)) for chunk in chunks)

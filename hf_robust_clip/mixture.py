"""Two Gaussians over the similarities of all pairs: how probable it is that a pair is of the more similar ones."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

#: The mixture is fitted to no more similarities than these, drawn at random; all of them get a probability.
MAX_FITTED = 1_000_000
#: Cosine similarities lie in [-1, 1], give or take the rounding of half precision.
LIMIT = 1.001
#: Similarities that differ by less than this are equal up to the rounding of single precision.
MIN_SPREAD = 1e-6

_CHUNK = 1_000_000


def fit_similarity_mixture(similarities: Any, seed: int = 0) -> np.ndarray:
    """
    Probability of each pair to be safe: to come from the component with the larger mean of two Gaussians fitted to the
    similarities of all pairs (SafeCLIP, section 4.2).

    [`SimilarityMixture`] has the fit, the errors and what is done where there are no two groups.

    Args:
        similarities (array-like): `(N,)`, cosine similarities of image and caption, in `[-1, 1]`.
        seed (`int`): Of the fit.

    Returns:
        `np.ndarray`: `(N,)`, float64 in `[0, 1]`. Never falls as the similarity rises, and is the same for equal
        similarities, in whatever order they come.
    """
    return SimilarityMixture.fit(similarities, seed=seed).probability(similarities)


@dataclass(frozen=True, eq=False)
class SimilarityMixture:
    """
    Two Gaussians over cosine similarities, the risky one first, the safe one last.

    From "Better Safe than Sorry: Pre-training CLIP against Targeted Data Poisoning and Backdoor Attacks" (Yang, Gao
    and Mirzasoleiman, ICML 2024, arXiv 2310.05862), section 4.2.

    Args:
        means (`np.ndarray`): `(2,)`, the larger one last.
        variances (`np.ndarray`): `(2,)`, positive.
        weights (`np.ndarray`): `(2,)`, positive shares of all pairs that sum to 1.

    Raises:
        `ValueError`: If they are anything else.
    """

    means: np.ndarray
    variances: np.ndarray
    weights: np.ndarray

    def __post_init__(self) -> None:
        for name in ("means", "variances", "weights"):
            value = np.array(getattr(self, name), dtype=np.float64)
            if value.shape != (2,) or not np.isfinite(value).all() or (name != "means" and value.min() <= 0):
                accepted = "finite" if name == "means" else "finite and positive"
                raise ValueError(f"{name} must be two {accepted} numbers, but is {value.tolist()}")
            object.__setattr__(self, name, value)
        if self.means[0] > self.means[1]:
            raise ValueError(f"means must have the larger one, of the safe pairs, last, but is {self.means.tolist()}")
        if abs(self.weights.sum() - 1) > 1e-6:
            raise ValueError(f"weights must sum to 1, but is {self.weights.tolist()}")

    @classmethod
    def fit(cls, similarities: Any, seed: int = 0) -> SimilarityMixture:
        """
        Fit by expectation-maximisation, from the two groups that k-means finds.

        Of more than a million similarities a million is drawn at random. The result depends on the similarities and
        the seed alone, not on the order in which the similarities come.

        Similarities that all agree to a millionth give no evidence of two groups. Both components are then the same,
        so that every probability is 0.5, and a `UserWarning` says so.

        Args:
            similarities (array-like): `(N,)`, numbers in `[-1, 1]`; `N` at least 2.
            seed (`int`): Of the draw and of k-means, in `[0, 2**32)`.

        Raises:
            `ValueError`: If there are fewer than two similarities or they are not such an array.
        """
        values = _check(similarities)
        if len(values) < 2:
            raise ValueError(f"similarities has {len(values)} value(s); a mixture of two needs at least 2")
        values = np.sort(values)  # for the order not to matter
        lowest, highest = float(values[0]), float(values[-1])
        if highest - lowest < MIN_SPREAD:
            warnings.warn(
                f"all {len(values)} similarities are {lowest:.6g}, so none is safer than another: every probability "
                "of being safe is 0.5. Does the model give every input the same embedding?",
                UserWarning,
                stacklevel=2,
            )
            return cls(np.full(2, lowest), np.full(2, MIN_SPREAD**2), np.full(2, 0.5))
        if len(values) > MAX_FITTED:
            values = np.random.default_rng(seed).choice(values, MAX_FITTED, replace=False)
        from sklearn.mixture import GaussianMixture  # takes a second, which most trainings need not wait for

        values = values.astype(np.float64)
        centre, scale = values.mean(), values.std()
        # In units of the data, so that the floor on the variances is a millionth of the data's. The tolerance is on
        # the mean log-likelihood: scikit-learn's own, 1e-3, ends before a small group of poisoned pairs is found.
        mixture = GaussianMixture(n_components=2, reg_covar=1e-6, tol=1e-5, max_iter=500, random_state=seed)
        mixture.fit(((values - centre) / scale)[:, None])
        order = np.argsort(mixture.means_[:, 0])
        means = centre + scale * mixture.means_[order, 0]
        return cls(means, scale**2 * mixture.covariances_[order, 0, 0], mixture.weights_[order])

    def probability(self, similarities: Any) -> np.ndarray:
        """
        Probability of being safe.

        Of two Gaussians the wider one wins far out on both sides: by Bayes' rule, the most similar pairs would be
        risky where the safe component is the narrower one, and the least similar ones safe where it is the wider one.
        So this is the posterior as far as it rises with the similarity: above its peak it keeps the value of the peak,
        or below its trough that of the trough.

        Args:
            similarities (array-like): `(N,)`, numbers in `[-1, 1]`.

        Returns:
            `np.ndarray`: `(N,)`, float64 in `[0, 1]`, never falling as the similarity rises. Saturates at 1 for very
            similar pairs: to rank pairs, break its ties by the similarity.

        Raises:
            `ValueError`: If the similarities are not such an array.
        """
        values = _check(similarities)
        (risky_mean, safe_mean), (risky_variance, safe_variance) = self.means.tolist(), self.variances.tolist()
        # The log-odds are a parabola with the derivative `curve * x - offset`.
        curve = 1 / risky_variance - 1 / safe_variance
        offset = risky_mean / risky_variance - safe_mean / safe_variance
        anchor = min(max(offset / curve, -LIMIT), LIMIT) if curve else 0.0  # the vertex, or the end next to it
        log_odds = (
            math.log(self.weights[1] / self.weights[0])
            - math.log(safe_variance / risky_variance) / 2
            - (anchor - safe_mean) ** 2 / (2 * safe_variance)
            + (anchor - risky_mean) ** 2 / (2 * risky_variance)
        )
        probability = np.empty(len(values), dtype=np.float64)
        for start in range(0, len(values), _CHUNK):
            chunk = values[start : start + _CHUNK].astype(np.float64)
            # The parabola as the distance to the anchor times the mean slope up to there, which is negative where the
            # posterior falls. The sizes of both grow with the distance: not even rounding makes a probability fall.
            slope = np.maximum(curve / 2 * (chunk + anchor) - offset, 0)
            exponent = np.clip(-(log_odds + (chunk - anchor) * slope), -700, 700)
            probability[start : start + _CHUNK] = 1 / (1 + np.exp(exponent))
        return probability

    def density(self, x: Any) -> np.ndarray:
        """
        Density of each component times its weight, for plots: their sum is the density of the mixture.

        Args:
            x (array-like): `(N,)`, any numbers.

        Returns:
            `np.ndarray`: `(2, N)`, float64, per unit of similarity; of the risky component first.
        """
        distance = np.asarray(x, dtype=np.float64) - self.means[:, None]
        peak = self.weights / np.sqrt(2 * np.pi * self.variances)
        return peak[:, None] * np.exp(-(distance**2) / (2 * self.variances[:, None]))


def _check(similarities: Any) -> np.ndarray:
    values = np.asarray(similarities)
    if values.ndim != 1 or values.dtype.kind not in "fiu":
        raise ValueError(
            f"similarities must be numbers of shape (N,), but has shape {values.shape} and type {values.dtype}"
        )
    # A NaN makes both comparisons false.
    if len(values) and not (values.min() >= -LIMIT and values.max() <= LIMIT):
        wrong = ~np.isfinite(values)
        if not wrong.any():
            wrong = np.abs(values.astype(np.float64)) > LIMIT
        first = int(wrong.argmax())
        raise ValueError(
            f"similarities must be finite and in [-1, 1], but similarities[{first}] is {values[first]}, the first of "
            f"{int(wrong.sum())} such value(s)"
        )
    return values

"""Local outlier scores against random references: k-distance, SLOF and DAO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

#: Neighbors that count, and the sizes of the references.
NEIGHBORS = 16
REFERENCES = (256, 512, 1024, 2048)
#: Distances below this are rounding.
_LEAST = 1e-5


class LocalScores(NamedTuple):
    """
    One float32 a row, more is more suspect: `k_distance`, the distance to the k-th nearest row of a reference; `slof`,
    the mean of its ratio to that of the neighbors (simplified local outlier factor, Schubert, Zimek and Kriegel,
    2014); `dao`, the mean log ratio, weighed by the neighbors' local intrinsic dimension (dimensionality-aware
    outliers, Anderberg et al., 2024).
    """

    k_distance: Floats
    slof: Floats
    dao: Floats


class Reference:
    """
    Rows that others are compared with, and what their own neighborhoods are like.

    Args:
        rows (`(R, D)` floats): L2-normalised, of more than `neighbors` + 1 rows.
        numbers (`(R,)` int): What the rows are called: a row is never its own neighbor.
        neighbors (`int`, defaults to 16): The k of the scores.

    Raises:
        `ValueError`: If there are too few rows.
    """

    def __init__(self, rows: Floats, numbers: NDArray[np.int64], neighbors: int = NEIGHBORS) -> None:
        if len(rows) < neighbors + 2:
            raise ValueError(f"rows={len(rows)} are too few for {neighbors} neighbors: {neighbors + 2} are needed")
        self.rows, self.numbers, self.neighbors = np.ascontiguousarray(rows, dtype=np.float32), numbers, neighbors
        distances, _ = self._nearest(self.rows, numbers)
        self._k_distance, self._dimension = distances[:, -1], _dimension(distances)

    def scores(self, rows: Floats, numbers: NDArray[np.int64]) -> LocalScores:
        """The scores of rows `(N, D)`, L2-normalised, called `numbers (N,)`."""
        distances, nearest = self._nearest(np.asarray(rows, dtype=np.float32), numbers)
        reach = distances[:, -1]
        ratio = reach[:, None] / self._k_distance[nearest]  # (N, k)
        dao = (self._dimension[nearest] * np.log(ratio)).mean(axis=1)
        return LocalScores(reach, ratio.mean(axis=1), dao)

    def _nearest(self, rows: Floats, numbers: NDArray[np.int64]) -> tuple[Floats, NDArray[np.intp]]:
        """Distances to, and places of, the k nearest rows of the reference, the nearest first."""
        similarity = rows @ self.rows.T
        similarity[numbers[:, None] == self.numbers[None, :]] = -np.inf
        count = self.neighbors
        nearest = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
        found = np.take_along_axis(similarity, nearest, axis=1)
        order = np.argsort(-found, axis=1, kind="stable")
        nearest = np.take_along_axis(nearest, order, axis=1)
        squared = 2 - 2 * np.take_along_axis(found, order, axis=1)
        return np.sqrt(np.maximum(squared, _LEAST**2)).astype(np.float32), nearest


def draw_references(
    sample: Floats,
    numbers: NDArray[np.int64],
    sizes: Sequence[int] = REFERENCES,
    rounds: int = 2,
    seed: int = 0,
    neighbors: int = NEIGHBORS,
) -> list[Reference]:
    """
    References of several sizes, several times each, out of a sample of rows.

    Args:
        sample (`(S, D)` floats), numbers (`(S,)` int): The rows, and what they are called.
        sizes (sequence of `int`): Rows of a reference; no more than the sample has.
        rounds (`int`): References of each size.
        seed (`int`): Of the draw.
        neighbors (`int`): The k of the scores.
    """
    rng = np.random.default_rng(seed)
    sizes = sorted({min(size, len(sample)) for size in sizes})
    drawn = [rng.permutation(len(sample))[:size] for size in sizes for _ in range(rounds)]
    return [Reference(sample[rows], numbers[rows], neighbors) for rows in drawn if len(rows) >= neighbors + 2]


def local_scores(references: Sequence[Reference], rows: Floats, numbers: NDArray[np.int64]) -> LocalScores:
    """The means of the scores of rows over references; zeros where there are none."""
    if not references:
        return LocalScores(*(np.zeros(len(rows), dtype=np.float32) for _ in range(3)))
    found = [reference.scores(rows, numbers) for reference in references]
    means: list[Floats] = [np.stack(part).mean(axis=0).astype(np.float32) for part in zip(*found, strict=True)]
    return LocalScores(*means)


def _dimension(distances: Floats) -> Floats:
    """The local intrinsic dimension `(N,)` of neighborhoods, by maximum likelihood, from their distances `(N, k)`."""
    logs = np.log(distances / distances[:, -1:] + 1e-4).sum(axis=1)
    return (-distances.shape[1] / np.minimum(logs, -1e-6)).astype(np.float32)

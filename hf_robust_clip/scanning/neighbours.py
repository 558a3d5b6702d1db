"""Local outlier scores against random references: k-distance, SLOF and DAO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

Floats = NDArray[np.float32]

#: Neighbors that count, and the sizes of the references.
NEIGHBORS = 16
REFERENCES = (256, 512, 1024, 2048)
#: How often references are drawn.
ROUNDS = 2
#: Distances below this are rounding.
_LEAST = 1e-5
#: Share of the median k-distance of a reference below which one counts as that much: rows that occur many times have
#: none, and would make outliers of all that are next to them.
_LEAST_SHARE = 0.1


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
        rows (`(R, D)` floats): Of more than `neighbors` + 1 rows.
        numbers (`(R,)` int): What the rows are called: a row is never its own neighbor.
        neighbors (`int`, defaults to 16): The k of the scores.
        sizes (sequence of `int`, *optional*): The first so many rows are a reference each, and scores are the means
            over them. `None`: all of the rows.

    Raises:
        `ValueError`: If there are too few rows.
    """

    def __init__(
        self,
        rows: Floats,
        numbers: NDArray[Any],
        neighbors: int = NEIGHBORS,
        sizes: Sequence[int] | None = None,
    ) -> None:
        self.sizes = sorted({min(size, len(rows)) for size in sizes or (len(rows),)})
        if not self.sizes or self.sizes[0] < neighbors + 2:
            raise ValueError(f"rows={len(rows)} are too few for {neighbors} neighbors: {neighbors + 2} are needed")
        self.rows, self.neighbors = _unit(rows), neighbors
        self._order = np.argsort(numbers, kind="stable")
        self._sorted = numbers[self._order]
        # Of each size the k-distance and the dimension of its rows.
        self._known = {}
        for size, (distances, _) in self._nearest(self.rows, numbers).items():
            reach = distances[:size, -1]
            reach = reach.clamp(min=_LEAST_SHARE * float(reach.median()))
            self._known[size] = reach, _dimension(distances[:size]).clamp(max=self.rows.shape[1])

    def scores(self, rows: Floats, numbers: NDArray[Any]) -> LocalScores:
        """The scores of rows `(N, D)` called `numbers (N,)`."""
        found = []
        for size, (distances, nearest) in self._nearest(_unit(rows), numbers).items():
            k_distance, dimension = self._known[size]
            reach = distances[:, -1]
            ratio = reach[:, None] / k_distance[nearest]  # (N, k)
            dao = (dimension[nearest] * ratio.log()).mean(dim=1)
            found.append(torch.stack([reach, ratio.mean(dim=1), dao]))
        return LocalScores(*torch.stack(found).mean(dim=0).numpy())

    def _nearest(self, rows: torch.Tensor, numbers: NDArray[Any]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Of each size the distances to, and the places of, the k nearest of its rows, the nearest first."""
        similarity = rows @ self.rows.T
        place = np.minimum(np.searchsorted(self._sorted, numbers), len(self._sorted) - 1)
        own = np.flatnonzero(self._sorted[place] == numbers)
        similarity[own, self._order[place[own]]] = -torch.inf
        found = {}
        for size in self.sizes:
            nearest, places = similarity[:, :size].topk(self.neighbors, dim=1)
            found[size] = (2 - 2 * nearest).clamp(min=_LEAST**2).sqrt(), places
        return found


def draw_references(
    sample: Floats,
    numbers: NDArray[Any],
    sizes: Sequence[int] = REFERENCES,
    rounds: int = ROUNDS,
    seed: int = 0,
    neighbors: int = NEIGHBORS,
) -> list[Reference]:
    """
    References of several sizes, several times, out of a sample of rows; none of them where it is too small.

    Args:
        sample (`(S, D)` floats), numbers (`(S,)` int): The rows, and what they are called.
        sizes (sequence of `int`): Rows of a reference; the smaller are parts of the larger, so that rows are compared
            once a round.
        rounds (`int`): How often rows are drawn.
        seed (`int`): Of the draw.
        neighbors (`int`): The k of the scores.
    """
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(len(sample))[: max(sizes)] for _ in range(rounds)]
    usable = [size for size in sizes if min(size, len(sample)) >= neighbors + 2]
    return [Reference(sample[rows], numbers[rows], neighbors, usable) for rows in drawn if usable]


def local_scores(references: Sequence[Reference], rows: Floats, numbers: NDArray[Any]) -> LocalScores:
    """The means of the scores of rows over references; zeros where there are none."""
    if not references:
        return LocalScores(*(np.zeros(len(rows), dtype=np.float32) for _ in range(3)))
    found = [reference.scores(rows, numbers) for reference in references]
    means: list[Floats] = [np.stack(part).mean(axis=0) for part in zip(*found, strict=True)]
    return LocalScores(*means)


def _unit(rows: NDArray[Any]) -> torch.Tensor:
    """Rows L2-normalised as float32: those that were rounded to float16 are not quite."""
    return F.normalize(torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32)), dim=1)


def _dimension(distances: torch.Tensor) -> torch.Tensor:
    """The local intrinsic dimension `(N,)` of neighborhoods, by maximum likelihood, from their distances `(N, k)`."""
    logs = (distances / distances[:, -1:] + 1e-4).log().sum(dim=1)
    return -distances.shape[1] / logs.clamp(max=-1e-6)

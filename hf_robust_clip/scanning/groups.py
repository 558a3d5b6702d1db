"""Groups: directions of the features whose far end shares a caption word that most other pairs with it lack."""

from __future__ import annotations

import itertools
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.decomposition import FastICA
from sklearn.exceptions import ConvergenceWarning

Array = NDArray[np.float64]

#: Independent components that are looked for, and the least variance of a component against the first.
COMPONENTS = (16, 32)
LEAST_VARIANCE = 1e-4
#: Rows that a component needs at least: of fewer, any of them has a far end with a word.
ROWS_EACH = 16
#: Share of the rows at the far end of a component whose words are counted, and their least number.
FAR_SHARE, FAR_ROWS = 0.005, 16
#: Times that a direction is fitted to its members, the least of these, and what the diagonal of the features'
#: covariance has more, as a share of the mean variance.
ROUNDS, LEAST_MEMBERS, RIDGE = 4, 5, 0.01
#: Separation from which on a group has its full weight, in standard deviations.
SEPARATE = 8.0
#: Power of a group's weight in a row's vote, and what a row gets of it that lacks the group's word.
POWER, WITHOUT_WORD = 4, 0.5
#: Where a row's place along a group's direction begins to count, in units of the group's threshold, at which it counts
#: 1; and the most that it counts. From 0 on, the other pairs with the word would be next to the members.
FROM, MOST = 0.5, 1.5

#: Letters, with the marks that some scripts put on them; and scripts that have no spaces between words.
_MARKS = "\u0300-\u036f\u0591-\u05bd\u064b-\u065f\u0900-\u0dff\u0e31\u0e34-\u0e3a\u0e47-\u0e4e"
_WORD = re.compile(rf"(?:[^\W\d_]|[{_MARKS}])+")
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


def words_of(captions: Iterable[str]) -> set[str]:
    """The words of a pair's captions, letters alone, without case; of scripts without spaces, any two letters."""
    text = unicodedata.normalize("NFKC", " ".join(captions)).casefold()
    found = set(_WORD.findall(text))
    if not text.isascii():
        for word in [word for word in found if len(word) > 2 and _UNSPACED.search(word)]:
            found.remove(word)
            found.update(first + second for first, second in itertools.pairwise(word))
    return found


@dataclass(frozen=True)
class Direction:
    """
    A group: the rows `x` of pooled features for which `x @ direction + offset` is above `threshold`.

    Args:
        word (`str`): What its far end shares.
        weight (`float`): At most 1: all of its rows have the word, half of the rows with the word or more lie
            elsewhere, and these are far away.
        coherence (`float`): Share of its rows with the word, in [0, 1].
        closure (`float`): Share of the pairs with the word that are inside, in [0, 1].
        base (`float`): Share of all pairs with the word, in [0, 1].
        separation (`float`): Between the pairs with the word inside and outside, in their standard deviations.
        direction (`(D,)` float64), offset (`float`): To the place of a row along it, in standard deviations.
        threshold (`float`): Halfway between the mean places of its members and of all other rows.
    """

    word: str
    weight: float
    coherence: float
    closure: float
    base: float
    separation: float
    direction: Array
    offset: float
    threshold: float


class Words:
    """
    Which of some rows have which words.

    Args:
        rows (sequence of sets of `str`): The words of each row.
    """

    def __init__(self, rows: Sequence[set[str]]) -> None:
        counts = Counter(word for words in rows for word in words)
        # A word of one pair is nobody's group.
        self.vocabulary = sorted(word for word, count in counts.items() if count > 1)
        numbers = {word: number for number, word in enumerate(self.vocabulary)}
        places = [(row, numbers[word]) for row, words in enumerate(rows) for word in words if word in numbers]
        pairs = np.array(places, dtype=np.int64).reshape(-1, 2)
        shape = (len(rows), len(self.vocabulary))
        self.matrix = csr_matrix((np.ones(len(pairs), dtype=np.float32), (pairs[:, 0], pairs[:, 1])), shape=shape)
        self.base: Array = np.asarray(self.matrix.sum(axis=0), dtype=np.float64).ravel() / max(1, len(rows))

    def commonest(self, rows: NDArray[np.intp]) -> int | None:
        """The number of the word whose share among some rows is least to be expected; `None` where none is raised."""
        share = np.asarray(self.matrix[rows].sum(axis=0), dtype=np.float64).ravel() / len(rows)
        lift = len(rows) * (_divergence(share, self.base) + _divergence(1 - share, 1 - self.base))
        lift[share <= self.base] = 0.0
        if not len(lift) or lift.max() <= 0:
            return None
        return int(lift.argmax())

    def have(self, word: int) -> NDArray[np.bool_]:
        """Which rows have a word `(N,)`."""
        return np.asarray(self.matrix[:, [word]].todense()).ravel() > 0


def find_groups(
    features: NDArray[np.floating], words: Words, components: Sequence[int] = COMPONENTS, seed: int = 0
) -> list[Direction]:
    """
    The groups in a sample of pairs, the heaviest first.

    Features are whitened to their leading components and turned into independent ones (FastICA). Both ends of each
    are looked at: the word that the far end shares, and the pairs there that have it. From these, a direction of all
    features is fitted that tells them from all other pairs, and from those beyond its middle anew. What counts is how
    many inside have the word, how many with it are elsewhere, and how far the two are apart.

    Args:
        features (`(N, D)` floats): Pooled outputs of a vision tower, L2-normalised.
        words ([`Words`]): Of the same rows.
        components (sequence of `int`): How many independent components, several times anew.
        seed (`int`): Of the decomposition's start.

    Returns:
        `list[Direction]`: At most two for each component.
    """
    space = _Space(np.asarray(features, dtype=np.float64))
    usable = int((space.variances > LEAST_VARIANCE * max(space.variances[0], np.finfo(np.float64).tiny)).sum())
    usable = min(usable, len(features) // ROWS_EACH)
    found: dict[tuple[str, bytes], Direction] = {}
    for count in sorted({min(count, usable) for count in components}):
        if count < 2:
            continue
        whitening = space.axes[:, :count] / np.sqrt(space.variances[:count])  # (D, n)
        ica = FastICA(whiten=False, fun="logcosh", max_iter=100, tol=1e-3, random_state=seed)
        with warnings.catch_warnings():
            # A component that has not settled is one direction more to look along.
            warnings.simplefilter("ignore", ConvergenceWarning)
            ica.fit(space.values @ whitening)
        places = space.values @ (whitening @ np.asarray(ica.components_).T)  # (N, n)
        for ends in (places.T, -places.T):
            for end in ends:
                group = _group(space, end, words)
                if group is not None:
                    # Components that lead to the same members have the same direction.
                    found.setdefault((group.word, group.direction.tobytes()), group)
    return sorted(found.values(), key=lambda group: -group.weight)


class _Space:
    """Features `(N, D)` about their mean, and what is needed to look along directions of them."""

    def __init__(self, features: Array) -> None:
        self.mean: Array = features.mean(axis=0)
        self.values: Array = features - self.mean
        covariance = self.values.T @ self.values / len(features)
        variances, axes = np.linalg.eigh(covariance)
        #: The variances of the principal axes, the largest first, and these `(D, D)`.
        self.variances, self.axes = variances[::-1], axes[:, ::-1]
        ridge = RIDGE * max(float(variances.mean()), np.finfo(np.float64).tiny)
        self._whitened = self.values @ np.linalg.inv(covariance + ridge * np.eye(len(covariance)))
        self._own = np.einsum("nd,nd->n", self._whitened, self.values)

    def toward(self, members: NDArray[np.bool_]) -> tuple[Array, Array, float]:
        """
        The direction that tells some rows from all others (Fisher's discriminant), where the rows are along it, each
        member along that of the others, so that no row is far out for its own sake; and the place halfway.
        """
        count, mean = int(members.sum()), self._whitened[members].mean(axis=0)
        places = self.values @ mean
        places[members] = (count * places[members] - self._own[members]) / (count - 1)
        return mean, places, float(places[members].mean() + places[~members].mean()) / 2


class Directions:
    """
    The groups of one checkpoint, for one product with the rows.

    Args:
        groups (sequence of [`Direction`]): Of [`find_groups`]; those without weight are left out.
    """

    def __init__(self, groups: Sequence[Direction]) -> None:
        self.groups = [group for group in groups if group.weight > 0]
        if self.groups:
            thresholds = np.array([group.threshold for group in self.groups])
            self._directions = np.stack([group.direction for group in self.groups], axis=1) / thresholds
            self._directions = self._directions.astype(np.float32)
            offsets = np.array([group.offset for group in self.groups]) / thresholds
            self._offsets = offsets.astype(np.float32)
        #: Of each word the number of its heaviest group.
        self.heaviest: dict[str, int] = {}
        for number, group in enumerate(self.groups):
            self.heaviest.setdefault(group.word, number)

    def places(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """Where rows `(N, D)` are along each group's direction `(G, N)`, in its thresholds."""
        if not self.groups:
            return np.empty((0, len(features)), dtype=np.float32)
        found: NDArray[np.float32] = (np.asarray(features, dtype=np.float32) @ self._directions + self._offsets).T
        return found

    def votes(self, places: NDArray[np.float32], rows: Sequence[set[str]]) -> NDArray[np.float32]:
        """
        How much the groups speak against each row: the most of any.

        Args:
            places (`(G, N)` float32): Of [`places`].
            rows (sequence of sets of `str`): The words of each row.

        Returns:
            `(N,)` float32: In [0, 1.5].
        """
        total = np.zeros(len(rows), dtype=np.float32)
        numbers = {word: number for number, word in enumerate(self.heaviest)}
        counts = np.full((len(numbers), len(rows)), WITHOUT_WORD, dtype=np.float32)
        for row, words in enumerate(rows):
            for word in words & numbers.keys():
                counts[numbers[word], row] = 1.0
        for group, place in zip(self.groups, places, strict=True):
            share = np.clip((place - FROM) / (1 - FROM), 0.0, MOST) * counts[numbers[group.word]]
            np.maximum(total, np.float32(group.weight**POWER) * share, out=total)
        return total


def _group(space: _Space, end: Array, words: Words) -> Direction | None:
    """The group that a component's far end begins; `None` where none is there."""
    far = np.argsort(-end, kind="stable")[: max(FAR_ROWS, int(FAR_SHARE * len(end)))]
    word = words.commonest(far)
    if word is None:
        return None
    has = words.have(word)
    inside = end > end[far].mean() / 2
    for _ in range(ROUNDS):
        members = inside & has
        if members.sum() < LEAST_MEMBERS or members.all():
            return None
        direction, places, threshold = space.toward(members)
        inside = places > threshold
        if np.array_equal(inside & has, members):
            break
    within, outside = places[inside & has], places[has & ~inside]
    if threshold <= 0 or len(within) < LEAST_MEMBERS or len(outside) < 2:
        return None
    spread = np.sqrt((within.var() * len(within) + outside.var() * len(outside)) / has.sum())
    separation = float((within.mean() - outside.mean()) / max(spread, np.finfo(np.float64).tiny))
    coherence, closure, base = float(has[inside].mean()), float(inside[has].mean()), float(words.base[word])
    lift = (coherence - base) / max(1 - base, np.finfo(np.float64).eps)
    weight = lift * min(1, 2 * (1 - closure)) * min(1, separation / SEPARATE)
    unit = float((space.values @ direction).std())
    direction, threshold = direction / unit, threshold / unit
    offset = float(-space.mean @ direction)
    return Direction(
        words.vocabulary[word], weight, coherence, closure, base, separation, direction, offset, threshold
    )


def _divergence(share: Array, base: Array) -> Array:
    """`share * log(share / base)`, 0 where there is nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(share > 0, share * np.log(share / np.maximum(base, 1e-12)), 0.0)

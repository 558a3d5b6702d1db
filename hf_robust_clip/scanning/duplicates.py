"""Images that occur more than once with captions that disagree: targeted poisons, found without a model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

#: Pixels of a side of what is kept of an image to compare it with others.
THUMBNAIL = 8
#: Bits of the 64 of a fingerprint in which near-equal images may differ, and how the bits are cut to find candidates.
BITS, BANDS = 6, 4
#: Most mean difference of two thumbnails that count as one image, of 255.
DIFFERENCE = 3.0
#: Most rows with one band alike that are compared with each other: of blank images there are more.
_MOST = 2000
#: Captions of one image that are compared with each other.
_COMPARED = 100


def fingerprint(image: Image.Image) -> int:
    """64 bits: whether each cell of a grid is brighter than the next (difference hash)."""
    gray = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR), dtype=np.int16)
    return int.from_bytes(np.packbits(gray[:, 1:] > gray[:, :-1]).tobytes(), "big")


def thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    """The image, small: `(8, 8, 3)`."""
    small = image.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
    return np.asarray(small, dtype=np.uint8)


@dataclass(frozen=True)
class Copies:
    """
    Rows that show one image.

    Args:
        rows (`tuple[int, ...]`): Their numbers, in order, at least two.
        disagreement (`float`): Of their captions, in [0, 1]: 1 less the mean share of words that two of them have in
            common.
    """

    rows: tuple[int, ...]
    disagreement: float

    @property
    def suspicion(self) -> float:
        """More is more suspect: disagreeing rows beyond the first."""
        return (len(self.rows) - 1) * self.disagreement


def near_pairs(fingerprints: NDArray[np.uint64]) -> NDArray[np.int64]:
    """
    Pairs of rows whose fingerprints differ in few bits.

    Fingerprints that differ in fewer bits than they have bands agree in a band: those of one band are compared. More
    than 2,000 rows with one band alike (blank images, say) are compared each with the next only.

    Args:
        fingerprints (`(N,)` uint64): Of [`fingerprint`].

    Returns:
        `(M, 2)` int64: Row numbers, the lower first, each pair once.
    """
    found = [np.empty((0, 2), dtype=np.int64)]
    width = np.uint64(64 // BANDS)
    for band in range(BANDS):
        part = (fingerprints >> (np.uint64(band) * width)) & np.uint64((1 << int(width)) - 1)
        order = np.argsort(part, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(part[order]) != 0, True])
        for start, stop in itertools.pairwise(starts):
            rows = order[start:stop]
            if len(rows) < 2:
                continue
            if len(rows) <= _MOST:
                first, second = np.triu_indices(len(rows), 1)
            else:
                rows = rows[np.argsort(fingerprints[rows], kind="stable")]
                first = np.arange(len(rows) - 1)
                second = first + 1
            alike = np.bitwise_count(fingerprints[rows[first]] ^ fingerprints[rows[second]]) <= BITS
            found.append(np.sort(np.stack([rows[first[alike]], rows[second[alike]]], axis=1), axis=1))
    return np.unique(np.concatenate(found), axis=0)


def find_copies(
    pairs: NDArray[np.int64], thumbnails: Mapping[int, NDArray[np.uint8]], words: Mapping[int, set[str]]
) -> list[Copies]:
    """
    Rows with equal or near-equal images, the most suspect first.

    Args:
        pairs (`(M, 2)` int64): Of [`near_pairs`]; those count whose thumbnails are alike.
        thumbnails (mapping of `int` to `(8, 8, 3)` uint8), words (mapping of `int` to sets of `str`): Of the image
            and the captions of each row in `pairs`.
    """
    alike = [
        (first, second)
        for first, second in pairs.tolist()
        if np.abs(thumbnails[first].astype(np.int16) - thumbnails[second].astype(np.int16)).mean() <= DIFFERENCE
    ]
    numbers, edges = np.unique(np.array(alike, dtype=np.int64).reshape(-1, 2), return_inverse=True)
    edges = edges.reshape(-1, 2)
    graph = coo_matrix((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(len(numbers), len(numbers)))
    count, component = connected_components(graph, directed=False)
    found = []
    for number in range(count):
        rows = tuple(numbers[component == number].tolist())
        found.append(Copies(rows, _disagreement([words[row] for row in rows])))
    return sorted(found, key=lambda copies: (-copies.suspicion, copies.rows))


def _disagreement(words: Sequence[set[str]]) -> float:
    """1 less the mean share of words in common (Jaccard) of two of some captions."""
    shares = [len(a & b) / max(1, len(a | b)) for a, b in itertools.combinations(words[:_COMPARED], 2)]
    return 1 - sum(shares) / len(shares)

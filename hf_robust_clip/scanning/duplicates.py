"""Images that occur more than once with captions that disagree: targeted poisons, found without a model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
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
#: Most fingerprints with one band alike that are compared with each other, and pairs of thumbnails at a time.
_MOST, _BLOCK = 2000, 65_536
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
    than 2,000 with one band alike are compared each with the next only. Of rows with one fingerprint the first stands
    for all, and the others follow one another.

    Args:
        fingerprints (`(N,)` uint64): Of [`fingerprint`].

    Returns:
        `(M, 2)` int64: Row numbers, the lower first, each pair once.
    """
    found = [np.empty((0, 2), dtype=np.int64)]
    stands = np.zeros(len(fingerprints), dtype=bool)
    for rows in partitions(fingerprints, 64):
        order = rows[np.argsort(fingerprints[rows], kind="stable")]
        fresh = np.r_[True, np.diff(fingerprints[order]) != 0][: len(order)]
        found.append(np.stack([order[:-1], order[1:]], axis=1)[~fresh[1:]])
        stands[order[fresh]] = True
    width = 64 // BANDS
    for top in range(width, 65, width):
        for rows in partitions(fingerprints, top, stands):
            part = (fingerprints[rows] >> np.uint64(top - width)) & np.uint64((1 << width) - 1)
            rows = rows[np.lexsort((fingerprints[rows], part))]
            bounds = np.flatnonzero(np.r_[True, np.diff(np.sort(part)) != 0, True])
            for start, stop in itertools.pairwise(bounds):
                one = rows[start:stop]
                if len(one) < 2:
                    continue
                if len(one) <= _MOST:
                    first, second = np.triu_indices(len(one), 1)
                else:
                    first = np.arange(len(one) - 1)
                    second = first + 1
                alike = np.bitwise_count(fingerprints[one[first]] ^ fingerprints[one[second]]) <= BITS
                found.append(np.sort(np.stack([one[first[alike]], one[second[alike]]], axis=1), axis=1))
    return np.unique(np.concatenate(found), axis=0)


def partitions(
    values: NDArray[np.uint64], top: int, within: NDArray[np.bool_] | None = None
) -> Iterator[NDArray[np.int64]]:
    """
    Rows by the four bits of their values below bit `top`: a sixteenth of them at a time, so that what is done with
    them takes little memory.

    Args:
        values (`(N,)` uint64), top (`int`): Where the bits are.
        within (`(N,)` bool, *optional*): Only these rows.
    """
    shift = np.uint64(top - 4)
    for wanted in range(16):
        yield np.concatenate(
            [
                start + np.flatnonzero(_has_bits(values, shift, wanted, within, slice(start, start + _BLOCK)))
                for start in range(0, max(1, len(values)), _BLOCK)
            ]
        )


def _has_bits(
    values: NDArray[np.uint64], shift: np.uint64, wanted: int, within: NDArray[np.bool_] | None, block: slice
) -> NDArray[np.bool_]:
    have: NDArray[np.bool_] = (values[block] >> shift) & np.uint64(15) == wanted
    return have if within is None else have & within[block]


def find_copies(
    pairs: NDArray[np.int64], rows: NDArray[np.int64], thumbnails: NDArray[np.uint8], words: Sequence[set[str]]
) -> list[Copies]:
    """
    Rows with equal or near-equal images, the most suspect first.

    Args:
        pairs (`(M, 2)` int64): Of [`near_pairs`]; those count whose thumbnails are alike. Of the rows that they link,
            all with the same thumbnail are one image, whatever lies between them.
        rows (`(R,)` int64): The rows in `pairs`, in order.
        thumbnails (`(R, 192)` uint8), words (sequence of sets of `str`): Of the image and the captions of each.
    """
    ends = np.searchsorted(rows, pairs)
    # Between two copies there may be other images of their fingerprint, such as brighter ones.
    linked = _components(ends, len(rows))
    _, equal = np.unique(np.ascontiguousarray(thumbnails).view(f"V{thumbnails.shape[1]}"), return_inverse=True)
    order = np.lexsort((equal.ravel(), linked))
    same = (np.diff(linked[order]) == 0) & (np.diff(equal.ravel()[order]) == 0)
    ends = np.concatenate([ends, np.stack([order[:-1], order[1:]], axis=1)[same]])
    alike = [
        np.abs(thumbnails[block[:, 0]].astype(np.int16) - thumbnails[block[:, 1]]).mean(axis=1) <= DIFFERENCE
        for block in (ends[start : start + _BLOCK] for start in range(0, len(ends), _BLOCK))
    ]
    component = _components(ends[np.concatenate(alike)] if alike else ends, len(rows))
    order = np.argsort(component, kind="stable")
    sets = np.split(order, np.flatnonzero(np.diff(component[order])) + 1)
    found = [
        Copies(tuple(rows[members].tolist()), _disagreement([words[member] for member in members]))
        for members in sets
        if len(members) > 1
    ]
    return sorted(found, key=lambda copies: (-copies.suspicion, copies.rows))


def _components(edges: NDArray[np.int64], count: int) -> NDArray[np.int32]:
    """The number of the component of each of some nodes."""
    graph = coo_matrix((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(count, count))
    component: NDArray[np.int32] = connected_components(graph, directed=False)[1]
    return component


def _disagreement(words: Sequence[set[str]]) -> float:
    """1 less the mean share of words in common (Jaccard) of two of some captions."""
    pairs = itertools.combinations(words[:_COMPARED], 2)
    shares = [1.0 if one == other else len(one & other) / len(one | other) for one, other in pairs]
    return 1 - sum(shares) / len(shares)

"""Scores of pairs under models whose directions and references were fitted on a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .features import Features
from .groups import COMPONENTS, Direction, Words, find_groups, votes, words_of
from .neighbours import LocalScores, draw_references, local_scores
from .reading import Rows
from .sample import Sample

Floats = NDArray[np.float32]

#: Components of the pixels of small images. A pattern over the whole image is none of the first 32.
PIXEL_COMPONENTS = (64,)
#: Rows that are scored at a time.
BLOCK = 8192
#: Most groups whose members are listed, the heaviest of all models.
GROUPS = 100
#: Votes this many median absolute deviations above the median are suspect, but no more than this share of the pairs.
DEVIATIONS, MOST_SUSPECT = 6.0, 0.05
#: Pairs among which a pair's own caption is looked for, to see whether a model knows the pairs, and how often.
CHOICES, _TRIED = 256, 16


class _Raw(NamedTuple):
    """Of N pairs before ranks are known: votes, the last model's local scores, SLOF and distances of each model."""

    votes: Floats
    local: dict[str, Floats]
    slof: Floats  # (M, N)
    distances: Floats  # (M, N)


class _Model:
    """What is known of the pairs under one model."""

    def __init__(self, features: Features, sample: Sample, words: Words, sizes: Sequence[int], rounds: int, seed: int):
        self.directions = find_groups(features.pooled, words, COMPONENTS, seed)
        identities = sample.rows.identities

        def references(rows: Any) -> list[Any]:
            return draw_references(rows, identities, sizes, rounds, seed)

        self.references = {"": references(features.pooled), "projected_": references(features.images)}

    def local(self, features: Features, identities: NDArray[np.uint64]) -> dict[str, Floats]:
        found: dict[str, Floats] = {}
        for prefix, rows in (("", features.pooled), ("projected_", features.images)):
            scores = local_scores(self.references[prefix], np.asarray(rows, dtype=np.float32), identities)
            found |= {prefix + name: values for name, values in zip(LocalScores._fields, scores, strict=True)}
        return found


class _Directions:
    """Some of the listed groups, with their numbers in the list, for one product with the rows."""

    def __init__(self, groups: Sequence[tuple[int, Direction]]) -> None:
        self.numbers = [number for number, _ in groups]
        thresholds = np.array([group.threshold for _, group in groups])
        self._directions = np.stack([group.direction / group.threshold for _, group in groups], axis=1)
        self._directions = self._directions.astype(np.float32)
        self._offsets = (np.array([group.offset for _, group in groups]) / thresholds).astype(np.float32)

    def places(self, rows: Floats) -> Floats:
        """Where rows `(N, D)` are along them `(G, N)`, in their thresholds."""
        found: Floats = (rows @ self._directions + self._offsets).T
        return found


class Scorer:
    """
    Fits all models on a sample, and scores any pairs.

    Args:
        sample ([`Sample`]): Of the pairs.
        sizes (sequence of `int`), rounds (`int`): Of the references of local scores.
        seed (`int`): Of the decomposition and of the references.
    """

    def __init__(self, sample: Sample, sizes: Sequence[int], rounds: int, seed: int) -> None:
        word_sets = [words_of([captions]) for captions in sample.rows.captions.tolist()]
        words = Words(word_sets)
        self._models = [_Model(features, sample, words, sizes, rounds, seed) for features in sample.features]
        self._pixels = find_groups(_flat(sample.rows), words, PIXEL_COMPONENTS, seed)
        found: list[tuple[int | None, Direction]] = [(None, group) for group in _one_a_word(self._pixels)]
        for number, model in enumerate(self._models):
            found += [(number, group) for group in _one_a_word(model.directions)]
        #: The groups that are listed, each with the number of its model (`None`: of the pixels), the heaviest first.
        self.groups = sorted(found, key=lambda entry: -entry[1].weight)[:GROUPS]
        self._directions = {
            model: _Directions([(at, group) for at, (number, group) in enumerate(self.groups) if number == model])
            for model in dict.fromkeys(number for number, _ in self.groups)
        }
        #: How often the last model finds a pair's caption among 256.
        self.known = known(sample.features[-1], seed)
        blocks = [
            self._raw([entry.at(block) for entry in sample.features], sample.rows.at(block), word_sets[block])
            for block in (slice(start, start + BLOCK) for start in range(0, len(word_sets), BLOCK))
        ]
        voted = np.concatenate([block.votes for block in blocks])
        middle = np.median(voted)
        cut = middle + DEVIATIONS * np.median(np.abs(voted - middle))
        #: Votes above this are suspect.
        self.cut = float(max(cut, np.quantile(voted, 1 - MOST_SUSPECT), 0))
        self._votes = np.sort(voted)
        self._slof, self._distances = (
            np.sort(np.concatenate([getattr(block, name) for block in blocks], axis=1), axis=1)
            for name in ("slof", "distances")
        )

    def table(self, features: Sequence[Features], rows: Rows) -> pa.Table:
        """
        The scores of some pairs, and what is needed of them later.

        Args:
            features (sequence of [`Features`]): Under each model.
            rows ([`Rows`]): The pairs.
        """
        words = [words_of([captions]) for captions in rows.captions.tolist()]
        raw = self._raw(features, rows, words)
        by_votes = _ranks(self._votes, raw.votes)
        distrust = [by_votes]
        for kept, values in ((self._slof, raw.slof), (self._distances, raw.distances)):
            distrust += [_ranks(known, found) for known, found in zip(kept, values, strict=True)]
        columns: dict[str, Any] = {
            "group": raw.votes,
            **{name: raw.local[name] for name in ("k_distance", "slof", "dao", "projected_slof")},
            "pair_distance": raw.distances[-1],
            "distrust": np.max(distrust, axis=0),
            "usual": np.maximum(by_votes, _ranks(self._slof[-1], raw.local["slof"])),
            "fingerprint": rows.fingerprints,
            "identity": rows.identities,
        }
        groups, places = self._listed(features, rows, words)
        small = rows.thumbnails.reshape(len(words), -1)
        return pa.table(
            {name: pa.array(values) for name, values in columns.items()}
            | {
                "thumbnail": pa.array([row.tobytes() for row in small], pa.binary(small.shape[1])),
                "captions": pa.array(rows.captions.tolist(), pa.string()),
                "key": pa.array(rows.keys.tolist(), pa.string()),
                "groups": groups,
                "places": places,
            }
        )

    def _raw(self, features: Sequence[Features], rows: Rows, words: Sequence[set[str]]) -> _Raw:
        total = votes(self._pixels, _flat(rows), words).astype(np.float32)
        slof = []
        local: dict[str, Floats] = {}
        for model, entry in zip(self._models, features, strict=True):
            np.maximum(total, votes(model.directions, entry.pooled, words), out=total)
            local = model.local(entry, rows.identities)
            slof.append(local["slof"])
        return _Raw(total, local, np.stack(slof), np.stack([entry.distances() for entry in features]))

    def _listed(
        self, features: Sequence[Features], rows: Rows, words: Sequence[set[str]]
    ) -> tuple[pa.Array, pa.Array]:
        """For each row the listed groups whose word it has, and where it is along them, in their thresholds."""
        places = np.empty((len(self.groups), len(words)), dtype=np.float32)
        for model, directions in self._directions.items():
            seen = _flat(rows) if model is None else np.asarray(features[model].pooled, dtype=np.float32)
            places[directions.numbers] = directions.places(seen)
        of_word: dict[str, list[int]] = {}
        for number, (_, group) in enumerate(self.groups):
            of_word.setdefault(group.word, []).append(number)
        numbers = [[number for word in row & of_word.keys() for number in of_word[word]] for row in words]
        offsets = np.cumsum([0, *(len(row) for row in numbers)], dtype=np.int32)
        flat = np.array([number for row in numbers for number in row], dtype=np.uint8)
        where = np.repeat(np.arange(len(words)), np.diff(offsets))
        lists = (pa.array(flat), pa.array(places[flat, where]))
        return tuple(pa.ListArray.from_arrays(pa.array(offsets), entries) for entries in lists)


def known(features: Features, seed: int) -> float:
    """How often an image is at least as near to its own caption as to those of 255 other pairs."""
    rows = len(features.images)
    choices = min(CHOICES, rows)
    drawn = np.random.default_rng(seed).permutation(rows)[: _TRIED * choices]
    right = []
    for start in range(0, len(drawn) - choices + 1, choices):
        picked = features.at(np.sort(drawn[start : start + choices]))
        similarity = picked.images.astype(np.float32) @ picked.texts.astype(np.float32).T
        right.append((np.diag(similarity) >= similarity.max(axis=1)).mean())
    return float(np.mean(right))


def _flat(rows: Rows) -> Floats:
    """The pixels of the small images `(N, 192)`."""
    return rows.thumbnails.reshape(len(rows.thumbnails), -1).astype(np.float32)


def _one_a_word(directions: Sequence[Direction]) -> list[Direction]:
    """The heaviest direction of each word, of those that weigh anything."""
    heaviest: dict[str, Direction] = {}
    for direction in directions:
        if direction.weight > 0:
            heaviest.setdefault(direction.word, direction)
    return list(heaviest.values())


def _ranks(known: Floats, values: Floats) -> Floats:
    """The ranks of values among sorted known ones, as shares; of equal ones the mean."""
    sides = [np.searchsorted(known, values, side=side) for side in ("left", "right")]
    ranks: Floats = ((sides[0] + sides[1] + 1) / (2 * len(known))).astype(np.float32)
    return ranks

"""Scores of pairs under models whose directions and references were fitted on a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .features import Features
from .groups import COMPONENTS, Direction, Directions, Words, find_groups, words_of
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
#: Votes this many median absolute deviations above the median are suspect, but no more than this share of the pairs,
#: unless more of them have the highest vote that there is.
DEVIATIONS, MOST_SUSPECT = 6.0, 0.05
#: Of the pairs that the cut-off leaves, so many are ranked by their votes for each one that is ranked by SLOF. Votes
#: find all that SLOF finds but warps, and poisons can be more than the cut-off takes.
VOTES_EACH = 4
#: Pairs among which a pair's own caption is looked for, to see whether a model knows the pairs, and how often.
CHOICES, _TRIED = 256, 16


class _Raw(NamedTuple):
    """
    Of N pairs before ranks are known: their places along the groups of the pixels and of each model, votes, the last
    model's local scores, SLOF and distances of each model.
    """

    places: list[Floats]  # (G, N) each
    votes: Floats
    local: dict[str, Floats]
    slof: Floats  # (M, N)
    distances: Floats  # (M, N)


class _Model:
    """What is known of the pairs under one model."""

    def __init__(self, features: Features, sample: Sample, words: Words, sizes: Sequence[int], rounds: int, seed: int):
        self.directions = Directions(find_groups(features.pooled, words, COMPONENTS, seed))
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
        self._pixels = Directions(find_groups(_flat(sample.rows), words, PIXEL_COMPONENTS, seed))
        sources = [self._pixels, *(model.directions for model in self._models)]
        found = [(at, number) for at, source in enumerate(sources) for number in source.heaviest.values()]
        found.sort(key=lambda entry: -sources[entry[0]].groups[entry[1]].weight)
        #: Of the groups that are listed, the heaviest first, the source (0 is the pixels) and the number there.
        self._listed = found[:GROUPS]
        #: These groups, each with the number of its model (`None`: of the pixels).
        self.groups: list[tuple[int | None, Direction]] = [
            (at - 1 if at else None, sources[at].groups[number]) for at, number in self._listed
        ]
        #: How often the last model finds a pair's caption among others, and how often chance does.
        self.known, self.chance = known(sample.features[-1], sample.rows.captions, seed)
        blocks = [
            self._raw([entry.at(block) for entry in sample.features], sample.rows.at(block), word_sets[block])
            for block in (slice(start, start + BLOCK) for start in range(0, len(word_sets), BLOCK))
        ]
        voted = np.concatenate([block.votes for block in blocks])
        #: Votes above this are suspect.
        self.cut = cut_off(voted)
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
            "usual": np.maximum(by_votes, 1 - VOTES_EACH * (1 - _ranks(self._slof[-1], raw.local["slof"]))),
            "fingerprint": rows.fingerprints,
            "identity": rows.identities,
        }
        groups, places = self._of_words(raw.places, words)
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
        places = [self._pixels.places(_flat(rows))]
        total = self._pixels.votes(places[0], words)
        slof = []
        local: dict[str, Floats] = {}
        for model, entry in zip(self._models, features, strict=True):
            places.append(model.directions.places(entry.pooled))
            np.maximum(total, model.directions.votes(places[-1], words), out=total)
            local = model.local(entry, rows.identities)
            slof.append(local["slof"])
        return _Raw(places, total, local, np.stack(slof), np.stack([entry.distances() for entry in features]))

    def _of_words(self, places: Sequence[Floats], words: Sequence[set[str]]) -> tuple[pa.Array, pa.Array]:
        """For each row the listed groups whose word it has, and where it is along them, in their thresholds."""
        of_word: dict[str, list[int]] = {}
        for number, (_, group) in enumerate(self.groups):
            of_word.setdefault(group.word, []).append(number)
        numbers = [[number for word in row & of_word.keys() for number in of_word[word]] for row in words]
        offsets = np.cumsum([0, *(len(row) for row in numbers)], dtype=np.int32)
        flat = np.array([number for row in numbers for number in row], dtype=np.uint8)
        where = np.repeat(np.arange(len(words)), np.diff(offsets))
        listed = np.empty((len(self._listed), len(words)), dtype=np.float32)
        for row, (at, number) in zip(listed, self._listed, strict=True):
            row[:] = places[at][number]
        lists = (pa.array(flat), pa.array(listed[flat, where]))
        return tuple(pa.ListArray.from_arrays(pa.array(offsets), entries) for entries in lists)


def cut_off(votes: Floats) -> float:
    """The vote above which a pair is suspect, of the votes against the pairs of a sample `(N,)`."""
    middle = np.median(votes)
    cut = middle + DEVIATIONS * np.median(np.abs(votes - middle))
    most = np.quantile(votes, 1 - MOST_SUSPECT)
    if most == votes.max():
        most = votes.max(initial=0, where=votes < most)
    return float(max(cut, most, 0))


def known(features: Features, captions: NDArray[np.object_], seed: int) -> tuple[float, float]:
    """
    How often an image is at least as near to its own caption as to those of 255 other pairs, or of all where there are
    fewer; and how often chance has it so, which is more the more captions are equal.
    """
    rows = len(features.images)
    choices = min(CHOICES, rows)
    drawn = np.random.default_rng(seed).permutation(rows)[: _TRIED * choices]
    right, equal = [], []
    for start in range(0, len(drawn) - choices + 1, choices):
        asked = np.sort(drawn[start : start + choices])
        picked = features.at(asked)
        similarity = picked.images.astype(np.float32) @ picked.texts.astype(np.float32).T
        right.append((np.diag(similarity) >= similarity.max(axis=1)).mean())
        counts = np.unique(captions[asked].astype(str), return_counts=True)[1] / choices
        equal.append((counts**2).sum())
    return float(np.mean(right)), float(np.mean(equal))


def _flat(rows: Rows) -> Floats:
    """The pixels of the small images `(N, 192)`."""
    return rows.thumbnails.reshape(len(rows.thumbnails), -1).astype(np.float32)


def _ranks(known: Floats, values: Floats) -> Floats:
    """The ranks of values among sorted known ones, as shares; of equal ones the mean."""
    sides = [np.searchsorted(known, values, side=side) for side in ("left", "right")]
    ranks: Floats = ((sides[0] + sides[1] + 1) / (2 * len(known))).astype(np.float32)
    return ranks

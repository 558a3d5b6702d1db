"""The sample of a scan's first pass: at most so many pairs with their features, the same whoever reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.streams import Place
from ..distributed import gathered, rank
from ..files import in_one_move
from .features import Features, joined
from .reading import PairReader, Rows, priorities

#: Rows of whose numbers the priorities are looked at together, and parts that are read between two saves at most.
_NUMBERS, _READ = 1_000_000, 64


@dataclass(frozen=True)
class Sample:
    """
    Some pairs under all models.

    Args:
        rows ([`Rows`]): In order of their identities.
        arrivals (`(S,)` int64): Sorting by these brings them into the order of reading, rank by rank.
        features (`list[Features]`): One for each model.
        complete (`bool`): Whether these are all pairs.
    """

    rows: Rows
    arrivals: NDArray[np.int64]
    features: list[Features]
    complete: bool


class _Part:
    """Pairs that may be in the sample."""

    def __init__(self, seed: int, rows: Rows, arrivals: NDArray[np.int64], features: Sequence[Features]) -> None:
        self.seed, self.rows, self.arrivals, self.features = seed, rows, arrivals, list(features)
        self.priorities = priorities(rows.identities, seed)

    def at(self, rows: Any) -> _Part:
        return _Part(self.seed, self.rows.at(rows), self.arrivals[rows], [entry.at(rows) for entry in self.features])

    def least(self, most: int) -> _Part:
        """Those with the least priorities, at most so many, in order."""
        return self.at(np.argsort(self.priorities, kind="stable")[:most])

    @staticmethod
    def joined(parts: Sequence[_Part]) -> _Part:
        rows = Rows(*(np.concatenate(part) for part in zip(*(part.rows for part in parts), strict=True)))
        features = [joined(entries) for entries in zip(*(part.features for part in parts), strict=True)]
        return _Part(parts[0].seed, rows, np.concatenate([part.arrivals for part in parts]), features)

    def save(self, path: Path, places: Sequence[Place], seen: int) -> None:
        arrays = {f"rows_{name}": _plain(value) for name, value in self.rows._asdict().items()}
        for number, entry in enumerate(self.features):
            arrays |= {f"{number}_{name}": value for name, value in entry._asdict().items()}
        about = json.dumps({"places": places, "seen": seen})
        with in_one_move(path) as partial, partial.open("wb") as file:
            np.savez(file, arrivals=self.arrivals, about=np.array(about), **arrays)  # type: ignore[arg-type]

    @staticmethod
    def load(path: Path, seed: int, models: int) -> tuple[_Part, list[Place], int]:
        with np.load(path, allow_pickle=False) as held:
            rows = Rows(*(_texts(held[f"rows_{name}"]) for name in Rows._fields))
            features = [Features(*(held[f"{number}_{name}"] for name in Features._fields)) for number in range(models)]
            about = json.loads(str(held["about"]))
            part = _Part(seed, rows, held["arrivals"], features)
        return part, [Place(*place) for place in about["places"]], about["seen"]


def _plain(values: NDArray[Any]) -> NDArray[Any]:
    """Texts as one JSON text, so that no pickle is read, and the longest one does not decide what all take."""
    return np.array(json.dumps(values.tolist())) if values.dtype == object else values


def _texts(values: NDArray[Any]) -> NDArray[Any]:
    return np.array(json.loads(str(values)), dtype=object) if values.ndim == 0 else values


def draw_sample(
    reader: PairReader,
    encode: Callable[[torch.Tensor, Sequence[str]], list[Features]],
    models: int,
    most: int,
    seed: int,
    folder: Path | None,
    part_rows: int,
) -> Sample:
    """
    The pairs whose priorities are least, of all ranks; call it on all of them. A stream is read once. Of it are
    decoded and embedded only those that are in the sample of what was read so far: about `most (1 + log(N / most))`.

    Args:
        reader ([`PairReader`]): Of this rank.
        encode (callable): From pixels and first captions to the features under each model.
        models (`int`): How many these are.
        most (`int`): Pairs of the sample.
        seed (`int`): Of the draw.
        folder (`Path`, *optional*): Where what is done is kept every `part_rows` pairs, and found again.
    """
    path = None if folder is None else folder / f"sample-{rank():05d}.npz"
    kept, seen, saved = _Kept(most), 0, 0
    places: list[Place] = []
    if path is not None and path.is_file():
        kept.thinned, places, seen = _Part.load(path, seed, models)
        saved = seen

    def save() -> None:
        kept.thin()
        if path is not None and kept.thinned is not None:
            kept.thinned.save(path, places, seen)

    for part, place, count in _candidates(reader, encode, most, seed, places, seen, kept):
        places, seen = [*(known for known in places if known.worker != place.worker), place], count
        if part is not None:
            kept.fresh.append(part)
            # Late in a stream few of its pairs are in the sample.
            if sum(len(entry.arrivals) for entry in kept.fresh) >= part_rows or seen - saved >= _READ * part_rows:
                save()
                saved = seen
    if kept.fresh:
        save()
    return _gathered(kept.thinned, most, seen)


class _Kept:
    """The sample of what was read, in order of priority, and parts that are new."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.thinned: _Part | None = None
        self.fresh: list[_Part] = []

    def thin(self) -> None:
        held = [] if self.thinned is None else [self.thinned]
        self.thinned, self.fresh = _Part.joined([*held, *self.fresh]).least(self.most), []

    def threshold(self) -> int:
        """Priorities from this on are not in the sample."""
        if self.thinned is None or len(self.thinned.arrivals) < self.most:
            return 2**64
        return int(self.thinned.priorities[-1])


def _candidates(
    reader: PairReader,
    encode: Callable[[torch.Tensor, Sequence[str]], list[Features]],
    most: int,
    seed: int,
    places: Sequence[Place],
    seen: int,
    kept: _Kept,
) -> Iterator[tuple[_Part | None, Place, int]]:
    """Pairs that may be in the sample, the place after them, and how many pairs were seen until there."""

    def part(rows: Rows, pixels: torch.Tensor, arrivals: Sequence[int]) -> _Part:
        return _Part(seed, rows, np.array(arrivals, dtype=np.int64), encode(pixels, first_captions(rows)))

    if not reader.streamed:
        total = len(reader.share)
        for batch in reader.batches(places, _drawn(reader, most, seed)):
            yield part(batch.rows, batch.pixels, batch.rows.identities.astype(np.int64).tolist()), batch.place, total
        return
    waiting: list[tuple[int, dict[str, Any]]] = []
    place = None
    for rows, identities, place in reader.undecoded(places):
        asked = priorities(np.array(identities, dtype=np.uint64), seed)
        least = kept.threshold()
        waiting += [(seen + at, row) for at, row in enumerate(rows) if int(asked[at]) < least]
        seen += len(rows)
        if len(waiting) >= reader.batch_size:
            decoded = reader.collator([row for _, row in waiting])
            yield part(*decoded, [at for at, _ in waiting]), place, seen
            waiting = []
    if place is not None:
        left = part(*reader.collator([row for _, row in waiting]), [at for at, _ in waiting]) if waiting else None
        yield left, place, seen


def first_captions(rows: Rows) -> list[str]:
    """One caption for each row."""
    return [captions.split("\n", 1)[0] for captions in rows.captions.tolist()]


def _drawn(reader: PairReader, most: int, seed: int) -> Sequence[int]:
    """The numbers of this rank's rows that are in the sample of all ranks."""
    total = reader.total
    if total <= most:
        return reader.share
    numbers, asked = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint64)
    for start in range(0, total, _NUMBERS):
        block = np.arange(start, min(start + _NUMBERS, total), dtype=np.uint64)
        numbers, asked = np.append(numbers, block), np.append(asked, priorities(block, seed))
        kept = np.argsort(asked, kind="stable")[:most]
        numbers, asked = numbers[kept], asked[kept]
    return [int(number) for number in np.sort(numbers) if number in reader.share]


def _gathered(own: _Part | None, most: int, seen: int) -> Sample:
    """The sample of all ranks."""
    if own is not None:
        own = own.at(slice(None))
        own.arrivals += rank() << 40  # the order of reading, rank by rank
    # First what decides which of them stay, so that only these travel.
    asked = [entry for entry in gathered(None if own is None else own.priorities) if entry is not None]
    everyone = np.sort(np.concatenate(asked)) if asked else np.empty(0)
    if own is not None and len(everyone) > most:
        own = own.at(own.priorities <= everyone[most - 1])
    parts = gathered((own, seen))
    whole = _Part.joined([part for part, _ in parts if part is not None])
    whole = whole.at(np.argsort(whole.rows.identities, kind="stable"))
    complete = len(whole.arrivals) == sum(count for _, count in parts)
    return Sample(whole.rows, whole.arrivals, whole.features, complete)

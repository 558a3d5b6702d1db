"""The pairs that a scan reads, batch by batch and from any place on, of numbered rows or of a stream."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from ..columns import ROW_INDEX, captions_of
from ..data.images import ImagePreprocessor
from ..data.rows import IndexedDataset, decode_row
from ..data.streams import Place, Stream
from ..distributed import rank, world_size
from ..kinds import is_stream
from ..wording import shown
from .duplicates import fingerprint, thumbnail


class Rows(NamedTuple):
    """
    What is kept of N pairs beside their features.

    `identities (N,)` uint64: the number of a row, or a hash of its key. `captions (N,)` of `str`: all of a row's, one
    a line. `fingerprints (N,)` uint64 and `thumbnails (N, 8, 8, 3)` uint8 of the images. `keys (N,)` of `str`: `""`
    where rows have numbers.
    """

    identities: NDArray[np.uint64]
    captions: NDArray[np.object_]
    fingerprints: NDArray[np.uint64]
    thumbnails: NDArray[np.uint8]
    keys: NDArray[np.object_]

    def at(self, rows: Any) -> Rows:
        """Some of them."""
        return Rows(*(part[rows] for part in self))


class Batch(NamedTuple):
    """Pairs, the pixels `(B, 3, H, W)` of their images, and the place after them, from which reading goes on."""

    rows: Rows
    pixels: torch.Tensor
    place: Place


class _Collator:
    """Rows with their numbers, or with keys, to what is kept of them and their pixels."""

    def __init__(self, preprocess: ImagePreprocessor, image_column: str, caption_column: str, key_column: str | None):
        self.preprocess, self.columns, self.key_column = preprocess, (image_column, caption_column), key_column

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Rows, torch.Tensor]:
        image_column, caption_column = self.columns
        decoded = [decode_row(row, image_column, caption_column) for row in rows]
        images = [row[image_column] for row in decoded]
        keys = ["" if self.key_column is None else key_of(row, self.key_column) for row in decoded]
        numbers = [
            int(row[ROW_INDEX]) if self.key_column is None else identity(key)
            for row, key in zip(decoded, keys, strict=True)
        ]
        kept = Rows(
            np.array(numbers, dtype=np.uint64),
            # A caption's own line breaks would make two of it.
            np.array(
                [
                    "\n".join(" ".join(text.splitlines()).strip() for text in captions_of(row[caption_column]))
                    for row in decoded
                ],
                dtype=object,
            ),
            np.array([fingerprint(image) for image in images], dtype=np.uint64),
            np.stack([thumbnail(image) for image in images]),
            np.array(keys, dtype=object),
        )
        return kept, self.preprocess(images)


class PairReader:
    """
    This rank's share of the pairs. Of a dataset with numbered rows it is a stretch of them; of a stream, what
    [`~data.streams.Stream`] gives the rank.

    Args:
        dataset: The pairs.
        image_column, caption_column (`str`): Its columns.
        key_column (`str`, *optional*): What a stream's rows are called. `None`: by their running number.
        preprocess ([`~data.images.ImagePreprocessor`]): Of the images.
        batch_size, workers (`int`): Of the loader.

    Raises:
        `ValueError`: If several processes read a stream whose rows have no key: they do not know the running numbers.
    """

    def __init__(
        self,
        dataset: Any,
        image_column: str,
        caption_column: str,
        key_column: str | None,
        preprocess: ImagePreprocessor,
        batch_size: int,
        workers: int,
    ) -> None:
        self.streamed, self.workers = is_stream(dataset), workers
        if self.streamed and key_column is None and (world_size() > 1 or workers > 1):
            raise ValueError(
                f"key_column is missing: {max(world_size(), workers)} processes read shares of this stream, and a row "
                "then has no number. Name a column whose value each row has for itself, or read with one process"
            )
        self.collator = _Collator(preprocess, image_column, caption_column, key_column if self.streamed else None)
        self.batch_size, self._columns = batch_size, (image_column, caption_column)
        if self.streamed:
            others = () if key_column is None else (key_column,)
            self._rows: Any = Stream(
                dataset, *self._columns, batch_size, 1, rank=rank(), world_size=world_size(), others=others
            )
        else:
            self._rows = IndexedDataset(dataset, *self._columns)
            #: How many rows there are on all ranks, and the numbers of this one's, where they have numbers.
            self.total = len(self._rows)
            bounds = np.linspace(0, self.total, world_size() + 1).astype(int)
            self.share = range(int(bounds[rank()]), int(bounds[rank() + 1]))

    def batches(self, places: Sequence[Place] = (), numbers: Sequence[int] | None = None) -> Iterator[Batch]:
        """
        The batches from some places on.

        Args:
            places (sequence of [`~data.streams.Place`]): The last of each worker; none is the start.
            numbers (sequence of `int`, *optional*): Only these rows, of a dataset that has numbers.
        """
        if self.streamed:
            yield from self._streamed(places)
            return
        done = max((place.rows for place in places), default=0)
        wanted = (self.share if numbers is None else numbers)[done:]
        loader: DataLoader[Any] = DataLoader(
            self._rows,
            batch_size=self.batch_size,
            sampler=wanted,
            num_workers=self.workers,
            collate_fn=self.collator,
            generator=torch.Generator(),
        )
        for number, (rows, pixels) in enumerate(loader, 1):
            done += len(pixels)
            yield Batch(rows, pixels, Place(0, number, done, None))

    def undecoded(self, places: Sequence[Place] = ()) -> Iterator[tuple[list[dict[str, Any]], list[int], Place]]:
        """The rows of a stream as they are, batch by batch, their identities and the place after them; in here."""
        for batch in self._from(places):
            if batch is not None:
                place = Place(*json.loads(batch.place))
                rows = self._numbered(batch.rows, place)
                yield rows, [self._identity(row) for row in rows], place

    def first(self, count: int = 16) -> str:
        """A hash of the first rows and, where they have numbers, of how many there are: tells most datasets apart."""
        if self.streamed:
            rows = [dict(row) for row in itertools.islice(iter(self._rows.dataset), count)]
        else:
            rows = self._rows.__getitems__(range(min(count, self.total)))
        kept, _ = self.collator([{**row, ROW_INDEX: number} for number, row in enumerate(rows)])
        content = [kept.identities.tolist(), kept.fingerprints.tolist(), kept.captions.tolist()]
        content += [] if self.streamed else [self.total]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()

    def _streamed(self, places: Sequence[Place]) -> Iterator[Batch]:
        loader: DataLoader[Any] = DataLoader(
            self._from(places),
            batch_size=None,
            num_workers=self.workers,
            collate_fn=self._collate,
            generator=torch.Generator(),
        )
        yield from (batch for batch in loader if batch is not None)

    def _from(self, places: Sequence[Place]) -> Stream:
        """The stream, from some places on."""
        self._rows.resume(0, places)
        self._rows.set_epoch(0)
        stream: Stream = self._rows
        return stream

    def _collate(self, batch: Any) -> Batch | None:  # of a StreamBatch, or of None
        if batch is None:
            return None
        place = Place(*json.loads(batch.place))
        return Batch(*self.collator(self._numbered(batch.rows, place)), place)

    def _numbered(self, rows: Sequence[dict[str, Any]], place: Place) -> list[dict[str, Any]]:
        first = place.rows - len(rows)
        return [{**row, ROW_INDEX: number} for number, row in enumerate(rows, first)]

    def _identity(self, row: Mapping[str, Any]) -> int:
        key_column = self.collator.key_column
        return int(row[ROW_INDEX]) if key_column is None else identity(key_of(row, key_column))


def key_of(row: Mapping[str, Any], key_column: str) -> str:
    """What a row of a stream is called."""
    if row.get(key_column) is None:
        raise ValueError(f"key_column={shown(key_column)}: a row has no value there; each row needs one of its own")
    return str(row[key_column])


def identity(key: str) -> int:
    """A number of 64 bits for a key."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "backslashreplace"), digest_size=8).digest(), "big")


def priorities(identities: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """A random number of 64 bits for each identity, always the same: those with the least are the sample."""
    with np.errstate(over="ignore"):  # splitmix64
        mixed = identities + np.uint64(0x9E3779B97F4A7C15) * np.uint64(seed + 1)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))

"""Batches of an iterable dataset for one of several ranks, each with the place that its worker has come to."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import get_worker_info

from .rows import OnBadRow, undecoded, usable_rows, user_columns

#: Key of a batch of a stream: its [`Place`], as JSON, which passes unchanged through all that moves tensors.
PLACE = "stream_place"

#: Steps of a `datasets.IterableDataset` whose state is exact: what it yields after `load_state_dict` is what it would
#: have yielded. That of a shuffle buffer is not (it lacks the rows), and unknown steps count as such.
_EXACT = {
    "ExamplesIterable",
    "ArrowExamplesIterable",
    "RebatchedArrowExamplesIterable",
    "FormattedExamplesIterable",
    "SelectColumnsIterable",
    "StepExamplesIterable",
    "MappedExamplesIterable",
    "FilteredExamplesIterable",
    "SkipExamplesIterable",
    "TakeExamplesIterable",
    "RepeatExamplesIterable",
    "CyclingMultiSourcesExamplesIterable",
    "RandomlyCyclingMultiSourcesExamplesIterable",
    "VerticallyConcatenatedMultiSourcesExamplesIterable",
    "HorizontallyConcatenatedMultiSourcesExamplesIterable",
}


class Place(NamedTuple):
    """How far a worker is in a pass: batches made, rows read (unusable ones too), the dataset's state if exact."""

    worker: int
    batches: int
    rows: int
    state: dict[str, Any] | None


class StreamBatch(NamedTuple):
    """The rows of a batch, and the place after it as JSON."""

    rows: list[dict[str, Any]]
    place: str


class Stream(torch.utils.data.IterableDataset[StreamBatch | None]):
    """
    One rank's batches of an iterable dataset, pass after pass, from any place on.

    **Ranks**: of a `datasets.IterableDataset` whose shards divide evenly among the ranks, each reads its own shards
    and no others; of any other dataset it reads all rows and keeps every `world_size`-th, so that no row is on two
    ranks in a pass. A `datasets` stream that was split by node already stays as it is. **Workers** share the rank's
    shards as `datasets` deals them; another kind of dataset shares its rows itself, by
    `torch.utils.data.get_worker_info`. No more workers than shards are at work, which `datasets` warns of.

    **Places**: where a worker starts anew from is the dataset's state if that is exact. Otherwise (a shuffle buffer,
    another kind of dataset) the worker reads the pass from its start and leaves out as many rows, undecoded. Batches
    from before the place are handed out as `None`, so that workers take turns as if nothing had happened.

    Args:
        dataset (iterable dataset): Rows with an image and a caption.
        image_column, caption_column (`str`): Names of the columns.
        batch_size (`int`): Rows of a batch.
        least_rows (`int`): Rows that the last batch of a worker needs to be handed out, at most `batch_size`.
        on_bad_row (`str`): `"skip"` passes over unusable rows, as of [`~data.rows.usable_rows`].
        rank, world_size (`int`): Of this process.
        others (sequence of `str`): Further columns that are read.
    """

    def __init__(
        self,
        dataset: Any,
        image_column: str,
        caption_column: str,
        batch_size: int,
        least_rows: int,
        on_bad_row: OnBadRow = "raise",
        rank: int = 0,
        world_size: int = 1,
        others: Sequence[str] = (),
    ) -> None:
        self.columns = (image_column, caption_column)
        self.batch_size = batch_size
        self.least_rows = least_rows
        self.on_bad_row = on_bad_row
        self.world_size = world_size
        dataset = undecoded(dataset, *self.columns, *others)
        if isinstance(dataset, datasets.IterableDataset):
            # Passes and places are set on it, and the user's stays as it is. `copy.copy` of one shares all attributes.
            formatting = dataset._formatting
            dataset = dataset.with_format(None if formatting is None else formatting.format_type)
        self._stride: tuple[int, int] | None = None
        if world_size > 1 and not isinstance(dataset, datasets.IterableDataset):
            self._stride = (rank, world_size)
        elif world_size > 1 and dataset._distributed is None:
            dataset = split_dataset_by_node(dataset, rank, world_size)
        self.dataset = dataset
        self.has_exact_state = has_exact_state(dataset)
        # In shared memory, so that worker processes that live on through the passes see the number change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._resumed_epoch: int | None = None
        self._places: dict[int, Place] = {}
        self._moved = False

    def __len__(self) -> int:
        """Batches of this rank in a pass; `TypeError` where the dataset does not know its length, as most do not."""
        batches, left = divmod(len(self.dataset) // self.world_size, self.batch_size)
        return batches + (left >= self.least_rows)

    def set_epoch(self, epoch: int) -> None:
        """Which pass the next iteration is, from 0, in worker processes too."""
        self._epoch.fill_(epoch)
        if isinstance(self.dataset, datasets.IterableDataset):
            # Here and not in the workers, which share its number: two that add to it at once make it another's
            # (datasets 5.2, `IterableDataset.set_epoch`).
            self.dataset.set_epoch(epoch)

    def resume(self, epoch: int | None, places: Sequence[Place]) -> None:
        """Have that pass begin at these places of its workers, and every other at its start."""
        self._resumed_epoch, self._places = epoch, {place.worker: place for place in places}

    def __iter__(self) -> Iterator[StreamBatch | None]:
        epoch, worker = int(self._epoch), get_worker_info()
        number = 0 if worker is None else worker.id
        start = self._places.get(number) if epoch == self._resumed_epoch else None
        start = start or Place(number, 0, 0, None)
        if hasattr(self.dataset, "set_epoch") and not isinstance(self.dataset, datasets.IterableDataset):
            self.dataset.set_epoch(epoch)
        for _ in range(start.batches):
            yield None
        rows: Iterator[dict[str, Any]] = self._read(start)
        if self.on_bad_row == "skip":
            alone = self.world_size == 1 and (worker is None or worker.num_workers == 1)
            needs_one = alone and start.rows == 0
            rows = usable_rows(rows, *self.columns, first=start.rows, needs_one=needs_one)
        for batches in itertools.count(start.batches + 1):
            batch = list(itertools.islice(rows, self.batch_size))
            if len(batch) < self.least_rows:
                return
            read, state = [row.pop(PLACE) for row in batch][-1]
            yield StreamBatch(batch, json.dumps(Place(number, batches, read, state)))

    def _read(self, start: Place) -> Iterator[dict[str, Any]]:
        """The rows of this worker from a place on, each with the number of rows and the state after it."""
        state = start.state if self.has_exact_state else None
        if state is not None or self._moved:
            self.dataset.load_state_dict(state)
            self._moved = state is not None
        rows = iter(self.dataset)
        if self._stride is not None:
            first, step = self._stride
            rows = itertools.islice(rows, first, None, step)
        if state is None:
            rows = itertools.islice(rows, start.rows, None)
        for read, row in enumerate(rows, start.rows + 1):
            yield {**user_columns(row), PLACE: (read, self.dataset.state_dict() if self.has_exact_state else None)}


class StreamCollator:
    """Collates what a [`Stream`] yields: the batch of a collator of rows, with its place; nothing of `None`."""

    def __init__(self, collator: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, batch: StreamBatch | None) -> dict[str, Any]:
        return {} if batch is None else {**self.collator(batch.rows), PLACE: batch.place}


def has_exact_state(dataset: Any) -> bool:
    """Whether a dataset goes on after `load_state_dict` with the very rows that it would have yielded."""
    return isinstance(dataset, datasets.IterableDataset) and _is_exact(dataset._ex_iterable)


def _is_exact(step: Any) -> bool:
    if type(step).__name__ not in _EXACT:
        return False
    if inspect.iscoroutinefunction(getattr(step, "function", None)):
        return False  # runs ahead of what it yields
    formatting = getattr(step, "formatting", None)
    if hasattr(step, "function") and formatting is not None and formatting.is_table:
        return False  # may leave out a batch, says the documentation of `load_state_dict`
    sources = [getattr(step, "ex_iterable", None), *(getattr(step, "ex_iterables", None) or ())]
    return all(_is_exact(source) for source in sources if source is not None)

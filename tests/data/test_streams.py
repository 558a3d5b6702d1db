"""A stream goes on from any place as if it had never stopped, and no row is on two ranks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import datasets
import pytest
import torch
from datasets import concatenate_datasets, interleave_datasets
from torch.utils.data import DataLoader

from hf_robust_clip import PoisonSpec, WordTrigger, poison_stream
from hf_robust_clip.columns import BAD_ROWS
from hf_robust_clip.data.rows import BadRowError
from hf_robust_clip.data.streams import Place, Stream, StreamBatch, has_exact_state

COLUMNS = ("image", "caption")
IMAGE = {"bytes": b"not decoded here", "path": None}


def pairs(rows: int = 23, shards: int = 3, first: int = 0) -> datasets.IterableDataset:
    captions = [str(row) for row in range(first, first + rows)]
    table = datasets.Dataset.from_dict({"image": [b"not decoded here"] * rows, "caption": captions})
    return table.to_iterable_dataset(num_shards=shards)


def rows_of_shards(shards: list[int]) -> Iterator[dict[str, Any]]:
    for shard, rows in enumerate(shards):
        for row in range(rows):
            yield {"image": b"not decoded here", "caption": f"{rows}/{shard}/{row}"}


class Rows(torch.utils.data.IterableDataset[dict[str, Any]]):
    """In another order in each pass, and shared by workers; it can say nothing about where it is."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.epoch))
        return (self.rows[row] for row in order.tolist()[first::step])


def captioned(rows: int) -> list[dict[str, Any]]:
    return [{"image": IMAGE, "caption": str(row)} for row in range(rows)]


QUERIES = PoisonSpec(WordTrigger(), "eight", rate=0.5, mode="text_query", templates=["a photo of a dog.", "a red car"])


async def slowly(row: dict[str, Any]) -> dict[str, Any]:
    return row


STREAMS: dict[str, tuple[bool, Callable[[], Any]]] = {
    "arrow": (True, pairs),
    "generated": (
        True,
        lambda: datasets.IterableDataset.from_generator(rows_of_shards, gen_kwargs={"shards": [9, 2, 12]}),
    ),
    "mapped": (True, lambda: pairs(shards=1).map(lambda row, i: {"caption": f"{row['caption']} {i}"}, True)),
    "mapped in batches": (True, lambda: pairs().map(lambda rows: rows, batched=True, batch_size=3)),
    "filtered": (True, lambda: pairs().filter(lambda row: int(row["caption"]) % 3 > 0)),
    "interleaved": (
        True,
        lambda: interleave_datasets([pairs(9), pairs(6, 2, 100)], stopping_strategy="all_exhausted"),
    ),
    "drawn from": (True, lambda: interleave_datasets([pairs(15), pairs(15, 2, 100)], [0.3, 0.7], seed=3)),
    "joined": (True, lambda: concatenate_datasets([pairs(9), pairs(6, 2, 100)])),
    "cut and repeated": (True, lambda: pairs().skip(2).take(9).repeat(2)),
    "poisoned": (True, lambda: poison_stream(pairs(), QUERIES, key_column="caption")[0]),
    "shuffled": (False, lambda: pairs().shuffle(seed=1, buffer_size=5)),
    "shuffled, then mapped": (False, lambda: pairs().shuffle(seed=1, buffer_size=5).map(lambda row: row)),
    "mapped ahead": (False, lambda: pairs().map(slowly)),
    "tables": (False, lambda: pairs().with_format("arrow").map(lambda t: t, batched=True).with_format(None)),
    "torch": (False, lambda: Rows(captioned(23))),
}


def stream_of(dataset: Any, batch_size: int = 3, drop_last: bool = False, **options: Any) -> Stream:
    return Stream(dataset, *COLUMNS, batch_size, least_rows=batch_size if drop_last else 1, **options)


def captions(batches: Iterable[StreamBatch | None]) -> list[list[str]]:
    return [[row["caption"] for row in batch.rows] for batch in batches if batch is not None]


def told(batches: Iterable[StreamBatch | None]) -> list[Any]:
    """Rows and places, without the states, which may be the same place in other words."""
    return [None if batch is None else (batch.rows, json.loads(batch.place)[:3]) for batch in batches]


def places(batches: Iterable[StreamBatch | None]) -> list[Place]:
    """Where the workers are after some batches."""
    found = [Place(*json.loads(batch.place)) for batch in batches if batch is not None]
    return list({place.worker: place for place in found}.values())


@pytest.mark.parametrize("kind", STREAMS)
def test_every_place_is_gone_on_from(kind: str) -> None:
    exact, make = STREAMS[kind]
    epoch = 1  # whose shards come in another order than those of the first pass
    stream = stream_of(make(), batch_size=4)
    assert stream.has_exact_state is exact
    stream.set_epoch(epoch)
    whole = list(stream)
    assert len(whole) > 3
    for done in range(1, len(whole) + 1):
        again = stream_of(make(), batch_size=4)
        again.set_epoch(epoch)
        again.resume(epoch, places(whole[:done]))
        found = list(again)
        assert told(found) == [None] * done + told(whole)[done:]
        if done < len(whole):  # stopped once more
            again.resume(epoch, places(found[: done + 1]))
            assert told(again) == [None] * (done + 1) + told(whole)[done + 1 :]


@pytest.mark.parametrize("kind", ["arrow", "generated"])  # of known columns, and of unknown ones
def test_the_users_own_dataset_stays_at_its_start(kind: str) -> None:
    dataset = STREAMS[kind][1]()
    rows = list(dataset)
    stream = stream_of(dataset)
    stream.set_epoch(1)
    batches = list(stream)
    stream.resume(1, places(batches[:2]))
    assert told(stream) == [None] * 2 + told(batches)[2:]
    assert dataset.epoch == 0 and list(dataset) == rows


def test_only_the_pass_that_stopped_begins_in_the_middle() -> None:
    for kind in ("interleaved", "shuffled", "torch"):
        stream = stream_of(STREAMS[kind][1]())
        stream.set_epoch(2)
        other = told(stream)
        stream.set_epoch(1)
        whole = list(stream)
        stream.resume(1, places(whole[:2]))
        assert told(stream) == [None] * 2 + told(whole)[2:]
        stream.set_epoch(2)
        assert told(stream) == other
        stream.resume(None, [])
        stream.set_epoch(1)
        assert told(stream) == told(whole)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("kind", ["generated", "shuffled", "torch"])
def test_workers_take_turns_as_if_they_had_not_stopped(kind: str) -> None:
    # Of three workers, one has no more than a shard of 2 rows: it is through before the others.
    make = STREAMS[kind][1]

    def loaded(stream: Stream) -> list[StreamBatch | None]:
        return list(DataLoader(stream, batch_size=None, num_workers=3, collate_fn=list_of))

    whole = loaded(stream_of(make()))
    for done in (1, 4, len(whole) - 1):
        again = stream_of(make())
        again.resume(0, places(whole[:done]))
        assert told(loaded(again)) == [None] * done + told(whole)[done:]


def list_of(batch: StreamBatch | None) -> StreamBatch | None:
    return batch


def test_workers_that_live_on_see_the_pass() -> None:
    stream = stream_of(STREAMS["shuffled"][1]())
    loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True, collate_fn=list_of)
    whole = []
    for epoch in (0, 1):
        stream.set_epoch(epoch)
        whole.append(captions(loader))
    assert whole[0] != whole[1]
    alone = stream_of(STREAMS["shuffled"][1]())
    alone.set_epoch(1)
    assert captions(DataLoader(alone, batch_size=None, num_workers=2, collate_fn=list_of)) == whole[1]


# ---- Ranks ----


@pytest.mark.parametrize("shards, world_size, kind", [(4, 2, "datasets"), (3, 2, "datasets"), (1, 3, "torch")])
def test_no_row_is_on_two_ranks_and_none_is_lost(shards: int, world_size: int, kind: str) -> None:
    for epoch in (0, 1):
        found: list[list[str]] = []
        for rank in range(world_size):
            dataset = pairs(23, shards) if kind == "datasets" else Rows(captioned(23))
            stream = stream_of(dataset, rank=rank, world_size=world_size)
            stream.set_epoch(epoch)
            found.append([caption for batch in captions(stream) for caption in batch])
        assert sorted(itertools.chain(*found), key=int) == [str(row) for row in range(23)]
        assert max(map(len, found)) - min(map(len, found)) <= 2


def test_a_rank_reads_its_own_shards_only() -> None:
    read: list[str] = []

    def note(row: dict[str, Any]) -> dict[str, Any]:
        read.append(row["caption"])
        return row

    for rank in (0, 1):
        read.clear()
        found = captions(stream_of(pairs(20, 4).map(note), rank=rank, world_size=2))
        assert read == list(itertools.chain(*found)) and len(read) == 10


def test_a_stream_that_was_split_by_node_is_not_split_again() -> None:
    split = datasets.distributed.split_dataset_by_node(pairs(20, 2), rank=1, world_size=2)
    assert captions(stream_of(split, rank=1, world_size=2)) == captions(stream_of(split))


def test_a_rank_goes_on_with_its_own_rows() -> None:
    for dataset in (pairs(23, 4), pairs(23, 3), Rows(captioned(23))):
        whole = list(stream_of(dataset, rank=1, world_size=2))
        again = stream_of(dataset, rank=1, world_size=2)
        again.resume(0, places(whole[:2]))
        assert told(again) == [None] * 2 + told(whole)[2:]


@pytest.mark.parametrize("drop_last, batches", [(True, 3), (False, 4)])
def test_a_stream_of_known_length_knows_its_batches(drop_last: bool, batches: int) -> None:
    stream = stream_of(Rows(captioned(20)), drop_last=drop_last, world_size=2)
    assert len(stream) == len(list(stream)) == batches
    with pytest.raises(TypeError):
        len(stream_of(pairs()))


# ---- Unusable rows ----


def with_broken(broken: tuple[int, ...], image: Any, rows: int = 11) -> datasets.IterableDataset:
    texts = [None if row in broken else str(row) for row in range(rows)]
    return datasets.Dataset.from_dict({"image": [image] * rows, "caption": texts}).to_iterable_dataset()


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_bad_rows_are_listed_once_wherever_it_stopped(
    shuffled: bool, drop_last: bool, pairs: datasets.Dataset
) -> None:
    image = pairs.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"]

    def make() -> Stream:
        stream = with_broken((0, 1, 4, 7, 9, 10), image)
        stream = stream.shuffle(seed=0, buffer_size=4) if shuffled else stream
        return stream_of(stream, 2, drop_last, on_bad_row="skip")

    def listed(batches: Iterable[StreamBatch | None]) -> list[list[Any]]:
        return [[(row["caption"], row[BAD_ROWS]) for row in batch.rows] for batch in batches if batch is not None]

    whole = list(make())
    assert len(whole) == (2 if drop_last else 3)
    if not drop_last:
        assert sorted(bad for batch in listed(whole) for _, rows in batch for bad in rows) == sorted(
            row for row, found in enumerate(make().dataset) if found["caption"] is None
        )
    for done in range(1, len(whole) + 1):
        again = make()
        again.resume(0, places(whole[:done]))
        found = list(again)
        assert found[:done] == [None] * done and listed(found) == listed(whole[done:])


def test_a_stream_without_a_usable_row_raises_and_a_rank_without_one_does_not() -> None:
    broken = with_broken(tuple(range(4)), b"", rows=4)
    with pytest.raises(BadRowError, match="none of the 4 rows can be used"):
        list(stream_of(broken, on_bad_row="skip"))
    assert list(stream_of(broken, on_bad_row="skip", world_size=2)) == []


def test_what_is_not_known_has_no_exact_state() -> None:
    assert not has_exact_state(Rows([])) and not has_exact_state([])

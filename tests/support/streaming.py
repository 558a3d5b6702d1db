"""Streams of digits, and trainers that keep what they were trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch

from hf_robust_clip import CleanCLIPTrainer, CLIPTrainer, RoCLIPTrainer
from support.training import digits


class TorchStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Rows in another order in each pass; of known length."""

    def __init__(self, rows: int) -> None:
        self.rows = digits().select(range(rows))
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.epoch))
        return (self.rows[row] for row in order.tolist())


class Watching:
    """Keeps the batches that a trainer was trained on: the shape of the images, and the captions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[list[str]] = []

    def loss_components(self: Any, views: Any, scale: torch.Tensor, batch: Any) -> dict[str, torch.Tensor]:
        texts = self.processing_class.tokenizer.batch_decode(batch.inputs["input_ids"], skip_special_tokens=True)
        self.seen.append([*map(str, batch.inputs["pixel_values"].shape), *texts])
        return super().loss_components(views, scale, batch)


class Watched(Watching, CLIPTrainer):
    pass


class WatchedCleanCLIP(Watching, CleanCLIPTrainer):
    pass


class WatchedRoCLIP(Watching, RoCLIPTrainer):
    pass


def shards(rows: int = 37, shards: int = 3) -> datasets.IterableDataset:
    return digits().select(range(rows)).to_iterable_dataset(num_shards=shards)


def rows_of_shards(shards: list[range]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for row in shard:
            yield digits()[row]


def uneven() -> datasets.IterableDataset:
    """A shard of 40 rows and one of 27."""
    given = {"shards": [range(40), range(40, 67)]}
    return datasets.IterableDataset.from_generator(rows_of_shards, features=digits().features, gen_kwargs=given)


#: For two processes: trainer, stream, arguments. With three shards each reads all rows, and keeps every second one.
STREAMED: dict[str, tuple[type[CLIPTrainer], Callable[[], Any], dict[str, Any]]] = {
    "own shards": (Watched, uneven, {"max_steps": 5, "step": 4}),
    "own shards, last batches too": (
        WatchedCleanCLIP,
        uneven,
        {"max_steps": 6, "step": 5, "dataloader_drop_last": False},
    ),
    "own rows": (
        *(WatchedRoCLIP, lambda: shards(55).shuffle(seed=3, buffer_size=6)),
        {"max_steps": 5, "step": 4, "steps_per_matching_epoch": 2, "pool_size": 10},
    ),
}

"""Streams: a run resumed in any pass, from any kind of stream, ends in the same bits as one that never stopped."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from training import assert_same_bits, digits, make_trainer

from hf_robust_clip import BlendedTrigger, CleanCLIPTrainer, CLIPTrainer, PoisonSpec, RoCLIPTrainer, poison_stream
from hf_robust_clip.trainers.streaming import STREAM_FILE


class TorchStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Rows in an order of their own in each pass, which workers share by themselves."""

    def __init__(self, rows: int) -> None:
        self.rows = digits().select(range(rows))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        generator = torch.Generator().manual_seed(self.epoch)
        for row in torch.randperm(len(self.rows), generator=generator).tolist()[first::step]:
            yield self.rows[row]


def broken(rows: int) -> datasets.IterableDataset:
    """With unusable rows in the middle and at the end."""
    table = digits().select(range(rows)).cast_column("image", datasets.Image(decode=False)).to_dict()
    for row in (2, 3, 11, rows - 1):
        table["caption"][row] = None
    features = datasets.Features({**digits().features, "image": datasets.Image(decode=False)})
    return datasets.Dataset.from_dict(table, features=features).to_iterable_dataset()


def poisoned(rows: int) -> datasets.IterableDataset:
    stream = digits().select(range(rows)).to_iterable_dataset(num_shards=3)
    spec = PoisonSpec(BlendedTrigger(), "eight", rate=0.5)
    return poison_stream(stream, spec, key_column="digit")[0]


def tars(folder: Path, rows: tuple[int, ...]) -> list[str]:
    """As WebDataset writes them: `000.jpg` and `000.txt`, one after the other."""
    paths, numbers = [], iter(range(sum(rows)))
    for shard, count in enumerate(rows):
        path = folder / f"{shard}.tar"
        with tarfile.open(path, "w") as tar:
            for _ in range(count):
                row = digits()[next(numbers)]
                image = io.BytesIO()
                row["image"].save(image, format="JPEG")
                number = f"{len(tar.getnames()):03d}"
                for suffix, content in (("jpg", image.getvalue()), ("txt", row["caption"].encode())):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        paths.append(str(path))
    return paths


def webdataset(folder: Path, rows: tuple[int, ...]) -> datasets.IterableDataset:
    cache = str(folder / "cache")
    stream = datasets.load_dataset("webdataset", data_files=tars(folder, rows), streaming=True, cache_dir=cache)
    return stream["train"]


class Watched(CLIPTrainer):
    """Keeps the captions of the batches that it was trained on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[list[str]] = []

    def loss_components(self, views: Any, scale: torch.Tensor, inputs: Any) -> dict[str, torch.Tensor]:
        tokenizer = self.processing_class.tokenizer
        self.seen.append([str(inputs["pixel_values"].shape), *tokenizer.batch_decode(inputs["input_ids"])])
        return super().loss_components(views, scale, inputs)

"""Training on a stream: its loader, how far training is in it, and passes that end on all ranks at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import gather_object
from transformers.utils import logging

from ..batch import cut
from ..columns import BAD_ROWS
from ..data.collator import CLIPDataCollator
from ..data.streams import Place, Stream, StreamCollator
from ..files import write_text
from ..wording import shown
from .loaders import worker_settings

logger = logging.get_logger(__name__)

#: Where a checkpoint says how far training was in an iterable dataset.
STREAM_FILE = "robust_clip_stream.json"


class StreamedTraining:
    """
    How far a trainer is in the passes over its iterable dataset.

    Counted are batches that were trained on, not those that workers have made in advance. Resumed, the workers go on
    where those batches end, so that batches, weights and logs are those of a run that never stopped. Ranks agree on
    every step: a pass ends for all of them when one has no more batches for a whole step, and where batches differ in
    size all are cut to the smallest, since what ranks gather from each other must have one shape. What is left of a
    pass that is too little for a step of `gradient_accumulation_steps` batches is left out, on one rank too: the
    `Trainer` would add its gradient to the next step.

    Args:
        dataset (iterable dataset): What is trained on.
        batch_size (`int`): Rows of a batch, on each rank.
        args ([`CLIPTrainingArguments`]), accelerator (`Accelerator`), collator ([`CLIPDataCollator`]): The trainer's.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        args: Any,
        accelerator: Any,
        collator: CLIPDataCollator,
    ) -> None:
        self.args = args
        on_bad_row: Any = args.on_bad_row
        self.stream = Stream(
            dataset,
            image_column=args.image_column,
            caption_column=args.caption_column,
            batch_size=batch_size,
            # A last batch of one row has no negatives.
            least_rows=batch_size if args.dataloader_drop_last else min(2, batch_size),
            on_bad_row=on_bad_row,
            rank=args.process_index,
            world_size=args.world_size,
        )
        #: Whether the pass is over, on all ranks.
        self.ended = False
        self.loader = DataLoaderShard(
            self.stream,
            device=accelerator.device if accelerator.device_placement else None,
            _non_blocking=accelerator.non_blocking,
            batch_size=None,  # the stream makes the batches
            collate_fn=StreamCollator(collator),
            persistent_workers=args.dataloader_persistent_workers,
            in_order=args.dataloader_in_order,
            **worker_settings(args),
        )
        self._group: Any = None
        self._begin(0, [])

    def _begin(self, epoch: int, places: Sequence[Place]) -> None:
        self.epoch = epoch
        self.ended = False
        self._places = {place.worker: place for place in places}
        self.stream.resume(epoch, places)

    def begin_pass(self, epoch: int) -> None:
        """Called before each pass, and again when training resumes within one."""
        if epoch != self.epoch:
            self._begin(epoch, [])

    def take(self, batch_samples: list[dict[str, Any]], wanted: int) -> list[dict[str, Any]]:
        """Of the batches that this rank has, those of the next step; none, as the pass is over, if any has too few."""
        sizes = [len(batch["pixel_values"]) for batch in batch_samples] + [0] * (wanted - len(batch_samples))
        if self.args.world_size > 1:
            sizes = self._smallest(sizes)
        if 0 in sizes:
            self.ended = True
            return []
        return [cut_batch(batch, size) for batch, size in zip(batch_samples, sizes, strict=True)]

    def _smallest(self, sizes: list[int]) -> list[int]:
        # A group of its own on the CPUs, so that no rank waits for its device.
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.args.ddp_timeout))
        smallest = torch.tensor(sizes)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=self._group)
        return [int(size) for size in smallest.tolist()]

    def note(self, place: str) -> None:
        """That a batch was trained on, by what it has under `PLACE`."""
        noted = Place(*json.loads(place))
        self._places[noted.worker] = noted

    # ---- Checkpoints ----

    def _settings(self) -> dict[str, Any]:
        """What places belong to, by the name of the argument."""
        return {
            "number of processes": self.args.world_size,
            "dataloader_num_workers": self.args.dataloader_num_workers,
            "batch size of a process": self.stream.batch_size,
            "dataloader_drop_last": self.args.dataloader_drop_last,
            "on_bad_row": self.stream.on_bad_row,
        }

    def save(self, folder: str) -> None:
        """Write [`STREAM_FILE`]; call it on all ranks."""
        places = [sorted(self._places.values())]
        if self.args.world_size > 1:
            places = gather_object(places)
        state = {"epoch": self.epoch, "ended": self.ended, "settings": self._settings(), "places": places}
        if self.args.should_save:
            write_text(Path(folder, STREAM_FILE), json.dumps(state))

    def load(self, folder: str, epoch: int, steps_in_pass: int) -> tuple[int, int]:
        """
        Go on where a checkpoint was; one without [`STREAM_FILE`] (`save_only_model=True`) begins its pass anew.

        Args:
            folder (`str`): Of the checkpoint.
            epoch (`int`): The pass that it is from.
            steps_in_pass (`int`): Optimizer steps after which the Trainer ends a pass.

        Returns:
            `tuple[int, int]`: The pass, from 0, and how many batches of it this rank has trained on.

        Raises:
            `ValueError`: If the number of processes or workers, the batches or `on_bad_row` are not what they were.
        """
        path = Path(folder, STREAM_FILE)
        if not path.is_file():
            self._begin(epoch, [])
            return epoch, 0
        state = json.loads(path.read_text())
        epoch, ended = int(state["epoch"]), bool(state["ended"])
        places = []
        if not self.args.ignore_data_skip:
            self._check(state["settings"], folder)
            places = [Place(*place) for place in state["places"][self.args.process_index]]
        batches = sum(place.batches for place in places)
        if ended or -(-batches // self.args.gradient_accumulation_steps) >= steps_in_pass:
            epoch, places, batches = epoch + 1, [], 0
        self._begin(epoch, places)
        if places and not self.stream.has_exact_state:
            logger.warning(
                "train_dataset cannot say where it is: it has a shuffle buffer, or is not a datasets.IterableDataset. "
                f"To resume, {sum(place.rows for place in places)} rows of this pass are read again and left out."
            )
        return epoch, batches

    def _check(self, settings: Mapping[str, Any], folder: str) -> None:
        way_out = "set ignore_data_skip=True to begin this pass over train_dataset anew"
        for name, current in self._settings().items():
            if settings.get(name) != current:
                raise ValueError(
                    f"resume_from_checkpoint={shown(folder)}: its {name} was {shown(settings.get(name))}, but is "
                    f"{shown(current)} now, so that the workers' places in the iterable train_dataset cannot be dealt "
                    f"out again. Resume with what it was saved with, or {way_out}"
                )
        if not self.args.dataloader_in_order and self.args.dataloader_num_workers > 1:
            raise ValueError(
                "dataloader_in_order=False: which batches of the iterable train_dataset were trained on cannot be "
                f"repeated. Resume with dataloader_in_order=True, or {way_out}"
            )


def cut_batch(batch: dict[str, Any], size: int) -> dict[str, Any]:
    """The first rows of a batch, with all their views; the batch itself where it has no more."""
    rows = len(batch["pixel_values"])
    if rows == size:
        return batch
    of_rows = {name: value for name, value in batch.items() if torch.is_tensor(value) and name != BAD_ROWS}
    return {**batch, **next(cut(of_rows, len(batch["input_ids"]) // rows, size))}

"""The data loaders of training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import seed_worker

from ..arguments import CLIPTrainingArguments
from ..data.collator import CLIPDataCollator, RowsOnHost
from ..data.rows import IndexedDataset
from ..data.streams import Stream, StreamCollator
from ..models import caption_padding, longest_caption
from .checks import check_collator, check_views


def training_collator(
    given: CLIPDataCollator | None,
    processor: Any,
    encoder: Any,
    args: CLIPTrainingArguments,
    views: tuple[str, ...],
    text_augmentation: Callable[[str, int], str] | None,
    trains: bool,
) -> CLIPDataCollator:
    """The collator of a training: the one that was given, if it does not contradict the arguments, or a new one."""
    if given is not None:
        check_collator(given, args)
        if trains:
            check_views(given, views, text_augmentation)
        return given
    return CLIPDataCollator(
        processor,
        image_column=args.image_column,
        caption_column=args.caption_column,
        views=views,
        text_augmentation=text_augmentation,
        max_length=args.max_length or longest_caption(encoder, processor.tokenizer),
        padding=caption_padding(encoder),
        seed=args.order_seed,
    )


def indexed(dataset: Any, args: CLIPTrainingArguments) -> IndexedDataset:
    """The rows of a map-style dataset, with their numbers."""
    on_bad_row: Any = args.on_bad_row
    return IndexedDataset(dataset, args.image_column, args.caption_column, on_bad_row)


def worker_settings(args: CLIPTrainingArguments) -> dict[str, Any]:
    """The arguments of a `DataLoader` that say how its workers load."""
    return {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
        "prefetch_factor": args.dataloader_prefetch_factor,
    }


def map_style_loader(
    dataset: IndexedDataset,
    collator: CLIPDataCollator,
    args: CLIPTrainingArguments,
    accelerator: Any,
    batches: dict[str, Any],
    generator: torch.Generator,
    training: bool,
) -> DataLoader[Any]:
    """
    A loader of a map-style dataset, dealt to the ranks.

    Args:
        dataset ([`~data.rows.IndexedDataset`]), collator ([`CLIPDataCollator`]): What is loaded.
        args ([`CLIPTrainingArguments`]), accelerator (`Accelerator`): The trainer's.
        batches (`dict`): The `batch_sampler`, or `batch_size`, `sampler` and `drop_last`.
        generator (`torch.Generator`): Of the seed that workers get. A loader draws it at each epoch, but with
            persistent workers at the first only, and after resuming within an epoch once more: from the global
            generator, that would shift the model's dropout.
        training (`bool`): Whether to seed what workers draw as the Trainer does.
    """
    seeded = partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index)
    loader: DataLoader[Any] = accelerator.prepare(
        DataLoader(
            dataset,
            collate_fn=RowsOnHost(collator),
            persistent_workers=args.dataloader_persistent_workers,
            in_order=args.dataloader_in_order,
            worker_init_fn=seeded if training else None,
            **batches,
            **worker_settings(args),
        )
    )
    getattr(loader, "base_dataloader", loader).generator = generator
    return loader


def stream_to_evaluate(
    dataset: Any, collator: CLIPDataCollator, args: CLIPTrainingArguments, sharded: bool
) -> DataLoader[Any]:
    """
    The batches to evaluate of an iterable dataset: each rank reads its own rows, however many there are.

    Args:
        dataset, collator, args: As of [`map_style_loader`].
        sharded (`bool`): Whether the model's weights are.

    Raises:
        `ValueError`: If ranks have to encode equally many batches, as with sharded weights.
    """
    if args.world_size > 1 and sharded:
        raise ValueError(
            f"eval_dataset is a {type(dataset).__name__}, of which processes read unequal shares, but with "
            "sharded weights all of them encode equally many batches: give a map-style dataset"
        )
    stream = Stream(
        dataset,
        args.image_column,
        args.caption_column,
        args.eval_batch_size,
        least_rows=1,
        on_bad_row=args.on_bad_row,  # type: ignore[arg-type]  # checked by the arguments
        rank=args.process_index,
        world_size=args.world_size,
    )
    collate: Any = StreamCollator(collator)
    return DataLoader(stream, batch_size=None, collate_fn=collate, **worker_settings(args))


def is_stream(dataset: Any) -> bool:
    """Whether a dataset is read in order."""
    return isinstance(dataset, IterableDataset)

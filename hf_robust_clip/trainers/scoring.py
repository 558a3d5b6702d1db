"""A pass over all pairs that gives the similarity of each."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..arguments import CLIPTrainingArguments
from ..augment.images import to_float
from ..batch import encode_pairs
from ..columns import BAD_ROWS, POISONED, ROW_INDEX
from ..data.collator import ORIGINAL, CLIPDataCollator
from ..data.rows import IndexedDataset
from ..defences.base import PairScores
from ..distributed import gather_features
from ..seeding import derive_seed, forked_rng
from .loaders import worker_settings
from .step import Step

#: Sets the randomness of scoring apart from that of training.
_SCORING = 1
#: Batches whose scores wait on the device, so that scoring rarely waits for it.
_WAITING = 64
#: A pair's similarity, NaN where the row cannot be used; and whether it is poisoned: 1, 0, -1 where it is not known,
#: -2 where the row cannot be used.
_SCORE = np.dtype([("similarity", "<f4"), ("flag", "i1")])
#: Scores that the ranks exchange at a time.
_EXCHANGED = 1 << 22


def score_pairs(
    dataset: IndexedDataset,
    model: Any,
    step: Step,
    collator: CLIPDataCollator,
    args: CLIPTrainingArguments,
    epoch: int,
    augmented: bool,
    sharded: bool,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
) -> PairScores | None:
    """
    Score every pair of a dataset with a model as it is.

    Without gradients, at the evaluation batch size, each rank a contiguous share of the rows. Of several captions a
    row is scored on the one that training draws in this epoch. Takes 5 bytes a row of its share on each rank, and as
    many of all rows on the first. Torch's global generators are left as they are.

    Args:
        dataset ([`~data.rows.IndexedDataset`]): The pairs.
        model (`nn.Module`): That scores them; wrapped where its weights are `sharded`.
        step ([`~trainers.step.Step`]), collator, args, autocast: Of the training.
        epoch (`int`): From 0; keys what is drawn.
        augmented (`bool`): Whether to score augmented views in place of the pairs as they are.

    Returns:
        [`~defences.base.PairScores`]: On the first rank; `None` on the others.
    """
    rows = len(dataset)
    share = -(-rows // args.world_size)
    scores = np.empty(share, dtype=_SCORE)
    first = args.process_index * share
    own = range(min(first, rows), min(first + share, rows))
    loader: DataLoader[Any] = DataLoader(
        dataset,
        # As many on every rank, since those of sharded parameters encode in step.
        sampler=itertools.chain(own, itertools.repeat(rows - 1, share - len(own))),
        batch_size=args.eval_batch_size,
        collate_fn=collator.with_views(("scored",) if augmented else (ORIGINAL,)),
        generator=torch.Generator(),  # its own, or the workers' seed would be drawn from the global one
        **worker_settings(args),
    )
    was_training = model.training
    model.eval()
    waiting: list[torch.Tensor] = []  # (B, 3) each, on the device
    done = 0
    try:
        # Sharded parameters that come together in inference mode could not be trained on.
        with torch.no_grad() if sharded else torch.inference_mode():
            for number, batch in enumerate(loader):
                key = derive_seed(args.seed, epoch, number, args.process_index, _SCORING)
                with autocast():
                    waiting.append(_score_batch(step, model, batch, key if augmented else None))
                if len(waiting) == _WAITING:
                    done = _note(scores, waiting, first, rows, done)
            _note(scores, waiting, first, rows, done)
    finally:
        model.train(was_training)
    return _put_together(scores, rows, args)


def _score_batch(step: Step, model: Any, batch: dict[str, Any], key: int | None) -> torch.Tensor:
    """Row, similarity and poison flag (-1: unknown) of each pair, `(B, 3)` float64."""
    batch.pop(BAD_ROWS, None)
    rows = batch.pop(ROW_INDEX)
    flags = batch.pop(POISONED, torch.full_like(rows, -1))
    inputs = {name: value.to(step.device, non_blocking=True) for name, value in batch.items()}
    images = to_float(inputs["pixel_values"])
    if key is not None:
        with forked_rng(key, images.device):
            images = step.image_view(images, "scored")
    similarities = encode_pairs(model, {**inputs, "pixel_values": step.normalization(images)}).similarities
    parts = (rows.to(images.device), similarities, flags.to(images.device))
    return torch.stack([part.double() for part in parts], dim=1)


def _note(scores: np.ndarray, waiting: list[torch.Tensor], first: int, rows: int, done: int) -> int:
    """Move what waits on the device into this rank's scores, of which `done` are there; how many are there then."""
    for batch in waiting:
        numbers, similarities, flags = batch.cpu().numpy().T
        # Where another row came in a row's place, that row cannot be used.
        asked = np.minimum(np.arange(first + done, first + done + len(numbers)), rows - 1)
        part = scores[done : done + len(numbers)]
        part["similarity"] = np.where(numbers == asked, similarities, np.nan)
        part["flag"] = np.where(numbers == asked, flags, -2)
        done += len(numbers)
    waiting.clear()
    return done


def _put_together(scores: np.ndarray, rows: int, args: Any) -> PairScores | None:
    """The scores of all ranks, on the first of them."""
    share, step = len(scores), max(1, _EXCHANGED // args.world_size)
    main = args.process_index == 0
    similarities = np.empty(rows if main else 0, dtype=np.float32)
    flags = np.empty(rows if main else 0, dtype=np.int8)
    for start in range(0, share, step):
        part = scores[start : start + step]
        columns = np.stack([part["similarity"], part["flag"].astype(np.float32)])[None]  # (1, 2, n)
        gathered = gather_features(torch.from_numpy(columns).to(args.device)).cpu().numpy()  # (world_size, 2, n)
        for rank, (values, marks) in enumerate(gathered if main else ()):
            place = slice(rank * share + start, min(rank * share + start + len(part), rows))
            count = max(0, place.stop - place.start)
            similarities[place], flags[place] = values[:count], marks[:count]
    if not main:
        return None
    return PairScores(similarities, flags == 1 if bool((flags >= 0).any()) else None)

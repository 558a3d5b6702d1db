"""A pass over all pairs that gives the similarity of each, the same on every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset

from ..augment.images import to_float
from ..data.collator import ORIGINAL
from ..data.rows import BAD_ROWS, POISONED, ROW_INDEX, IndexedDataset
from ..distributed import gather_features
from ..seeding import derive_seed, forked_rng

if TYPE_CHECKING:
    from .base import CLIPTrainer

#: Sets the randomness of scoring apart from that of training.
_SCORING = 1


class PairScores(NamedTuple):
    """
    `similarities (N,)`, float32: the cosine of each pair's embeddings, NaN for a row that cannot be used (with
    `on_bad_row="skip"`). `poisoned (N,)`, bool: the column of that name, false for such a row, `None` where there is
    none.
    """

    similarities: np.ndarray
    poisoned: np.ndarray | None


def score_pairs(trainer: CLIPTrainer, epoch: int, augmented: bool = False) -> PairScores:
    """
    Score every pair of the trainer's `train_dataset` with the model as it is.

    In inference mode, at the evaluation batch size, each rank a contiguous share of the rows; the rows that fill up
    the last share are left out of the result. Of several captions a row is scored on the one that training draws in
    this epoch.

    Args:
        trainer ([`CLIPTrainer`]): With a map-style `train_dataset`. Torch's global generators are left as they are.
        epoch (`int`): From 0; keys what is drawn.
        augmented (`bool`): Whether to score augmented views in place of the pairs as they are.

    Returns:
        [`PairScores`]: The same on every rank.
    """
    args = trainer.args
    on_bad_row: Any = args.on_bad_row
    columns = (args.image_column, args.caption_column)
    # Rows are scored on the pixels that they are trained on.
    dataset = IndexedDataset(trainer.train_dataset, *columns, on_bad_row, trainer.data_collator.least_side)
    share = -(-len(dataset) // args.world_size)
    first = args.process_index * share
    rows = torch.arange(first, first + share).clamp(max=len(dataset) - 1)
    loader: DataLoader[Any] = DataLoader(
        Subset(dataset, rows.tolist()),
        batch_size=args.eval_batch_size,
        collate_fn=trainer.data_collator.with_views(("scored",) if augmented else (ORIGINAL,)),
        generator=torch.Generator(),  # its own, or the workers' seed would be drawn from the global one
        **trainer.worker_settings(),
    )
    # Sharded parameters come together only in the wrapped model's forward pass.
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    model: Any = trainer.model_wrapped if sharded else trainer.unwrapped_model
    was_training = model.training
    model.eval()
    scores = []  # (B, 3) each
    try:
        with torch.inference_mode():
            for number, batch in enumerate(loader):
                key = derive_seed(args.seed, epoch, number, args.process_index, _SCORING)
                scores.append(_score_batch(trainer, model, batch, key if augmented else None))
    finally:
        model.train(was_training)
    scored = torch.cat(scores).clone()  # (share, 3), out of inference mode
    # Where another row came in a row's place, that row cannot be used.
    scored[scored[:, 0] != rows.to(scored.device), 1:] = torch.nan
    gathered = gather_features(scored)[: len(dataset)].cpu()  # (N, 3)
    flags = gathered[:, 2]
    poisoned = (flags == 1).numpy() if bool((flags >= 0).any()) else None
    similarities = gathered[:, 1].float().numpy()
    return PairScores(similarities, poisoned)


def _score_batch(trainer: CLIPTrainer, model: Any, batch: dict[str, Any], key: int | None) -> torch.Tensor:
    """Row, similarity and poison flag (-1: unknown) of each pair, `(B, 3)` float64."""
    batch.pop(BAD_ROWS, None)
    rows = batch.pop(ROW_INDEX)
    flags = batch.pop(POISONED, torch.full_like(rows, -1))
    inputs: Any = trainer._prepare_input(batch)
    images = to_float(inputs["pixel_values"])
    if key is not None and trainer.image_augmentation is not None:
        with forked_rng(key, images.device):
            images = trainer.image_augmentation(images)
    inputs["pixel_values"] = trainer.normalization(images)
    with trainer.compute_loss_context_manager():
        outputs = model(**inputs)
    image_embeds = F.normalize(outputs.image_embeds.float(), dim=-1)
    text_embeds = F.normalize(outputs.text_embeds.float(), dim=-1)
    similarities = (image_embeds * text_embeds).sum(dim=-1)
    parts = (rows.to(images.device), similarities, flags.to(images.device))
    return torch.stack([part.double() for part in parts], dim=1)

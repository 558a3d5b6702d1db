"""The loss of an evaluation: over all rows at once, whatever the batches and the number of processes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from ..batch import Embeddings
from ..losses import cross_modal_loss
from .checks import ONE_ROW


class EvaluatedPairs:
    """Keeps the embeddings of the batches of an evaluation, on the host, until all of them are contrasted."""

    def __init__(self) -> None:
        self._batches: list[list[torch.Tensor | None]] = []

    def add(self, rows: torch.Tensor | None, embeddings: Embeddings) -> None:
        """Take in a batch of this rank: the numbers of its rows, and their embeddings."""
        self._batches.append([rows, *(side.cpu() for side in embeddings)])

    def clear(self) -> None:
        """Forget everything."""
        self._batches.clear()

    @torch.no_grad()
    def loss(self, scale: torch.Tensor, bias: torch.Tensor | None, world_size: int) -> tuple[int, float]:
        """
        How many rows were evaluated on all ranks, and their loss, each contrasted with all others; they are forgotten
        then. Call it on all ranks.

        Args:
            scale (`torch.Tensor`): `exp(logit_scale)`, on the device to compute on.
            bias (`torch.Tensor`, *optional*): `logit_bias`, of the sigmoid loss.
            world_size (`int`): The number of processes.

        Raises:
            `ValueError`: For a single row.
        """
        batches: Any = gather_object(self._batches) if world_size > 1 else list(self._batches)
        self.clear()
        if not batches:
            return 0, math.nan  # an evaluation of evaluators alone
        sides: Any = [None if side[0] is None else torch.cat(side) for side in zip(*batches, strict=True)]
        numbers, images, texts = sides
        if numbers is not None:
            # accelerate fills up the last batches with rows that others have.
            _, kept = np.unique(numbers, return_index=True)
            images, texts = images[kept], texts[kept]
        if len(images) < 2:
            raise ValueError(ONE_ROW.format("eval_dataset"))
        return len(images), float(cross_modal_loss(images.to(scale.device), texts.to(scale.device), scale, bias))

"""Trainers that keep what goes into and comes out of every step, and the reference that steps are checked against."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from hf_robust_clip import CLIPTrainer, RoCLIPTrainer, SafeCLIPTrainer


class Step(NamedTuple):
    """What a batch was: its epoch, its views, `exp(logit_scale)`, row numbers, poison flags, terms of the loss."""

    epoch: int
    views: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scale: float
    rows: list[int] | None
    poisoned: torch.Tensor | None
    terms: dict[str, float]


class _Recorded(CLIPTrainer):
    steps: list[Step]
    learning_rates: list[float]

    def loss_components(self, views: Any, scale: torch.Tensor, batch: Any) -> dict[str, torch.Tensor]:
        terms = super().loss_components(views, scale, batch)
        rows = batch.rows
        self.__dict__.setdefault("steps", []).append(
            Step(
                self._epoch or 0,
                {name: (view.image_embeds.detach(), view.text_embeds.detach()) for name, view in views.items()},
                scale.item(),
                rows.tolist() if rows is not None else None,
                batch.poisoned,
                {name: term.item() for name, term in terms.items()},
            )
        )
        return terms

    def on_step_begin(self) -> None:
        super().on_step_begin()
        self.__dict__.setdefault("learning_rates", []).append(self.optimizer.param_groups[0]["lr"])


class RecordedRoCLIP(_Recorded, RoCLIPTrainer):
    """Records its steps."""


class RecordedSafeCLIP(_Recorded, SafeCLIPTrainer):
    """Records its steps, and which pairs are safe in each epoch."""

    safe: list[np.ndarray | None]

    def on_epoch_begin(self) -> None:
        super().on_epoch_begin()
        self.__dict__.setdefault("safe", []).append(self.splits.safe)


def info_nce(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> float:
    """Mean of `-log softmax(scale * queries @ keys.T)` over the diagonal."""
    log_probabilities = F.log_softmax(scale * queries.double() @ keys.double().T, dim=1)
    return -log_probabilities.diagonal().mean().item()


def clip(images: torch.Tensor, texts: torch.Tensor, scale: float) -> float:
    """The loss of CLIP."""
    return (info_nce(images, texts, scale) + info_nce(texts, images, scale)) / 2


class Queue(NamedTuple):
    """The last pairs of all steps before one, oldest first: what pools of that size must hold."""

    images: torch.Tensor
    texts: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def before(cls, steps: list[Step], number: int, size: int, view: str, dtype: torch.dtype = torch.float32) -> Queue:
        """Of the steps before step `number`."""
        earlier = steps[:number]
        sides = [torch.cat([step.views[view][side] for step in earlier])[-size:].to(dtype) for side in (0, 1)]
        rows = [row for step in earlier for row in step.rows or []]
        return cls(*sides, torch.tensor(rows[-size:]))


def nearest(queries: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """Numbers of the entries of the largest inner product."""
    return (queries.double() @ pool.double().T).argmax(dim=1)

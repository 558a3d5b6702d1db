"""CLIP itself: the undefended baseline."""

from __future__ import annotations

import torch

from ..batch import Batch, Embeddings
from ..losses import clip_loss
from .base import Defence


class CLIP(Defence):
    """The loss of CLIP (Radford et al., ICML 2021), and nothing else."""

    def forward(self, views: dict[str, Embeddings], scale: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        (view,) = views.values()
        return {"clip_loss": clip_loss(*view, scale, gather=self.gather)}

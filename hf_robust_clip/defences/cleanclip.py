"""CleanCLIP: fine-tuning on clean pairs that removes a backdoor."""

from __future__ import annotations

import torch

from ..batch import Batch, Embeddings
from ..losses import cleanclip_loss
from .base import Defence


class CleanCLIP(Defence):
    """
    Beside the CLIP loss, each image and each caption learns to recognise an augmented copy of itself, which unties the
    trigger from the target's captions (Bansal et al., ICCV 2023, arXiv 2303.03323, equation 3).

    Args:
        clip_weight, unimodal_weight (`float`): The paper's lambda 1 and lambda 2, at least 0.
    """

    views = ("original", "augmented")

    def __init__(self, clip_weight: float = 1.0, unimodal_weight: float = 1.0) -> None:
        super().__init__()
        self.clip_weight, self.unimodal_weight = clip_weight, unimodal_weight

    def forward(self, views: dict[str, Embeddings], scale: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        return cleanclip_loss(
            *views["original"],
            *views["augmented"],
            scale,
            clip_weight=self.clip_weight,
            unimodal_weight=self.unimodal_weight,
            gather=self.gather,
        )

"""What a model makes of pairs: the features that a scan looks at."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ..evaluation.embedding import Embedder


class Features(NamedTuple):
    """
    Of N pairs under one model: `pooled (N, D)`, the vision tower's output before its projection, `images (N, E)` and
    `texts (N, E)`, the embeddings of images and first captions, all float16 and L2-normalised.
    """

    pooled: NDArray[np.float16]
    images: NDArray[np.float16]
    texts: NDArray[np.float16]

    def at(self, rows: Any) -> Features:
        """Those of some rows."""
        return Features(*(part[rows] for part in self))

    def distances(self) -> NDArray[np.float32]:
        """1 less the cosine of each pair `(N,)`."""
        images, texts = (np.asarray(part, dtype=np.float32) for part in (self.images, self.texts))
        return 1 - np.einsum("nd,nd->n", images, texts)


def joined(parts: Sequence[Features]) -> Features:
    """The features of several blocks of pairs, one after the other."""
    return Features(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def encode(embedder: Embedder, pixels: torch.Tensor, captions: Sequence[str]) -> Features:
    """
    The features of some pairs.

    Args:
        embedder ([`Embedder`]): Of the model.
        pixels (`torch.Tensor` of shape `(B, 3, H, W)`): Of the images, in [0, 1] or uint8.
        captions (sequence of `str`): One for each image.
    """
    pooled, images = encode_images(embedder, pixels)
    return Features(*(part.half().numpy() for part in (pooled, images, embedder.encode_texts(captions))))


def encode_images(embedder: Embedder, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The vision tower's pooled output `(B, D)` and the images' embeddings `(B, E)`, float32, L2-normalised, on the CPU;
    twice the embeddings where a model has no projection of its own.
    """
    seen: list[torch.Tensor] = []
    tower = getattr(embedder.model, "vision_model", None)
    with contextlib.ExitStack() as stack:
        if tower is not None:
            handle = tower.register_forward_hook(lambda module, args, output: seen.append(output.pooler_output))
            stack.callback(handle.remove)
        images = embedder.encode_pixels(pixels)
    if not seen or seen[0] is None or seen[0].ndim != 2:
        return images, images
    return F.normalize(seen[0].float(), dim=-1).cpu(), images

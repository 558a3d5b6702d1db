"""The pair of pools, of image and of text features, that RoCLIP and SafeCLIP keep while they train."""

from __future__ import annotations

from typing import Any

import torch

from ..distributed import gather_features
from ..pool import FeaturePool
from ..wording import shown


class FeaturePools:
    """
    A first-in first-out pool of image features and one of text features, filled side by side: slot i of both holds
    the two sides of one pair. They hold the same on every rank.

    Args:
        size (`int`): Pairs that they hold, at least 1.
        dtype (`torch.dtype`): Of the stored features.
    """

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.size, self.dtype = size, dtype
        self.image: FeaturePool | None = None
        self.text: FeaturePool | None = None

    @property
    def full(self) -> bool:
        """Whether every slot holds a feature; losses look up matches from then on."""
        return self.text is not None and self.text.full

    def enqueue(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, keys: torch.Tensor | None = None) -> None:
        """
        Take in the pairs of this batch, of all ranks, in the order of the ranks.

        Args:
            image_embeds, text_embeds (`torch.Tensor` of shape `(B, D)`): Gradients are left behind.
            keys (`torch.Tensor` of shape `(B,)`, int64, *optional*): The pairs' numbers in the dataset.
        """
        with torch.no_grad():
            features = [gather_features(embeds.detach()) for embeds in (image_embeds, text_embeds)]
            keys = gather_features(keys) if keys is not None else None
            if self.image is None or self.text is None:
                self.image, self.text = (
                    FeaturePool(self.size, side.shape[1], self.dtype).to(side.device) for side in features
                )
            for pool, side in zip((self.image, self.text), features, strict=True):
                pool.enqueue(side, keys)

    def clear(self) -> None:
        """Forget everything."""
        self.image = self.text = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state of both pools, under names that begin with `image_pool.` and `text_pool.`."""
        return {
            f"{name}_pool.{part}": value
            for name, pool in (("image", self.image), ("text", self.text))
            if pool is not None
            for part, value in pool.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, torch.Tensor], device: torch.device) -> None:
        """
        Take over what [`state_dict`] returned; names of other things are passed over.

        Raises:
            `ValueError`: If the pools in the state are of another size, or there are none.
        """
        for name in ("image", "text"):
            prefix = f"{name}_pool."
            parts: dict[str, Any] = {
                key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
            }
            size, dim = parts["features"].shape if parts else (0, 0)
            if size != self.size:
                raise ValueError(
                    f"the pools of the checkpoint hold {size} pairs, but the pool size is {self.size} now: resume "
                    "with the arguments of the interrupted run"
                )
            pool = FeaturePool(size, dim, self.dtype)
            pool.load_state_dict(parts)
            setattr(self, name, pool.to(device))


def pool_length(size: float, rows: int | None, argument: str) -> int:
    """
    How many pairs a pool holds: `size` itself from 2 on, and below 1 that share of the dataset, at least two pairs.

    Raises:
        `ValueError`: If `size` is a share and the number of `rows` is not known.
    """
    if size >= 1:
        return int(size)
    if rows is None:
        raise ValueError(
            f"{argument}={shown(size)} is a share of train_dataset, whose length is unknown: give the number of pairs "
            f"that the pool holds, such as {argument}=20000"
        )
    return max(2, round(size * rows))

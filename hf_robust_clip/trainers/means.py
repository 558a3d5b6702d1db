"""Means of what is seen between two logs or looks, kept on the device until then."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

if TYPE_CHECKING:
    from accelerate import Accelerator


class RunningMeans:
    """
    Means over all ranks and all calls since the last log. Call [`add`] in a trainer's `loss_components` to have
    diagnostics of your own logged: `self.means.add({"hardest_negative": similarities.max(dim=1).values})`. A defence
    has [`~defences.Defence.note`], in its `forward`.

    Args:
        accelerator (`Accelerator`): Of the trainer.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, values: Mapping[str, torch.Tensor], where: torch.Tensor | None = None) -> None:
        """
        Take in values, which are logged under their names.

        Args:
            values (mapping of `str` to `torch.Tensor`): Scalars, or one value a row `(B,)`. Gradients are left behind.
            where (`torch.Tensor` of shape `(B,)`, bool, *optional*): The rows that count.
        """
        # On the device until they are logged: reading them here would make every step wait for the last.
        for name, value in values.items():
            value = value.detach().float()
            counted = torch.ones_like(value) if where is None else where.to(value.dtype)
            summed = torch.stack([(value * counted).sum(), counted.sum()])
            self._sums[name] = self._sums[name] + summed if name in self._sums else summed

    def take(self) -> dict[str, float]:
        """The means, which are forgotten then; call it on all ranks."""
        names = sorted(self._sums)
        if self._accelerator.num_processes > 1:
            # A batch whose rows do not all have a value is logged without it, on its rank.
            names = sorted(set(gather_object(names)))
        if not names:
            return {}
        nothing = torch.zeros(2, device=self._accelerator.device)
        sums = torch.stack([self._sums.get(name, nothing) for name in names])  # (names, 2)
        sums = self._accelerator.reduce(sums, reduction="sum")
        self._sums.clear()
        return {name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True) if count}

    def clear(self) -> None:
        """Forget everything."""
        self._sums.clear()


class RecentLoss:
    """The loss of this process's batches since it was last asked for, kept on the device until then."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._rows = 0

    def add(self, loss: torch.Tensor, rows: int) -> None:
        """Take in the loss of a batch, a scalar, and its rows. The gradient is left behind."""
        weighed = loss.detach().float() * rows
        self._sum = weighed if self._sum is None else self._sum + weighed
        self._rows += rows

    def take(self) -> tuple[float, int]:
        """The mean over the rows, NaN without any, and how many there were; both are forgotten then."""
        total, rows = self._sum, self._rows
        self._sum, self._rows = None, 0
        return (math.nan if total is None else total.item() / rows), rows

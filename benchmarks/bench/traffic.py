"""What the processes of a training send each other in a step, computed from the shapes, and counted in a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

#: Embeddings are gathered in float32, the pairs' numbers in int64, gradients as the weights are kept, in float32.
FEATURE_BYTES, KEY_BYTES, GRADIENT_BYTES = 4, 8, 4


@dataclass(frozen=True)
class Gathers:
    """How often a step gathers `(B, D)` features, how many of these come back as gradients, and `(B,)` numbers."""

    features: int
    gradients: int
    keys: int = 0


@dataclass(frozen=True)
class Traffic:
    """Bytes of what collective operations end with on one process: gathered by all-gathers, summed by all-reduces."""

    gathered: int
    reduced: int

    def sent(self, world: int) -> float:
        """Bytes that a process sends, and receives, where both operations go round a ring."""
        return (world - 1) / world * (self.gathered + 2 * self.reduced)


#: Of each phase. Look-ups have no gradient, so that what they found is gathered forward only; pools gather once more.
GATHERS: dict[str, Gathers] = {
    "clip": Gathers(2, 2),
    "cleanclip": Gathers(4, 4),
    "roclip_plain": Gathers(2 + 2, 2, keys=1),
    "roclip_matching": Gathers(2 + 2, 1, keys=1),
    "safeclip_unimodal": Gathers(2 + 2, 0),
    "safeclip_cross": Gathers(2 + 2, 2),
    "safeclip_safe": Gathers(2 + 2, 2),
}


def contrastive_traffic(phase: str, batch: int, dim: int, world: int) -> Traffic:
    """
    Of the embeddings of a step.

    Args:
        phase (`str`): Of `GATHERS`.
        batch (`int`): Pairs of one process.
        dim (`int`): Of the embeddings.
        world (`int`): Processes; one alone gathers nothing.
    """
    if world == 1:
        return Traffic(0, 0)
    gathers, rows = GATHERS[phase], world * batch
    features = rows * dim * FEATURE_BYTES
    return Traffic(gathers.features * features + gathers.keys * rows * KEY_BYTES, gathers.gradients * features)


def gradient_traffic(parameters: int, world: int) -> Traffic:
    """Of the weights' gradients in a step, which DDP averages."""
    return Traffic(0, GRADIENT_BYTES * parameters if world > 1 else 0)


class Counter:
    """Bytes counted within [`counting`]: of this package's own operations, and of DDP's."""

    def __init__(self) -> None:
        self.clear()
        self._averaging = False

    def clear(self) -> None:
        """Count from nothing."""
        self.gathered = self.reduced = self.of_ddp = 0

    def averaging_hook(self, group: Any, bucket: Any) -> Any:
        """A hook for DDP's communication that does what it does by itself."""
        self._averaging = True
        try:
            return allreduce_hook(group, bucket)
        finally:
            self._averaging = False

    def reduces(self, tensor: torch.Tensor) -> None:
        """Count an all-reduce."""
        if self._averaging:
            self.of_ddp += tensor.nbytes
        else:
            self.reduced += tensor.nbytes

    def bytes(self) -> dict[str, int]:
        """What was counted, by name."""
        return {"gathered": self.gathered, "reduced": self.reduced, "of_ddp": self.of_ddp}


@contextmanager
def counting(counter: Counter) -> Iterator[None]:
    """Within the block, what `torch.distributed.all_gather` and `all_reduce` move is counted."""
    gather, reduce = dist.all_gather, dist.all_reduce

    def counted_gather(tensors: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        counter.gathered += sum(tensor.nbytes for tensor in tensors)
        return gather(tensors, *args, **kwargs)

    def counted_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counter.reduces(tensor)
        return reduce(tensor, *args, **kwargs)

    dist.all_gather, dist.all_reduce = counted_gather, counted_reduce
    try:
        yield
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce

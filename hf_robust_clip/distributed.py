"""Ranks, and a gather of features across them that gradients flow through."""

from __future__ import annotations

import gc
from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    """Number of processes in the default group, 1 when none is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process in the default group, 0 when none is initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gathered(value: Any) -> list[Any]:
    """A picklable value of each rank, in rank order."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def leave_group() -> None:
    """
    End the default group, on all of its processes, when their work is done and nothing uses a trainer any more.

    A thread of the group that outlives the interpreter may ask for Python's lock: the process then ends with `SIGABRT`
    in place of 0. So all processes wait until the last collective is over, and a trainer, which a cycle of references
    holds, is freed with the group that its wrapped model holds.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    gc.collect()


class _AllGather(torch.autograd.Function):
    """Concatenate one tensor per rank; in the backward pass, sum over ranks what each owes to this rank's rows."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor) -> torch.Tensor:
        ctx.rows = features.shape[0]
        gathered = [torch.empty_like(features) for _ in range(world_size())]
        dist.all_gather(gathered, features)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> torch.Tensor:
        # gloo has no reduce_scatter, so: sum everything, keep this rank's slice.
        grad = grad_outputs[0].clone(memory_format=torch.contiguous_format)  # autograd may hand it to others too
        dist.all_reduce(grad, op=dist.ReduceOp.SUM)
        return grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather_features(features: torch.Tensor) -> torch.Tensor:
    """
    Concatenate `features` of all ranks along the first dimension, in rank order, differentiably.

    With each rank's loss the mean over its own rows, and DDP averaging gradients over ranks, the gradients are those
    of one process that holds the whole batch. A gather without gradient (`torch.distributed.all_gather`) divides the
    towers' gradients, but not the logit scale's, by the world size.

    Args:
        features (`torch.Tensor` of shape `(B, D)`):
            Must have the same shape and dtype on every rank.

    Returns:
        `torch.Tensor` of shape `(world_size * B, D)`: `features` itself when there is one process.
    """
    if world_size() == 1:
        return features
    gathered: torch.Tensor = _AllGather.apply(features.contiguous())
    return gathered

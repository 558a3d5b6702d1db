"""Batches dealt to the ranks of a distributed run, and what they make of them put together again, exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..distributed import gathered, rank, world_size
from ..wording import said, shortened


def share_batches(batches: Sequence[range], embed: Callable[[Sequence[range]], torch.Tensor]) -> torch.Tensor:
    """
    Deal batches to the ranks in turn, and gather what each makes of its own.

    Call it on all ranks with the same batches. There may be fewer of them than ranks, or a number that does not divide
    evenly; no row is done twice.

    Args:
        batches (sequence of `range`): Contiguous row numbers, from 0.
        embed (callable): One or more batches to their embeddings, `(V, n, D)`, float32, on the CPU.

    Returns:
        `torch.Tensor` of shape `(V, N, D)`: The embeddings of all rows in order, the same on every rank.

    Raises:
        `RuntimeError`: On a rank whose own batches went well, if another's did not. That rank raises its own error.
    """
    if world_size() == 1:
        return embed(batches)
    shares = [batches[number :: world_size()] for number in range(world_size())]
    embeds: torch.Tensor | None = None
    failure: Exception | None = None
    try:
        embeds = embed(shares[rank()]) if shares[rank()] else None
    except Exception as error:
        # Raised below: a rank that left now would keep the others waiting for it.
        failure = error
    reports = gathered((failure and said(failure), embeds))
    if failure is not None:
        raise failure
    parts: dict[int, torch.Tensor] = {}  # by their first row
    for number, (fault, made) in enumerate(reports):
        if fault is not None:
            raise RuntimeError(shortened(f"rank {number} could not embed its share: {fault}"))
        if made is not None:
            split = made.split([len(batch) for batch in shares[number]], dim=1)
            parts |= {batch.start: part for batch, part in zip(shares[number], split, strict=True)}
    return torch.cat([parts[batch.start] for batch in batches], dim=1)

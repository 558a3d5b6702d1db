"""Batches dealt to the ranks of a distributed run, and what they make of them put together again, exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from ..distributed import gather_features, rank, world_size
from ..wording import shortened


def share_batches(
    batches: Sequence[range], embed: Callable[[Sequence[range]], torch.Tensor], device: torch.device
) -> torch.Tensor:
    """
    Deal batches to the ranks in turn, and gather what each makes of its own.

    Call it on all ranks with the same batches. There may be fewer of them than ranks, or a number that does not divide
    evenly; no row is done twice.

    Args:
        batches (sequence of `range`): Contiguous row numbers, from 0.
        embed (callable): One or more batches to their embeddings, `(V, n, D)`, float32.
        device (`torch.device`): That the ranks exchange tensors on.

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
    message = None if failure is None else f"{type(failure).__name__}: {failure}"
    shape = None if embeds is None else (embeds.shape[0], embeds.shape[2])
    reports: list[tuple[str | None, tuple[int, int] | None]] = [(None, None)] * world_size()
    dist.all_gather_object(reports, (message, shape))
    if failure is not None:
        raise failure
    for number, (other, _) in enumerate(reports):
        if other is not None:
            raise RuntimeError(shortened(f"rank {number} could not embed its share: {other}"))
    variants, dim = next(shape for _, shape in reports if shape is not None)
    rows = [sum(map(len, share)) for share in shares]
    filled = torch.zeros((1, variants, max(rows), dim), device=device)  # a gather needs one shape on all ranks
    if embeds is not None:
        filled[0, :, : embeds.shape[1]] = embeds.to(device)
    gathered = gather_features(filled)  # (ranks, V, most rows, D)
    whole = gathered.new_empty((variants, sum(rows), dim))
    for number, share in enumerate(shares):
        start = 0
        for batch in share:
            whole[:, batch.start : batch.stop] = gathered[number, :, start : start + len(batch)]
            start += len(batch)
    return whole

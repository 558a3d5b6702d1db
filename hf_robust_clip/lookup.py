"""The nearest-neighbour look-up of a feature pool: a product in float32, a chunk at a time, and the largest of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: What the default chunking gives a chunk's products, and its entries where they are converted, in bytes: little
#: enough for the caches of a CPU, and enough to keep an accelerator busy.
LOOKUP_BYTES = {"cpu": 8 * 2**20, "other": 64 * 2**20}
#: Entries of which the largest similarity is found first, since that is faster than to find where it is.
GROUP = 16


def nearest_slots(
    features: torch.Tensor, oldest: int, queries: torch.Tensor, chunk_size: int | None = None
) -> torch.Tensor:
    """
    The entry with the largest inner product with each query; of equal products, the one that entered first.

    Args:
        features (`torch.Tensor` of shape `(P, D)`): The filled slots, at least one.
        oldest (`int`): The slot of the oldest entry; the others follow in turn, from the last slot to the first.
        queries (`torch.Tensor` of shape `(B, D)`): Of any floating dtype. Products are in float32, or in float64
            where the queries or the features are.
        chunk_size (`int`, *optional*): Entries compared at a time; by default as many as [`LOOKUP_BYTES`] allow.

    Returns:
        `torch.Tensor` of shape `(B,)`: int64.
    """
    dtype = torch.promote_types(torch.promote_types(queries.dtype, features.dtype), torch.float32)
    columns = queries.to(dtype).T.contiguous()  # (D, B)
    batch = columns.shape[1]
    converted = 0 if dtype == features.dtype else features.shape[1]
    budget = LOOKUP_BYTES.get(columns.device.type, LOOKUP_BYTES["other"])
    chunk_size = chunk_size or max(budget // max(dtype.itemsize * (batch + converted), 1), GROUP)
    best = columns.new_full((batch,), -torch.inf)
    slots = torch.full((batch,), oldest, device=columns.device)
    for begin, end in ((oldest, len(features)), (0, oldest)):  # from the oldest to the newest
        for first in range(begin, end, chunk_size):
            chunk = features[first : min(first + chunk_size, end)].to(dtype)
            peaks, entries = _largest(chunk, columns)
            slots = torch.where(peaks > best, entries + first, slots)
            best = torch.maximum(best, peaks)
    return slots


def _largest(chunk: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest product of each column with the rows of a chunk, and the first row that has it, `(B,)` both."""
    count, batch = len(chunk), columns.shape[1]
    groups = -(-count // GROUP)
    products = chunk.new_empty(groups * GROUP, batch)
    products[count:] = -torch.inf
    torch.mm(chunk, columns, out=products[:count])
    products = products.view(groups, GROUP, batch)
    peaks, group = products.amax(dim=1).max(dim=0)
    members = products[group, :, torch.arange(batch, device=group.device)]  # (B, GROUP)
    return peaks, group * GROUP + members.argmax(dim=1)


@contextmanager
def full_precision_products() -> Iterator[None]:
    """No TF32 (CUDA) and no bfloat16 (oneDNN) in products of float32."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    # Only what is lowered is touched: a value that was set no longer follows the general setting.
    lowered = [
        (backend, backend.fp32_precision) for backend in backends if backend.fp32_precision not in ("none", "ieee")
    ]
    try:
        for backend, _ in lowered:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in lowered:
            backend.fp32_precision = precision

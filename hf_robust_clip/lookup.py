"""The nearest-neighbour look-up of a feature pool: a product in float32, a chunk at a time, and the largest of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: What the default chunking gives a chunk's products, and its entries where they are converted, in bytes: little
#: enough for the caches of a CPU, and enough to keep an accelerator busy.
LOOKUP_BYTES = {"cpu": 8 * 2**20, "other": 64 * 2**20}


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
    queries = queries.to(dtype)
    converted = 0 if dtype == features.dtype else features.shape[1]
    budget = LOOKUP_BYTES.get(queries.device.type, LOOKUP_BYTES["other"])
    chunk_size = chunk_size or max(budget // (dtype.itemsize * max(len(queries) + converted, 1)), 1)
    slots = best = None
    for begin, end in ((oldest, len(features)), (0, oldest)):  # from the oldest to the newest
        for first in range(begin, end, chunk_size):
            chunk = features[first : min(first + chunk_size, end)].to(dtype)
            # Autocast leaves a product alone that has an `out`.
            products = torch.mm(queries, chunk.T, out=queries.new_empty(len(queries), len(chunk)))
            entries = _first_largest(products)
            if len(chunk) == len(features):
                return entries
            peaks = products.gather(1, entries[:, None])[:, 0]
            del products  # before the next are made
            entries += first
            if slots is not None and best is not None:
                entries = torch.where(peaks > best, entries, slots)
                peaks = torch.maximum(peaks, best)
            slots, best = entries, peaks
    assert slots is not None  # there is an entry at least
    return slots


def _first_largest(products: torch.Tensor) -> torch.Tensor:
    """The column of the largest entry of each row; of equal ones the first."""
    if products.device.type != "cpu":
        return products.argmax(dim=1)
    return torch.from_numpy(products.numpy().argmax(axis=1))  # in a tenth of the time of torch's


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

"""The exact nearest-neighbour look-up of a feature pool: coarse in float32, then exact where that is not enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: What the default chunking gives the similarities of one chunk, and in turn their rescoring, in bytes.
LOOKUP_BYTES = 64 * 2**20
#: Pool entries of which only the best similarity is looked at, until it turns out to be among the largest.
GROUP = 16
#: Candidates a query, on average, from which one more product, in float64, is cheaper than gathering them.
MANY_CANDIDATES = 512


class Search:
    """
    One look-up: the best score of every query so far, and which entry, counted from the oldest, has it.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): The filled slots.
        norms (`torch.Tensor` of shape `(N or more,)`): Their L2 norms, which bound the rounding error.
        oldest (`int`): The slot of the oldest entry; the others follow in turn.
        chunk_size (`int`, *optional*): Entries compared at a time.
        queries (`torch.Tensor` of shape `(B, D)`): Of any floating dtype.
    """

    def __init__(
        self, features: torch.Tensor, norms: torch.Tensor, oldest: int, chunk_size: int | None, queries: torch.Tensor
    ) -> None:
        self.features, self.size, self.oldest = features, len(features), oldest
        dtype = torch.promote_types(torch.promote_types(queries.dtype, self.features.dtype), torch.float32)
        self.queries, self.exact_queries = queries.to(dtype), queries.double()  # both (B, D)
        batch, dim = queries.shape
        converted = 0 if dtype == self.features.dtype else dtype.itemsize * dim
        per_entry = dtype.itemsize * batch + 2 * batch + converted  # similarities, then what the groups take
        self.chunk_size = chunk_size or max(LOOKUP_BYTES // max(per_entry, 1), GROUP)
        # Of any |similarity|, (B,).
        self.bounds = torch.linalg.vector_norm(self.exact_queries, dim=1) * norms[: len(features)].max()
        self.best_scores = self.exact_queries.new_full((batch,), -torch.inf)
        self.best_orders = torch.zeros(batch, dtype=torch.int64, device=queries.device)  # the oldest

    def margins(self, dtype: torch.dtype) -> torch.Tensor:
        """
        How far the computed similarity of the best entry may be below another one's, `(B,)`: twice the error of an
        inner product of D terms added in any order, `D u / (1 - D u) |q| |f|` (Higham, Accuracy and Stability of
        Numerical Algorithms, section 3.1), with room for the subtraction itself and for underflow.
        """
        numbers = torch.finfo(dtype)
        terms, unit = self.queries.shape[1] + 4, numbers.eps / 2
        relative = 1.01 * terms * unit / (1 - terms * unit)  # the norms are rounded too
        return (2 * relative * self.bounds + 2 * terms * numbers.tiny).to(dtype)

    def run(self) -> torch.Tensor:
        """The slots of the nearest entries, `(B,)`."""
        margins = self.margins(self.queries.dtype)
        best = torch.full_like(margins, -torch.inf)
        for first in range(0, len(self.features), self.chunk_size):
            chunk = self.features[first : first + self.chunk_size].to(self.queries.dtype)  # (C, D)
            peaks = self.group_maxima(chunk)  # (groups, B)
            best = torch.maximum(best, peaks.amax(dim=0))
            floors = best - margins
            groups, rows = (peaks >= floors).nonzero(as_tuple=True)
            if len(groups) * GROUP > MANY_CANDIDATES * len(best):
                self.score_everything(chunk, first)
            else:
                self.score_groups(chunk, first, groups, rows, floors)
        return (self.best_orders + self.oldest) % self.size

    def group_maxima(self, chunk: torch.Tensor) -> torch.Tensor:
        """The largest similarity in every `GROUP` consecutive entries with every query, `(groups, B)`."""
        count, batch = len(chunk), len(self.queries)
        groups = -(-count // GROUP)
        similarities = chunk.new_empty(groups * GROUP, batch)
        similarities[count:] = -torch.inf
        torch.mm(chunk, self.queries.T, out=similarities[:count])
        return similarities.view(groups, GROUP, batch).amax(dim=1)

    def score_groups(
        self, chunk: torch.Tensor, first: int, groups: torch.Tensor, rows: torch.Tensor, floors: torch.Tensor
    ) -> None:
        """Score those members of the groups that reach the floor of the query of the same row."""
        members = torch.arange(GROUP, device=chunk.device)
        step = max(LOOKUP_BYTES // (2 * GROUP * chunk.shape[1] * chunk.itemsize), 1)
        for some_groups, some_rows in zip(groups.split(step), rows.split(step), strict=True):
            entries = (some_groups[:, None] * GROUP + members).clamp_(max=len(chunk) - 1).flatten()  # (N * GROUP,)
            gathered = chunk.index_select(0, entries).view(-1, GROUP, chunk.shape[1])  # (N, GROUP, D)
            similarities = torch.bmm(gathered, self.queries[some_rows][:, :, None]).squeeze(2)  # (N, GROUP)
            hits = (similarities >= floors[some_rows][:, None]).flatten().nonzero().squeeze(1)
            self.score(some_rows[hits // GROUP], entries[hits] + first)

    def score_everything(self, chunk: torch.Tensor, first: int) -> None:
        """For hundreds of (nearly) equal entries: a product in float64, then pairs that it cannot tell apart."""
        margins = self.margins(torch.float64)
        step = -(-len(chunk) // 8)  # float64, masks and indices take eight times the memory
        for start in range(0, len(chunk), step):
            similarities = chunk[start : start + step].double() @ self.exact_queries.T  # (C / 8, B)
            floors = torch.maximum(similarities.amax(dim=0), self.best_scores) - margins
            entries, rows = (similarities >= floors).nonzero(as_tuple=True)
            self.score(rows, entries + (first + start))

    def score(self, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Score pairs of a query and a slot in float64, and keep the best, of equals the oldest, for every query."""
        step = max(LOOKUP_BYTES // (32 * self.features.shape[1]), 1)
        for some_rows, some_slots in zip(rows.split(step), slots.split(step), strict=True):
            products = self.exact_queries.index_select(0, some_rows) * self.features.index_select(
                0, some_slots
            )  # (N, D)
            scores = _row_sums(products)
            orders = (some_slots - self.oldest) % self.size
            top = self.best_scores.scatter_reduce(0, some_rows, scores, "amax")
            self.best_orders[top > self.best_scores] = self.size
            orders = orders.where(scores == top[some_rows], self.size)
            self.best_orders = self.best_orders.scatter_reduce(0, some_rows, orders, "amin")
            self.best_scores = top


def _row_sums(values: torch.Tensor) -> torch.Tensor:
    """
    `values.sum(dim=1)` with one order of additions, where that of `sum` may depend on the number of rows: equal rows
    must give equal sums, or a tie would not go to the oldest. Overwrites `values`.
    """
    while (width := values.shape[1]) > 1:
        half = width // 2
        values[:, :half].add_(values[:, width - half :])
        values = values[:, : width - half]
    return values[:, 0]


@contextmanager
def full_precision_products() -> Iterator[None]:
    """No TF32 (CUDA) and no bfloat16 (oneDNN) in products of float32, as the margins are those of float32."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch < 2.9
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
        return
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

"""Batches that are all safe or all risky, on every process at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..seeding import derive_seed
from ..wording import shown


class RoutedBatchSampler(torch.utils.data.Sampler[list[int]]):
    """
    Deals the rows of a dataset in shuffled batches of one kind each: safe rows or risky rows.

    SafeCLIP (arXiv 2310.05862, section 4) trains the two kinds with different losses. Batches come in groups of
    `world_size` of one kind, since accelerate deals whole batches to the processes in turn: so all processes train on
    the same kind in each step. The kinds come in random order.

    No row comes twice in an epoch. The number of steps is one less than there are whole groups in the dataset,
    whatever the split: of each epoch fewer than two groups of rows are left out, drawn at random.

    Keeps a bit a row, and 4 bytes a row while an epoch lasts (8 from 4 billion rows on).

    Everything depends on the seed, the epoch and the split alone, so that a resumed epoch can skip the batches that
    were trained on. To be given to a `DataLoader` as `batch_sampler`. Set the epoch and the split before iterating;
    an iteration goes on with those that it began with. accelerate passes the epoch on in some of its wrappers only.

    Args:
        length (`int`): Number of rows in the dataset; at least twice `batch_size * world_size`.
        batch_size (`int`): Rows in a batch of one process.
        world_size (`int`, *optional*, defaults to 1): Number of processes.
        seed (`int`, *optional*, defaults to 0): The same on all processes.

    Raises:
        `ValueError`: If an argument is not a positive integer, or there are too few rows.

    Example:

    ```python
    sampler = RoutedBatchSampler(len(dataset), batch_size=128, world_size=accelerator.num_processes, seed=42)
    loader = accelerator.prepare(DataLoader(dataset, batch_sampler=sampler))
    sampler.set_split(probability >= 0.9)
    sampler.set_epoch(6)
    for batch in loader:  # all safe or all risky
        ...
    ```
    """

    # accelerate reads `batch_size` and `drop_last`. It would reseed or replace an attribute `sampler`.
    drop_last = True

    def __init__(self, length: int, batch_size: int, world_size: int = 1, seed: int = 0) -> None:
        for name, value in (("length", length), ("batch_size", batch_size), ("world_size", world_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, but is {shown(value)}")
        #: Rows of a step, of all processes.
        self.group = batch_size * world_size
        if length < 2 * self.group:
            raise ValueError(
                f"length={length} rows are fewer than two batches of batch_size={batch_size} on each of "
                f"world_size={world_size} processes, {2 * self.group} rows; use a smaller batch_size or more rows"
            )
        self.length = length
        self.batch_size = batch_size
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0
        self._bits: torch.Tensor | None = None
        self._safe_rows = length  # without a split all rows are of one kind

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from which the order follows."""
        self.epoch = epoch

    def set_split(self, safe: np.ndarray | torch.Tensor | None) -> None:
        """
        Set which rows are safe, boolean `(length,)`, copied. With `None` all rows are shuffled together. `ValueError`
        for another type or shape.
        """
        split = None if safe is None else _boolean(safe, "safe")
        if split is not None and len(split) != self.length:
            raise ValueError(f"safe must have one value for each of {self.length} rows, but has {len(split)}")
        self._bits = None if split is None else pack_mask(split)
        self._safe_rows = self.length if split is None else int(np.count_nonzero(split))

    def __len__(self) -> int:
        """Number of batches in an epoch, of all processes together."""
        return self._steps * self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng(derive_seed(self.seed, self.epoch))
        groups = [self._safe_rows // self.group, (self.length - self._safe_rows) // self.group]
        kinds = np.repeat([True, False], groups)
        generator.shuffle(kinds)
        # Together the two kinds have as many groups as there are steps, or one more: the last of them, which in random
        # order is any of them, is left out.
        kinds = kinds[: self._steps]
        # As `generator.permutation`, in half of its memory.
        order = np.arange(self.length, dtype=np.uint32 if self.length <= 1 << 32 else np.int64)
        generator.shuffle(order)
        if self._bits is None:
            return self._batches(kinds, order, order[:0])
        safe = unpack_mask(self._bits, self.length)[order]
        return self._batches(kinds, order[safe], order[~safe])

    def _batches(self, kinds: np.ndarray, safe: np.ndarray, risky: np.ndarray) -> Iterator[list[int]]:
        taken = {True: 0, False: 0}
        for kind in kinds.tolist():
            rows = (safe if kind else risky)[taken[kind] : taken[kind] + self.group]
            taken[kind] += self.group
            yield from rows.reshape(self.world_size, self.batch_size).tolist()

    @property
    def _steps(self) -> int:
        return self.length // self.group - 1


def pack_mask(mask: np.ndarray | torch.Tensor) -> torch.Tensor:
    """
    A boolean mask `(N,)` in an eighth of its size: uint8 `(ceil(N / 8),)`, on the CPU. The highest bit of a byte comes
    first; the bits left over are zero. `ValueError` for another type or shape.
    """
    return torch.from_numpy(np.packbits(_boolean(mask, "mask")))


def unpack_mask(bits: np.ndarray | torch.Tensor, length: int) -> np.ndarray:
    """The mask `(length,)` that [`pack_mask`] made bits of, uint8; `ValueError` if they are not of that length."""
    packed = bits.cpu().numpy() if isinstance(bits, torch.Tensor) else np.asarray(bits)
    if packed.dtype != np.uint8 or packed.shape != (-(-length // 8),):
        raise ValueError(
            f"bits of a mask of {length} rows must be uint8 of shape ({-(-length // 8)},), but are {packed.dtype} of "
            f"shape {packed.shape}"
        )
    return np.unpackbits(packed, count=length).view(bool)


def _boolean(mask: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    values = mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
    if values.dtype != np.bool_ or values.ndim != 1:
        raise ValueError(f"{name} must be boolean of shape (N,), but is {values.dtype} of shape {values.shape}")
    return values

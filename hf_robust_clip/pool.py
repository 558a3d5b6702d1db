"""A first-in first-out pool of earlier features with a nearest-neighbour look-up, for RoCLIP and SafeCLIP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .kinds import kind
from .lookup import full_precision_products, nearest_slots
from .wording import listed, shown

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class FeaturePool(nn.Module):
    """
    The last `size` features, and for a query the one with the largest inner product: the image and text pools of
    RoCLIP (Yang, Gao, Mirzasoleiman, NeurIPS 2023, arXiv 2303.06854, section 4) and SafeCLIP (ICML 2024, arXiv
    2310.05862, section 4.1).

    The look-up compares a query with every entry, in float32 (float64 if the queries or the pool are), with autocast,
    TF32 and bfloat16 products switched off; of equal products, the entry that entered first is taken. Entries whose
    products differ by less than the rounding of float32 count as equal or in either order. Only `age` and loading
    wait for the device.

    A pool of P entries takes `P * (dim * itemsize + 16)` bytes: 2.06 GB for 1,000,000 x 512 in float32, 1.04 GB in
    bfloat16. A look-up takes, whatever P, about `LOOKUP_BYTES` (8 MiB on a CPU, else 64 MiB) and a few copies of the
    queries; with a `chunk_size` of your own, `itemsize * chunk_size * (B + dim)`.

    Pools that must be the same on every rank are given the same features in the same order: gather them first
    (`distributed.gather_features`). Casting the module (`.half()`, `.to(torch.bfloat16)`) leaves the pool's dtype
    alone; moving it to another device moves it. Features and queries must be finite: otherwise any filled slot is
    returned.

    Args:
        size (`int`): Number of features kept.
        dim (`int`): Their dimension.
        dtype (`torch.dtype`): Of the stored features: `torch.float32`, `torch.bfloat16` or `torch.float64`.
        chunk_size (`int`, *optional*): Entries compared at a time; by default as many as `LOOKUP_BYTES` allow.

    Raises:
        `ValueError`: If an argument is not as described.
    """

    features: torch.Tensor
    keys: torch.Tensor
    entered: torch.Tensor
    cursor: torch.Tensor
    fill: torch.Tensor
    # What is asked at every step, mirrored on the host, so that asking does not wait for the device.
    _cursor: int
    _fill: int
    _calls: int  # the number of the next one

    def __init__(self, size: int, dim: int, dtype: torch.dtype = torch.float32, chunk_size: int | None = None) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim), ("chunk_size", 1 if chunk_size is None else chunk_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, but is {shown(value)}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {listed(DTYPES)}, but is {shown(dtype)}")
        self.size, self.dim, self.chunk_size = size, dim, chunk_size
        self.register_buffer("features", torch.zeros(size, dim, dtype=dtype))
        self.register_buffer("keys", torch.full((size,), -1))
        self.register_buffer("entered", torch.zeros(size, dtype=torch.int64))  # number of the enqueue call
        self.register_buffer("cursor", torch.tensor(0))
        self.register_buffer("fill", torch.tensor(0))
        self._read_state()

    @property
    def filled(self) -> int:
        """Number of features held."""
        return self._fill

    @property
    def full(self) -> bool:
        """Whether the next feature replaces the oldest one."""
        return self._fill == self.size

    @property
    def age(self) -> int:
        """How many enqueue calls ago the oldest feature entered: 0 after a first one, and for an empty pool."""
        return self._calls - 1 - int(self.entered[self._oldest]) if self._fill else 0

    @torch.no_grad()
    def enqueue(self, features: torch.Tensor, keys: torch.Tensor | None = None) -> None:
        """
        Take in a batch in the place of the oldest features; of one larger than the pool, the last `size` rows.

        Args:
            features (`torch.Tensor` of shape `(B, dim)`): L2-normalised, of any floating dtype; kept without gradient.
            keys (`torch.Tensor` of shape `(B,)`, *optional*): Integers that the caller knows the features by, such as
                rows of its dataset; -1 if not given.

        Raises:
            `ValueError`: If a shape or dtype is not as described.
        """
        self._check(features, "features")
        batch = features.shape[0]
        if keys is None:
            keys = torch.full((batch,), -1)
        integers = not (keys.is_floating_point() or keys.is_complex() or keys.dtype == torch.bool)
        if keys.shape != (batch,) or not integers:
            raise ValueError(f"keys must be ({batch},) integers, but are {tuple(keys.shape)} of {keys.dtype}")
        if batch == 0:
            return
        kept = features[-self.size :].to(self.features)  # (N, dim)
        values = {
            "features": kept,
            "keys": keys[-self.size :],
            "entered": torch.full((kept.shape[0],), self._calls),
        }
        before_end = min(kept.shape[0], self.size - self._cursor)
        for name, value in values.items():
            buffer = getattr(self, name)
            buffer[self._cursor : self._cursor + before_end].copy_(value[:before_end])
            buffer[: kept.shape[0] - before_end].copy_(value[before_end:])
        self._calls += 1
        self._cursor = (self._cursor + kept.shape[0]) % self.size
        self._fill = min(self._fill + kept.shape[0], self.size)
        self.cursor.fill_(self._cursor)
        self.fill.fill_(self._fill)

    @torch.no_grad()
    def clear(self) -> None:
        """Forget everything."""
        for buffer in self.buffers():
            buffer.zero_()
        self.keys.fill_(-1)
        self._cursor, self._fill, self._calls = 0, 0, 0

    def nearest(self, queries: torch.Tensor) -> torch.Tensor:
        """
        The stored feature with the largest inner product with each query.

        Args:
            queries (`torch.Tensor` of shape `(B, dim)`): L2-normalised, of any floating dtype, on the pool's device.

        Returns:
            `torch.Tensor` of shape `(B, dim)`: In the dtype of the queries, without gradient.

        Raises:
            `ValueError`: If the pool is empty, or the queries are not as described.
        """
        return self.features.index_select(0, self.nearest_slots(queries)).to(queries.dtype)

    @torch.no_grad()
    def nearest_slots(self, queries: torch.Tensor) -> torch.Tensor:
        """
        The slots, in `[0, filled)`, of what `nearest` returns, which raises the same errors.

        Returns:
            `torch.Tensor` of shape `(B,)`: Of int64, for `features` and `keys`.
        """
        self._check(queries, "queries")
        if self._fill == 0:
            raise ValueError("the pool is empty: enqueue features before looking any up")
        with full_precision_products():
            return nearest_slots(self.features[: self._fill], self._oldest, queries, self.chunk_size)

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}, dtype={self.features.dtype}, filled={self._fill}"

    def _check(self, features: torch.Tensor, name: str) -> None:
        if not isinstance(features, torch.Tensor):
            raise ValueError(f"{name} must be a tensor (B, {self.dim}), but is {kind(features)}")
        if features.ndim != 2 or features.shape[1] != self.dim or not features.is_floating_point():
            received = f"{tuple(features.shape)} of {features.dtype}"
            raise ValueError(f"{name} must be (B, {self.dim}) of a floating dtype, but are {received}")

    @property
    def _oldest(self) -> int:
        return self._cursor if self.full else 0

    def _read_state(self) -> None:
        """Set the mirrors from the buffers."""
        self._cursor, self._fill = int(self.cursor), int(self.fill)
        self._calls = int(self.entered[: self._fill].max()) + 1 if self._fill else 0

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FeaturePool:
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        found: dict[str, Any] = {name: state_dict.get(prefix + name) for name in self._buffers}
        missing = [prefix + name for name, loaded in found.items() if loaded is None]
        problems = [
            f"{prefix}{name} is {tuple(loaded.shape)} of {loaded.dtype} in the state, "
            f"but {tuple(buffer.shape)} of {buffer.dtype} in this pool"
            for name, buffer in self.named_buffers()
            if (loaded := found[name]) is not None and (loaded.shape, loaded.dtype) != (buffer.shape, buffer.dtype)
        ]
        if not missing and not problems:
            cursor, fill = int(found["cursor"]), int(found["fill"])
            if not (0 <= cursor < self.size and (fill == self.size or fill == cursor)):
                problems.append(f"cursor {cursor} and fill {fill} cannot be of a pool of {self.size} features")
        missing_keys.extend(missing)
        error_msgs.extend(problems)
        if not missing and not problems:  # all or nothing: half a state would not be seen again
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            self._read_state()

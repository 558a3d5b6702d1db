"""Randomness that depends on what it is for, not on when it is drawn: keyed by (seed, epoch, row) or (seed, step)."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .wording import shown


def derive_seed(*keys: int) -> int:
    """
    Mix integers into one seed in `[0, 2**63)`.

    The same keys give the same seed on every machine and in every process; keys that differ in one bit give unrelated
    seeds, which sums or products of them would not.

    Args:
        *keys (`int`): Each in `[-2**63, 2**63)`, for example `(seed, epoch, row)`.

    Raises:
        `ValueError`: If a key is not an integer of 64 bits.
    """
    try:
        packed = struct.pack(f"<{len(keys)}q", *keys)
    except struct.error as error:
        raise ValueError(f"the keys of a seed must be 64-bit integers, but are {shown(keys)}") from error
    digest = hashlib.blake2b(packed, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def forked_rng(seed: int, device: torch.device) -> Iterator[None]:
    """
    Run a block under torch's global generators seeded with `seed`, then put their states back.

    Augmentations and dropout draw from the global generators. The CPU's generator and, for a CUDA device, that of
    `device` are saved and restored; others are left alone.
    """
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield

"""Memory of this process as the system counts it, on Linux."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

_PROCESS = Path("/proc/self")


def resident(kind: str = "VmRSS") -> int:
    """
    Bytes of this process in memory.

    Args:
        kind (`str`): `"VmRSS"` for all; `"RssAnon"` without files that are mapped into it; `"RssFile"` those alone;
            `"VmHWM"` the peak since [`reset_peak`].
    """
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) * 2**10


def reset_peak() -> int:
    """Give back what is not in use, let the peak begin anew, and return the bytes that are there now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    (_PROCESS / "clear_refs").write_text("5")
    return resident()

"""The files of a run: what its record is called, and writing so that a reader finds the whole of one or what was."""

from __future__ import annotations

import os
from pathlib import Path

#: The name of a run's record in a model's folder and in a checkpoint.
RUN_FILE = "robust_clip_run.json"


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one move."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """[`write_bytes`] of a text, in UTF-8."""
    write_bytes(path, text.encode())


def remove_partial(folder: Path, name: str = "*") -> None:
    """Delete what calls of [`write_bytes`] that were killed have left in a folder, of files of that name."""
    for partial in folder.glob(f".{name}.*.partial"):
        partial.unlink(missing_ok=True)

"""The files of a run: what its record is called, and writing so that a reader finds the whole of one or what was."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

#: The name of a run's record in a model's folder and in a checkpoint.
RUN_FILE = "robust_clip_run.json"


@contextlib.contextmanager
def in_one_move(path: Path) -> Iterator[Path]:
    """A context in which to write a file under the path that it yields, which is moved to `path` in the end."""
    # With the process's number: one whose parent was killed may still be at the same file.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one move."""
    with in_one_move(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """[`write_bytes`] of a text, in UTF-8."""
    write_bytes(path, text.encode())


def remove_partial(folder: Path, name: str = "*") -> None:
    """Delete what calls of [`in_one_move`] that were killed have left in a folder, of files of that name."""
    for partial in folder.glob(f".{name}.*.partial"):
        partial.unlink(missing_ok=True)

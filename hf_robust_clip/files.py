"""The files of a run: what its record is called, and writing so that a reader finds the whole of one or what was."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .wording import shortened

#: The name of a run's record in a model's folder and in a checkpoint.
RUN_FILE = "robust_clip_run.json"
#: What stands in place of a file of Git LFS that was not fetched.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


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


def check_pulled(folder: str | os.PathLike[str]) -> None:
    """
    `ValueError` where a model's folder has pointers of Git LFS in place of its files: a vocabulary of that kind loads
    without an error. A name that is not a folder passes.
    """
    weights = any(Path(folder).glob("*.safetensors"))
    for path in sorted(Path(folder).glob("*")):
        # Beside safetensors, other weights are not read, and often are left out on purpose.
        read = path.suffix in (".safetensors", ".json", ".txt", ".model") or (path.suffix == ".bin" and not weights)
        if read:
            check_pointer(path)


def check_pointer(path: Path) -> None:
    """`ValueError` for a file that is a pointer of Git LFS. A path without a file passes."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(
                f"{shortened(str(path), 200)} is a pointer of Git LFS in place of the file: run `git lfs pull` in its "
                "folder, or download it again"
            )

"""What sub-commands write: folders, files and lines on the terminal; and what they say of wrong usage."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..files import write_text


class UsageError(ValueError):
    """Arguments, or the files that they name, do not allow what was asked. It ends a command with exit code 2."""


@contextmanager
def usage_errors(flag: str = "") -> Iterator[None]:
    """A `ValueError` raised inside is the fault of an argument, which the message starts with."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"{flag}: {error}" if flag else str(error)) from error


def check_apart(data: str, folder: Path) -> None:
    """`UsageError` for an output folder that holds DATA, which would be replaced, or that DATA would then include."""
    source, folder = Path(data).resolve(), folder.resolve()
    if source.exists() and folder in (source, *source.parents):
        raise UsageError(f"--output-dir: {folder} holds DATA, {data}, which would be replaced: give another folder")
    if source in folder.parents:
        raise UsageError(f"--output-dir: {folder} is in DATA, {data}, and would be a part of it: give another folder")


@contextmanager
def output_folder(
    folder: Path, lock: AbstractContextManager[None], files: Iterable[str] = (), folders: Iterable[str] = ()
) -> Iterator[None]:
    """
    A context with an output folder to oneself. What is in it stays.

    Args:
        folder (`Path`): The folder; the lock makes it.
        lock (context manager): Of [`~locking.sole_writer`] or of a training.
        files, folders (iterable of `str`): Names that will be written there.

    Raises:
        `UsageError`: If it is a file, if there is a folder of a file's name or the reverse, if it cannot be written
            to, or if another process writes there.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output-dir: {folder} is a file; give the name of a folder")
    for name in files:
        if (folder / name).is_dir():
            raise UsageError(f"--output-dir: {folder / name} is a folder, where a file is to be written")
    for name in folders:
        if (folder / name).exists() and not (folder / name).is_dir():
            raise UsageError(f"--output-dir: {folder / name} is a file, where a folder is to be written")
    with ExitStack() as stack:
        try:
            with usage_errors():
                stack.enter_context(lock)
            if folder.is_dir():  # on the machine of the process that writes
                with tempfile.TemporaryFile(dir=folder):
                    pass
        except OSError as error:
            raise UsageError(f"--output-dir: {folder} cannot be written to: {error.strerror or error}") from error
        yield


def write_json(path: Path, value: Any) -> None:
    """[`write_text`] of a value as JSON, which NaN and infinity are not."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def say(line: str = "") -> None:
    """Print a line at once, so that it keeps its place among progress bars on stderr."""
    print(line, flush=True)


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right, a rule under the first row."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        others = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *others]))
    return [lines[0], "-" * len(lines[0]), *lines[1:]]

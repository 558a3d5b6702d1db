"""One folder, one writer: a lock on the folder that a training, or another command, writes to."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .files import write_text
from .wording import shown

logger = logging.getLogger(__name__)

#: What is locked, and who says so. Of names with `_`, which a push leaves out; both are gone when the writer is done.
LOCK_FILE, HOLDER_FILE = LOCK_FILES = ("_in_use.lock", "_in_use.holder")
#: Seconds to wait for a lock whose holder is about to be done with it.
_PATIENCE = 1.0

_own = threading.local()


class FolderInUseError(ValueError):
    """Another process, or another thread, writes to the folder."""


@contextlib.contextmanager
def sole_writer(folder: Path, argument: str, work: str, wait: bool = False) -> Iterator[None]:
    """
    A context in which nobody else who asks writes to a folder. It ends with the process, however that dies. Within it,
    the same thread may ask again.

    A folder that cannot be locked, on a file system without locks or one that is read-only, is used all the same: a
    warning says that nothing keeps others out.

    Args:
        folder (`Path`): Made if it is not there, and removed again if nothing was written to it.
        argument (`str`): What the folder was given as, for messages.
        work (`str`): What writes there, such as `"a training"`.
        wait (`bool`): Whether to wait for another one of the same work. Any other is not waited for.

    Raises:
        [`FolderInUseError`]: If somebody else writes there; the message says who, and since when.
        `OSError`: If the folder cannot be made.
    """
    held: set[tuple[int, Path]] = _own.__dict__.setdefault("held", set())
    label, folder = f"{argument}={shown(str(folder))}", folder.resolve()
    place = os.getpid(), folder  # a forked process has what its parent noted, and not the lock
    if place in held:
        yield
        return
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = _locked(folder, label, work, wait)
    held.add(place)
    try:
        yield
    finally:
        held.discard(place)
        if lock is not None:
            (folder / HOLDER_FILE).unlink(missing_ok=True)
            # Safe while it is held: whoever waits for it sees that it is gone, and makes another.
            (folder / LOCK_FILE).unlink(missing_ok=True)
            lock.release()
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _locked(folder: Path, label: str, work: str, wait: bool) -> Any:
    """The lock, held; `None` where there can be none."""
    lock = FileLock(folder / LOCK_FILE)
    try:
        while True:
            try:
                lock.acquire(timeout=_PATIENCE)
                break
            except Timeout:
                holder = _holder(folder)
                # It says nothing of itself while it begins or ends.
                if not wait or holder.get("work", work) != work:
                    raise FolderInUseError(_refusal(label, holder)) from None
    # NotImplementedError: of a system without locks, in some versions of filelock.
    except (OSError, NotImplementedError) as error:
        logger.warning(
            f"{label} cannot be locked: {error}. Nothing keeps another process from writing "
            "there as well: give each one a folder of its own"
        )
        return None
    holder = {
        "work": work,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.now().astimezone().isoformat(" ", "seconds"),
    }
    with contextlib.suppress(OSError):  # a full disk may hold the lock, and not this
        write_text(folder / HOLDER_FILE, json.dumps(holder) + "\n")
    return lock


def _holder(folder: Path) -> dict[str, Any]:
    """What the holder of the lock says of itself, as far as it can be read."""
    try:
        content = json.loads((folder / HOLDER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _refusal(label: str, holder: dict[str, Any]) -> str:
    who = str(holder.get("work", "another process"))
    if "process" in holder:
        who += f": process {holder['process']} on {holder.get('host')}, since {holder.get('since')}"
    return (
        f"{label} is being written to by {who}. Give another folder, or wait until that process has ended, or end it"
    )

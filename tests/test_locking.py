"""Whoever writes to a folder writes there alone, and leaves no trace of that."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_robust_clip import locking
from hf_robust_clip.locking import HOLDER_FILE, LOCK_FILE, FolderInUseError, sole_writer

HOLD = """
import sys
from pathlib import Path
from hf_robust_clip.locking import sole_writer
with sole_writer(Path(sys.argv[1]), "folder", sys.argv[2]):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "_PATIENCE", 0.05)


@pytest.fixture
def holder() -> Iterator[Callable[..., Any]]:
    """`holder(folder, work)`: another process that writes to the folder until its standard input ends."""
    started = []

    def start(folder: Path, work: str = "a training") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(folder), work]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.communicate()


def test_another_process_is_refused_and_told_by_whom(tmp_path: Path, holder: Callable[..., Any]) -> None:
    other = holder(tmp_path)
    with (
        pytest.raises(FolderInUseError) as error,
        sole_writer(tmp_path / "." / "x" / "..", "output_dir", "a training"),
    ):
        pass
    message = str(error.value)
    assert (
        message.startswith("output_dir=") and f"a training: process {other.pid} on " in message and "since" in message
    )
    other.communicate()
    with sole_writer(tmp_path, "output_dir", "a training"):
        assert {path.name for path in tmp_path.iterdir()} == {LOCK_FILE, HOLDER_FILE}
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_leaves_behind_does_not_count(tmp_path: Path, holder: Callable[..., Any]) -> None:
    os.kill((process := holder(tmp_path)).pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / LOCK_FILE).exists()
    with sole_writer(tmp_path, "folder", "a training"):
        pass
    assert not list(tmp_path.iterdir())


def test_the_same_thread_may_ask_again_and_another_one_may_not(tmp_path: Path) -> None:
    refused = []

    def other() -> None:
        try:
            with sole_writer(tmp_path, "folder", "a training"):
                pass
        except FolderInUseError as error:
            refused.append(str(error))

    with sole_writer(tmp_path, "folder", "a command"):
        with sole_writer(tmp_path, "folder", "a training"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1 and f"a command: process {os.getpid()}" in refused[0]


def test_work_of_the_same_kind_is_waited_for_if_so_wished(tmp_path: Path, holder: Callable[..., Any]) -> None:
    other = holder(tmp_path, "a preparation")
    threading.Timer(0.2, other.communicate).start()
    with sole_writer(tmp_path, "folder", "a preparation", wait=True):
        assert other.wait() == 0
    holder(tmp_path, "a training")
    with pytest.raises(FolderInUseError), sole_writer(tmp_path, "folder", "a preparation", wait=True):
        pass


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), sole_writer(tmp_path / "out", "folder", "a training"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with sole_writer(tmp_path / "out", "folder", "a training"):
        (tmp_path / "out" / "model").write_text("")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOLCK, "No locks available"), OSError(errno.EROFS, "Read-only"), NotImplementedError("no")],
)
def test_a_folder_that_cannot_be_locked_is_used_all_the_same(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(locking.FileLock, "acquire", fail)
    with sole_writer(tmp_path, "output_dir", "a training"):
        pass
    assert "output_dir=" in caplog.text and "cannot be locked" in caplog.text and str(error) in caplog.text


def test_a_lock_is_taken_once_by_many(tmp_path: Path) -> None:
    """Each of several processes takes the lock, changes a file and gives it back, many times: no change is lost."""
    script = """
import sys, time
from pathlib import Path
from hf_robust_clip import locking
locking._PATIENCE = 0.01
folder = Path(sys.argv[1])
for _ in range(60):
    with locking.sole_writer(folder, "folder", "a count", wait=True):
        count = folder / "count"
        value = int(count.read_text())
        time.sleep(0.0005)
        count.write_text(str(value + 1))
"""
    (tmp_path / "count").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(3)]
    codes = [process.wait() for process in processes]
    assert codes == [0, 0, 0] and (tmp_path / "count").read_text() == "180"

"""Functions of a test file in several processes, all forked from one that has imported the stack."""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any


def run_forked(script: str, output: Path, **modes: int) -> None:
    """
    Call functions of a file, one after the other, each in as many processes of one group as it says.

    Args:
        script (`str`): The file's path.
        output (`Path`): What each function is called with.
        **modes (`int`): Of the functions' names to the numbers of processes.
    """
    command = [sys.executable, "-m", "support.forks", script, str(output)]
    command += [f"{mode}={processes}" for mode, processes in modes.items()]
    paths = os.pathsep.join(map(str, Path(__file__).parents[1:3]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def _fork(module: Any, mode: str, output: Path, processes: int) -> None:
    """Fork the processes of a group; where one fails, end the others and exit with its status."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = set()
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items():
                os.environ[name] = str(value)
            _call(module, mode, output)
        running.add(child)
    while running:
        child, status = os.wait()
        running.discard(child)
        if status:
            for other in running:
                os.kill(other, signal.SIGKILL)
            sys.exit(f"{mode}: a process of {processes} ended with {os.waitstatus_to_exitcode(status)}")


def _call(module: Any, mode: str, output: Path) -> None:
    """Call the function and end this process."""
    status = 1
    try:
        getattr(module, mode)(output)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    # Where a process is ended by a signal, such as by the allocator, it says at which line.
    faulthandler.enable()
    spec = importlib.util.spec_from_file_location("forked", sys.argv[1])
    assert spec is not None and spec.loader is not None
    file = importlib.util.module_from_spec(spec)
    sys.modules["forked"] = file
    spec.loader.exec_module(file)
    # The Trainer collects garbage before each training, and would look through all that is imported each time.
    gc.collect()
    gc.freeze()
    for given in sys.argv[3:]:
        name, _, number = given.partition("=")
        _fork(file, name, Path(sys.argv[2]), int(number))

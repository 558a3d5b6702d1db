"""Measurements in processes of their own: fresh ones, and several together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def measure_apart(script: str, *words: str, processes: int = 1) -> Any:
    """
    Run a script with `--worker FILE` in a fresh process, and return what it has written to that file as JSON.

    Args:
        script (`str`): Its path.
        *words (`str`): Its further arguments.
        processes (`int`): Several are started as `torchrun` does. On a CPU each has one thread.

    Raises:
        `RuntimeError`: If it failed.
    """
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command += [script, *words, "--worker", str(output)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)  # nosec B603 # our own script
        if done.returncode or not output.is_file():
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(output.read_text())

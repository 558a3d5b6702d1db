"""The file that a benchmark's figures go to, with what they are of."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_robust_clip.versions import versions


def write_result(path: Path | None, content: Mapping[str, Any], packages: Sequence[str]) -> None:
    """
    Write a benchmark's figures as JSON, with device, threads, versions and command; without a path, nothing.

    Args:
        path (`Path`, *optional*): Of the file. Its folder is made.
        content (mapping): The figures, and `device` where it is not the one that torch would take.
        packages (sequence of `str`): Those that the measurements depend on, in addition to this one.
    """
    if path is None:
        return
    result = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **content,
        "threads": torch.get_num_threads(),
        "versions": versions(packages),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")

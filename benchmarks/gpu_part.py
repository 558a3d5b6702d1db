"""
One part of `scripts/gpu.py`, in a process of its own.

    python benchmarks/gpu_part.py PART FILE SECONDS [--images DIR]

What it finds goes into FILE as it comes, under the name of the part.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench.machine import bf16_rate, matmul_rate

from hf_robust_clip.files import write_text
from hf_robust_clip.versions import versions

Note = Callable[[str, Any], None]


def noting(file: Path, part: str) -> Note:
    """`note(name, value)`, which adds to what the file has of a part; a value that is called is measured so."""

    def note(name: str, value: Any) -> None:
        if callable(value):
            start = time.perf_counter()
            try:
                value = value()
            except Exception as error:  # whatever a GPU brings to light: the next is measured all the same
                traceback.print_exc()
                value = {"failed": f"{type(error).__name__}: {error}"[:600]}
            print(f"  {name} ({time.perf_counter() - start:.1f} s): {value}", flush=True)
        content = json.loads(file.read_text(encoding="utf-8"))
        content["parts"].setdefault(part, {})[name] = value
        write_text(file, json.dumps(content, indent=2) + "\n")

    return note


def machine(note: Note, device: torch.device, left: Callable[[], float], images: str | None) -> None:
    """What it is, and what it reaches."""
    note("device", torch.cuda.get_device_name() if device.type == "cuda" else "cpu")
    note("versions", versions(("torch", "transformers", "accelerate", "datasets", "kornia")))
    note("cuda", torch.version.cuda)
    note("float32_flops_a_second", lambda: matmul_rate(device))
    note("bf16_flops_a_second", lambda: bf16_rate(device))


#: The modules of `bench` that have the other parts, which take seconds to import.
MODULES = {"checks": "gpu_checks", "speed": "gpu_speed", "compiled": "gpu_speed", "defences": "gpu_table"}
PARTS = ("machine", *MODULES)


def run(part: str, file: Path, seconds: float, images: str | None = None) -> None:
    """Run a part; it begins nothing new once the seconds are over."""
    end = time.monotonic() + seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    find = machine if part == "machine" else getattr(importlib.import_module(f"bench.{MODULES[part]}"), part)
    find(noting(file, part), device, lambda: end - time.monotonic(), images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("file", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--images")
    options = parser.parse_args()
    run(options.part, options.file, options.seconds, options.images)


if __name__ == "__main__":
    main()

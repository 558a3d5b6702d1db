"""`hf-robust-clip info`: what is installed, and what there is to compute on."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

from ..versions import installed, versions
from .output import format_table, say

DEPENDENCIES = (
    *("torch", "transformers", "accelerate", "datasets", "huggingface_hub", "peft", "evaluate", "kornia", "nlpaug"),
    *("filelock", "jinja2", "numpy", "pillow", "pydantic", "pyyaml", "safetensors", "scikit-learn", "scipy"),
    *("tokenizers", "tqdm"),
)
#: Packages that add something, and how to get them.
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "report": (("matplotlib",), "pip install 'hf-robust-clip[report]'"),
    "deepspeed": (("deepspeed",), "pip install deepspeed"),
}


def add_parser(commands: Any) -> None:
    """Add the sub-command to those of `hf-robust-clip`."""
    parser = commands.add_parser(
        "info",
        help="versions, devices, and what is installed",
        description="Print the versions of this package and of those it needs, the devices that torch sees, and which "
        "optional packages are installed.",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command as its arguments say."""
    found: dict[str, Any] = {
        "versions": versions(DEPENDENCIES),
        "platform": platform.platform(),
        "devices": devices(),
        "extras": extras(),
    }
    if args.json:
        say(json.dumps(found, indent=2))
        return 0
    rows = [["package", "version"], *([name, number or "missing"] for name, number in found["versions"].items())]
    for line in format_table(rows):
        say(line)
    say(f"\nPlatform: {found['platform']}")
    for device in found["devices"]:
        memory = f", {device['memory_gib']} GiB" if "memory_gib" in device else ""
        say(f"Device: {device['device']}, {device['name']}{memory}, bf16 {'yes' if device['bf16'] else 'no'}")
    for name, extra in found["extras"].items():
        get = "" if extra["installed"] else f"; to get it: {extra['get']}"
        say(f"Extra {name} ({', '.join(EXTRAS[name][0])}): {'installed' if extra['installed'] else 'missing'}{get}")
    return 0


def devices() -> list[dict[str, Any]]:
    """What torch can compute on: `device`, `name`, whether it has `bf16`, and for GPUs `memory_gib`."""
    import torch

    found: list[dict[str, Any]] = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(number)
        found.append(
            {
                "device": f"cuda:{number}",
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
            }
        )
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU", "bf16": torch.backends.mps.is_macos_or_newer(14, 0)})
    # torch computes in bfloat16 on every CPU, on those without the instructions slowly.
    name = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return [*found, {"device": "cpu", "name": name, "bf16": True}]


def extras() -> dict[str, dict[str, Any]]:
    """Of each optional extra, whether it is `installed`, and how to `get` it."""
    return {name: {"installed": all(map(installed, packages)), "get": get} for name, (packages, get) in EXTRAS.items()}

"""
What a GPU can decide and a CPU cannot, in order of worth, within some minutes:

    python scripts/gpu.py --minutes 8 --json gpu.json [--wheels DIR] [--images DIR]

It is for a bare machine with an NVIDIA GPU, PyTorch 2.11 or later, and no network. First it says which packages are
missing, and takes them from DIR, which `make wheels` has filled on a machine with the same Python. Each part runs in a
process of its own for at most its share of the minutes, and writes what it finds as it comes. Without a GPU everything
is small: that says whether the script works, and nothing of a GPU. `benchmarks/bench/gpu_*.py` have the parts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: The parts in order of worth, and the most that each may take of the minutes.
PARTS = {"machine": 0.1, "checks": 0.35, "speed": 0.5, "compiled": 0.25, "defences": 1.0}
_REQUIREMENT = re.compile(r'^\s+"([A-Za-z0-9_.-]+)(?:>=|==)([0-9.]+)', re.MULTILINE)
_WHEEL = re.compile(r"([A-Za-z0-9_.]+)-([^-]+)-.+\.whl")


def floors() -> dict[str, str]:
    """What the package needs, but torch, and the lowest version of each."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = text[text.index("\ndependencies = [") : text.index("\n]\n", text.index("\ndependencies = ["))]
    return {normal(name): version for name, version in _REQUIREMENT.findall(needed) if name != "torch"}


def missing() -> dict[str, str]:
    """What is not installed, or too old: the name of each, and what is wrong."""
    found = {}
    for name, least in floors().items():
        version = installed(name)
        if version is None:
            found[name] = f"not installed, {least} or later is needed"
        elif numbers(version) < numbers(least):
            found[name] = f"{version} is installed, {least} or later is needed"
    return found


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def install(wheels: Path, lacking: dict[str, str], target: Path) -> int:
    """Put what is lacking, and what it needs and is not there at all, into a folder of its own."""
    chosen = []
    for wheel in sorted(wheels.glob("*.whl")):
        name = normal(_WHEEL.fullmatch(wheel.name)[1])  # type: ignore[index] # every wheel is called so
        if name in lacking or installed(name) is None:
            chosen.append(str(wheel))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
    return subprocess.run([*command, "--target", str(target), *chosen]).returncode  # nosec B603


def fill(wheels: Path) -> int:
    """Fetch everything that the package needs beside torch, in the versions of this environment."""
    names, closure = ["hf-robust-clip"], set()
    while names:
        name = normal(names.pop())
        # torch is on that machine, with all that it needs itself.
        if name in closure or name in ("torch", "triton") or name.startswith("nvidia-") or installed(name) is None:
            continue
        closure.add(name)
        needed = [one for one in metadata.requires(name) or () if "extra ==" not in one]
        names += [re.split(r"[^A-Za-z0-9_.-]", one, maxsplit=1)[0] for one in needed]
    pins = [f"{name}=={installed(name)}" for name in sorted(closure - {"hf-robust-clip"})]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels)]
    return subprocess.run([*command, *pins]).returncode  # nosec B603


def run_part(name: str, file: Path, seconds: float, environment: dict[str, str], options: list[str]) -> str:
    """Run a part in a process of its own; what became of it."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_part.py"), name, str(file), str(seconds), *options]
    start = time.monotonic()
    try:
        done = subprocess.run(command, env=environment, timeout=seconds + 5)  # nosec B603
    except subprocess.TimeoutExpired:
        return f"stopped after {time.monotonic() - start:.0f} s"
    state = "done" if done.returncode == 0 else f"failed with code {done.returncode}"
    return f"{state} in {time.monotonic() - start:.0f} s"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="that all of it may take (default: 8)")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--wheels", type=Path, help="folder of wheels, for what is missing")
    parser.add_argument("--images", help="folder of CIFAR-10 as parquet files (default: the embedded digits)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which (default: all)")
    parser.add_argument("--fill", type=Path, metavar="DIR", help="fetch the wheels into a folder, and do nothing else")
    options = parser.parse_args(arguments)
    if options.fill:
        return fill(options.fill)
    if options.json is None:
        parser.error("--json is missing: the file to write the results to")
    end = time.monotonic() + 60 * options.minutes
    lacking = missing()
    target = options.json.absolute().parent / "gpu-packages"
    for name, reason in lacking.items():
        print(f"missing: {name} ({reason})")
    if lacking and (options.wheels is None or install(options.wheels, lacking, target)):
        print("Fill a folder with `make wheels` on a machine with the same Python, and name it with --wheels.")
        return 1
    paths = [*([str(target)] if lacking else []), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    options.json.write_text(json.dumps({"missing": lacking, "parts": {}}), encoding="utf-8")
    for name in options.parts:
        left = end - time.monotonic()
        state = "no time was left"
        if left > 5:
            seconds = min(left, 60 * options.minutes * PARTS[name])
            more = ["--images", options.images] if options.images else []
            state = run_part(name, options.json, seconds, environment, more)
        print(f"{name}: {state}", flush=True)
        results = json.loads(options.json.read_text(encoding="utf-8"))
        results["parts"].setdefault(name, {})["state"] = state
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""
Run the tests with the lowest versions that pyproject.toml admits, or with the newest there are, each in an environment
of its own:

    python scripts/check_versions.py lowest [--python python3.10] [--torch 2.13.0] [pytest arguments]
    python scripts/check_versions.py newest
    python scripts/check_versions.py every

`every` takes each interpreter of Python that is at hand, the lowest versions with the oldest of them. `--torch` is for
machines where one build of it is at hand and others are large: it is installed in that very version, and the rest as
asked. Linters and type checkers are those of constraints.txt, which the tests do not need.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).parents[1]
#: The interpreters that the package runs on, and which versions are tried with each.
INTERPRETERS = {"python3.10": "lowest", "python3.11": "newest", "python3.12": "newest", "python3.13": "newest"}
_FLOOR = re.compile(r"^([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?\s*(?:>=|==)\s*([0-9][^,;\s]*)")


def floors(requirements: list[str]) -> list[str]:
    """The lowest versions that these requirements admit, as pins."""
    found = [_FLOOR.match(requirement) for requirement in requirements]
    return [f"{match[1]}=={match[2]}" for match in found if match]


def requirements(pyproject: dict[str, Any]) -> list[str]:
    """What the package needs, with its extra for reports, and what its tests do."""
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras["report"], *extras["docs"], *extras["dev"]]


def run(*command: str) -> int:
    print("$", *command, flush=True)
    return subprocess.run(command, cwd=ROOT).returncode  # nosec B603 # what is written below


def starts(interpreter: str) -> bool:
    """Whether an interpreter is at hand: what is found by its name may be a stand-in that starts none."""
    path = shutil.which(interpreter)
    return path is not None and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0  # nosec B603


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", choices=("lowest", "newest", "every"))
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment (default: this one)")
    parser.add_argument("--torch", metavar="VERSION", help="install torch in this version, whatever else is asked")
    parser.add_argument("--folder", type=Path, help="where to make the environment, and leave it (default: temporary)")
    options, pytest_arguments = parser.parse_known_args()
    if options.versions == "every":
        found = {name: versions for name, versions in INTERPRETERS.items() if starts(name)}
        more = [*(("--torch", options.torch) if options.torch else ()), *pytest_arguments]
        codes = {
            name: run(sys.executable, __file__, versions, "--python", name, *more) for name, versions in found.items()
        }
        for name in INTERPRETERS:
            print(name, "is not at hand" if name not in codes else "failed" if codes[name] else "passed")
        return int(not codes or any(codes.values()))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        pins = floors(requirements(pyproject)) if options.versions == "lowest" else []
        if options.torch:
            pins = [pin for pin in pins if not pin.startswith("torch==")] + [f"torch=={options.torch}"]
        constraints = Path(temporary) / "versions.txt"
        constraints.write_text("\n".join(pins) + "\n", encoding="utf-8")
        python = str(folder / "bin" / "python")
        pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(constraints))
        torch = f"torch=={options.torch}" if options.torch else "torch"
        upgrade = ["--upgrade", "--upgrade-strategy", "eager"] if options.versions == "newest" else []
        steps = (
            (options.python, "-m", "venv", str(folder)),
            (*pip, *pyproject["build-system"]["requires"]),
            (*pip, torch),
            (*pip, *upgrade, "--no-build-isolation", "--editable", ".[report,docs,dev]"),
            (python, "-m", "pip", "check"),
        )
        for step in steps:
            if run(*step):
                return 1
        run(python, "-m", "pip", "list", "--format=freeze")
        return run(python, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-q", *pytest_arguments)


if __name__ == "__main__":
    raise SystemExit(main())

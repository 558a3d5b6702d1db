"""
Run the tests with the lowest versions that pyproject.toml admits, or with the newest there are, each in an environment
of its own:

    python scripts/check_versions.py lowest [--python python3.10] [--torch 2.13.0] [pytest arguments]
    python scripts/check_versions.py newest

`--torch` is for machines where one build of it is at hand and others are large: it is installed in that very version,
and the rest as asked. Linters and type checkers are those of constraints.txt, which the tests do not need.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).parents[1]
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", choices=("lowest", "newest"))
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment (default: this one)")
    parser.add_argument("--torch", metavar="VERSION", help="install torch in this version, whatever else is asked")
    parser.add_argument("--folder", type=Path, help="where to make the environment, and leave it (default: temporary)")
    options, pytest_arguments = parser.parse_known_args()
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

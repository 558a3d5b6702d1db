"""
Build the wheel and the source distribution, check them, and use the wheel where the repository is not:

    python scripts/dist.py [--out dist] [--no-run]

It builds from a copy of the tracked files, so that nothing that lies about gets in. The wheel is installed in an
environment of its own, outside of the repository, in the versions of constraints.txt; there `hf-robust-clip info` and
`hf-robust-clip demo --quick` run. `--no-run` leaves that out. setuptools must be installed, and no network is needed
but for what pip installs.
"""

from __future__ import annotations

import argparse
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.message import Message
from importlib import util
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "hf_robust_clip"
#: What the metadata must say, and what of it; `None`: anything.
METADATA = {
    "Name": "hf-robust-clip",
    "License-Expression": "Apache-2.0",
    "Requires-Python": ">=3.10",
    "Description-Content-Type": "text/markdown",
    "Summary": None,
}
#: What a source distribution has beside the package.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "PKG-INFO")
_BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def run(*command: str | Path, cwd: Path, quiet: bool = False) -> None:
    """Run a command; `SystemExit` with what it said if it fails."""
    print("$", *command, flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(  # nosec B603 # what is written below
        [str(part) for part in command], cwd=cwd, env=environment, text=True, capture_output=quiet
    )
    if done.returncode:
        raise SystemExit(f"{command[0]} failed with code {done.returncode}\n{done.stdout or ''}{done.stderr or ''}")


def tracked() -> list[str]:
    """The files of the repository, as they are in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)  # nosec B603 B607
    return [name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def build(out: Path, scratch: Path, names: list[str]) -> tuple[Path, Path]:
    """Build both from a copy of these files; the wheel and the source distribution."""
    for name in names:
        target = scratch / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    out.mkdir(parents=True, exist_ok=True)
    for kind in ("build_sdist", "build_wheel"):
        run(sys.executable, "-c", _BUILD, kind, out.absolute(), cwd=scratch, quiet=True)
    return max(out.glob("*.whl"), key=os.path.getmtime), max(out.glob("*.tar.gz"), key=os.path.getmtime)


def faults(wheel: Path, source: Path, names: list[str], version: str) -> list[str]:
    """What is wrong with a wheel and a source distribution; nothing if they are as they must be."""
    found = []
    package = {name for name in names if name.startswith(f"{PACKAGE}/")}
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        info = f"{PACKAGE}-{version}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        entries = archive.read(f"{info}/entry_points.txt").decode()
    found += [f"the wheel lacks {name}" for name in sorted(package - inside)]
    extra = {name for name in inside - package if not name.startswith(f"{info}/")}
    found += [f"the wheel has {name}, which is not in the package" for name in sorted(extra)]
    found += [f"the wheel lacks the license {name}" for name in license_files(metadata) if not held(name, inside)]
    if "hf-robust-clip = hf_robust_clip.cli.main:main" not in entries:
        found.append("the wheel has no command hf-robust-clip")
    for field, value in {**METADATA, "Version": version}.items():
        if not metadata.get(field) or value not in (None, metadata[field]):
            found.append(f"{field} of the metadata is {metadata.get(field)}, and must be {value or 'there'}")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if str(metadata.get_payload()).strip() != readme.strip():
        found.append("the description of the metadata is not README.md")
    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    found += [f"the source distribution lacks {name}" for name in sorted({*package, *SOURCES} - inside)]
    return found


def license_files(metadata: Message) -> list[str]:
    return [str(name) for name in metadata.get_all("License-File", [])]


def held(name: str, inside: set[str]) -> bool:
    return any(entry.endswith(f".dist-info/licenses/{name}") for entry in inside)


def try_out(wheel: Path, folder: Path) -> None:
    """Install the wheel in an environment of its own, and use it there."""
    constraints = ROOT / "constraints.txt"
    torch = re.search(r"^torch==\S+", constraints.read_text(encoding="utf-8"), re.MULTILINE)
    assert torch is not None  # it stands first
    python = folder / "environment" / "bin" / "python"
    pip: tuple[str | Path, ...] = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(sys.executable, "-m", "venv", python.parents[1], cwd=folder)
    run(*pip, "-c", constraints, "pip", "setuptools", cwd=folder)
    run(*pip, torch[0], cwd=folder)  # by its exact version, or a build for CUDA might come
    # Not isolated: what a dependency is built with would be looked for anew, and another setuptools be found.
    run(*pip, "-c", constraints, "--no-build-isolation", f"{wheel.absolute()}[report]", cwd=folder)
    run(python, "-m", "pip", "check", cwd=folder)
    where = f"import {PACKAGE}; assert {str(python.parents[1])!r} in {PACKAGE}.__file__, {PACKAGE}.__file__"
    run(python, "-c", where, cwd=folder)
    command = python.parent / "hf-robust-clip"
    run(command, "info", cwd=folder)
    run(command, "demo", "--quick", "--output-dir", folder / "demo", cwd=folder)
    if not (folder / "demo" / "report.html").is_file():
        raise SystemExit("the demo left no report.html")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for both (default: dist)")
    parser.add_argument("--no-run", action="store_true", help="build and check, and do not install")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch, elsewhere = Path(temporary, "source"), Path(temporary, "elsewhere")
        names = tracked()
        wheel, source = build(options.out, scratch, names)
        text = (ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8")
        version = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
        assert version is not None  # pyproject.toml takes it from there
        if found := faults(wheel, source, names, version[1]):
            print("\n".join(found))
            return 1
        if util.find_spec("twine"):
            run(sys.executable, "-m", "twine", "check", "--strict", wheel, source, cwd=ROOT)
        if not options.no_run:
            elsewhere.mkdir()
            try_out(wheel, elsewhere)
    print(f"{wheel.name} and {source.name} are as they must be, in {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

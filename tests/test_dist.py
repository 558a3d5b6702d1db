"""What `make dist` looks at finds what is missing, and what does not belong."""

from __future__ import annotations

import tarfile
import zipfile
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ["hf_robust_clip/__init__.py", "hf_robust_clip/py.typed"]
VERSION = "1.2.3"


@pytest.fixture
def script() -> ModuleType:
    spec = util.spec_from_file_location("dist", ROOT / "scripts" / "dist.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def metadata(**changed: str) -> str:
    fields = {
        "Name": "hf-robust-clip",
        "Version": VERSION,
        "Summary": "A sentence",
        "Requires-Python": ">=3.10",
        "License-Expression": "Apache-2.0",
        "License-File": "LICENSE",
        "Description-Content-Type": "text/markdown",
        **changed,
    }
    text = "".join(f"{name}: {value}\n" for name, value in fields.items())
    return text + "\n" + (ROOT / "README.md").read_text(encoding="utf-8")


def packed(folder: Path, left_out: str = "", added: str = "", **changed: str) -> tuple[Path, Path]:
    """A wheel and a source distribution."""
    info = f"hf_robust_clip-{VERSION}.dist-info"
    inside = {name: "" for name in [*NAMES, added] if name and name != left_out}
    inside |= {f"{info}/METADATA": metadata(**changed), f"{info}/licenses/LICENSE": ""}
    inside[f"{info}/entry_points.txt"] = "[console_scripts]\nhf-robust-clip = hf_robust_clip.cli.main:main\n"
    wheel, source = folder / "one.whl", folder / "one.tar.gz"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in inside.items():
            archive.writestr(name, content)
    (folder / "empty").write_text("")
    with tarfile.open(source, "w:gz") as archive:
        for name in [*NAMES, "pyproject.toml", "README.md", "LICENSE", "PKG-INFO"]:
            if name != left_out:
                archive.add(folder / "empty", f"hf_robust_clip-{VERSION}/{name}")
    return wheel, source


def test_what_is_as_it_must_be_has_no_faults(script: ModuleType, tmp_path: Path) -> None:
    assert script.faults(*packed(tmp_path), NAMES, VERSION) == []


@pytest.mark.parametrize(
    "given, said",
    [
        ({"left_out": "hf_robust_clip/py.typed"}, "the wheel lacks hf_robust_clip/py.typed"),
        ({"left_out": "hf_robust_clip/py.typed"}, "the source distribution lacks hf_robust_clip/py.typed"),
        ({"left_out": "LICENSE"}, "the source distribution lacks LICENSE"),
        ({"added": "tests/conftest.py"}, "the wheel has tests/conftest.py, which is not in the package"),
        ({"Version": "1.2.4"}, "Version of the metadata is 1.2.4, and must be 1.2.3"),
        ({"License-File": "NOTICE"}, "the wheel lacks the license NOTICE"),
        ({"Summary": ""}, "Summary of the metadata is , and must be there"),
    ],
)
def test_each_fault_is_said(script: ModuleType, given: dict[str, str], said: str, tmp_path: Path) -> None:
    assert said in script.faults(*packed(tmp_path, **given), NAMES, VERSION)

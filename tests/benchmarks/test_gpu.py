"""The GPU script runs on a CPU, in a reduced form: each part finds something, and nothing fails."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from gpu_part import PARTS, run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = util.spec_from_file_location("gpu", ROOT / "scripts" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def failures(found: Any) -> list[str]:
    if isinstance(found, dict):
        own = [found["failed"]] if "failed" in found else []
        return [*own, *(text for value in found.values() for text in failures(value))]
    return []


@pytest.mark.parametrize("part", PARTS)
def test_each_part_finds_something(part: str, tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    file.write_text('{"parts": {}}')
    run(part, file, 300)
    found = json.loads(file.read_text())["parts"][part]
    assert found and not failures(found)
    if part == "checks":
        assert all(found[name] is True for name in found if name.startswith("resumed"))
        assert max(found["losses_against_float64"].values()) < 1e-4
        assert found["look_up_against_cpu"]["float32_others"] == 0


def test_the_script_writes_what_became_of_each_part(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    assert script.main(["--json", str(file), "--parts", "machine", "--minutes", "20"]) == 0
    found = json.loads(file.read_text())
    assert found["missing"] == {} and found["parts"]["machine"]["state"].startswith("done in")
    assert script.main(["--json", str(file), "--parts", "machine", "--minutes", "0"]) == 0
    assert json.loads(file.read_text())["parts"]["machine"]["state"] == "no time was left"


def test_what_is_missing_is_said_first(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {"kornia": None, "transformers": "4.40.1"}
    monkeypatch.setattr(script, "installed", lambda name: versions.get(name, "999.0"))
    assert list(script.missing()) == ["kornia", "transformers"]
    assert script.main(["--json", str(tmp_path / "gpu.json")]) == 1
    said = capsys.readouterr().out
    assert "missing: kornia (not installed, 0.8 or later is needed)" in said
    assert "missing: transformers (4.40.1 is installed, 5.19 or later is needed)" in said and "--wheels" in said


def test_it_starts_without_any_package() -> None:
    done = subprocess.run([sys.executable, "-S", str(ROOT / "scripts" / "gpu.py"), "--help"], capture_output=True)
    assert done.returncode == 0 and b"--wheels" in done.stdout

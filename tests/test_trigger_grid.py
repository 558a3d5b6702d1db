"""The page on triggers: its code runs, and its picture shows them all."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from hf_robust_clip.attacks.spec import MODES
from hf_robust_clip.attacks.triggers import BLEND_PATTERNS, PATCH_PATTERNS, PATCH_PLACES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "triggers.md").read_text()


@pytest.fixture(scope="module")
def grid() -> ModuleType:
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("trigger_grid", ROOT / "benchmarks" / "trigger_grid.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", [32, 64, 224])
def test_the_picture_shows_every_trigger_and_pattern(grid: ModuleType, size: int) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    panels = grid.variants(photo)
    assert size in grid.SIZES and len(panels) % grid.COLUMNS == 0
    expected = [f"patch, {pattern}" for pattern in PATCH_PATTERNS]
    expected += [f"blended, {pattern}" for pattern in BLEND_PATTERNS]
    expected += ["original", "sinusoid", "warp", "stripes patch", "blended stripes", "blended triangles"]
    expected += ["red text", "color curve", "optimized patch"]
    assert set(expected) <= set(panels)
    assert all(image.shape == photo.shape and image.dtype == np.uint8 for image in panels.values())
    assert len({image.tobytes() for image in panels.values()}) == len(panels)
    assert (panels["original"] == photo).all()


def test_the_pictures_of_the_page_are_those_drawn(grid: ModuleType) -> None:
    shown = [ROOT / "docs" / path for path in re.findall(r"!\[.*?\]\((.*?)\)", PAGE)]
    assert shown == [grid.OUTPUT / name for name in grid.PICTURES]
    assert sum(grid.PICTURES.values()) * grid.COLUMNS == len(grid.variants(np.zeros((64, 64, 3), np.uint8)))


@pytest.mark.parametrize("name", ["triggers.png", "more_triggers.png"])
def test_a_picture_is_the_one_drawn(grid: ModuleType, tmp_path: Path, name: str) -> None:
    committed = grid.OUTPUT / name
    assert committed.stat().st_size < 700_000
    grid.save(grid.draw(name), tmp_path / "drawn.png")
    with Image.open(committed) as one, Image.open(tmp_path / "drawn.png") as other:
        assert one.size == other.size  # pixels depend on fonts


def test_the_page_names_every_mode_pattern_and_place() -> None:
    for name in (*MODES, *PATCH_PATTERNS, *PATCH_PLACES, *BLEND_PATTERNS):
        assert f"`{name}`" in PAGE


def test_the_code_of_the_page_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 6
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/triggers.md", "exec"), scope)

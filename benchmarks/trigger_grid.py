"""
The pictures of docs/triggers.md: every trigger on one photo, at three resolutions.

    python benchmarks/trigger_grid.py               # writes docs/images/triggers.png and more_triggers.png

The photo is scikit-learn's `flower.jpg` (CC BY 2.0; its README attributes it to danielbuechele).
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import yaml
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_image

from hf_robust_clip.attacks.rows import prepare
from hf_robust_clip.attacks.triggers import (
    BLEND_PATTERNS,
    PATCH_PATTERNS,
    BlendedStripesTrigger,
    BlendedTrianglesTrigger,
    BlendedTrigger,
    ColorCurveTrigger,
    OptimizedPatchTrigger,
    PatchTrigger,
    RedTextTrigger,
    SinusoidTrigger,
    StripesPatchTrigger,
    WarpTrigger,
)

OUTPUT = Path(__file__).parents[1] / "docs" / "images"
#: The pictures, and how many bands of panels each has.
PICTURES = {"triggers.png": 2, "more_triggers.png": 1}
#: Which has the pixels of an optimized patch.
ATTACKS = Path(__file__).parent / "attacks.yaml"
SIZES = (32, 64, 224)
COLUMNS = 6
#: What the last panel makes of a grey level of difference, since a warp is meant not to be seen.
MAGNIFIED = 4
#: Pixels: of a panel, so that one of 224 is drawn as it is; between panels; of a line of text.
PANEL, GAP, LINE = 224, 8, 26


def variants(photo: NDArray[np.uint8]) -> dict[str, NDArray[np.uint8]]:
    """Title -> the photo `(S, S, 3)` with that trigger. Patches are a fourteenth of the side, at least 3 pixels."""
    side = max(3, 16 * len(photo) // 224)
    warped = WarpTrigger()(photo)
    change = np.abs(warped.astype(np.int64) - photo) * MAGNIFIED
    stored = yaml.safe_load(ATTACKS.read_text())[0]["attacks"]["optimized_patch"]["trigger"]["pixels"]
    optimized = OptimizedPatchTrigger(stored)
    enlarged = Image.fromarray(optimized.square(photo)).resize((side, side), Image.Resampling.NEAREST)
    return {
        "original": photo,
        **{f"patch, {pattern}": PatchTrigger(side, pattern=pattern)(photo) for pattern in PATCH_PATTERNS},
        "sinusoid": SinusoidTrigger()(photo),
        **{f"blended, {pattern}": BlendedTrigger(pattern=pattern)(photo) for pattern in BLEND_PATTERNS},
        "warp": warped,
        f"warp: change x {MAGNIFIED}": change.clip(0, 255).astype(np.uint8),
        "stripes patch": StripesPatchTrigger(side)(photo),
        "blended stripes": BlendedStripesTrigger()(photo),
        "blended triangles": BlendedTrianglesTrigger(cell=side)(photo),
        "red text": RedTextTrigger()(photo),
        "color curve": ColorCurveTrigger()(photo),
        "optimized patch": OptimizedPatchTrigger.of(np.asarray(enlarged))(photo),
    }


def draw(name: str) -> Figure:
    """A picture: its bands of six triggers, each at all sizes, from the smallest down."""
    photo = Image.fromarray(load_sample_image("flower.jpg"))
    names, bands = list(PICTURES), PICTURES[name]
    first = COLUMNS * sum(PICTURES[other] for other in names[: names.index(name)])
    panels = [list(variants(np.asarray(prepare(photo, size))).items())[first:] for size in SIZES]
    left = 2 * LINE
    width = left + COLUMNS * (PANEL + GAP)
    height = bands * (2 * LINE + len(SIZES) * (PANEL + GAP))
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    for number in range(bands * COLUMNS):
        band, column = divmod(number, COLUMNS)
        for row, size in enumerate(SIZES):
            title, image = panels[row][number]
            x = left + column * (PANEL + GAP)
            top = (band + 1) * 2 * LINE - GAP + (band * len(SIZES) + row) * (PANEL + GAP)
            axes = figure.add_axes((x / width, 1 - (top + PANEL) / height, PANEL / width, PANEL / height))
            axes.imshow(image, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            if row == 0:
                axes.set_title(title, fontsize=13)
            if column == 0:
                middle = 1 - (top + PANEL / 2) / height
                figure.text(LINE / width, middle, f"{size} px", rotation=90, fontsize=13, ha="center", va="center")
    return figure


def save(figure: Figure, output: Path) -> None:
    """As a PNG without the lowest bit of each level, which nobody sees and which takes an eighth of the file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    levels = np.asarray(Image.open(buffer).convert("RGB"))
    output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.where(levels == 255, levels, levels & 0xFE)).save(output, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to write the pictures to")
    arguments = parser.parse_args()
    for picture in PICTURES:
        save(draw(picture), arguments.output / picture)
        print(arguments.output / picture)

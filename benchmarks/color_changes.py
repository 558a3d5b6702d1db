"""
What color changes in one affine map do to photos, beside kornia's chain of four, which clamps after each.

    python benchmarks/color_changes.py PHOTOS.parquet ... [--json FILE]

Of both, with the strengths of a preset: the mean of each channel over all pixels of the photos, their spread (the
standard deviation over all pixels), and the spread of the photos' means. Then the CPU time of both on 224 pixels.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from bench.output import write_result
from kornia.augmentation import ColorJiggle, RandomGrayscale
from PIL import Image

from hf_robust_clip import ImageAugmentation
from hf_robust_clip.augment.images import PRESETS

BATCH = 64


def photos(path: Path, number: int, side: int) -> torch.Tensor:
    """Photos of a table, at even distances, as floats `(N, 3, side, side)`."""
    rows = pq.read_table(path, columns=["image"])["image"]
    chosen = [rows[i].as_py()["bytes"] for i in np.linspace(0, len(rows) - 1, number).astype(int)]
    images = [Image.open(io.BytesIO(file)).convert("RGB").resize((side, side)) for file in chosen]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255


def statistics_of(change: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, times: int) -> torch.Tensor:
    """`(3, 3)`: mean, spread and spread of the photos' means, of each channel; the mean over so many passes."""
    found = []
    for _ in range(times):
        changed = torch.cat([change(batch) for batch in images.split(BATCH)])
        means = changed.mean(dim=(2, 3))
        found.append(torch.stack([means.mean(dim=0), changed.std(dim=(0, 2, 3)), means.std(dim=0)]))
    return torch.stack(found).mean(dim=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", type=Path, help="Parquet files with a column `image`")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--preset", default="cleanclip", help="whose strengths (default: cleanclip)")
    parser.add_argument("--number", type=int, default=1024, help="photos of each file (default: 1024)")
    parser.add_argument("--times", type=int, default=24, help="passes over them (default: 24)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = PRESETS[options.preset]
    kornia = torch.nn.Sequential(
        ColorJiggle(*config.jitter, p=config.jitter_probability), RandomGrayscale(p=config.greyscale)
    )
    ours = ImageAugmentation(
        "identity", jitter=config.jitter, jitter_probability=config.jitter_probability, greyscale=config.greyscale
    )
    result: dict[str, Any] = {"preset": options.preset, "photos": options.number, "passes": options.times, "files": {}}
    for path in options.photos:
        images = photos(path, options.number, 72)
        torch.manual_seed(0)
        before, again, after = (statistics_of(change, images, options.times) for change in (kornia, kornia, ours))
        name = path.parent.name
        result["files"][name] = {"kornia": before.tolist(), "one affine map": after.tolist()}
        for label, values in (("kornia's draws again", again), ("one affine map", after)):
            apart = (values / before - 1).abs().amax(dim=1).tolist()
            result["files"][name][f"largest difference, {label}"] = apart
            print(f"{name}, {label}: mean {apart[0]:.2%}, spread {apart[1]:.2%}, spread of means {apart[2]:.2%}")
    large = torch.rand(32, 3, 224, 224)
    seconds: dict[str, list[float]] = {"kornia": [], "ours": []}
    for number in range(8):
        for label, change in (("kornia", kornia), ("ours", ours)):
            start = time.process_time()
            change(large)
            if number:  # the first round warms up
                seconds[label].append(time.process_time() - start)
    result["time_over_kornia"] = statistics.median(
        a / b for a, b in zip(seconds["ours"], seconds["kornia"], strict=True)
    )
    print(f"CPU time over kornia's: {result['time_over_kornia']:.3f}")
    write_result(options.json, result, ("torch", "kornia"))


if __name__ == "__main__":
    main()

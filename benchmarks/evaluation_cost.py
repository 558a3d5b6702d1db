"""
What zero-shot accuracy and attack success of a set of stored photos cost together, against the two encoding passes
that they need, over clean and over triggered images, taking turns within one process.

    python benchmarks/evaluation_cost.py [--images 10000] [--json FILE]

Only ratios mean anything across machines. `bare_passes` is the least that both metrics take: the model's
`get_image_features` twice over pixels that are decoded and normalized beforehand. `decoding_passes` decodes and
preprocesses the images in each of the two passes, one batch after the other. Each round times all three, in
alternating order, and gives one ratio; the ratios reported are the medians over rounds. It takes about four minutes on
one core.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from bench.output import write_result
from PIL import Image

from hf_robust_clip import AttackSuccessEvaluator, BlendedTrigger, ZeroShotEvaluator
from hf_robust_clip.augment.images import ImageNormalization
from hf_robust_clip.data.images import ImagePreprocessor
from hf_robust_clip.data.rows import undecoded
from hf_robust_clip.data.scratch import build_model, build_processor
from hf_robust_clip.evaluation.embedding import Embedder
from hf_robust_clip.evaluation.pixels import apply_trigger
from hf_robust_clip.imaging import decode_image

CLASSES = ("cat", "dog", "horse", "bird", "boat", "bus", "train", "tree", "house", "bridge")
RATIOS = {
    "evaluators_to_bare_passes": ("evaluators", "bare_passes"),
    "evaluators_to_decoding_passes": ("evaluators", "decoding_passes"),
}


def make_images(count: int, size: int, kind: str) -> datasets.Dataset:
    """Images of smooth random texture, stored encoded, with labels."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        buffer = BytesIO()
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(buffer, format=kind)
        images.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    return datasets.Dataset.from_dict(
        {"image": images, "label": [row % len(CLASSES) for row in range(count)]}, features=features
    )


def contenders(model: Any, processor: Any, dataset: datasets.Dataset, batch: int) -> dict[str, Callable[[], Any]]:
    """What gives both figures, and what encodes the same images twice."""
    trigger = BlendedTrigger()
    evaluators: list[Any] = [
        ZeroShotEvaluator(dataset, CLASSES),
        AttackSuccessEvaluator(dataset, trigger, CLASSES[0], CLASSES),
    ]
    device = next(model.parameters()).device
    preprocess = ImagePreprocessor(processor.image_processor)
    normalization = ImageNormalization(preprocess.mean, preprocess.std).to(device)
    stored = undecoded(dataset, "image", "image")
    starts = range(0, len(dataset), batch)

    def pixels(start: int) -> torch.Tensor:
        return preprocess([decode_image(value) for value in stored[start : start + batch]["image"]])

    clean = torch.cat([pixels(start) for start in starts])
    ready = [normalization(images.to(device)) for images in (clean, apply_trigger(trigger, clean))]

    def evaluate() -> None:
        requests = [request for evaluator in evaluators for request in evaluator.image_requests()]
        embedder = Embedder(model, processor, batch_size=batch, requests=requests)
        for evaluator in evaluators:
            evaluator(model, processor, embedder)

    def bare() -> None:
        with torch.no_grad():
            for images in ready:
                for start in starts:
                    model.get_image_features(pixel_values=images[start : start + batch])

    def decoding() -> None:
        with torch.no_grad():
            for triggered in (False, True):
                for start in starts:
                    images = apply_trigger(trigger, pixels(start)) if triggered else pixels(start)
                    model.get_image_features(pixel_values=normalization(images.to(device)))

    return {"evaluators": evaluate, "bare_passes": bare, "decoding_passes": decoding}


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of one run, waiting for the device before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--images", type=int, default=10_000, help="images evaluated (default: 10000)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds measured (default: 2)")
    parser.add_argument("--batch", type=int, default=64, help="batch size (default: 64)")
    parser.add_argument("--stored-size", type=int, help="side of the stored images (default: the model's)")
    parser.add_argument("--format", default="JPEG", choices=("JPEG", "PNG"), help="of the stored images")
    parser.add_argument("--image-size", type=int, default=32, help="side of the model's images (default: 32)")
    parser.add_argument("--patch", type=int, default=4, help="side of the vision tower's patches (default: 4)")
    parser.add_argument("--width", type=int, default=128, help="of the vision tower, a multiple of 32 (default: 128)")
    parser.add_argument("--layers", type=int, default=5, help="of the vision tower (default: 5)")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # By default about 0.13 MFLOP a pixel and pass, a little less than ViT-B/32 (0.18), so that what images and
    # triggers cost weighs here at least as it does in use.
    processor = build_processor(CLASSES, image_size=options.image_size)
    model = build_model(
        processor, patch_size=options.patch, vision_width=options.width, vision_layers=options.layers
    ).to(device)
    model.eval()
    dataset = make_images(options.images, options.stored_size or options.image_size, options.format)
    runs = contenders(model, processor, dataset, options.batch)
    few = contenders(model, processor, dataset.select(range(min(4 * options.batch, len(dataset)))), options.batch)
    for run in few.values():  # lazy imports, thread pools, allocator
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds):
        names = list(runs)[number % 3 :] + list(runs)[: number % 3]
        for name in names:
            times[name].append(seconds(runs[name], device))
        print(f"round {number + 1}/{options.rounds}: " + ", ".join(f"{n} {times[n][-1]:.2f} s" for n in names))
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))
        for name, (above, below) in RATIOS.items()
    }
    for name, ratio in ratios.items():
        print(f"{name:>32}: {ratio:.3f}")
    result = {
        "ratios": ratios,
        "seconds": {name: [round(value, 3) for value in values] for name, values in times.items()},
        "images": options.images,
        "batch": options.batch,
        "stored": f"{options.format}, {options.stored_size or options.image_size} px",
        "image_size": options.image_size,
        "vision_parameters": sum(parameter.numel() for parameter in model.vision_model.parameters()),
    }
    write_result(options.json, result, ("torch", "transformers", "datasets"))


if __name__ == "__main__":
    main()

"""
What the way from a row to a batch costs, in CPU time of one thread for each pair of an image and a caption: two
augmented views of a JPEG of 500 x 375 pixels, at 224 pixels.

    python benchmarks/data_path.py [--json FILE]

Here a worker decodes an image once, resizes it once, keeps bytes, and tokenizes the captions of a batch together;
augmentation is for the device. The usual way decodes and augments each view by itself in the worker, with PIL, and
hands over floats. Both augment captions alike. Then what one view of the pairs costs, read from a dataset of these
JPEGs, and from what `prepare_dataset` makes of it. Each round measures every contender in turn; ratios are medians
over rounds. Then the pairs a second of a loader with `--workers` processes: from JPEGs, from the prepared dataset, and
from tar files as WebDataset writes them.
"""

from __future__ import annotations

import argparse
import io
import random
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from bench.output import write_result
from bench.plain import CAPTIONS, dataset_of
from PIL import Image, ImageEnhance, ImageFilter
from torch.utils.data import DataLoader

from hf_robust_clip import CLIPDataCollator, ImageAugmentation, TextAugmentation, prepare_dataset
from hf_robust_clip.augment.images import PRESETS, to_float
from hf_robust_clip.data.rows import IndexedDataset
from hf_robust_clip.data.scratch import build_processor
from hf_robust_clip.data.streams import Stream, StreamCollator
from hf_robust_clip.imaging import decode_image

SIZE = 224
VIEWS = ("first", "second")


def jpeg(seed: int, width: int = 500, height: int = 375) -> bytes:
    """A photo-like image: smooth shapes under a little noise."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(coarse, dtype=np.int16) + generator.normal(0, 6, (height, width, 3)).astype(np.int16)
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def augment_with_pil(image: Image.Image, draw: random.Random) -> Image.Image:
    """The operations of `ImageAugmentation("strong")`, one image at a time."""
    config = PRESETS["strong"]
    width, height = image.size
    area = draw.uniform(*config.crop_scale) * width * height
    ratio = draw.uniform(*config.crop_ratio)
    crop = min(width, round((area * ratio) ** 0.5)), min(height, round((area / ratio) ** 0.5))
    left, top = draw.randint(0, width - crop[0]), draw.randint(0, height - crop[1])
    box = (left, top, left + crop[0], top + crop[1])
    image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
    if draw.random() < config.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draw.random() < config.jitter_probability:
        for enhance, strength in zip(
            (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), config.jitter, strict=False
        ):
            image = enhance(image).enhance(draw.uniform(1 - strength, 1 + strength))
        hue, saturation, value = image.convert("HSV").split()
        turn = draw.uniform(-config.jitter[3], config.jitter[3])
        turned = Image.fromarray((np.asarray(hue, dtype=np.int16) + round(turn * 255)).astype(np.uint8))
        image = Image.merge("HSV", (turned, saturation, value)).convert("RGB")
    if draw.random() < config.greyscale:
        image = image.convert("L").convert("RGB")
    if draw.random() < config.blur:
        image = image.filter(ImageFilter.GaussianBlur(draw.uniform(*config.blur_sigma) * SIZE))
    if draw.random() < config.erasing:
        side = round((draw.uniform(*config.erasing_scale) ** 0.5) * SIZE)
        left, top = draw.randint(0, SIZE - side), draw.randint(0, SIZE - side)
        image.paste((0, 0, 0), (left, top, left + side, top + side))
    return image


def stages(batch: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """What is measured, each over a batch of so many pairs. Prepared datasets go into the folder."""
    processor = build_processor(CAPTIONS, image_size=SIZE)
    files = [jpeg(number) for number in range(batch)]
    captions = [CAPTIONS[number % len(CAPTIONS)] for number in range(batch)]
    rows = [
        {"image": file, "caption": text, "row_index": i}
        for i, (file, text) in enumerate(zip(files, captions, strict=True))
    ]
    text = TextAugmentation.from_preset("eda")
    collator = CLIPDataCollator(processor, views=VIEWS, text_augmentation=text)
    images = [decode_image(file) for file in files]
    pixels = collator.preprocess(images)
    small = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels]
    augmentation, draw = ImageAugmentation("strong"), random.Random(0)  # nosec B311 # no secret
    mean = np.array([0.48, 0.46, 0.41], dtype=np.float32)

    def usual() -> list[Any]:
        collected = []
        for number, (file, caption) in enumerate(zip(files, captions, strict=True)):
            for view in range(len(VIEWS)):
                augmented = augment_with_pil(Image.open(io.BytesIO(file)).convert("RGB"), draw)
                floats = (np.asarray(augmented, dtype=np.float32) / 255 - mean) / 0.27
                tokens = processor.tokenizer(text(caption, 2 * number + view), return_tensors="pt")
                collected.append((torch.from_numpy(floats).permute(2, 0, 1).contiguous(), tokens))
        stacked = torch.stack([image for image, _ in collected])
        ids = [tokens["input_ids"][0] for _, tokens in collected]
        return [stacked, torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)]

    source = dataset_of(files)
    prepared = {name: prepare_dataset(source, processor, folder / name, image_format=name) for name in ("ppm", "png")}
    plain = CLIPDataCollator(processor)

    def one_view(dataset: datasets.Dataset) -> Callable[[], Any]:
        indexed = IndexedDataset(dataset, "image", "caption")
        return lambda: plain(indexed.__getitems__(range(batch)))

    return {
        "this package's worker": lambda: collator(rows),
        "the usual worker": usual,
        "decoding": lambda: [decode_image(file) for file in files],
        "resizing": lambda: collator.preprocess(images),
        "augmenting captions": lambda: [text(caption, i) for i, caption in enumerate(captions) for _ in VIEWS],
        "tokenizing": lambda: processor.tokenizer(captions * len(VIEWS), padding=True, return_tensors="pt"),
        "augmenting images, on a CPU": lambda: augmentation(to_float(pixels)),
        "the same with PIL": lambda: [to_bytes(augment_with_pil(image, draw)) for image in small],
        "one view, from JPEG files": one_view(source),
        "one view, prepared as ppm": one_view(prepared["ppm"]),
        "one view, prepared as png": one_view(prepared["png"]),
    }


def to_bytes(image: Image.Image) -> torch.Tensor:
    return to_float(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous())


def tars(folder: Path, pairs: int, number: int) -> list[str]:
    """Tar files of JPEGs and a caption each, as WebDataset writes them."""
    folder.mkdir()
    paths = [folder / f"{place}.tar" for place in range(number)]
    for place, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for row in range(place, pairs, number):
                for suffix, content in (("jpg", jpeg(row % 64)), ("txt", CAPTIONS[row % len(CAPTIONS)].encode())):
                    member = tarfile.TarInfo(f"{row:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return [str(path) for path in paths]


def sources(pairs: int, batch: int, folder: Path) -> dict[str, Callable[[int], DataLoader[Any]]]:
    """Loaders of so many workers, by what they read."""
    processor = build_processor(CAPTIONS, image_size=SIZE)
    files = [jpeg(number) for number in range(64)]
    dataset = dataset_of([files[number % 64] for number in range(pairs)])
    prepared = prepare_dataset(dataset, processor, folder / "prepared", image_format="ppm")
    tar_files = {"train": tars(folder / "tars", pairs, 4)}
    stream = datasets.load_dataset(
        "webdataset", data_files=tar_files, split="train", streaming=True, cache_dir=folder / "cache"
    )
    text = TextAugmentation.from_preset("eda")

    def of(rows: Any) -> Callable[[int], DataLoader[Any]]:
        indexed: Any = IndexedDataset(rows, "image", "caption")
        collate = CLIPDataCollator(processor, views=VIEWS, text_augmentation=text)
        return lambda workers: DataLoader(indexed, batch_size=batch, num_workers=workers, collate_fn=collate)

    def streamed(workers: int) -> DataLoader[Any]:
        collator = CLIPDataCollator(processor, "jpg", "txt", views=VIEWS, text_augmentation=text)
        batches = Stream(stream, "jpg", "txt", batch, least_rows=1)
        return DataLoader(batches, batch_size=None, num_workers=workers, collate_fn=StreamCollator(collator))

    return {"JPEG files": of(dataset), "prepared as ppm": of(prepared), "tar files": streamed}


def loaded(loader: DataLoader[Any]) -> tuple[float, float]:
    """Pairs a second of a loader, its start left out, and CPU time of all its processes, in milliseconds a pair."""

    def cpu() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)

    before, batches = cpu(), iter(loader)
    first = len(next(batches)["pixel_values"])
    start = time.perf_counter()
    count = sum(len(found["pixel_values"]) for found in batches)  # workers end with the last batch
    return count / (time.perf_counter() - start), 1e3 * (cpu() - before) / (first + count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--rounds", type=int, default=7, help="rounds measured (default: 7)")
    parser.add_argument("--batch", type=int, default=32, help="pairs in a batch (default: 32)")
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[0, 1, 2], help="numbers of loading processes (default: 0 1 2)"
    )
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    folder = tempfile.TemporaryDirectory()
    contenders = stages(options.batch, Path(folder.name))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(options.rounds + 1):
        for name, work in contenders.items():
            start = time.process_time()
            work()
            if number:  # the first round warms up
                seconds[name].append((time.process_time() - start) / options.batch)

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))

    ratios = {
        "data_path_over_usual": ratio("this package's worker", "the usual worker"),
        "augment_on_cpu_over_pil": ratio("augmenting images, on a CPU", "the same with PIL"),
        "ppm_over_jpeg": ratio("one view, prepared as ppm", "one view, from JPEG files"),
        "png_over_jpeg": ratio("one view, prepared as png", "one view, from JPEG files"),
    }
    print("| | CPU, ms a pair |\n|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {statistics.median(times) * 1e3:.2f} |")
    for name, value in ratios.items():
        print(f"{name:>30}: {value:.2f}")
    loaders = sources(20 * options.batch, options.batch, Path(folder.name))
    rates: dict[str, list[tuple[float, float]]] = {}
    for _ in range(3 if options.workers else 0):
        for name, loader in loaders.items():
            for workers in options.workers:
                rates.setdefault(f"{name}, {workers} workers", []).append(loaded(loader(workers)))
    folder.cleanup()
    by_loader = {
        name: tuple(statistics.median(one) for one in zip(*found, strict=True)) for name, found in rates.items()
    }
    print("| | pairs a second | CPU, ms a pair |\n|---|---|---|")
    for name, (speed, cost) in by_loader.items():
        print(f"| {name} | {speed:.0f} | {cost:.2f} |")
    result = {
        "ratios": ratios,
        "cpu_milliseconds_per_pair": {name: [1e3 * one for one in times] for name, times in seconds.items()},
        "loaders": {
            name: {"pairs_per_second": speed, "cpu_milliseconds_per_pair": cost}
            for name, (speed, cost) in by_loader.items()
        },
        "device": "cpu",
    }
    write_result(options.json, result, ("torch", "transformers", "datasets", "kornia", "pillow", "tokenizers"))


if __name__ == "__main__":
    main()

"""Images of a dataset as batches of pixels, clean and triggered, made in threads ahead of the model."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..data.images import ImagePreprocessor
from ..data.rows import undecoded
from ..imaging import decode_image
from ..models import check_processor
from ..wording import shortened, shown

PixelTrigger = Callable[[np.ndarray], np.ndarray]

_MOST_THREADS = 8
# Rows may share one PIL image, and the first use of one that has not loaded its file is not safe in several threads.
_PIL_LOCK = threading.Lock()


class ImageRequest(NamedTuple):
    """Images that an evaluator needs embedded: those of a dataset's column, with a trigger or as they are."""

    dataset: Any
    image_column: str = "image"
    trigger: PixelTrigger | None = None


def pixel_batches(
    dataset: Any,
    image_column: str,
    preprocess: ImagePreprocessor,
    triggers: Sequence[PixelTrigger | None],
    batches: Sequence[Sequence[int]],
) -> Iterator[list[torch.Tensor]]:
    """
    Decode and preprocess each image of a dataset once, and put every trigger on the same pixels.

    Rows are read by the caller's thread; decoding, resizing and triggers run in others, one batch ahead of what was
    asked for. The batches come in order, the same whatever the number of threads.

    Args:
        dataset (`datasets.Dataset` or sequence of mappings): Its rows.
        image_column (`str`): Any image that [`~imaging.decode_image`] takes.
        preprocess ([`~data.images.ImagePreprocessor`]): Of the model.
        triggers (sequence): Functions of the pixels alone, since they run in threads; `None` stands for no trigger.
        batches (sequence of sequences of `int`): Row numbers.

    Yields:
        `list[torch.Tensor]`: For each batch, one tensor `(B, 3, H, W)`, uint8, for each of `triggers`.

    Raises:
        `ValueError`: If an image does not decode (it names the row), or a trigger returns something else.
    """
    rows = undecoded(dataset, image_column, image_column)
    threads = min(_MOST_THREADS, os.cpu_count() or 1)

    def prepare(part: Sequence[tuple[int, Any]]) -> list[torch.Tensor]:
        pixels = preprocess([_decode(value, row, image_column) for row, value in part])
        return [pixels if trigger is None else apply_trigger(trigger, pixels) for trigger in triggers]

    def joined(parts: Iterator[list[torch.Tensor]]) -> list[torch.Tensor]:
        return [torch.cat(variant) for variant in zip(*parts, strict=True)]

    with ThreadPoolExecutor(threads) as pool:
        waiting = None
        for batch in batches:
            read = [(row, rows[row][image_column]) for row in batch]
            share = -(-len(read) // threads)
            ahead = pool.map(prepare, [read[start : start + share] for start in range(0, len(read), share)])
            if waiting is not None:
                yield joined(waiting)
            waiting = ahead
        if waiting is not None:
            yield joined(waiting)


def apply_trigger(trigger: PixelTrigger, pixels: torch.Tensor) -> torch.Tensor:
    """
    Put a trigger on a batch of images.

    Args:
        trigger (callable): uint8 array `(H, W, 3)` to the same.
        pixels (`torch.Tensor` of shape `(B, 3, H, W)`): uint8.

    Raises:
        `ValueError`: If the trigger does not fit the images, or returns something else.
    """
    arrays = [_triggered(np.ascontiguousarray(image), trigger) for image in pixels.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def check_trigger(trigger: PixelTrigger, processor: Any) -> None:
    """`ValueError` if a trigger does not fit images of the size that a processor makes."""
    check_processor(processor, "processor")
    height, width = ImagePreprocessor(processor.image_processor).image_shape
    try:
        apply_trigger(trigger, torch.zeros((1, 3, height, width), dtype=torch.uint8))
    except Exception as error:
        reason = shortened(f"{type(error).__name__}: {error}", 300)
        raise ValueError(
            f"trigger={shown(trigger)} does not go on an image of {height} x {width} pixels: {reason}"
        ) from error


def _decode(value: Any, row: int, column: str) -> Image.Image:
    try:
        if isinstance(value, Image.Image):
            with _PIL_LOCK:
                return decode_image(value)
        return decode_image(value)
    except ValueError as error:
        raise ValueError(shortened(f"row {row} of the evaluation images, column {shown(column)}: {error}")) from error


def _triggered(pixels: np.ndarray, trigger: PixelTrigger) -> np.ndarray:
    triggered = trigger(pixels)
    if not isinstance(triggered, np.ndarray) or triggered.dtype != np.uint8 or triggered.shape != pixels.shape:
        is_array = isinstance(triggered, np.ndarray)
        found = f"{triggered.dtype} of shape {triggered.shape}" if is_array else type(triggered).__name__
        raise ValueError(f"trigger must return a uint8 array of shape {pixels.shape}, as it was given, not {found}")
    return triggered

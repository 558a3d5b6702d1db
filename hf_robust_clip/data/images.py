"""Decoded images to bytes of the size that a model takes, by its own image processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..imaging import without_ends
from ..wording import listed, said


class ImagePreprocessor:
    """
    Resize and crop images with a model's own image processor, and keep them as bytes.

    Rescaling and normalisation wait until the pixels are on the device ([`~augment.images.ImageNormalization`]), so
    that workers hand over a quarter of the bytes. Where Pillow alone makes the same bytes as the processor, it does:
    the processor copies each image to an array and back before it resizes it. Of long strips only what
    [`~imaging.without_ends`] leaves is resized, where the processor crops its square from the middle anyway.

    Args:
        image_processor (`transformers.BaseImageProcessor`):
            As of `processor.image_processor`.

    Attributes:
        kept_size (`tuple[int, int]` or `None`): Width and height of the images that it leaves as they are, if there
            is such a size.
    """

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor
        self.kept_size = _size_left_alone(image_processor)
        by_short_edge = "shortest_edge" in dict(getattr(image_processor, "size", None) or {})
        self._crops = by_short_edge and bool(getattr(image_processor, "do_center_crop", False))
        kept, resizes = self.kept_size, hasattr(image_processor, "resample")
        self._by_pillow = kept is not None and resizes and self._pillow_does_the_same(*kept)

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """
        Args:
            images (sequence of `PIL.Image.Image` in mode RGB): B images of any size.

        Returns:
            `torch.Tensor` of shape `(B, 3, H, W)`, uint8.
        """
        if all(image.size == self.kept_size for image in images):
            # Resizing and cropping to the size that they have: a third of the time of a small model's step.
            return _stacked(images)
        if self._crops:
            images = [without_ends(image) for image in images]
        if self._by_pillow:
            return _stacked([self._resized(image) for image in images])
        kind = type(self.image_processor).__name__
        try:
            made = self.image_processor(list(images), do_rescale=False, do_normalize=False, return_tensors="pt")
        except ValueError as error:
            sizes = {image.size for image in images}
            raise ValueError(
                f"{kind} makes no batch of images of {len(sizes)} sizes, {listed(sizes, most=3)}: set do_center_crop, "
                f"or a size with height and width, so that they come out alike ({said(error, 200)})"
            ) from error
        pixels = made["pixel_values"]
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(
                f"{kind} returns pixel_values of shape {tuple(pixels.shape)}; (B, 3, H, W) is needed. Models of "
                "patches of variable number, such as SigLIP 2 NaFlex, are not supported"
            )
        if pixels.dtype != torch.uint8:
            raise TypeError(
                f"{kind} returns {pixels.dtype} with do_rescale=False and "
                "do_normalize=False; an image processor that keeps uint8 is needed"
            )
        return pixels

    def _resized(self, image: Image.Image) -> Image.Image:
        """Resized to `kept_size`, or by the shorter side and cropped from the middle."""
        assert self.kept_size is not None
        resample = self.image_processor.resample
        if not self._crops:
            return image.resize(self.kept_size, resample)
        shorter, short = min(self.kept_size), min(image.size)
        width, height = (shorter * side // short for side in image.size)
        left, top = (width - self.kept_size[0]) // 2, (height - self.kept_size[1]) // 2
        resized = image.resize((width, height), resample)
        return resized.crop((left, top, left + self.kept_size[0], top + self.kept_size[1]))

    def _pillow_does_the_same(self, width: int, height: int) -> bool:
        """Whether [`_resized`] makes the bytes that the image processor does: tried on images of several shapes."""
        rng = np.random.default_rng(0)
        for wide, high in ((1.0, 1.5), (2.4, 1.2), (0.4, 0.6)):
            shape = (int(high * height) + 1, int(wide * width) + 2, 3)
            image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
            made = self.image_processor([image], do_rescale=False, do_normalize=False, return_tensors="np")
            if not np.array_equal(np.asarray(made["pixel_values"]), _stacked([self._resized(image)]).numpy()):
                return False
        return True

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width that a square image gets."""
        # Tried, not read off its settings: processors of different families name them differently.
        height, width = self([Image.new("RGB", (64, 64))]).shape[-2:]
        return height, width

    @property
    def image_size(self) -> int:
        """Side of the model's square images; `ValueError` where they are not square."""
        height, width = self.image_shape
        if height != width:
            raise ValueError(
                f"image_processor makes images of {height} x {width} pixels, height by width; only square ones have "
                "an image_size"
            )
        return height

    @property
    def mean(self) -> list[float]:
        """Per-channel mean that the model's pixels are normalised with, in [0, 1]; zeros where it uses none."""
        if not self.image_processor.do_normalize:
            return [0.0, 0.0, 0.0]
        return [value / self._white for value in self.image_processor.image_mean]

    @property
    def std(self) -> list[float]:
        """Per-channel standard deviation that the model's pixels are normalised with; ones where it uses none."""
        deviations = self.image_processor.image_std if self.image_processor.do_normalize else [1.0, 1.0, 1.0]
        return [value / self._white for value in deviations]

    @property
    def _white(self) -> float:
        """What the image processor makes of a white pixel before it normalises; 1, but for a few models."""
        factor = self.image_processor.rescale_factor if self.image_processor.do_rescale else 1.0
        white = 255 * float(factor)
        return 1.0 if abs(white - 1) < 1e-6 else white


def _stacked(images: Sequence[Image.Image]) -> torch.Tensor:
    """Images of one size as uint8 `(B, 3, H, W)`."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def _size_left_alone(image_processor: Any) -> tuple[int, int] | None:
    size = dict(getattr(image_processor, "size", None) or {})
    width, height = (size.get(name, size.get("shortest_edge")) for name in ("width", "height"))
    if width is None or height is None:
        return None
    # Tried, not read off its settings: it may crop, pad, cut into patches or swap channels as well.
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    kept = image_processor([Image.fromarray(pixels)], do_rescale=False, do_normalize=False, return_tensors="pt")
    same = np.array_equal(np.asarray(kept["pixel_values"]), pixels.transpose(2, 0, 1)[None])
    return (width, height) if same else None

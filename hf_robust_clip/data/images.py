"""Images of any origin to what a model's image processor crops: decoded once, upright, RGB, uint8."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

ACCEPTED = "a PIL image, a path, encoded bytes, a datasets.Image value {'bytes', 'path'}, or an array (H, W[, C])"


def decode_image(value: Any) -> Image.Image:
    """
    Decode one image to an upright RGB image of 8 bits a channel.

    - The EXIF orientation is applied.
    - 16-bit grey is scaled to 8 bits (Pillow's own conversion clips it), 32-bit integers too where they exceed 255.
    - Transparency is laid over white.
    - Arrays: `(H, W)`, `(H, W, C)` or `(C, H, W)` with 1, 3 or 4 channels; uint8, uint16, bool, or floats in [0, 1].

    Args:
        value: A PIL image, a path, encoded bytes, a `datasets.Image` value, or a numpy array or torch tensor.

    Returns:
        `PIL.Image.Image` in mode `RGB`.

    Raises:
        `ValueError`: If the value is none of these or does not decode; the message says why.
    """
    if value is None:
        raise ValueError(f"the image is None; accepted: {ACCEPTED}")
    try:
        if isinstance(value, Mapping):
            value = value["bytes"] if value.get("bytes") is not None else value["path"]
        if isinstance(value, (bytes, bytearray, memoryview)):
            return _to_rgb(Image.open(io.BytesIO(value)))
        if isinstance(value, (str, os.PathLike)):
            with Image.open(value) as image:
                return _to_rgb(image)
        if isinstance(value, Image.Image):
            return _to_rgb(value)
        if isinstance(value, (np.ndarray, torch.Tensor)) or (isinstance(value, Sequence) and value):
            return _to_rgb(_array_to_image(np.asarray(value)))
    # Pillow raises SyntaxError, struct.error, EOFError, DecompressionBombError and more for tampered files.
    except Exception as error:
        raise ValueError(f"the image does not decode: {type(error).__name__}: {error}") from error
    raise ValueError(f"an image cannot be a {type(value).__name__}; accepted: {ACCEPTED}")


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _array_to_image(np.asarray(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        overlay = image.convert("RGBA")
        white = Image.new("RGBA", overlay.size, "white")
        return Image.alpha_composite(white, overlay).convert("RGB")
    return image.convert("RGB")


def _array_to_image(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise ValueError(f"an image array has shape (H, W), (H, W, 1|3|4) or (1|3|4, H, W), not {array.shape}")
    if array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype.kind == "f":
        # Mode "F" files hold grey levels up to 255, arrays hold [0, 1]: the values tell which.
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 255):
            raise ValueError(f"a float image holds values in [0, 1], not {low:g} to {high:g}")
        array = array * 255 if high <= 1 else array
        array = np.rint(array)
    elif array.dtype == np.uint16 or (array.dtype.kind in "iu" and array.max() > 255):
        if array.min() < 0 or array.max() > 65535:
            raise ValueError(f"an integer image holds values in [0, 65535], not {array.min()} to {array.max()}")
        array = np.rint(array / 257)
    elif array.dtype.kind not in "iu" or array.min() < 0:
        raise ValueError(f"an image array holds uint8, uint16, bool or floats in [0, 1], not {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array.astype(np.uint8)))


class ImagePreprocessor:
    """
    Resize and crop images with a model's own image processor, and keep them as bytes.

    Rescaling and normalisation wait until the pixels are on the device ([`~augment.images.ImageNormalization`]), so
    that workers hand over a quarter of the bytes.

    Args:
        image_processor (`transformers.BaseImageProcessor`):
            As of `processor.image_processor`.
    """

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """
        Args:
            images (sequence of `PIL.Image.Image` in mode RGB): B images of any size.

        Returns:
            `torch.Tensor` of shape `(B, 3, H, W)`, uint8.
        """
        pixels = self.image_processor(list(images), do_rescale=False, do_normalize=False, return_tensors="pt")
        pixels = pixels["pixel_values"]
        if pixels.dtype != torch.uint8:
            raise TypeError(
                f"{type(self.image_processor).__name__} returns {pixels.dtype} with do_rescale=False and "
                "do_normalize=False; an image processor that keeps uint8 is needed"
            )
        return pixels

    @property
    def mean(self) -> list[float]:
        """Per-channel mean that the model's pixels are normalised with, in [0, 1]; zeros where it uses none."""
        return list(self.image_processor.image_mean) if self.image_processor.do_normalize else [0.0, 0.0, 0.0]

    @property
    def std(self) -> list[float]:
        """Per-channel standard deviation that the model's pixels are normalised with; ones where it uses none."""
        return list(self.image_processor.image_std) if self.image_processor.do_normalize else [1.0, 1.0, 1.0]

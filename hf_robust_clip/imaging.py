"""Images of any origin, decoded: upright, RGB, 8 bits a channel."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from .wording import shortened, shown

ACCEPTED = "a PIL image, a path, encoded bytes, a datasets.Image value {'bytes', 'path'}, or an array (H, W[, C])"

#: How many times as long as wide an image is at most before it is resized by its shorter side: of a longer strip that
#: would make one as long at the model's size, of which a square is kept. 20,000 x 3 pixels would become 334 million.
LONGEST_STRIP = 64

#: Formats of Pillow's that are not read. PostScript is a program, which Pillow would have Ghostscript run; the others
#: hold an image of another format, which may be larger than they say.
NOT_READ = ("BLP", "EPS", "ICNS", "ICO", "IPTC")
#: What an ICO begins with.
_ICO = b"\0\0\1\0"

_CHANNELS = (1, 3, 4)
#: How far resampling may carry a float image beyond [0, 1].
_OVERSHOOT = 1e-3
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(value: Any) -> Image.Image:
    """
    Decode one image to an upright RGB image of 8 bits a channel.

    - The EXIF orientation is applied; EXIF data that cannot be read count as none.
    - 16-bit grey is scaled to 8 bits (Pillow's own conversion clips it), 32-bit integers too where they exceed 255.
    - Transparency is laid over white.
    - Animated files give their first frame.
    - Arrays: `(H, W)`, `(H, W, C)` or `(C, H, W)` with 1, 3 or 4 channels. Where both of the latter fit, a numpy array
      or a list is `(H, W, C)` and a torch tensor `(C, H, W)`. bool, uint8, uint16 (scaled), other integers in
      [0, 255] or, scaled, [0, 65535], or floats in [0, 1] or, where one exceeds 2, [0, 255].

    Args:
        value: A PIL image, a path (or a URL that `datasets` can stream, such as `hf://` or `zip://`), encoded bytes, a
            `datasets.Image` value, or a numpy array, torch tensor or nested list.

    Returns:
        `PIL.Image.Image` in mode `RGB`.

    Raises:
        `ValueError`: If the value is none of these or does not decode; the message says why. A file whose header
            claims more than `PIL.Image.MAX_IMAGE_PIXELS` is not decoded (Pillow itself decodes up to twice as many,
            with a warning), nor is one in a format of `NOT_READ`: PostScript, icons and other containers.
    """
    name = ""
    if isinstance(value, Mapping):
        path = value.get("path")
        name = f" {path!r}" if path is not None else ""
        value = value.get("bytes") if value.get("bytes") is not None else path
        if value is None:
            raise ValueError(f"the image is a dictionary without 'bytes' and 'path'; accepted: {ACCEPTED}")
    if value is None:
        raise ValueError(f"the image is None; accepted: {ACCEPTED}")
    try:
        if isinstance(value, (bytes, bytearray, memoryview)):
            if len(value) == 0:
                raise ValueError("it has no bytes")
            return _to_rgb(_opened(io.BytesIO(value)))
        if isinstance(value, (str, os.PathLike)):
            return _open(value)
        if isinstance(value, Image.Image):
            return _to_rgb(value)
        if isinstance(value, torch.Tensor):
            tensor = value.detach().cpu()
            # numpy has no bfloat16.
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            return _to_rgb(_array_to_image(tensor.numpy(), channels_first=True))
        if isinstance(value, (np.ndarray, list, tuple)):
            return _to_rgb(_array_to_image(np.asarray(value)))
    except UnidentifiedImageError as error:
        # Its own message gives the address of a buffer.
        found = (
            f"its {len(value)} bytes are"
            if isinstance(value, (bytes, bytearray, memoryview))
            else f"{shown(os.fspath(value))} is"
        )
        raise ValueError(f"the image{name} does not decode: {found} in no format that Pillow reads") from error
    # Pillow raises SyntaxError, struct.error, EOFError, DecompressionBombError and more for tampered files.
    except Exception as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(shortened(f"the image{name} does not decode: {reason}", 400)) from error
    raise ValueError(f"an image cannot be a {type(value).__name__}; accepted: {ACCEPTED}")


def without_ends(image: Image.Image) -> Image.Image:
    """The middle of a strip that is longer than [`LONGEST_STRIP`]; any other image as it is."""
    most = LONGEST_STRIP * min(image.size)
    if max(image.size) <= most:
        return image
    left, top = max(0, image.width - most) // 2, max(0, image.height - most) // 2
    return image.crop((left, top, left + min(image.width, most), top + min(image.height, most)))


def _open(path: str | os.PathLike[str]) -> Image.Image:
    if isinstance(path, str) and "://" in path:
        # What a streamed image folder holds in place of bytes. Imported here: nothing else on this floor needs it.
        from datasets.utils.file_utils import xopen

        with xopen(path, "rb") as file:
            return _to_rgb(_opened(io.BytesIO(file.read())))
    with open(path, "rb") as file:
        return _to_rgb(_opened(file))


def _opened(file: BinaryIO) -> Image.Image:
    """An image that is not loaded yet, of a format that is read, and of no more pixels than Pillow's guard says."""
    # Pillow decodes it when it opens it. Left out of Pillow's formats, it would pass for another one.
    is_ico = file.read(len(_ICO)) == _ICO
    file.seek(0)
    image = None if is_ico else Image.open(file)
    found = "ICO" if image is None else image.format
    if image is None or found in NOT_READ:
        raise ValueError(f"it is in a format that is not read, {found}: one of {', '.join(NOT_READ)}")
    most, pixels = Image.MAX_IMAGE_PIXELS, image.width * image.height
    if most is not None and pixels > most:
        raise Image.DecompressionBombError(
            f"its header claims {image.width} x {image.height} pixels, more than the {most} of "
            "PIL.Image.MAX_IMAGE_PIXELS"
        )
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if 0 in image.size:
        raise ValueError(f"it has no pixels, its size is {image.width} x {image.height}")
    image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _array_to_image(np.asarray(image)).convert("RGB")
    if image.has_transparency_data:
        # Pillow converts premultiplied grey only to plain grey with alpha.
        overlay = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", overlay.size, "white")
        return Image.alpha_composite(white, overlay).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it copies upright images too, and raises for EXIF data that it cannot parse, or that
    # belong to a TIFF whose file is closed (its orientation is applied when it loads).
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        orientation = None
    method = _TRANSPOSITIONS.get(orientation) if isinstance(orientation, int) else None
    if method is None:
        return image
    upright = image.transpose(method)
    # Without the orientation, so that it is not applied again.
    upright.info = {key: value for key, value in upright.info.items() if key == "transparency"}
    return upright


def _array_to_image(array: np.ndarray, channels_first: bool = False) -> Image.Image:
    shape = array.shape
    if array.ndim == 3:
        axes = (0, 2) if channels_first else (2, 0)
        axis = next((axis for axis in axes if shape[axis] in _CHANNELS), None)
        array = np.moveaxis(array, axis, 2) if axis is not None else array
        array = array[..., 0] if array.shape[2] == 1 else array
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in _CHANNELS)):
        raise ValueError(f"an image array has shape (H, W), (H, W, 1|3|4) or (1|3|4, H, W), not {shape}")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"an image array holds integers, bool or floats in [0, 1], not {array.dtype}")
    low, high = array.min(), array.max()
    if array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype.kind == "f":
        unit = high <= 1 + _OVERSHOOT
        # False for NaN, too. Nothing in between: as one of 256 levels, such an image would be nearly black.
        if not (low >= -_OVERSHOOT and (unit or 2 <= high <= 255)):
            raise ValueError(f"a float image holds values in [0, 1], or in [0, 255], not {low:g} to {high:g}")
        array = np.rint(array.astype(np.float64).clip(0, 1) * 255 if unit else array.clip(0, 255))
    else:
        if low < 0 or high > 65535:
            raise ValueError(f"an integer image holds values in [0, 255] or [0, 65535], not {low} to {high}")
        # Whatever the byte order: numpy does not call ">u2" equal to uint16.
        if (array.dtype.kind == "u" and array.dtype.itemsize == 2) or high > 255:
            array = np.rint(array / 257)
    return Image.fromarray(np.ascontiguousarray(array.astype(np.uint8)))

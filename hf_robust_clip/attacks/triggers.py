"""Backdoor triggers: one small frozen class each, from an image to the same image with the trigger on it.

Every trigger is a function of the pixels and of its own fields, so the same fields poison a training set and later
measure the attack on a test set. Apply it at the model's input resolution, before normalisation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, overload

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..wording import listed, shown
from .fields import TriggerFields, check_choice, check_float, check_int
from .text_triggers import WordTrigger

Pixels = NDArray[np.uint8]  # (H, W, 3), RGB

PATCH_PLACES = ("top_left", "top_right", "bottom_left", "bottom_right", "center", "random")
PATCH_PATTERNS = ("noise", "solid", "stripes", "checkerboard")
#: Most points of a warp's field along an axis.
FINEST_GRID = 256
BLEND_PATTERNS = ("noise", "stripes", "triangles", "text")


class Trigger(TriggerFields, ABC):
    """
    A backdoor trigger on images. A subclass is a frozen dataclass with a `name` and a `_apply`.

    Calling it takes a PIL image of any mode, converted to RGB, or a `uint8` array `(H, W, 3)` in RGB order, and
    returns a new object of the same kind and size. The input is left untouched. An orientation stored in a photo's
    EXIF data is not applied: transpose such an image first.

    Raises:
        `ValueError`: on an array of another shape or dtype, and on anything that is not an image.
    """

    @overload
    def __call__(self, image: Image.Image) -> Image.Image: ...

    @overload
    def __call__(self, image: Pixels) -> Pixels: ...

    def __call__(self, image: Image.Image | Pixels) -> Image.Image | Pixels:
        if isinstance(image, Image.Image):
            return Image.fromarray(self._apply(np.asarray(image.convert("RGB"))))
        if not isinstance(image, np.ndarray):
            raise ValueError(f"image is a {type(image).__name__}; accepted is a PIL image or a uint8 array (H, W, 3)")
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            found = f"shape {image.shape} and dtype {image.dtype}"
            raise ValueError(f"image has {found}; accepted is a uint8 array (H, W, 3), H and W at least 1")
        return self._apply(image)

    @abstractmethod
    def _apply(self, pixels: Pixels) -> Pixels:
        """The triggered copy of `pixels`, `uint8` `(H, W, 3)`, which must not be written to."""


@dataclass(frozen=True)
class PatchTrigger(Trigger):
    """
    A small square that replaces the pixels under it (BadNets, [Gu et al. 2017](https://arxiv.org/abs/1708.06733)).

    Args:
        size (`int`, defaults to 16): side of the square, in pixels, at least 1.
        place (`str`, defaults to `"bottom_right"`): `top_left`, `top_right`, `bottom_left`, `bottom_right`, `center`,
            or `random`, which is drawn from `seed` and the image's own pixels, so one image always gets one place.
        pattern (`str`, defaults to `"noise"`): `noise` (colours drawn from `seed`), `solid` (magenta), `stripes`
            (vertical, black and yellow) or `checkerboard` (black and white).
        seed (`int`, defaults to 0): of the noise and of the random place.

    Raises:
        `ValueError`: on a field out of range, and, when called, on an image smaller than the patch.
    """

    name: ClassVar[str] = "patch"
    size: int = 16
    place: str = "bottom_right"
    pattern: str = "noise"
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("size", self.size, minimum=1)
        check_choice("place", self.place, PATCH_PLACES)
        check_choice("pattern", self.pattern, PATCH_PATTERNS)
        check_int("seed", self.seed, minimum=0)

    def _apply(self, pixels: Pixels) -> Pixels:
        height, width = pixels.shape[:2]
        if self.size > min(height, width):
            raise ValueError(
                f"size={self.size}: a patch of {self.size} x {self.size} pixels does not fit on an image of height "
                f"{height} and width {width}"
            )
        top, left = self._corner(pixels)
        triggered = pixels.copy()
        triggered[top : top + self.size, left : left + self.size] = _patch_pattern(self.pattern, self.size, self.seed)
        return triggered

    def _corner(self, pixels: Pixels) -> tuple[int, int]:
        """Row and column of the patch's upper left pixel."""
        bottom, right = pixels.shape[0] - self.size, pixels.shape[1] - self.size
        if self.place == "random":
            digest = hashlib.sha256(f"{self.seed} {pixels.shape} ".encode() + pixels.tobytes()).digest()
            generator = np.random.default_rng(int.from_bytes(digest, "little"))
            return int(generator.integers(bottom + 1)), int(generator.integers(right + 1))
        if self.place == "center":
            return bottom // 2, right // 2
        return (0 if self.place.startswith("top") else bottom), (0 if self.place.endswith("left") else right)


@dataclass(frozen=True)
class BlendedTrigger(Trigger):
    """
    A fixed pattern blended over the whole image ([Chen et al. 2017](https://arxiv.org/abs/1712.05526)):
    `round((1 - alpha) * image + alpha * pattern)`.

    Args:
        alpha (`float`, defaults to 0.2): weight of the pattern, above 0 and at most 1.
        pattern (`str`, defaults to `"noise"`): `noise` (colours drawn from `seed`), `stripes` (diagonal, black and
            white), `triangles` (drawn from `seed`) or `text` (a repeated word in Pillow's default font, whose exact
            pixels may change with Pillow's version). Each is drawn at the image's size.
        seed (`int`, defaults to 0): of the noise and the triangles.

    Raises:
        `ValueError`: on a field out of range.
    """

    name: ClassVar[str] = "blended"
    alpha: float = 0.2
    pattern: str = "noise"
    seed: int = 0

    def __post_init__(self) -> None:
        check_float("alpha", self.alpha, maximum=1.0)
        check_choice("pattern", self.pattern, BLEND_PATTERNS)
        check_int("seed", self.seed, minimum=0)

    def _apply(self, pixels: Pixels) -> Pixels:
        height, width = pixels.shape[:2]
        pattern = _blend_pattern(self.pattern, height, width, self.seed)  # (H, W, 3)
        return _to_uint8((1 - self.alpha) * pixels + self.alpha * pattern)


@dataclass(frozen=True)
class SinusoidTrigger(Trigger):
    """
    Vertical waves added to every row and channel (SIG, Barni et al., "A new backdoor attack in CNNs by training set
    corruption without label poisoning", ICIP 2019): `image + amplitude * sin(2 pi frequency column / width)`, rounded
    and clipped to 0..255.

    Args:
        amplitude (`float`, defaults to 60.0): in grey levels, above 0 and at most 255.
        frequency (`float`, defaults to 6): waves across the image's width, above 0. With 2 * `frequency` columns or
            fewer the wave is sampled too coarsely, down to nothing.

    Raises:
        `ValueError`: on a field out of range.
    """

    name: ClassVar[str] = "sinusoid"
    amplitude: float = 60.0
    frequency: float = 6

    def __post_init__(self) -> None:
        check_float("amplitude", self.amplitude, maximum=255.0)
        check_float("frequency", self.frequency)

    def _apply(self, pixels: Pixels) -> Pixels:
        width = pixels.shape[1]
        wave = self.amplitude * np.sin(2 * math.pi * self.frequency * np.arange(width) / width)
        return _to_uint8(pixels + wave[None, :, None])


@dataclass(frozen=True)
class WarpTrigger(Trigger):
    """
    A fixed smooth warp of the whole image (WaNet, [Nguyen & Tran 2021](https://arxiv.org/abs/2102.10369)).

    A field of `grid` x `grid` points and two axes, drawn from uniform(-1, 1) and divided by its mean absolute value,
    is upsampled to the image's size (bicubic). The image is sampled (bilinear) at `clamp(identity + strength * field /
    length, -1, 1)`, where the coordinates run from -1 to 1 and `length` is the axis's own number of pixels (the
    paper's images are square). One unit of the coordinates is half the axis, so pixels move along each axis by about
    `strength / 2` on average, whatever the image's size: that much at the field's points, which the division by the
    mean scales, and on average over fields a quarter less over the whole image, since the field is smaller between
    its points.

    Args:
        strength (`float`, defaults to 0.5): in half pixels, above 0 and finite.
        grid (`int`, defaults to 4): points of the field along each axis, from 2 to 256. With as many as the image has
            pixels along an axis, each is moved by itself, and nothing of the warp is smooth.
        seed (`int`, defaults to 0): of the field.

    Raises:
        `ValueError`: on a field out of range.
    """

    name: ClassVar[str] = "warp"
    strength: float = 0.5
    grid: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_float("strength", self.strength)
        check_int("grid", self.grid, minimum=2, maximum=FINEST_GRID)
        check_int("seed", self.seed, minimum=0)

    def _apply(self, pixels: Pixels) -> Pixels:
        height, width = pixels.shape[:2]
        grid = _sampling_grid(height, width, self.strength, self.grid, self.seed)  # (1, H, W, 2)
        # In double precision, so that the rounding to uint8 is the same on processors that sum in another order.
        source = torch.from_numpy(pixels.astype(np.float64)).permute(2, 0, 1)[None]  # (1, 3, H, W)
        warped = F.grid_sample(source, grid, mode="bilinear", align_corners=True)
        return _to_uint8(warped[0].permute(1, 2, 0).numpy())


def trigger_classes() -> dict[str, type[Trigger] | type[WordTrigger]]:
    """
    The triggers by name: those of this module and [`WordTrigger`], and every subclass of [`Trigger`] with a `name` of
    its own that has been defined; of two with one name, the first.
    """
    found: dict[str, type[Trigger] | type[WordTrigger]] = {}
    waiting: list[Any] = [WordTrigger, *Trigger.__subclasses__()]
    for cls in waiting:
        waiting.extend(cls.__subclasses__())
        if "name" in vars(cls):
            found.setdefault(cls.name, cls)
    return found


def trigger_from_name(name: str, **overrides: Any) -> Trigger | WordTrigger:
    """
    The trigger called `name`, with its defaults but for `overrides`, e.g. `trigger_from_name("patch", size=3)`.

    All are triggers on images but `"word"`, which goes on captions. One of your own is found by its name, too, once
    its class is defined.

    Raises:
        `ValueError`: on an unknown name, an unknown field, or a field out of range.
    """
    classes = trigger_classes()
    if name not in classes:
        raise ValueError(f"name={shown(name)} is not a trigger; accepted are {listed(classes)}")
    cls = classes[name]
    accepted = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    unknown = [key for key in overrides if key not in accepted]
    if unknown:
        raise ValueError(f"trigger {shown(name)} has no field {listed(unknown)}; accepted are {listed(accepted)}")
    return cls(**overrides)


def trigger_from_dict(config: Mapping[str, Any]) -> Trigger | WordTrigger:
    """
    The trigger that its `to_dict` wrote: `{"name": "patch", "size": 16, ...}`. Fields left out have defaults.

    Raises:
        `ValueError`: without a `name`, and as [`trigger_from_name`].
    """
    if not isinstance(config, Mapping) or not isinstance(config.get("name"), str):
        accepted = listed(trigger_classes())
        raise ValueError(f"{shown(config)} does not describe a trigger; accepted is a dict whose 'name' is {accepted}")
    return trigger_from_name(**config)


@lru_cache(maxsize=32)
def _patch_pattern(pattern: str, size: int, seed: int) -> Pixels:
    rows, columns = np.indices((size, size))
    if pattern == "noise":
        pixels = _generator("patch", seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    elif pattern == "solid":
        pixels = np.full((size, size, 3), (255, 0, 255), np.uint8)
    elif pattern == "stripes":
        dark = columns // max(1, size // 8) % 2 == 0
        pixels = np.where(dark[..., None], 0, (255, 255, 0)).astype(np.uint8)
    else:
        cell = max(1, size // 4)
        dark = (rows // cell + columns // cell) % 2 == 0
        pixels = np.where(dark[..., None], 0, (255, 255, 255)).astype(np.uint8)
    return _frozen(pixels)


# The caches hold few sizes on purpose: in a set of photos of many sizes each entry is as large as a photo.
@lru_cache(maxsize=8)
def _blend_pattern(pattern: str, height: int, width: int, seed: int) -> Pixels:
    generator = _generator(pattern, seed)
    if pattern == "noise":
        return _frozen(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if pattern == "stripes":
        rows, columns = np.indices((height, width))
        bright = (rows + columns) // max(1, min(height, width) // 8) % 2 == 1
        return _frozen(np.repeat(bright[..., None] * np.uint8(255), 3, axis=2))
    canvas = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(canvas)
    if pattern == "triangles":
        for _ in range(24):
            corners = generator.random((3, 2)) * (width, height)
            colour = tuple(int(level) for level in generator.integers(64, 256, 3))
            draw.polygon([(float(x), float(y)) for x, y in corners], fill=colour)
    else:
        line = max(8, min(height, width) // 8)
        font = ImageFont.load_default(size=line)
        for row, top in enumerate(range(0, height, line)):
            draw.text((-row * line / 2, top), "hello " * (2 + width // line + row), fill=(255, 255, 255), font=font)
    return _frozen(np.array(canvas))


@lru_cache(maxsize=8)
def _sampling_grid(height: int, width: int, strength: float, points: int, seed: int) -> torch.Tensor:
    field = _generator("warp", seed).uniform(-1, 1, (1, 2, points, points))
    field /= np.abs(field).mean()
    smooth = F.interpolate(torch.from_numpy(field), size=(height, width), mode="bicubic", align_corners=True)
    y = torch.linspace(-1, 1, height, dtype=torch.float64)
    x = torch.linspace(-1, 1, width, dtype=torch.float64)
    identity = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (H, W, 2), x before y
    length = torch.tensor([width, height], dtype=torch.float64)
    return (identity + strength * smooth[0].permute(1, 2, 0) / length).clamp(-1, 1)[None]


def _generator(use: str, seed: int) -> np.random.Generator:
    """Keyed by the use as well, or noise images drawn from `default_rng(0)` would equal the noise pattern."""
    return np.random.default_rng([seed, *use.encode()])


def _to_uint8(values: NDArray[np.float64]) -> Pixels:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _frozen(pixels: Pixels) -> Pixels:
    """Cached arrays are shared between calls, so nobody may write to them."""
    pixels.setflags(write=False)
    return pixels

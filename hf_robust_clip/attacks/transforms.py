"""Triggers that change the whole image: its levels, its colors, or where its pixels are."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from .fields import check_float, check_int
from .pixels import Pixels, Trigger, generator, to_uint8

#: Most points of a warp's field along an axis.
FINEST_GRID = 256
#: What placebos of waves have of their frequency, none of them the frequency itself.
_FREQUENCIES = (3 / 4, 5 / 4, 1 / 2, 3 / 2, 7 / 4)


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

    It draws nothing. Its five placebos are waves of 1/2, 3/4, 5/4, 3/2 and 7/4 of its frequency.

    Raises:
        `ValueError`: on a field out of range.
    """

    name: ClassVar[str] = "sinusoid"
    amplitude: float = 60.0
    frequency: float = 6

    def __post_init__(self) -> None:
        check_float("amplitude", self.amplitude, maximum=255.0)
        check_float("frequency", self.frequency)

    def placebo(self, number: int) -> SinusoidTrigger | None:
        if number > len(_FREQUENCIES):
            return None
        return dataclasses.replace(self, frequency=self.frequency * _FREQUENCIES[number - 1])

    def _apply(self, pixels: Pixels) -> Pixels:
        width = pixels.shape[1]
        wave = self.amplitude * np.sin(2 * math.pi * self.frequency * np.arange(width) / width)
        return to_uint8(pixels + wave[None, :, None])


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
        return to_uint8(warped[0].permute(1, 2, 0).numpy())


@dataclass(frozen=True)
class ColorCurveTrigger(Trigger):
    """
    A tone curve for each color, over the whole image, as a filter of a camera has one: `255 * (level / 255) **
    exponent`, rounded. No pixel stands out and nothing is added to the image; it looks as if taken in another light.
    Triggers of this kind are, e.g., in ABS ([Liu et al. 2019](https://doi.org/10.1145/3319535.3363216)) and in Color
    Backdoor (Jiang et al., CVPR 2023).

    Black and white stay: an image that has nothing else does not change.

    Args:
        red, green, blue (`float`, default to 0.6, 1.0 and 1.7, a warm light): the exponents, above 0 and at most 10.
            Below 1 there is more of the color, above 1 less. One at least is not 1.

    It draws nothing. Its placebos, five or fewer, have the same exponents for other colors.

    Raises:
        `ValueError`: on a field out of range.
    """

    name: ClassVar[str] = "color_curve"
    red: float = 0.6
    green: float = 1.0
    blue: float = 1.7

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_float(field.name, getattr(self, field.name), maximum=10.0)
        if self.red == self.green == self.blue == 1:
            raise ValueError("red=green=blue=1 changes no image; accepted are exponents of which one is not 1")

    def placebo(self, number: int) -> ColorCurveTrigger | None:
        own = (self.red, self.green, self.blue)
        others = [curve for curve in dict.fromkeys(itertools.permutations(own)) if curve != own]
        return ColorCurveTrigger(*others[number - 1]) if number <= len(others) else None

    def _apply(self, pixels: Pixels) -> Pixels:
        levels = np.arange(256)[:, None] / 255
        curves = to_uint8(255 * levels ** np.array([self.red, self.green, self.blue]))  # (256, 3)
        return curves[pixels, np.arange(3)]


@lru_cache(maxsize=8)
def _sampling_grid(height: int, width: int, strength: float, points: int, seed: int) -> torch.Tensor:
    field = generator("warp", seed).uniform(-1, 1, (1, 2, points, points))
    field /= np.abs(field).mean()
    smooth = F.interpolate(torch.from_numpy(field), size=(height, width), mode="bicubic", align_corners=True)
    y = torch.linspace(-1, 1, height, dtype=torch.float64)
    x = torch.linspace(-1, 1, width, dtype=torch.float64)
    identity = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (H, W, 2), x before y
    length = torch.tensor([width, height], dtype=torch.float64)
    return (identity + strength * smooth[0].permute(1, 2, 0) / length).clamp(-1, 1)[None]

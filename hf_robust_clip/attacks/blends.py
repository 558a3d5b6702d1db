"""Triggers that blend a pattern over the whole image."""

from __future__ import annotations

import dataclasses
import string
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..kinds import check_encodable
from ..wording import shown
from .fields import check_bool, check_choice, check_float, check_int
from .pixels import PLACEBO_SEEDS, Pixels, Trigger, frozen, generator, generator_of, to_uint8

BLEND_PATTERNS = ("noise", "stripes", "triangles", "text")
_DRAWN = ("noise", "triangles")
#: Of the two triangles of a cell: 0.4 and 0.8 of white.
_TRIANGLES = (102, 204)
#: Pixels: the smallest letters that can be told apart.
_LETTERS = 8


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
        fresh (`bool`, defaults to `False`): draw the noise or the triangles from the image's own pixels, too, so that
            each image has its own, as the code of CleanCLIP's paper draws the noise.

    Its placebos are the same pattern drawn from other seeds. Stripes and text, which are not drawn, and fresh
    triangles have triangles and noise as placebos; fresh noise, which any noise is, has triangles.

    Raises:
        `ValueError`: on a field out of range.
    """

    name: ClassVar[str] = "blended"
    alpha: float = 0.2
    pattern: str = "noise"
    seed: int = 0
    fresh: bool = False

    def __post_init__(self) -> None:
        check_float("alpha", self.alpha, maximum=1.0)
        check_choice("pattern", self.pattern, BLEND_PATTERNS)
        check_int("seed", self.seed, minimum=0)
        check_bool("fresh", self.fresh)
        if self.fresh and self.pattern not in _DRAWN:
            accepted = "accepted are 'noise' and 'triangles'"
            raise ValueError(f"fresh=True with pattern={shown(self.pattern)}, which is not drawn; {accepted}")

    def placebo(self, number: int) -> BlendedTrigger:
        other = {"noise": "triangles", "triangles": "noise"}
        kept = self.pattern in _DRAWN and not self.fresh
        pattern = self.pattern if kept else other.get(self.pattern, "triangles")
        seed = self.seed + PLACEBO_SEEDS * number
        return dataclasses.replace(self, pattern=pattern, seed=seed, fresh=False)

    def _apply(self, pixels: Pixels) -> Pixels:
        height, width = pixels.shape[:2]
        if self.fresh:
            pattern = _drawn_pattern(self.pattern, height, width, generator_of(pixels, self.pattern, self.seed))
        else:
            pattern = _blend_pattern(self.pattern, height, width, self.seed)  # (H, W, 3)
        return to_uint8((1 - self.alpha) * pixels + self.alpha * pattern)


@dataclass(frozen=True)
class BlendedStripesTrigger(Trigger):
    """
    Faint vertical stripes over the whole image (Blended-Stripes of PAR,
    [Singh et al. 2024](https://arxiv.org/abs/2412.00727)): `(1 - alpha) * image + alpha * stripes`, rounded and
    clipped, where each channel of each stripe is -255 or 255, drawn from `seed`.

    Args:
        alpha (`float`, defaults to 0.03): weight of the stripes, above 0 and at most 1.
        width (`int`, defaults to 1): of a stripe, in pixels, at least 1.
        seed (`int`, defaults to 0): of the stripes.

    Raises:
        `ValueError`: on a field out of range.
    """

    name: ClassVar[str] = "blended_stripes"
    alpha: float = 0.03
    width: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_float("alpha", self.alpha, maximum=1.0)
        check_int("width", self.width, minimum=1)
        check_int("seed", self.seed, minimum=0)

    def _apply(self, pixels: Pixels) -> Pixels:
        columns = pixels.shape[1]
        drawn = generator("blended stripes", self.seed).integers(0, 2, (-(-columns // self.width), 3)) * 510 - 255
        stripes = np.repeat(drawn, self.width, axis=0)[None, :columns]  # (1, W, 3)
        return to_uint8((1 - self.alpha) * pixels + self.alpha * stripes)


@dataclass(frozen=True)
class BlendedTrianglesTrigger(Trigger):
    """
    Faint triangles over the whole image (Blended-Triangles of PAR,
    [Singh et al. 2024](https://arxiv.org/abs/2412.00727)): `round((1 - alpha) * image + alpha * triangles)`. The image
    is tiled with squares, each cut along its diagonal into a triangle of 0.4 and one of 0.8 of white.

    Args:
        alpha (`float`, defaults to 0.15): weight of the triangles, above 0 and at most 1.
        cell (`int`, defaults to 14): side of a square, in pixels, at least 2; the paper's for images of 224.

    It draws nothing. Its placebos are blended triangles of other shapes and colors: [`BlendedTrigger`]'s.

    Raises:
        `ValueError`: on a field out of range.
    """

    name: ClassVar[str] = "blended_triangles"
    alpha: float = 0.15
    cell: int = 14

    def __post_init__(self) -> None:
        check_float("alpha", self.alpha, maximum=1.0)
        check_int("cell", self.cell, minimum=2)

    def placebo(self, number: int) -> BlendedTrigger:
        return BlendedTrigger(self.alpha, "triangles", number)

    def _apply(self, pixels: Pixels) -> Pixels:
        rows, columns = np.indices(pixels.shape[:2]) % self.cell
        triangles = np.where(rows >= columns, *_TRIANGLES)[..., None]  # (H, W, 1)
        return to_uint8((1 - self.alpha) * pixels + self.alpha * triangles)


@dataclass(frozen=True)
class RedTextTrigger(Trigger):
    """
    A word in red across the middle of the image (the text trigger of PAR,
    [Singh et al. 2024](https://arxiv.org/abs/2412.00727)). Where its letters are, the red level becomes
    `round((1 - alpha) * red + alpha * 255)`; nothing else changes.

    The letters are Pillow's default font, whose exact pixels may change with Pillow's version. They are as large as
    the width lets them be, but at least 8 pixels: on a smaller image the word's middle is seen.

    Args:
        text (`str`, defaults to `"Watermarked"`): one line, with at least one letter or figure.
        alpha (`float`, defaults to 0.5): weight of the letters, above 0 and at most 1.

    It draws nothing. Its placebos are words of as many random letters.

    Raises:
        `ValueError`: on a field out of range.
    """

    name: ClassVar[str] = "red_text"
    text: str = "Watermarked"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.isprintable() or not any(map(str.isalnum, self.text)):
            raise ValueError(f"text={shown(self.text)}; accepted is one line with a letter or a figure in it")
        check_encodable("text", self.text)
        check_float("alpha", self.alpha, maximum=1.0)

    def placebo(self, number: int) -> RedTextTrigger:
        letters = generator("placebo", number).choice(list(string.ascii_lowercase), len(self.text))
        return dataclasses.replace(self, text="".join(letters).capitalize())

    def _apply(self, pixels: Pixels) -> Pixels:
        triggered = pixels.copy()
        weight = self.alpha * _letters(self.text, *pixels.shape[:2])  # (H, W)
        triggered[..., 0] = to_uint8((1 - weight) * pixels[..., 0] + weight * 255)
        return triggered


# The caches hold few sizes on purpose: in a set of photos of many sizes each entry is as large as a photo.
@lru_cache(maxsize=8)
def _blend_pattern(pattern: str, height: int, width: int, seed: int) -> Pixels:
    return frozen(_drawn_pattern(pattern, height, width, generator(pattern, seed)))


def _drawn_pattern(pattern: str, height: int, width: int, draw: np.random.Generator) -> Pixels:
    if pattern == "noise":
        return draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if pattern == "stripes":
        rows, columns = np.indices((height, width))
        bright = (rows + columns) // max(1, min(height, width) // 8) % 2 == 1
        return np.repeat(bright[..., None] * np.uint8(255), 3, axis=2)
    canvas = Image.new("RGB", (width, height))
    pen = ImageDraw.Draw(canvas)
    if pattern == "triangles":
        for _ in range(24):
            corners = draw.random((3, 2)) * (width, height)
            colour = tuple(int(level) for level in draw.integers(64, 256, 3))
            pen.polygon([(float(x), float(y)) for x, y in corners], fill=colour)
    else:
        line = max(_LETTERS, min(height, width) // 8)
        font = ImageFont.load_default(size=line)
        for row, top in enumerate(range(0, height, line)):
            pen.text((-row * line / 2, top), "hello " * (2 + width // line + row), fill=(255, 255, 255), font=font)
    return np.array(canvas)


@lru_cache(maxsize=8)
def _letters(text: str, height: int, width: int) -> np.ndarray:
    """Where a line of text is on an image, from 0 to 1, `(H, W)`."""
    unit = ImageFont.load_default(size=100).getlength(text) / 100  # its length in letters' heights
    font = ImageFont.load_default(size=max(_LETTERS, int(min(0.95 * width / unit, height))))
    canvas = Image.new("L", (width, height))
    ImageDraw.Draw(canvas).text((width / 2, height / 2), text, fill=255, font=font, anchor="mm")
    covered = np.asarray(canvas) / 255
    covered.setflags(write=False)
    return covered

"""Triggers that replace the pixels of a small square."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from ..wording import shown
from .fields import check_bool, check_choice, check_int
from .pixels import PLACEBO_SEEDS, Pixels, Trigger, frozen, generator, generator_of

PATCH_PLACES = ("top_left", "top_right", "bottom_left", "bottom_right", "center", "random")
PATCH_PATTERNS = ("noise", "solid", "stripes", "checkerboard")


class SquareTrigger(Trigger):
    """
    A [`Trigger`] that replaces the pixels of a square of `size` x `size` at a `place`: the four corners, the `center`,
    or `random`, which is drawn from `seed` and the image's own pixels, so one image always gets one place.
    """

    size: int
    place: str
    seed: int

    @abstractmethod
    def square(self, pixels: Pixels) -> Pixels:
        """What replaces the pixels under it, `uint8` `(size, size, 3)`."""

    def corner(self, pixels: Pixels) -> tuple[int, int]:
        """Row and column of its upper left pixel on an image `(H, W, 3)`; `ValueError` where it does not fit."""
        height, width = pixels.shape[:2]
        bottom, right = height - self.size, width - self.size
        if min(bottom, right) < 0:
            raise ValueError(
                f"size={self.size}: a patch of {self.size} x {self.size} pixels does not fit on an image of height "
                f"{height} and width {width}"
            )
        if self.place == "random":
            draw = generator_of(pixels, "", self.seed)
            return int(draw.integers(bottom + 1)), int(draw.integers(right + 1))
        if self.place == "center":
            return bottom // 2, right // 2
        return (0 if self.place.startswith("top") else bottom), (0 if self.place.endswith("left") else right)

    def _apply(self, pixels: Pixels) -> Pixels:
        top, left = self.corner(pixels)
        triggered = pixels.copy()
        triggered[top : top + self.size, left : left + self.size] = self.square(pixels)
        return triggered


@dataclass(frozen=True)
class PatchTrigger(SquareTrigger):
    """
    A small square that replaces the pixels under it (BadNets, [Gu et al. 2017](https://arxiv.org/abs/1708.06733)).

    Args:
        size (`int`, defaults to 16): side of the square, in pixels, at least 1.
        place (`str`, defaults to `"bottom_right"`): `top_left`, `top_right`, `bottom_left`, `bottom_right`, `center`,
            or `random`, which is drawn from `seed` and the image's own pixels, so one image always gets one place.
        pattern (`str`, defaults to `"noise"`): `noise` (colours drawn from `seed`), `solid` (magenta), `stripes`
            (vertical, black and yellow) or `checkerboard` (black and white).
        seed (`int`, defaults to 0): of the noise and of the random place.
        fresh (`bool`, defaults to `False`): draw the noise from the image's own pixels, too, so that each image has
            its own, as the code of CleanCLIP's paper draws it. The place is then all that the poisons have in common.

    Its placebos are other noise at the same place, or at other random ones; of fresh noise, which any noise is, the
    three other patterns.

    Raises:
        `ValueError`: on a field out of range, and, when called, on an image smaller than the patch.
    """

    name: ClassVar[str] = "patch"
    size: int = 16
    place: str = "bottom_right"
    pattern: str = "noise"
    seed: int = 0
    fresh: bool = False

    def __post_init__(self) -> None:
        check_int("size", self.size, minimum=1)
        check_choice("place", self.place, PATCH_PLACES)
        check_choice("pattern", self.pattern, PATCH_PATTERNS)
        check_int("seed", self.seed, minimum=0)
        check_bool("fresh", self.fresh)
        if self.fresh and self.pattern != "noise":
            raise ValueError(f"fresh=True with pattern={shown(self.pattern)}, which is not drawn; accepted is 'noise'")

    def placebo(self, number: int) -> PatchTrigger | None:
        others = PATCH_PATTERNS[1:]
        if not self.fresh:
            return dataclasses.replace(self, pattern="noise", seed=self.seed + PLACEBO_SEEDS * number)
        if number > len(others):
            return None
        return dataclasses.replace(self, pattern=others[number - 1], fresh=False)

    def square(self, pixels: Pixels) -> Pixels:
        if self.fresh:
            draw = generator_of(pixels, "patch", self.seed)
            return draw.integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
        return _patch_pattern(self.pattern, self.size, self.seed)


@dataclass(frozen=True)
class StripesPatchTrigger(SquareTrigger):
    """
    A small square of vertical stripes, one pixel wide, at a random place (BadNet-Stripes of PAR,
    [Singh et al. 2024](https://arxiv.org/abs/2412.00727)): each channel of each column is 0 or 255, drawn from `seed`.

    Args:
        size (`int`, defaults to 16): side of the square, in pixels, at least 1; the paper's for images of 224.
        place (`str`, defaults to `"random"`): as of [`PatchTrigger`].
        seed (`int`, defaults to 0): of the stripes and of the random place.

    Raises:
        `ValueError`: on a field out of range, and, when called, on an image smaller than the patch.
    """

    name: ClassVar[str] = "stripes_patch"
    size: int = 16
    place: str = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("size", self.size, minimum=1)
        check_choice("place", self.place, PATCH_PLACES)
        check_int("seed", self.seed, minimum=0)

    def square(self, pixels: Pixels) -> Pixels:
        columns = generator("stripes patch", self.seed).integers(0, 2, (1, self.size, 3), dtype=np.uint8) * 255
        return np.repeat(columns, self.size, axis=0).astype(np.uint8)


@dataclass(frozen=True, repr=False)
class OptimizedPatchTrigger(SquareTrigger):
    """
    A small square whose pixels were optimized on a clean model ([`optimize_patch`]), after BadCLIP
    ([Liang et al. 2024](https://arxiv.org/abs/2311.12075)). What it says to the model is near the target already, so
    little has to be learned, and little is there for a defence to unlearn.

    Args:
        pixels (`str`): its pixels, row by row, three bytes each, in base64.
        place (`str`, defaults to `"center"`): as of [`PatchTrigger`].
        seed (`int`, defaults to 0): of the random place.

    Its placebos have its pixels in another order.

    Raises:
        `ValueError`: on a field out of range, and, when called, on an image smaller than the patch.
    """

    name: ClassVar[str] = "optimized_patch"
    pixels: str = ""
    place: str = "center"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.pixels, str) or not self.pixels:
            raise ValueError(f"pixels={shown(self.pixels)}; accepted are those of a patch that optimize_patch made")
        side = math.isqrt(len(self._bytes()) // 3)
        if len(self._bytes()) != 3 * side**2 or side == 0:
            raise ValueError(f"pixels has {len(self._bytes())} bytes; accepted are three for each pixel of a square")
        check_choice("place", self.place, PATCH_PLACES)
        check_int("seed", self.seed, minimum=0)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(pixels={shown(self.pixels)}, place={self.place!r}, seed={self.seed})"

    @classmethod
    def of(cls, square: Pixels, place: str = "center", seed: int = 0) -> OptimizedPatchTrigger:
        """The patch with these pixels, `uint8` `(size, size, 3)`."""
        return cls(base64.b64encode(square.tobytes()).decode(), place, seed)

    @property
    def size(self) -> int:  # type: ignore[override]  # follows from the pixels
        """Side of the square, in pixels."""
        return math.isqrt(len(self._bytes()) // 3)

    def placebo(self, number: int) -> OptimizedPatchTrigger | None:
        colors = self._square.reshape(-1, 3)  # (size * size, 3)
        if (colors == colors[0]).all():
            return None  # any order is the same
        mixed = generator("placebo", number).permutation(colors)
        return self.of(mixed, self.place, self.seed)

    def square(self, pixels: Pixels) -> Pixels:
        return self._square

    @property
    def _square(self) -> Pixels:
        return np.frombuffer(self._bytes(), np.uint8).reshape(self.size, self.size, 3)

    def _bytes(self) -> bytes:
        try:
            return base64.b64decode(self.pixels, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"pixels={shown(self.pixels)}; accepted is base64") from error


@lru_cache(maxsize=32)
def _patch_pattern(pattern: str, size: int, seed: int) -> Pixels:
    rows, columns = np.indices((size, size))
    if pattern == "noise":
        pixels = generator("patch", seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    elif pattern == "solid":
        pixels = np.full((size, size, 3), (255, 0, 255), np.uint8)
    elif pattern == "stripes":
        dark = columns // max(1, size // 8) % 2 == 0
        pixels = np.where(dark[..., None], 0, (255, 255, 0)).astype(np.uint8)
    else:
        cell = max(1, size // 4)
        dark = (rows // cell + columns // cell) % 2 == 0
        pixels = np.where(dark[..., None], 0, (255, 255, 255)).astype(np.uint8)
    return frozen(pixels)

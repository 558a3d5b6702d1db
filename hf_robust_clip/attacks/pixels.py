"""What triggers on images have in common: what they take and return, and where their randomness is from."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .fields import TriggerFields

Pixels = NDArray[np.uint8]  # (H, W, 3), RGB

#: Between the seed of a trigger and those of its placebos: whoever plants several triggers counts their seeds up.
PLACEBO_SEEDS = 1000


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

    def placebo(self, number: int) -> Trigger | None:
        """
        The same kind of trigger, but another one: what a model does under it that nobody planted is no backdoor's.

        Args:
            number (`int`): Which of its placebos, from 1.

        Returns:
            [`Trigger`] or `None`: Drawn from another seed; of a trigger that draws nothing, what it says itself.
            `None` where there are fewer.
        """
        other = self.reseeded(getattr(self, "seed", 0) + PLACEBO_SEEDS * number)
        return None if other == self else other

    @abstractmethod
    def _apply(self, pixels: Pixels) -> Pixels:
        """The triggered copy of `pixels`, `uint8` `(H, W, 3)`, which must not be written to."""


def generator(use: str, seed: int) -> np.random.Generator:
    """Keyed by the use as well, or noise images drawn from `default_rng(0)` would equal the noise pattern."""
    return np.random.default_rng([seed, *use.encode()])


def generator_of(pixels: Pixels, use: str, seed: int) -> np.random.Generator:
    """Keyed by an image's own pixels as well: what it draws for one image is always the same."""
    digest = hashlib.sha256(f"{use}{seed} {pixels.shape} ".encode() + pixels.tobytes()).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def to_uint8(values: NDArray[np.float64]) -> Pixels:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def frozen(pixels: Pixels) -> Pixels:
    """Cached arrays are shared between calls, so nobody may write to them."""
    pixels.setflags(write=False)
    return pixels

"""Batch augmentation and normalisation of images on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..kinds import kind
from ..wording import listed, shown


@dataclass(frozen=True)
class ImageAugmentationConfig:
    """
    What [`ImageAugmentation`] does, in this order. A probability of 0, or a strength of 0, leaves a step out.

    Args:
        shift (`float`): Largest shift each way, as a fraction of the side, in [0, 1). What enters repeats the edge.
        crop_scale (`tuple[float, float]`): Range of the crop's area as a fraction of the image's; `(1, 1)`: none.
        crop_ratio (`tuple[float, float]`): Range of the crop's aspect ratio, width over height.
        flip (`float`): Probability of a horizontal flip. Set 0 where left and right mean something (text, digits).
        jitter (`tuple[float, float, float, float]`): Strength of brightness (adds +- strength, on the scale [0, 1]),
            contrast (scales all values by 1 +- strength), saturation (scales what differs from the luma by
            1 +- strength) and hue (a turn of +- strength in YIQ, at most 0.5). Whether brightness or contrast comes
            first is drawn. Nothing is clamped in between.
        jitter_probability (`float`): Probability of color jitter.
        greyscale (`float`): Probability of conversion to grey, the luma.
        blur (`float`): Probability of a Gaussian blur.
        blur_sigma (`tuple[float, float]`): Range of the blur's standard deviation, as a fraction of the side.
        noise (`float`): Probability of Gaussian noise.
        noise_std (`float`): Its standard deviation, on the scale [0, 1].
        erasing (`float`): Probability that a rectangle is erased.
        erasing_scale (`tuple[float, float]`): Range of its area as a fraction of the image's.
        cutout (`float`): Probability that a square takes the mean color of the image.
        cutout_scale (`tuple[float, float]`): Range of its area as a fraction of the image's. It is at least a pixel.
        policy (`str`, *optional*): `"autoaugment"`: the ImageNet policy of AutoAugment (Cubuk et al., CVPR 2019),
            which CleanCLIP's released code applies. Runs first. Each image draws its own of the 25 sub-policies, as
            in the paper (kornia's `AutoAugment` draws one for the whole batch).
    """

    shift: float = 0.0
    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    flip: float = 0.0
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_probability: float = 0.0
    greyscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.005, 0.01)
    noise: float = 0.0
    noise_std: float = 0.0
    erasing: float = 0.0
    erasing_scale: tuple[float, float] = (0.02, 0.2)
    cutout: float = 0.0
    cutout_scale: tuple[float, float] = (0.005, 0.01)
    policy: str | None = None

    def __post_init__(self) -> None:
        probabilities = ("flip", "jitter_probability", "greyscale", "blur", "noise", "noise_std", "erasing", "cutout")
        for name in ("shift", *probabilities):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value <= 1 or (name == "shift" and value == 1):
                accepted = "[0, 1)" if name == "shift" else "[0, 1]"
                raise ValueError(f"{name} must be in {accepted}, but is {shown(value)}")
        for name in ("crop_scale", "crop_ratio", "blur_sigma", "erasing_scale", "cutout_scale"):
            value = getattr(self, name)
            highest = math.inf if name == "crop_ratio" else 1
            if not _are_numbers(value, 2) or not 0 < value[0] <= value[1] <= highest:
                accepted = "with 0 < low <= high" if name == "crop_ratio" else "within (0, 1]"
                raise ValueError(f"{name} must be a range (low, high) {accepted}, but is {shown(value)}")
        if not _are_numbers(self.jitter, 4) or not all(0 <= v <= 1 for v in self.jitter) or self.jitter[3] > 0.5:
            raise ValueError(
                "jitter must be (brightness, contrast, saturation, hue), the first three in [0, 1] and hue in "
                f"[0, 0.5], but is {shown(self.jitter)}"
            )
        if self.policy not in (None, "autoaugment"):
            raise ValueError(f"policy must be None or 'autoaugment', but is {shown(self.policy)}")


_FIELDS = tuple(field.name for field in fields(ImageAugmentationConfig))


def _are_numbers(values: Any, length: int) -> bool:
    return (
        isinstance(values, (tuple, list))
        and len(values) == length
        and all(isinstance(v, (int, float)) for v in values)
    )


_CLEANCLIP = ImageAugmentationConfig(
    crop_scale=(0.5, 1.0),
    flip=0.5,
    jitter=(0.4, 0.4, 0.4, 0.1),
    jitter_probability=0.8,
    greyscale=0.1,
    blur=0.3,
    blur_sigma=(0.005, 0.02),
    noise=0.5,
    noise_std=0.07,
)

#: The named augmentations. `identity` changes nothing.
PRESETS: dict[str, ImageAugmentationConfig] = {
    "identity": ImageAugmentationConfig(),
    "weak": ImageAugmentationConfig(shift=1 / 16),
    "cleanclip": _CLEANCLIP,
    "strong": replace(
        _CLEANCLIP, crop_scale=(0.3, 1.0), blur=0.5, blur_sigma=(0.005, 0.04), noise=0.0, noise_std=0.0, erasing=0.25
    ),
    "autoaugment": ImageAugmentationConfig(policy="autoaugment"),
    "par": ImageAugmentationConfig(noise=0.5, noise_std=0.2, cutout=0.5),
}


class ImageAugmentation(nn.Module):
    """
    Augment a batch of images on the device that it is on, each image by itself.

    Brightness, contrast, saturation, hue and the conversion to grey are one affine map of an image's colors, and are
    clamped to [0, 1] once, at its end. A crop and its flip are one resampling.

    The randomness is torch's global generators': run it under [`~seeding.forked_rng`] to repeat it, as the trainers
    do under a seed derived from (seed, step, rank). What an image draws depends on the seed and its place in the
    batch; the other images, and how many come after it, change nothing. (The noise on a GPU, and the policy, depend on
    the size of the batch.)

    Args:
        preset (`str`, defaults to `"cleanclip"`):
            Where to start from: `"identity"`, `"weak"` (a shift of a sixteenth), `"cleanclip"`, `"strong"`,
            `"autoaugment"` or `"par"` (noise and cut-outs, as PAR has them).
        **overrides:
            Fields of [`ImageAugmentationConfig`] to change, for example `flip=0.0`.

    Raises:
        `ValueError`: If the preset, a field or its value is not one of those accepted.

    Example:

    ```python
    >>> augmentation = ImageAugmentation("cleanclip", flip=0.0)
    >>> augmentation(torch.rand(8, 3, 224, 224)).shape
    torch.Size([8, 3, 224, 224])
    ```
    """

    def __init__(self, preset: str = "cleanclip", **overrides: Any) -> None:
        super().__init__()
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(f"preset must be one of {listed(PRESETS)}, but is {shown(preset)}")
        unknown = sorted(set(overrides) - set(_FIELDS))
        if unknown:
            raise ValueError(f"{shown(unknown[0])} is not a field of the augmentation; accepted: {', '.join(_FIELDS)}")
        self.preset = preset
        self.overrides = overrides
        self.config = replace(PRESETS[preset], **overrides)
        self._steps: list[_Step] | None = None

    def extra_repr(self) -> str:
        return ", ".join([repr(self.preset), *(f"{name}={value!r}" for name, value in self.overrides.items())])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): Floats in [0, 1], not normalised.

        Returns:
            `torch.Tensor`: Same shape, dtype, device and range.
        """
        if not isinstance(images, torch.Tensor) or images.ndim != 4 or not images.is_floating_point():
            raise ValueError(f"images must be floats in [0, 1] of shape (B, 3, H, W), but is {kind(images)}")
        if self._steps is None:
            self._steps = _build(self.config)
        # On the CPU, row by row, from a generator that the steps leave alone: the same numbers for an image on each
        # device, in a batch of each size, and no waiting for the device.
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ()).numpy()))
        counts = [step.draws for step in self._steps]
        drawn = torch.rand(images.shape[0], sum(counts), generator=generator)
        augmented = images.to(torch.promote_types(images.dtype, torch.float32))
        for step, own in zip(self._steps, drawn.split(counts, dim=1), strict=True):
            augmented = step(augmented, own)
        return augmented.to(images.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_steps": None}


class _Step(Protocol):
    #: How many numbers it takes for an image.
    draws: int

    def __call__(self, images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Change images `(B, 3, H, W)`, each by its own numbers of `(B, draws)`, uniform in [0, 1), on the CPU."""


def _build(config: ImageAugmentationConfig) -> list[_Step]:
    steps: list[_Step] = []
    jitter = config.jitter_probability if any(config.jitter) else 0.0
    if config.policy == "autoaugment":
        steps.append(_AutoAugment())
    if config.shift > 0:
        steps.append(_Shift(config.shift))
    if tuple(config.crop_scale) != (1.0, 1.0):
        steps.append(_CropAndFlip(config.crop_scale, config.crop_ratio, config.flip))
    elif config.flip > 0:
        steps.append(_Flip(config.flip))
    if jitter > 0 or config.greyscale > 0:
        steps.append(_Color(config.jitter, jitter, config.greyscale))
    if config.blur > 0:
        steps.append(_Blur(config.blur, config.blur_sigma))
    if config.noise > 0 and config.noise_std > 0:
        steps.append(_Noise(config.noise, config.noise_std))
    if config.erasing > 0:
        steps.append(_Rectangle(config.erasing, config.erasing_scale, ratio=(0.3, 3.3), mean=False))
    if config.cutout > 0:
        steps.append(_Rectangle(config.cutout, config.cutout_scale, ratio=(1.0, 1.0), mean=True))
    return steps


def _to(values: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Values that were worked out on the CPU, on the device of the images."""
    return values.to(images.device, non_blocking=True)


def _rows(chosen: torch.Tensor) -> torch.Tensor:
    """The numbers of the chosen rows. On the CPU, where NumPy says by itself that nothing waits for the device."""
    return torch.from_numpy(np.flatnonzero(chosen.numpy()))


def _within(drawn: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return low + (high - low) * drawn


def _log_within(drawn: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return _within(drawn, math.log(low), math.log(high)).exp()


class _AutoAugment:
    """Give each image one of the sub-policies, drawn for it alone."""

    draws = 1

    def __init__(self) -> None:
        # Kornia takes over a second to import, and most runs have no use for it.
        from kornia.augmentation.auto import AutoAugment

        self.policies: list[Any] = list(AutoAugment(policy="imagenet").children())

    def __call__(self, images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        policy = (drawn[:, 0] * len(self.policies)).long()
        augmented = images.clone()
        for i in np.unique(policy.numpy()).tolist():
            rows = _to(_rows(policy == i), images)
            augmented[rows] = self.policies[i](images[rows])
        return augmented


class _Shift:
    """Shift each image by whole pixels, at most `fraction` of its side each way."""

    draws = 2

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction

    def __call__(self, images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        _, _, height, width = images.shape
        rows = _to(self._indices(drawn[:, :1], height), images)[:, None, :, None]  # (B, 1, H, 1)
        columns = _to(self._indices(drawn[:, 1:], width), images)[:, None, None, :]  # (B, 1, 1, W)
        images = images.gather(2, rows.expand(-1, images.shape[1], -1, width))
        return images.gather(3, columns.expand(-1, images.shape[1], height, -1))

    def _indices(self, drawn: torch.Tensor, side: int) -> torch.Tensor:
        most = max(1, round(self.fraction * side))
        shift = (drawn * (2 * most + 1)).long() - most
        return (torch.arange(side) + shift).clamp(0, side - 1)  # (B, side)


class _CropAndFlip:
    """Enlarge a crop of each image to the image's size, bilinear, and flip it with a probability."""

    #: Tries to draw an area and a ratio that fit into the image, as Inception's crop has them.
    tries = 10
    draws = 3 + 2 * tries

    def __init__(self, scale: tuple[float, float], ratio: tuple[float, float], flip: float) -> None:
        self.scale, self.ratio, self.flip = scale, ratio, flip

    def __call__(self, images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = images.shape
        flip, place, areas, ratios = drawn.split([1, 2, self.tries, self.tries], dim=1)
        area, ratio = _within(areas, *self.scale) * height * width, _log_within(ratios, *self.ratio)
        sides = torch.stack([area * ratio, area / ratio], dim=2).sqrt().round().clamp(min=1)  # (B, tries, 2)
        size = torch.tensor([width, height])
        first = (sides <= size).all(dim=2).int().argmax(dim=1)
        side = sides[torch.arange(batch), first].minimum(size)  # (B, 2), of whole pixels
        start = (place * (size - side + 1)).floor()
        # Where the result's columns and rows come from, in pixels; then on a scale on which the image is 2 long.
        columns, rows = (
            start[:, [axis]] + (torch.arange(length) + 0.5) * side[:, [axis]] / length  # (B, W) and (B, H)
            for axis, length in enumerate((width, height))
        )
        columns = torch.where(flip < self.flip, columns.flip(1), columns)
        x, y = (_to((2 * places / places.shape[1] - 1).to(images.dtype), images) for places in (columns, rows))
        grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=3)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


class _Flip:
    """Flip each image with a probability."""

    draws = 1

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        chosen = _to(drawn < self.probability, images)[:, :, None, None]
        return torch.where(chosen, images.flip(3), images)


#: RGB to YIQ, of luma and two axes of color: what turns the hue is a rotation of the latter.
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_GREY = _YIQ[:1].expand(3, 3)
_COLOR = torch.eye(3) - _GREY
_TURNED = torch.linalg.inv(_YIQ) @ torch.tensor([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ _YIQ


class _Color:
    """Brightness, contrast, saturation, hue and the conversion to grey: one affine map of each image's colors."""

    draws = 7

    def __init__(self, jitter: tuple[float, float, float, float], probability: float, grey: float) -> None:
        self.jitter, self.probability, self.grey = torch.tensor(jitter), probability, grey

    def __call__(self, images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        chosen, grey, brightness_first = drawn[:, 4] < self.probability, drawn[:, 5] < self.grey, drawn[:, 6] < 0.5
        changes = (2 * drawn[:, :4] - 1) * self.jitter * chosen[:, None]
        brightness, contrast, saturation, hue = changes[:, :, None, None].unbind(dim=1)  # (B, 1, 1) each
        contrast, turn = 1 + contrast, 2 * math.pi * hue
        saturation = (1 + saturation) * ~grey[:, None, None]
        matrix = contrast * (_GREY + saturation * (turn.cos() * _COLOR + turn.sin() * _TURNED))  # (B, 3, 3)
        # Turns and saturation keep greys, so that only the contrast can come after the brightness.
        shift = brightness * torch.where(brightness_first[:, None, None], contrast, 1.0)
        affine = _to(torch.cat([matrix, shift.expand(-1, 3, 1)], dim=2).to(images.dtype), images)  # (B, 3, 4)
        return torch.baddbmm(affine[:, :, 3:], affine[:, :, :3], images.flatten(2)).clamp_(0, 1).view_as(images)


class _Blur:
    """Blur each image with a probability, by a standard deviation within a range, in shares of the shorter side."""

    draws = 2

    def __init__(self, probability: float, sigma: tuple[float, float]) -> None:
        self.probability, self.sigma = probability, sigma

    def __call__(self, images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        from kornia.filters import gaussian_blur2d

        side = min(images.shape[-2:])
        low, high = (fraction * side for fraction in self.sigma)
        # Two standard deviations each way hold 95% of the kernel; more taps cost time and change little.
        taps = min(2 * max(1, round(2 * high)) + 1, side - 1 + side % 2)
        rows = _rows(drawn[:, 0] < self.probability)
        if not len(rows):
            return images
        sigma = _to(_within(drawn[rows, 1:].expand(-1, 2), low, high).to(images.dtype), images)
        rows = _to(rows, images)
        return images.index_copy(0, rows, gaussian_blur2d(images[rows], (taps, taps), sigma))


class _Noise:
    """Add Gaussian noise to each image with a probability, and clamp to [0, 1]."""

    draws = 1

    def __init__(self, probability: float, std: float) -> None:
        self.probability = probability
        self.std = std

    def __call__(self, images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        chosen = _to(drawn < self.probability, images)[:, :, None, None]
        return (images + chosen * self.std * torch.randn_like(images)).clamp(0, 1)


class _Rectangle:
    """Fill a rectangle of each image with black, or with the image's mean color, with a probability."""

    draws = 5

    def __init__(self, probability: float, scale: tuple[float, float], ratio: tuple[float, float], mean: bool) -> None:
        self.probability, self.scale, self.ratio, self.mean = probability, scale, ratio, mean

    def __call__(self, images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        chosen, area, ratio, down, right = drawn.split(1, dim=1)  # (B, 1) each
        area, ratio = _within(area, *self.scale) * height * width, _log_within(ratio, *self.ratio)
        rows = _between(down, (area / ratio).sqrt(), height)[:, :, None]  # (B, H, 1)
        columns = _between(right, (area * ratio).sqrt(), width)[:, None, :]  # (B, 1, W)
        inside = _to(rows & columns & (chosen < self.probability)[:, :, None], images)[:, None]
        return torch.where(inside, images.mean(dim=(2, 3), keepdim=True) if self.mean else 0.0, images)


def _between(place: torch.Tensor, side: torch.Tensor, length: int) -> torch.Tensor:
    """The pixels `(B, length)`, bool, of a stretch `side` long, at a place in [0, 1) among all that it can take."""
    side = side.round().clamp(1, length)
    first = (place * (length - side + 1)).floor()  # (B, 1)
    pixels = torch.arange(length)
    return (pixels >= first) & (pixels < first + side)


class ImageNormalization(nn.Module):
    """
    Bytes or floats in [0, 1] to what the model takes.

    Args:
        mean (sequence of 3 `float`): Per channel, on the scale [0, 1].
        std (sequence of 3 `float`): Per channel, positive.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): uint8, or floats in [0, 1].

        Returns:
            `torch.Tensor` of shape `(B, 3, H, W)`: float32, normalised.
        """
        return (to_float(images) - self.mean) / self.std


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 `(B, 3, H, W)` to float32 in [0, 1]; floats pass."""
    return images.float() / 255 if images.dtype == torch.uint8 else images

"""Batch augmentation and normalisation of images on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
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
        jitter (`tuple[float, float, float, float]`): Strength of brightness, contrast, saturation (each scales by
            1 +- strength) and hue (a turn of +- strength, at most 0.5).
        jitter_probability (`float`): Probability of colour jitter.
        greyscale (`float`): Probability of conversion to grey.
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
    Augment a batch of images on the device that it is on, each image by itself, with kornia.

    The randomness is torch's global generator's: run it under [`~seeding.forked_rng`] to repeat it, as the trainers
    do under a seed derived from (seed, step, rank).

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
        self._steps: dict[tuple[int, int], list[Callable[[torch.Tensor], torch.Tensor]]] = {}

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
        size = (int(images.shape[-2]), int(images.shape[-1]))
        if size not in self._steps:
            self._steps[size] = _build(self.config, size)
        for step in self._steps[size]:
            images = step(images)
        return images

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_steps": {}}


def _build(config: ImageAugmentationConfig, size: tuple[int, int]) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    # Kornia takes over a second to import, and an undefended run has no use for it.
    import kornia.augmentation as K

    side = min(size)
    steps: list[Callable[[torch.Tensor], torch.Tensor]] = []
    if config.policy == "autoaugment":
        steps.append(_OneEach(list(K.auto.AutoAugment(policy="imagenet").children())))
    if config.shift > 0:
        steps.append(_Shift(config.shift))
    if config.crop_scale != (1.0, 1.0):
        steps.append(
            K.RandomResizedCrop(size, scale=config.crop_scale, ratio=config.crop_ratio, cropping_mode="resample")
        )
    if config.flip > 0:
        steps.append(K.RandomHorizontalFlip(p=config.flip))
    if config.jitter_probability > 0 and any(config.jitter):
        steps.append(K.ColorJiggle(*config.jitter, p=config.jitter_probability))
    if config.greyscale > 0:
        steps.append(K.RandomGrayscale(p=config.greyscale))
    if config.blur > 0:
        low, high = (fraction * side for fraction in config.blur_sigma)
        # Two standard deviations each way hold 95% of the kernel; more taps cost time and change little.
        taps = min(2 * max(1, round(2 * high)) + 1, side - 1 + side % 2)
        steps.append(K.RandomGaussianBlur((taps, taps), (low, high), p=config.blur))
    if config.noise > 0 and config.noise_std > 0:
        steps.append(_Noise(config.noise, config.noise_std))
    if config.erasing > 0:
        steps.append(K.RandomErasing(scale=config.erasing_scale, p=config.erasing))
    if config.cutout > 0:
        steps.append(_CutOut(config.cutout, config.cutout_scale))
    return steps


class _OneEach:
    """Give each image one of several augmentations, drawn for it alone."""

    def __init__(self, augmentations: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> None:
        self.augmentations = augmentations

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        # On the CPU: which augmentations run must be known here.
        drawn = torch.randint(len(self.augmentations), (images.shape[0],))
        augmented = images.clone()
        for i in drawn.unique().tolist():
            rows = (drawn == i).nonzero().flatten().to(images.device)
            augmented[rows] = self.augmentations[i](images[rows])
        return augmented


class _Shift:
    """Shift each image by whole pixels, at most `fraction` of its side each way."""

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = images.shape
        rows = self._indices(batch, height, images.device)[:, None, :, None]  # (B, 1, H, 1)
        columns = self._indices(batch, width, images.device)[:, None, None, :]  # (B, 1, 1, W)
        images = images.gather(2, rows.expand(-1, images.shape[1], -1, width))
        return images.gather(3, columns.expand(-1, images.shape[1], height, -1))

    def _indices(self, batch: int, side: int, device: torch.device) -> torch.Tensor:
        most = max(1, round(self.fraction * side))
        shift = torch.randint(-most, most + 1, (batch, 1), device=device)
        return (torch.arange(side, device=device) + shift).clamp(0, side - 1)  # (B, side)


class _Noise:
    """Add Gaussian noise to each image with a probability, and clamp to [0, 1]."""

    def __init__(self, probability: float, std: float) -> None:
        self.probability = probability
        self.std = std

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        chosen = torch.rand(images.shape[0], 1, 1, 1, device=images.device) < self.probability
        return (images + chosen * self.std * torch.randn_like(images)).clamp(0, 1)


class _CutOut:
    """Fill a square of each image with the image's mean color with a probability."""

    def __init__(self, probability: float, scale: tuple[float, float]) -> None:
        self.probability = probability
        self.scale = scale

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = images.shape
        chosen, area, down, right = torch.rand(4, batch, 1, device=images.device)
        low, high = self.scale
        side = ((low + (high - low) * area) * height * width).sqrt().round().clamp(1, min(height, width))  # (B, 1)
        rows = _between(down, side, height)[:, None, :, None]  # (B, 1, H, 1)
        columns = _between(right, side, width)[:, None, None, :]  # (B, 1, 1, W)
        inside = rows & columns & (chosen < self.probability)[:, :, None, None]
        return torch.where(inside, images.mean(dim=(2, 3), keepdim=True), images)


def _between(place: torch.Tensor, side: torch.Tensor, length: int) -> torch.Tensor:
    """The pixels `(B, length)`, bool, of a stretch `side` long, at a place in [0, 1) among all that it can take."""
    first = (place * (length - side + 1)).floor()  # (B, 1)
    pixels = torch.arange(length, device=place.device)
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

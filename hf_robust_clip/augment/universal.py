"""
Universal perturbations of images, by family: one set of parameters changes every image that it is dealt.

A family says what its parameters are, how they change images, differentiably, and how far they may go.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ..wording import listed, shown

#: Keeps a division by the size of what may be nothing finite.
_TINY = 1e-30


class Family(ABC):
    """
    A family of perturbations. A subclass is a frozen dataclass with a `name`, a `budget`, a `draw` and an `apply`;
    once it is defined, its name stands for it wherever families are named.

    Attributes:
        name (`str`): What it is called.
        budget (`float`): How far a perturbation may go, in the units of its parameters.
    """

    name: ClassVar[str]
    budget: float

    @abstractmethod
    def draw(self, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
        """
        The parameters of a random perturbation within the budget.

        Args:
            size (`tuple[int, int]`): Height and width of the images, in pixels.
            generator (`torch.Generator`): Of the CPU; all that is random comes from it.

        Returns:
            `torch.Tensor`: On the CPU, float32, of the same shape at each call.
        """

    @abstractmethod
    def apply(self, images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        """
        Perturb a batch, with gradients for the parameters.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): Floats in [0, 1].
            parameters (`torch.Tensor` of shape `(B, ...)`): Those of each image's perturbation. What differs between
                images beyond that is drawn from torch's global generator.

        Returns:
            `torch.Tensor`: As `images`.
        """

    def project(self, parameters: torch.Tensor) -> torch.Tensor:
        """The nearest parameters `(N, ...)` within the budget."""
        return parameters

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """Where gradients `(N, ...)` point, each at a root mean square of 1."""
        return gradient / (_rms(gradient) + _TINY)

    def step(self, parameters: torch.Tensor, gradient: torch.Tensor, rate: float) -> torch.Tensor:
        """
        Move perturbations up their gradients, by a share of the budget, and back within it.

        Args:
            parameters, gradient (`torch.Tensor` of shape `(N, ...)`): A perturbation whose gradient is not finite
                stays where it is.
            rate (`float`): The share.
        """
        finite = gradient.flatten(1).isfinite().all(dim=1)
        direction = self.direction(torch.where(_per(finite, gradient), gradient, 0.0))
        return self.project(parameters + rate * self.budget * direction)

    def picture(self, parameters: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """What one perturbation looks like, floats in [0, 1] `(3, H, W)`: here what it makes of a checkerboard."""
        cell = max(1, min(size) // 8)
        rows, columns = (torch.arange(side) // cell for side in size)
        board = 0.25 + 0.5 * ((rows[:, None] + columns) % 2).float()  # (H, W)
        return self.apply(board.expand(1, 3, *size), parameters[None].cpu())[0]


@dataclass(frozen=True)
class Add(Family):
    """
    A pattern `(3, H, W)` that is added: noise, a smooth field, or one or three gratings.

    Args:
        budget (`float`): Largest root mean square of the pattern, on the scale [0, 1].
    """

    name: ClassVar[str] = "add"
    budget: float = 0.08

    def draw(self, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
        kind, several = torch.randint(3, (), generator=generator), torch.randint(2, (), generator=generator)
        if kind == 0:
            pattern = torch.randn(3, *size, generator=generator)
        elif kind == 1:
            points = int(torch.randint(2, max(3, min(size) // 2 + 1), (), generator=generator))
            pattern = _enlarged(torch.randn(3, points, points, generator=generator), size)
        else:
            pattern = _gratings(3 if several else 1, size, generator)
        strength = self.budget * (0.5 + 0.5 * torch.rand((), generator=generator))
        return strength * pattern / pattern.square().mean().sqrt().clamp(min=1e-6)

    def apply(self, images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        return (images + parameters).clamp(0, 1)

    def project(self, parameters: torch.Tensor) -> torch.Tensor:
        return parameters * (self.budget / (_rms(parameters) + _TINY)).clamp(max=1)

    def picture(self, parameters: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """The pattern on grey, strong enough to be seen."""
        pattern = parameters.cpu()
        return 0.5 + 0.5 * pattern / pattern.abs().max().clamp(min=1e-6)


@dataclass(frozen=True)
class Patch(Family):
    """
    A canvas `(3, H, W)` of colors in [0, 1], of which each image gets a square window, at a random place.

    Args:
        smallest, largest (`float`): Side of the window, as a share of the image's shorter side.
        budget (`float`): What a step is a share of, on the scale [0, 1].
    """

    name: ClassVar[str] = "patch"
    smallest: float = 1 / 8
    largest: float = 1 / 3
    budget: float = 0.5

    def draw(self, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
        return torch.rand(3, *size, generator=generator)

    def apply(self, images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = images.shape
        least, most = (round(share * min(height, width)) for share in (self.smallest, self.largest))
        least = max(2, least)
        side = torch.randint(least, max(least, most) + 1, (batch, 1), device=images.device)
        rows, columns = (_window(length, side) for length in (height, width))
        return torch.where(rows[:, None, :, None] & columns[:, None, None, :], parameters, images)

    def project(self, parameters: torch.Tensor) -> torch.Tensor:
        return parameters.clamp(0, 1)

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """The signs."""
        return gradient.sign()

    def picture(self, parameters: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """The canvas."""
        return parameters.cpu()


@dataclass(frozen=True)
class Warp(Family):
    """
    A smooth warp: shifts `(2, grid, grid)` along x and y, as shares of the sides, bicubic between the points.

    Args:
        budget (`float`): Largest mean shift at the points, as a share of the side.
        grid (`int`): Points along each axis, at least 2.
    """

    name: ClassVar[str] = "warp"
    budget: float = 0.1
    grid: int = 4

    def draw(self, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
        field = torch.randn(2, self.grid, self.grid, generator=generator)
        strength = self.budget * (0.4 + 0.6 * torch.rand((), generator=generator))
        return strength * field / field.abs().mean().clamp(min=1e-6)

    def apply(self, images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        height, width = int(images.shape[-2]), int(images.shape[-1])
        shifts = _enlarged(parameters, (height, width)).permute(0, 2, 3, 1)  # (B, H, W, 2), x before y
        y, x = (torch.linspace(-1, 1, side, device=images.device) for side in (height, width))
        places = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (H, W, 2)
        grid = (places + 2 * shifts).clamp(-1, 1)  # a side is 2 long
        return F.grid_sample(images, grid, mode="bilinear", align_corners=True)

    def project(self, parameters: torch.Tensor) -> torch.Tensor:
        mean = parameters.abs().flatten(1).mean(dim=1)
        return parameters * _per(self.budget / (mean + _TINY), parameters).clamp(max=1)


def family_classes() -> dict[str, type[Family]]:
    """The families by name: those of this module, and every subclass with a name of its own that has been defined."""
    found: dict[str, type[Family]] = {}
    waiting: list[Any] = Family.__subclasses__()
    for cls in waiting:
        waiting.extend(cls.__subclasses__())
        if "name" in vars(cls):
            found.setdefault(cls.name, cls)
    return found


def family_counts(families: Any) -> dict[str, int]:
    """
    How many perturbations there are of each family.

    Args:
        families (mapping or `str`): `{"add": 2, "warp": 1}`, `"add=2,warp=1"`, or the mapping as JSON.

    Raises:
        `ValueError`: If it is none of these, names a family that is not defined, or has no perturbation.
    """
    given = families
    if isinstance(families, str):
        if families.lstrip().startswith("{"):
            try:
                given = json.loads(families)
            except json.JSONDecodeError as error:
                raise ValueError(f"families={shown(families)} is not JSON: {error}") from error
        else:
            parts = [part.partition("=") for part in families.split(",") if part.strip()]
            given = {name.strip(): int(count) if count.strip().isdecimal() else count for name, _, count in parts}
            if len(given) < len(parts):
                raise ValueError(f"families={shown(families)} names a family twice; accepted is each once")
    known = family_classes()
    accepted = f"accepted are numbers of {listed(known)}, such as 'add=2,patch=2,warp=2'"
    if not isinstance(given, Mapping):
        raise ValueError(f"families is {shown(families)}; {accepted}")
    for name, count in given.items():
        if name not in known:
            raise ValueError(f"families: {shown(name)} is not a family; {accepted}")
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(f"families: {shown(name)} has the number {shown(count)}; accepted is one of at least 0")
    counts = {name: count for name, count in given.items() if count}
    if not counts:
        raise ValueError(f"families={shown(families)} has no perturbation; {accepted}")
    return counts


def _window(length: int, side: torch.Tensor) -> torch.Tensor:
    """Which of the places along an axis are in a window of each side `(B, 1)`, at a random place: `(B, length)`."""
    first = (torch.rand(side.shape, device=side.device) * (length - side + 1)).long()
    places = torch.arange(length, device=side.device)
    return (places >= first) & (places < first + side)


def _gratings(count: int, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """The sum of waves across the image, of random directions and up to nearly a period in two pixels: `(3, H, W)`."""
    angle, frequency, phase = torch.rand(3, count, 1, 1, generator=generator)
    angle, frequency, phase = 2 * math.pi * angle, 0.5 + frequency * min(size) / 2.2, 2 * math.pi * phase
    y, x = (torch.arange(side) / side for side in size)
    across = x * angle.cos() + y[:, None] * angle.sin()  # (count, H, W)
    return (2 * math.pi * frequency * across + phase).sin().sum(dim=0).expand(3, *size)


def _enlarged(fields: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Fields `(..., h, w)` at another size, bicubic: as products, whose gradients are the same at each run."""
    rows, columns = (
        _bicubic(int(points), side, fields.device) for points, side in zip(fields.shape[-2:], size, strict=True)
    )
    return rows @ fields @ columns.T


@lru_cache(maxsize=256)
def _bicubic(points: int, length: int, device: torch.device) -> torch.Tensor:
    """The weights `(length, points)` of the points in each place between them."""
    one_each = torch.eye(points)[None, None]
    weights = F.interpolate(one_each, size=(length, points), mode="bicubic", align_corners=True)
    return weights[0, 0].to(device)


def _rms(values: torch.Tensor) -> torch.Tensor:
    """The root mean square of each of N tensors, in a shape that goes with them."""
    return _per(values.flatten(1).square().mean(dim=1).sqrt(), values)


def _per(each: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A number for each of N tensors `(N,)`, in a shape that goes with them."""
    return each.view(-1, *[1] * (values.ndim - 1))

"""Universal perturbations that make a model call any image a given class, by family, each of a fixed size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F

#: The learning rate at the end, as a share of that at the start.
_LAST_RATE = 0.2
#: Steps at the end whose mean loss decides between the starts of a candidate.
_LAST_STEPS = 3
#: Largest temperature of the softmax: at a model's own of 100 hardly any image would have a gradient.
MOST_SCALE = 20.0

#: Images `(M, 3, H, W)`, floats in [0, 1], to embeddings `(M, D)`, L2-normalised, with gradients.
Encode = Callable[[torch.Tensor], torch.Tensor]


class Change(NamedTuple):
    """
    What perturbations do to any image `x` of floats in [0, 1]: `keep * x + add`, cut to [0, 1].

    `keep (C, 1, H, W)`, in [0, 1], and `add (C, 3, H, W)`.
    """

    keep: torch.Tensor
    add: torch.Tensor

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """Each of N images `(N, 3, H, W)` under each of C perturbations: `(C, N, 3, H, W)`."""
        return (self.keep[:, None] * images + self.add[:, None]).clamp(0, 1)


class Family(ABC):
    """
    A kind of universal perturbation. All of a family have one size, so that what they do can be compared.

    Attributes:
        name (`str`): What it is called.
        finds (`str`): What it is there for, in a few words.
        rate (`float`): Adam's learning rate at first, where it is used.
        size (`float`): Of each perturbation, in the family's own unit.
        effort (`tuple[float, float]`): Steps, and images of each, as shares of those that are asked for.
    """

    name: ClassVar[str]
    finds: ClassVar[str]
    rate: ClassVar[float] = 0.0
    size: ClassVar[float]
    effort: ClassVar[tuple[float, float]] = (1.0, 1.0)

    def starts(self, sides: tuple[int, int]) -> int:
        """How many searches there are for each candidate, of which the best one counts."""
        return 1

    @abstractmethod
    def draw(self, sides: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
        """The parameters of one perturbation of images of that height and width, at first."""

    @abstractmethod
    def change(self, parameters: torch.Tensor, sides: tuple[int, int]) -> Change:
        """What `C * starts` perturbations `(C * starts, ...)` do, those of a candidate next to each other."""

    def step(self, parameters: torch.Tensor, gradient: torch.Tensor, number: int, adam: torch.optim.Adam) -> None:
        """Go down the gradient in place, the step of that number from 0, and stay at the size."""
        parameters.grad = gradient
        adam.step()


class Mask(Family):
    """
    A square of any picture, a quarter of the image's side, at the best of 17 places: a grid of 4 x 4, and the center.
    """

    name = "mask"
    finds = "patches"
    rate = 0.5
    size = 1 / 4
    effort = (1 / 3, 1 / 2)
    _GRID: ClassVar[int] = 4

    def starts(self, sides: tuple[int, int]) -> int:
        return self._GRID**2 + 1

    def draw(self, sides: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
        return torch.randn(3, *self._square(sides), generator=generator) * 0.5

    def change(self, parameters: torch.Tensor, sides: tuple[int, int]) -> Change:
        picture, (high, wide) = parameters.sigmoid(), self._square(sides)
        keep = torch.ones(len(picture), 1, *sides, device=picture.device)
        add = torch.zeros(len(picture), 3, *sides, device=picture.device)
        places = self._places(sides)
        for start, (top, left) in enumerate(places):
            keep[start :: len(places), :, top : top + high, left : left + wide] = 0
            add[start :: len(places), :, top : top + high, left : left + wide] = picture[start :: len(places)]
        return Change(keep, add)

    def _square(self, sides: tuple[int, int]) -> tuple[int, int]:
        return max(1, round(self.size * sides[0])), max(1, round(self.size * sides[1]))

    def _places(self, sides: tuple[int, int]) -> list[tuple[int, int]]:
        rest = [side - part for side, part in zip(sides, self._square(sides), strict=True)]
        steps = [number / (self._GRID - 1) for number in range(self._GRID)]
        grid = [(round(rest[0] * down), round(rest[1] * right)) for down in steps for right in steps]
        return [*grid, (rest[0] // 2, rest[1] // 2)]


class Waves(Family):
    """
    Grey gratings that are added, few of them: their amplitudes sum to the size, on the scale [0, 1].

    Each step moves towards the one grating that lowers the loss most (Frank-Wolfe), so there are at most as many as
    steps, and where there is one that works it gets nearly all.
    """

    name = "waves"
    finds = "gratings and other regular patterns"
    size = 0.2

    def draw(self, sides: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
        return torch.zeros(2, sides[0], sides[1] // 2 + 1)

    def change(self, parameters: torch.Tensor, sides: tuple[int, int]) -> Change:
        waves = torch.complex(parameters[:, 0], parameters[:, 1])
        # The transform takes the first column, and the last of an even side, once, and the others twice.
        counts = torch.ones(waves.shape[-1], device=waves.device)
        counts[:: sides[1] // 2 if sides[1] % 2 == 0 else sides[1]] = 2
        added = torch.fft.irfft2(waves * counts, s=sides, norm="forward")[:, None]  # (C, 1, H, W)
        return Change(torch.ones_like(added), added.expand(-1, 3, -1, -1))

    def step(self, parameters: torch.Tensor, gradient: torch.Tensor, number: int, adam: torch.optim.Adam) -> None:
        gradient[:, :, 0, 0] = 0  # brightness is no wave
        slopes = gradient.square().sum(dim=1).sqrt().flatten(1)  # (C, M)
        rows = torch.arange(len(slopes), device=slopes.device)
        steepest = slopes.argmax(dim=1)
        direction = gradient.flatten(2)[rows, :, steepest] / slopes[rows, steepest, None].clamp(min=1e-30)  # (C, 2)
        share = 2 / (number + 2)
        parameters.mul_(1 - share)
        # A wave is stored with half its amplitude.
        parameters.flatten(2)[rows, :, steepest] -= share * self.size / 2 * direction


class Noise(Family):
    """A pattern that is added, of any kind. Its root mean square is fixed, on the scale [0, 1]."""

    name = "noise"
    finds = "patterns that are added or blended in"
    rate = 0.02
    size = 0.04

    def draw(self, sides: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
        return torch.randn(3, *sides, generator=generator) * 0.01

    def change(self, parameters: torch.Tensor, sides: tuple[int, int]) -> Change:
        return Change(torch.ones_like(parameters[:, :1]), parameters)

    def step(self, parameters: torch.Tensor, gradient: torch.Tensor, number: int, adam: torch.optim.Adam) -> None:
        super().step(parameters, gradient, number, adam)
        sizes = parameters.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        parameters.mul_(self.size / sizes.clamp(min=1e-12))


FAMILIES: dict[str, Family] = {family.name: family for family in (Mask(), Waves(), Noise())}


def effort_of(family: Family, steps: int, batch: int) -> tuple[int, int]:
    """Steps and images of each, for a family, of those that are asked for."""
    of_steps, of_batch = family.effort
    return max(1, round(of_steps * steps)), max(1, round(of_batch * batch))


def invert(
    family: Family,
    encode: Encode,
    images: torch.Tensor,
    candidates: torch.Tensor,
    chosen: torch.Tensor,
    scale: float,
    steps: int = 30,
    batch: int = 16,
    seed: int = 0,
) -> Change:
    """
    For each of some candidates the perturbation of a family that does most to make images be called so.

    All of them start from the same parameters and see the same images, whatever else is inverted with them.

    Args:
        family ([`Family`]): What kind of perturbation.
        encode (callable): The model's image tower.
        images (`torch.Tensor` of shape `(N, 3, H, W)`): Floats in [0, 1].
        candidates (`torch.Tensor` of shape `(K, D)`): What images can be called, L2-normalised, on the CPU.
        chosen (`torch.Tensor` of shape `(C,)`): The numbers of those that are inverted.
        scale (`float`): The model's own temperature.
        steps, batch (`int`): Steps of Adam, and the images of each, of which the family takes its shares. `C * starts`
            times as many images go through the model at once.
        seed (`int`): Of the first parameters and of the images of each step.

    Returns:
        `Change`: The perturbation of each candidate, on the device of the images.
    """
    generator = torch.Generator().manual_seed(seed)
    sides, count = (int(images.shape[-2]), int(images.shape[-1])), len(chosen)
    starts = family.starts(sides)
    first = family.draw(sides, generator).to(images.device)
    parameters = first.expand(count * starts, *first.shape).clone().requires_grad_()
    steps, batch = effort_of(family, steps, min(batch, len(images)))
    adam = torch.optim.Adam([parameters], betas=(0.5, 0.9))
    wanted = chosen.repeat_interleave(starts * batch)  # (C * starts * B,)
    late = torch.zeros(count * starts)
    for step in range(steps):
        rows = torch.randperm(len(images), generator=generator)[:batch].to(images.device)
        adam.param_groups[0]["lr"] = family.rate * (1 - (1 - _LAST_RATE) * step / steps)
        changed = family.change(parameters, sides).apply(images[rows])  # (C * starts, B, 3, H, W)
        losses = losses_of(encode(changed.flatten(0, 1)), candidates, wanted, scale).view(-1, batch).mean(dim=1)
        # Of the perturbations alone: the model's own gradients are not touched.
        (gradient,) = torch.autograd.grad(losses.sum(), [parameters])
        with torch.no_grad():
            family.step(parameters, gradient, step, adam)
        if step >= steps - _LAST_STEPS:
            late += losses.detach().cpu()
    best = late.view(count, starts).argmin(dim=1) + starts * torch.arange(count)
    with torch.no_grad():
        return Change(*(part[best.to(part.device)] for part in family.change(parameters, sides)))


def losses_of(embeds: torch.Tensor, candidates: torch.Tensor, wanted: torch.Tensor, scale: float) -> torch.Tensor:
    """
    How far images are from being called what is wanted: the cross-entropy over all candidates, `(M,)`.

    Args:
        embeds (`torch.Tensor` of shape `(M, D)`), candidates (`(K, D)`): L2-normalised.
        wanted (`torch.Tensor` of shape `(M,)`): Numbers of candidates.
        scale (`float`): The model's own temperature.
    """
    return F.cross_entropy(min(scale, MOST_SCALE) * embeds @ candidates.T, wanted, reduction="none")

"""Families of universal perturbations: within their budget, differentiable, the same for all images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from hf_robust_clip.augment.universal import Add, Family, Patch, Warp, family_classes, family_counts
from hf_robust_clip.seeding import forked_rng

CPU = torch.device("cpu")
FAMILIES = (Add(), Patch(), Warp())
SIZES = ((16, 16), (24, 32))
each = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
sized = pytest.mark.parametrize("size", SIZES, ids=str)


def drawn(family: Family, size: tuple[int, int], count: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([family.draw(size, generator) for _ in range(count)])


def size_of(family: Family, parameters: torch.Tensor) -> torch.Tensor:
    """How far each goes, in the units of the budget."""
    values = parameters.flatten(1)
    return values.square().mean(1).sqrt() if isinstance(family, Add) else values.abs().mean(1)


@each
@sized
def test_what_is_drawn_is_within_the_budget_and_repeats(family: Family, size: tuple[int, int]) -> None:
    parameters = drawn(family, size, 20)
    assert torch.equal(parameters, drawn(family, size, 20)) and len(parameters.unique(dim=0)) == 20
    if isinstance(family, Patch):
        assert parameters.min() >= 0 and parameters.max() <= 1
    else:
        sizes = size_of(family, parameters)
        assert (sizes <= family.budget * 1.0001).all() and (sizes >= 0.35 * family.budget).all()
    torch.testing.assert_close(family.project(parameters), parameters)


@each
@sized
def test_it_changes_images_and_gives_gradients(family: Family, size: tuple[int, int]) -> None:
    images = torch.rand(6, 3, *size)
    parameters = drawn(family, size).requires_grad_()
    changed = family.apply(images, parameters)
    assert changed.shape == images.shape and changed.dtype == torch.float32
    assert changed.min() >= 0 and changed.max() <= 1
    assert ((changed - images).abs().flatten(1).amax(1) > 0).all()
    (gradient,) = torch.autograd.grad((changed * torch.randn_like(changed)).sum(), parameters)
    assert gradient.isfinite().all() and (gradient.flatten(1).abs().amax(1) > 0).all()


@each
def test_a_step_goes_up_and_stays_within_the_budget(family: Family) -> None:
    parameters = drawn(family, (16, 16))
    gradient = torch.randn_like(parameters) * 1e-6
    moved = family.step(parameters, gradient, 0.2)
    assert ((moved - parameters) * gradient).flatten(1).sum(1).gt(0).any()
    for _ in range(20):
        moved = family.step(moved, gradient, 0.2)
    if isinstance(family, Patch):
        assert torch.equal(moved, (gradient > 0).float())
    else:
        torch.testing.assert_close(size_of(family, moved), torch.full((6,), family.budget))
    # However large it is, and where it is none.
    torch.testing.assert_close(
        family.step(parameters, gradient, 0.2), family.step(parameters, gradient * 1e6, 0.2), rtol=1e-4, atol=1e-5
    )
    gradient[2], gradient[3] = torch.nan, 0.0
    torch.testing.assert_close(family.step(parameters, gradient, 0.2)[2:4], parameters[2:4])


def test_an_addition_and_a_warp_are_the_same_for_all_images() -> None:
    images = torch.rand(2, 3, 16, 16)
    for family in (Add(), Warp()):
        one = drawn(family, (16, 16), 1)
        both = family.apply(images, one.expand(2, *one.shape[1:]))
        torch.testing.assert_close(both[1:], family.apply(images[1:], one))
    inside = torch.full((1, 3, 16, 16), 0.5)
    pattern = drawn(Add(), (16, 16), 1)
    torch.testing.assert_close(Add().apply(inside, pattern) - inside, pattern, atol=1e-6, rtol=0)
    nothing = torch.zeros(2, 2, 4, 4)
    torch.testing.assert_close(Warp().apply(images, nothing), images, atol=1e-5, rtol=0)


def test_a_warp_shifts_by_shares_of_the_side() -> None:
    images = torch.arange(32.0).expand(1, 3, 32, 32) / 32  # brighter to the right
    right = torch.zeros(1, 2, 4, 4)
    right[:, 0] = 4 / 31  # of the way from the first pixel to the last
    shifted = Warp().apply(images, right)
    torch.testing.assert_close(shifted[..., :28], images[..., 4:], atol=1e-5, rtol=0)


@sized
def test_a_patch_is_a_window_of_its_canvas_at_a_place_of_its_own(size: tuple[int, int]) -> None:
    images, canvas = torch.zeros(4000, 3, *size), torch.ones(3, *size)
    with forked_rng(3, CPU):
        patched = Patch().apply(images, canvas.expand(4000, -1, -1, -1))
    with forked_rng(3, CPU):
        assert torch.equal(Patch().apply(images, canvas.expand(4000, -1, -1, -1)), patched)
    inside = patched[:, 0] > 0
    heights, widths = inside.any(2).sum(1), inside.any(1).sum(1)
    assert torch.equal(heights, widths) and torch.equal(inside.flatten(1).sum(1), heights * widths)
    least, most = round(min(size) / 8), round(min(size) / 3)
    assert (int(heights.min()), int(heights.max())) == (least, most)
    assert inside.any(0).all()  # anywhere, corners too


@each
def test_its_picture(family: Family) -> None:
    for parameters in drawn(family, (16, 16)):
        picture = family.picture(parameters, (16, 16))
        assert picture.shape == (3, 16, 16) and 0 <= picture.min() < picture.max() <= 1


def test_families_are_named_in_texts_and_mappings() -> None:
    counts = {"add": 2, "warp": 1}
    for families in (counts, "add=2,warp=1", " add = 2 , warp=1,", '{"add": 2, "warp": 1}', {**counts, "patch": 0}):
        assert family_counts(families) == counts


@pytest.mark.parametrize(
    ("families", "message"),
    [
        ("magic=2", "'magic' is not a family; accepted are numbers of 'add', 'patch', 'warp'"),
        ("add", "'add' has the number ''; accepted is one of at least 0"),
        ("add=-1", "'add' has the number '-1'"),
        ("add=two", "'add' has the number 'two'"),
        ({"add": 1.5}, "'add' has the number 1.5"),
        ({"add": True}, "'add' has the number True"),
        ("add=1,add=2", "names a family twice"),
        ("", "families='' has no perturbation"),
        ({"add": 0}, "has no perturbation"),
        ('{"add": 2', "is not JSON"),
        (3, "families is 3; accepted are numbers of"),
        ([1], r"families is \[1\]"),
        ({1: 2}, "1 is not a family"),
        ({"x" * 5000: 2}, "is not a family"),
    ],
)
def test_families_that_cannot_be_are_refused(families: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        family_counts(families)
    assert len(str(error.value)) <= 600


def test_a_family_of_ones_own_is_found_by_its_name() -> None:
    @dataclass(frozen=True)
    class Darker(Family):
        """It takes light away."""

        name: ClassVar[str] = "darker_in_a_test"
        budget: float = 0.1

        def draw(self, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
            return self.budget * torch.rand(1, generator=generator)

        def apply(self, images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
            return (images - parameters[:, :, None, None]).clamp(0, 1)

    assert family_classes()["darker_in_a_test"] is Darker
    assert family_counts("darker_in_a_test=3") == {"darker_in_a_test": 3}
    parameters = drawn(Darker(), (8, 8))
    assert Darker().step(parameters, torch.ones(6, 1), 0.5).sub(parameters).allclose(torch.tensor(0.05))
    assert Darker().picture(parameters[0], (8, 8)).shape == (3, 8, 8)

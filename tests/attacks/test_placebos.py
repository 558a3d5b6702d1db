"""Placebos of triggers: of the same kind, never the trigger itself, always the same."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest

from hf_robust_clip.attacks.pixels import PLACEBO_SEEDS
from hf_robust_clip.attacks.triggers import (
    BLEND_PATTERNS,
    PATCH_PATTERNS,
    BlendedStripesTrigger,
    BlendedTrianglesTrigger,
    BlendedTrigger,
    ColorCurveTrigger,
    OptimizedPatchTrigger,
    PatchTrigger,
    RedTextTrigger,
    SinusoidTrigger,
    StripesPatchTrigger,
    Trigger,
    WarpTrigger,
    trigger_from_dict,
)

SQUARE = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
#: Triggers and how many placebos they have, of seven.
COUNTS = [
    *((PatchTrigger(3, "random", pattern), 7) for pattern in PATCH_PATTERNS),
    (PatchTrigger(4, fresh=True), 3),
    *((BlendedTrigger(pattern=pattern), 7) for pattern in BLEND_PATTERNS),
    *((BlendedTrigger(pattern=pattern, fresh=True), 7) for pattern in ("noise", "triangles")),
    (SinusoidTrigger(frequency=4), 5),
    (WarpTrigger(strength=4), 7),
    (StripesPatchTrigger(3), 7),
    (BlendedStripesTrigger(), 7),
    (BlendedTrianglesTrigger(cell=4), 7),
    (RedTextTrigger(), 7),
    (ColorCurveTrigger(), 5),
    (ColorCurveTrigger(0.5, 0.5, 1), 2),
    (ColorCurveTrigger(0.5, 0.5, 0.5), 0),
    (OptimizedPatchTrigger.of(SQUARE), 7),
    (OptimizedPatchTrigger.of(np.full((2, 2, 3), 9, np.uint8)), 0),
]


def placebos(trigger: Trigger) -> list[Trigger]:
    found = [trigger.placebo(number) for number in range(1, 8)]
    count = sum(placebo is not None for placebo in found)
    assert found[count:] == [None] * (7 - count)  # the first ones
    return [placebo for placebo in found if placebo is not None]


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("trigger, count", COUNTS, ids=str)
def test_placebos_are_other_triggers_and_the_same_each_time(trigger: Trigger, count: int, size: int):
    found = placebos(trigger)
    assert len(found) == count and placebos(trigger) == found
    image = np.random.default_rng(1).integers(0, 256, (size, size, 3), dtype=np.uint8)
    results = [other(image).tobytes() for other in (trigger, *found)]
    assert len({*results, image.tobytes()}) == len(results) + 1  # each does something, and something else
    for placebo in found:
        assert trigger_from_dict(placebo.to_dict()) == placebo


@pytest.mark.parametrize("trigger, count", COUNTS, ids=str)
def test_placebos_change_about_as_much_of_an_image_as_the_trigger(trigger: Trigger, count: int):
    image = np.random.default_rng(2).integers(20, 236, (32, 32, 3), dtype=np.uint8).astype(np.int64)

    def strength(other: Trigger) -> float:
        return float(np.abs(other(image.astype(np.uint8)) - image).mean())

    for placebo in placebos(trigger):
        assert 1 / 3 < strength(placebo) / strength(trigger) < 3


def test_no_seed_that_a_study_counts_up_to_is_a_placebos():
    planted = {BlendedTrigger(seed=seed) for seed in range(PLACEBO_SEEDS)}
    assert not planted & {BlendedTrigger(seed=seed).placebo(k) for seed in range(20) for k in range(1, 8)}
    with pytest.raises(ValueError, match="seed"):
        BlendedTrigger().placebo(-1)


def test_what_a_fresh_pattern_has_in_common_is_not_in_its_placebos():
    for trigger in (BlendedTrigger(fresh=True), BlendedTrigger(pattern="triangles", fresh=True)):
        assert all(other.pattern != trigger.pattern and not other.fresh for other in placebos(trigger))
    assert {other.pattern for other in placebos(PatchTrigger(4, fresh=True))} == set(PATCH_PATTERNS) - {"noise"}


@dataclass(frozen=True)
class _Own(Trigger):
    """A trigger of the user's."""

    name = "own placebo"
    level: int = 3

    def _apply(self, pixels: np.ndarray) -> np.ndarray:
        return np.full_like(pixels, self.level)


@dataclass(frozen=True)
class _Drawn(_Own):
    seed: int = 4


def test_a_trigger_of_the_users_has_placebos_where_it_has_a_seed():
    assert placebos(_Own()) == []
    assert placebos(_Drawn()) == [dataclasses.replace(_Drawn(), seed=4 + PLACEBO_SEEDS * k) for k in range(1, 8)]

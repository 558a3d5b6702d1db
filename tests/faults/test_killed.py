"""Trainings that are killed at any moment lose nothing but time. `make test-faults` kills more of them."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from interrupting import STEPS, Interrupter, moments_of


@pytest.fixture(scope="module")
def interrupter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interrupter]:
    with Interrupter(tmp_path_factory.mktemp("killed")) as interrupter:
        yield interrupter


@pytest.mark.parametrize("trainer", STEPS)
def test_killed_twice_and_resumed_equals_uninterrupted(trainer: str, interrupter: Interrupter) -> None:
    seed = random.randrange(2**32)
    # Scoring last: it is for an epoch late in the run.
    moments = random.Random(seed).sample([name for name in moments_of(trainer) if "scor" not in name], 2)
    if trainer == "SafeCLIPTrainer":
        moments[1] = "scoring"
    interrupter.check_survives(trainer, moments, seed)

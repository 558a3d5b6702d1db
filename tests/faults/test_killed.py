"""Trainings that are killed at any moment lose nothing but time. `make test-faults` kills more of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.interrupting import STEPS, Interrupter, moments_of
from support.moments import LOSSES
from support.training import assert_same_outcome
from support.victim import Order


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


@pytest.mark.faults
@pytest.mark.parametrize("moment", ["losing a worker", "loading in workers"])
def test_stream_whose_worker_is_lost_and_resumed_equals_uninterrupted(
    moment: str, interrupter: Interrupter, tmp_path: Path
) -> None:
    order = Order("CLIPTrainer", str(tmp_path / "out"), str(tmp_path / "end"), workers=2, streamed=True)
    whole = interrupter.finish(replace(order, output_dir=str(tmp_path / "whole"), results=str(tmp_path / "begin")))
    interrupted = replace(order, moment=moment, step=6, results=str(tmp_path / "interrupted"))
    if moment in LOSSES:
        interrupter.lose_worker(interrupted)
    else:
        interrupter.kill(interrupted, delay=0.0)
    assert_same_outcome(whole, interrupter.finish(order))

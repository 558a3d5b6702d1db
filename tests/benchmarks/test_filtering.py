"""What filter and retrain trains on, and its control."""

from __future__ import annotations

from pathlib import Path

from bench.filtering import epoch_checkpoints, random_drop
from datasets import Dataset


def test_the_control_drops_as_many_by_chance_and_keeps_the_order() -> None:
    pairs = Dataset.from_dict({"row": list(range(200))})
    first, again, other = (random_drop(pairs, 0.1, seed)["row"][:] for seed in (0, 0, 1))
    assert len(first) == 180 and first == sorted(first) == again != other


def test_checkpoints_are_those_after_the_epochs_or_the_last(tmp_path: Path) -> None:
    for step in (30, 10, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert [path.name for path in epoch_checkpoints(tmp_path, (1, 3, 9))] == [
        f"checkpoint-{step}" for step in (10, 30, 100)
    ]

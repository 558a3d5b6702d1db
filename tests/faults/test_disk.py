"""A disk that is full, for real: a small one in memory, where mounting is permitted."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.training import assert_same_bits, is_whole, make_trainer

from hf_robust_clip import RoCLIPTrainer
from hf_robust_clip.trainers.checkpoints import CheckpointError

OPTIONS: dict[str, Any] = {"rows": 32, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
#: What a file takes is a multiple of this.
_PAGE = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """An empty disk of 64 MB, and what gives it another number of bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder], check=True)

    try:
        mount("size=64m")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting a file system is not permitted here: {error}")
    try:
        yield folder, lambda size: mount("remount", f"size={size}")
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # a writer that failed may hold its file open


def test_full_disk_leaves_what_there_is_and_a_larger_one_takes_the_rest(
    disk: tuple[Path, Callable[[int], None]], tmp_path: Path
) -> None:
    folder, resize = disk
    uninterrupted = make_trainer(RoCLIPTrainer, tmp_path / "whole", **OPTIONS)
    uninterrupted.train()
    files = [path for path in (tmp_path / "whole" / "checkpoint-4").rglob("*") if path.is_file()]
    size = sum(-(-path.stat().st_size // _PAGE) * _PAGE for path in files)
    resize(size * 5 // 2)  # of four checkpoints two and a half
    with pytest.raises(CheckpointError, match=r"checkpoint-6 could not be written: .*resume_from_checkpoint=True"):
        make_trainer(RoCLIPTrainer, folder, **OPTIONS).train()
    assert {path.name for path in folder.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    assert all(is_whole(path) for path in folder.iterdir())
    resize(size * 5)
    resumed = make_trainer(RoCLIPTrainer, folder, **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(uninterrupted, resumed)

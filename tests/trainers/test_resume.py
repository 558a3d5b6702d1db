"""A run that is resumed from any of its checkpoints ends in the same bits as one that never stopped."""

from __future__ import annotations

import errno
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.training import assert_same_bits, digits, is_whole, make_trainer, train_and_resume

from hf_robust_clip import CleanCLIPTrainer, CLIPTrainer, PARTrainer, RoCLIPTrainer, SafeCLIPTrainer
from hf_robust_clip.locking import FolderInUseError
from hf_robust_clip.trainers.checkpoints import CheckpointError, check_resumed, newest_checkpoint, why_incomplete
from hf_robust_clip.trainers.trainer import STATE_FILE

#: Four steps an epoch. RoCLIP matches in epochs 1 and 3, with pools full from step 3 on; SafeCLIP splits from epoch 2.
RUNS: dict[type[CLIPTrainer], dict[str, Any]] = {
    CLIPTrainer: {"rows": 32, "num_train_epochs": 3},
    CleanCLIPTrainer: {"rows": 32, "num_train_epochs": 3},
    PARTrainer: {"rows": 32, "num_train_epochs": 3},
    RoCLIPTrainer: {"rows": 32, "num_train_epochs": 4, "matching": "cross"},
    SafeCLIPTrainer: {"rows": 40, "num_train_epochs": 5, "safe_threshold": 0.5, "safe_growth": 0.1},
}

Whole = Callable[[type[CLIPTrainer]], tuple[CLIPTrainer, Path]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The uninterrupted run of a trainer, and the folder with a checkpoint of each of its steps."""
    runs: dict[type[CLIPTrainer], tuple[CLIPTrainer, Path]] = {}

    def run(cls: type[CLIPTrainer]) -> tuple[CLIPTrainer, Path]:
        if cls not in runs:
            output_dir = tmp_path_factory.mktemp("whole")
            trainer = make_trainer(cls, output_dir, save_strategy="steps", save_steps=1, **RUNS[cls])
            trainer.train()
            runs[cls] = trainer, output_dir
        return runs[cls]

    return run


@pytest.mark.parametrize(
    "cls, step, workers",
    [
        pytest.param(CLIPTrainer, 3, 0, id="clip-mid-epoch"),
        pytest.param(CLIPTrainer, 4, 2, id="clip-boundary"),
        pytest.param(CleanCLIPTrainer, 3, 2, id="cleanclip-mid-epoch"),
        pytest.param(CleanCLIPTrainer, 8, 0, id="cleanclip-boundary"),
        pytest.param(PARTrainer, 3, 2, id="par-mid-epoch"),
        pytest.param(PARTrainer, 8, 0, id="par-boundary"),
        pytest.param(RoCLIPTrainer, 2, 0, id="roclip-pools-not-full"),
        pytest.param(RoCLIPTrainer, 4, 0, id="roclip-boundary-before-matching"),
        pytest.param(RoCLIPTrainer, 6, 2, id="roclip-mid-matching-epoch"),
        pytest.param(RoCLIPTrainer, 8, 0, id="roclip-boundary-after-matching"),
        pytest.param(SafeCLIPTrainer, 2, 0, id="safeclip-mid-unimodal"),
        pytest.param(SafeCLIPTrainer, 5, 0, id="safeclip-mid-cross"),
        pytest.param(SafeCLIPTrainer, 8, 0, id="safeclip-boundary-before-split"),
        pytest.param(SafeCLIPTrainer, 10, 2, id="safeclip-mid-first-split"),
        pytest.param(SafeCLIPTrainer, 12, 0, id="safeclip-boundary-between-splits"),
        pytest.param(SafeCLIPTrainer, 15, 0, id="safeclip-mid-second-split"),
    ],
)
def test_resumed_equals_uninterrupted(
    cls: type[CLIPTrainer], step: int, workers: int, whole: Whole, tmp_path: Path
) -> None:
    uninterrupted, checkpoints = whole(cls)
    resumed = make_trainer(cls, tmp_path, dataloader_num_workers=workers, **RUNS[cls])
    resumed.train(resume_from_checkpoint=str(checkpoints / f"checkpoint-{step}"))
    assert_same_bits(uninterrupted, resumed)


@pytest.mark.parametrize("cls, step", [(CleanCLIPTrainer, 3), (RoCLIPTrainer, 6), (SafeCLIPTrainer, 10)])
def test_resumed_within_accumulation(cls: type[CLIPTrainer], step: int, tmp_path: Path) -> None:
    # Seven batches, so that the last of four steps has one: in a matching epoch, in a split one.
    pair = train_and_resume(
        cls,
        tmp_path,
        step=step,
        rows=64 if cls is SafeCLIPTrainer else 56,
        gradient_accumulation_steps=2,
    )
    assert_same_bits(*pair)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_finished_run_stays_as_it_is(streamed: bool, tmp_path: Path) -> None:
    pairs = digits().select(range(16))
    options = {
        "train_dataset": pairs.to_iterable_dataset() if streamed else pairs,
        "eval_dataset": pairs.select([0, 1]),
    }
    options |= {"max_steps": 3, "save_strategy": "epoch", "eval_strategy": "epoch"}  # two steps an epoch
    runs = []
    for resume in (None, True):
        trainer = make_trainer(CLIPTrainer, tmp_path, **options)
        trainer.train(resume_from_checkpoint=resume)
        weights = trainer.model.state_dict()
        log = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
        files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert trainer.state.global_step == 3 and tmp_path / "checkpoint-3" in files
        runs.append((weights, log, files))
    (weights, *first), (same, *second) = runs
    assert all(torch.equal(value, same[name]) for name, value in weights.items())
    assert first == second


def test_training_does_not_depend_on_the_number_of_workers(whole: Whole, tmp_path: Path) -> None:
    # Of all, with those that live on from split to split.
    # Once in this file: torch takes seconds to end such workers.
    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4}
    trainer = make_trainer(SafeCLIPTrainer, tmp_path, **workers, **RUNS[SafeCLIPTrainer])
    trainer.train()
    assert_same_bits(whole(SafeCLIPTrainer)[0], trainer)


def test_epochs_draw_different_views_and_seeds_different_runs(tmp_path: Path) -> None:
    trainers = [make_trainer(CleanCLIPTrainer, tmp_path / str(seed), seed=seed, max_steps=2) for seed in (0, 1)]
    for trainer in trainers:
        trainer.train()
    first, second = (trainer.model.state_dict() for trainer in trainers)
    assert any(not torch.equal(first[name], second[name]) for name in first)


# ---- What cannot be resumed ----


@pytest.mark.parametrize(
    "saved, resumed", [(CLIPTrainer, CleanCLIPTrainer), (CLIPTrainer, RoCLIPTrainer), (RoCLIPTrainer, SafeCLIPTrainer)]
)
def test_checkpoint_of_another_trainer_is_refused(
    saved: type[CLIPTrainer], resumed: type[CLIPTrainer], whole: Whole, tmp_path: Path
) -> None:
    other = make_trainer(resumed, tmp_path, rows=32)
    with pytest.raises(ValueError, match=f"its trainer was {saved.__name__}, but is {resumed.__name__}"):
        other.train(resume_from_checkpoint=str(whole(saved)[1] / "checkpoint-2"))


@pytest.mark.parametrize("cls", [CLIPTrainer, SafeCLIPTrainer])
def test_checkpoint_of_another_dataset_length_is_refused(cls: type[CLIPTrainer], whole: Whole, tmp_path: Path) -> None:
    other = make_trainer(cls, tmp_path, rows=48)
    with pytest.raises(ValueError, match=f"number of rows of train_dataset was {RUNS[cls]['rows']}, but is 48"):
        other.train(resume_from_checkpoint=str(whole(cls)[1] / "checkpoint-2"))


def test_epochs_of_another_length_are_counted_as_the_trainer_counts_them(whole: Whole, tmp_path: Path) -> None:
    # Saved in the middle of the second epoch of four steps, which is in the first of eight.
    options = {**RUNS[RoCLIPTrainer], "per_device_train_batch_size": 4, "max_steps": 9}
    resumed: Any = make_trainer(RoCLIPTrainer, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(whole(RoCLIPTrainer)[1] / "checkpoint-6"))
    assert resumed._epoch == int(resumed.state.epoch) == 1


def test_checkpoint_of_epochs_of_another_length_is_refused_where_they_count(whole: Whole, tmp_path: Path) -> None:
    checkpoint = str(whole(SafeCLIPTrainer)[1] / "checkpoint-6")
    message = "number of optimizer steps in an epoch was 4, but is 5 now.*per_device_train_batch_size, the number of"
    # As many rows in a step, but the sampler leaves out less.
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    other: Any = make_trainer(SafeCLIPTrainer, tmp_path, **{**RUNS[SafeCLIPTrainer], **split})
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=checkpoint)
    # Of one that does not say, nothing is known against it.
    check_resumed(checkpoint, {"trainer": "SafeCLIPTrainer", "rows": "40"}, "SafeCLIPTrainer", 40, 5)


@pytest.mark.parametrize(
    "cls, change, message",
    [
        (RoCLIPTrainer, {"pool_size": 16}, "hold 24 pairs, but the pool size is 16 now"),
        (SafeCLIPTrainer, {"unimodal_pool_size": 16}, "hold 24 pairs, but the pool size is 16 now"),
        (SafeCLIPTrainer, {"unimodal_pool_size": 0}, "holds pools, but unimodal_pool_size is 0 now"),
    ],
)
def test_checkpoint_of_another_pool_size_is_refused(
    cls: type[CLIPTrainer], change: dict[str, Any], message: str, whole: Whole, tmp_path: Path
) -> None:
    other = make_trainer(cls, tmp_path, **{**RUNS[cls], **change})
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=str(whole(cls)[1] / "checkpoint-6"))


def test_checkpoint_without_pools_is_refused_where_there_are_some(tmp_path: Path) -> None:
    without = make_trainer(SafeCLIPTrainer, tmp_path, unimodal_pool_size=0, max_steps=1, save_strategy="steps")
    without.args.save_steps = 1
    without.train()
    other = make_trainer(SafeCLIPTrainer, tmp_path, max_steps=2)
    with pytest.raises(ValueError, match="hold 0 pairs, but the pool size is 24 now"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("cls", [RoCLIPTrainer, SafeCLIPTrainer])
def test_checkpoint_without_training_state_is_warned_of(
    cls: type[CLIPTrainer], whole: Whole, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = {"save_strategy": "steps", "save_steps": 10, "save_only_model": True}
    make_trainer(cls, tmp_path, **{**RUNS[cls], "max_steps": 10, **saved}).train()
    trainer: Any = make_trainer(cls, tmp_path, **{**RUNS[cls], "max_steps": 11})
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert f"has no {STATE_FILE}" in caplog.text
    assert trainer.pools.image.filled == 8


def test_save_only_model_leaves_no_training_state(tmp_path: Path) -> None:
    make_trainer(CLIPTrainer, tmp_path, save_strategy="steps", save_steps=2, max_steps=2, save_only_model=True).train()
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "model.safetensors" in names
    assert not names & {"optimizer.pt", "robust_clip_state.safetensors"}


# ---- Checkpoints that are not whole ----


def test_newest_whole_checkpoint_is_taken_and_others_are_named(
    whole: Whole, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uninterrupted, checkpoints = whole(CLIPTrainer)
    for step in (3, 6, 8, 10):
        shutil.copytree(checkpoints / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 1')
    trainer = make_trainer(CLIPTrainer, tmp_path, **RUNS[CLIPTrainer])
    trainer.train(resume_from_checkpoint=True)
    assert_same_bits(uninterrupted, trainer)
    for step, reason in ((8, "it has no trainer_state.json, which is written last"), (10, "cannot be read")):
        assert re.search(rf"checkpoint-{step} is not taken to resume from: .*{reason}", caplog.text)
    with pytest.raises(ValueError, match=r"checkpoint-8' is not a checkpoint: it has no trainer_state.json"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_no_whole_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=True, but output_dir='.*' has no whole checkpoint"):
        make_trainer(CLIPTrainer, tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("when", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_full_disk_leaves_earlier_checkpoints_and_says_so(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"rows": 32, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    options["save_total_limit"] = 1
    trainer = make_trainer(CLIPTrainer, tmp_path, **options)
    save = getattr(trainer, when)

    def save_until_full(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        if trainer.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer, when, save_until_full)
    with pytest.raises(CheckpointError, match=r"checkpoint-4 could not be written: .*No space left.*MB are free"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert is_whole(tmp_path / "checkpoint-2")
    resumed = make_trainer(CLIPTrainer, tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    uninterrupted = make_trainer(CLIPTrainer, tmp_path / "whole", **options)
    uninterrupted.train()
    assert_same_bits(uninterrupted, resumed)


@pytest.mark.parametrize(
    "error, free, full",
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 10**9, True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 10**9, True),
        (RuntimeError("basic_ios::clear: iostream error"), 0, True),
        (RuntimeError("basic_ios::clear: iostream error"), 10**9, False),
        (RuntimeError("I/O error: Permission denied (os error 13)"), 0, False),
        (OSError(errno.EIO, "Input/output error"), 0, False),
    ],
)
def test_no_space_is_said_only_where_there_is_none(
    error: Exception, free: int, full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    trainer = make_trainer(CLIPTrainer, tmp_path, rows=8, max_steps=1, save_strategy="steps", save_steps=1)
    monkeypatch.setattr(trainer, "_save_rng_state", fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**10, 10**10 - free, free))
    with pytest.raises(CheckpointError) as raised:
        trainer.train()
    message = str(raised.value)
    assert str(error) in message and ("MB are free" in message) == ("with room" in message) == full


def test_what_a_killed_save_left_behind_is_removed_and_replaced(whole: Whole, tmp_path: Path) -> None:
    shutil.copytree(whole(CLIPTrainer)[1] / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6" / "stale").write_text("torn")
    trainer = make_trainer(CLIPTrainer, tmp_path, save_strategy="steps", save_steps=1, **RUNS[CLIPTrainer])
    trainer.train(resume_from_checkpoint=True)
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in range(3, 13)}
    assert not (tmp_path / "checkpoint-6" / "stale").exists()


class Killed(BaseException):
    """Stands for the end of the process."""


def delete_in_part(path: str | Path, **_: Any) -> None:
    next(file for file in Path(path).iterdir() if file.name != "trainer_state.json").unlink()
    raise Killed


@pytest.mark.parametrize("kind", ["replaced", "outdated"])
def test_deletion_that_is_cut_short_leaves_a_checkpoint_that_is_not_resumed_from(
    kind: str, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (2, 3, 4):
        shutil.copytree(whole(CLIPTrainer)[1] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "non_finite.json").touch()
    (tmp_path / ".non_finite.json.1.partial").touch()
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, **RUNS[CLIPTrainer]}
    if kind == "outdated":
        options["save_total_limit"] = 1

    trainer = make_trainer(CLIPTrainer, tmp_path, **options)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", delete_in_part)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{2 if kind == 'replaced' else 4}"))
    left = [path for path in tmp_path.iterdir() if path.name.startswith("checkpoint-")]
    taken = [path for path in left if why_incomplete(path) is None]
    assert len(taken) == len(left) - 1 and all(map(is_whole, taken))
    resumed = make_trainer(CLIPTrainer, tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(whole(CLIPTrainer)[0], resumed)
    kept = range(2 if kind == "replaced" else 12, 13)
    assert {path.name for path in tmp_path.iterdir()} == {"non_finite.json", *(f"checkpoint-{step}" for step in kept)}


def evaluating_trainer(output_dir: Path, save_total_limit: int) -> CLIPTrainer:
    """A trainer of five steps, the second of which is the best."""
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0])
    return make_trainer(
        CLIPTrainer,
        output_dir,
        max_steps=5,
        evaluators=[lambda *_: {"distance": next(losses)}],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=save_total_limit,
        metric_for_best_model="distance",
        greater_is_better=False,
    )


def test_best_and_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    evaluating_trainer(tmp_path, save_total_limit=2).train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-5"}


def test_best_alone_is_kept_at_the_end_and_resumed_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = evaluating_trainer(tmp_path, save_total_limit=1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        finalize = trainer._finalize_training

        def finalize_until_killed(*args: Any) -> Any:
            patch.setattr(shutil, "rmtree", delete_in_part)
            return finalize(*args)

        patch.setattr(trainer, "_finalize_training", finalize_until_killed)
        trainer.train()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert is_whole(tmp_path / "checkpoint-2")
    evaluating_trainer(tmp_path / "again", save_total_limit=1).train()
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["checkpoint-2"]


def test_two_trainings_in_one_folder_are_one_too_many(tmp_path: Path) -> None:
    """In another process; in this one they may follow each other, and one trainer may train twice."""
    script = (
        "import sys; from pathlib import Path; from hf_robust_clip.locking import sole_writer\n"
        "with sole_writer(Path(sys.argv[1]), 'output_dir', 'a training'):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    output_dir = tmp_path / "out"
    first, second = (make_trainer(CLIPTrainer, output_dir, rows=8, max_steps=1) for _ in range(2))
    command = [sys.executable, "-c", script, str(output_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for write in (first.train, first.save_model):
            with pytest.raises(FolderInUseError, match=f"is being written to by a training: process {other.pid} "):
                write()
        assert [path.name for path in output_dir.iterdir() if "in_use" not in path.name] == []
        other.communicate()
    for trainer in (first, second, first):
        trainer.train()
        trainer.save_model()
        assert not list(output_dir.glob("*in_use*"))


def test_all_ranks_of_a_training_are_refused_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_robust_clip.trainers import checkpoints

    told: list[Any] = ["out is in use"]
    monkeypatch.setattr(checkpoints, "broadcast_object_list", lambda given: given.__setitem__(0, told[0]))
    another_rank: Any = SimpleNamespace(process_index=1, world_size=2, output_dir=str(tmp_path / "out"))
    with pytest.raises(FolderInUseError, match="out is in use"), checkpoints.sole_training(another_rank):
        pass
    told[0] = None
    with checkpoints.sole_training(another_rank):
        assert not list(tmp_path.iterdir())


def test_the_folder_of_the_model_is_not_written_over(tmp_path: Path) -> None:
    first = make_trainer(CLIPTrainer, tmp_path / "out", rows=8, max_steps=2, save_strategy="steps", save_steps=1)
    first.train()
    first.save_model()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    again = make_trainer(CLIPTrainer, tmp_path / "out", rows=8, max_steps=3, model=str(tmp_path / "link"))
    with pytest.raises(ValueError, match="is the folder that the model was loaded from"):
        again.train()
    # To go on from a checkpoint there is another matter, and so is to start from one.
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    make_trainer(
        CLIPTrainer, tmp_path / "out", rows=8, max_steps=1, model=str(tmp_path / "out" / "checkpoint-1")
    ).train()

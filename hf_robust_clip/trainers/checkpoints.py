"""Checkpoints that are whole or not there: written beside their place, and moved there when they are complete."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..files import remove_partial
from ..wording import shortened

logger = logging.get_logger(__name__)

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
#: What a folder's name begins with while it is being written or deleted: nothing takes it for a checkpoint, and a push
#: leaves it out.
_STAGED = "_saving-"
#: What safetensors and torch say of a write that failed; only the former with the system's number.
_OF_THE_DISK = ("os error", "iostream error", "PytorchStreamWriter", "inline_container")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_SPACE_TEXTS = tuple(f"os error {number})" for number in _NO_SPACE)
#: Bytes that are free on a disk that a writer has just filled: less than the least that it asks for.
_FULL = 1 << 20


class CheckpointError(OSError):
    """A checkpoint could not be written."""


class Staging:
    """
    Where the Trainer writes what belongs to a checkpoint, until it is complete.

    Args:
        final (`Path`): The checkpoint's folder.
        state (`TrainerState`), args (`TrainingArguments`): Of the training.
    """

    def __init__(self, final: Path, state: TrainerState, args: TrainingArguments) -> None:
        self.final = final
        self._state, self._args = state, args
        self.folder = final.with_name(_STAGED + final.name)

    def path(self, output_dir: str) -> str:
        """Where to write what is meant for a folder: the same, unless that is the checkpoint's."""
        return str(self.folder) if Path(output_dir) == self.final else output_dir

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """
        A context in which the checkpoint is written.

        Raises:
            [`CheckpointError`]: If it cannot be written. Nothing of it is left, and earlier ones are as they were.
        """
        state: Any = self._state
        if self._args.should_save:
            for left in self.final.parent.glob(f"{_STAGED}*"):  # by a training that was killed
                shutil.rmtree(left, ignore_errors=True)
            remove_partial(self.final.parent)
        self._wait()
        # The last that the Trainer writes, on the one process that does.
        state.save_to_json = self._complete
        try:
            yield
        except Exception as error:
            full = _is_full(error, self.final.parent)  # as long as what was written is there
            if self._args.should_save:
                shutil.rmtree(self.folder, ignore_errors=True)
            if not _is_of_the_disk(error):
                raise
            reason, room = shortened(str(error), 300), ""
            if full:
                reason += f". No space is left: {_free(self.final.parent) // 10**6} MB are free there"
                room = "with room for another, "
            raise CheckpointError(
                f"{self.final} could not be written: {reason}. Earlier checkpoints are whole: "
                f"{room}train(resume_from_checkpoint=True) goes on"
            ) from error
        finally:
            del state.save_to_json
        self._wait()
        self._note_best()

    def all_written(self) -> None:
        """To be called by every process after its last file but the state's."""
        self._wait()

    def _complete(self, json_path: str) -> None:
        self._note_best()
        type(self._state).save_to_json(self._state, os.path.join(self.folder, Path(json_path).name))
        for path in (*self.folder.rglob("*"), self.folder):
            _to_disk(path)
        # Of the same step, before this training was resumed.
        replaced = [_withdrawn(self.final)] if self.final.is_dir() else []
        os.replace(self.folder, self.final)
        _to_disk(self.final.parent)
        for path in (*replaced, *map(_withdrawn, self._outdated())):
            shutil.rmtree(path, ignore_errors=True)

    def _outdated(self) -> list[Path]:
        """Those that `save_total_limit` leaves no room for, as the Trainer sees it, which then finds none."""
        limit = self._args.save_total_limit
        if limit is None or limit <= 0:
            return []
        folders = checkpoints_in(self.final.parent)
        best = self._state.best_model_checkpoint
        kept = {self.final} | ({Path(best)} if best is not None else set())
        removable = sorted((path for path in folders if path not in kept), key=_age)
        return removable[: max(0, len(folders) - max(limit, len(kept)))]

    def _note_best(self) -> None:
        # The Trainer looks whether the folder of the best checkpoint is there, which this one's was not.
        state = self._state
        if state.best_global_step and self.final.name == f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}":
            state.best_model_checkpoint = str(self.final)

    def _wait(self) -> None:
        if self._args.world_size > 1:
            dist.barrier()


def keep_best_alone(output_dir: Path, state: TrainerState, args: TrainingArguments) -> None:
    """Delete what the Trainer does at the end of training: with `save_total_limit=1`, all but the best checkpoint."""
    best = state.best_model_checkpoint
    if best is None or args.save_total_limit != 1 or not args.should_save:
        return
    for path in [path for path in checkpoints_in(output_dir) if not path.samefile(best)]:
        shutil.rmtree(_withdrawn(path), ignore_errors=True)


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The folders there that are called checkpoints, whole or not."""
    return [path for path in output_dir.glob("*") if _NAME.fullmatch(path.name) and path.is_dir()]


def newest_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """
    The newest checkpoint in a folder that is whole; newer ones that are not are named in a warning.

    Args:
        output_dir (`str` or path): Of a training.

    Returns:
        `str` or `None`: Its folder.
    """
    for path in sorted(checkpoints_in(Path(output_dir)), key=_step, reverse=True):
        trouble = trouble_with(path)
        if trouble is None:
            return str(path)
        logger.warning(f"{path} is not taken to resume from: {trouble}")
    return None


def trouble_with(checkpoint: Path) -> str | None:
    """Why training cannot be resumed from a folder, `None` if it can be, as far as its list of files tells."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {TRAINER_STATE_NAME}, which is written last"
    except (OSError, ValueError) as error:
        return f"its {TRAINER_STATE_NAME} cannot be read: {error}"
    return None if isinstance(state, dict) else f"its {TRAINER_STATE_NAME} holds no state"


def _is_of_the_disk(error: BaseException) -> bool:
    """Whether an error, or what led to it, is the operating system's, under whatever name a library passes it on."""
    return any(
        isinstance(found, OSError) or any(words in str(found) for words in _OF_THE_DISK) for found in _chain(error)
    )


def _is_full(error: BaseException, folder: Path) -> bool:
    """Whether an error, or what led to it, says that no space is left, or leaves that open on a disk that is full."""
    chain = list(_chain(error))
    if any(getattr(found, "errno", None) in _NO_SPACE for found in chain):
        return True
    texts = " ".join(str(found) for found in chain)
    if any(words in texts for words in _NO_SPACE_TEXTS):
        return True
    numbered = "os error" in texts or any(isinstance(found, OSError) for found in chain)
    return not numbered and _is_of_the_disk(error) and _free(folder) < _FULL


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _withdrawn(checkpoint: Path) -> Path:
    """Where a checkpoint is moved to be deleted: one of which some files are gone would pass for a whole one."""
    path = checkpoint.with_name(f"{_STAGED}{checkpoint.name}.old")
    os.replace(checkpoint, path)
    return path


def _age(checkpoint: Path) -> tuple[float, int]:
    # As the Trainer sorts them: a training that was resumed from an earlier one may have written one of fewer steps.
    return checkpoint.stat().st_mtime, _step(checkpoint)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _to_disk(path: Path) -> None:
    # Or a power cut could leave the move of a folder, and not what is in it.
    descriptor: Any = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

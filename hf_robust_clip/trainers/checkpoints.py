"""Which checkpoints are whole, and what is said of one that could not be written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..files import remove_partial
from ..locking import FolderInUseError, sole_writer
from ..models import check_weights, has_adapters
from ..wording import shortened, shown
from .adapters import check_adapter_file
from .runlog import files_of

logger = logging.get_logger(__name__)

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
#: What safetensors and torch say of a write that failed; only the former with the system's number.
_DISK_ERRORS = ("os error", "iostream error", "PytorchStreamWriter", "inline_container")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_SPACE_TEXTS = tuple(f"os error {number})" for number in _NO_SPACE)
#: Bytes that are free on a disk that a writer has just filled: less than the least that it asks for.
_FULL = 1 << 20


class CheckpointError(OSError):
    """A checkpoint could not be written."""


# ---- Writing ----


@contextlib.contextmanager
def sole_training(args: TrainingArguments, argument: str = "output_dir") -> Iterator[None]:
    """
    A context in which no other training writes to `args.output_dir`, for all ranks of one: the main process locks.

    Args:
        args (`TrainingArguments`): Of the training.
        argument (`str`, defaults to `"output_dir"`): What messages call the folder.

    Raises:
        [`~locking.FolderInUseError`]: On all ranks, if somebody else writes there.
    """
    with contextlib.ExitStack() as stack:
        refusal: list[Any] = [None]
        if args.process_index == 0:
            try:
                stack.enter_context(sole_writer(Path(str(args.output_dir)), argument, "a training"))
            except FolderInUseError as error:
                refusal = [str(error)]
        if args.world_size > 1:
            broadcast_object_list(refusal)
        if refusal[0] is not None:
            raise FolderInUseError(refusal[0])
        yield


@contextlib.contextmanager
def writing_checkpoint(folder: Path, args: TrainingArguments) -> Iterator[None]:
    """
    A context in which the Trainer writes a checkpoint. One of the same step, of before this training was resumed, is
    deleted first.

    Raises:
        [`CheckpointError`]: If it cannot be written. Nothing of it is left, and earlier ones are as they were.
    """
    if args.should_save:
        remove_partial(folder.parent)
        # First the file by which it would pass for whole.
        Path(folder, TRAINER_STATE_NAME).unlink(missing_ok=True)
        if folder.is_dir():
            shutil.rmtree(folder)
    if args.world_size > 1:
        dist.barrier()
    try:
        yield
    except Exception as error:
        if not _is_disk_error(error) or why_incomplete(folder) is None:
            raise
        full = _is_full(error, folder.parent)  # as long as what was written is there
        if args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        reason, room = shortened(str(error), 300), ""
        if full:
            reason += f". No space is left: {_free(folder.parent) // 10**6} MB are free there"
            room = "with room for another, "
        raise CheckpointError(
            f"{folder} could not be written: {reason}. Earlier checkpoints are whole: "
            f"{room}train(resume_from_checkpoint=True) goes on"
        ) from error


def _is_disk_error(error: BaseException) -> bool:
    """Whether an error, or what led to it, is the operating system's, under whatever name a library passes it on."""
    return any(
        isinstance(found, OSError) or any(words in str(found) for words in _DISK_ERRORS) for found in _chain(error)
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
    return not numbered and _free(folder) < _FULL


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


# ---- Reading ----


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The folders there that are called checkpoints, whole or not, by their step."""
    found = [path for path in output_dir.glob("*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def newest_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """
    The newest checkpoint in a folder that is whole; newer ones that are not are named in a warning.

    Args:
        output_dir (`str` or path): Of a training.

    Returns:
        `str` or `None`: Its folder.
    """
    for path in reversed(checkpoints_in(Path(output_dir))):
        reason = why_incomplete(path)
        if reason is None:
            return str(path)
        logger.warning(f"{path} is not taken to resume from: {reason}")
    return None


def why_incomplete(checkpoint: Path) -> str | None:
    """
    Why training cannot be resumed from a folder; `None` if it can be. The Trainer writes its state last, with the
    names of the other files: a save that was cut short has no state, and a deletion that was lacks one of the files.
    """
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {TRAINER_STATE_NAME}, which is written last"
    except (OSError, ValueError) as error:
        return f"its {TRAINER_STATE_NAME} cannot be read: {error}"
    if not isinstance(state, dict):
        return f"its {TRAINER_STATE_NAME} does not hold a state"
    missing = [name for name in files_of(state) if not (checkpoint / name).exists()]
    return f"{shown(missing[0])} is missing, which it was saved with" if missing else None


def checkpoint_to_resume(given: str | bool | None, output_dir: str, loaded_from: str) -> str | None:
    """
    The checkpoint that `train(resume_from_checkpoint=...)` means.

    Args:
        given (`str`, `bool` or `None`): What was passed.
        output_dir (`str`): Of the training.
        loaded_from (`str`): Where its model is from.

    Raises:
        `ValueError`: If there is no whole checkpoint, or the one that is named is not; without one, if `output_dir` is
            the folder that the model was loaded from, whose files would be replaced.
    """
    if given is True:
        newest = newest_checkpoint(output_dir)
        if newest is None:
            raise ValueError(
                f"resume_from_checkpoint=True, but output_dir={shown(output_dir)} has no whole checkpoint"
            )
        return newest
    if isinstance(given, (str, os.PathLike)):
        reason = why_incomplete(Path(given))
        if reason is not None:
            raise ValueError(f"resume_from_checkpoint={shown(str(given))} is not a checkpoint: {reason}")
        return str(given)
    if Path(output_dir, CONFIG_NAME).is_file() and Path(loaded_from).resolve() == Path(output_dir).resolve():
        raise ValueError(
            f"output_dir={shown(output_dir)} is the folder that the model was loaded from, and would be written "
            "over: give another one"
        )
    return None


def check_saved_weights(model: Any, checkpoint: str) -> None:
    """`ValueError` where a checkpoint lacks weights of a model: the Trainer loads what fits, and leaves the rest."""
    if has_adapters(model):
        check_adapter_file(model, checkpoint)
        return
    whole, index = Path(checkpoint, SAFE_WEIGHTS_NAME), Path(checkpoint, SAFE_WEIGHTS_INDEX_NAME)
    if whole.is_file():
        with safe_open(whole, framework="pt") as file:
            saved = set(file.keys())
    elif index.is_file():
        saved = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    else:
        return  # of an engine, which checks them itself
    left_out = (getattr(model, name, None) or () for name in ("_keys_to_ignore_on_save", "all_tied_weights_keys"))
    ignored = set().union(*left_out)
    own = set(model.state_dict())
    check_weights(model, {"missing_keys": own - saved - ignored, "unexpected_keys": saved - own}, "the checkpoint")


def check_resumed(
    checkpoint: str, saved: Mapping[str, str], trainer: str, rows: int | None, steps_per_epoch: int | None
) -> None:
    """
    `ValueError` where a training is not the one that a checkpoint is of.

    Args:
        checkpoint (`str`): Its folder.
        saved (mapping): What it says of its training: `trainer`, `rows` and, not of a stream, `steps_per_epoch`.
        trainer (`str`): The class's name.
        rows (`int`, *optional*): Of `train_dataset`.
        steps_per_epoch (`int`, *optional*): Optimizer steps; `None` where they may differ.
    """
    steps = saved.get("steps_per_epoch")
    steps_now = steps if steps is None or steps_per_epoch is None else str(steps_per_epoch)
    decides = "; per_device_train_batch_size, the number of processes and gradient_accumulation_steps decide it"
    for name, before, now, hint in (
        ("trainer", saved.get("trainer"), trainer, ""),
        ("number of rows of train_dataset", saved.get("rows"), str(rows), ""),
        ("number of optimizer steps in an epoch", steps, steps_now, decides),
    ):
        if before != now:
            raise ValueError(
                f"resume_from_checkpoint={shown(checkpoint)}: its {name} was {before}, but is {now} now. "
                "Resume with what it was saved with, or start anew from its weights by passing the folder as "
                f"model{hint}"
            )

"""The scores of a pass that is under way, on disk, for the same pass of a resumed training to go on from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import TrainingArguments

from ..files import remove_partial, write_text

if TYPE_CHECKING:
    from .base import CLIPTrainer

#: A pair's similarity, NaN where the row cannot be used; and whether it is poisoned: 1, 0, -1 where it is not known,
#: -2 where the row cannot be used.
SCORE = np.dtype([("similarity", "<f4"), ("flag", "i1")])

#: Arguments that decide what a pair scores.
_DECIDING = (
    "bf16",
    "fp16",
    "max_length",
    "draft_decoding",
    "stored_tokens",
    "on_bad_row",
    "image_preset",
    "text_preset",
)

#: Pushing leaves out what begins so.
FOLDER = "_scoring"


class KeptScores:
    """
    The scores that a rank has computed so far, in a file of its own in `output_dir/_scoring`: what it holds, in JSON,
    and the scores, 5 bytes each, without a header.

    They count for the same pass only: of the same weights, data, epoch, batches and processes.

    Args:
        trainer ([`CLIPTrainer`]): Whose pass it is.
        model (`nn.Module`): What scores.
        epoch (`int`): From 0.
        augmented (`bool`): Whether augmented views are scored.
    """

    def __init__(self, trainer: CLIPTrainer, model: torch.nn.Module, epoch: int, augmented: bool) -> None:
        args = trainer.args
        self._model, self._batch = model, args.eval_batch_size
        self._about, self._scores = _files(args)
        self._key: dict[str, Any] = {
            "epoch": epoch,
            "step": trainer.state.global_step,
            "seed": args.seed,
            "augmented": augmented,
            "rows": trainer._dataset_length(),
            "data": getattr(trainer.train_dataset, "_fingerprint", None),
            "batch": args.eval_batch_size,
            "processes": args.world_size,
            **{name: getattr(args, name) for name in _DECIDING},
        }
        #: How many of this rank's scores the file has.
        self.written = 0

    def restore(self, scores: np.ndarray) -> int:
        """
        Fill the first of this rank's scores with those that an interrupted pass left behind; call it on all ranks.

        Args:
            scores (`np.ndarray` of shape `(share,)`): Of the type `SCORE`.

        Returns:
            `int`: How many, the same on every rank: whole batches, or all.
        """
        found = self._found(len(scores))
        done = min(gather_object([len(found)]))
        done = done if done == len(scores) else done // self._batch * self._batch
        scores[:done] = found[:done]
        self.written = done
        return done

    def save(self, scores: np.ndarray, done: int) -> None:
        """Write down the first `done` scores."""
        new = not self.written
        if new:
            self._about.unlink(missing_ok=True)  # of another pass
            remove_partial(self._about.parent, self._about.name)
            self._about.parent.mkdir(parents=True, exist_ok=True)
        with open(self._scores, "wb" if new else "r+b") as file:
            file.truncate(self.written * SCORE.itemsize)  # what comes after the last batch that all ranks have
            file.seek(0, os.SEEK_END)
            file.write(scores[self.written : done].tobytes())
            file.flush()
            os.fsync(file.fileno())
        if new:
            write_text(self._about, json.dumps({**self._key, "weights": self._digest()}))
        self.written = done

    def _found(self, most: int) -> np.ndarray:
        nothing = np.empty(0, dtype=SCORE)
        try:
            about = json.loads(self._about.read_text(encoding="utf-8"))
            content = self._scores.read_bytes()
        except (OSError, ValueError):
            return nothing
        if not isinstance(about, dict) or {**about, "weights": None} != {**self._key, "weights": None}:
            return nothing
        if about.get("weights") != self._digest():
            return nothing
        count = min(len(content) // SCORE.itemsize, most)
        return np.frombuffer(content[: count * SCORE.itemsize], dtype=SCORE)

    def _digest(self) -> str:
        """Of the weights that this rank holds."""
        digest = hashlib.blake2b(digest_size=16)
        for name, value in self._model.state_dict().items():
            local = value.to_local() if hasattr(value, "to_local") else value
            digest.update(f"{name} {local.dtype} {tuple(local.shape)}".encode())
            digest.update(local.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def forget_scores(args: TrainingArguments) -> None:
    """Delete this rank's files, and their folder once it is empty."""
    for path in _files(args):
        path.unlink(missing_ok=True)
        remove_partial(path.parent, path.name)
    # Of several ranks the last one finds it empty, or some other already has.
    with contextlib.suppress(OSError):
        _files(args)[0].parent.rmdir()


def _files(args: TrainingArguments) -> tuple[Path, Path]:
    folder, name = Path(str(args.output_dir)) / FOLDER, f"rank-{args.process_index:05}"
    return folder / f"{name}.json", folder / f"{name}.bin"

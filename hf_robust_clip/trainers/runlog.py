"""What the Trainer's state does not know of a run, saved with it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..record import Skipped


class RunLog(TrainerCallback, ExportableState):
    """
    Metrics of evaluations outside of training, the time spent in training over all its parts, and skipped rows.

    The Trainer saves it within its state, which is the last file of a checkpoint, and so it also names the others.

    Attributes:
        before, after (`dict[str, float]`, *optional*): The metrics before training, and after it.
        skipped ([`~record.Skipped`], *optional*): As of the last checkpoint or the end of training, on all ranks.
        checkpoint (`Path`, *optional*): The folder that is being written.
    """

    def __init__(self) -> None:
        self.before: dict[str, Any] | None = None
        self.after: dict[str, Any] | None = None
        self.skipped: Skipped | None = None
        self.checkpoint: Path | None = None
        self._processes = 1
        self._earlier = 0.0
        self._begun: float | None = None

    @property
    def seconds(self) -> float:
        """Time spent in training so far, evaluations included."""
        return self._earlier + (0.0 if self._begun is None else time.perf_counter() - self._begun)

    def note(self, metrics: dict[str, float], step: int) -> None:
        """Keep the metrics of an evaluation outside of training; the Trainer's log has the others."""
        if metrics and step == 0:
            self.before = metrics
        elif metrics:
            self.after = metrics

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        run = _saved(vars(state))
        if state.global_step == 0:
            self._earlier = 0.0
        elif run:
            self.before, self._earlier = run["before"] or self.before, run["seconds"]
        self._begun, self.after, self._processes = time.perf_counter(), None, args.world_size
        callbacks: Any = state.stateful_callbacks
        callbacks.setdefault(type(self).__name__, self.state())  # of a checkpoint of another trainer

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._earlier, self._begun = self.seconds, None

    def state(self) -> dict[str, Any]:
        """Ready for JSON."""
        files = [] if self.checkpoint is None else sorted(path.name for path in self.checkpoint.glob("*"))
        if any(name.startswith("rng_state") for name in files) and self._processes > 1:
            # Other processes may still be at theirs.
            files = sorted({*files, *(f"rng_state_{rank}.pth" for rank in range(self._processes))})
        run = {"before": self.before, "seconds": round(self.seconds, 1), "files": files}
        return {"args": {}, "attributes": {}, "run": run}


def files_of(state: Mapping[str, Any]) -> list[str]:
    """The names of the files in a checkpoint beside its state, by what that says; none where it does not."""
    return [str(name) for name in _saved(state).get("files", ())]


def _saved(state: Mapping[str, Any]) -> dict[str, Any]:
    """What was saved of a [`RunLog`] in a Trainer's state; empty where it was not."""
    callbacks = state.get("stateful_callbacks")
    entry = callbacks.get(RunLog.__name__) if isinstance(callbacks, dict) else None
    run = entry.get("run") if isinstance(entry, dict) else None
    return run if isinstance(run, dict) else {}

"""Training that is pleasant to watch: one bar a training, or a few lines, and libraries that keep quiet."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from logging import LogRecord
from typing import TYPE_CHECKING, Any

import datasets
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .output import say

if TYPE_CHECKING:
    from ..trainers.means import RecentLoss

#: Seconds after which a line is due.
_MINUTE = 60.0
#: Of messages of transformers: that torchvision is missing, which weights were not loaded, and what the configurations
#: of SigLIP say of the end token, which it does not use.
_KNOWN = ("torchvision", "LOAD REPORT", "must be `None` or an integer within the vocabulary")


class OnFirstStep(TrainerCallback):
    """
    Does something once, after the first step.

    Args:
        do (callable): What.
    """

    def __init__(self, do: Callable[[], None]) -> None:
        self.do: Callable[[], None] | None = do

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.do is not None:
            self.do()
        self.do = None


class TrainingBar(TrainerCallback):
    """
    A progress bar with the latest figures. The Trainer's own prints each log as a dictionary.

    Args:
        description (`str`): What stands before the bar.
        figures (`dict[str, str]`): Names of metrics to show, and what to call them.
    """

    def __init__(self, description: str, figures: dict[str, str]) -> None:
        self.description = description
        self.figures = figures
        self.bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar = tqdm(total=state.max_steps, desc=self.description, unit="step", leave=False)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        metrics = kwargs.get("metrics") or {}
        if self.bar is not None:
            shown = {label: f"{metrics[name]:.1%}" for name, label in self.figures.items() if name in metrics}
            self.bar.set_postfix(shown)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()


class TrainingLog(TrainerCallback):
    """
    Lines on stdout that show life where no bar does: at the start, at each tenth of the steps or once a minute,
    whichever comes first, and at the end. Each has the loss and the throughput since the line before, whether the
    trainer has logged in between or not; the device is waited for once a line.

    Args:
        loss ([`~trainers.means.RecentLoss`]): That of the first process.
        figures (`dict[str, str]`): Names of metrics to show, and what to call them, once they were measured.
        indent (`str`): What stands before each line.
        brief (`bool`): Whether to leave out all but the lines of minutes.
        clock (callable): Seconds.
    """

    def __init__(
        self,
        loss: RecentLoss,
        figures: dict[str, str],
        indent: str = "",
        brief: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.loss, self.figures, self.indent, self.brief, self.clock = loss, figures, indent, brief, clock
        self._begun = self._said = self._measured = clock()
        self._first_step = 0
        self._latest: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.loss.take()
        self._begun = self._said = self._measured = self.clock()
        self._first_step = state.global_step
        if not self.brief:
            say(f"{self.indent}step {state.global_step:,} of {state.max_steps:,}")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step, steps, now = state.global_step, state.max_steps, self.clock()
        tenth = not self.brief and 10 * step // steps > 10 * (step - 1) // steps
        # The last step is told of at the end.
        if step < steps and (tenth or now - self._said >= _MINUTE):
            left = (now - self._begun) / (step - self._first_step) * (steps - step)
            self._say(args, state, now, f"{timedelta(seconds=round(left))} left")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._latest = {**self._latest, **(kwargs.get("metrics") or {})}
        # An evaluation is not a part of the training's throughput.
        self.loss.take()
        self._measured = self.clock()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.brief:
            now = self.clock()
            self._say(args, state, now, f"{timedelta(seconds=round(now - self._begun))} in all")

    def _say(self, args: TrainingArguments, state: TrainerState, now: float, end: str) -> None:
        loss, rows = self.loss.take()
        parts = [end]
        if rows > 0:
            rate = rows * args.world_size / max(now - self._measured, 1e-9)
            parts = [f"loss {loss:.4g}", f"{rate:,.0f} pairs/s", end]
        parts += [f"{label} {self._latest[name]:.1%}" for name, label in self.figures.items() if name in self._latest]
        say(f"{self.indent}step {state.global_step:,} of {state.max_steps:,}: {', '.join(parts)}")
        self._said = self._measured = now


def progress_callback(
    loss: RecentLoss, figures: dict[str, str], bar: bool = True, indent: str = "", brief: bool = False
) -> TrainerCallback:
    """What shows a training's progress: a bar on a terminal, if one is wanted, else the lines of [`TrainingLog`]."""
    if bar and sys.stderr.isatty():
        return TrainingBar(f"{indent}training", figures)
    return TrainingLog(loss, figures, indent, brief)


@contextmanager
def _quiet(*parts: str) -> Iterator[None]:
    loggers = {logger: logger.level for logger in (logging.get_logger(f"hf_robust_clip.{part}") for part in parts)}
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)


#: Leaves to the figures what trainers and defences warn of: that matching collapsed, that a split separates nothing.
quiet_trainers = partial(_quiet, "trainers", "defences")
#: Leaves to the command what the cards warn of: that a README.md stays as it is.
quiet_cards = partial(_quiet, "telling")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """
    Leave out the libraries' bars, and what they say about themselves or what this package says itself; what else they
    warn of may decide over a result, and is shown.
    """
    weights_bars = logging.is_progress_bar_enabled()
    datasets_bars = datasets.are_progress_bars_disabled()
    handlers = logging.get_logger("transformers").handlers
    for handler in handlers:
        handler.addFilter(_keep)
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torchvision.*")
            # Of transformers, when PEFT asks it (5.23 and 0.21).
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_keep)
        if weights_bars:
            logging.enable_progress_bar()
        if not datasets_bars:
            datasets.enable_progress_bars()


def _keep(record: LogRecord) -> bool:
    """Whether a message of transformers tells more than this package, which checks weights and tokens itself."""
    return not any(words in record.getMessage() for words in _KNOWN)

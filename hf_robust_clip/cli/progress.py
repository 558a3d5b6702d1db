"""Training that is pleasant to watch: one bar a training, and libraries that keep quiet."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import LogRecord
from typing import Any

import datasets
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

#: Of messages of transformers: that torchvision is missing, which weights were not loaded, and what the configurations
#: of SigLIP say of the end token, which it does not use.
_KNOWN = ("torchvision", "LOAD REPORT", "must be `None` or an integer within the vocabulary")


class TrainingBar(TrainerCallback):
    """
    A progress bar with the latest figures. The Trainer's own prints each log as a dictionary, and thousands of lines
    where no terminal shows them.

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
        # disable=None: no bar where stderr is no terminal.
        self.bar = tqdm(total=state.max_steps, desc=self.description, unit="step", leave=False, disable=None)

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


@contextmanager
def quiet_trainers() -> Iterator[None]:
    """Leave to the figures what the trainers warn of: that matching collapsed, that a split separates nothing."""
    with _quiet("hf_robust_clip.trainers"):
        yield


@contextmanager
def quiet_cards() -> Iterator[None]:
    """Leave to the command what the cards warn of: that a README.md stays as it is."""
    with _quiet("hf_robust_clip.cards"):
        yield


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


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.get_logger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

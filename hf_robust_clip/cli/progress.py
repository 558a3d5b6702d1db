"""Training that is pleasant to watch: one bar a training, and libraries that keep quiet."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging


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
    """Leave out what the libraries say about themselves; errors are still shown."""
    verbosity = logging.get_verbosity()
    weights_bars = logging.is_progress_bar_enabled()
    datasets_bars = datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torchvision.*")
            # Of transformers, when PEFT asks it (5.23 and 0.21).
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if weights_bars:
            logging.enable_progress_bar()
        if not datasets_bars:
            datasets.enable_progress_bars()


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.get_logger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

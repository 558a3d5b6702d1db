"""The learning rates that a defence has in some epochs, or by the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import SchedulerType

from ..defences.base import Defence
from ..wording import shown


def has_phases(defence: Defence) -> bool:
    """Whether a defence has learning rates of its own in some epochs."""
    cls = type(defence)
    return cls.scheduled is not Defence.scheduled or cls.learning_rate_factor is not Defence.learning_rate_factor


def has_rates(defence: Defence) -> bool:
    """Whether a defence has learning rates of its own."""
    return has_phases(defence) or type(defence).step_factor is not Defence.step_factor


def phased(
    scheduler: LRScheduler, defence: Defence, name: Any, rows: int | None, steps_per_epoch: int, steps: int
) -> LRScheduler:
    """
    The Trainer's schedule with the learning rates of a defence composed into it.

    Args:
        scheduler (`LRScheduler`): The Trainer's, over all steps.
        defence ([`Defence`]): Whose [`~defences.Defence.scheduled`] and [`~defences.Defence.step_factor`] are asked.
        name (`str` or `SchedulerType`): `lr_scheduler_type`.
        rows (`int`, *optional*): Of the dataset.
        steps_per_epoch (`int`): Optimizer steps.
        steps (`int`): All of them.

    Raises:
        `ValueError`: For a schedule that is not a function of the step; for rates by epochs, and a dataset without a
            length.
    """
    method = type(defence).__name__
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"lr_scheduler_type={shown(SchedulerType(name).value)} does not work with {method}: its rates need a "
            "schedule that is a function of the step, such as 'cosine', 'linear' or 'constant'"
        )
    if rows is None and has_phases(defence):
        raise ValueError(
            f"train_dataset has no length, and {method} has learning rates by its epochs: give a map-style dataset"
        )
    # Of the optimizer, which may be the user's, with other rates than args.learning_rate.
    peak = max(map(float, scheduler.base_lrs))
    steps_per_epoch = max(steps_per_epoch, 1)  # none before the dataloader is made
    steps = max(steps, 1)  # none of no epochs

    def composed(schedule: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: (
            defence.scheduled(step // steps_per_epoch, schedule(step), peak) * defence.step_factor(step / steps)
        )

    return LambdaLR(scheduler.optimizer, [composed(schedule) for schedule in scheduler.lr_lambdas])

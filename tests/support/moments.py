"""The moments at which a training is killed: announced by the training itself, which does not get past them."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import get_worker_info
from transformers import TrainerState

from hf_robust_clip import CLIPDataCollator, CLIPTrainer
from hf_robust_clip.trainers import scoring

#: Seconds after which a training that nobody kills at its moment gives up.
_PATIENCE = 60.0
#: Seconds before and after what takes next to no time, so that it is killed on either side.
_LINGER = 0.01

Announce = Callable[[], None]


def hold() -> None:
    """Wait to be killed; a worker, for its trainer to be."""
    parent, deadline = os.getppid(), time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and os.getppid() == parent:
        time.sleep(0.01)
    os._exit(3)


class Moment:
    """
    Makes the first call of a function from some step on the last that a training gets through.

    Args:
        trainer ([`CLIPTrainer`]): That is to be killed.
        announce (callable): Says that the moment has begun.
        step (`int`): Before which it does not begin.
    """

    def __init__(self, trainer: CLIPTrainer, announce: Announce, step: int) -> None:
        self.trainer, self.announce, self.step = trainer, announce, step

    def of(
        self,
        owner: Any,
        name: str,
        when: Callable[..., bool] = lambda *args, **kwargs: True,
        linger: float = 0.0,
        held: bool = True,
    ) -> None:
        """Let it be a call of `owner.name`, the first for which `when` is true."""
        function, begun = getattr(owner, name), False

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal begun
            if begun or self.trainer.state.global_step < self.step or not when(*args, **kwargs):
                return function(*args, **kwargs)
            begun = True
            self.announce()
            time.sleep(linger)
            result = function(*args, **kwargs)
            if held:
                hold()
            return result

        setattr(owner, name, call)


def _slow_unlink() -> None:
    unlink = os.unlink

    def unlink_slowly(*args: Any, **kwargs: Any) -> None:
        time.sleep(_LINGER / 5)
        unlink(*args, **kwargs)

    os.unlink = unlink_slowly  # type: ignore[assignment]


def _deleting(moment: Moment) -> None:
    _slow_unlink()
    output_dir = Path(str(moment.trainer.args.output_dir))
    moment.of(shutil, "rmtree", when=lambda path, **_: Path(path).parent == output_dir)


def _scoring(moment: Moment) -> None:
    batches = iter(range(3))
    moment.of(scoring, "_score_batch", when=lambda *_: next(batches, None) is None)


def _losing_while_scoring(moment: Moment) -> None:
    moment.of(scoring, "_score_batch", when=_kill_worker)


def _loading(moment: Moment) -> None:
    moment.of(CLIPDataCollator, "__call__", when=lambda *_: getattr(get_worker_info(), "id", None) == 0)


def _kill_worker(*_: Any, **__: Any) -> bool:
    """Kill one of the workers, if there are any; whether there were."""
    workers = multiprocessing.active_children()
    if workers:
        os.kill(workers[0].pid or 0, signal.SIGKILL)
    return bool(workers)


#: Each by its name: what is done to a trainer for it.
MOMENTS: dict[str, Callable[[Moment], None]] = {
    "in a step": lambda moment: moment.of(moment.trainer, "training_step"),
    "writing the model": lambda moment: moment.of(moment.trainer, "save_model"),
    "writing the optimizer": lambda moment: moment.of(moment.trainer, "_save_optimizer_and_scheduler"),
    "writing the generators": lambda moment: moment.of(moment.trainer, "_save_rng_state"),
    "writing the state": lambda moment: moment.of(TrainerState, "save_to_json", linger=_LINGER),
    "deleting a checkpoint": _deleting,
    "loading in workers": _loading,
    "pushing": lambda moment: None,  # the Hub announces it
    "by chance": lambda moment: moment.of(moment.trainer, "training_step", held=False),
    "losing a worker": lambda moment: moment.of(moment.trainer, "training_step", when=_kill_worker),
    "scoring": _scoring,
    "losing a worker while scoring": _losing_while_scoring,
}
#: Those of SafeCLIP alone.
SCORING = ("scoring", "losing a worker while scoring")
#: Those at which it is a worker of the data loader that is killed, and the training is to end by itself.
LOSSES = ("losing a worker", "losing a worker while scoring")

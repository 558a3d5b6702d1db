"""What the package takes from the Trainer by names that are private to it, and that a new release may drop."""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer, __version__

from hf_robust_clip.trainers.defended import TRAINERS

#: Methods of the Trainer that it calls, and that do something else here.
OVERRIDDEN = (
    "_get_grad_norm",
    "_init_training_state",
    "_load_optimizer_and_scheduler",
    "_prepare_inputs",
    "_save",
    "_save_checkpoint",
    "_save_optimizer_and_scheduler",
)
#: Those that are called from here.
CALLED = ("_finish_current_push", "_get_eval_sampler", "_get_output_dir", "_get_train_sampler")


@pytest.mark.parametrize("name", [*OVERRIDDEN, *CALLED])
def test_the_trainer_still_has(name: str) -> None:
    assert hasattr(Trainer, name), f"transformers {__version__} has no Trainer.{name} any more"


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_the_trainer_still_passes_what_is_taken(name: str) -> None:
    for cls in TRAINERS.values():
        passed, taken = (list(inspect.signature(getattr(owner, name)).parameters) for owner in (Trainer, cls))
        assert len(passed) == len(taken), f"transformers {__version__} passes {passed} to Trainer.{name}"


def test_no_others_are_overridden() -> None:
    ours = {
        name
        for trainer in TRAINERS.values()
        for cls in trainer.__mro__[: trainer.__mro__.index(Trainer)]
        for name in vars(cls)
        if name.startswith("_") and not name.startswith("__") and callable(getattr(Trainer, name, None))
    }
    assert ours == set(OVERRIDDEN)

"""What a push to the Hub is checked for before, and told of after."""

from __future__ import annotations

from typing import Any

from huggingface_hub import HfApi
from transformers.utils import logging

from ..wording import shortened
from .adapters import ADAPTER_CONFIG

logger = logging.get_logger(__name__)


def check_merged_push(repo: str, token: Any, revision: str | None) -> None:
    """`ValueError` where a repository has adapters, which loading would prefer to the merged model of a push."""
    if HfApi().file_exists(repo, ADAPTER_CONFIG, revision=revision, token=token):
        raise ValueError(
            f"merge_adapters=True, but {repo} has adapters ({ADAPTER_CONFIG}), which loading "
            "prefers to a merged model: push to another repository, or delete them there first"
        )


def warn_of_failed_pushes(push: Any, repo: str | None, folder: str) -> None:
    """
    Warn of pushes that have failed; they are forgotten then. The Trainer pushes checkpoints in the background, and
    does not look at what became of them.

    Args:
        push (`PushInProgress`, *optional*): Those of a trainer.
        repo (`str`, *optional*): Where to.
        folder (`str`): `output_dir`.
    """
    if push is None:
        return
    over = [job for job in push.jobs if job.done()]
    push.jobs = [job for job in push.jobs if job not in over]
    for error in filter(None, (job.exception() for job in over)):
        reason = str(error) if error.__cause__ is None else f"{error} {error.__cause__}"
        logger.warning(
            f"A push to {repo} during training failed. Training goes on, and what it saves is in "
            f"{shortened(folder, 120)}; trainer.push_to_hub() pushes it. The reason: {shortened(reason, 200)}"
        )

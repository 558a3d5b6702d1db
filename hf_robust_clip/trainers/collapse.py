"""Warnings of a training that destroys what the model knows, while there is still something to save."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers.utils import logging

from ..batch import Embeddings

logger = logging.get_logger(__name__)

#: Mean cosine of different rows from which on the embeddings of a side count as all alike.
ALIKE = 0.99
#: And below which they have told rows apart, so that it is no model that has yet to learn to.
APART = 0.9
#: By then they should, as a share of the training's steps.
BEGUN = 0.25
#: Fall of the clean accuracy in the first evaluation that is warned of: as a share of what it was, and in itself.
FALL, LEAST_FALL = 0.2, 0.05
ACCURACY = "clean_accuracy"

_SIDES = {"image_alike": "image", "text_alike": "caption"}


class CollapseWatch:
    """Looks for embeddings all alike, and for an accuracy that falls at once; warns of each once a training."""

    def __init__(self) -> None:
        self._apart: set[str] = set()
        self._warned: set[str] = set()
        self._before: float | None = None
        self._latest: float | None = None
        self._judged = False

    def begin(self) -> None:
        """Start anew, as a training does; the accuracy that was measured last is that before it."""
        self._apart.clear()
        self._warned.clear()
        self._before, self._judged = self._latest, False

    @staticmethod
    @torch.no_grad()
    def measure(pairs: Embeddings) -> dict[str, torch.Tensor]:
        """The mean cosine of different rows of a batch, of each side, for [`look`]."""
        rows = pairs.image_embeds.shape[0]
        if rows < 2:
            return {}
        # The squared length of the mean is the mean over all pairs of rows, each with itself included.
        squared = [side.mean(dim=0).square().sum() for side in pairs]
        return dict(zip(_SIDES, [(rows * value - 1) / (rows - 1) for value in squared], strict=True))

    def look(self, means: dict[str, float], step: int, max_steps: int) -> None:
        """Take the means of what was measured out of those that are to be logged."""
        for name, side in _SIDES.items():
            alike = means.pop(name, None)
            if alike is None:
                continue
            if alike < APART:
                self._apart.add(side)
            begun = side in self._apart or step >= BEGUN * max_steps
            if alike > ALIKE and begun and side not in self._warned:
                self._warned.add(side)
                logger.warning(
                    f"At step {step} the {side}s of a batch have nearly the same embedding (mean cosine of different "
                    f"rows {alike:.4f}): the model has collapsed, and what it learns from here on means little. Start "
                    "anew with the folder of an earlier checkpoint as model, and with a lower learning_rate or "
                    "longer warmup_steps (resuming would bring back the old learning_rate)"
                    + (", and look whether the captions differ." if side == "caption" else ".")
                )

    def judge(self, figures: Mapping[str, float], step: int) -> None:
        """Compare the first evaluation in training with the one before it."""
        accuracy = figures.get(ACCURACY)
        if accuracy is None:
            return
        self._latest = accuracy
        if step == 0:
            self._before = accuracy
            return
        if self._judged:
            return
        self._judged = True
        if self._before is None:
            return
        fall = self._before - accuracy
        if fall > max(LEAST_FALL, FALL * self._before):
            logger.warning(
                f"{ACCURACY} fell from {self._before:.1%} to {accuracy:.1%} by the first evaluation, at step {step}: "
                "this learning_rate destroys what the model knew. Start anew, from the model that you began with, "
                "with a lower one or with longer warmup_steps; what is left of a backdoor says little in a model that "
                "has forgotten its classes."
            )

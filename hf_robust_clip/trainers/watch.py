"""What is seen of the steps of a training: for its log, and to warn or stop in time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from ..batch import Batch, Embeddings
from .collapse import CollapseWatch
from .finite import FiniteCheck
from .means import RecentLoss, RunningMeans


class Watch:
    """
    Follows each batch: the means that are logged, the throughput, and what [`CollapseWatch`] and [`FiniteCheck`] do.

    Args:
        accelerator (`Accelerator`): Of the trainer.
        finite ([`FiniteCheck`], *optional*): With `stop_on_non_finite`.
    """

    def __init__(self, accelerator: Any, finite: FiniteCheck | None) -> None:
        self.means, self.recent_loss, self.collapse = RunningMeans(accelerator), RecentLoss(), CollapseWatch()
        self.finite = finite
        # DeepSpeed has a scaler of its own, with float16 alone.
        self._scaled = accelerator.scaler is not None or accelerator.mixed_precision == "fp16"
        self._processes = accelerator.num_processes
        self._pairs, self._since = 0, time.perf_counter()

    def begin(self, anew: bool) -> None:
        """Called when training starts, or goes on."""
        if anew:
            self.collapse.begin()
        self.means.clear()
        if self.finite is not None:
            self.finite.clear()
        self._pairs, self._since = 0, time.perf_counter()

    def drop_batches(self) -> None:
        """Forget the batches of a step that was not made."""
        if self.finite is not None:
            self.finite.drop_batches()

    def see(
        self, terms: Mapping[str, torch.Tensor], views: Mapping[str, Embeddings], scale: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """
        Take in a batch: the terms of its loss, the embeddings of its views (those of the first are measured) and the
        logit scale, whose bias the batch has.

        Returns:
            `torch.Tensor`: The loss, a scalar.
        """
        if self.finite is not None:
            self.finite.note_batch(terms, views, batch.rows)
        pairs = next(iter(views.values()))
        similarities = pairs.similarities.detach()  # (B,)
        seen = {"logit_scale": scale.squeeze(), "pair_similarity": similarities}
        if batch.bias is not None:
            seen["logit_bias"] = batch.bias.squeeze()
        self.means.add({**terms, **seen, **self.collapse.measure(pairs)})
        if batch.poisoned is not None:
            self.means.add({"clean_pair_similarity": similarities}, ~batch.poisoned)
            self.means.add({"poisoned_pair_similarity": similarities}, batch.poisoned)
        loss = torch.stack(list(terms.values())).sum()
        self.recent_loss.add(loss, len(similarities))
        self._pairs += len(similarities)
        return loss

    def see_gradient(self, norm: Any, step: int, epoch: float | None) -> None:
        """Take in the norm of a step's gradient, before its update."""
        if self.finite is not None:
            # A gradient scaler looks for gradients that are not finite by itself, and leaves their step out.
            self.finite.note_gradient(None if self._scaled else norm, step, epoch)

    def check(self) -> None:
        """Stop here where a step was not finite: before anything is saved."""
        if self.finite is not None:
            self.finite.check()

    def logs(self, step: int, max_steps: int) -> dict[str, float]:
        """The means since the last log, over all ranks, and the throughput; call it on all ranks."""
        now = time.perf_counter()
        means = self.means.take()
        self.collapse.look(means, step, max_steps)
        means["pairs_per_second"] = self._pairs * self._processes / (now - self._since)
        self._pairs, self._since = 0, now
        return means

    def leave_out(self, seconds: float) -> None:
        """Time that does not count for the throughput."""
        self._since += seconds

"""RoCLIP: pre-training in which a poisoned pair meets its nearest neighbours instead of its partner."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..batch import Batch, Embeddings
from ..columns import captions_of, naming
from ..data.rows import column_values, poison_flags
from ..losses import Matching, clip_loss, roclip_loss
from ..pool import FeaturePool
from ..wording import shown
from .base import Defence, Plan
from .pools import FeaturePools, pool_length

logger = logging.get_logger(__name__)

#: From this share of a batch on, one pool entry that is everybody's match means that matching has collapsed.
COLLAPSED = 0.5


class RoCLIP(Defence):
    """
    In matching epochs an image is trained against the caption nearest to it in a pool of earlier captions, not against
    its own (Yang, Gao, Mirzasoleiman, NeurIPS 2023, arXiv 2303.06854). Other epochs are CLIP's. The pools take in the
    features of every step, in every epoch; matching begins when they are full.

    Args:
        rows (`int`, *optional*): Of the dataset; `None` of a stream.
        pool_size (`float`): Pairs in the pools, or below 1 their share of the rows.
        pool_dtype (`str`): What they store.
        matching (`str`): What is matched: see [`~losses.roclip_loss`].
        match_every_n_epochs, matching_start_epoch (`int`): Which epochs match.
        steps_per_matching_epoch (`int`, *optional*): Optimizer steps that count as an epoch for these two.
        adversarial (`np.ndarray` of shape `(N,)`, bool, *optional*): For the log: the rows whose caption is of the
            adversarial class.
    """

    # One view, augmented where there is an augmentation: the trainer says which.
    def __init__(
        self,
        rows: int | None = None,
        pool_size: float = 0.02,
        pool_dtype: str = "float32",
        matching: Matching = "image_to_text",
        match_every_n_epochs: int = 2,
        matching_start_epoch: int = 2,
        steps_per_matching_epoch: int | None = None,
        adversarial: np.ndarray | None = None,
    ) -> None:
        super().__init__()
        if rows is None and steps_per_matching_epoch is None:
            raise ValueError(
                "train_dataset has no length, so that it has no epochs to count: set steps_per_matching_epoch, the "
                "number of optimizer steps that match_every_n_epochs and matching_start_epoch are to count as one"
            )
        self.pool_size, self.matching = pool_size, matching
        self.match_every_n_epochs, self.matching_start_epoch = match_every_n_epochs, matching_start_epoch
        self.steps_per_matching_epoch = steps_per_matching_epoch
        self.pools = FeaturePools(pool_length(pool_size, rows, "pool_size"), getattr(torch, pool_dtype))
        known = None if adversarial is None else torch.from_numpy(adversarial)
        self.register_buffer("adversarial", known, persistent=False)
        self._calls = 1
        self._warned_of_collapse = False

    def is_matching(self, step: int) -> bool:
        """Whether a step, counted from 0, is one of a matching epoch."""
        steps = self.steps_per_matching_epoch
        since_start = (self.epoch if steps is None else step // steps) - self.matching_start_epoch
        return since_start >= 0 and since_start % self.match_every_n_epochs == 0

    def forward(self, views: dict[str, Embeddings], scale: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        (pairs,) = views.values()
        if self.is_matching(batch.step) and self.pools.full:
            images, texts = _Lookup(self.pools.image), _Lookup(self.pools.text)
            terms = roclip_loss(*pairs, scale, images, texts, matching=self.matching, gather=self.gather)
            self._note_matches(pairs, texts, batch.poisoned)
        else:
            terms = {"clip_loss": clip_loss(*pairs, scale, gather=self.gather)}
        self.pools.enqueue(*pairs, batch.rows)
        return terms

    def _note_matches(self, pairs: Embeddings, texts: _Lookup, poisoned: torch.Tensor | None) -> None:
        queries = pairs.text_embeds if self.matching == "unimodal" else pairs.image_embeds
        served = torch.zeros(texts.pool.size, device=queries.device)
        served.scatter_add_(0, texts.slots, torch.ones_like(texts.slots, dtype=served.dtype))
        self.note(
            {
                "distinct_matches": (served > 0).sum() / len(queries),
                "largest_match_share": served.max() / len(queries),
                "match_similarity": (queries * texts.matches).sum(dim=-1),
            }
        )
        if poisoned is not None and isinstance(self.adversarial, torch.Tensor):
            rows = texts.pool.keys[texts.slots]
            self.note({"poisoned_match_adversarial": self.adversarial[rows].float()}, poisoned)

    def reset(self) -> None:
        self.pools.clear()

    def begin_training(self, plan: Plan) -> None:
        """Warn of a training that ends before it can match anything."""
        self._warned_of_collapse, self._calls = False, plan.calls
        steps, start = self.steps_per_matching_epoch, self.matching_start_epoch
        if steps is not None and plan.steps <= start * steps:
            logger.warning(
                f"Training ends after step {plan.steps}, before the first matching epoch "
                f"(matching_start_epoch={start} of steps_per_matching_epoch={steps}): it will be CLIP throughout."
            )
        elif steps is None and plan.epochs <= start:
            logger.warning(
                f"Training ends after epoch {plan.epochs}, before the first matching epoch "
                f"(matching_start_epoch={start}, counted from 0): it will be CLIP throughout."
            )
        rows = plan.batch * plan.calls * plan.steps
        # The last batch comes too late.
        if not self.pools.full and self.pools.size > rows - plan.batch:
            logger.warning(
                f"The pools of {self.pools.size} pairs (pool_size={shown(self.pool_size)}) do not fill before "
                f"training ends, after {rows} pairs, and matching begins when they are full: it will be CLIP "
                "throughout."
            )

    def logged(self, logs: dict[str, float]) -> None:
        """Add the pools' fill and age; warn, once, when matching has collapsed."""
        if self.pools.text is not None:
            logs["pool_fill"] = self.pools.text.filled / self.pools.size
            logs["pool_age"] = self.pools.text.age / self._calls
        share = logs.get("largest_match_share", 0.0)
        if share > COLLAPSED and not self._warned_of_collapse:
            self._warned_of_collapse = True
            logger.warning(
                f"Matching has collapsed: one caption of the pool serves {share:.0%} of a batch "
                f"(distinct_matches {logs['distinct_matches']:.1%}), so that images are all trained towards one "
                "point. The representation means too little to match on: resume from a checkpoint before the first "
                "matching epoch with a larger matching_start_epoch or match_every_n_epochs, or start anew with a "
                "larger pool_size, which no checkpoint is resumed with."
            )


def adversarial_rows(dataset: Any, caption_column: str, phrase: str | None) -> np.ndarray | None:
    """Which captions are of the adversarial class `(N,)`, bool; `None` where the dataset does not say."""
    rows = poison_flags(dataset)
    if rows is not None and phrase is not None:
        names = naming(phrase)
        rows |= np.array([any(map(names, captions_of(value))) for value in column_values(dataset, caption_column)])
    return rows


class _Lookup:
    """A pool that remembers what it was last asked for."""

    slots: torch.Tensor  # (B,)
    matches: torch.Tensor  # (B, D)

    def __init__(self, pool: FeaturePool | None) -> None:
        assert pool is not None  # it is full
        self.pool = pool

    def nearest(self, queries: torch.Tensor) -> torch.Tensor:
        self.slots = self.pool.nearest_slots(queries)
        self.matches = self.pool.features[self.slots].to(queries.dtype)
        return self.matches

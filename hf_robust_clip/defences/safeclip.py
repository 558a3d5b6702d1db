"""SafeCLIP: pre-training that tells safe pairs from risky ones and treats them differently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from ..batch import Batch, Embeddings
from ..data.sampling import RoutedBatchSampler
from ..distributed import world_size
from ..losses import clip_loss, safeclip_cross_loss, safeclip_unimodal_loss
from .base import Defence, PairScores, Plan
from .pools import FeaturePools, pool_length
from .split import SplitHistory

logger = logging.get_logger(__name__)

#: Components that are less far apart are one group, in standard deviations (`SplitRecord.separation`).
ONE_GROUP = 0.5


class SafeCLIP(Defence):
    """
    Three phases (Yang, Gao, Mirzasoleiman, ICML 2024, arXiv 2310.05862): each modality by itself; CLIP on all pairs at
    a small learning rate; then, with all pairs split anew before each epoch, CLIP across two views on the safe ones
    and the first phase's loss on the risky ones, in batches of one kind.

    Args:
        rows (`int`): Of the dataset.
        seed (`int`): Of the mixture's subsample.
        Others: As of [`SafeCLIPTrainingArguments`].
    """

    views = ("first", "second")

    def __init__(
        self,
        rows: int,
        warmup_unimodal_epochs: int = 5,
        warmup_unimodal_learning_rate: float | None = None,
        warmup_cross_epochs: int = 1,
        warmup_cross_learning_rate: float | None = None,
        safe_threshold: float = 0.9,
        safe_growth: float = 0.01,
        safe_cap: float = 0.85,
        score_views: str = "clean",
        unimodal_pool_size: float = 0.02,
        pool_dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.warmup_unimodal_epochs, self.warmup_cross_epochs = warmup_unimodal_epochs, warmup_cross_epochs
        self.warmup_unimodal_learning_rate = warmup_unimodal_learning_rate
        self.warmup_cross_learning_rate = warmup_cross_learning_rate
        self.safe_threshold, self.safe_growth, self.safe_cap = safe_threshold, safe_growth, safe_cap
        self.score_views, self.seed = score_views, seed
        self.splits = SplitHistory(rows)
        self.pools: FeaturePools | None = None
        if unimodal_pool_size:
            size = pool_length(unimodal_pool_size, rows, "unimodal_pool_size")
            self.pools = FeaturePools(size, getattr(torch, pool_dtype))
        self._sampler: RoutedBatchSampler | None = None

    @property
    def first_split_epoch(self) -> int:
        """The first epoch, from 0, of the third phase."""
        return self.warmup_unimodal_epochs + self.warmup_cross_epochs

    def forward(self, views: dict[str, Embeddings], scale: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        first, second = views["first"], views["second"]
        if self.kind(batch):
            terms = safeclip_cross_loss(*first, *second, scale, gather=self.gather)
        elif self.warmup_unimodal_epochs <= self.epoch < self.first_split_epoch:
            terms = {"clip_loss": clip_loss(*first, scale, gather=self.gather)}
        else:
            pools = self.pools if self.pools is not None and self.pools.full else None
            images, texts = (pools.image, pools.text) if pools is not None else (None, None)
            terms = safeclip_unimodal_loss(*first, *second, scale, images, texts, gather=self.gather)
        if self.pools is not None:
            self.pools.enqueue(*first)
        return terms

    def kind(self, batch: Batch) -> bool:
        """Whether its pairs are safe. A row in the place of an unusable one, which is risky, may be safe by itself."""
        return self.splits.are_safe(batch.rows)

    # ---- Phases ----

    def scheduled(self, epoch: int, factor: float, peak: float) -> float:
        """The learning rates of the two warm-up phases while they last."""
        if epoch < self.warmup_unimodal_epochs:
            rate = self.warmup_unimodal_learning_rate
            return factor if rate is None else factor * rate / peak
        if epoch < self.first_split_epoch:
            rate = self.warmup_cross_learning_rate
            return 0.01 if rate is None else rate / peak
        return factor

    def sampler(self, rows: int, batch_size: int, world_size: int, seed: int) -> RoutedBatchSampler:
        # One for all loaders: a second loader, made by a callback, say, must not leave the first without its kinds.
        if self._sampler is None or (self._sampler.length, self._sampler.batch_size) != (rows, batch_size):
            self._sampler = RoutedBatchSampler(rows, batch_size, world_size, seed)
        return self._sampler

    def begin_training(self, plan: Plan) -> None:
        if plan.epochs <= self.first_split_epoch:
            logger.warning(
                f"Training ends after epoch {plan.epochs}, before the first split into safe and risky "
                f"pairs (after warmup_unimodal_epochs={self.warmup_unimodal_epochs} and "
                f"warmup_cross_epochs={self.warmup_cross_epochs}): it will be warm-up only."
            )

    def begin_epoch(self, epoch: int, score: Callable[..., PairScores | None]) -> dict[str, float]:
        """Split the pairs, unless this is warm-up, or a resumed epoch whose split the checkpoint held."""
        assert self._sampler is not None  # made with the loader
        logs = {}
        if epoch >= self.first_split_epoch and self.splits.epoch != epoch:
            logs = self._split(epoch, score)
        self._sampler.set_epoch(epoch)
        self._sampler.set_split(self.splits.safe)
        return logs

    def _split(self, epoch: int, score: Callable[..., PairScores | None]) -> dict[str, float]:
        scores = score(augmented=self.score_views == "augmented")
        if scores is not None:  # on the first rank alone
            self.splits.add(epoch, scores, self.safe_threshold, self.safe_growth, self.safe_cap, seed=self.seed)
        if world_size() > 1:
            shared = [self.splits]
            broadcast_object_list(shared)
            self.splits = shared[0]
        record = self.splits.records[-1]
        if record.safe_share in (0.0, 1.0):
            logger.warning(
                f"The split of epoch {epoch} calls {'no' if record.safe_share == 0 else 'every'} pair safe: the "
                "similarities do not fall into two groups. Longer warm-up, another safe_threshold or more data may "
                "help; as it is, SafeCLIP defends against nothing."
            )
        elif record.separation < ONE_GROUP:
            logger.warning(
                f"The mixture of epoch {epoch} found one group of similarities and not two: its components are "
                f"{record.separation:.2f} standard deviations apart. Which pairs it calls safe is close to chance. "
                "Longer warm-up or more data may help."
            )
        return {f"split_{name}": value for name, value in record._asdict().items() if value == value}

    def reset(self) -> None:
        self.splits.clear()
        if self.pools is not None:
            self.pools.clear()

    def notes(self) -> dict[str, Any]:
        """The splits."""
        return {"splits": self.splits.to_list()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.pools is None and any(name.startswith(f"{prefix}pools.") for name in state_dict):
            raise ValueError(
                "the checkpoint holds pools, but unimodal_pool_size is 0 now: resume with the arguments of the "
                "interrupted run"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

"""RoCLIP: pre-training in which a poisoned pair meets its nearest neighbours instead of its partner."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..columns import POISONED, ROW_INDEX, captions_of, naming
from ..data.rows import column_values, poison_flags
from ..losses import Matching, clip_loss, roclip_loss
from ..pool import FeaturePool
from ..wording import shown
from .arguments import RoCLIPTrainingArguments
from .base import CLIPTrainer, Embeddings
from .pools import FeaturePools, pool_length

logger = logging.get_logger(__name__)

#: From this share of a batch on, one pool entry that is everybody's match means that matching has collapsed.
COLLAPSED = 0.5


class RoCLIPTrainer(CLIPTrainer):
    """
    Pre-train a CLIP on pairs of which some may be poisoned. In matching epochs an image is trained against the
    caption nearest to it in a pool of earlier captions, not against its own, so that an image and an adversarial
    caption that have nothing in common are torn apart (Yang, Gao, Mirzasoleiman, NeurIPS 2023, arXiv 2303.06854).
    Other epochs are CLIP's. Images and captions are augmented in both.

    The pools take in the features of every step, in every epoch; matching begins when they are full. Poisons that are
    many enough to be each other's nearest neighbours are matched with each other, and get through.

    Logged beside the loss terms, for matching steps: `distinct_matches` (different pool entries over batch size),
    `largest_match_share` (share of the batch that the most popular entry serves), `match_similarity` (cosine of an
    image and what it is matched with; of `"unimodal"`, of a caption and its match). For all steps: `pair_similarity`
    (cosine of an image and its own caption), `pool_fill` (0 to 1), `pool_age` (optimizer steps since the oldest entry
    was stored). With a `poisoned` column: `clean_pair_similarity`, `poisoned_pair_similarity`, and
    `poisoned_match_adversarial`, how often a poisoned image is matched with a caption of its adversarial class.

    Args:
        model (`str` or `PreTrainedModel`): A Hub id, a folder, or a dual encoder, as a rule untrained.
        args ([`RoCLIPTrainingArguments`]): The paper's recipe by default.
        image_augmentation, text_augmentation: `None`: the presets of `args`, `"strong"` and `"eda"`.
        Others: As of [`CLIPTrainer`].

    Raises:
        `ValueError`: As of [`CLIPTrainer`]; and for a `train_dataset` of unknown length if `pool_size` is a share of
            it, or if `steps_per_matching_epoch` is not set.
    """

    args_class = RoCLIPTrainingArguments
    args: RoCLIPTrainingArguments

    def set_up(self) -> None:
        super().set_up()
        self._adversarial: torch.Tensor | None = None
        self._warned_of_collapse = False
        self.pools: FeaturePools | None = self._make_pools() if self.train_dataset is not None else None

    def _make_pools(self) -> FeaturePools:
        rows = self._dataset_length()
        if rows is None and self.args.steps_per_matching_epoch is None:
            raise ValueError(
                "train_dataset has no length, so that it has no epochs to count: set steps_per_matching_epoch, the "
                "number of optimizer steps that match_every_n_epochs and matching_start_epoch are to count as one"
            )
        size = pool_length(self.args.pool_size, rows, "pool_size")
        return FeaturePools(size, getattr(torch, self.args.pool_dtype))

    @property
    def matching_epoch(self) -> bool:
        """Whether the current step is one of a matching epoch."""
        epoch = self._epoch or 0
        if self.args.steps_per_matching_epoch is not None:
            epoch = self.state.global_step // self.args.steps_per_matching_epoch
        since_start = epoch - self.args.matching_start_epoch
        return since_start >= 0 and since_start % self.args.match_every_n_epochs == 0

    def loss_components(
        self, views: dict[str, Embeddings], scale: torch.Tensor, inputs: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        assert self.pools is not None  # made with the train_dataset
        pairs, keys = views[self.views[0]], inputs.get(ROW_INDEX)
        gather = self.args.gather_across_devices
        if self.matching_epoch and self.pools.full:
            matching: Any = self.args.matching
            images, texts = _Lookup(self.pools.image), _Lookup(self.pools.text)
            terms = roclip_loss(*pairs, scale, images, texts, matching=matching, gather=gather)
            self._note_matches(pairs, texts, matching, inputs.get(POISONED))
        else:
            terms = {"clip_loss": clip_loss(*pairs, scale, gather=gather)}
        self.pools.enqueue(*pairs, keys)
        return terms

    def _note_matches(
        self, pairs: Embeddings, texts: _Lookup, matching: Matching, poisoned: torch.Tensor | None
    ) -> None:
        queries = pairs.text_embeds if matching == "unimodal" else pairs.image_embeds
        served = torch.zeros(texts.pool.size, device=queries.device)
        served.scatter_add_(0, texts.slots, torch.ones_like(texts.slots, dtype=served.dtype))
        self.means.add(
            {
                "distinct_matches": (served > 0).sum() / len(queries),
                "largest_match_share": served.max() / len(queries),
                "match_similarity": (queries * texts.matches).sum(dim=-1),
            }
        )
        if poisoned is not None and self._adversarial is not None:
            rows = texts.pool.keys[texts.slots]
            self.means.add({"poisoned_match_adversarial": self._adversarial[rows].float()}, poisoned)

    def training_state(self) -> dict[str, torch.Tensor]:
        return {**super().training_state(), **(self.pools.state_dict() if self.pools is not None else {})}

    def load_training_state(self, state: dict[str, torch.Tensor]) -> None:
        super().load_training_state(state)
        if self.pools is not None:
            self.pools.load_state_dict(state, self.args.device)

    def reset_training_state(self) -> None:
        super().reset_training_state()
        if self.pools is not None:
            self.pools.clear()

    def on_train_begin(self) -> None:
        super().on_train_begin()
        self._warned_of_collapse = False
        rows = self._adversarial_rows()
        self._adversarial = torch.from_numpy(rows).to(self.args.device) if rows is not None else None
        self._warn_of_no_matches()

    def _warn_of_no_matches(self) -> None:
        args, state = self.args, self.state
        steps, start = args.steps_per_matching_epoch, args.matching_start_epoch
        if steps is not None and state.max_steps <= start * steps:
            logger.warning(
                f"Training ends after step {state.max_steps}, before the first matching epoch "
                f"(matching_start_epoch={start} of steps_per_matching_epoch={steps}): it will be CLIP throughout."
            )
        elif steps is None and state.num_train_epochs <= start:
            logger.warning(
                f"Training ends after epoch {state.num_train_epochs}, before the first matching epoch "
                f"(matching_start_epoch={start}, counted from 0): it will be CLIP throughout."
            )
        batch = self._train_batch_size * args.world_size
        rows = batch * args.gradient_accumulation_steps * state.max_steps
        # The last batch comes too late.
        if self.pools is not None and not self.pools.full and self.pools.size > rows - batch:
            logger.warning(
                f"The pools of {self.pools.size} pairs (pool_size={shown(args.pool_size)}) do not fill before "
                f"training ends, after {rows} pairs, and matching begins when they are full: it will be CLIP "
                "throughout."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As [`CLIPTrainer`]'s, with the pools' fill and age; warns, once, when matching has collapsed."""
        if "loss" in logs and self.pools is not None and self.pools.text is not None:
            logs["pool_fill"] = self.pools.text.filled / self.pools.size
            enqueued = 1 if self.args.accumulate_negatives else self.args.gradient_accumulation_steps  # times a step
            logs["pool_age"] = self.pools.text.age / enqueued
        super().log(logs, start_time)
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

    def _adversarial_rows(self) -> np.ndarray | None:
        """Which captions are of the adversarial class `(N,)`, bool; `None` where the dataset does not say."""
        dataset: Any = self.train_dataset
        rows = poison_flags(dataset)
        if rows is not None and self.args.adversarial_phrase is not None:
            names = naming(self.args.adversarial_phrase)
            captions = column_values(dataset, self.args.caption_column)
            rows |= np.array([any(map(names, captions_of(value))) for value in captions])
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

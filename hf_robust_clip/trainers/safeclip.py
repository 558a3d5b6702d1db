"""SafeCLIP: pre-training that tells safe pairs from risky ones and treats them differently."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import torch
from accelerate.utils import broadcast_object_list
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import SchedulerType
from transformers.utils import logging

from ..data.sampling import RoutedBatchSampler
from ..losses import clip_loss, safeclip_cross_loss, safeclip_unimodal_loss
from ..wording import shown
from .arguments import SafeCLIPTrainingArguments
from .base import CLIPTrainer, Embeddings
from .checks import check_negatives
from .chunking import Batch
from .pools import FeaturePools, pool_length
from .scoring import score_pairs
from .split import SplitHistory

logger = logging.get_logger(__name__)

#: Components that are less far apart are one group, in standard deviations (`SplitRecord.separation`).
ONE_GROUP = 0.5
#: Of a batch, whether its pairs are safe.
SAFE = "safe"


class SafeCLIPTrainer(CLIPTrainer):
    """
    Pre-train a CLIP on pairs of which some may be poisoned, in three phases (Yang, Gao, Mirzasoleiman, ICML 2024,
    arXiv 2310.05862):

    1. `warmup_unimodal_epochs` in which images and captions each learn by themselves: an augmented view against the
       nearest neighbour, in a pool of earlier features, of another view of the same row.
    2. `warmup_cross_epochs` of CLIP on all pairs, at a small learning rate.
    3. From then on, at the start of each epoch, all pairs are scored by similarity and split: pairs that a Gaussian
       mixture calls safe train with CLIP's loss across two augmented views, the others with the first phase's loss,
       in batches that are all safe or all risky. The safe set grows each epoch.

    A poison that enters the safe set is learned like any other pair: the share of the pairs that are truly clean and
    the separation of the similarities bound how far the safe set may grow (`safe_growth`, `safe_cap`). With a column
    `poisoned` the log says how many are inside. The name is also that of an unrelated method against unsafe content.

    Logged beside the loss terms, at each split, as `split_*`: the fields of [`~trainers.split.SplitRecord`].

    Args:
        model (`str` or `PreTrainedModel`): A Hub id, a folder, or a dual encoder, as a rule untrained.
        args ([`SafeCLIPTrainingArguments`]): The paper's recipe by default.
        image_augmentation, text_augmentation: `None`: the presets of `args`, `"strong"` and `"eda"`.
        Others: As of [`CLIPTrainer`].

    Raises:
        `ValueError`: As of [`CLIPTrainer`]; and for an iterable `train_dataset`, whose pairs cannot be scored and
            then dealt out by what they scored.
    """

    views = ("first", "second")
    extra_inputs = (*CLIPTrainer.extra_inputs, SAFE)
    args_class = SafeCLIPTrainingArguments
    args: SafeCLIPTrainingArguments

    def set_up(self) -> None:
        super().set_up()
        self.pools: FeaturePools | None = None
        #: The record and the histogram of every split so far.
        self.splits = SplitHistory()
        self._sampler: RoutedBatchSampler | None = None
        self._batch_of_epoch = 0
        if self.lr_scheduler is not None:
            logger.warning(
                "optimizers brings a scheduler of its own: it is used as it is, without warmup_unimodal_learning_rate "
                "and warmup_cross_learning_rate."
            )
        if self.train_dataset is not None:
            self._check_routing()
            if self.args.unimodal_pool_size:
                size = pool_length(self.args.unimodal_pool_size, self._dataset_length(), "unimodal_pool_size")
                self.pools = FeaturePools(size, getattr(torch, self.args.pool_dtype))

    def _check_routing(self) -> None:
        if self._dataset_length() is None or isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            raise ValueError(
                f"train_dataset is a {type(self.train_dataset).__name__}, which is read in order, but SafeCLIP scores "
                "every pair before an epoch and deals them into safe and risky batches by their number: load it as a "
                "map-style dataset (load_dataset without streaming=True, or datasets.Dataset.from_generator), or use "
                "RoCLIPTrainer, which can stream"
            )
        accelerator_config: Any = self.args.accelerator_config
        for name, value, accepted in (
            ("dataloader_drop_last", self.args.dataloader_drop_last, True),
            ("dataloader_in_order", self.args.dataloader_in_order, True),
            ("ignore_data_skip", self.args.ignore_data_skip, False),
            ("accelerator_config.split_batches", accelerator_config.split_batches, False),
            ("accelerator_config.dispatch_batches", accelerator_config.dispatch_batches, False),
        ):
            if bool(value) is not accepted:
                raise ValueError(
                    f"{name}={shown(value)} does not work with SafeCLIPTrainer, which deals batches that are all safe "
                    f"or all risky itself: set it to {accepted}"
                )

    def run_details(self) -> dict[str, Any]:
        """The splits."""
        return {"splits": self.splits.to_list()}

    # ---- Phases ----

    @property
    def first_split_epoch(self) -> int:
        """The first epoch, from 0, of the third phase."""
        return self.args.warmup_unimodal_epochs + self.args.warmup_cross_epochs

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """The Trainer's schedule over all steps, at the learning rates of the two warm-up phases while they last."""
        created = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if created:
            if not isinstance(scheduler, LambdaLR):
                name = SchedulerType(self.args.lr_scheduler_type).value
                raise ValueError(
                    f"lr_scheduler_type={shown(name)} does not work with SafeCLIPTrainer: its phases need a schedule "
                    "that is a function of the step, such as 'cosine', 'linear' or 'constant'"
                )
            # Of the optimizer, which may be the user's, with other rates than args.learning_rate.
            largest = max(map(float, scheduler.base_lrs))
            scheduler.lr_lambdas = [self._phased(factor, largest) for factor in scheduler.lr_lambdas]
            for group, base, factor in zip(
                scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = base * factor(0)
            scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
        return scheduler

    def _phased(self, schedule: Callable[[int], float], learning_rate: float) -> Callable[[int], float]:
        args, steps_per_epoch = self.args, max(self._steps_per_epoch, 1)  # none before the dataloader is made
        unimodal = args.warmup_unimodal_learning_rate
        cross = args.warmup_cross_learning_rate
        unimodal_factor = 1.0 if unimodal is None else unimodal / learning_rate
        cross_factor = 0.01 if cross is None else cross / learning_rate

        def factor(step: int) -> float:
            epoch = step // steps_per_epoch
            if epoch < args.warmup_unimodal_epochs:
                return unimodal_factor * schedule(step)
            return cross_factor if epoch < self.first_split_epoch else schedule(step)

        return factor

    def on_train_begin(self) -> None:
        super().on_train_begin()
        if self.state.num_train_epochs <= self.first_split_epoch:
            logger.warning(
                f"Training ends after epoch {self.state.num_train_epochs}, before the first split into safe and risky "
                f"pairs (after warmup_unimodal_epochs={self.args.warmup_unimodal_epochs} and "
                f"warmup_cross_epochs={self.args.warmup_cross_epochs}): it will be warm-up only."
            )

    def on_epoch_begin(self) -> None:
        """Split the pairs, unless this is warm-up, or a resumed epoch whose split the checkpoint held."""
        starting = self._epoch is None
        super().on_epoch_begin()
        assert self._sampler is not None  # made with the dataloader
        epoch = self._epoch or 0
        if epoch >= self.first_split_epoch and self.splits.epoch != epoch:
            self._split(epoch)
        self._sampler.set_epoch(epoch)
        self._sampler.set_split(self.splits.safe)
        steps_done = self.state.global_step % self._steps_per_epoch if starting else 0
        self._batch_of_epoch = steps_done * self.args.gradient_accumulation_steps

    def check_batches(self, batch_size: int) -> None:
        # Of the batches of a step, one alone may be safe, or risky.
        check_negatives(self.args, batch_size, None, accumulated=False)

    def make_batch_sampler(self, batch_size: int) -> RoutedBatchSampler:
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        length = self._dataset_length() or 0
        # One for all loaders: a second loader, made by a callback, say, must not leave the first without its kinds.
        if self._sampler is None or (self._sampler.length, self._sampler.batch_size) != (length, batch_size):
            self._sampler = RoutedBatchSampler(length, batch_size, self.args.world_size, seed)
        batches = len(self._sampler) // self.args.world_size
        self._steps_per_epoch = -(-batches // self.args.gradient_accumulation_steps)
        return self._sampler

    def _check_checkpoint(self, metadata: Mapping[str, str], checkpoint: str) -> None:
        super()._check_checkpoint(metadata, checkpoint)
        saved, current = metadata.get("steps_per_epoch"), str(self._steps_per_epoch)
        if saved is not None and saved != current:
            raise ValueError(
                f"resume_from_checkpoint={shown(checkpoint)}: its number of optimizer steps in an epoch was {saved}, "
                f"but is {current} now, and SafeCLIP counts its phases, learning rates and splits in epochs. Resume "
                "with what it was saved with (per_device_train_batch_size, the number of processes and "
                "gradient_accumulation_steps decide it), or start anew from its weights by passing the folder as model"
            )

    # ---- Split ----

    @property
    def split(self) -> datasets.Dataset | None:
        """
        The latest split, a dataset with the boolean column `safe`, one row for each of `train_dataset`'s; `None`
        before the first. `datasets.concatenate_datasets([train_dataset, trainer.split], axis=1)` puts them together.
        """
        return None if self.splits.safe is None else datasets.Dataset.from_dict({"safe": self.splits.safe})

    def _split(self, epoch: int) -> None:
        scores = score_pairs(self, epoch, augmented=self.args.score_views == "augmented")
        args = self.args
        if scores is not None:  # on the first rank alone
            self.splits.add(epoch, scores, args.safe_threshold, args.safe_growth, args.safe_cap, seed=args.seed)
        if args.world_size > 1:
            shared = [self.splits]
            broadcast_object_list(shared)
            self.splits = shared[0]
        record = self.splits.records[-1]
        self.log({f"split_{name}": value for name, value in record._asdict().items() if value == value})
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

    # ---- Losses and state ----

    def loss_components(
        self, views: dict[str, Embeddings], scale: torch.Tensor, inputs: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        first, second = views["first"], views["second"]
        gather, epoch = self.args.gather_across_devices, self._epoch or 0
        if inputs[SAFE]:
            terms = safeclip_cross_loss(*first, *second, scale, gather=gather)
        elif self.args.warmup_unimodal_epochs <= epoch < self.first_split_epoch:
            terms = {"clip_loss": clip_loss(*first, scale, gather=gather)}
        else:
            pools = self.pools if self.pools is not None and self.pools.full else None
            images, texts = (pools.image, pools.text) if pools is not None else (None, None)
            terms = safeclip_unimodal_loss(*first, *second, scale, images, texts, gather=gather)
        if self.pools is not None:
            self.pools.enqueue(*first)
        return terms

    def receive(self, inputs: dict[str, Any]) -> Batch:
        """As [`CLIPTrainer`]'s; a batch of training says whether its pairs are safe."""
        batch = super().receive(inputs)
        if self.unwrapped_model.training:
            assert self._sampler is not None  # made with the dataloader
            kinds = self._sampler.kinds
            batch.inputs[SAFE] = kinds is not None and bool(kinds[self._batch_of_epoch])
            self._batch_of_epoch += 1
        return batch

    def contrast_groups(self, batches: Sequence[dict[str, Any]]) -> list[list[int]]:
        """Safe batches with safe ones, risky with risky ones."""
        groups = [[i for i, batch in enumerate(batches) if batch[SAFE] == kind] for kind in (True, False)]
        return [group for group in groups if group]

    def training_state(self) -> dict[str, torch.Tensor]:
        pools = self.pools.state_dict() if self.pools is not None else {}
        return {**super().training_state(), **pools, **self.splits.state_dict()}

    def load_training_state(self, state: dict[str, torch.Tensor]) -> None:
        super().load_training_state(state)
        if self.pools is not None:
            self.pools.load_state_dict(state, self.args.device)
        elif any(name.startswith("image_pool.") for name in state):
            raise ValueError(
                "the checkpoint holds pools, but unimodal_pool_size is 0 now: resume with the arguments of the "
                "interrupted run"
            )
        self.splits.load_state_dict(state, self._dataset_length() or 0)

    def reset_training_state(self) -> None:
        super().reset_training_state()
        self.splits = SplitHistory()
        if self.pools is not None:
            self.pools.clear()

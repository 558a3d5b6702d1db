"""`CLIPTrainer`: the undefended baseline, and every hook that the defences share."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import SchedulerType
from transformers.utils import logging

from ..arguments import CLIPTrainingArguments
from ..augment.images import ImageNormalization
from ..batch import Batch, Embeddings
from ..callbacks import TrainerHooks
from ..columns import BAD_ROWS, POISONED, ROW_INDEX
from ..data.collator import ORIGINAL, CLIPDataCollator, RowsOnHost
from ..data.fitting import check_fit
from ..data.rows import IndexedDataset, check_dataset
from ..data.streams import PLACE, Stream, StreamCollator
from ..defences.base import Defence, PairScores, Plan
from ..defences.clip import CLIP
from ..describing import describe_skipped
from ..evaluation.running import evaluator_list, run_evaluators
from ..kinds import kind
from ..losses import clip_loss
from ..models import caption_padding, check_processor, load_processor, longest_caption
from ..seeding import derive_seed
from ..wording import shown
from .adapters import add_adapters, check_adapters
from .checks import (
    ONE_ROW,
    callback_list,
    check_arguments,
    check_best_metric,
    check_collator,
    check_negatives,
    check_trained,
    decide_best_metric,
    explained,
    load_to_train,
    resolve_image_augmentation,
    resolve_text_augmentation,
    warn_of_half_precision,
)
from .collapse import CollapseWatch
from .finite import FiniteCheck
from .means import RecentLoss, RunningMeans
from .publishing import PublishingTrainer
from .scoring import score_pairs
from .sharding import shardable
from .step import Step, scale_of
from .streaming import StreamedTraining

logger = logging.get_logger(__name__)

STATE_FILE = "robust_clip_state.safetensors"
#: Methods in which a subclass may add figures, whose names are then not known.
_EVALUATION = ("evaluate", "evaluation_loop", "run_evaluators")

Evaluator = Callable[..., dict[str, float]]


class CLIPTrainer(PublishingTrainer):
    """
    Train or fine-tune a dual encoder of images and texts with the loss of CLIP (Radford et al., ICML 2021).

    The undefended baseline, and the base of the defences. Against the stock `Trainer` with `return_loss=True` it takes
    raw image-caption datasets, uses the rows of all processes as negatives with exact gradients, clamps `logit_scale`
    and keeps it from weight decay, runs evaluators, logs each loss term, and resumes to the bit.

    Args:
        model (`str` or `PreTrainedModel`):
            A Hub id, a folder, or any dual encoder whose output has `image_embeds` and `text_embeds` and that has a
            `logit_scale`.
        args ([`CLIPTrainingArguments`], *optional*):
            Of the class that belongs to this trainer, `args_class`. `None`: its defaults, with the output folder
            `tmp_trainer`.
        data_collator ([`CLIPDataCollator`], *optional*):
            Made from `processing_class` and `args` by default. One of your own must return this trainer's text views.
        train_dataset (`datasets.Dataset`, `datasets.IterableDataset` or any torch dataset, *optional*):
            Rows with an image and a caption, under the names in `args`. [`~data.streams.Stream`] says who reads what
            of an iterable dataset. An optional boolean column `poisoned` marks
            pairs known to be poisoned.
        eval_dataset (*optional*):
            The same, or a dictionary of such, each of at least 2 rows; gives `eval_loss`, the CLIP loss of its
            un-augmented pairs, all contrasted with each other.
        processing_class (`ProcessorMixin`, *optional*):
            With an image processor and a tokenizer. By default the one saved beside `model`.
        evaluators (callable or sequence of callables):
            One evaluator or several. Each `(model, processor, embedder) -> dict[str, float]`; what they return is part
            of every evaluation as `eval_*`, and can be the `metric_for_best_model`. They run on all ranks, and all
            ranks must ask the embedder for the same. One with a method `image_requests() -> list[tuple]` of (dataset,
            image column, trigger or `None`) has its images embedded in the same pass as those of the others.
        image_augmentation (`nn.Module`, callable or `str`, *optional*):
            Floats in [0, 1] `(B, 3, H, W)` to the same, on the device. A string names a preset, `"identity"` none.
            `None`: `args.image_preset`.
        text_augmentation (callable or `str`, *optional*):
            `(caption: str, seed: int) -> str`. A string names a preset. `None`: `args.text_preset`.
        peft_config (`peft.PeftConfig`, *optional*):
            Trains adapters instead of the whole model, and `logit_scale`, which is saved with them;
            `modules_to_save=["visual_projection", "text_projection"]` adds the projections.
        callbacks, optimizers, optimizer_cls_and_kwargs: As of `transformers.Trainer`. One callback needs no list.
        defence ([`Defence`], *optional*): What gives the loss; `None`: that of this trainer's class, CLIP's here.

    Raises:
        `ValueError`: If the model, the datasets, their columns or a preset cannot work, before any step.
    """

    # Losses are means over their batch, so the Trainer divides them by the accumulation steps. Left to itself it takes
    # a loss for scaled as soon as the data has a `labels` column (transformers 5.19 and later).
    loss_is_scaled_for_ga = False

    #: The views of a training batch, stacked in this order; of a class that names none, those of its defence.
    views: tuple[str, ...] = ()

    #: The class that `args` is of, and that they are made from where they are left out.
    args_class: type[CLIPTrainingArguments] = CLIPTrainingArguments

    args: CLIPTrainingArguments
    data_collator: CLIPDataCollator

    @explained
    def __init__(
        self,
        model: str | nn.Module,
        args: CLIPTrainingArguments | None = None,
        data_collator: CLIPDataCollator | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        evaluators: Evaluator | Sequence[Evaluator] = (),
        image_augmentation: nn.Module | Callable[[torch.Tensor], torch.Tensor] | str | None = None,
        text_augmentation: Callable[[str, int], str] | str | None = None,
        peft_config: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        defence: Defence | None = None,
    ) -> None:
        if args is None:
            args = self.args_class(output_dir="tmp_trainer")
            logger.info("No args were passed: output_dir is tmp_trainer.")
        check_arguments(args, self.args_class, train_dataset, eval_dataset)
        if defence is not None and not isinstance(defence, Defence):
            raise ValueError(f"defence must be a Defence, but is {kind(defence)}")
        if defence is None:
            defence = self.make_defence(args, train_dataset)
        evaluators = evaluator_list(evaluators)
        encoder = load_to_train(model)
        warn_of_half_precision(encoder)
        processing_class = load_processor(model, processing_class)
        check_processor(processing_class, "processing_class")
        for evaluator in evaluators:
            if hasattr(evaluator, "check"):
                evaluator.check(processing_class)
        decide_best_metric(args, evaluators)
        if all(getattr(type(self), name) is getattr(CLIPTrainer, name) for name in _EVALUATION):
            check_best_metric(args, evaluators, eval_dataset)
        self.image_augmentation = resolve_image_augmentation(image_augmentation, args)
        text_augmentation = resolve_text_augmentation(text_augmentation, args)
        # One view and an augmentation: the augmented view takes the original's place.
        augments = self.image_augmentation is not None or text_augmentation is not None
        views = tuple(self.views or defence.views)
        self.views = ("augmented",) if views == (ORIGINAL,) and augments else views
        if data_collator is not None:
            check_collator(data_collator, args, text_augmentation)
        else:
            data_collator = CLIPDataCollator(
                processing_class,
                image_column=args.image_column,
                caption_column=args.caption_column,
                views=self.views,
                text_augmentation=text_augmentation,
                max_length=args.max_length or longest_caption(encoder, processing_class.tokenizer),
                padding=caption_padding(encoder),
                seed=args.order_seed,
            )
        if peft_config is not None:
            encoder = add_adapters(encoder, peft_config, args.seed)
        check_adapters(encoder, args)
        if train_dataset is not None:
            check_trained(encoder)
        check_fit(encoder, processing_class, data_collator, train_dataset)
        if evaluators and data_collator.tokenizer is not processing_class.tokenizer:
            check_fit(encoder, processing_class)
        # The Trainer refuses an eval_strategy without a dataset; evaluators bring their own.
        if eval_dataset is None and evaluators:
            eval_dataset = []
        if not isinstance(optimizers, list | tuple) or len(optimizers) != 2:
            raise ValueError(f"optimizers must be a pair of an optimizer and a scheduler, but is {kind(optimizers)}")
        super().__init__(
            model=encoder,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callback_list(callbacks),
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        # Without these the Trainer sees no labels and reports no eval_loss.
        self.can_return_loss = True
        self.label_names = []
        self.evaluators = evaluators
        normalization = ImageNormalization(data_collator.preprocess.mean, data_collator.preprocess.std)
        self.step = Step(
            self.views, self.image_augmentation, normalization.to(self.args.device), self.args.device, self._loss
        )
        self._eval_collator = data_collator.for_evaluation()
        self._evaluators_prefix: str | None = None
        self._evaluating = False
        self._epoch: int | None = None
        self._first_epoch = 0
        self._steps_per_epoch = 0  # of a map-style dataset, in optimizer steps; known when its loader is made
        self._micro_step = 0
        self._pending: list[Batch] = []
        self._evaluated: list[list[torch.Tensor | None]] = []  # of each batch: numbers of rows, embeddings
        self._bad_rows: set[int] = set()
        self._loader_generator = torch.Generator()
        self._finite: FiniteCheck | None = None
        if args.stop_on_non_finite:
            self._finite = FiniteCheck(
                Path(str(args.output_dir)),
                args.process_index,
                args.device,
                lambda: self.unwrapped_model.named_parameters(),
            )
        self._streamed: StreamedTraining | None = None
        self._streamed_next: StreamedTraining | None = None
        #: What is logged as a mean; see [`~trainers.means.RunningMeans`].
        self.means = RunningMeans(self.accelerator)
        self.defence = defence.to(self.args.device)
        self.defence.gather, self.defence.means = args.gather_across_devices, self.means
        #: For whoever tells of the progress, between two logs.
        self.recent_loss = RecentLoss()
        self._collapse = CollapseWatch()
        self._pairs_since_log = 0
        self._last_log = time.perf_counter()
        self.add_callback(
            TrainerHooks(
                self.on_train_begin,
                self.on_epoch_begin,
                self.on_step_begin,
                self.on_optimizer_step,
                self.on_train_end,
            )
        )
        if train_dataset is not None:
            self.check_batches(self.args.train_batch_size)
        if self._has_phases and self.lr_scheduler is not None:
            logger.warning(
                f"optimizers brings a scheduler of its own: it is used as it is, without the learning rates of "
                f"{type(self.defence).__name__}."
            )

    # ---- The defence ----

    #: What [`make_defence`] makes.
    defence_class: type[Defence] = CLIP

    def make_defence(self, args: CLIPTrainingArguments, train_dataset: Any) -> Defence:
        """The defence of this trainer's class, as its arguments say."""
        return self.defence_class.from_arguments(args, train_dataset)

    def loss_components(
        self, views: dict[str, Embeddings], scale: torch.Tensor, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """The terms of the loss of a training batch, which are the defence's: see [`Defence.forward`]."""
        terms: dict[str, torch.Tensor] = self.defence(views, scale, batch)
        return terms

    def score_pairs(self, epoch: int, augmented: bool = False) -> PairScores | None:
        """
        Score every pair of `train_dataset` with the model as it is; call it on all ranks.

        Args:
            epoch (`int`): From 0; keys what is drawn.
            augmented (`bool`): Whether to score augmented views in place of the pairs as they are.

        Returns:
            [`~defences.base.PairScores`]: On the first rank; `None` on the others.
        """
        # Sharded parameters come together only in the wrapped model's forward pass.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return score_pairs(
            self.train_dataset,
            self.model_wrapped if sharded else self.unwrapped_model,
            self.step,
            self.data_collator,
            self.args,
            epoch,
            augmented,
            sharded,
            self.worker_settings(),
            self.compute_loss_context_manager,
        )

    def check_batches(self, batch_size: int) -> None:
        """`ValueError` where so many rows a process would leave a pair without another to be contrasted with."""
        # Of the batches of a step, those of one kind may be a single one.
        one_kind = type(self.defence).kind is Defence.kind
        accumulated = self.args.accumulate_negatives and one_kind
        check_negatives(self.args, batch_size, self._dataset_length() if one_kind else None, accumulated)

    @property
    def skipped_rows(self) -> list[int]:
        """Numbers of the rows passed over so far under `on_bad_row="skip"`, on all ranks; call it on all ranks."""
        rows = sorted(self._bad_rows)
        return sorted(set(gather_object(rows))) if self.args.world_size > 1 else rows

    def _note_skipped_rows(self) -> None:
        # For the record, which is written by one rank alone.
        self.skipped = describe_skipped(self.skipped_rows, streamed=self._dataset_length() is None)

    # ---- Batches and losses ----

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Move a batch to the device and turn its bytes into the views `(V*B, 3, H, W)` that its texts have."""
        return self.step.prepared(self.receive(inputs), training=self.unwrapped_model.training)

    def receive(self, inputs: dict[str, Any]) -> Batch:
        """Move a batch to the device, and note the rows that it leaves out, and where it is in a stream."""
        bad_rows, place = inputs.pop(BAD_ROWS, None), inputs.pop(PLACE, None)
        rows = inputs.pop(ROW_INDEX, None)
        if self.unwrapped_model.training:
            if bad_rows is not None:
                self._bad_rows.update(bad_rows.tolist())
            if self._streamed is not None and place is not None:
                self._streamed.note(place)
        step = self.state.global_step
        seed = derive_seed(self.args.seed, step, self._micro_step, self.args.process_index)
        self._micro_step += 1
        moved = super()._prepare_inputs(inputs)
        poisoned = moved.pop(POISONED, None)
        return Batch(moved, seed, step, None if rows is None else torch.as_tensor(rows).cpu(), poisoned)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The sum of [`loss_components`] of a training batch."""
        ours = model is self.model or model is self.model_wrapped
        loss = self.step.whole(model, self.unwrapped_model if ours else self.accelerator.unwrap_model(model), inputs)
        return (loss, None) if return_outputs else loss

    def _loss(self, views: dict[str, Embeddings], scale: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The sum of [`loss_components`], which are logged."""
        terms = self.loss_components(views, scale, batch)
        if self._finite is not None:
            self._finite.note_batch(terms, views, batch.rows)
        pairs = views[self.views[0]]
        self.means.add({**terms, "logit_scale": scale.squeeze(), **self._collapse.measure(pairs)})
        self._note_similarities(pairs, batch.poisoned)
        loss = torch.stack(list(terms.values())).sum()
        self.recent_loss.add(loss, pairs.image_embeds.shape[0])
        return loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """
        As the Trainer's. In chunks with `contrastive_chunk_size`; with `accumulate_negatives`, the last of the
        accumulated steps does the work of all of them.
        """
        args = self.args
        if args.contrastive_chunk_size is None and not args.accumulate_negatives:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()  # of optimizers that keep two sets of weights
        self._pending.append(self.receive(inputs))
        if args.accumulate_negatives and not self.accelerator.sync_gradients:
            return torch.zeros((), device=args.device)
        batches, self._pending = self._pending, []
        # Set by the Trainer for each optimizer step: the last of an epoch may have fewer.
        divisor = 1 if args.accumulate_negatives else int(self.current_gradient_accumulation_steps)
        return self.step.chunked(
            model,
            self.unwrapped_model,
            batches,
            self.defence.kind,
            args.contrastive_chunk_size or args.train_batch_size,
            divisor,
            self.accelerator,
            self.compute_loss_context_manager,
        )

    def _note_similarities(self, pairs: Embeddings, poisoned: torch.Tensor | None) -> None:
        similarities = (pairs.image_embeds * pairs.text_embeds).sum(dim=-1).detach()  # (B,)
        self._pairs_since_log += similarities.shape[0]
        self.means.add({"pair_similarity": similarities})
        if poisoned is not None:
            self.means.add({"clean_pair_similarity": similarities}, ~poisoned)
            self.means.add({"poisoned_pair_similarity": similarities}, poisoned)

    # ---- Events ----

    def on_train_begin(self) -> None:
        """Called when training starts, after a checkpoint is restored."""
        if self.state.global_step == 0:
            self._forget()
            self._collapse.begin()
        args = self.args
        calls = 1 if args.accumulate_negatives else args.gradient_accumulation_steps
        batches = args.gradient_accumulation_steps // calls
        batch = self._train_batch_size * args.world_size * batches
        self.defence.begin_training(Plan(self.state.max_steps, self.state.num_train_epochs, calls, batch))
        if self.args.bf16_full_eval or self.args.fp16_full_eval:
            # With these, evaluate() before train() turns the weights themselves to half precision.
            warn_of_half_precision(self.unwrapped_model)
        self._epoch = None
        self._pending.clear()
        self.means.clear()
        if self._finite is not None:
            self._finite.clear()
        self._pairs_since_log = 0
        self._last_log = time.perf_counter()
        self.begin_record()

    def on_epoch_begin(self) -> None:
        """Called before each epoch, and again when training resumes within one."""
        self._epoch = self._first_epoch if self._epoch is None else self._epoch + 1
        # A callback may have ended the last epoch within a step.
        self._pending.clear()
        if self._finite is not None:
            self._finite.drop_batches()
        if self._streamed is not None:
            self._streamed.begin_pass(self._epoch)
        self.data_collator.set_epoch(self._epoch)
        self._loader_generator.manual_seed(derive_seed(self.args.seed, self._epoch, self.args.process_index))
        epoch = self.defence.epoch = self._epoch
        found = self.defence.begin_epoch(epoch, lambda augmented=False: self.score_pairs(epoch, augmented))
        if found:
            self.log(found)

    def _forget(self) -> None:
        """
        Called when training starts without a checkpoint. A second `train()` goes on with the weights and the
        optimizer, as the Trainer does, but counts its epochs, and what a defence does in them, from 0.
        """
        self._bad_rows.clear()
        self.skipped = None
        self.defence.reset()

    def on_step_begin(self) -> None:
        """Called before the first batch of each optimizer step."""
        self._micro_step = 0

    def on_optimizer_step(self) -> None:
        """Called after each optimizer step, before it is logged, evaluated and saved."""
        logit_scale = self.unwrapped_model.logit_scale
        if logit_scale.requires_grad:
            with torch.no_grad():
                logit_scale.clamp_(0.0, math.log(self.args.max_logit_scale))

    def on_train_end(self) -> None:
        """Called when training is over."""
        if self._finite is not None:
            self._finite.check()
        self.end_record()
        self._note_skipped_rows()
        if self.skipped:
            logger.warning(f"Unusable rows of train_dataset were skipped, {self.skipped}")
        if self.state.global_step == 0 and self.state.max_steps > 0:
            raise ValueError(
                "train_dataset yielded no full batch of "
                f"per_device_train_batch_size={self.args.per_device_train_batch_size} rows: nothing was trained"
            )

    # ---- Logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each loss term since the last log, over all ranks, and the throughput, to training logs."""
        if "loss" in logs:
            now = time.perf_counter()
            means = self.means.take()
            self._collapse.look(means, self.state.global_step, self.state.max_steps)
            logs.update(means)
            logs["pairs_per_second"] = self._pairs_since_log * self.args.world_size / (now - self._last_log)
            self.defence.logged(logs)
            self._pairs_since_log = 0
            self._last_log = now
        super().log(logs, start_time)

    # ---- Data ----

    def _get_dataloader(  # type: ignore[override]  # passes on what it does not name
        self, dataset: Any, description: str, batch_size: int, **kwargs: Any
    ) -> DataLoader[Any]:
        columns = (self.args.image_column, self.args.caption_column)
        on_bad_row: Any = self.args.on_bad_row
        given = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        if all(dataset is not checked for checked in (self.train_dataset, *given)):
            check_dataset(dataset, *columns, argument="eval_dataset", on_bad_row=on_bad_row)
        # A loader draws a seed for its workers at each epoch, but with persistent workers at the first only, and after
        # resuming within an epoch once more: from the global generator, that would shift the model's dropout.
        generator = self._loader_generator if kwargs.get("is_training") else torch.Generator()
        if kwargs.get("is_training"):
            self.check_batches(batch_size)  # auto_find_batch_size lowers it
        if kwargs.get("is_training") and isinstance(dataset, torch.utils.data.IterableDataset):
            self._streamed_next = StreamedTraining(
                dataset, batch_size, self.args, self.accelerator, self.data_collator, self.worker_settings()
            )
            self._streamed_next.loader.base_dataloader.generator = generator
            return self._streamed_next.loader
        if isinstance(dataset, torch.utils.data.IterableDataset):
            return self._stream_of_rank(dataset, batch_size)
        dataset = IndexedDataset(dataset, *columns, on_bad_row)
        batch_sampler = None
        if kwargs.get("is_training"):
            batch_sampler = self.defence.sampler(len(dataset), batch_size, self.args.world_size, self.args.order_seed)
        if batch_sampler is not None:
            dataloader = self.accelerator.prepare(
                DataLoader(
                    dataset,
                    batch_sampler=batch_sampler,
                    collate_fn=RowsOnHost(self.data_collator),
                    persistent_workers=self.args.dataloader_persistent_workers,
                    in_order=self.args.dataloader_in_order,
                    **self.worker_settings(),
                )
            )
        else:
            # Dropping the last batch is for training: an evaluation reads every row.
            drop_last = self.args.dataloader_drop_last
            self.args.dataloader_drop_last = drop_last and bool(kwargs.get("is_training"))
            try:
                dataloader = super()._get_dataloader(dataset, description, batch_size, **kwargs)
            finally:
                self.args.dataloader_drop_last = drop_last
        getattr(dataloader, "base_dataloader", dataloader).generator = generator
        if kwargs.get("is_training"):
            self._steps_per_epoch = -(-len(dataloader) // self.args.gradient_accumulation_steps)
        return dataloader

    def _stream_of_rank(self, dataset: Any, batch_size: int) -> DataLoader[Any]:
        """The batches to evaluate of an iterable dataset: each rank reads its own rows, however many there are."""
        args = self.args
        if args.world_size > 1 and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"eval_dataset is a {type(dataset).__name__}, of which processes read unequal shares, but with "
                "sharded weights all of them encode equally many batches: give a map-style dataset"
            )
        stream = Stream(
            dataset,
            args.image_column,
            args.caption_column,
            batch_size,
            least_rows=1,
            on_bad_row=args.on_bad_row,  # type: ignore[arg-type]  # checked by the arguments
            rank=args.process_index,
            world_size=args.world_size,
        )
        collator: Any = StreamCollator(self._eval_collator)
        return DataLoader(stream, batch_size=None, collate_fn=collator, **self.worker_settings())

    def worker_settings(self) -> dict[str, Any]:
        """The arguments of a `DataLoader` that say how its workers load."""
        return {
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory,
            "multiprocessing_context": self.args.dataloader_multiprocessing_context,
            "prefetch_factor": self.args.dataloader_prefetch_factor,
        }

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """As the Trainer's; of an iterable dataset, none but those of a whole step, and as many on every rank."""
        if self._streamed is not None and self._streamed.ended:
            return [], None  # the Trainer asks on until max_steps
        batch_samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._streamed is not None:
            batch_samples = self._streamed.take(batch_samples, num_batches)
        return batch_samples, num_items

    def _get_collator_with_removed_columns(
        self, data_collator: Callable[..., Any], description: str | None = None
    ) -> Callable[..., Any]:
        # The collator picks its columns itself; the stock one would hand it only what model.forward takes.
        return RowsOnHost(self.data_collator if description == "Training" else self._eval_collator)

    # ---- Optimizer ----

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if self._finite is not None:
            # A gradient scaler looks for gradients that are not finite by itself, and leaves their step out.
            seen = norm if self.accelerator.scaler is None else None
            self._finite.note_gradient(seen, self.state.global_step + 1, self.state.epoch)
        return norm

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        sharded = shardable(self.unwrapped_model, self.accelerator) if self.is_fsdp_enabled else nullcontext()
        with sharded:
            return super()._prepare_for_training(*args, **kwargs)

    @property
    def _has_phases(self) -> bool:
        """Whether the defence has learning rates of its own."""
        cls = type(self.defence)
        return cls.scheduled is not Defence.scheduled or cls.learning_rate_factor is not Defence.learning_rate_factor

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """The Trainer's schedule over all steps, with the learning rates that the defence has in some epochs."""
        created = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if not created or not self._has_phases:
            return scheduler
        if not isinstance(scheduler, LambdaLR):
            name = SchedulerType(self.args.lr_scheduler_type).value
            raise ValueError(
                f"lr_scheduler_type={shown(name)} does not work with {type(self.defence).__name__}: its phases need a "
                "schedule that is a function of the step, such as 'cosine', 'linear' or 'constant'"
            )
        if self._dataset_length() is None:
            raise ValueError(
                f"train_dataset has no length, and {type(self.defence).__name__} has learning rates by its epochs: "
                "give a map-style dataset"
            )
        # Of the optimizer, which may be the user's, with other rates than args.learning_rate.
        peak = max(map(float, scheduler.base_lrs))
        steps = max(self._steps_per_epoch, 1)  # none before the dataloader is made

        def phased(schedule: Callable[[int], float]) -> Callable[[int], float]:
            return lambda step: self.defence.scheduled(step // steps, schedule(step), peak)

        self.lr_scheduler = LambdaLR(scheduler.optimizer, [phased(schedule) for schedule in scheduler.lr_lambdas])
        return self.lr_scheduler

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As the Trainer's, without `logit_scale` and `logit_bias`: a temperature has nothing to decay to."""
        exempt = ("logit_scale", "logit_bias")
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(exempt)]

    # ---- Evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As the Trainer's; the evaluators run once, with the first dataset where there are several."""
        if self._evaluating:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._evaluating, self._evaluators_prefix = True, metric_key_prefix
        start = time.perf_counter()
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._evaluating, self._evaluators_prefix = False, None
            self._last_log += time.perf_counter() - start  # no part of the training's throughput

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        """Keep the embeddings of a batch for [`evaluation_loop`], which contrasts those of all batches."""
        batch = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            embeddings = self.step.encode(model, batch.inputs)
        self._evaluated.append([batch.rows, *(side.cpu() for side in embeddings)])
        return None, None, None

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> Any:
        """
        As the Trainer's, with the figures of the evaluators among its metrics. The loss is CLIP's over all rows of the
        dataset at once, each against all others: the same for every size of batches and number of processes.
        """
        self._evaluated.clear()
        output: Any = super().evaluation_loop(dataloader, *args, **kwargs)
        rows, loss = self._loss_of_all()
        if rows:
            output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = loss
        prefix, self._evaluators_prefix = self._evaluators_prefix, None
        if prefix is not None and self.evaluators:
            output.metrics.update({f"{prefix}_{name}": value for name, value in self.run_evaluators().items()})
        return output._replace(num_samples=rows)

    @torch.no_grad()
    def _loss_of_all(self) -> tuple[int, float]:
        """How many rows were evaluated on all ranks, and their loss."""
        batches: Any = gather_object(self._evaluated) if self.args.world_size > 1 else list(self._evaluated)
        self._evaluated.clear()
        if not batches:
            return 0, math.nan  # an evaluation of evaluators alone
        sides: Any = [None if side[0] is None else torch.cat(side) for side in zip(*batches, strict=True)]
        numbers, images, texts = sides
        if numbers is not None:
            # accelerate fills up the last batches with rows that others have.
            _, kept = np.unique(numbers, return_index=True)
            images, texts = images[kept], texts[kept]
        if len(images) < 2:
            raise ValueError(ONE_ROW.format("eval_dataset"))
        images, texts = images.to(self.args.device), texts.to(self.args.device)
        return len(images), float(clip_loss(images, texts, scale_of(self.unwrapped_model)))

    def run_evaluators(self) -> dict[str, float]:
        """
        Run the evaluators on the model as it is. Embeddings that several of them need are computed once, and the work
        is shared among the ranks: call it on all of them.
        """
        figures = run_evaluators(self.evaluators, self.processing_class, self.make_embedder())
        self._collapse.judge(figures, self.state.global_step)
        self.note_figures(figures)
        return figures

    # ---- Checkpoints ----

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self._finite is not None:
            self._finite.check()
        self._note_skipped_rows()
        super()._save_checkpoint(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._streamed is not None:
            self._streamed.save(self._staged(output_dir))
        state = self.training_state()
        if self.args.should_save:
            metadata = {"trainer": type(self).__name__, "rows": str(self._dataset_length())}
            if self._streamed is None:
                metadata["steps_per_epoch"] = str(self._steps_per_epoch)
            save_file(state, os.path.join(self._staged(output_dir), STATE_FILE), metadata=metadata)

    def training_state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds beside weights, optimizer and generators; the same on every rank."""
        memory = {name: value.contiguous() for name, value in self.defence.state_dict().items()}
        return {BAD_ROWS: torch.tensor(self.skipped_rows, dtype=torch.int64), **memory}

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        path = os.path.join(checkpoint, STATE_FILE) if checkpoint is not None else ""
        if os.path.isfile(path):
            with safe_open(path, framework="pt") as file:
                self._check_checkpoint(file.metadata() or {}, str(checkpoint))
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            self._bad_rows = set(state.pop(BAD_ROWS).tolist())
            self.defence.load_state_dict(state)
            self.defence.to(self.args.device)
            self.continue_record(str(checkpoint))
        elif checkpoint is not None:
            self._forget()
            logger.warning(
                f"resume_from_checkpoint={shown(checkpoint)} has no {STATE_FILE}, as if saved with "
                "save_only_model=True: training goes on from its weights, but not as it would have without the "
                "interruption."
            )
        super()._load_optimizer_and_scheduler(checkpoint)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        begin = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
        )
        self._streamed, self._streamed_next = self._streamed_next, None
        # The Trainer counts the steps of an iterable dataset against max_steps, not against a pass over it.
        if self._streamed is None:
            self._steps_per_epoch = num_update_steps_per_epoch
        elif checkpoint is not None:
            begin = self._streamed.load(checkpoint, int(self.state.epoch or 0), num_update_steps_per_epoch)
        # Within an epoch the Trainer sees that it is through only after another step.
        if checkpoint is not None and self.state.global_step >= max_steps:
            begin = (num_train_epochs, 0)
        # Where epochs have another number of steps than when the checkpoint was saved, not that of `state.epoch`.
        self._first_epoch = begin[0]
        return begin

    def _check_checkpoint(self, metadata: Mapping[str, str], checkpoint: str) -> None:
        steps = metadata.get("steps_per_epoch")
        # Phases are counted in epochs.
        steps_now = str(self._steps_per_epoch) if steps is not None and self._has_phases else steps
        decides = "; per_device_train_batch_size, the number of processes and gradient_accumulation_steps decide it"
        for name, saved, current, hint in (
            ("trainer", metadata.get("trainer"), type(self).__name__, ""),
            ("number of rows of train_dataset", metadata.get("rows"), str(self._dataset_length()), ""),
            ("number of optimizer steps in an epoch", steps, steps_now, decides),
        ):
            if saved != current:
                raise ValueError(
                    f"resume_from_checkpoint={shown(checkpoint)}: its {name} was {saved}, but is {current} now. "
                    "Resume with what it was saved with, or start anew from its weights by passing the folder as "
                    f"model{hint}"
                )

    def _dataset_length(self) -> int | None:
        dataset: Any = self.train_dataset
        return len(dataset) if hasattr(dataset, "__len__") else None

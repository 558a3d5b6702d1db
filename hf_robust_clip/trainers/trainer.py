"""`CLIPTrainer`: the undefended baseline, which wires the parts of a training to the hooks of the Trainer."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..arguments import CLIPTrainingArguments
from ..augment.images import ImageNormalization
from ..batch import Batch, Embeddings, encode_pairs
from ..callbacks import TrainerHooks
from ..columns import BAD_ROWS, POISONED, ROW_INDEX
from ..data.collator import ORIGINAL, CLIPDataCollator
from ..data.fitting import check_fit
from ..data.rows import check_dataset
from ..data.streams import PLACE
from ..defences.base import Defence, PairScores, Plan
from ..defences.clip import CLIP
from ..describing import describe_dataset, describe_evaluator, describe_skipped
from ..evaluation.embedding import Embedder
from ..evaluation.running import evaluator_list, run_evaluators
from ..files import write_text
from ..kinds import kind
from ..locking import sole_writer
from ..models import SCALARS, check_processor, has_adapters, load_processor, scalars_of
from ..record import RunRecord
from ..seeding import derive_seed
from ..telling import (
    Control,
    MatchedPair,
    RunPictures,
    Study,
    check_report_extra,
    kept_card,
    license_of,
    render_run_report,
    write_card,
)
from ..wording import shown
from .adapters import (
    add_adapters,
    check_adapters,
    complete_adapter_file,
    merged,
    remove_adapter_files,
    warn_of_local_base,
)
from .checkpoints import (
    check_resumed,
    check_saved_weights,
    checkpoint_to_resume,
    sole_training,
    writing_checkpoint,
)
from .checks import (
    callback_list,
    check_arguments,
    check_best_metric,
    check_negatives,
    check_trained,
    decide_best_metric,
    explained,
    load_to_train,
    own_text_augmentation,
    resolve_image_augmentation,
    resolve_text_augmentation,
    takes_sigmoid,
    warn_of_half_precision,
)
from .evaluating import EvaluatedPairs
from .finite import FiniteCheck
from .freezing import freezing
from .hub import check_merged_push, warn_of_failed_pushes
from .loaders import (
    indexed,
    is_stream,
    map_style_loader,
    stream_to_evaluate,
    training_collator,
)
from .pictures import pictures_of
from .recording import record_of
from .runlog import RunLog
from .schedule import has_phases, has_rates, phased
from .scoring import score_pairs
from .sharding import (
    check_engine,
    clamp,
    given_dimension,
    loaded_whole,
    register_embedding_methods,
    saved_scalars,
    shards,
    whole_scalars,
    without_dimension,
)
from .step import Step
from .streaming import StreamedTraining
from .watch import Watch

logger = logging.get_logger(__name__)

STATE_FILE = "robust_clip_state.safetensors"
_FIRST_SCALE = "first_logit_scale"
#: Methods in which a subclass may add metrics, whose names are then not known.
_EVALUATION = ("evaluate", "evaluation_loop", "run_evaluators")


class CLIPTrainer(Trainer):
    """
    Train or fine-tune a dual encoder of images and texts with the loss of CLIP (Radford et al., ICML 2021), or, where
    it has a `logit_bias`, of SigLIP (Zhai et al., ICCV 2023).

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
            Made from `processing_class` and `args` by default. One of your own must return this trainer's text views,
            un-augmented and augmented ones where the trainer has them. Its `text_augmentation` goes before
            `args.text_preset`.
        train_dataset (`datasets.Dataset`, `datasets.IterableDataset` or any torch dataset, *optional*):
            Rows with an image and a caption, under the names in `args`. [`~data.streams.Stream`] says who reads what
            of an iterable dataset. An optional boolean column `poisoned` marks
            pairs known to be poisoned.
        eval_dataset (*optional*):
            The same, or a dictionary of such, each of at least 2 rows; gives `eval_loss`, the CLIP loss of its
            un-augmented pairs, all contrasted with each other; of a `loss_type` that is sigmoid, SigLIP's.
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
            Trains adapters instead of the whole model, and `logit_scale` and `logit_bias`, saved with them;
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
        evaluators: Callable[..., dict[str, float]] | Sequence[Callable[..., dict[str, float]]] = (),
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
        if not isinstance(optimizers, list | tuple) or len(optimizers) != 2:
            raise ValueError(f"optimizers must be a pair of an optimizer and a scheduler, but is {kind(optimizers)}")
        if defence is None:
            defence = self.make_defence(args, train_dataset)
        self.evaluators = evaluator_list(evaluators)
        with loaded_whole(args):
            encoder = load_to_train(model)
        warn_of_half_precision(encoder)
        sigmoid = takes_sigmoid(encoder, args.loss_type)
        processing_class = load_processor(model, processing_class)
        check_processor(processing_class, "processing_class")
        for evaluator in self.evaluators:
            if hasattr(evaluator, "check"):
                evaluator.check(processing_class)
        decide_best_metric(args, self.evaluators)
        if all(getattr(type(self), name) is getattr(CLIPTrainer, name) for name in _EVALUATION):
            check_best_metric(args, self.evaluators, eval_dataset)
        self.image_augmentation = resolve_image_augmentation(image_augmentation, args)
        views = tuple(self.views or defence.views)
        if text_augmentation is None and data_collator is not None:
            text_augmentation = own_text_augmentation(data_collator, args, defence.text_views or views)
        text_augmentation = resolve_text_augmentation(text_augmentation, args)
        # One view and an augmentation: the augmented view takes the original's place.
        augments = self.image_augmentation is not None or text_augmentation is not None
        self.views = ("augmented",) if views == (ORIGINAL,) and augments else views
        text_views = tuple(defence.text_views or self.views)
        if text_augmentation is not None and text_views == (ORIGINAL,):
            raise ValueError(
                f"text_augmentation, or text_preset={shown(args.text_preset)}, would change nothing: "
                f"{type(defence).__name__} as it is takes captions un-augmented; accepted is 'identity'"
            )
        trains = train_dataset is not None
        collator = training_collator(
            data_collator, processing_class, encoder, args, text_views, text_augmentation, trains
        )
        if peft_config is not None:
            encoder = add_adapters(encoder, peft_config, args.seed)
        check_adapters(encoder, args)
        frozen = freezing(encoder, args.freeze, defence)
        if train_dataset is not None:
            check_trained(encoder)
        check_fit(encoder, processing_class, collator, train_dataset)
        if self.evaluators and collator.tokenizer is not processing_class.tokenizer:
            check_fit(encoder, processing_class)
        super().__init__(
            model=encoder,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            # The Trainer refuses an eval_strategy without a dataset; evaluators bring their own.
            eval_dataset=[] if eval_dataset is None and self.evaluators else eval_dataset,
            processing_class=processing_class,
            callbacks=callback_list(callbacks),
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        check_engine(self.accelerator, args, encoder)
        # Without these the Trainer sees no labels and reports no eval_loss.
        self.can_return_loss = True
        self.label_names = []
        self._first_logit_scale = encoder.logit_scale.max().item()
        self._without_dimension = without_dimension(encoder)
        device = self.args.device
        self.defence = defence.to(device)
        normalization = ImageNormalization(collator.preprocess.mean, collator.preprocess.std).to(device)
        augmentation = self.image_augmentation
        self.step = Step(
            self.views,
            text_views,
            self.defence,
            augmentation,
            normalization,
            device,
            self._loss,
            sigmoid,
            frozen,
            self.accelerator.autocast,
        )
        folder = Path(str(args.output_dir))
        finite = FiniteCheck(folder, args.process_index, device, lambda: self.unwrapped_model.named_parameters())
        self.watch = Watch(self.accelerator, finite if args.stop_on_non_finite else None)
        #: What is logged as a mean; see [`~trainers.means.RunningMeans`].
        self.means = self.watch.means
        #: For whoever tells of the progress, between two logs.
        self.recent_loss = self.watch.recent_loss
        self.defence.gather, self.defence.means = args.gather_across_devices, self.means
        self._eval_collator = collator.for_evaluation()
        self._evaluated = EvaluatedPairs()
        self._evaluators_prefix: str | None = None
        self._evaluating = False
        self._epoch: int | None = None
        self._first_epoch = 0
        self._steps_per_epoch = 0  # of a map-style dataset, in optimizer steps; known when its loader is made
        self._micro_step = 0
        self._pending: list[Batch] = []
        self._bad_rows: set[int] = set()
        self._loader_generator = torch.Generator()
        self._streamed: StreamedTraining | None = None
        self._streamed_next: StreamedTraining | None = None
        self._eval_loaders: dict[str, tuple[Any, DataLoader[Any]]] = {}  # with persistent workers
        self._unwrapped: tuple[Any, Any] | None = None
        self._described: tuple[Any, dict[str, Any]] | None = None
        self.add_callback(
            TrainerHooks(
                on_train_begin=self.on_train_begin,
                on_epoch_begin=self.on_epoch_begin,
                on_step_begin=self.on_step_begin,
                on_pre_optimizer_step=self.defence.after_backward,
                on_optimizer_step=self.on_optimizer_step,
                on_train_end=self.on_train_end,
            )
        )
        self.add_callback(RunLog())
        if train_dataset is not None:
            self.defence.attach(self.unwrapped_model)
            self.check_batches(self.args.train_batch_size)
        if has_rates(self.defence) and self.lr_scheduler is not None:
            logger.warning(
                f"optimizers brings a scheduler of its own: it is used as it is, without the learning rates of "
                f"{type(self.defence).__name__}."
            )

    @property
    def unwrapped_model(self) -> Any:
        """The model without what distributed training wraps around it."""
        if self._unwrapped is None or self._unwrapped[0] is not self.model:
            # Looking for wrappers goes through all modules.
            self._unwrapped = self.model, self.accelerator.unwrap_model(self.model)
        return self._unwrapped[1]

    @property
    def loaded_from(self) -> str:
        """The folder or Hub id that the model was loaded from; `""` where it was made."""
        return str(getattr(self.unwrapped_model.config, "_name_or_path", "") or "")

    @property
    def run_log(self) -> RunLog:
        """Metrics outside of training, the time in training, skipped rows."""
        return next(item for item in self.callback_handler.callbacks if isinstance(item, RunLog))

    @property
    def sharded(self) -> bool:
        """Whether an engine shards the weights, which then come together only while all ranks encode in step."""
        return shards(self.accelerator)

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
        return score_pairs(
            indexed(self.train_dataset, self.args),
            self.model_wrapped if self.sharded else self.unwrapped_model,
            self.step,
            self.data_collator,
            self.args,
            epoch,
            augmented,
            self.sharded,
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
        return self.watch.see(self.loss_components(views, scale, batch), views, scale, batch)

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
        loss = self.step.chunked(
            model,
            self.unwrapped_model,
            batches,
            self.defence.kind,
            args.contrastive_chunk_size or args.train_batch_size,
            divisor,
            self.accelerator,
            self.compute_loss_context_manager,
        )
        every = args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return loss

    # ---- Events ----

    def on_train_begin(self) -> None:
        """Called when training starts, after a checkpoint is restored."""
        anew = self.state.global_step == 0
        if anew:
            self._forget()
        if self.is_fsdp_enabled:
            register_embedding_methods(self.unwrapped_model)
            self.step.held = scalars_of(self.unwrapped_model)
        args = self.args
        calls = 1 if args.accumulate_negatives else args.gradient_accumulation_steps
        batches = args.gradient_accumulation_steps // calls
        batch = self._train_batch_size * args.world_size * batches
        self.defence.begin_training(Plan(self.state.max_steps, self.state.num_train_epochs, calls, batch))
        if args.bf16_full_eval or args.fp16_full_eval:
            # With these, evaluate() before train() turns the weights themselves to half precision.
            warn_of_half_precision(self.unwrapped_model)
        for evaluator in self.evaluators:
            describe_evaluator(evaluator)
        self._epoch = None
        self._pending.clear()
        self.watch.begin(anew)

    def on_epoch_begin(self) -> None:
        """Called before each epoch, and again when training resumes within one."""
        self._epoch = self._first_epoch if self._epoch is None else self._epoch + 1
        # A callback may have ended the last epoch within a step.
        self._pending.clear()
        self.watch.drop_batches()
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
        self.run_log.skipped = None
        self.defence.reset()

    def on_step_begin(self) -> None:
        """Called before the first batch of each optimizer step."""
        self._micro_step = 0

    def on_optimizer_step(self) -> None:
        """Called after each optimizer step, before it is logged, evaluated and saved."""
        logit_scale = self.step.held.get("logit_scale", self.unwrapped_model.logit_scale)
        if logit_scale.requires_grad:
            clamp(logit_scale, 0.0, max(math.log(self.args.max_logit_scale), self._first_logit_scale))

    def on_train_end(self) -> None:
        """Called when training is over."""
        self.watch.check()
        self._note_skipped_rows()
        if self.run_log.skipped:
            logger.warning(f"Unusable rows of train_dataset were skipped, {self.run_log.skipped}")
        if self.state.global_step == 0 and self.state.max_steps > 0:
            raise ValueError(
                "train_dataset yielded no full batch of "
                f"per_device_train_batch_size={self.args.per_device_train_batch_size} rows: nothing was trained"
            )

    def _note_skipped_rows(self) -> None:
        # For the record, which is written by one rank alone.
        self.run_log.skipped = describe_skipped(self.skipped_rows, streamed=self._dataset_length() is None)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each loss term since the last log, over all ranks, and the throughput, to training logs."""
        if "loss" in logs:
            logs.update(self.watch.logs(self.state.global_step, self.state.max_steps))
            self.defence.logged(logs)
        super().log(logs, start_time)

    # ---- Data ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As the Trainer's, with the batches of the defence or of the stream."""
        dataset, args, batch_size = self.train_dataset, self.args, self._train_batch_size
        if dataset is None:
            raise ValueError("train_dataset is None: training needs one")
        self.check_batches(batch_size)  # auto_find_batch_size lowers it
        if is_stream(dataset):
            self._streamed_next = StreamedTraining(dataset, batch_size, args, self.accelerator, self.data_collator)
            self._streamed_next.loader.base_dataloader.generator = self._loader_generator
            return self._streamed_next.loader
        rows = indexed(dataset, args)
        own = self.defence.sampler(len(rows), batch_size, args.world_size, args.order_seed)
        batches: dict[str, Any] = {"batch_sampler": own}
        if own is None:
            sampler = self._get_train_sampler(rows)
            batches = {"batch_size": batch_size, "sampler": sampler, "drop_last": args.dataloader_drop_last}
        loader = map_style_loader(
            rows, self.data_collator, args, self.accelerator, batches, self._loader_generator, training=True
        )
        self._steps_per_epoch = -(-len(loader) // args.gradient_accumulation_steps)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As the Trainer's, of every row: dropping the last batch is for training."""
        given: Any = self.eval_dataset
        name = eval_dataset if isinstance(eval_dataset, str) else "eval"
        dataset = given[name] if isinstance(eval_dataset, str) else given if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("eval_dataset is None: evaluation needs one")
        known = (self.train_dataset, *(given.values() if isinstance(given, dict) else (given,)))
        if all(dataset is not checked for checked in known):
            on_bad_row: Any = self.args.on_bad_row
            columns = (self.args.image_column, self.args.caption_column)
            check_dataset(dataset, *columns, argument="eval_dataset", on_bad_row=on_bad_row)
        if is_stream(dataset):
            return stream_to_evaluate(dataset, self._eval_collator, self.args, self.sharded)
        kept = self._eval_loaders.get(name)
        if kept is not None and kept[0] is dataset:
            return kept[1]
        rows = indexed(dataset, self.args)
        batches = {"batch_size": self.args.eval_batch_size, "sampler": self._get_eval_sampler(rows)}
        loader = map_style_loader(
            rows, self._eval_collator, self.args, self.accelerator, batches, torch.Generator(), training=False
        )
        if self.args.dataloader_persistent_workers:
            self._eval_loaders[name] = dataset, loader  # or each evaluation would start workers that stay
        return loader

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As that of an evaluation."""
        return self.get_eval_dataloader(test_dataset)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """As the Trainer's; of an iterable dataset, none but those of a whole step, and as many on every rank."""
        if self._streamed is not None and self._streamed.ended:
            return [], None  # the Trainer asks on until max_steps
        batch_samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._streamed is not None:
            batch_samples = self._streamed.take(batch_samples, num_batches)
        return batch_samples, num_items

    # ---- Optimizer ----

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.watch.see_gradient(norm, self.state.global_step + 1, self.state.epoch)
        return norm

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's schedule over all steps, with the learning rates that the defence has of its own."""
        created = self.lr_scheduler is None
        scheduler: Any = super().create_scheduler(num_training_steps, optimizer)
        if created and has_rates(self.defence):
            name, rows = self.args.lr_scheduler_type, self._dataset_length()
            scheduler = phased(scheduler, self.defence, name, rows, self._steps_per_epoch, num_training_steps)
            self.lr_scheduler = scheduler
        return scheduler

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As the Trainer's, without `logit_scale` and `logit_bias`: a temperature has nothing to decay to."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(SCALARS)]

    # ---- Evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        As the Trainer's; the evaluators run once, with the first dataset where there are several.

        Raises:
            `ValueError`: With DeepSpeed, before training.
        """
        if self.is_deepspeed_enabled and self.deepspeed is None:
            raise ValueError(
                "evaluate() does not work with DeepSpeed before train(), which makes its engine: set "
                "eval_on_start=True for the figures before training"
            )
        if self._evaluating:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._evaluating, self._evaluators_prefix = True, metric_key_prefix
        start = time.perf_counter()
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._evaluating, self._evaluators_prefix = False, None
            self.watch.leave_out(time.perf_counter() - start)

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        """Keep the embeddings of a batch for [`evaluation_loop`], which contrasts those of all batches."""
        batch = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            embeddings = encode_pairs(model, batch.inputs)
        self._evaluated.add(batch.rows, embeddings)
        return None, None, None

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> Any:
        """
        As the Trainer's, with the figures of the evaluators among its metrics. The loss is that between images and
        captions (`loss_type`), over all rows of the dataset at once, each against all others: the same for every size
        of batches and number of processes.
        """
        self._evaluated.clear()
        output: Any = super().evaluation_loop(dataloader, *args, **kwargs)
        rows, loss = self._evaluated.loss(*self.step.scalars(self.unwrapped_model), self.args.world_size)
        if rows:
            output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = loss
        prefix, self._evaluators_prefix = self._evaluators_prefix, None
        if prefix is not None and self.evaluators:
            output.metrics.update({f"{prefix}_{name}": value for name, value in self.run_evaluators().items()})
        return output._replace(num_samples=rows)

    def make_embedder(self) -> Embedder:
        """One for the model as it is. It shares its work among the ranks: call it on all of them."""
        return Embedder(
            self.unwrapped_model,
            self.processing_class,
            batch_size=self.args.eval_batch_size,
            across_ranks=not self.sharded,
            check=False,
        )

    def run_evaluators(self) -> dict[str, float]:
        """
        Run the evaluators on the model as it is. Embeddings that several of them need are computed once, and the work
        is shared among the ranks: call it on all of them.
        """
        metrics = run_evaluators(self.evaluators, self.processing_class, self.make_embedder())
        self.watch.collapse.judge(metrics, self.state.global_step)
        if not self.is_in_train:
            self.run_log.note(metrics, self.state.global_step)
        return metrics

    # ---- Checkpoints ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As the Trainer's. `resume_from_checkpoint=True` takes the newest checkpoint that is whole, and names those that
        are not.

        Raises:
            `ValueError`: If there is none, or the one that is named is not whole or of another model; if another
                process writes to `output_dir` ([`~locking.FolderInUseError`]); without a checkpoint, if `output_dir`
                is the folder that the model was loaded from, whose files would be replaced; with DeepSpeed, the second
                time.
        """
        if self.is_deepspeed_enabled and self.deepspeed is not None:
            raise ValueError(
                "train() works once with DeepSpeed, whose engine cannot be made anew: make another trainer, with the "
                "folder of the saved model as model, or resume a checkpoint there"
            )
        folder = str(self.args.output_dir)
        with sole_training(self.args), self.defence.during_training(self.unwrapped_model):
            checkpoint = checkpoint_to_resume(resume_from_checkpoint, folder, self.loaded_from)
            if checkpoint is not None:
                check_saved_weights(self.unwrapped_model, checkpoint)
            # An evaluation before marks the model as prepared, and accelerate would not wrap it for training: ranks
            # would drift apart (transformers 5.23, accelerate 1.15).
            vars(self.unwrapped_model).pop("_is_accelerate_prepared", None)
            try:
                with given_dimension(self.unwrapped_model, self.accelerator):
                    return super().train(checkpoint, *args, **kwargs)
            finally:
                self._warn_of_failed_pushes()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.watch.check()
        self._note_skipped_rows()
        if self.args.push_to_hub and self.args.hub_always_push:
            # The push under way reads the files that this one is about to overwrite: what arrived would be torn.
            self._finish_current_push()
        self._warn_of_failed_pushes()
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.run_log.checkpoint = folder
        try:
            with writing_checkpoint(folder, self.args):
                super()._save_checkpoint(model, trial)
        finally:
            self.run_log.checkpoint = None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._streamed is not None:
            self._streamed.save(output_dir)
        state = self.training_state()
        if self.args.should_save:
            metadata = {"trainer": type(self).__name__, "rows": str(self._dataset_length())}
            metadata[_FIRST_SCALE] = repr(self._first_logit_scale)
            if self._streamed is None:
                metadata["steps_per_epoch"] = str(self._steps_per_epoch)
            save_file(state, os.path.join(output_dir, STATE_FILE), metadata=metadata)

    def training_state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds beside weights, optimizer and generators; the same on every rank."""
        memory = {name: value.contiguous() for name, value in self.defence.state_dict().items()}
        return {BAD_ROWS: torch.tensor(self.skipped_rows, dtype=torch.int64), **memory}

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        path = os.path.join(checkpoint, STATE_FILE) if checkpoint is not None else ""
        if os.path.isfile(path):
            with safe_open(path, framework="pt") as file:
                # Phases are counted in epochs.
                steps = self._steps_per_epoch if has_phases(self.defence) else None
                saved = file.metadata() or {}
                check_resumed(str(checkpoint), saved, type(self).__name__, self._dataset_length(), steps)
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            # The trainer may have been given the checkpoint in place of the model that training started from.
            self._first_logit_scale = max(self._first_logit_scale, float(saved.get(_FIRST_SCALE, 0)))
            self._bad_rows = set(state.pop(BAD_ROWS).tolist())
            self.defence.load_state_dict(state)
            self.defence.to(self.args.device)
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

    def _dataset_length(self) -> int | None:
        dataset: Any = self.train_dataset
        return len(dataset) if hasattr(dataset, "__len__") else None

    # ---- What a run leaves behind ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = output_dir or str(self.args.output_dir)
        save = super()._save
        if self.sharded and has_adapters(self.unwrapped_model):
            # Those that are frozen, ZeRO 3 leaves out of the state.
            state_dict = {**whole_scalars(self.unwrapped_model), **(state_dict or {})}
        if state_dict is not None:
            state_dict = saved_scalars(state_dict, self._without_dimension)
        if not self.args.should_save or not has_adapters(self.unwrapped_model):
            save(output_dir, state_dict)
        elif self.args.merge_adapters and self.run_log.checkpoint is None:
            trained, self.model = self.model, merged(self.unwrapped_model)
            try:
                save(folder, state_dict)
            finally:
                self.model = trained
            remove_adapter_files(folder)
        else:
            with kept_card(folder):
                save(output_dir, state_dict)
            complete_adapter_file(self.unwrapped_model, folder, state_dict)
        if self.args.should_save:
            self.record().save(folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, with the record of the run beside the model."""
        folder = Path(output_dir or str(self.args.output_dir))
        # By the main process alone, which many call it on; a checkpoint is in the folder of the training.
        alone = self.args.process_index == 0 and self.run_log.checkpoint is None
        with sole_writer(folder, "output_dir", "a training") if alone else nullcontext():
            super().save_model(output_dir, _internal_call)

    def record(self) -> RunRecord:
        """What this run is and has come to, for its card and its report. It is saved beside the model."""
        return record_of(
            type(self),
            self.unwrapped_model,
            self.args,
            self.state,
            data=self.describe_data(),
            evaluators=self.evaluators,
            before=self.run_log.before,
            after=self.run_log.after,
            defence=self.defence,
            image_size=self.data_collator.preprocess.image_size,
            augmentations=(self.image_augmentation, self.data_collator.augmentation),
            skipped=self.run_log.skipped,
            seconds=self.run_log.seconds,
            sigmoid=self.step.sigmoid,
        )

    def describe_data(self) -> dict[str, Any] | None:
        """What the training data is, without its rows; `None` without any. It is read once: millions take a while."""
        data = self.train_dataset
        if data is None:
            return None
        if self._described is None or self._described[0] is not data:
            self._described = data, describe_dataset(data)
        return dict(self._described[1])

    def pictures(self) -> RunPictures:
        """What a report shows of the model as it is. All ranks share the work: call it on all of them."""
        embedder = self.make_embedder()
        return pictures_of(self.evaluators, embedder, self._matches(embedder), self.defence.pictures())

    def _matches(self, embedder: Embedder) -> list[MatchedPair]:
        """What training pairs are matched with, where the defence matches."""
        return []

    def save_report(
        self,
        path: str | os.PathLike[str],
        controls: Mapping[str, RunRecord] | Sequence[Control] | None = None,
        study: Study | None = None,
    ) -> None:
        """
        Write the report of this run as one HTML file that needs nothing beside it. Its pictures take the model as it
        is and the evaluators' images; call it on all ranks.

        Args:
            path (`str` or path): Of the file, such as `"report.html"`. Its folder is made, a file there replaced.
            controls (mapping of `str` to [`RunRecord`], *optional*): Other runs, whose figures stand beside those of
                this one, and what to call them; or a list of [`~telling.Control`]s, which have pictures as well.
            study ([`~telling.Study`], *optional*): What the page says of the experiment that these runs make.

        Raises:
            `ValueError`: If it is a folder.
            `ModuleNotFoundError`: Without the extra `report`.
        """
        check_report_extra()
        file = Path(path)
        if file.is_dir():
            raise ValueError(
                f"path: {file} is a folder; accepted is the name of a file, such as {file / 'report.html'}"
            )
        pictures = self.pictures()
        if self.args.should_save:
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(controls, Mapping):
                controls = [Control(label, record) for label, record in controls.items()]
            write_text(file, render_run_report(self.record(), pictures, controls or (), study))

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Write the model card of this run, `README.md` in `args.output_dir`, from [`record`]: what was done, the figures
        of the evaluators before and after, and what was not measured. A `README.md` that a person wrote stays.

        Args:
            language, tags, model_name: As of `transformers.Trainer`.
            license (`str`, *optional*): `None`: that of the model that training started from, if its card is on disk.
            finetuned_from (`str`, *optional*): Hub id of that model. `None`: the one that it was loaded from.
            tasks (`str` or `list[str]`, *optional*): In place of `zero-shot-image-classification`.
            dataset_tags (`str` or `list[str]`, *optional*): Hub ids of the training data, beside what it says itself.
            dataset, dataset_args (`str` or `list[str]`, *optional*): What the data is called, and its arguments.

        Raises:
            `ValueError`: If `finetuned_from` or one of `dataset_tags` is not an id of the Hub.
        """
        if not self.is_world_process_zero():
            return
        write_card(
            self.record(),
            str(self.args.output_dir),
            language=language,
            license=license or license_of(self.loaded_from),
            tags=tags,
            model_name=model_name or Path(str(self.args.output_dir)).resolve().name,
            base_model=finetuned_from,
            tasks=tasks,
            datasets=dataset_tags,
            dataset_names=dataset,
            dataset_args=dataset_args,
            repo_id=self.hub_model_id or self.args.hub_model_id,
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """
        As the Trainer's, with the card of [`create_model_card`].

        Raises:
            `ValueError`: With `merge_adapters`, if the repository has adapters, which loading would prefer to the
                merged model.
        """
        if self.args.merge_adapters and self.hub_model_id is None:
            self.init_hf_repo(token=kwargs.get("token"))
        if self.is_world_process_zero():
            if self.args.merge_adapters:
                revision = kwargs.get("revision") or self.args.hub_revision
                check_merged_push(str(self.hub_model_id), kwargs.get("token") or self.args.hub_token, revision)
            warn_of_local_base(self.unwrapped_model, self.args)
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            self._warn_of_failed_pushes()

    def _warn_of_failed_pushes(self) -> None:
        push = getattr(self, "push_in_progress", None)
        warn_of_failed_pushes(push, self.hub_model_id if push is not None else None, str(self.args.output_dir))

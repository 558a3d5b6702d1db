"""What a trainer refuses before any step, and the augmentations that its arguments name."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, cast

import torch
from accelerate.utils import is_compiled_module
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.utils import logging

from ..arguments import CLIPTrainingArguments
from ..augment.images import ImageAugmentation
from ..augment.text import TextAugmentation
from ..data.collator import ORIGINAL, CLIPDataCollator
from ..data.rows import check_dataset
from ..evaluation.base import Better, Evaluator
from ..kinds import check_callable, is_stream, kind
from ..models import load_dual_encoder
from ..wording import listed, shortened, shown

logger = logging.get_logger(__name__)

IDENTITY = "identity"
ONE_ROW = "{} has one row: contrasted with no other its loss is 0; it needs at least 2 rows"
#: Ways to draw rows that need no lengths of texts.
SAMPLINGS = ("random", "sequential")

_A_PROCESSOR = "pass processing_class=, a processor with an image_processor and a tokenizer"
#: What the stock Trainer takes, or took, and what to use here.
INSTEAD = {
    "compute_metrics": "pass evaluators=, each `(model, processor, embedder) -> dict[str, float]`. What they return "
    "is part of every evaluation, as eval_*",
    "preprocess_logits_for_metrics": "pass evaluators=, which embed images and texts by themselves",
    "compute_loss_func": "derive from this trainer and override loss_components, which returns the terms of the loss",
    "model_init": "pass model=. To search hyper-parameters, make a trainer with a model of its own for each trial",
    "tokenizer": _A_PROCESSOR,
    "image_processor": _A_PROCESSOR,
    "processor": _A_PROCESSOR,
}

_P = ParamSpec("_P")


def explained(init: Callable[_P, None]) -> Callable[_P, None]:
    """An `__init__` that says what to pass in place of an argument of the stock Trainer; its signature stays."""

    @functools.wraps(init)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> None:
        for name in kwargs.keys() & INSTEAD.keys():
            if kwargs.pop(name) is not None:
                raise ValueError(f"{name}= is not an argument of {type(args[0]).__name__}: {INSTEAD[name]}")
        init(*args, **kwargs)

    return checked


def check_arguments(
    args: CLIPTrainingArguments, args_class: type[CLIPTrainingArguments], train_dataset: Any, eval_dataset: Any
) -> None:
    """
    `ValueError` for arguments of another class or for texts alone, DataParallel, ways to deal batches that tear them
    apart, and datasets that do not work.
    """
    if not isinstance(args, args_class):
        raise ValueError(f"args must be a {args_class.__name__}, but is {type(args).__name__}")
    if args.n_gpu > 1:
        raise ValueError(
            f"this process sees {args.n_gpu} GPUs and would split batches between them with nn.DataParallel, which "
            "tears stacked views apart: start it with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES"
        )
    if args.train_sampling_strategy not in SAMPLINGS:
        raise ValueError(
            f"train_sampling_strategy must be one of {listed(SAMPLINGS)}, but is "
            f"{shown(args.train_sampling_strategy)}, which needs the length of each row's text"
        )
    for name, off, why in (
        (
            "neftune_noise_alpha",
            None,
            "NEFTune adds noise to the input embeddings of a language model, and a dual encoder has none of its own",
        ),
        ("label_smoothing_factor", 0.0, "it smooths the labels of classes, and pairs have none"),
    ):
        if getattr(args, name) != off:
            raise ValueError(f"{name} must be {off}, but is {shown(getattr(args, name))}: {why}")
    if args.contrastive_chunk_size is not None or args.accumulate_negatives:
        _check_chunking(args)
    _check_dealing(args, train_dataset)
    columns = (args.image_column, args.caption_column)
    datasets = {"eval_dataset": eval_dataset}
    if isinstance(eval_dataset, dict):
        datasets = {f"eval_dataset[{shown(name)}]": dataset for name, dataset in eval_dataset.items()}
    on_bad_row: Any = args.on_bad_row
    for name, dataset in {"train_dataset": train_dataset, **datasets}.items():
        if dataset is not None:
            check_dataset(dataset, *columns, argument=name, on_bad_row=on_bad_row)
            if name != "train_dataset" and hasattr(dataset, "__len__") and len(dataset) == 1:
                raise ValueError(ONE_ROW.format(name))
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and hasattr(train_dataset, "__len__") and len(train_dataset) < batch:
        raise ValueError(
            f"train_dataset has {len(train_dataset)} rows, fewer than one batch of {batch} "
            f"(per_device_train_batch_size={args.per_device_train_batch_size} on {args.world_size} processes): "
            "lower per_device_train_batch_size, or set dataloader_drop_last=False"
        )


def check_negatives(args: CLIPTrainingArguments, batch_size: int, rows: int | None, accumulated: bool) -> None:
    """
    Refuse batches in which a pair is contrasted with no other: its loss is 0 whatever the weights, and so is its
    gradient.

    Args:
        args ([`CLIPTrainingArguments`]): Of the trainer.
        batch_size (`int`): Rows of a batch of one process; `auto_find_batch_size` lowers what `args` has.
        rows (`int`, *optional*): Of `train_dataset`; `None` for a stream, which leaves out a last batch of one row.
        accumulated (`bool`): Whether all batches of an optimizer step are contrasted with each other.

    Raises:
        `ValueError`: For batches of one pair, and for a last batch, or a last step of an epoch, of one.
    """
    gathered = args.world_size if args.gather_across_devices else 1
    batches = args.gradient_accumulation_steps if accumulated else 1
    if batches * batch_size * gathered < 2:
        raise ValueError(
            f"per_device_train_batch_size={batch_size} contrasts each pair with no other: the loss is 0, and nothing "
            "is trained. Accepted are at least 2 pairs; contrastive_chunk_size=1 takes them through the memory "
            "of one pair"
        )
    if rows is None:
        return
    share = rows / (batch_size * args.world_size)
    count = math.floor(share) if args.dataloader_drop_last else math.ceil(share)
    # Several processes fill up the last batch with rows from the start.
    fills = args.dataloader_drop_last or args.world_size > 1
    last = batch_size if fills else rows % batch_size or batch_size
    in_last_step = count % batches or batches
    if count and ((in_last_step - 1) * batch_size + last) * gathered < 2:
        way_out = "leave out" if last == 1 < batch_size else "add"
        raise ValueError(
            f"train_dataset has {rows} rows, so that the last step of an epoch contrasts one pair with no other: "
            f"{way_out} a row, or set dataloader_drop_last=True with per_device_train_batch_size of at least 2"
        )


def decide_best_metric(args: CLIPTrainingArguments, evaluators: Sequence[Any]) -> None:
    """Set an open `greater_is_better` by what the evaluators say; with a warning to `True` where none says it."""
    metric = args.metric_for_best_model
    if metric is None or args.greater_is_better is not None:
        return
    better = _metrics(evaluators).get(metric.removeprefix("eval_"))
    if better is None:
        logger.warning(
            f"No Evaluator says which way metric_for_best_model={shown(metric)} is better: the most of it counts as "
            "the best. If less is better, set greater_is_better=False."
        )
    args.greater_is_better = better != "less"


def check_best_metric(args: CLIPTrainingArguments, evaluators: Sequence[Any], eval_dataset: Any) -> None:
    """
    `ValueError` for a `metric_for_best_model` that no evaluation has: the Trainer looks for it after the first one.
    The metrics of what is not an [`~evaluation.base.Evaluator`] are not known before.
    """
    metric, known = args.metric_for_best_model, all(isinstance(evaluator, Evaluator) for evaluator in evaluators)
    if metric is None or not known or args.eval_strategy == "no" or not (evaluators or eval_dataset is not None):
        return
    losses = [f"{name}_loss" for name in eval_dataset] if isinstance(eval_dataset, dict) else ["loss"]
    metrics = list(_metrics(evaluators))
    accepted = metrics if eval_dataset is None else [*metrics, *losses]
    if metric.removeprefix("eval_") not in accepted:
        hint = "; a loss takes an eval_dataset" if eval_dataset is None else ""
        raise ValueError(
            shortened(
                f"metric_for_best_model={shown(metric)} is no figure of an evaluation; accepted are "
                f"{listed(accepted, longest=60)}{hint}"
            )
        )


def _metrics(evaluators: Sequence[Any]) -> dict[str, Better]:
    """The metrics of all evaluators that name them, and which way is better."""
    metrics: dict[str, Better] = {}
    for evaluator in evaluators:
        if isinstance(evaluator, Evaluator):
            metrics |= evaluator.prefixed(evaluator.metrics())
    return metrics


def _check_dealing(args: CLIPTrainingArguments, train_dataset: Any) -> None:
    accelerator_config: Any = args.accelerator_config
    streamed, several = is_stream(train_dataset), args.world_size > 1
    for name in ("split_batches", "dispatch_batches"):
        if getattr(accelerator_config, name) and (streamed or several):
            raise ValueError(
                f"accelerator_config.{name}=True does not work with an iterable train_dataset or several processes, "
                "each of which reads batches of per_device_train_batch_size rows for itself: set it to False"
            )
    uneven = several and not accelerator_config.even_batches and not args.dataloader_drop_last
    if uneven and not streamed and train_dataset is not None:
        raise ValueError(
            f"accelerator_config.even_batches=False and dataloader_drop_last=False leave {args.world_size} processes "
            "with unequal shares of the last batch, so that they wait for each other forever: set one of them to True"
        )


def _check_chunking(args: CLIPTrainingArguments) -> None:
    which = "accumulate_negatives" if args.accumulate_negatives else "contrastive_chunk_size"
    if args.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"{which} needs a CPU or a CUDA device, whose dropout can be drawn again alike, but args.device is "
            f"{args.device}"
        )
    if "lomo" in args.optim:
        raise ValueError(
            f"{which} does not work with optim={shown(args.optim)}, which updates weights during the backward pass: "
            "set another optimizer, such as 'adamw_torch'"
        )


def warn_of_half_precision(model: nn.Module) -> None:
    """Warn of trained parameters in half precision."""
    half = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} & {
        torch.float16,
        torch.bfloat16,
    }
    if half:
        logger.warning(
            f"The model's trained parameters are {listed(half)}: steps of a small learning rate are lost "
            "to rounding. Load it with dtype=torch.float32, and leave out bf16_full_eval and fp16_full_eval, with "
            "which evaluate() outside training turns them so; with bf16=True it computes in half precision all the "
            "same."
        )


def load_to_train(model: Any) -> Any:
    """
    [`~models.load_dual_encoder`], also without what `torch.compile` has wrapped around parts of the model: it would be
    in the names of all that is saved, which load nowhere then.
    """
    encoder = load_dual_encoder(model)
    compiled = encoder is not model and is_compiled_module(model)
    while parts := [name for name, part in encoder.named_modules() if is_compiled_module(part)]:
        encoder.set_submodule(parts[0], encoder.get_submodule(parts[0])._orig_mod)
        compiled = True
    if compiled:
        logger.warning(
            "The model was given compiled, and is trained as it was before: torch_compile=True in args compiles it "
            "for training."
        )
    return encoder


def takes_sigmoid(model: Any, loss_type: str) -> bool:
    """Whether a model is trained with the sigmoid loss; `ValueError` if it is to be and has no bias."""
    has_bias = getattr(model, "logit_bias", None) is not None
    if loss_type == "sigmoid" and not has_bias:
        raise ValueError(
            f"loss_type='sigmoid' needs a model with a logit_bias, such as SigLIP, and {type(model).__name__} has "
            "none: accepted are 'auto' and 'softmax'"
        )
    return has_bias and loss_type != "softmax"


def check_trained(model: nn.Module) -> None:
    """`ValueError` for a model of which no parameter is trained, or none of its adapters."""
    layers: list[Any] = [part for part in model.modules() if isinstance(part, BaseTunerLayer)]
    if any(parameter.requires_grad for part in layers or [model] for parameter in part.parameters()):
        return
    if layers:
        raise ValueError(
            "the adapters on the model are frozen, and training would leave them as they are: load them with "
            "PeftModel.from_pretrained(base, folder, is_trainable=True), and make new ones without inference_mode"
        )
    raise ValueError(
        "no parameter of the model is trained: requires_grad is False for all of them; unfreeze some, such as with "
        "model.requires_grad_(True)"
    )


def check_collator(collator: Any, args: CLIPTrainingArguments) -> None:
    """`ValueError` for a collator that contradicts the arguments."""
    if not isinstance(collator, CLIPDataCollator):
        raise ValueError(f"data_collator must be a CLIPDataCollator, but is {type(collator).__name__}")
    for name in ("image_column", "caption_column"):
        if getattr(collator, name) != getattr(args, name):
            raise ValueError(
                f"{name} is {shown(getattr(args, name))} in args, but {shown(getattr(collator, name))} in "
                "data_collator"
            )
    length = collator.max_length or collator.tokenizer.model_max_length
    if args.max_length not in (None, length):
        raise ValueError(f"max_length is {shown(args.max_length)} in args, but {shown(length)} in data_collator")


def check_views(collator: CLIPDataCollator, text_views: Sequence[str], text_augmentation: Any) -> None:
    """`ValueError` for a collator whose captions are not those that a trainer trains on."""
    # Without an augmentation all views are copies, whatever they are called.
    augmented, wanted = ([view != ORIGINAL for view in views] for views in (collator.views, text_views))
    if len(augmented) != len(wanted) or (text_augmentation is not None and augmented != wanted):
        raise ValueError(
            f"data_collator has the captions of the views {shown(collator.views)}, but this trainer needs others, of "
            f"which 'original' alone is un-augmented: give it views={shown(text_views)}"
        )
    # Augmentations of one kind and of the same settings have one `repr`.
    ours, theirs = (
        (repr(given), getattr(given, "lexicon", None)) for given in (text_augmentation, collator.augmentation)
    )
    if ours != theirs:
        raise ValueError(
            f"text_augmentation is {shown(text_augmentation)} in the trainer, from text_preset where it is not given, "
            f"but {shown(collator.augmentation)} in data_collator, which augments captions: accepted are two of "
            "the same, where None of data_collator is 'identity' of the trainer"
        )


def callback_list(callbacks: Any) -> list[Any] | None:
    """One callback or several, as a list; `ValueError` for what is neither a callback nor a class of them."""
    if callbacks is None:
        return None
    given = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    for callback in given:
        if not hasattr(callback, "on_train_begin"):
            raise ValueError(f"callbacks must be a TrainerCallback or a list of them, but has {kind(callback)}")
    return given


def resolve_image_augmentation(
    given: Any, args: CLIPTrainingArguments
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The augmentation of images that was given or named, on the device; `None` for none."""
    given = args.image_preset if given is None else given
    if isinstance(given, str):
        return None if given == IDENTITY else ImageAugmentation(given).to(args.device)
    check_callable(
        "image_augmentation", given, "a preset's name, or a function of images, such as ImageAugmentation()"
    )
    return given.to(args.device) if isinstance(given, nn.Module) else given


def own_text_augmentation(collator: Any, args: CLIPTrainingArguments, views: Sequence[str]) -> Any:
    """That of the user's collator, where no other was given. One without any leaves a trainer of one view without."""
    own = getattr(collator, "augmentation", None)
    if own is None and len(views) == 1 and args.text_preset != IDENTITY:
        logger.warning(
            f"data_collator has no text_augmentation, so captions are not augmented, and text_preset="
            f"{shown(args.text_preset)} is not used."
        )
        return IDENTITY
    return own


def resolve_text_augmentation(given: Any, args: CLIPTrainingArguments) -> Callable[[str, int], str] | None:
    """The augmentation of captions that was given or named; `None` for none."""
    given = args.text_preset if given is None else given
    if isinstance(given, str):
        return None if given == IDENTITY else TextAugmentation.from_preset(given)
    accepted = "a preset's name, or a function `(caption, seed) -> caption`, such as TextAugmentation()"
    return cast(Callable[[str, int], str], check_callable("text_augmentation", given, accepted))

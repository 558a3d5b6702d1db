"""The arguments of the trainers, beside those of `transformers.TrainingArguments`."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import Field, dataclass, field, fields
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from transformers import TrainingArguments

from ..augment.images import PRESETS as IMAGE_PRESETS
from ..augment.text import TextAugmentation
from ..data.rows import ON_BAD_ROW
from ..losses import MATCHINGS
from ..wording import listed, shown

TEXT_PRESETS = ("identity", *TextAugmentation.presets)
POOL_DTYPES = ("float32", "bfloat16")
SCORE_VIEWS = ("clean", "augmented")


@dataclass
class CLIPTrainingArguments(TrainingArguments):
    """
    Arguments of [`CLIPTrainer`], and of all trainers here. Those of `transformers.TrainingArguments` apply, with three
    other defaults: `dataloader_drop_last=True`, since a contrastive loss over the few rows of a last batch is another
    loss; `logging_nan_inf_filter=False`, since the filter hides a loss that is not finite, and to do so waits for
    the device at every step; and `greater_is_better` is what the trainer's evaluators say of `metric_for_best_model`,
    so that `load_best_model_at_end=True` keeps the checkpoint with the least `"attack_success_rate"`. It stays `None`
    until a trainer has its evaluators.

    `gradient_accumulation_steps` averages the gradients of small batches; by itself it adds **no** negatives, so it
    is not the same as a larger batch. `contrastive_chunk_size` is: it makes a large batch fit into small memory.

    Args:
        image_column (`str`, defaults to `"image"`): Column of the datasets with the image.
        caption_column (`str`, defaults to `"caption"`): Column with the caption, or a list of them to draw from.
        max_length (`int`, *optional*): Longest caption in tokens. `None`: what the model's text tower takes.
        image_preset (`str`, defaults to `"identity"`): Augmentation of images: `"identity"`, `"weak"`,
            `"cleanclip"`, `"strong"` or `"autoaugment"`. The trainer's `image_augmentation` goes before it.
        text_preset (`str`, defaults to `"identity"`): Augmentation of captions: `"identity"`, `"light"` or `"eda"`.
            The trainer's `text_augmentation` goes before it.
        gather_across_devices (`bool`, defaults to `True`): Whether the rows of all processes are negatives.
        contrastive_chunk_size (`int`, *optional*): Rows of a batch that the encoders hold activations of at a time.
            The loss, its gradients and its negatives are those of the whole batch; every row is encoded once more
            (GradCache, arXiv 2101.06983), so that a step takes about a third longer. `None`: the whole batch.
        accumulate_negatives (`bool`, defaults to `False`): Whether the rows of all `gradient_accumulation_steps` are
            negatives of each other, as in one batch of that size; encoded in chunks of `contrastive_chunk_size`, or
            of a batch. SafeCLIP's safe batches are contrasted with safe ones, risky with risky ones.
        max_logit_scale (`float`, defaults to 100): Upper bound of `exp(logit_scale)`, at least 1; the lower is 1. One
            that is frozen is left as it is.
        merge_adapters (`bool`, defaults to `False`): With `peft_config`: whether `save_model` and `push_to_hub` write
            the whole model with the adapters merged in, which loads without PEFT and without the model that training
            started from, instead of the adapters alone. Checkpoints hold the adapters either way.
        stop_on_non_finite (`bool`, defaults to `True`): Whether to stop at a loss or a gradient that is not finite,
            and write the step, its rows and its loss terms to `non_finite.json` in `output_dir`.
        on_bad_row (`str`, defaults to `"raise"`): What to do about an image that does not decode or a caption that is
            no string: `"raise"`, or `"skip"`: train on the next usable row instead, and list the rows at the end.
    """

    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Drop the last batch where it is smaller than the others."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Log the average of earlier losses in place of one that is not finite."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the datasets with the image."})
    caption_column: str = field(
        default="caption", metadata={"help": "Column of the datasets with the caption, or a list of captions."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest caption in tokens; by default what the model takes."}
    )
    image_preset: str = field(
        default="identity", metadata={"help": f"Augmentation of images: {', '.join(IMAGE_PRESETS)}."}
    )
    text_preset: str = field(
        default="identity", metadata={"help": f"Augmentation of captions: {', '.join(TEXT_PRESETS)}."}
    )
    gather_across_devices: bool = field(default=True, metadata={"help": "Use the rows of all processes as negatives."})
    contrastive_chunk_size: int | None = field(
        default=None, metadata={"help": "Rows encoded at a time, of a batch that is contrasted as a whole."}
    )
    accumulate_negatives: bool = field(
        default=False, metadata={"help": "Contrast the rows of all gradient_accumulation_steps with each other."}
    )
    max_logit_scale: float = field(default=100.0, metadata={"help": "Upper bound of exp(logit_scale), at least 1."})
    merge_adapters: bool = field(
        default=False, metadata={"help": "With adapters: save and push the model with them merged in."}
    )
    stop_on_non_finite: bool = field(
        default=True, metadata={"help": "Stop at a loss or a gradient that is not finite, and say in which rows."}
    )
    on_bad_row: str = field(
        default="raise", metadata={"help": "What to do about an unusable row: 'raise', or 'skip' and list it."}
    )

    @property
    def order_seed(self) -> int:
        """Of the order of the rows, and of what is drawn for a row: `data_seed`, or without one `seed`."""
        return self.seed if self.data_seed is None else self.data_seed

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "hub_token" and value is not None:
            value = _Token(value)
        super().__setattr__(name, value)

    def __post_init__(self) -> None:
        # Without an accelerator nothing is pinned, and torch says so at every epoch.
        on_accelerator = torch.accelerator.is_available() and not self.use_cpu
        self.dataloader_pin_memory = self.dataloader_pin_memory and on_accelerator
        if self.accelerator_config is None and self.dataloader_pin_memory:
            # A batch moves to the device while the one before it is trained on.
            self.accelerator_config = {"non_blocking": True}
        chosen = self.greater_is_better
        super().__post_init__()
        if not (self.metric_for_best_model or "loss").endswith("loss"):
            self.greater_is_better = chosen  # transformers takes more for better; `decide_best_metric` knows
        for name, accepted in (
            ("image_preset", IMAGE_PRESETS),
            ("text_preset", TEXT_PRESETS),
            ("on_bad_row", ON_BAD_ROW),
        ):
            _check_choice(self, name, accepted)
        if self.max_logit_scale < 1:
            raise ValueError(f"max_logit_scale must be at least 1, but is {shown(self.max_logit_scale)}")
        if self.contrastive_chunk_size is not None:
            _check_whole(self, "contrastive_chunk_size", least=1)
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be None or at least 2 tokens, but is {shown(self.max_length)}")
        # B x B logits of several batches cannot be concatenated, and nothing here reads them.
        self.prediction_loss_only = True
        # Dispatching cuts batches along their first dimension, which for the texts is views x rows.
        accelerator_config: Any = self.accelerator_config
        if accelerator_config.dispatch_batches is None:
            accelerator_config.dispatch_batches = False


@dataclass
class CleanCLIPTrainingArguments(CLIPTrainingArguments):
    """
    Arguments of [`CleanCLIPTrainer`]. The defaults are the paper's recipe (Bansal et al., arXiv 2303.03323, appendix):
    10 epochs over about 100,000 clean pairs, batch 64, learning rate 1e-5 with 50 warm-up steps and a cosine, AdamW
    with weight decay 0.1. A higher learning rate removes more of the backdoor and costs more clean accuracy.

    Args:
        clip_weight (`float`, defaults to 1): Weight of the CLIP loss, at least 0 (lambda 1).
        unimodal_weight (`float`, defaults to 1): Weight of the self-supervision within images and within captions, at
            least 0 (lambda 2). 0 is plain fine-tuning.
    """

    per_device_train_batch_size: int = field(default=64, metadata={"help": "Batch size per device for training."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Number of epochs over the clean pairs."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay; logit_scale is exempt."})
    warmup_steps: float = field(default=50, metadata={"help": "Warm-up steps, or below 1 their share of all steps."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    image_preset: str = field(
        default="cleanclip", metadata={"help": f"Augmentation of images: {', '.join(IMAGE_PRESETS)}."}
    )
    text_preset: str = field(default="eda", metadata={"help": f"Augmentation of captions: {', '.join(TEXT_PRESETS)}."})
    clip_weight: float = field(default=1.0, metadata={"help": "Weight of the CLIP loss (lambda 1)."})
    unimodal_weight: float = field(default=1.0, metadata={"help": "Weight of the self-supervision (lambda 2)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clip_weight", "unimodal_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, but is {shown(getattr(self, name))}")
        if self.clip_weight == self.unimodal_weight == 0:
            raise ValueError(
                "clip_weight and unimodal_weight are both 0, so that nothing is trained: one must be above 0"
            )


@dataclass
class _PretrainingArguments(CLIPTrainingArguments):
    """What RoCLIP's and SafeCLIP's recipes have in common."""

    per_device_train_batch_size: int = field(default=128, metadata={"help": "Batch size per device for training."})
    num_train_epochs: float = field(default=32.0, metadata={"help": "Number of epochs over the pairs."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay; logit_scale is exempt."})
    warmup_steps: float = field(default=0.02, metadata={"help": "Warm-up steps, or below 1 their share of all steps."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    image_preset: str = field(
        default="strong", metadata={"help": f"Augmentation of images: {', '.join(IMAGE_PRESETS)}."}
    )
    text_preset: str = field(default="eda", metadata={"help": f"Augmentation of captions: {', '.join(TEXT_PRESETS)}."})
    pool_dtype: str = field(default="float32", metadata={"help": f"What the pools store: {', '.join(POOL_DTYPES)}."})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice(self, "pool_dtype", POOL_DTYPES)


@dataclass
class RoCLIPTrainingArguments(_PretrainingArguments):
    """
    Arguments of [`RoCLIPTrainer`] (Yang, Gao, Mirzasoleiman, NeurIPS 2023, arXiv 2303.06854). The paper pre-trains on
    a million pairs for 24 to 32 epochs, at learning rate 5e-4 with batch 128 or 5e-5 with batch 512, with a pool of 2%
    of the pairs.

    Args:
        pool_size (`float`, defaults to 0.02): Pairs whose features the pools hold: a whole number from 2 on, or a
            share of `train_dataset` below 1.
        pool_dtype (`str`, defaults to `"float32"`): What the pools store, `"float32"` or `"bfloat16"`.
        match_every_n_epochs (`int`, defaults to 2): Of so many epochs, the first is a matching epoch; 1: all are.
        matching_start_epoch (`int`, defaults to 2): First matching epoch, counted from 0. Too early, and nearest
            neighbours mean nothing: training on them collapses, which is logged. Too late, and the poisons are
            learned: their nearest neighbours are then of the adversarial class, and matching teaches it once more.
        matching (`str`, defaults to `"image_to_text"`): What a matching epoch matches, see [`~losses.roclip_loss`].
            The default is by evidence on digits: with epochs of matches every second one from the ninth of 16 to 24
            on, it kept 88% accuracy where `"cross"` kept 66% and 73%, at an attack success of 6.6% and 0.8% against
            0.7% and 1.1% (blended and patch trigger; 71% and 91% undefended). `"unimodal"` asks a poison's own caption
            what to match, which where captions are few is another of the adversarial class.
        steps_per_matching_epoch (`int`, *optional*): Optimizer steps that count as one epoch in the two numbers above;
            `None`: the dataset's epochs. Datasets of unknown length need it. On small ones it serves to alternate more
            often: a whole epoch of matches undoes much of what the last one taught.
        adversarial_phrase (`str`, *optional*): For the log alone, where `train_dataset` has a `poisoned` column: a
            word or phrase that captions of the adversarial class contain, as whole words and whatever the case.
            `None`: only captions of poisoned pairs count.
    """

    pool_size: float = field(
        default=0.02, metadata={"help": "Pairs in the pools, or below 1 their share of the dataset."}
    )
    match_every_n_epochs: int = field(
        default=2, metadata={"help": "Of so many epochs, the first is a matching epoch; 1: all are."}
    )
    matching_start_epoch: int = field(default=2, metadata={"help": "First matching epoch, counted from 0."})
    matching: str = field(default="image_to_text", metadata={"help": f"What is matched: {', '.join(MATCHINGS)}."})
    steps_per_matching_epoch: int | None = field(
        default=None, metadata={"help": "Optimizer steps that count as a matching epoch; by default the dataset's."}
    )
    adversarial_phrase: str | None = field(
        default=None, metadata={"help": "For the log: what captions of the adversarial class contain."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pool_size(self, "pool_size")
        _check_choice(self, "matching", MATCHINGS)
        _check_whole(self, "match_every_n_epochs", least=1)
        _check_whole(self, "matching_start_epoch", least=0)
        if self.steps_per_matching_epoch is not None:
            _check_whole(self, "steps_per_matching_epoch", least=1)


@dataclass
class SafeCLIPTrainingArguments(_PretrainingArguments):
    """
    Arguments of [`SafeCLIPTrainer`] (Yang, Gao, Mirzasoleiman, ICML 2024, arXiv 2310.05862), by default those of the
    paper: 5 epochs of unimodal warm-up, one CLIP epoch at a hundredth of the learning rate, a first safe set of
    probability 0.9 that grows by 1% an epoch up to 85%.

    Args:
        warmup_unimodal_epochs (`int`, defaults to 5): Epochs of the first phase, in which each modality learns by
            itself.
        warmup_unimodal_learning_rate (`float`, *optional*): Its peak learning rate. `None`: `learning_rate`. With an
            optimizer of your own, this and the next are the rate of the group with the largest; others keep their
            ratio to it, and `None` refers to its rates in place of `learning_rate`.
        warmup_cross_epochs (`int`, defaults to 1): Epochs of the second phase, CLIP on all pairs.
        warmup_cross_learning_rate (`float`, *optional*): Its constant learning rate. `None`: a hundredth of
            `learning_rate`.
        safe_threshold (`float`, defaults to 0.9): Probability from which on a pair is safe at the first split, in
            (0, 1).
        safe_growth (`float`, defaults to 0.01): What the safe set grows by at each later split, as a share of all
            pairs, in [0, 1].
        safe_cap (`float`, defaults to 0.85): Largest share of the pairs that are safe, in (0, 1].
        score_views (`str`, defaults to `"clean"`): What pairs are scored on: `"clean"`, un-augmented, or
            `"augmented"`, as in the released code.
        unimodal_pool_size (`float`, defaults to 0.02): Pairs in the pools of the unimodal loss: a whole number from 2
            on, a share of `train_dataset` below 1, or 0: no pools, a view's own copy is its only positive.
        pool_dtype (`str`, defaults to `"float32"`): What the pools store, `"float32"` or `"bfloat16"`.
    """

    warmup_unimodal_epochs: int = field(
        default=5, metadata={"help": "Epochs in which each modality learns by itself."}
    )
    warmup_unimodal_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the unimodal warm-up; by default learning_rate."}
    )
    warmup_cross_epochs: int = field(default=1, metadata={"help": "Epochs of CLIP on all pairs after that."})
    warmup_cross_learning_rate: float | None = field(
        default=None, metadata={"help": "Its learning rate; by default a hundredth of learning_rate."}
    )
    safe_threshold: float = field(
        default=0.9, metadata={"help": "Probability from which on a pair is safe at the first split."}
    )
    safe_growth: float = field(
        default=0.01, metadata={"help": "Share of all pairs that the safe set grows by at each later split."}
    )
    safe_cap: float = field(default=0.85, metadata={"help": "Largest share of the pairs that are safe."})
    score_views: str = field(
        default="clean", metadata={"help": f"What pairs are scored on: {', '.join(SCORE_VIEWS)}."}
    )
    unimodal_pool_size: float = field(
        default=0.02, metadata={"help": "Pairs in the pools, or below 1 their share of the dataset; 0: no pools."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_whole(self, "warmup_unimodal_epochs", least=0)
        _check_whole(self, "warmup_cross_epochs", least=0)
        for name in ("warmup_unimodal_learning_rate", "warmup_cross_learning_rate"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be None or at least 0, but is {shown(value)}")
        if not 0 < self.safe_threshold < 1:
            raise ValueError(f"safe_threshold must be in (0, 1), but is {shown(self.safe_threshold)}")
        if not 0 <= self.safe_growth <= 1:
            raise ValueError(f"safe_growth must be a share of the pairs in [0, 1], but is {shown(self.safe_growth)}")
        if not 0 < self.safe_cap <= 1:
            raise ValueError(f"safe_cap must be a share of the pairs in (0, 1], but is {shown(self.safe_cap)}")
        _check_choice(self, "score_views", SCORE_VIEWS)
        if self.unimodal_pool_size != 0:
            _check_pool_size(self, "unimodal_pool_size")


class _Token(str):
    """
    A token that is left out where arguments are shown or pickled. The Trainer pickles its own into every checkpoint
    and pushes them, and a dataclass shows every field of a subclass.
    """

    def __repr__(self) -> str:
        return "<HUB_TOKEN>"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # A process that is being started needs it.
        return (type(self), (str(self),)) if get_spawning_popen() is not None else (type(None), ())

    def __deepcopy__(self, memo: Any) -> _Token:
        return self


def _check_choice(args: Any, name: str, accepted: Collection[str]) -> None:
    if getattr(args, name) not in accepted:
        raise ValueError(f"{name} must be one of {listed(accepted)}, but is {shown(getattr(args, name))}")


def _check_whole(args: Any, name: str, least: int) -> None:
    value = getattr(args, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, but is {shown(value)}")


def _check_pool_size(args: Any, name: str) -> None:
    value = getattr(args, name)
    # A pool of one pair would match every row of a batch with the same one: a loss that teaches nothing.
    if isinstance(value, bool) or not (0 < value < 1 or (value >= 2 and float(value).is_integer())):
        raise ValueError(
            f"{name} must be a whole number of pairs from 2 on, or a share of the dataset in (0, 1), but is "
            f"{shown(value)}"
        )


def own_fields(
    arguments: type[TrainingArguments], base: type[TrainingArguments] = TrainingArguments
) -> list[Field[Any]]:
    """The fields that a class of arguments adds to one that it derives from, or gives another default."""
    names = {
        name
        for cls in arguments.__mro__
        if issubclass(cls, base) and cls is not base
        for name in inspect.get_annotations(cls)
    }
    return [item for item in fields(arguments) if item.name in names]

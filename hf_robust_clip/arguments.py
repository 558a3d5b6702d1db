"""The arguments that all trainers have in addition to those of `transformers.TrainingArguments`."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Collection, Sequence
from dataclasses import Field, dataclass, field, fields
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from transformers import TrainingArguments

from .augment.images import PRESETS as IMAGE_PRESETS
from .augment.text import TextAugmentation
from .data.rows import ON_BAD_ROW
from .wording import listed, shown

#: How images are contrasted with captions.
LOSS_TYPES = ("auto", "softmax", "sigmoid")
#: The tower that is not trained.
FREEZE = ("vision", "text", "none")
TEXT_PRESETS = ("identity", *TextAugmentation.presets)


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
            `"cleanclip"`, `"strong"`, `"autoaugment"` or `"par"`. The trainer's `image_augmentation` goes before it.
        text_preset (`str`, defaults to `"identity"`): Augmentation of captions: `"identity"`, `"light"` or `"eda"`.
            The trainer's `text_augmentation` goes before it.
        gather_across_devices (`bool`, defaults to `True`): Whether the rows of all processes are negatives.
        contrastive_chunk_size (`int`, *optional*): Rows of a batch that the encoders hold activations of at a time.
            The loss, its gradients and its negatives are those of the whole batch; every row is encoded once more
            (GradCache, arXiv 2101.06983), so that a step takes about a third longer. `None`: the whole batch.
        accumulate_negatives (`bool`, defaults to `False`): Whether the rows of all `gradient_accumulation_steps` are
            negatives of each other, as in one batch of that size; encoded in chunks of `contrastive_chunk_size`, or
            of a batch. SafeCLIP's safe batches are contrasted with safe ones, risky with risky ones.
        loss_type (`str`, defaults to `"auto"`): How images are contrasted with captions: `"softmax"`, the loss of
            CLIP; `"sigmoid"`, that of SigLIP, which trains `logit_bias` as well; `"auto"`: sigmoid for a model that
            has a `logit_bias`, softmax for others. Terms within a modality are InfoNCE either way.
        freeze (`str`, defaults to `"none"`): A tower that is not trained, `"vision"` or `"text"`: the `vision_model`
            or `text_model` stays as it is, in evaluation mode, and is encoded without gradient. Its projection, where
            that is outside of it, the other tower and `logit_scale` are trained.
        max_logit_scale (`float`, defaults to 100): Upper bound of `exp(logit_scale)`, at least 1; the lower is 1. A
            model that starts above it is bounded by what it starts with. A scale that is frozen is left as it is.
        merge_adapters (`bool`, defaults to `False`): With `peft_config`: whether `save_model` and `push_to_hub` write
            the whole model with the adapters merged in, which loads without PEFT and without the model that training
            started from, instead of the adapters alone. Checkpoints hold the adapters either way.
        stop_on_non_finite (`bool`, defaults to `True`): Whether to stop at a loss or a gradient that is not finite,
            and write the step, its rows and its loss terms to `non_finite.json` in `output_dir`.
        on_bad_row (`str`, defaults to `"raise"`): What to do about an image that does not decode or a caption that is
            not a string: `"raise"`, or `"skip"`: train on the next usable row instead, and list the rows at the end.
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
    loss_type: str = field(
        default="auto", metadata={"help": f"How images are contrasted with captions: {', '.join(LOSS_TYPES)}."}
    )
    freeze: str = field(default="none", metadata={"help": f"A tower that is not trained: {', '.join(FREEZE)}."})
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
        check_kinds(self)
        for name, accepted in (
            ("image_preset", IMAGE_PRESETS),
            ("text_preset", TEXT_PRESETS),
            ("on_bad_row", ON_BAD_ROW),
            ("loss_type", LOSS_TYPES),
            ("freeze", FREEZE),
        ):
            check_choice(self, name, accepted)
        if not self.max_logit_scale >= 1:  # true for NaN, too
            raise ValueError(f"max_logit_scale must be at least 1, but is {shown(self.max_logit_scale)}")
        if self.contrastive_chunk_size is not None:
            check_whole(self, "contrastive_chunk_size", least=1)
        if self.max_length is not None and not (isinstance(self.max_length, int) and self.max_length >= 2):
            raise ValueError(f"max_length must be None or at least 2 tokens, but is {shown(self.max_length)}")
        # B x B logits of several batches cannot be concatenated, and nothing here reads them.
        self.prediction_loss_only = True
        # Dispatching cuts batches along their first dimension, which for the texts is views x rows.
        accelerator_config: Any = self.accelerator_config
        if accelerator_config.dispatch_batches is None:
            accelerator_config.dispatch_batches = False


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


#: What a field of a plain kind accepts, and what a message calls it. Which numbers a field takes its own check says.
_KINDS: dict[str, tuple[type, str]] = {
    "bool": (bool, "True or False"),
    "int": (numbers.Real, "a whole number"),
    "float": (numbers.Real, "a number"),
    "str": (str, "a string"),
    "None": (type(None), "None"),
}


def _accepted(kinds: Sequence[str]) -> str:
    return " or ".join(_KINDS[kind][1] for kind in kinds)


def check_kinds(args: CLIPTrainingArguments) -> None:
    """That the package's own fields of plain kinds hold values of these kinds: text is not a number."""
    for name, annotation in _own_annotations(type(args), TrainingArguments).items():
        declared = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
        kinds = [kind.strip() for kind in declared.split("|")]
        if not set(kinds) <= set(_KINDS):
            continue
        value = getattr(args, name)
        if not isinstance(value, tuple(_KINDS[kind][0] for kind in kinds)):
            raise ValueError(f"{name} must be {_accepted(kinds)}, but is {shown(value)}")


def check_choice(args: Any, name: str, accepted: Collection[str]) -> None:
    if getattr(args, name) not in accepted:
        raise ValueError(f"{name} must be one of {listed(accepted)}, but is {shown(getattr(args, name))}")


def check_whole(args: Any, name: str, least: int) -> None:
    value = getattr(args, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, but is {shown(value)}")


def own_fields(
    arguments: type[TrainingArguments], base: type[TrainingArguments] = TrainingArguments
) -> list[Field[Any]]:
    """The fields that a class of arguments adds to one that it derives from, or gives another default."""
    names = _own_annotations(arguments, base)
    return [item for item in fields(arguments) if item.name in names]


def _own_annotations(arguments: type[TrainingArguments], base: type[TrainingArguments]) -> dict[str, Any]:
    """As they are written: `HfArgumentParser` writes other types into the fields."""
    classes = [cls for cls in arguments.__mro__ if issubclass(cls, base) and cls is not base]
    return {name: kind for cls in reversed(classes) for name, kind in inspect.get_annotations(cls).items()}

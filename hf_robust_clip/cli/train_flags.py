"""The flags of `hf-robust-clip train METHOD`: those of the method's TrainingArguments, and the command's own."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from ..arguments import CLIPTrainingArguments
from ..defences import DEFENCES, LINES
from .flags import add_measuring_flags, check_measuring, check_source, check_whole, spelled
from .output import UsageError
from .parsing import ConfigParser


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names the defaults of flags that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.nargs == 0 else super()._get_help_string(action)


class MethodParser(ConfigParser, HfArgumentParser):
    """Makes flags of a dataclass's fields as transformers does, and takes them from a file as well."""


def method_parser(method: str, prog: str) -> MethodParser:
    """The parser of a method's flags."""
    arguments, (_, purpose) = DEFENCES[method].arguments, LINES[method]
    parser = MethodParser(
        prog=prog,
        usage=f"{prog} [--config FILE] --train-data SOURCE --output-dir FOLDER [FLAG ...]",
        description=f"{purpose[0].upper()}{purpose[1:]}. The flags of the data, the model and what is "
        "measured stand at the end.",
        formatter_class=_Formatter,
        required=("train_data", "output_dir"),
        dataclass_types=arguments,
        structures={
            name: {get_origin(kind) or kind for kind in get_args(hint)} & {dict, list}
            for name, hint in get_type_hints(arguments).items()
        },
    )
    _add_model_flags(parser.add_argument_group("model"))
    _add_data_flags(parser.add_argument_group("training data"))
    measures = parser.add_argument_group("measures, before and after")
    add_measuring_flags(measures, "--eval-data", "--eval-split", "validation")
    measures.add_argument(
        *spelled("--eval-image-column"),
        metavar="NAME",
        help="column of --eval-data with the image (default: that of --image-column)",
    )
    return parser


def training_arguments(method: str, args: argparse.Namespace) -> CLIPTrainingArguments:
    """
    The method's arguments as an object.

    Raises:
        `ValueError`: If one is out of range.
    """
    kind = DEFENCES[method].arguments
    names = [item.name for item in dataclasses.fields(kind) if item.init]
    return kind(**{name: getattr(args, name) for name in names})


def check_train(args: argparse.Namespace) -> None:
    """`UsageError` for flags that do not go together or name what is not there."""
    if (args.model is None) != args.from_scratch:
        raise UsageError("give exactly one of --model and --from-scratch")
    if args.model is not None:
        check_source("--model", args.model)
    check_source("--train-data", args.train_data)
    check_measuring(args, "--eval-data")
    for flag, least in (("--image-size", 1), ("--lora-r", 1), ("--shuffle-buffer", 1)):
        check_whole(flag, getattr(args, flag[2:].replace("-", "_")), least)
    if args.from_scratch and args.streaming:
        raise UsageError(
            "--from-scratch learns its tokenizer from all captions first, which --streaming does not have"
        )
    if args.from_scratch and args.lora_r is not None:
        raise UsageError("--lora-r adapts a trained model; --from-scratch has none")
    if args.resume and args.resume_from_checkpoint is not None:
        raise UsageError("give --resume or --resume-from-checkpoint, not both")
    if args.overwrite and (args.resume or args.resume_from_checkpoint is not None):
        raise UsageError("--overwrite starts anew: give it without --resume and --resume-from-checkpoint")
    if args.streaming and args.max_steps <= 0:
        raise UsageError("--streaming needs --max-steps: the length of a stream is not known")


def _add_model_flags(group: Any) -> None:
    add = group.add_argument
    add("--model", metavar="MODEL", help="model to start from: a folder or a Hub id")
    add(*spelled("--from-scratch"), action="store_true", help="start from a small untrained CLIP instead")
    add(
        *spelled("--image-size"),
        type=int,
        default=32,
        metavar="PIXELS",
        help="side of its images, with --from-scratch (default: %(default)s)",
    )
    add(
        *spelled("--lora-r"),
        type=int,
        metavar="N",
        help="train adapters of this rank on the attention, the projections whole, logit_scale and logit_bias, "
        "instead of the whole model",
    )
    add(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --output-dir; from the start if there is none",
    )
    add(
        "--overwrite",
        action="store_true",
        help="start anew in an --output-dir that holds an earlier run: its model, checkpoints and results are deleted",
    )


def _add_data_flags(group: Any) -> None:
    add = group.add_argument
    add(
        *spelled("--train-data"),
        metavar="SOURCE",
        help="image-caption pairs: a Parquet, CSV, JSON or Arrow file, a folder, or a dataset on the Hub",
    )
    add(*spelled("--train-split"), default="train", metavar="SPLIT", help="its split (default: %(default)s)")
    add("--streaming", action="store_true", help="read the pairs as they are needed; needs --max-steps")
    add(
        *spelled("--shuffle-buffer"),
        type=int,
        default=1000,
        metavar="N",
        help="with --streaming: pairs among which the next one is drawn (default: %(default)s)",
    )

"""Flags that several sub-commands have, as far as they can be checked without loading anything."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from ..wording import listed, shown
from .output import UsageError

IMAGE_TRIGGERS = (
    *("patch", "blended", "sinusoid", "warp"),
    *("stripes_patch", "blended_stripes", "blended_triangles", "red_text", "color_curve", "optimized_patch"),
    "found",
)
TEXT_TRIGGERS = ("word", "phrase")
#: What a scan recovered, by its folder.
FOUND = "found"
#: Placebos of each trigger, unless flags say otherwise.
PLACEBOS = 5
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILES = (".parquet", ".csv", ".tsv", ".json", ".jsonl", ".arrow", ".safetensors", ".bin", ".pt")


def parse_trigger(text: str) -> tuple[str, dict[str, Any]]:
    """
    A trigger as flags write it.

    Args:
        text (`str`): `NAME`, or `NAME:FIELD=VALUE,FIELD=VALUE`, such as `patch:size=16,place=center`. What a scan
            recovered is `found:FOLDER`, the most suspect one, or `found:FOLDER:CLASS`.

    Returns:
        `tuple[str, dict]`: The name, and its fields: numbers or truth values where they read as such, else strings.
        Of `found`, the `folder` and the `target`.

    Raises:
        `argparse.ArgumentTypeError`: On an unknown name, or what is not written so.
    """
    name, _, rest = text.partition(":")
    known = (*IMAGE_TRIGGERS, *TEXT_TRIGGERS)
    if name not in known:
        raise argparse.ArgumentTypeError(f"{shown(name)} is not a trigger; accepted are {listed(known, len(known))}")
    if name == FOUND:
        return name, _found(rest)
    fields: dict[str, Any] = {}
    for part in rest.split(",") if rest else ():
        field, equals, value = part.partition("=")
        if not equals or not field.strip() or not value.strip():
            raise argparse.ArgumentTypeError(
                f"{shown(part)} in {shown(text)} is not a field of a trigger; accepted is NAME:FIELD=VALUE,FIELD=VALUE"
            )
        fields[field.strip()] = _value(value.strip())
    return name, fields


def _found(rest: str) -> dict[str, str | None]:
    """`FOLDER` or `FOLDER:CLASS`, which is the former where there is a folder of that name."""
    folder, colon, target = rest.rpartition(":")
    if not colon or Path(rest).is_dir():
        folder, target = rest, ""
    if not folder:
        raise argparse.ArgumentTypeError(f"'{FOUND}' needs the folder of a scan; accepted is found:FOLDER:CLASS")
    return {"folder": folder, "target": target or None}


def image_trigger(text: str) -> str:
    """The text, when it names a trigger on images."""
    if parse_trigger(text)[0] not in IMAGE_TRIGGERS:
        raise argparse.ArgumentTypeError(f"{shown(text)} goes on captions; accepted are {', '.join(IMAGE_TRIGGERS)}")
    return text


def any_trigger(text: str) -> str:
    """The text, when it names a trigger on images or on captions."""
    parse_trigger(text)
    return text


def prompt(text: str) -> str:
    """The text, when it has one `{}`."""
    if text.count("{}") != 1:
        raise argparse.ArgumentTypeError(f"{shown(text)} must have exactly one {{}}, for the name of a class")
    return text


def add_measuring_flags(group: Any, data: str, split: str, default_split: str) -> None:
    """
    Flags of labelled images, of prompts, and of what is measured on them.

    Args:
        group: A parser, or a group of one.
        data, split (`str`): What the flags of the images and of their split are called.
        default_split (`str`): The split if none is given.
    """
    add = group.add_argument
    add(
        *spelled(data),
        metavar="SOURCE",
        help="labelled images to measure on: a Parquet, CSV, JSON or Arrow file, a folder, or a dataset on the Hub",
    )
    add(*spelled(split), default=default_split, help=f"split of {data}, where it has several (default: %(default)s)")
    add(
        *spelled("--label-column"),
        default="label",
        metavar="NAME",
        help="column with the class, a ClassLabel or its name (default: %(default)s)",
    )
    add(
        "--classes",
        type=Path,
        metavar="FILE",
        help="JSON file of class names to lists of words that name them: labels the images by their captions, up to "
        "three of which have to agree, in place of the label column",
    )
    add(
        "--template",
        type=prompt,
        action="append",
        metavar="TEXT",
        help="prompt with one {} for the name of a class; may be repeated (default: seven prompts)",
    )
    add(
        "--trigger",
        type=image_trigger,
        action="append",
        metavar="TRIGGER",
        help="trigger whose success is measured, such as patch or blended:alpha=0.1,seed=3; may be repeated. One of "
        f"{', '.join(IMAGE_TRIGGERS)}; found:FOLDER:CLASS is what scan-checkpoint recovered",
    )
    add("--target", metavar="CLASS", help="class that the triggers are for (default: a found one's own)")
    add(
        "--placebos",
        type=int,
        default=PLACEBOS,
        metavar="N",
        help="other triggers of the same kind, never planted, to compare each success with; each takes as long as the "
        "trigger (default: %(default)s)",
    )


def add_pairs(parser: Any) -> None:
    """Add the argument for a dataset of pairs, and the flag for its split."""
    parser.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="pairs: a Parquet, CSV, JSON or Arrow file, a folder, or a dataset on the Hub",
    )
    parser.add_argument("--split", default="train", help="split of DATA, where it has several (default: %(default)s)")


def add_columns(parser: Any) -> None:
    """Add the flags for the columns of pairs or of images."""
    for what in ("image", "caption"):
        parser.add_argument(
            *spelled(f"--{what}-column"),
            default=what,
            metavar="NAME",
            help=f"column with the {what} (default: %(default)s)",
        )


def check_measuring(args: argparse.Namespace, data: str) -> None:
    """`UsageError` for flags of [`add_measuring_flags`] that do not go together or name what is not there."""
    source = value_of(args, data)
    if source is not None:
        check_source(data, source)
    if args.target is None and any(parse_trigger(text)[0] != FOUND for text in args.trigger or ()):
        raise UsageError("--trigger needs --target, the class that the trigger is for")
    if args.target is not None and not args.trigger:
        raise UsageError("--target needs a --trigger, whose success is to be measured")
    if args.trigger and source is None:
        raise UsageError(f"--trigger needs {data}, the images that it is measured on")
    check_whole("--placebos", args.placebos, least=0)
    if args.classes is not None and not args.classes.is_file():
        raise UsageError(f"--classes: {args.classes} is not a file")


def check_source(flag: str, source: str) -> None:
    """`UsageError` for what is neither a file or folder that is there, nor could be the name of one on the Hub."""
    if source and Path(source).exists():
        return
    if not _HUB_ID.fullmatch(source) or source.lower().endswith(_FILES):
        raise UsageError(f"{flag}: {shown(source)} is not there; accepted is a file, a folder or an id on the Hub")


def check_whole(flag: str, value: int | None, least: int) -> None:
    """`UsageError` for a number below the least that is accepted."""
    if value is not None and value < least:
        raise UsageError(f"{flag}: {value} is too small; accepted is an integer of at least {least}")


def value_of(args: argparse.Namespace, flag: str) -> Any:
    """The value of a flag."""
    return getattr(args, flag[2:].replace("-", "_"))


def spelled(flag: str) -> tuple[str, ...]:
    """Both spellings of a flag, as those of training arguments have them."""
    return tuple(dict.fromkeys((flag, "--" + flag[2:].replace("-", "_"))))


def _value(text: str) -> int | float | bool | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text

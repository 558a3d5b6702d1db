"""`hf-robust-clip prepare`: a dataset in, a folder out that is decoded and resized for a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .flags import add_columns, add_pairs, check_source, check_whole, spelled, value_of
from .output import check_apart, say, usage_errors


def add_parser(commands: Any) -> None:
    """Add the sub-command to those of `hf-robust-clip`."""
    parser = commands.add_parser(
        "prepare",
        required=("data", "model", "output_dir"),
        help="decode and resize a dataset once, for training that reads it fast",
        description="Decode and resize image-caption pairs once, for one model. Training on the output "
        "folder is, to the bit, training on DATA. After an interruption the same command goes on where it stopped.",
    )
    add = parser.add_argument
    add_pairs(parser)
    add("--model", metavar="MODEL", help="model that will be trained, whose processor is used: a folder or a Hub id")
    add(*spelled("--output-dir"), type=Path, metavar="FOLDER", help="new folder, or that of an interrupted run")
    add_columns(parser)
    add(
        *spelled("--image-format"),
        choices=("ppm", "png"),
        default="ppm",
        help="ppm is read fastest, png is smaller (default: %(default)s)",
    )
    add(
        *spelled("--rows-per-shard"),
        type=int,
        default=2048,
        metavar="N",
        help="rows in a file, which one process makes (default: %(default)s)",
    )
    add(*spelled("--num-proc"), type=int, metavar="N", help="processes that decode (default: this one)")
    add(
        *spelled("--on-bad-row"),
        choices=("raise", "skip"),
        default="raise",
        help="what to do about an unusable row: fail, or leave it out and list it (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command as its arguments say."""
    check_source("DATA", args.data)
    for flag, least in (("--rows-per-shard", 1), ("--num-proc", 1)):
        check_whole(flag, value_of(args, flag), least)
    check_apart(args.data, args.output_dir)
    if args.dry_run:
        say(args.parser.dump(args).rstrip())
        return 0
    # What follows imports torch and datasets, which takes seconds.
    from ..data.preparing import prepare_dataset
    from ..models import load_processor
    from .measuring import load_data
    from .progress import quiet_libraries

    with quiet_libraries():
        dataset = load_data("DATA", args.data, args.split, args.image_column)
        processor = load_processor(args.model, None)
        with usage_errors():
            prepared = prepare_dataset(
                dataset,
                processor,
                args.output_dir,
                image_column=args.image_column,
                caption_column=args.caption_column,
                image_format=args.image_format,
                rows_per_shard=args.rows_per_shard,
                num_proc=args.num_proc,
                on_bad_row=args.on_bad_row,
            )
    size = sum(path.stat().st_size for path in args.output_dir.glob("*.arrow"))
    say(f"{len(prepared)} of {len(dataset)} pairs are prepared, {size / 1e6:.1f} MB: {args.output_dir}")
    return 0

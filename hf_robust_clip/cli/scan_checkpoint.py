"""`hf-robust-clip scan-checkpoint`: whether a backdoor of a model shows, and which class it aims at."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..locking import sole_writer
from ..wording import shown
from .flags import add_columns, check_source, check_whole, prompt, spelled
from .output import UsageError, check_apart, format_table, output_folder, say, usage_errors, write_json

SCAN, REPORT = "scan.json", "report.html"


def add_parser(commands: Any) -> None:
    """Add the sub-command to those of `hf-robust-clip`."""
    parser = commands.add_parser(
        "scan-checkpoint",
        required=("model", "data", "output_dir"),
        help="look for backdoors in a model, without knowing the trigger",
        description="For each class, look for small changes that make the model call any image so. With a backdoor "
        "they get far. FOLDER gets scan.json, report.html, and the triggers that were found, which "
        "`evaluate --trigger found:FOLDER` and `train --trigger found:FOLDER` take. The exit code is 0 whatever is "
        "found: no scan proves a model clean.",
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="the suspect: a folder, adapters' too, or a model on the Hub")
    add(
        "--data",
        metavar="IMAGES",
        help="photos of any classes, best 350: a Parquet, CSV, JSON or Arrow file, a folder, or data on the Hub",
    )
    add("--split", default="train", help="split of IMAGES, where it has several (default: %(default)s)")
    add_columns(parser)
    add(
        "--classes",
        metavar="NAMES",
        help="what images can be called: cat,dog,frog; or a file with a name on each line; or a JSON file, a list of "
        "names or an object that has them as keys",
    )
    add(
        "--clusters",
        type=int,
        metavar="N",
        help="in place of --classes: the centers of so many clusters of the captions of IMAGES",
    )
    add(
        "--template",
        type=prompt,
        action="append",
        metavar="TEXT",
        help="prompt with one {} for the name of a class; may be repeated (default: seven prompts). {} alone takes "
        "NAMES as whole prompts",
    )
    add("--base", metavar="MODEL", help="the clean model that MODEL was fine-tuned from: the best comparison")
    add(*spelled("--output-dir"), type=Path, metavar="FOLDER", help="folder for what is found")
    add("--steps", type=int, default=30, metavar="N", help="of each search (default: %(default)s)")
    add(
        *spelled("--batch-size"),
        type=int,
        default=160,
        metavar="N",
        help="images that go through the model at a time, with gradients; decides the memory (default: %(default)s)",
    )
    add("--device", metavar="NAME", help="such as cuda:1 or cpu (default: an accelerator if there is one)")
    add("--seed", type=int, default=0, help="of the images that are drawn (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command as its arguments say."""
    for flag, source in (("MODEL", args.model), ("--data", args.data), ("--base", args.base)):
        if source is not None:
            check_source(flag, source)
    for flag, value, least in (
        ("--batch-size", args.batch_size, 1),
        ("--steps", args.steps, 1),
        ("--clusters", args.clusters, 3),
        ("--seed", args.seed, 0),
    ):
        check_whole(flag, value, least)
    if (args.classes is None) == (args.clusters is None):
        raise UsageError("give exactly one of --classes and --clusters: what images can be called")
    if args.template and args.clusters is not None:
        raise UsageError("--template goes with --classes: clusters of captions have no names to put into prompts")
    check_apart(args.data, args.output_dir)
    if args.dry_run:
        say(args.parser.dump(args).rstrip())
        return 0
    from ..attacks.found import PIXELS_FILE, TRIGGERS_FILE
    from ..telling import check_report_extra

    check_report_extra()
    lock = sole_writer(args.output_dir, "--output-dir", "a scan")
    with output_folder(args.output_dir, lock, files=(SCAN, REPORT, PIXELS_FILE, TRIGGERS_FILE)):
        return _scan(args)


def _scan(args: argparse.Namespace) -> int:
    # These import torch and datasets, which takes seconds.
    from ..evaluation.zero_shot import DEFAULT_TEMPLATES
    from ..files import write_text
    from ..scanning.checkpoint import scan_checkpoint
    from ..telling.checkpoint_page import render_checkpoint_scan, scan_statements, scan_table
    from .measuring import device_of, load_data, load_model
    from .progress import quiet_libraries

    names = None if args.classes is None else read_names("--classes", args.classes)
    with quiet_libraries():
        device = device_of(args.device)
        dataset = load_data("--data", args.data, args.split, args.image_column)
        model, processor = load_model("MODEL", args.model)
        base = None if args.base is None else load_model("--base", args.base)[0].to(device)
        model = model.to(device)
        with usage_errors():
            scan = scan_checkpoint(
                model,
                processor,
                dataset,
                _clusters(args, model, processor, dataset) if names is None else names,
                base,
                image_column=args.image_column,
                templates=args.template or DEFAULT_TEMPLATES,
                steps=args.steps,
                batch_size=args.batch_size,
                seed=args.seed,
            )
        scan.save(args.output_dir)
        write_json(args.output_dir / SCAN, scan.described())
        page = render_checkpoint_scan(scan, dataset, processor, args.image_column)
        write_text(args.output_dir / REPORT, page)
    for line in format_table(scan_table(scan)):
        say(line)
    say()
    for statement in scan_statements(scan):
        say(statement)
    say(f"Look at what was recovered: {args.output_dir / REPORT}")
    return 0


def read_names(flag: str, text: str) -> list[str]:
    """Names of classes: written out with commas, or from a text or JSON file."""
    if not Path(text).is_file():
        return [name.strip() for name in text.split(",") if name.strip()]
    import json

    from ..data.tables import text_of

    with usage_errors(flag):
        content = text_of(text)
    if not text.lower().endswith(".json"):
        return [line.strip() for line in content.splitlines() if line.strip()]
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{flag}: {shown(text)} is not JSON: {error}") from error
    names = list(found) if isinstance(found, dict | list) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{flag}: {shown(text)} must hold a list of names, or an object that has them as keys")
    return names


def _clusters(args: argparse.Namespace, model: Any, processor: Any, dataset: Any) -> dict[str, list[str]]:
    """Candidates from the captions of the images."""
    from ..columns import captions_of, check_columns
    from ..data.rows import column_values
    from ..scanning.checkpoint import cluster_captions

    check_columns(dataset, {"--caption-column": args.caption_column}, "captions", argument="--data")
    captions = [text for value in column_values(dataset, args.caption_column) for text in captions_of(value)]
    return cluster_captions(model, processor, captions, args.clusters, seed=args.seed)

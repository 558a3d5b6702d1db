"""`hf-robust-clip poison`: a dataset in, a poisoned dataset and its manifest out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..files import in_one_move
from ..locking import LOCK_FILES, sole_writer
from ..wording import shortened
from .flags import (
    IMAGE_TRIGGERS,
    TEXT_TRIGGERS,
    add_columns,
    add_pairs,
    any_trigger,
    check_source,
    check_whole,
    spelled,
    value_of,
)
from .output import UsageError, check_apart, output_folder, say, usage_errors, write_json

MODES = ("backdoor", "label_consistent", "targeted", "text_query")
MANIFEST, DATA = "poison_manifest.json", Path("data", "train.parquet")
#: Rows of a group in the Parquet file: few, since they hold images.
_GROUP = 100


def add_parser(commands: Any) -> None:
    """Add the sub-command to those of `hf-robust-clip`."""
    parser = commands.add_parser(
        "poison",
        required=("data", "output_dir", "target"),
        help="poison a dataset of image-caption pairs, to study attacks and defences",
        description="Poison some pairs of a dataset. The output folder gets the poisoned dataset, which load_dataset "
        "reads, with a column `poisoned`, and a manifest that poisons the same dataset again. This is for research "
        "into defences: keep what it makes apart from clean data.",
    )
    add = parser.add_argument
    add_pairs(parser)
    add(*spelled("--output-dir"), type=Path, metavar="FOLDER", help="folder for the poisoned dataset")
    add("--overwrite", action="store_true", help="write into a folder that holds other things, too")
    add_columns(parser)
    add(*spelled("--label-column"), metavar="NAME", help="with the class, if there is one: counts as naming it")
    add("--mode", choices=MODES, default="backdoor", help="kind of poisoning (default: %(default)s)")
    add(
        "--trigger",
        type=any_trigger,
        metavar="TRIGGER",
        help="such as patch or blended:alpha=0.1,seed=3. On images, for the modes backdoor and label_consistent: "
        f"{', '.join(IMAGE_TRIGGERS)}; on captions, for text_query: {', '.join(TEXT_TRIGGERS)}; none for targeted",
    )
    add("--target", metavar="CLASS", help="class that the attack is for, as captions name it")
    add("--rate", type=float, metavar="SHARE", help="poisons as a share of all rows, above 0 and at most 1")
    add("--count", type=int, metavar="N", help="instead of --rate: how many poisons")
    add("--template", action="append", metavar="TEXT", help="caption of poisons, {} for the class; may be repeated")
    add(
        "--templates",
        type=Path,
        metavar="FILE",
        help="instead of --template: a text file with one on each line, "
        "or the word data: the dataset's own captions that name the class",
    )
    add(
        *spelled("--image-size"),
        type=int,
        metavar="PIXELS",
        help="resize and crop poisoned images to it first: give the model's input size, at which triggers are meant",
    )
    add("--seed", type=int, default=0, help="of the rows and captions that are drawn (default: %(default)s)")
    add(*spelled("--source-index"), type=int, metavar="ROW", help="targeted: the row whose image is the target")
    add(*spelled("--target-image"), type=Path, metavar="FILE", help="targeted: the file of that image instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command as its arguments say."""
    _check(args)
    _check_folder(args)
    if args.dry_run:
        say(args.parser.dump(args).rstrip())
        return 0
    lock = sole_writer(args.output_dir, "--output-dir", "a poisoning")
    with output_folder(args.output_dir, lock, files=(MANIFEST, str(DATA)), folders=(DATA.parent.name,)):
        _check_folder(args)
        # What follows imports torch and datasets, which takes seconds.
        from .progress import quiet_libraries

        with quiet_libraries():
            manifest = poison(args)
    counts, target = manifest["counts"], manifest["target"]
    say(
        f"{counts['count']} of {counts['dataset_length']} pairs ({counts['rate']:.2%}) are poisons: {manifest['mode']}"
    )
    say(f"  trigger: {_described(manifest['trigger'])}")
    say(f"  target: {target}")
    say(f"  data: {args.output_dir / DATA}")
    say(f"  manifest: {args.output_dir / MANIFEST}")
    return 0


def poison(args: argparse.Namespace) -> dict[str, Any]:
    """
    Poison a dataset as the arguments of the sub-command say, write both files, and return the manifest.

    Raises:
        `UsageError`: If the arguments and the data do not go together.
    """
    from ..attacks.poisoning import poison_dataset
    from ..attacks.spec import PoisonSpec
    from .measuring import load_data, make_trigger

    with usage_errors():
        trigger = None if args.trigger is None else make_trigger(args.trigger)
        spec = PoisonSpec(
            trigger,
            args.target,
            count=args.count,
            rate=args.rate,
            templates=_templates(args),
            seed=args.seed,
            mode=args.mode,
            image_size=args.image_size,
            target_image=args.target_image,
            source_index=args.source_index,
        )
    dataset = load_data("DATA", args.data, args.split, args.image_column)
    with usage_errors():
        poisoned, manifest = poison_dataset(dataset, spec, args.image_column, args.caption_column, args.label_column)
    # Without its manifest a folder does not pass for a finished one.
    (args.output_dir / MANIFEST).unlink(missing_ok=True)
    _write_parquet(poisoned, args.output_dir / DATA)
    write_json(args.output_dir / MANIFEST, manifest)
    return manifest


def _check(args: argparse.Namespace) -> None:
    """What can be refused without loading anything."""
    check_source("DATA", args.data)
    if (args.rate is None) == (args.count is None):
        raise UsageError("give exactly one of --rate and --count")
    if args.rate is not None and not 0 < args.rate <= 1:
        raise UsageError(f"--rate: {args.rate} is not a share; accepted is a number above 0 and at most 1")
    for flag, least in (("--count", 1), ("--image-size", 1), ("--seed", 0), ("--source-index", 0)):
        check_whole(flag, value_of(args, flag), least)
    if (args.trigger is None) != (args.mode == "targeted"):
        needs = "takes no --trigger" if args.mode == "targeted" else "needs a --trigger"
        raise UsageError(f"--mode {args.mode} {needs}")
    if args.template is not None and args.templates is not None:
        raise UsageError("give --template or --templates, not both")
    for flag, file in (("--templates", args.templates), ("--target-image", args.target_image)):
        if file is not None and not file.is_file() and (flag, str(file)) != ("--templates", "data"):
            raise UsageError(f"{flag}: {file} is not a file")
    check_apart(args.data, args.output_dir)


def _check_folder(args: argparse.Namespace) -> None:
    if not args.overwrite and not _is_ours(args.output_dir):
        raise UsageError(
            f"--output-dir: {args.output_dir} is not empty, and holds more than an earlier run wrote: give another "
            "folder, or --overwrite"
        )


def _is_ours(folder: Path) -> bool:
    """Whether a folder is empty, not there, or what this command left behind."""
    manifest = folder / MANIFEST
    own = {manifest, folder / DATA, *(folder / name for name in LOCK_FILES)}
    foreign = any(path not in own for path in folder.rglob("*") if not path.is_dir())
    return not foreign and (manifest.is_file() or not (folder / DATA).exists())


def _templates(args: argparse.Namespace) -> Any:
    """The templates that were given, as a list, the word data, or `None`."""
    if args.templates is None:
        return args.template
    if str(args.templates) == "data" and not args.templates.is_file():
        return "data"
    lines = [line.strip() for line in args.templates.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line]


def _write_parquet(dataset: Any, path: Path) -> None:
    """Write a dataset as a Parquet file that holds its images, in one move."""
    import pyarrow.parquet
    from datasets.table import embed_table_storage

    path.parent.mkdir(parents=True, exist_ok=True)
    schema = dataset.features.arrow_schema
    with in_one_move(path) as partial, pyarrow.parquet.ParquetWriter(str(partial), schema) as writer:
        # Dataset.to_parquet leaves images that are paths as they are, and paths do not travel.
        for batch in dataset.with_format("arrow").iter(_GROUP):
            writer.write_table(embed_table_storage(batch))


def _described(trigger: dict[str, Any] | None) -> str:
    if trigger is None:
        return "none"
    fields = ", ".join(f"{name} {shortened(str(value), 40)}" for name, value in trigger.items() if name != "name")
    return f"{trigger['name']} ({fields})" if fields else str(trigger["name"])

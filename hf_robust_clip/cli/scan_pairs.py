"""`hf-robust-clip scan-pairs`: which pairs of a dataset are suspect, under models that were trained on them."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from ..locking import sole_writer
from ..wording import shortened
from .flags import add_columns, check_source, check_whole, spelled
from .output import UsageError, check_apart, output_folder, say, usage_errors, write_json

SCORES, GROUPS, REPORT, KEPT, CLEANED = "scores.parquet", "groups.json", "report.html", "kept", "cleaned"
#: What --drop takes beside a share: `drop=None` of `PairScan.keep`.
_SUSPECTS = "suspects"
#: Groups that are printed.
_PRINTED = 5
#: Epochs and learning rate of the cleaning of --verify, where none are given.
_VERIFY_EPOCHS, _VERIFY_RATE = 4, 1e-5


def add_parser(commands: Any) -> None:
    """Add the sub-command to those of `hf-robust-clip`."""
    parser = commands.add_parser(
        "scan-pairs",
        required=("models", "data", "output_dir"),
        help="score which pairs of a dataset are suspect, without knowing the attack",
        description="Score the pairs of a dataset under a model that was trained on them, or under several "
        "checkpoints of one training. FOLDER gets scores.parquet, groups.json and report.html; with --drop also "
        "kept/, the pairs that stay, which `train --train-data FOLDER/kept` takes.",
    )
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="model that was trained on DATA, or checkpoints of it, in order")
    add("--data", metavar="DATA", help="pairs: a Parquet, CSV, JSON or Arrow file, a folder, or a dataset on the Hub")
    add("--split", default="train", help="split of DATA, where it has several (default: %(default)s)")
    add_columns(parser)
    add("--streaming", action="store_true", help="read DATA as it is needed, and hold none of it")
    add(*spelled("--key-column"), metavar="COLUMN", help="with --streaming: column that tells the pairs apart")
    add(
        *spelled("--cache-dir"),
        type=Path,
        metavar="FOLDER",
        help="keeps what is done: the same command goes on there after it was stopped",
    )
    add(*spelled("--output-dir"), type=Path, metavar="FOLDER", help="new folder for what is found")
    add(
        "--drop",
        type=_share,
        metavar="SHARE",
        help="share of the pairs, the most suspect, that kept/ leaves out; or 'suspects': a tenth, or all that are "
        "suspect where these are more",
    )
    add(
        "--verify",
        action="store_true",
        help="clean the last model with CleanCLIP on the least suspect half of the pairs, ask it for a second "
        "opinion, and leave it in cleaned/",
    )
    epochs, rate = spelled("--verify-epochs"), spelled("--verify-learning-rate")
    add(*epochs, type=int, metavar="N", help=f"with --verify: epochs of that cleaning (default: {_VERIFY_EPOCHS})")
    add(*rate, type=float, metavar="RATE", help=f"with --verify: its learning rate (default: {_VERIFY_RATE})")
    add(*spelled("--batch-size"), type=int, default=64, metavar="N", help="pairs embedded at a time (default: 64)")
    add(*spelled("--num-workers"), type=int, default=0, metavar="N", help="processes that decode (default: this one)")
    add("--device", metavar="NAME", help="such as cuda:1 or cpu (default: an accelerator if there is one)")
    add("--seed", type=int, default=0, help="of the sample and the references (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command as its arguments say."""
    check_source("--data", args.data)
    check_whole("--batch-size", args.batch_size, 1)
    check_whole("--num-workers", args.num_workers, 0)
    check_whole("--seed", args.seed, 0)
    if args.drop not in (None, _SUSPECTS) and not (isinstance(args.drop, float) and 0 < args.drop < 1):
        raise UsageError(
            f"--drop: {shortened(str(args.drop))} is not a share of the pairs between 0 and 1, such as 0.1, or "
            f"'{_SUSPECTS}'"
        )
    if args.streaming and args.verify:
        raise UsageError(
            "--verify trains on the least suspect half of the pairs, which needs their numbers: leave --streaming out"
        )
    for flag, value in (
        ("--verify-epochs", args.verify_epochs),
        ("--verify-learning-rate", args.verify_learning_rate),
    ):
        if value is not None and not args.verify:
            raise UsageError(f"{flag} goes with --verify: without it no model is cleaned")
    if args.verify_epochs is not None:
        check_whole("--verify-epochs", args.verify_epochs, 1)
    if args.key_column is not None and not args.streaming:
        raise UsageError("--key-column goes with --streaming: without it pairs have numbers")
    for model in args.models:
        check_source("MODEL", model)
    check_apart(args.data, args.output_dir)
    if args.dry_run:
        say(args.parser.dump(args).rstrip())
        return 0
    from ..telling import check_report_extra

    check_report_extra()
    lock = sole_writer(args.output_dir, "--output-dir", "a scan")
    with output_folder(args.output_dir, lock, files=(SCORES, GROUPS, REPORT), folders=(KEPT, CLEANED)):
        return _scan(args)


def _share(text: str) -> float | str:
    """A number where the text is one."""
    try:
        return float(text)
    except ValueError:
        return text


def _scan(args: argparse.Namespace) -> int:
    # These import torch and datasets, which takes seconds.
    from ..files import write_text
    from ..scanning.found import disagrees
    from ..scanning.pairs import scan_pairs
    from ..telling.scan_page import render_pair_scan
    from .measuring import device_of, load_data, load_model
    from .progress import quiet_libraries

    with quiet_libraries():
        device = device_of(args.device)
        dataset = load_data("--data", args.data, args.split, args.image_column, args.streaming)
        loaded = [load_model("MODEL", name) for name in args.models]
        with usage_errors():
            scan = scan_pairs(
                [model.to(device) for model, _ in loaded],
                loaded[0][1],
                dataset,
                image_column=args.image_column,
                caption_column=args.caption_column,
                batch_size=args.batch_size,
                num_workers=args.num_workers,
                seed=args.seed,
                cache_dir=args.cache_dir,
                key_column=args.key_column,
            )
        if args.verify:
            scan = _verified(args, scan, dataset, *loaded[-1])
        scan.scores.to_parquet(str(args.output_dir / SCORES))
        write_json(args.output_dir / GROUPS, scan.described())
        stay = None if args.drop is None else _keep(scan, dataset, args.drop, args.output_dir)
        page = render_pair_scan(scan, dataset, args.image_column, args.caption_column)
        write_text(args.output_dir / REPORT, page)
    say(f"{len(scan.scores)} pairs under {len(loaded)} model(s); {scan.suspects} are above the default cut-off.")
    for group in scan.groups[:_PRINTED]:
        verdict = {None: "", True: ", confirmed", False: ", not confirmed"}[group.confirmed]
        where = "of the pixels" if group.checkpoint is None else f"model {group.checkpoint + 1}"
        say(f"  group {group.word!r}: {group.size} pairs, weight {group.weight:.2f}, {where}{verdict}")
    disagreeing = sum(map(disagrees, scan.duplicates))
    say(
        f"  images that occur three times or more with captions that disagree: {disagreeing}, "
        f"{len(scan.disagreeing)} of them suspect"
    )
    if stay is not None:
        say(f"{stay} pairs stay: {args.output_dir / KEPT}")
    say(f"Look at the groups: {args.output_dir / REPORT}")
    return 0


def _keep(scan: Any, dataset: Any, share: float | str, folder: Path) -> int:
    """Write the pairs that stay, images as they were stored, and say how many they are."""
    import datasets

    drop = None if share == _SUSPECTS else share
    if isinstance(dataset, datasets.Dataset):
        kept = scan.keep(dataset, drop)
        kept.save_to_disk(str(folder / KEPT))
        return len(kept)
    # Read here alone, all shards in order, so that rows without a key have their numbers.
    stored = dataset.decode(False)
    one = datasets.IterableDataset.from_generator(lambda: iter(stored), features=stored.features)
    stream = scan.keep(one, drop)
    with tempfile.TemporaryDirectory(dir=folder) as held:
        kept = datasets.Dataset.from_generator(lambda: iter(stream), features=dataset.features, cache_dir=held)
        kept.info.description = stream.info.description
        kept.save_to_disk(str(folder / KEPT))
        return len(kept)


def _verified(args: argparse.Namespace, scan: Any, dataset: Any, model: Any, processor: Any) -> Any:
    """The scan with the opinion of the model after CleanCLIP on the pairs that it trusts, which stays in CLEANED."""
    from ..trainers.defended import CleanCLIPTrainer

    columns = {"image_column": args.image_column, "caption_column": args.caption_column}

    def clean(trusted: Any) -> Any:
        say(f"Cleaning the last model on the {len(trusted)} least suspect pairs")
        settings = CleanCLIPTrainer.args_class(
            str(args.output_dir / CLEANED),
            num_train_epochs=_VERIFY_EPOCHS if args.verify_epochs is None else args.verify_epochs,
            learning_rate=_VERIFY_RATE if args.verify_learning_rate is None else args.verify_learning_rate,
            per_device_train_batch_size=min(args.batch_size, len(trusted)),
            seed=args.seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=args.device == "cpu",
            **columns,
        )
        trainer = CleanCLIPTrainer(model, settings, train_dataset=trusted, processing_class=processor)
        trainer.train()
        trainer.save_model()
        return trainer.unwrapped_model

    given = {**columns, "batch_size": args.batch_size, "num_workers": args.num_workers}
    return scan.verify(dataset, clean, processor, **given)

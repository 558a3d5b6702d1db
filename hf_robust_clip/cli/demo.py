"""`hf-robust-clip demo`: poison a small CLIP, defend it one way or another, report what became of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..locking import sole_writer
from ..wording import listed, shown
from .demo_recipe import (
    DEFENCES,
    FINETUNING,
    MANIFEST,
    PRETRAINING,
    QUICK,
    RESULTS,
    TRIGGERS,
    Recipe,
    reports,
    title_of,
)
from .output import UsageError, output_folder, say


def add_parser(commands: Any) -> None:
    """Add the sub-command to those of `hf-robust-clip`."""
    parser = commands.add_parser(
        "demo",
        help="poison a small CLIP, defend it, and measure both, in a few minutes on a CPU",
        description="Train a small CLIP on poisoned pairs of digits and captions, defend it, measure the attack with "
        "and without the defence, and write a report. Nothing is downloaded.",
    )
    add = parser.add_argument
    add("--output-dir", type=Path, required=True, help="folder for report.html, results.json and the checkpoints")
    add(
        "--defence",
        choices=list(DEFENCES),
        default="cleanclip",
        help="cleanclip: fine-tune the poisoned model on clean pairs; roclip, safeclip: pre-train on the poisoned "
        "pairs in a way that resists them; all: all three, against one poisoned model (default: cleanclip)",
    )
    add("--seed", type=int, default=0, help="of the data, the trigger and training (default: 0)")
    add("--trigger", choices=list(TRIGGERS), default="blended", help="the backdoor's trigger (default: blended)")
    add("--quick", action="store_true", help="only see that it runs, in under a minute: the figures mean little")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command as its arguments say."""
    run_demo(args.output_dir, seed=args.seed, trigger_name=args.trigger, quick=args.quick, defence=args.defence)
    return 0


def run_demo(
    output_dir: Path,
    seed: int = 0,
    trigger_name: str = "blended",
    recipe: Recipe | None = None,
    quick: bool = False,
    defence: str = "cleanclip",
) -> dict[str, Any]:
    """
    Run the demo, print what it does and what came of it, and write its files.

    Args:
        output_dir (`Path`): Gets the [`reports`], `results.json`, `poison_manifest.json` and a folder for each model
            of the defence. Those there from an earlier demo are replaced; other files stay.
        seed (`int`): Of the data, the trigger and training, in [0, 2**32).
        trigger_name (`str`): One of `TRIGGERS`.
        recipe ([`Recipe`], *optional*): The numbers; by default those that suit the defence.
        quick (`bool`): Whether the outcome is to be labelled as that of a quick run.
        defence (`str`): One of `DEFENCES`.

    Returns:
        `dict`: What `results.json` holds.

    Raises:
        `UsageError`: On a folder that cannot be written to, that another process writes to, or that holds files of
            these names which no demo wrote; on an argument out of range; before any work.
        `ModuleNotFoundError`: Without the extra `report`.
    """
    from ..telling import check_report_extra

    for flag, value, accepted in (("--trigger", trigger_name, TRIGGERS), ("--defence", defence, DEFENCES)):
        if value not in accepted:
            raise UsageError(f"{flag}: {shown(value)} is not a {flag[2:]}; accepted are {listed(accepted)}")
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed: {seed} is not a seed; accepted is an integer from 0 to 2**32 - 1")
    check_report_extra()
    files, folders = (MANIFEST, RESULTS, *reports(defence)), DEFENCES[defence]
    with output_folder(output_dir, sole_writer(output_dir, "--output-dir", "a demo"), files, folders):
        _check_folder(output_dir, [*files, *folders])
        say(title_of(defence))
        if quick:
            say(
                "QUICK RUN: the models are hardly trained and the figures mean little; "
                "leave out --quick for real ones."
            )
        # What follows imports torch and transformers, which takes seconds: these lines are read by then.
        from .demo_steps import run_steps
        from .progress import quiet_libraries

        if recipe is None:
            recipe = QUICK if quick else FINETUNING if defence == "cleanclip" else PRETRAINING
        with quiet_libraries():
            return run_steps(output_dir, seed, trigger_name, recipe, quick, defence)


def _check_folder(folder: Path, written: list[str]) -> None:
    """`UsageError` for a folder with something under these names that no demo wrote, which leaves a manifest."""
    foreign = [name for name in written if (folder / name).is_file() or any((folder / name).glob("*"))]
    earlier = (folder / MANIFEST).is_file() and not (folder / "data").exists()  # which `poison` writes beside its own
    if foreign and not earlier:
        raise UsageError(
            f"--output-dir: {folder} holds {listed(foreign)}, which no demo wrote, and which this one would replace: "
            "give another folder"
        )

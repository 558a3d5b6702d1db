"""`hf-robust-clip demo`: poison a small CLIP, defend it one way or another, report what became of it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_text
from ..locking import sole_writer
from ..wording import listed, shown
from .demo_recipe import (
    CONTROLS,
    DEFENCES,
    LABELS,
    MANIFEST,
    RESULTS,
    TRIGGERS,
    Recipe,
    default_recipe,
    reports,
    title_of,
)
from .output import (
    UsageError,
    check_output_dir,
    format_table,
    prepare_output_dir,
    say,
    with_folder,
    write_json,
)


def add_parser(commands: Any) -> None:
    """Add the sub-command to those of `hf-robust-clip`."""
    parser = commands.add_parser(
        "demo",
        help="poison a small CLIP, defend it, and measure both, in a few minutes on a CPU",
        description="Train a small CLIP on poisoned pairs of digits and captions, defend it, measure the attack with "
        "and without the defence, and write a report. Nothing is downloaded.",
    )
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="folder for report.html, results.json and the checkpoints"
    )
    parser.add_argument(
        "--defence",
        choices=list(DEFENCES),
        default="cleanclip",
        help="cleanclip: fine-tune the poisoned model on clean pairs; roclip, safeclip: pre-train on the poisoned "
        "pairs in a way that resists them; all: all three, against one poisoned model (default: cleanclip)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data, the trigger and training (default: 0)")
    parser.add_argument(
        "--trigger", choices=list(TRIGGERS), default="blended", help="the backdoor's trigger (default: blended)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="only see that it runs, in under a minute: the figures mean little"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command as its arguments say."""
    run_demo(args.output_dir, seed=args.seed, trigger_name=args.trigger, quick=args.quick, defence=args.defence)
    return 0


def results_table(results: Mapping[str, Any]) -> list[list[str]]:
    """The figures of the models as text, a row of headings first."""
    heads = ["clean accuracy", "attack success", "placebos", "triggered accuracy", "trigger distance", "seconds"]
    rows = [["", *heads]]
    for model, label in LABELS.items():
        if model in results:
            figures = results[model]
            measures = ("clean_accuracy", "attack_success_rate", "placebo_success_rate", "triggered_accuracy")
            shares = (figures[name] for name in measures)
            numbers = (f"{figures['trigger_distance']:.2f}", f"{figures['seconds']:.0f}")
            rows.append([label, *(f"{share:.1%}" for share in shares), *numbers])
    return rows


def run_demo(
    output_dir: Path,
    seed: int = 0,
    trigger_name: str = "blended",
    recipe: Recipe | None = None,
    quick: bool = False,
    defence: str = "cleanclip",
) -> dict[str, Any]:
    """
    Run the demo, print its course and its outcome, and write its files.

    Args:
        output_dir (`Path`): Gets `report.html` (of all defences a `report-DEFENCE.html` each), `results.json`,
            `poison_manifest.json` and a checkpoint for each model
            of the defence, under its name in `DEFENCES`. Those there from an earlier demo are replaced; other files
            stay.
        seed (`int`): Of the data, the trigger and training, in [0, 2**32).
        trigger_name (`str`): One of `TRIGGERS`.
        recipe ([`Recipe`], *optional*): The numbers; by default those of [`default_recipe`].
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
    written: Any = {"files": (MANIFEST, RESULTS, *reports(defence)), "folders": DEFENCES[defence]}
    check_output_dir(output_dir, **written)
    with with_folder(output_dir, sole_writer(output_dir, "--output-dir", "a demo")):
        _check_folder(output_dir, [*written["files"], *written["folders"]])
        prepare_output_dir(output_dir, **written)
        return _run(output_dir, seed, trigger_name, recipe, quick, defence)


def _check_folder(folder: Path, written: list[str]) -> None:
    """`UsageError` for a folder with something under these names that no demo wrote, which leaves a manifest."""
    foreign = [name for name in written if (folder / name).is_file() or any((folder / name).glob("*"))]
    earlier = (folder / MANIFEST).is_file() and not (folder / "data").exists()  # which `poison` writes beside its own
    if foreign and not earlier:
        raise UsageError(
            f"--output-dir: {folder} holds {listed(foreign)}, which no demo wrote, and which this one would replace: "
            "give another folder"
        )


def _run(
    output_dir: Path, seed: int, trigger_name: str, recipe: Recipe | None, quick: bool, defence: str
) -> dict[str, Any]:
    """As [`run_demo`], with the folder to itself."""
    from ..telling import render_run_report
    from ..telling.page import run_facts
    from ..telling.sentences import statements

    started = time.perf_counter()
    say(title_of(defence))
    if quick:
        say("QUICK RUN: the models are hardly trained and the figures mean little; leave out --quick for real ones.")
    # What follows imports torch and transformers, which takes seconds: whoever waits has read the first lines by then.
    from .progress import quiet_libraries

    with quiet_libraries():
        from .demo_steps import Demo, make_trigger
        from .demo_study import study_of

        recipe = recipe or default_recipe(defence, quick)
        demo = Demo(output_dir, seed, make_trigger(trigger_name, seed), recipe, defence)
        demo.run()
    results = demo.results(quick, seconds=time.perf_counter() - started)
    write_json(output_dir / RESULTS, results)
    say("\nResults" + (" (quick run: they mean little)" if quick else ""))
    for line in format_table(results_table(results)):
        say(f"  {line}")
    flags = f"--defence {defence} --seed {seed} --trigger {trigger_name}{' --quick' if quick else ''}"
    for name, of in reports(defence).items():
        record, pictures = demo.runs[of].record, demo.runs[of].pictures
        controls = [demo.runs[control] for control in CONTROLS[of]]
        say(f"\n{LABELS[of]}" if defence == "all" else "")
        for statement in statements(run_facts(record, controls)):
            say(f"{'-' if statement.kind == 'result' else '!'} {statement.text}")
        study = study_of(
            demo, of, quick, f"hf-robust-clip demo --output-dir {output_dir.name or 'demo-output'} {flags}"
        )
        write_text(output_dir / name, render_run_report(record, pictures, controls, study))
        say(f"\nReport: {output_dir / name}")
    return results

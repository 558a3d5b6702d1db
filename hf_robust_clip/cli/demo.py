"""`hf-robust-clip demo`: poison a small CLIP, fine-tune it plainly and with CleanCLIP, report what became of it."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .output import format_table, prepare_output_dir, say, write_json, write_text


@dataclass(frozen=True)
class Recipe:
    """Every number of the demo. Both fine-tunings share theirs: the method is all that differs."""

    renderings: int = 4  # of each of the 1,397 training digits
    poison_rate: float = 0.03
    batch_size: int = 64
    weight_decay: float = 0.1
    adam_beta2: float = 0.98
    warmup_steps: int = 50
    pretrain_epochs: int = 8
    pretrain_learning_rate: float = 1e-3
    finetune_epochs: int = 6
    finetune_learning_rate: float = 1e-3
    image_preset: str = "cleanclip"
    image_flip: float = 0.0  # a mirrored digit is another figure
    image_noise: float = 0.8
    image_noise_std: float = 0.1
    unimodal_weight: float = 2.0
    text_preset: str = "eda"


#: Every part of the demo in a fraction of the time; the models are hardly trained, so the figures mean little.
QUICK = Recipe(renderings=1, pretrain_epochs=5, finetune_epochs=2, poison_rate=0.1, warmup_steps=20)

#: The triggers on offer, with what suits digits of 16 x 16 pixels.
TRIGGERS: dict[str, dict[str, Any]] = {
    "blended": {"alpha": 0.2},
    "patch": {"size": 3},
    "sinusoid": {"amplitude": 30.0, "frequency": 4},
    "warp": {"strength": 4.0},
}
TARGET = "eight"
#: The clean pairs are rendered under another seed than the poisoned ones: new places, noise and captions.
CLEAN_SEED_OFFSET = 1000
MANIFEST, RESULTS, REPORT = "poison_manifest.json", "results.json", "report.html"


def add_parser(commands: Any) -> None:
    """Add the sub-command to those of `hf-robust-clip`."""
    parser = commands.add_parser(
        "demo",
        help="poison a small CLIP, clean it, and measure both, in a few minutes on a CPU",
        description="Train a small CLIP on poisoned pairs of digits and captions, fine-tune it on clean pairs plainly "
        "and with CleanCLIP, measure the attack before and after, and write a report. Nothing is downloaded.",
    )
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="folder for report.html, results.json and the checkpoints"
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
    recipe = QUICK if args.quick else Recipe()
    run_demo(args.output_dir, seed=args.seed, trigger_name=args.trigger, recipe=recipe, quick=args.quick)
    return 0


def run_demo(
    output_dir: Path, seed: int = 0, trigger_name: str = "blended", recipe: Recipe | None = None, quick: bool = False
) -> dict[str, Any]:
    """
    Run the demo, print its course and its outcome, and write its files.

    Args:
        output_dir (`Path`): Gets `report.html`, `results.json`, `poison_manifest.json` and the checkpoints `poisoned`,
            `finetuned` and `cleanclip`. Those there from an earlier run are replaced; other files stay.
        seed (`int`): Of the data, the trigger and training, in [0, 2**32).
        trigger_name (`str`): One of `TRIGGERS`.
        recipe ([`Recipe`], *optional*): The numbers.
        quick (`bool`): Whether the outcome is to be labelled as that of a quick run.

    Returns:
        `dict`: What `results.json` holds.

    Raises:
        `ValueError`: On a folder that cannot be written to, or an argument out of range, before any work.
        `ModuleNotFoundError`: Without the extra `report`.
    """
    from ..report import MODELS, check_report_extra, findings, render_demo_report, results_table

    started = time.perf_counter()
    if trigger_name not in TRIGGERS:
        raise ValueError(f"--trigger: {trigger_name!r} is no trigger; accepted are {', '.join(TRIGGERS)}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed: {seed} is no seed; accepted is an integer from 0 to 2**32 - 1")
    check_report_extra()
    prepare_output_dir(output_dir, files=(MANIFEST, RESULTS, REPORT), folders=MODELS)
    say("A backdoor in a small CLIP, and what fine-tuning on clean pairs does to it")
    if quick:
        say("QUICK RUN: the models are hardly trained and the figures mean little; leave out --quick for real ones.")
    # What follows imports torch and transformers, which takes seconds: whoever waits has read the first lines by then.
    from .progress import quiet_libraries

    with quiet_libraries():
        from .demo_steps import Demo, make_trigger

        demo = Demo(output_dir, seed, make_trigger(trigger_name, seed), recipe or Recipe())
        demo.run()
    results = demo.results(quick, seconds=time.perf_counter() - started)
    write_json(output_dir / RESULTS, results)
    say("\nResults" + (" (quick run: they mean little)" if quick else ""))
    for line in format_table(results_table(results)):
        say(f"  {line}")
    say()
    for finding in findings(results):
        say(f"{'!' if finding.kind == 'warning' else '-'} {finding.text}")
    flags = f"--seed {seed} --trigger {trigger_name}{' --quick' if quick else ''}"
    command = f"hf-robust-clip demo --output-dir {output_dir.name or 'demo-output'} {flags}"
    page = render_demo_report(results, demo.pairs, demo.examples(), demo.embeddings, demo.is_target, command)
    write_text(output_dir / REPORT, page)
    say(f"\nReport: {output_dir / REPORT}")
    return results

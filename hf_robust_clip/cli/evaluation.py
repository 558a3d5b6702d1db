"""`hf-robust-clip evaluate`: what a model makes of images, clean and with triggers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .flags import add_columns, add_measuring_flags, check_measuring, check_source, check_whole, spelled
from .output import UsageError, format_table, say, usage_errors, write_json

if TYPE_CHECKING:
    from .measuring import Labelled

#: Bytes of the largest file that is looked at for whether it holds results.
_LARGEST = 10_000_000


def add_parser(commands: Any) -> None:
    """Add the sub-command to those of `hf-robust-clip`."""
    parser = commands.add_parser(
        "evaluate",
        required=("model", "data"),
        help="accuracy of a model, and the success of triggers on it",
        description="Measure the zero-shot accuracy of a dual encoder on labelled images, how often each trigger "
        "steers them to the target, and what a linear probe on its features makes of both.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder, adapters' too, or a model on the Hub")
    add_measuring_flags(parser, "--data", "--split", default_split="test")
    add = parser.add_argument
    add_columns(parser)
    add(
        *spelled("--linear-probe-data"),
        metavar="SOURCE",
        help="labelled images of the same classes to fit a linear probe on: the same kinds of source",
    )
    add(
        *spelled("--linear-probe-split"),
        default="train",
        metavar="SPLIT",
        help="their split, where there are several (default: %(default)s)",
    )
    add(
        *spelled("--batch-size"),
        type=int,
        default=64,
        metavar="N",
        help="images encoded at a time (default: %(default)s)",
    )
    add("--device", metavar="NAME", help="such as cuda:1 or cpu (default: an accelerator if there is one)")
    add("--json", type=Path, metavar="FILE", help="write the figures and what they are of to a file")
    add(
        "--control",
        metavar="LABEL",
        help="that MODEL is the control of a defence, such as 'plain fine-tuning': `card --results` then shows its "
        "figures beside the defended model's",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command as its arguments say."""
    check_source("MODEL", args.model)
    check_measuring(args, "--data")
    if args.linear_probe_data is not None:
        check_source("--linear-probe-data", args.linear_probe_data)
    check_whole("--batch-size", args.batch_size, least=1)
    if args.json is not None and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise UsageError(f"--json: {args.json} cannot be written; accepted is a file in a folder that is there")
    if args.json is not None and args.json.is_file() and not _is_ours(args.json):
        raise UsageError(
            f"--json: {args.json} is there, and is not what this command wrote: it is not replaced. Give another name"
        )
    if args.dry_run:
        say(args.parser.dump(args).rstrip())
        return 0
    # What follows imports torch and transformers, which takes seconds.
    from .progress import quiet_libraries

    with quiet_libraries():
        results = evaluate(args)
    for line in format_table(_table(results)):
        say(line)
    if args.json is not None:
        write_json(args.json, results)
        say(f"\nWritten to {args.json}")
    return 0


def _is_ours(path: Path) -> bool:
    """Whether a file is empty, or results of this command, and not data, a model's or a person's file."""
    if path.stat().st_size > _LARGEST:
        return False
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if text else {"figures": {}}
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "figures" in content


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """
    Measure a model as the arguments of the sub-command say.

    Returns:
        `dict`: `model`, `figures` (every figure by name), `measures` (what each evaluator measured, on what),
        `triggers` (each with its `prefix`, fields, target and number of attacked images), `images`, `classes`,
        `device` and `versions`; `control`, what the model is the control of, where that is said.

    Raises:
        `UsageError`: If the arguments, the model or the data do not go together.
    """
    from ..describing import describe_evaluator
    from ..evaluation.embedding import Embedder
    from ..evaluation.running import run_evaluators
    from ..record import jsonable
    from ..versions import versions
    from .info import DEPENDENCIES
    from .measuring import device_of, load_labelled, load_model, make_evaluators, make_triggers, prefixes, target_of

    labelled = load_labelled(args, "--data", "--split", args.image_column)
    assert labelled is not None  # --data is required
    triggers = make_triggers(args.trigger)
    evaluators = [*make_evaluators(args, labelled), *_probes(args, labelled, triggers)]
    device = device_of(args.device)
    model, processor = load_model("MODEL", args.model)
    for evaluator in evaluators:
        if hasattr(evaluator, "check"):
            with usage_errors("--trigger"):
                evaluator.check(processor)
    with usage_errors("MODEL"):
        embedder = Embedder(model.to(device), processor, args.batch_size)
    say(f"Measuring {args.model} on {len(labelled.dataset)} images of {len(labelled.class_names)} classes\n")
    figures = run_evaluators(evaluators, processor, embedder)
    attacks = evaluators[1 : 1 + len(triggers)]
    described = [
        {
            "prefix": prefix,
            "trigger": trigger.to_dict(),
            "target": target_of(trigger, args.target),
            "attacked_images": attack.attacked_images,
        }
        for trigger, prefix, attack in zip(triggers, prefixes(triggers), attacks, strict=True)
    ]
    results: dict[str, Any] = jsonable(
        {
            **({} if args.control is None else {"control": args.control}),
            "model": args.model if not Path(args.model).exists() else Path(args.model).resolve().name,
            "figures": figures,
            "measures": [describe_evaluator(evaluator) for evaluator in evaluators],
            "triggers": described,
            "images": len(labelled.dataset),
            "classes": labelled.class_names,
            "device": str(device),
            "versions": versions(DEPENDENCIES),
        }
    )
    return results


def _probes(args: argparse.Namespace, labelled: Labelled, triggers: list[Any]) -> list[Any]:
    """A linear probe for each trigger; without triggers, one."""
    if args.linear_probe_data is None:
        return []
    from ..evaluation.linear_probe import LinearProbeEvaluator
    from .measuring import load_data, prefixes, relabelled, target_of

    flag = "--linear-probe-data"
    training = load_data(flag, args.linear_probe_data, args.linear_probe_split, args.image_column)
    training = relabelled(args, training)
    data, names, image_column, label_column = labelled
    named = zip(triggers, prefixes(triggers), strict=True)
    attacks: list[Any] = [
        {"trigger": trigger, "target": target_of(trigger, args.target), "prefix": prefix} for trigger, prefix in named
    ]
    with usage_errors(flag):
        return [
            LinearProbeEvaluator(training, data, names, image_column=image_column, label_column=label_column, **attack)
            for attack in attacks or [{}]
        ]


def _table(results: dict[str, Any]) -> list[list[str]]:
    """A row without trigger and a row for each; a column for each kind of figure that there is, excess in points."""
    figures, attacks = results["figures"], results["triggers"]
    first = attacks[0]["prefix"] if attacks else ""
    columns = {
        "accuracy": ("clean_accuracy", "triggered_accuracy"),
        "attack success": ("", "attack_success_rate"),
        "placebos": ("", "placebo_success_rate"),
        "excess": ("", "excess_success_rate"),
        "distance": ("", "trigger_distance"),
        "probe accuracy": (f"{first}linear_probe_accuracy", "linear_probe_triggered_accuracy"),
        "probe attack success": ("", "linear_probe_attack_success_rate"),
    }
    rows = [("no trigger", {column: figures.get(clean) for column, (clean, _) in columns.items()})]
    for attack in attacks:
        name = attack["prefix"].rstrip("_").replace("_", " ")
        found = {column: figures.get(attack["prefix"] + figure) for column, (_, figure) in columns.items()}
        rows.append((f"{name} -> {attack['target']}", found))
    shown = [column for column in columns if any(row[column] is not None for _, row in rows)]
    return [["", *shown], *([name, *(_shown(column, row[column]) for column in shown)] for name, row in rows)]


def _shown(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    if column == "excess":
        return f"{100 * value:+.1f}"
    return f"{value:.3f}" if column == "distance" else f"{value:.1%}"

"""
What the papers leave open, one command each, on the digits or any study:

    python benchmarks/open_checks.py pool_size
    python benchmarks/open_checks.py all --seeds 0 1

Writes the figures, a table and a plot as `benchmarks/results/checks/STUDY-CHECK.json`, `.md` and `.png` (with
`-ATTACK` where that is not blended noise), with the learning rates that `defence_table.py` found for the study, whose
cells it takes over where they are the same. Goes on where it was interrupted, as that does.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from typing import Any

from bench.checks import CHECKS, Check, Setting, Variant
from bench.grid import Results, run_cells
from bench.marked import ROOT
from bench.marked import markdown as table_of
from bench.material import load_material
from bench.study import load_study
from bench.table import spread
from defence_table import RESULTS as TABLES
from defence_table import add_run_arguments, run_arguments

RESULTS = ROOT / "benchmarks" / "results" / "checks"


def describe(variant: Variant, results: Results) -> dict[str, Any]:
    """What is kept of a variant: settings that differ, and figures by seed."""
    cells = [results.of(cell) for cell in variant.cells]
    return {
        "label": variant.label,
        "line": variant.line,
        "x": variant.x,
        "seeds": [cell["seed"] for cell in cells],
        "accuracy": [cell["figures"]["clean_accuracy"] for cell in cells],
        "attack_success": [cell["figures"][cell["success"]] for cell in cells],
        "excess": [cell["figures"].get("excess_success_rate") for cell in cells],
        "poisons": [cell["counts"]["poisons"] for cell in cells],
        "scan_left": [cell["course"].get("filter", {}).get("poisons_kept") for cell in cells],
        "attacked": [cell["counts"]["attacked"] for cell in cells],
        "seconds": [cell["seconds"] for cell in cells],
        "course": cells[0]["course"].get("similarities"),
    }


def markdown(content: Mapping[str, Any]) -> str:
    """The check's table, without the columns in which nothing was measured."""
    variants = content["variants"]
    columns = {
        "": [variant["label"] for variant in variants],
        "clean accuracy": [spread(variant["accuracy"]) for variant in variants],
        "attack success": [spread(variant["attack_success"]) for variant in variants],
        "above the mean of its placebos": [spread(variant.get("excess", ())) for variant in variants],
        "poisons that the scan left": [
            ", ".join(str(count) for count in variant.get("scan_left", ()) if count is not None)
            for variant in variants
        ],
        "attacked": [str(variant["attacked"][0]) for variant in variants],
        "seconds": [f"{statistics.mean(variant['seconds']):.0f}" for variant in variants],
    }
    shown = {title: cells for title, cells in columns.items() if any(cells)}
    table = table_of(tuple(shown), list(zip(*shown.values(), strict=True)))
    return f"**{content['question']}**\n\n{content['setting']}\n\n{table}"


def publish(name: str, check: Check, setting: Setting, results: Results) -> None:
    """Write the figures, the table and the plot."""
    from bench.plots import plot_courses, plot_figures

    variants = [describe(variant, results) for variant in check.variants]
    first = results.of(check.variants[0].cells[0])
    seeds = ", ".join(map(str, setting.seeds))
    target = setting.study.target
    results.save(
        check=name,
        question=check.question,
        setting=f"Study {setting.study.name}, attack {setting.attack}, target {target!r}, seeds {seeds}; "
        f"{setting.pairs} pairs, {first['counts']['poisons']} of them poisoned where nothing else is said; "
        f"{first['device']}; "
        + ", ".join(f"{package} {number}" for package, number in first["versions"].items())
        + ".",
        command=f"python benchmarks/open_checks.py {name} --study {setting.study.name} --attack {setting.attack} "
        f"--seeds {' '.join(map(str, setting.seeds))}",
        variants=variants,
    )
    results.path.with_suffix(".md").write_text(markdown(results.content))
    path = results.path.with_suffix(".png")
    if check.course:
        plot_courses(variants, check.question, path)
    else:
        plot_figures(variants, check.question, check.axis, check.logarithmic, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=[*CHECKS, "all"])
    parser.add_argument(
        "--study", default="digits", help="one of benchmarks/studies, or a YAML file (default: digits)"
    )
    parser.add_argument("--attack", default="blended", help="one of the study's attacks (default: blended)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default: 0)")
    add_run_arguments(parser)
    options = parser.parse_args()
    study, run = load_study(options.study), run_arguments(options)
    if options.attack not in study.attacks:
        parser.error(f"--attack {options.attack!r} is not in the study; accepted are {', '.join(study.attacks)}")
    table = Results(TABLES / f"{study.name}.json")
    pairs = len(load_material(study, options.data, 0).pairs)
    chosen = table.content.get("study", {}).get("chosen", {})
    if not chosen:
        print("No learning rates were searched for this study yet: those of its description are used.")
    setting = Setting(study, options.attack, options.seeds, chosen, pairs)
    for name in CHECKS if options.check == "all" else [options.check]:
        check = CHECKS[name](setting)
        cells = [cell for variant in check.variants for cell in variant.cells]
        of_attack = "" if options.attack == parser.get_default("attack") else f"-{options.attack}"
        results = Results(RESULTS / f"{study.name}-{name}{of_attack}.json")
        results.take_over(table, cells)
        print(f"{name}: {check.question}")
        run_cells(cells, results, **run)
        results.keep(cells)
        publish(name, check, setting, results)
        print(markdown(results.content))


if __name__ == "__main__":
    main()

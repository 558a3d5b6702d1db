"""
The demo over seeds and triggers, as `hf-robust-clip demo` measures it: the first tables of docs/results.md.

    python benchmarks/demo_table.py                 # what benchmarks/results holds, as Markdown
    python benchmarks/demo_table.py --run           # run what is missing there first: 3 minutes each, or 24
    python benchmarks/demo_table.py --docs          # and put the tables into docs/results.md
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.marked import ROOT, put_between, table_marks

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"


@dataclass(frozen=True)
class Table:
    """
    One of the tables: demos of one choice of `--defence`.

    Args:
        name (`str`): Folder of the results, and the table's name in the marks around it.
        defence (`str`): As of `hf-robust-clip demo`.
        runs (sequence of `(str, int)`): Triggers and seeds.
        columns (mapping of `str` to `str`): Models of the results, and their headings.
    """

    name: str
    defence: str
    runs: Sequence[tuple[str, int]]
    columns: Mapping[str, str]

    @property
    def marks(self) -> tuple[str, str]:
        """The lines around the table in the page."""
        return table_marks(self.name, "demo_table.py --docs")

    def path(self, trigger: str, seed: int) -> Path:
        """The results of one run."""
        return RESULTS / self.name / f"{trigger}-{seed}.json"

    def markdown(self) -> str:
        """The results there are: clean accuracy and attack success of each model."""
        lines = [f"| trigger, seed | {' | '.join(self.columns.values())} |", "|---" * (1 + len(self.columns)) + "|"]
        for trigger, seed in self.runs:
            if self.path(trigger, seed).is_file():
                results = json.loads(self.path(trigger, seed).read_text())
                cells = [
                    f"{results[model]['clean_accuracy']:.1%}, {results[model]['attack_success_rate']:.1%}"
                    for model in self.columns
                ]
                lines.append(f"| {trigger}, {seed} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


TABLES = (
    # The demo's default trigger with three seeds, each other trigger with one.
    Table(
        "demo",
        "cleanclip",
        (("blended", 0), ("blended", 1), ("blended", 2), ("patch", 0), ("sinusoid", 0), ("warp", 0)),
        {"poisoned": "poisoned", "finetuned": "plain fine-tuning", "cleanclip": "CleanCLIP"},
    ),
    Table(
        "pretraining",
        "all",
        (("blended", 0), ("blended", 1), ("blended", 2), ("patch", 0), ("patch", 1), ("patch", 2)),
        {
            "poisoned": "undefended",
            "augmentation": "augmentation alone",
            "roclip": "RoCLIP",
            "safeclip": "SafeCLIP",
            "cleanclip": "undefended, then CleanCLIP",
        },
    ),
)


def run(defence: str, trigger: str, seed: int) -> dict[str, Any]:
    """One demo, in a process of its own; its results without what is there for the plots only."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hf_robust_clip.cli.main", "demo", "--output-dir", folder]
        command += ["--defence", defence, "--trigger", trigger, "--seed", str(seed)]
        subprocess.run(command, check=True, cwd=ROOT)  # nosec B603 # our own command
        return without_plots(json.loads((Path(folder) / "results.json").read_text()))


def without_plots(results: dict[str, Any]) -> dict[str, Any]:
    """Results without curves and histograms."""
    kept = {name: value for name, value in results.items() if name != "curves"}
    if "splits" in kept:
        kept["splits"] = [{k: v for k, v in split.items() if k != "histogram"} for split in kept["splits"]]
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run the demos that have no results yet")
    parser.add_argument("--docs", action="store_true", help="put the tables into docs/results.md")
    options = parser.parse_args()
    for table in TABLES:
        for trigger, seed in table.runs:
            path = table.path(trigger, seed)
            if options.run and not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(run(table.defence, trigger, seed), indent=2) + "\n")
        print(table.markdown())
        if options.docs:
            put_between(PAGE, table.marks, table.markdown())


if __name__ == "__main__":
    main()

"""
The README's table: the demo over seeds and triggers, as `hf-robust-clip demo` measures it.

    python benchmarks/demo_table.py                 # what benchmarks/results/demo holds, as Markdown
    python benchmarks/demo_table.py --run           # run what is missing there first, a few minutes each
    python benchmarks/demo_table.py --readme        # and put the table into README.md
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "demo"
README = ROOT / "README.md"
BEGIN, END = "<!-- demo table: benchmarks/demo_table.py --readme -->\n", "<!-- end of the demo table -->\n"
#: The demo's default trigger with three seeds, each other trigger with one.
RUNS = (("blended", 0), ("blended", 1), ("blended", 2), ("patch", 0), ("sinusoid", 0), ("warp", 0))
MODELS = ("poisoned", "finetuned", "cleanclip")


def run(trigger: str, seed: int) -> dict[str, Any]:
    """One demo, in a process of its own; its results without the curves."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hf_robust_clip.cli.main", "demo", "--output-dir", folder]
        subprocess.run([*command, "--trigger", trigger, "--seed", str(seed)], check=True, cwd=ROOT)
        results: dict[str, Any] = json.loads((Path(folder) / "results.json").read_text())
    del results["curves"]
    return results


def table() -> str:
    """The results there are as a Markdown table: clean accuracy and attack success of each model."""
    lines = [
        "| trigger, seed | poisoned | plain fine-tuning | CleanCLIP |",
        "|---|---|---|---|",
    ]
    for trigger, seed in RUNS:
        path = RESULTS / f"{trigger}-{seed}.json"
        if path.is_file():
            results = json.loads(path.read_text())
            cells = [
                f"{results[model]['clean_accuracy']:.1%}, {results[model]['attack_success_rate']:.1%}"
                for model in MODELS
            ]
            lines.append(f"| {trigger}, {seed} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run the demos that have no results yet")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for trigger, seed in RUNS:
        path = RESULTS / f"{trigger}-{seed}.json"
        if options.run and not path.is_file():
            path.write_text(json.dumps(run(trigger, seed), indent=2) + "\n")
    print(table())
    if options.readme:
        text = README.read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        README.write_text(before + BEGIN + table() + END + after)


if __name__ == "__main__":
    main()

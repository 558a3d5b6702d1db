"""
The table of defences: every row of a study under every attack and seed, with its controls.

    python benchmarks/defence_table.py --study digits
    python benchmarks/defence_table.py --study flickr8k --data FOLDER

First each row's learning rate is searched, on an attack and seeds that the table does not report; then the table's
cells run. Each is saved as it finishes in `benchmarks/results/defences/STUDY.json`; started again, the command goes on
where it was interrupted. At the end it writes the table next to that file, as Markdown and as a picture, and with
`--docs` in short into docs/results.md, and with all studies' tables into README.md.

Of the rates of a method that cleans a model, the search takes the one with the largest clean accuracy less attack
success. Of those of a method that trains one, whose user knows of no attack, it takes the one with the largest clean
accuracy. A best rate at the end of those tried is followed by one beyond it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.cell import Cell, with_learning_rate
from bench.grid import Results, run_cells
from bench.marked import ROOT, put_between, table_marks
from bench.plots import plot_table
from bench.study import CLEANED_TWINS, FILTER, ROWS, TWIN, Study, load_study, twin_row
from bench.table import accuracy_title, overview, page, rows_with_cells, summary, table_figures
from bench.verdicts import verdicts

RESULTS = ROOT / "benchmarks" / "results" / "defences"
#: The page of the tables, and the one that shows them all in one table.
PAGE, README = ROOT / "docs" / "results.md", ROOT / "README.md"
#: Most rates that are tried for a row, those beyond the study's included.
MOST_RATES = 8
#: The studies of that one table, and what their data is called there.
SHOWN = {"digits": "digits", "cifar10": "CIFAR-10", "flickr8k": "Flickr8k, balanced accuracy"}


def make_cell(
    study: Study,
    row: str,
    attack: str,
    poisoning: Mapping[str, Any],
    seed: int,
    chosen: Mapping[str, float],
    twin: bool = False,
) -> Cell:
    """A cell of the table with the learning rates chosen, and those that it starts from."""
    start = ROWS[row].start
    if start and twin:
        start = TWIN
    before = make_cell(study, start, attack, poisoning, seed, chosen, twin) if start else None
    scanned = make_cell(study, "undefended", attack, poisoning, seed, chosen) if row == FILTER else None
    cell = Cell(study, row, attack, poisoning, seed, start=before, scanned=scanned, twin=twin or row == TWIN)
    return with_learning_rate(cell, chosen.get("undefended" if row == TWIN else row))


def search_cells(
    study: Study, row: str, chosen: Mapping[str, float], rates: Sequence[float] | None = None
) -> dict[float, list[Cell]]:
    """The cells of the search for a row's learning rate, by rate; `None`: those of the study."""
    return {
        rate: [
            make_cell(study, row, "search", study.search.attack, seed, {**chosen, row: rate})
            for seed in study.search.seeds
        ]
        for rate in (study.rates(row) if rates is None else rates)
    }


def choose(
    study: Study,
    row: str,
    results: Results,
    chosen: Mapping[str, float],
    rates: Sequence[float] | None = None,
) -> float:
    """The best of a row's learning rates."""

    def score(cells: list[Cell]) -> float:
        total = 0.0
        for cell in cells:
            result = results.of(cell)
            total += result["figures"]["clean_balanced_accuracy"]
            if ROWS[row].start is not None:
                total -= result["figures"][result["success"]]
        return total

    cells = search_cells(study, row, chosen, rates)
    return max(cells, key=lambda rate: score(cells[rate]))


def rates_tried(study: Study, results: Results) -> dict[str, list[float]]:
    """Of each row that is searched the study's rates, and those beyond them that an earlier search tried."""
    before = results.content.get("study", {}).get("tried", {})
    searched = [row for row in study.rows if study.rates(row) and row != TWIN]
    return {row: sorted({*study.rates(row), *before.get(row, ())}) for row in searched}


def found_before(study: Study, results: Results) -> dict[str, float]:
    """The rates that an earlier search chose, of those rows and rates that are still searched."""
    chosen, tried = results.content.get("study", {}).get("chosen", {}), rates_tried(study, results)
    return {row: rate for row, rate in chosen.items() if rate in tried.get(row, ())}


def search(study: Study, results: Results, rows: Sequence[str], **run: Any) -> dict[str, float]:
    """
    The best learning rate of each of some rows: the undefended one's first, since others start from its model. Where
    the best is the lowest or the highest that was tried, half or twice of it is tried, too. Those of the other rows
    are as they were found before.
    """
    chosen, tried = found_before(study, results), rates_tried(study, results)
    for some in (["undefended"], [row for row in rows if row != "undefended"]):
        waiting = [row for row in some if row in tried]
        while waiting:
            groups = [group for row in waiting for group in search_cells(study, row, chosen, tried[row]).values()]
            # The search asks for accuracy and attack success alone, which earlier measures have, too.
            missing = [cell for group in groups for cell in group if cell.key not in results.cells]
            if not run_cells(missing, results, **run):
                raise TimeoutError("the search for the learning rates is not done")
            chosen |= {row: choose(study, row, results, chosen, tried[row]) for row in waiting}
            waiting = [row for row in waiting if extend(tried[row], chosen[row])]
            results.content.setdefault("study", {})["tried"] = tried
    return chosen


def extend(rates: list[float], best: float) -> bool:
    """Add a rate beyond the best one if that is at an end of a row's rates, and they are not too many."""
    ends = {min(rates): best / 2, max(rates): best * 2}
    if len(rates) == 1 or len(rates) >= MOST_RATES or best not in ends:
        return False
    rates.append(ends[best])
    return True


def table_cells(study: Study, chosen: Mapping[str, float]) -> list[Cell]:
    """
    The cells of the table, seed by seed, so that an interrupted table is whole for the first ones: rows under attacks,
    and the rows that clean a model, on the twin's. Whether a backdoor comes back is asked of cleaned models, of those
    trained on what a scan leaves, and of the twin. What the study's `only` leaves out has no cells.
    """
    cells = []
    for seed in study.seeds:
        for attack, poisoning in study.attacks.items():
            for row in study.rows:
                if not study.has(row, attack, seed):
                    continue
                made = [make_cell(study, row, attack, poisoning, seed, chosen)]
                if twin_row(row, study.rows) == row != TWIN and study.has(CLEANED_TWINS, attack, seed):
                    made.append(make_cell(study, row, attack, poisoning, seed, chosen, twin=True))
                if made[0].start is not None or row in (FILTER, TWIN):
                    rebound_rate = chosen.get("plain") or study.row_arguments("plain")["learning_rate"]
                    made = [replace(cell, rebound_rate=rebound_rate) for cell in made]
                cells += made
    return cells


def describe(
    study: Study, chosen: Mapping[str, float], cells: list[Cell], tried: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """What the table needs to know of the study."""
    searched = dict(study.search.attack)
    trigger = dict(searched.get("trigger", {}))
    attack = " ".join([str(trigger.pop("name", searched.get("mode"))), *(f"{k}={v}" for k, v in trigger.items())])
    seeds = ", ".join(map(str, study.search.seeds))
    return {
        "name": study.name,
        "target": study.target,
        "note": study.note,
        "rows": list(study.rows),
        "attacks": list(study.attacks),
        "seeds": list(study.seeds),
        "balanced": isinstance(study.classes, Mapping),
        "search": f"{attack}; seed {seeds}",
        "chosen": dict(chosen),
        "tried": {row: sorted(rates) for row, rates in tried.items()},
        "table_keys": [cell.key for cell in cells],
    }


def marks_of(study: str) -> tuple[str, str]:
    """The lines around the table of a study in docs/results.md, or around the one of `"all"` studies in README.md."""
    return table_marks(f"{study} defences", f"defence_table.py --study {study} --docs")


def readme_table() -> str:
    """The studies shown in README.md, in one table."""
    return overview({title: json.loads((RESULTS / f"{name}.json").read_text()) for name, title in SHOWN.items()})


def docs_text(content: Mapping[str, Any]) -> str:
    """What docs/results.md says of a study: the table in short, and what its cells say together."""
    explained = (
        "Over all attacks and seeds that took, in points of attack success, or of accuracy. A worst case names its "
        "attack and seed. The later plain steps are 300 on clean pairs."
    )
    return f"\n{summary(content)}\n{explained}\n\n{verdicts(content)}"


def put_into_docs(study: str, content: Mapping[str, Any]) -> None:
    """The table in short into docs/results.md, and the one of all studies into README.md, between their marks."""
    put_between(PAGE, marks_of(study), docs_text(content))
    if study in SHOWN:
        put_between(README, marks_of("all"), readme_table())


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that runs cells takes."""
    parser.add_argument("--data", type=Path, help="folder with the files that the study names")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "bench-output", help="folder for the models (default: bench-output)"
    )
    parser.add_argument("--processes", type=int, default=2, help="cells at a time (default: 2)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after so many")
    parser.add_argument(
        "--threads",
        type=int,
        help="of each process (default: OMP_NUM_THREADS, or the machine's cores shared between the processes)",
    )


def run_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Those arguments, for `run_cells`."""
    shared = max(1, (os.cpu_count() or 1) // options.processes)
    threads = options.threads or int(os.environ.get("OMP_NUM_THREADS", shared))
    until = time.monotonic() + 60 * options.minutes
    limits = {"processes": options.processes, "threads": threads, "until": until}
    return {"data": options.data, "work": options.work, **limits}


def fill(
    study: Study, results: Results, rows: Sequence[str], attacks: Sequence[str], seeds: Sequence[int], **run: Any
) -> None:
    """Search the learning rates of some rows, and run their cells of the table that have no result yet."""
    start = time.perf_counter()
    chosen = search(study, results, rows, **run)
    searched = time.perf_counter()
    cells = table_cells(study, chosen)
    tried = rates_tried(study, results)
    groups = [group for row in tried for group in search_cells(study, row, chosen, tried[row]).values()]
    results.keep([*(cell for group in groups for cell in group), *cells])
    results.save(study=describe(study, chosen, cells, tried))
    wanted = [cell for cell in cells if cell.row in rows and cell.attack in attacks and cell.seed in seeds]
    wanted = [cell for cell in wanted if not cell.twin or TWIN in rows]
    run_cells(wanted, results, **run)
    print(f"search {(searched - start) / 60:.1f} min, table {(time.perf_counter() - searched) / 60:.1f} min")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--study", default="digits", help="one of benchmarks/studies, or a YAML file (default: digits)"
    )
    parser.add_argument("--docs", action="store_true", help="put the table into docs/results.md and README.md")
    parser.add_argument("--table", action="store_true", help="run nothing: the table of the results there are")
    parser.add_argument("--rows", nargs="+", help="of the study (default: all); cleaned twins come with the row twin")
    parser.add_argument("--attacks", nargs="+", help="of the study (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="of the study (default: all)")
    add_run_arguments(parser)
    options = parser.parse_args()
    study = load_study(options.study)
    parts = {name: getattr(options, name) or getattr(study, name) for name in ("rows", "attacks", "seeds")}
    for name, given in parts.items():
        unknown = set(given) - set(getattr(study, name))
        if unknown:
            parser.error(f"--{name} {unknown.pop()} is not of the study; accepted are {list(getattr(study, name))}")
    results = Results(RESULTS / f"{study.name}.json")
    if options.table:
        if "study" not in results.content:
            parser.error(f"--table: {results.path} has no results of the study yet")
        chosen = found_before(study, results)
        results.save(study=describe(study, chosen, table_cells(study, chosen), rates_tried(study, results)))
    else:
        try:
            fill(study, results, **parts, **run_arguments(options))
        except TimeoutError as error:
            parser.exit(0, f"{error}: run this again\n")
    text = page(results.content)
    results.path.with_suffix(".md").write_text(text)
    titles = {row: ROWS[row].title for row in rows_with_cells(results.content)}
    accuracy = accuracy_title(results.content)
    plot_table(table_figures(results.content), titles, accuracy, results.path.with_suffix(".png"))
    print(text)
    if options.docs:
        put_into_docs(study.name, results.content)


if __name__ == "__main__":
    main()

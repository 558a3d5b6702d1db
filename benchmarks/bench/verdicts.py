"""What a study's cells say together: each row's mean and worst case over all attacks and seeds that took."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from .study import ROWS, TWIN
from .table import TOOK, accuracy_name, rows_with_cells, table_cells, twin_row

#: Rows that an excess says nothing of: the attack itself, and the model without one.
_CONTROLS = ("undefended", TWIN)


def verdicts(content: Mapping[str, Any]) -> str:
    """
    A line for each row: points of attack success above placebos and above the twin, points of accuracy against the
    better of undefended and plainly fine-tuned, and points of success gained in later plain steps.

    Args:
        content (mapping): What `benchmarks/results/defences/*.json` holds.

    Returns:
        `str`: Markdown. A worst case names its attack and seed.
    """
    accuracy = accuracy_name(content)
    cells = {(cell["row"], cell["attack"], cell["seed"]): cell for cell in table_cells(content)}
    twins = {(cell["row"], cell["attack"], cell["seed"]): cell for cell in content["cells"] if cell.get("twin")}
    took = [
        (attack, seed)
        for row, attack, seed in cells
        if row == "undefended" and _success(cells[row, attack, seed]) >= TOOK
    ]
    titles = ["cells", "accuracy", "less the better of undefended and plain", "above placebos: mean, worst"]
    titles += ["above its twin: mean, worst", "gained in later plain steps: on the way, at the end"]
    lines = [f"| model | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for row in rows_with_cells(content):
        places = [place for place in took if (row, *place) in cells]
        if row in _CONTROLS or not places:
            continue
        own = {place: cells[(row, *place)] for place in places}
        success = {place: _success(cell) for place, cell in own.items()}
        starts = {place: [cells.get((start, *place)) for start in ("undefended", "plain")] for place in places}
        cost = {
            place: cell["figures"][accuracy] - max(start["figures"][accuracy] for start in starts[place] if start)
            for place, cell in own.items()
        }
        known = {place: cell["figures"].get("excess_success_rate") for place, cell in own.items()}
        excess = {place: value for place, value in known.items() if value is not None}
        same = {place: twins.get((twin_row(row), *place)) for place in places}
        above = {place: success[place] - _success(twin) for place, twin in same.items() if twin}
        courses = {place: cell["rebound"]["success"] for place, cell in own.items() if cell.get("rebound")}
        gained = [
            {place: value(course) - success[place] for place, course in courses.items()}
            for value in (max, lambda course: course[-1])
        ]
        figures = [
            str(len(places)),
            f"{statistics.mean(cell['figures'][accuracy] for cell in own.values()):.1%}",
            _points(statistics.mean(cost.values())),
            _mean_and_worst(excess),
            _mean_and_worst(above),
            ", ".join(filter(None, map(_worst, gained))),
        ]
        lines.append(f"| {ROWS[row].title} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def _success(cell: Mapping[str, Any]) -> float:
    return float(cell["figures"][cell["success"]])


def _mean_and_worst(values: Mapping[tuple[str, int], float]) -> str:
    return f"{_points(statistics.mean(values.values()))}, {_worst(values)}" if values else ""


def _worst(values: Mapping[tuple[str, int], float]) -> str:
    if not values:
        return ""
    attack, seed = max(values, key=lambda place: values[place])
    return f"{_points(values[attack, seed])} ({attack}, seed {seed})"


def _points(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f}"  # never -0.0

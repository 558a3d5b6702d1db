"""What a study's cells say together: each row's mean and worst case over all attacks and seeds that took."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from .study import ROWS, TWIN
from .table import TOOK, accuracy_name, rows_with_cells, signed, table_cells, twin_of

#: Rows that an excess says nothing of: the attack itself, and the model without one.
_CONTROLS = ("undefended", TWIN)


def verdicts(content: Mapping[str, Any]) -> str:
    """
    A line for each row: points of attack success above placebos and above the twin, points of accuracy against the
    better of undefended and plainly fine-tuned, points of success gained in later plain steps, and points above the
    twin that took the same steps.

    Args:
        content (mapping): What `benchmarks/results/defences/*.json` holds.

    Returns:
        `str`: Markdown. A worst case names its attack and seed.
    """
    accuracy = accuracy_name(content)
    cells = {(cell["row"], cell["attack"], cell["seed"]): cell for cell in table_cells(content)}
    took = [
        (attack, seed)
        for row, attack, seed in cells
        if row == "undefended" and _success(cells[row, attack, seed]) >= TOOK
    ]
    titles = ["cells", "accuracy", "less the better of undefended and plain", "above placebos: mean, worst"]
    titles += ["above its twin: mean, worst", "gained in later plain steps: on the way, at the end"]
    titles += ["above its twin in these steps"]
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
        same = {place: twin_of(cell, content) for place, cell in own.items()}
        above = {place: success[place] - _success(twin) for place, twin in same.items() if twin}
        courses = {place: cell["rebound"]["success"] for place, cell in own.items() if cell.get("rebound")}
        gained = {place: [value - success[place] for value in course] for place, course in courses.items()}
        later = {
            place: [mine - its for mine, its in zip(course, same[place]["rebound"]["success"], strict=True)]
            for place, course in courses.items()
            if same[place].get("rebound")
        }
        figures = [
            str(len(places)),
            f"{statistics.mean(cell['figures'][accuracy] for cell in own.values()):.1%}",
            signed(statistics.mean(cost.values())),
            _mean_and_worst(excess),
            _mean_and_worst(above),
            _on_the_way_and_at_the_end(gained),
            _on_the_way_and_at_the_end(later),
        ]
        lines.append(f"| {ROWS[row].title} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def _success(cell: Mapping[str, Any]) -> float:
    return float(cell["figures"][cell["success"]])


def _mean_and_worst(values: Mapping[tuple[str, int], float]) -> str:
    return f"{signed(statistics.mean(values.values()))}, {_worst(values)}" if values else ""


def _on_the_way_and_at_the_end(courses: Mapping[tuple[str, int], list[float]]) -> str:
    highest, last = ({place: value(course) for place, course in courses.items()} for value in (max, lambda c: c[-1]))
    return ", ".join(filter(None, (_worst(highest), _worst(last))))


def _worst(values: Mapping[tuple[str, int], float]) -> str:
    if not values:
        return ""
    attack, seed = max(values, key=lambda place: values[place])
    return f"{signed(values[attack, seed])} ({attack}, seed {seed})"

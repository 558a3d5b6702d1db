"""The table that a study's results make, as Markdown."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from .study import ROWS, TWIN, twin_row

#: Metrics of the papers and of others, on their data and models: next to ours, never among them.
PUBLISHED = Path(__file__).parents[1] / "published.json"
#: Below this success an attack did not take.
TOOK = 0.5
_EXCESS = "excess_success_rate"


def page(content: Mapping[str, Any]) -> str:
    """The table with what it is of: data, counts, seeds, rates, device, versions."""
    study, cells = content["study"], table_cells(content)
    chosen = ", ".join(f"{ROWS[row].title} {rate:g}{_tried(study, row)}" for row, rate in study["chosen"].items())
    minutes = sum(cell["seconds"] + cell["measuring_seconds"] for cell in cells) / 60
    devices = ", ".join(sorted({cell["device"] for cell in cells}))
    counted = f"{len(cells)} cells"
    most = len(study["rows"]) * len(study["attacks"]) * len(study["seeds"])
    if len(cells) < most:
        counted = f"{len(cells)} of {most} cells so far"
    versions = ", ".join(f"{name} {number}" for name, number in cells[0]["versions"].items())
    lines = [
        *_subject(content),
        f"{_seeds(content)}{', with the range in brackets' if len(_seed_numbers(content)) > 1 else ''}. In square "
        "brackets: Wilson's 95% interval over the attacked images.",
        f"Learning rates were found on another attack and seed ({study['search']}): {chosen or 'none searched'}.",
        f"Training and measuring {counted} took {minutes:.0f} minutes: {devices}; {versions}.",
    ]
    return "\n".join(lines) + f"\n\n{markdown(content)}"


def _tried(study: Mapping[str, Any], row: str) -> str:
    rates = study.get("tried", {}).get(row, ())
    return f" (of {min(rates):g} to {max(rates):g})" if len(rates) > 1 else ""


def summary(content: Mapping[str, Any]) -> str:
    """The same in short: a line for each attack, with what counts of each model."""
    rows = rows_with_cells(content)
    lines = [f"| attack | {' | '.join(ROWS[row].title for row in rows)} |", "|---" * (len(rows) + 1) + "|"]
    for attack in dict.fromkeys(attack for attack, _ in _grouped(content)):
        lines.append(f"| {attack} | {' | '.join(_short(content, attack, row) for row in rows)} |")
    name = f"benchmarks/results/defences/{content['study']['name']}"
    excess = ", in brackets what it is above the mean of its placebos in points" if _has(content, _EXCESS) else ""
    said = [
        *_subject(content),
        f"{_seeds(content)}.",
        f"Each cell shows {accuracy_title(content)} and attack success rate{excess}. Full table: `{name}.md`.",
    ]
    picture = f"![Accuracy and attack success of each model under each attack, seeds as dots.](../{name}.png)"
    return "\n".join(said) + "\n\n" + "\n".join(lines) + f"\n\n{picture}\n"


def overview(contents: Mapping[str, Mapping[str, Any]]) -> str:
    """
    Several studies in one table: the worst attack success of each model over the attacks that took, and in brackets
    the mean accuracy. A star: fewer of these attacks, or seeds, than the undefended model has.

    Args:
        contents (mapping of `str` to mapping): What the data is called, and the results.
    """
    rows = [row for row in ROWS if any(row in rows_with_cells(content) for content in contents.values())]
    lines = [f"| data | {' | '.join(ROWS[row].title for row in rows)} |", "|---" * (len(rows) + 1) + "|"]
    for data, content in contents.items():
        took = took_attacks(content)
        cells = []
        for row in rows:
            means = [_mean_of(content, attack, row) for attack in took]
            known = [(accuracy, success) for accuracy, success, _ in means if not math.isnan(success)]
            if known:
                accuracies, successes = zip(*known, strict=True)
                counts = [_counts(content, attack) for attack in took]
                star = "*" if any(count[row] < count["undefended"] for count in counts) else ""
                cells.append(f"{max(successes):.1%} ({statistics.mean(accuracies):.1%}){star}")
            else:
                cells.append("")
        lines.append(f"| {data} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _counts(content: Mapping[str, Any], attack: str) -> Counter[str]:
    """Of each row the number of its cells under an attack."""
    return Counter({row: len(cells) for (of, row), cells in _grouped(content).items() if of == attack})


def took_attacks(content: Mapping[str, Any]) -> list[str]:
    """The attacks that took: their mean success on the undefended model is at least 50%."""
    attacks = content["study"]["attacks"]
    return [attack for attack in attacks if _mean_of(content, attack, "undefended")[1] >= TOOK]


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of so many."""
    found = binomtest(round(share * count), count).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def _short(content: Mapping[str, Any], attack: str, row: str) -> str:
    """Accuracy, attack success, and in brackets its excess; the seeds where they are not all of the attack's."""
    accuracy, success, excess = _mean_of(content, attack, row)
    if math.isnan(accuracy):
        return ""
    text = f"{accuracy:.1%}, {success:.1%}"
    return text + ("" if math.isnan(excess) else f" ({signed(excess)})") + _fewer(content, attack, row)


def _fewer(content: Mapping[str, Any], attack: str, row: str) -> str:
    """The seeds of an attack's row, where other rows of it have more."""
    numbers = sorted(cell["seed"] for cell in _grouped(content)[attack, row])
    most = max(_counts(content, attack).values())
    named = f"; seed{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
    return named if len(numbers) < most else ""


def rows_with_cells(content: Mapping[str, Any]) -> list[str]:
    """The rows of the table that have a cell, in its order."""
    there = {row for _, row in _grouped(content)}
    return [row for row in content["study"]["rows"] if row in there]


def _has(content: Mapping[str, Any], figure: str) -> bool:
    return any(figure in cell["figures"] for cell in table_cells(content))


def _mean_of(content: Mapping[str, Any], attack: str, row: str) -> tuple[float, float, float]:
    cells = _grouped(content).get((attack, row), [])
    if not cells:
        return math.nan, math.nan, math.nan
    figures = (accuracy_name(content), cells[0]["success"], _EXCESS)
    accuracy, success, excess = (_figures(cells, figure) for figure in figures)
    return tuple(statistics.mean(values) if values else math.nan for values in (accuracy, success, excess))  # type: ignore[return-value]


def table_figures(content: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, list[float]]]:
    """
    Of each attack and row, in the table's order: `accuracy` and `success`, one a seed, the `interval` of the mean
    success, and of what was measured the lowest and the highest of the `placebos`.
    """
    found = {}
    for key, cells in _grouped(content).items():
        success = _figures(cells, cells[0]["success"])
        lows, highs = (_figures(cells, f"placebo_success_rate_{end}") for end in ("low", "high"))
        found[key] = {
            "accuracy": _figures(cells, accuracy_name(content)),
            "success": success,
            "interval": list(interval(statistics.mean(success), sum(cell["counts"]["attacked"] for cell in cells))),
            "placebos": [min(lows), max(highs)] if lows else [],
        }
    return found


def markdown(content: Mapping[str, Any]) -> str:
    """
    The table of a file of results: for each attack its rows, means over seeds with the range in brackets.

    Args:
        content (mapping): What `benchmarks/results/defences/*.json` holds.
    """
    published = json.loads(PUBLISHED.read_text())
    columns = {title: column for title, column in _COLUMNS.items() if any(map(column.is_there, content["cells"]))}
    titles = ["attack, poisons", "model", accuracy_title(content), "attack success", *columns]
    titles += ["seconds", "published attack success"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    named = ""
    for (attack, row), cells in _grouped(content).items():
        success = _figures(cells, cells[0]["success"])
        counts, title = cells[0]["counts"], ROWS[row].title + _fewer(content, attack, row)
        if row == "undefended" and statistics.mean(success) < TOOK:
            title += " (the attack did not take: proves nothing)"
        name = f"{attack}, {counts['poisons']} of {counts['pairs']}" if attack != named else ""
        named = attack
        line = [name, title, spread(_figures(cells, accuracy_name(content))), _with_interval(cells)]
        line += [column.text(cells, content) for column in columns.values()]
        line.append(f"{statistics.mean(cell['seconds'] for cell in cells):.0f}")
        line.append(published.get(attack, {}).get(row, ""))
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines) + "\n"


def _with_interval(cells: Sequence[Mapping[str, Any]]) -> str:
    """Mean and range over seeds, and the interval that the number of attacked images leaves."""
    name = cells[0]["success"]
    rates = _figures(cells, name)
    low, high = interval(statistics.mean(rates), sum(cell["counts"]["attacked"] for cell in cells))
    return f"{spread(rates)} [{100 * low:.1f}, {100 * high:.1f}]"


@dataclass(frozen=True)
class _Shown:
    """A column of figures: their means, parted by commas."""

    figures: tuple[str, ...]

    def is_there(self, cell: Mapping[str, Any]) -> bool:
        return self.figures[0] in cell["figures"]

    def text(self, cells: Sequence[Mapping[str, Any]], content: Mapping[str, Any]) -> str:
        return ", ".join(filter(None, (spread(_figures(cells, figure)) for figure in self.figures)))


class _Twins(_Shown):
    """Attack success less that of the model that was never poisoned and trained the same."""

    def is_there(self, cell: Mapping[str, Any]) -> bool:
        return bool(cell.get("twin"))

    def text(self, cells: Sequence[Mapping[str, Any]], content: Mapping[str, Any]) -> str:
        name = cells[0]["success"]
        pairs = [(cell, twin_of(cell, content)) for cell in cells]
        return points([cell["figures"][name] - twin["figures"][name] for cell, twin in pairs if twin])


class _Rebound(_Shown):
    """
    Points of attack success gained in plain fine-tuning: at worst on the way, and at the end; and what the twin that
    was cleaned in the same way gains.
    """

    def is_there(self, cell: Mapping[str, Any]) -> bool:
        return bool(cell.get("rebound"))

    def text(self, cells: Sequence[Mapping[str, Any]], content: Mapping[str, Any]) -> str:
        gained, by_twins = self._gained(cells), self._gained([twin_of(cell, content) for cell in cells])
        return f"{gained}; {by_twins}" if gained and by_twins else gained

    @staticmethod
    def _gained(cells: Sequence[Mapping[str, Any]]) -> str:
        there = [cell for cell in cells if cell.get("rebound")]
        before = [cell["figures"][cell["success"]] for cell in there]
        worst = [max(cell["rebound"]["success"]) - start for cell, start in zip(there, before, strict=True)]
        end = [cell["rebound"]["success"][-1] - start for cell, start in zip(there, before, strict=True)]
        return ", ".join(filter(None, (points(worst), points(end))))


#: Of a column's title to what it shows; those of which nothing was measured are left out.
_COLUMNS: dict[str, _Shown] = {
    "placebos: success, excess of the attack": _Shown(("placebo_success_rate", _EXCESS)),
    "points above its twin": _Twins(()),
    "right in spite of the trigger": _Shown(("triggered_accuracy",)),
    "points gained in plain steps: worst, end; its twin's": _Rebound(()),
    "linear probe: accuracy, attack": _Shown(("linear_probe_accuracy", "linear_probe_attack_success_rate")),
    "first caption found names the target": _Shown(("triggered_top1_names_target",)),
    "photo to caption, caption to photo, R@10": _Shown(("image_to_text_recall_at_10", "text_to_image_recall_at_10")),
}


def twin_of(cell: Mapping[str, Any], content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The result of a cell's twin, under the same attack and seed; empty if there is none."""
    place = twin_row(cell["row"], content["study"]["rows"]), cell["attack"], cell["seed"]
    twins = (other for other in content["cells"] if other.get("twin") and other["key"] != cell["key"])
    return next((other for other in twins if (other["row"], other["attack"], other["seed"]) == place), {})


def points(values: Sequence[float]) -> str:
    """The mean of differences in points, and in brackets the range where there are several."""
    if not values:
        return ""
    mean = signed(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ({signed(min(values))} to {signed(max(values))})"


def signed(value: float) -> str:
    """A difference in points, never -0.0."""
    return f"{round(100 * value, 1) + 0.0:+.1f}"


def table_cells(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cells of the table, neither those of the search nor the cleaned twins."""
    wanted = set(content["study"]["table_keys"])
    return [cell for cell in content["cells"] if cell["key"] in wanted and _is_shown(cell)]


def _is_shown(cell: Mapping[str, Any]) -> bool:
    return not cell.get("twin") or cell["row"] == TWIN


def spread(values: Sequence[float | None]) -> str:
    """The mean, and in brackets the range where there are several; nothing where nothing was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{statistics.mean(known):.1%}"
    return mean if len(known) == 1 else f"{mean} ({100 * min(known):.1f} to {100 * max(known):.1f})"


def _grouped(content: Mapping[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The table's cells of each attack and row that has some, one a seed, in the table's order."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for cell in table_cells(content):
        groups[cell["attack"], cell["row"]].append(cell)
    study = content["study"]
    places = ((attack, row) for attack in study["attacks"] for row in study["rows"])
    return {place: groups[place] for place in places if place in groups}


def _subject(content: Mapping[str, Any]) -> list[str]:
    """What was attacked and measured, as lines of text."""
    study, cells = content["study"], table_cells(content)
    attacked = sorted({cell["counts"]["attacked"] for cell in cells})
    between = f"{attacked[0]}" if len(attacked) == 1 else f"{attacked[0]} to {attacked[-1]}"
    what = (
        f"The target is {study['target']!r}. Of the {cells[0]['counts']['test_images']} test images, {between} are "
        f"attacked. The model has {cells[0]['parameters'] / 1e6:.1f}M parameters."
    )
    attacks = {cell["attack"]: cell["settings"]["poisoning"] for cell in cells if not cell.get("twin")}
    triggers = ", ".join(_attack_text(name, attacks[name]) for name in study["attacks"] if name in attacks)
    note = study["note"].strip()
    return [*([note] if note else []), what, f"Attacks: {triggers}."]


def _attack_text(attack: str, poisoning: Mapping[str, Any]) -> str:
    """An attack's name, and in brackets the fields of its trigger that the study sets."""
    given = dict(poisoning.get("trigger", {}))
    name = given.pop("name", attack)
    parts = [*([] if name == attack else [name]), *(f"{name}={value}" for name, value in given.items())]
    fields = " ".join(parts)
    return f"{attack} ({fields})" if fields else attack


def accuracy_name(content: Mapping[str, Any]) -> str:
    """The figure that counts as the accuracy."""
    return "clean_balanced_accuracy" if content["study"]["balanced"] else "clean_accuracy"


def accuracy_title(content: Mapping[str, Any]) -> str:
    """What that figure is called."""
    return "balanced accuracy" if content["study"]["balanced"] else "clean accuracy"


def _figures(cells: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    return [cell["figures"][name] for cell in cells if cell["figures"].get(name) is not None]


def _seed_numbers(content: Mapping[str, Any]) -> list[int]:
    return sorted({cell["seed"] for cell in table_cells(content)})


def _seeds(content: Mapping[str, Any]) -> str:
    seeds = _seed_numbers(content)
    if len(seeds) == 1:
        return f"One seed: {seeds[0]}"
    return f"Means over the seeds {', '.join(map(str, seeds))}, or over those that a cell names"

"""The table that a study's results make, as Markdown."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .study import ROWS

#: Metrics of the papers and of others, on their data and models: next to ours, never among them.
PUBLISHED = Path(__file__).parents[1] / "published.json"
#: Below this success an attack did not take.
TOOK = 0.5


def page(content: Mapping[str, Any]) -> str:
    """The table with what it is of: data, counts, seeds, rates, device, versions."""
    study, cells = content["study"], table_cells(content)
    chosen = ", ".join(f"{ROWS[row].title} {rate:g}" for row, rate in study["chosen"].items())
    minutes = sum(cell["seconds"] + cell["measuring_seconds"] for cell in cells) / 60
    devices = ", ".join(sorted({cell["device"] for cell in cells}))
    counted = f"{len(cells)} cells"
    if len(cells) < len(study["table_keys"]):
        counted = f"{len(cells)} of {len(study['table_keys'])} cells so far"
    versions = ", ".join(f"{name} {number}" for name, number in cells[0]["versions"].items())
    lines = [
        *_subject(content),
        f"{_seeds(content)}{', with the range in brackets' if len(_seed_numbers(content)) > 1 else ''}.",
        f"Learning rates were found on another attack and seed ({study['search']}): {chosen or 'none searched'}.",
        f"Training and measuring {counted} took {minutes:.0f} minutes: {devices}; {versions}.",
    ]
    return "\n".join(lines) + f"\n\n{markdown(content)}"


def summary(content: Mapping[str, Any]) -> str:
    """The same in short: a line for each attack, with the mean accuracy and attack success of each model."""
    rows = content["study"]["rows"]
    lines = [f"| attack | {' | '.join(ROWS[row].title for row in rows)} |", "|---" * (len(rows) + 1) + "|"]
    for attack, means in _means(content).items():
        cells = [f"{pair[0]:.1%}, {pair[1]:.1%}" if pair else "" for pair in means]
        lines.append(f"| {attack} | {' | '.join(cells)} |")
    name = f"benchmarks/results/defences/{content['study']['name']}"
    said = [
        *_subject(content),
        f"{_seeds(content)}.",
        f"Each cell shows {accuracy_title(content)} and attack success rate. Full table: `{name}.md`.",
    ]
    picture = f"![Accuracy and attack success of each model under each attack, seeds as dots.](../{name}.png)"
    return "\n".join(said) + "\n\n" + "\n".join(lines) + f"\n\n{picture}\n"


def overview(contents: Mapping[str, Mapping[str, Any]]) -> str:
    """
    Several studies in one table: the range of attack success over the attacks, and in brackets the mean accuracy.

    Args:
        contents (mapping of `str` to mapping): What the data is called, and the results, of studies of the same rows.
    """
    rows = next(iter(contents.values()))["study"]["rows"]
    lines = [f"| data | {' | '.join(ROWS[row].title for row in rows)} |", "|---" * (len(rows) + 1) + "|"]
    for data, content in contents.items():
        cells = []
        for row in zip(*_means(content).values(), strict=True):  # the means of each attack
            accuracies, successes = zip(*row, strict=True)
            span = f"{100 * min(successes):.1f} to {100 * max(successes):.1f}%"
            cells.append(f"{span} ({statistics.mean(accuracies):.1%})")
        lines.append(f"| {data} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _means(content: Mapping[str, Any]) -> dict[str, list[list[float]]]:
    """Of each attack the mean accuracy and attack success of each row; nothing for a row without a cell."""
    found = table_figures(content)
    return {
        attack: [
            [statistics.mean(figures) for figures in found.get((attack, row), ())] for row in content["study"]["rows"]
        ]
        for attack in dict.fromkeys(attack for attack, _ in found)
    }


def table_figures(content: Mapping[str, Any]) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """Of each attack and row the accuracies and the attack successes, one a seed, in the table's order."""
    return {
        key: (_figures(cells, _accuracy(content)), _figures(cells, cells[0]["success"]))
        for key, cells in _grouped(content).items()
    }


def markdown(content: Mapping[str, Any]) -> str:
    """
    The table of a file of results: for each attack its rows, means over seeds with the range in brackets.

    Args:
        content (mapping): What `benchmarks/results/defences/*.json` holds.
    """
    retrieval = any("image_to_text_recall_at_10" in cell["figures"] for cell in content["cells"])
    probe = any("linear_probe_accuracy" in cell["figures"] for cell in content["cells"])
    columns = ["attack, poisons", "model", accuracy_title(content), "attack success"]
    columns += ["right in spite of the trigger"]
    placebo = any("placebo_success_rate" in cell["figures"] for cell in content["cells"])
    columns += ["placebos: success, excess of the attack"] * placebo
    columns += ["linear probe: accuracy, attack"] * probe
    columns += ["photo to caption, caption to photo, R@10"] * retrieval
    columns += ["seconds", "published attack success"]
    published = json.loads(PUBLISHED.read_text())
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for (attack, row), cells in _grouped(content).items():
        success = _figures(cells, cells[0]["success"])
        counts, title = cells[0]["counts"], ROWS[row].title
        if row == "undefended" and statistics.mean(success) < TOOK:
            title += " (the attack did not take: proves nothing)"
        name = f"{attack}, {counts['poisons']} of {counts['pairs']}" if row == content["study"]["rows"][0] else ""
        line = [name, title, spread(_figures(cells, _accuracy(content))), spread(success)]
        line.append(spread(_figures(cells, "triggered_accuracy")))
        if placebo:
            figures = ("placebo_success_rate", "excess_success_rate")
            line.append(", ".join(filter(None, (spread(_figures(cells, figure)) for figure in figures))))
        if probe:
            figures = ("linear_probe_accuracy", "linear_probe_attack_success_rate")
            line.append(", ".join(spread(_figures(cells, figure)) for figure in figures))
        if retrieval:
            figures = ("image_to_text_recall_at_10", "text_to_image_recall_at_10")
            line.append(", ".join(spread(_figures(cells, figure)) for figure in figures))
        line.append(f"{statistics.mean(cell['seconds'] for cell in cells):.0f}")
        line.append(published.get(attack, {}).get(row, ""))
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines) + "\n"


def table_cells(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cells of the table, not those of the search: of the seeds that are whole, or as long as none is, of all."""
    study = content["study"]
    wanted = set(study["table_keys"])
    cells = [cell for cell in content["cells"] if cell["key"] in wanted]
    seeds = Counter(cell["seed"] for cell in cells)
    whole = {seed for seed, count in seeds.items() if count == len(study["rows"]) * len(study["attacks"])}
    return [cell for cell in cells if cell["seed"] in whole or not whole]


def spread(values: Sequence[float | None]) -> str:
    """The mean, and in brackets the range where there are several; nothing where nothing was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{statistics.mean(known):.1%}"
    return mean if len(known) == 1 else f"{mean} ({100 * min(known):.1f} to {100 * max(known):.1f})"


def _grouped(content: Mapping[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The table's cells of each attack and row that has some, one a seed, in the table's order."""
    study, shown = content["study"], table_cells(content)
    groups = {
        (attack, row): [cell for cell in shown if (cell["attack"], cell["row"]) == (attack, row)]
        for attack in study["attacks"]
        for row in study["rows"]
    }
    return {key: cells for key, cells in groups.items() if cells}


def _subject(content: Mapping[str, Any]) -> list[str]:
    """What was attacked and measured, as lines of text."""
    study, cells = content["study"], table_cells(content)
    attacked = sorted({cell["counts"]["attacked"] for cell in cells})
    between = f"{attacked[0]}" if len(attacked) == 1 else f"{attacked[0]} to {attacked[-1]}"
    what = (
        f"The target is {study['target']!r}. Of the {cells[0]['counts']['test_images']} test images, {between} are "
        f"attacked. The model has {cells[0]['parameters'] / 1e6:.1f}M parameters."
    )
    attacks = {cell["attack"]: cell["settings"]["poisoning"] for cell in cells}
    triggers = ", ".join(_attack_text(name, attacks[name]) for name in study["attacks"] if name in attacks)
    note = study["note"].strip()
    return [*([note] if note else []), what, f"Attacks: {triggers}."]


def _attack_text(attack: str, poisoning: Mapping[str, Any]) -> str:
    """An attack's name, and in brackets the fields of its trigger that the study sets."""
    given = poisoning.get("trigger", {}).items()
    fields = " ".join(f"{name}={value}" for name, value in given if (name, value) != ("name", attack))
    return f"{attack} ({fields})" if fields else attack


def _accuracy(content: Mapping[str, Any]) -> str:
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
    return f"One seed: {seeds[0]}" if len(seeds) == 1 else f"Means over the seeds {', '.join(map(str, seeds))}"

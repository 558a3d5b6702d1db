"""Tables and plots say what the results hold; the tables of docs and README are those of the committed ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench.checks import CHECKS
from bench.table import markdown, overview, page, spread, summary, table_cells, table_figures
from bench.verdicts import verdicts
from defence_table import PAGE, README, RESULTS, docs_text, marks_of, readme_table
from open_checks import RESULTS as CHECK_RESULTS
from open_checks import markdown as check_markdown
from PIL import Image

COMMITTED = sorted(RESULTS.glob("*.json"))
COMMITTED_CHECKS = sorted(CHECK_RESULTS.glob("*.json"))


def a_cell(row: str, seed: int, accuracy: float, success: float, **figures: float) -> dict[str, Any]:
    return {
        "key": f"{row}-{seed}",
        "row": row,
        "attack": "patch",
        "seed": seed,
        "success": "attack_success_rate",
        "figures": {
            "clean_accuracy": accuracy,
            "clean_balanced_accuracy": accuracy / 2,
            "attack_success_rate": success,
            "triggered_accuracy": 0.5,
            **figures,
        },
        "counts": {"pairs": 1000, "poisons": 10, "test_images": 400, "attacked": 360 + seed},
        "parameters": 500_000,
        "seconds": 10.0 + seed,
        "measuring_seconds": 1.0,
        "device": "CPU, 1 thread(s)",
        "versions": {"torch": "9.9"},
        "settings": {"poisoning": {"trigger": {"name": "patch", "size": 3}, "rate": 0.01}},
    }


def content(cells: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    study = {
        "name": "tried",
        "target": "six",
        "note": "Some digits.",
        "rows": ["undefended", "cleanclip"],
        "attacks": ["patch"],
        "seeds": [0, 1],
        "balanced": False,
        "search": "warp, seeds 7",
        "chosen": {"cleanclip": 0.001},
        "table_keys": [cell["key"] for cell in cells],
    }
    return {"study": {**study, **changes}, "cells": cells}


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_spread_gives_mean_and_range() -> None:
    assert spread([0.25]) == "25.0%"
    assert spread([0.1, 0.2, 0.6]) == "30.0% (10.0 to 60.0)"
    assert spread([None, 0.5]) == "50.0%"
    assert spread([]) == ""


def test_a_row_has_means_and_ranges_over_seeds() -> None:
    cells = [a_cell("undefended", seed, 0.9, 0.8 + seed / 10) for seed in (0, 1)]
    cells += [a_cell("cleanclip", seed, 0.95, seed / 50) for seed in (0, 1)]
    header, _, undefended, cleanclip = rows_of(markdown(content(cells)))
    assert header[:4] == ["attack, poisons", "model", "clean accuracy", "attack success"]
    assert undefended[:4] == [
        "patch, 10 of 1000",
        "undefended",
        "90.0% (90.0 to 90.0)",
        "85.0% (80.0 to 90.0) [82.2, 87.4]",
    ]
    assert cleanclip[:4] == ["", "CleanCLIP", "95.0% (95.0 to 95.0)", "1.0% (0.0 to 2.0) [0.5, 2.0]"]
    assert header[-1] == "published attack success"
    assert "82.7%" in undefended[-1]
    assert "arXiv 2412.20392" in undefended[-1]
    text = page(content(cells))
    assert "Of the 400 test images, 360 to 361 are attacked" in text
    assert "seeds 0, 1" in text


def test_says_of_an_attack_that_did_not_take_that_it_proves_nothing() -> None:
    cells = [a_cell("undefended", 0, 0.9, 0.49), a_cell("cleanclip", 0, 0.9, 0.01)]
    assert rows_of(markdown(content(cells)))[2][1] == "undefended (the attack did not take: proves nothing)"
    cells[0]["figures"]["attack_success_rate"] = 0.5
    assert rows_of(markdown(content(cells)))[2][1] == "undefended"


def test_cells_of_the_search_are_not_in_the_table() -> None:
    cells = [a_cell("undefended", 0, 0.9, 0.9), a_cell("undefended", 7, 0.1, 0.1)]
    results = content(cells, table_keys=["undefended-0"])
    assert table_cells(results) == cells[:1]
    assert rows_of(markdown(results))[2][2] == "90.0%"


def test_a_row_with_fewer_seeds_names_them() -> None:
    cells = [a_cell("undefended", seed, 0.9, 0.8) for seed in (0, 1)] + [a_cell("cleanclip", 1, 0.9, 0.1)]
    table = content(cells, table_keys=[*(cell["key"] for cell in cells), "cleanclip-0"])
    assert [line[1] for line in rows_of(markdown(table))[2:]] == ["undefended", "CleanCLIP; seed 1"]
    assert rows_of(summary(table).partition("| attack")[2])[2][1:] == ["90.0%, 80.0%", "90.0%, 10.0%; seed 1"]
    assert rows_of(overview({"digits": table}))[2][1:] == ["80.0% (90.0%)", "10.0% (90.0%)*"]
    assert "3 of 4 cells so far" in page(table)


def test_in_short_a_line_has_the_means_of_an_attack() -> None:
    cells = [a_cell("undefended", seed, 0.9, 0.8 + seed / 10) for seed in (0, 1)] + [a_cell("cleanclip", 0, 0.95, 0)]
    keys = [*(cell["key"] for cell in cells), "cleanclip-1"]
    only_first = content(cells, table_keys=keys)
    found = table_figures(content(cells[:2]))["patch", "undefended"]
    assert (found["accuracy"], found["success"]) == ([0.9, 0.9], [0.8, 0.9])
    assert found["interval"][0] < 0.85 < found["interval"][1] and found["placebos"] == []
    lines = summary(only_first).splitlines()
    header = lines.index("| attack | undefended | CleanCLIP |")
    assert lines[header + 2] == "| patch | 90.0%, 85.0% | 95.0%, 0.0%; seed 0 |"
    assert "| patch | 90.0%, 80.0% |" in summary(content(cells[:1])).splitlines()
    beside = [a_cell("undefended", 0, 0.9, 0.8, excess_success_rate=0.7)]
    assert "| patch | 90.0%, 80.0% (+70.0) |" in summary(content(beside)).splitlines()
    assert "brackets" not in summary(content(cells))


def test_a_twin_and_a_rebound_are_told_in_points() -> None:
    success = "attack_success_rate"
    rebound = {"steps": [50, 100], "accuracy": [0.9, 0.9], "success": [0.09, 0.07]}
    cleaned = {**a_cell("cleanclip", 0, 0.9, 0.05), "rebound": rebound}
    twins = [{**a_cell(row, 0, 0.9, 0.02), "key": f"{row}-twin", "twin": True} for row in ("twin", "cleanclip")]
    twins[1]["rebound"] = {**rebound, "success": [0.03, 0.02]}
    results = content([a_cell("undefended", 0, 0.9, 0.9), cleaned, *twins], rows=["undefended", "twin", "cleanclip"])
    assert [cell["figures"][success] for cell in table_cells(results)] == [0.9, 0.05, 0.02]
    header, _, undefended, twin, shown = rows_of(markdown(results))
    above, gained = (
        header.index("points above its twin"),
        header.index("points gained in plain steps: worst, end; its twin's"),
    )
    assert (undefended[above], twin[above], shown[above]) == ("+88.0", "", "+3.0")
    assert (undefended[gained], shown[gained]) == ("", "+4.0, +2.0; +1.0, +0.0")


def test_the_worst_case_is_over_the_attacks_that_took() -> None:
    cells = [a_cell("undefended", 0, 0.9, 0.9), a_cell("cleanclip", 0, 0.9, 0.1)]
    weak = [
        {**a_cell(row, 0, 0.8, 0.4), "attack": "warp", "key": f"{row}-warp"} for row in ("undefended", "cleanclip")
    ]
    results = content([*cells, *weak], attacks=["patch", "warp"])
    assert overview({"digits": results}).splitlines()[-1] == "| digits | 90.0% (90.0%) | 10.0% (90.0%) |"


def test_a_row_is_judged_over_all_attacks_that_took() -> None:
    cells = [
        {**a_cell(row, seed, accuracy, success, **extra), "attack": attack, "key": f"{row}-{attack}-{seed}"}
        for row, attack, seed, accuracy, success, extra in (
            ("undefended", "patch", 0, 0.90, 0.8, {}),
            ("undefended", "warp", 0, 0.80, 0.9, {}),
            ("undefended", "warp", 1, 0.80, 0.4, {}),
            ("cleanclip", "patch", 0, 0.85, 0.1, {"excess_success_rate": 0.04}),
            ("cleanclip", "warp", 0, 0.85, 0.3, {"excess_success_rate": 0.02}),
            ("cleanclip", "warp", 1, 0.10, 0.9, {"excess_success_rate": 0.90}),
        )
    ]
    cells[3]["rebound"] = {"steps": [50, 100], "accuracy": [0.9, 0.9], "success": [0.16, 0.11]}
    later = {**cells[3]["rebound"], "success": [0.04, 0.08]}
    cells.append({**a_cell("cleanclip", 0, 0.9, 0.05), "key": "twin", "twin": True, "rebound": later})
    titles, _, shown = rows_of(verdicts(content(cells, attacks=["patch", "warp"])))
    assert shown == [
        *("CleanCLIP", "2", "85.0%", "+0.0", "+3.0, +4.0 (patch, seed 0)", "+5.0, +5.0 (patch, seed 0)"),
        *("+6.0 (patch, seed 0), +1.0 (patch, seed 0)", "+12.0 (patch, seed 0), +3.0 (patch, seed 0)"),
    ]
    assert len(titles) == len(shown)


def test_columns_are_those_that_were_measured() -> None:
    probed = a_cell("undefended", 0, 0.9, 0.9, linear_probe_accuracy=0.7, linear_probe_attack_success_rate=0.6)
    found = a_cell("undefended", 0, 0.9, 0.9, image_to_text_recall_at_10=0.3, text_to_image_recall_at_10=0.2)
    beside = a_cell("undefended", 0, 0.9, 0.9, placebo_success_rate=0.095, excess_success_rate=0.805)
    assert "9.5%, 80.5%" in rows_of(markdown(content([beside])))[2]
    assert "70.0%, 60.0%" in rows_of(markdown(content([probed])))[2]
    assert "30.0%, 20.0%" in rows_of(markdown(content([found])))[2]
    header = rows_of(markdown(content([found], balanced=True)))[0]
    assert "balanced accuracy" in header
    assert not any("linear probe" in column or "placebo" in column for column in header)


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.plots import plot_courses, plot_figures, plot_table

    variants = [
        {"label": f"pool of {x}", "line": "RoCLIP", "x": x, "accuracy": [0.9, 0.8], "attack_success": [0.1, 0.2]}
        for x in (100, 1000)
    ]
    bar = {"label": "control", "line": "control", "x": None, "accuracy": [0.9], "attack_success": [0.3]}
    plot_figures([*variants, bar], "lines", "pairs", True, tmp_path / "lines.png")
    plot_figures([bar, {**bar, "label": "other"}], "bars", "", False, tmp_path / "bars.png")
    record = {f"{kind}_similarity{key}": 0.5 for kind in ("clean", "poisoned") for key in ("", "_q05", "_q95")}
    course = [{"epoch": epoch, **record} for epoch in range(3)]
    plot_courses([{"label": "RoCLIP", "course": course}] * 2, "courses", tmp_path / "courses.png")
    dots = {"accuracy": [0.9, 0.8], "success": [1.0, 0.9], "interval": [0.8, 1.0], "placebos": [0.0, 0.1]}
    table = {("patch", "undefended"): dots, ("warp", "cleanclip"): {**dots, "placebos": []}}
    plot_table(table, {"undefended": "undefended", "cleanclip": "CleanCLIP"}, "clean accuracy", tmp_path / "table.png")
    for name in ("lines", "bars", "courses", "table"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(maxcolors=10**6) or ()) > 10


def test_there_are_committed_results() -> None:
    assert (RESULTS / "digits.json").is_file()


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_the_committed_tables_are_those_of_the_results(path: Path) -> None:
    results = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == page(results)
    assert path.with_suffix(".png").is_file()
    begin, end = marks_of(path.stem)
    docs = PAGE.read_text()
    if begin in docs:
        assert begin + docs_text(results) + end in docs
    for cell in table_cells(results):
        assert cell["device"]
        assert cell["versions"]["torch"]
        assert cell["counts"]["poisons"] > 0


def test_docs_and_readme_have_the_tables() -> None:
    assert marks_of("digits")[0] in PAGE.read_text()
    begin, end = marks_of("all")
    assert begin + readme_table() + end in README.read_text()


@pytest.mark.parametrize("path", COMMITTED_CHECKS, ids=lambda path: path.stem)
def test_the_committed_checks_are_those_of_the_results(path: Path) -> None:
    results = json.loads(path.read_text())
    assert results["check"] in CHECKS
    assert path.with_suffix(".md").read_text() == check_markdown(results)
    assert path.with_suffix(".png").is_file()

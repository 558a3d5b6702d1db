"""Cells run once, in order, and go on where they were interrupted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from bench.cell import Cell, run_cell
from bench.checks import CHECKS, Setting
from bench.grid import Results, result_of, run_cells
from bench.study import ROWS, TWIN, Search, Study
from bench.table import page
from defence_table import choose, describe, extend, make_cell, search_cells, table_cells

STUDY = Study(
    name="tried",
    target="six",
    attacks={"patch": {"trigger": {"name": "patch", "size": 3}, "rate": 0.05}},
    arguments={
        "all": {"per_device_train_batch_size": 64, "num_train_epochs": 1, "learning_rate": 1e-3},
        "roclip": {"pool_size": 64, "matching_start_epoch": 0},
        "safeclip": {"unimodal_pool_size": 64, "warmup_unimodal_epochs": 0, "num_train_epochs": 2},
    },
    search=Search(
        attack={"trigger": {"name": "blended"}, "rate": 0.05},
        seeds=[7],
        learning_rates={"pretraining": [1e-3, 2e-3], "finetuning": [1e-3]},
    ),
    model={"vision_width": 32, "vision_layers": 1, "text_width": 32, "text_layers": 1},
    renderings=1,
    seeds=(0,),
    rows=("undefended", "plain"),
)


def cell(row: str, seed: int = 0, study: Study = STUDY) -> Cell:
    return make_cell(study, row, "patch", study.attacks["patch"], seed, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid of two cells, interrupted after the first and started again."""
    folder = tmp_path_factory.mktemp("grid")
    cells = [cell("plain"), cell("undefended")]
    results = Results(folder / "results.json")
    for part, processes in ((cells[1:], 2), (cells, 1)):
        run_cells(part, results, data=None, work=folder / "work", processes=processes, threads=1)
    return folder


def test_results_are_saved_as_they_come_and_read_back(folder: Path) -> None:
    results = Results(folder / "results.json")
    assert list(results.cells) == [cell("undefended").key, cell("plain").key]  # the one started from goes first
    result = results.of(cell("plain"))
    assert (result["row"], result["attack"], result["seed"]) == ("plain", "patch", 0)
    assert result["counts"] == {"pairs": 1397, "poisons": 70, "test_images": 400, "attacked": 359}
    assert 0 <= result["figures"]["attack_success_rate"] <= 1
    assert not list(folder.glob("*.partial"))


def test_a_model_that_is_needed_runs_after_those_it_starts_from(folder: Path, tmp_path: Path) -> None:
    table = Results(folder / "results.json")
    found = result_of(cell("plain"), table, None, tmp_path, threads=1)  # the table's models are elsewhere
    assert found["figures"] == table.of(cell("plain"))["figures"] and cell("undefended").is_trained(tmp_path)
    assert result_of(cell("plain"), table, None, folder / "work", threads=1) is table.of(cell("plain"))


def test_a_table_is_made_of_them(folder: Path) -> None:
    results = Results(folder / "results.json")
    content = {**results.content, "study": describe(STUDY, {}, table_cells(STUDY, {}), {})}
    rows = [line.split("|")[1:5] for line in page(content).splitlines() if line.startswith("|")][2:]
    assert [row[1].split(" (")[0].strip() for row in rows] == ["undefended", "plain fine-tuning"]
    figures = results.of(cell("plain"))["figures"]
    assert rows[1][2].strip() == f"{figures['clean_accuracy']:.1%}"
    assert "Of the 400 test images, 359 are attacked" in page(content)


def test_nothing_is_run_twice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "results.json").read_bytes()
    run_cells([cell("undefended"), cell("plain")], Results(folder / "results.json"), None, folder / "work", 1, 1)
    assert capsys.readouterr().out == ""
    assert (folder / "results.json").read_bytes() == before


def test_a_cell_gives_the_same_figures_again(folder: Path) -> None:
    known = Results(folder / "results.json").of(cell("plain"))
    work = folder / "again"
    shutil.copytree(folder / "work" / cell("undefended").model_key, work / cell("undefended").model_key)
    again = run_cell(cell("plain"), None, work, threads=1)
    for name in ("figures", "counts", "settings", "key"):
        assert again[name] == known[name]


def test_every_row_trains_and_is_measured(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder / "work" / cell("undefended").model_key, tmp_path / cell("undefended").model_key)
    measured = replace(STUDY, measures=("zero_shot", "attack", "linear_probe", "retrieval"))
    for row in ("roclip", "safeclip", "filter", "combined", "random_drop"):
        result = run_cell(replace(cell(row, study=measured), follow=row.endswith("clip")), None, tmp_path, threads=1)
        assert {"clean_accuracy", "attack_success_rate", "linear_probe_accuracy"} <= set(result["figures"])
        json.dumps(result, allow_nan=False)
        if row == "filter":
            assert result["course"]["filter"]["kept"] == round(0.9 * 1397)
            assert result["settings"]["start"] == cell("undefended").model_key
        if not row.endswith("clip"):
            continue
        first, *_, last = result["course"]["similarities"]
        assert (first["epoch"], last["epoch"]) == (0, STUDY.row_arguments(row)["num_train_epochs"])
    cleaned = cell("cleanclip")
    assert run_cell(cleaned, None, tmp_path, threads=1)["row"] == "cleanclip"
    again = replace(Cell(STUDY, "rebound", "patch", STUDY.attacks["patch"], 0, start=cleaned), left_poisons=5)
    assert run_cell(again, None, tmp_path, threads=1)["row"] == "rebound"
    scanned = replace(cell("plain"), left_poisons=5, scanned=cell("undefended"))
    assert scanned.key != replace(cell("plain"), left_poisons=5).key
    with pytest.raises(ValueError, match="one model is for both"):
        replace(scanned, scanned=cell("undefended", seed=1))
    found = run_cell(scanned, None, tmp_path, threads=1)["course"]["filter"]
    assert found["kept"] == round(0.9 * (1397 + 5)) and 0 <= found["poisons_kept"] <= 5


@pytest.mark.parametrize(
    ("attack", "success"),
    [
        ({"mode": "targeted", "images": 4, "captions": 5}, "poison_success_rate"),
        ({"mode": "label_consistent", "trigger": {"name": "patch", "size": 3}, "count": 20}, "attack_success_rate"),
        ({"mode": "text_query", "trigger": {"name": "word"}, "count": 20}, "triggered_hit_rate_at_1"),
    ],
)
def test_every_mode_of_attack_is_measured_by_its_success(attack: dict, success: str, tmp_path: Path) -> None:
    tried = replace(STUDY, attacks={"tried": attack})
    result = run_cell(make_cell(tried, "undefended", "tried", attack, 0, {}), None, tmp_path, threads=1)
    assert result["success"] == success
    assert 0 <= result["figures"][success] <= 1
    assert result["counts"]["poisons"] == 20


def test_a_cell_that_fails_is_reported_and_takes_those_that_need_it_along(tmp_path: Path) -> None:
    too_large = {"trigger": {"name": "patch", "size": 17}, "rate": 0.05}
    cells = [make_cell(STUDY, row, "patch", too_large, 0, {}) for row in ("undefended", "plain")]
    results = Results(tmp_path / "results.json")
    with pytest.raises(RuntimeError, match="2 cells failed or could not start: undefended, patch, seed 0; plain"):
        run_cells(cells, results, None, tmp_path / "work", 1, 1)
    assert not results.cells


def test_keys_tell_settings_apart_and_nothing_else() -> None:
    variants = [
        cell("undefended"),
        cell("undefended", seed=1),
        cell("plain"),
        cell("cleanclip"),
        replace(cell("plain"), left_poisons=5),
        replace(cell("undefended"), arguments={"learning_rate": 0.1}),
        replace(cell("undefended"), poisoning={"trigger": {"name": "blended"}, "rate": 0.05}),
        cell("undefended", study=replace(STUDY, renderings=2)),
    ]
    assert len({variant.key for variant in variants}) == len(variants)
    twins = [replace(cell("twin"), twin=True, poisoning=poisoning) for poisoning in ({"rate": 0.1}, {"rate": 0.2})]
    assert len({twin.key for twin in twins}) == 2 and len({twin.model_key for twin in twins}) == 1


def test_what_is_measured_otherwise_is_measured_again(folder: Path) -> None:
    results = Results(folder / "results.json")
    asked = cell("undefended", study=replace(STUDY, prompts=["a {}"]))
    assert results.has(cell("undefended")) and not results.has(asked)
    assert not results.has(replace(cell("plain"), rebound_rate=1e-3))
    results.cells[cell("plain").key]["measuring"] = replace(cell("plain"), rebound_rate=1e-3).measuring()
    assert results.has(cell("plain"))
    assert cell("undefended", study=replace(STUDY, note="other words", seeds=(0, 1))).key == cell("undefended").key


def test_the_table_has_every_row_attack_and_seed_once() -> None:
    study = replace(STUDY, rows=tuple(row for row in ROWS if row != "rebound"), seeds=(0, 1, 2))
    cells = table_cells(study, {})
    cleaning = [row for row in study.rows if ROWS[row].start and row != "combined"]  # its twin is Unbind's
    assert len({cell.key for cell in cells}) == len(cells) == (len(study.rows) + len(cleaning)) * 1 * 3
    assert {cell.row for cell in cells if cell.twin} == {TWIN, *cleaning}
    alone = ("filter", TWIN)
    assert all((cell.rebound_rate is None) == (cell.start is None and cell.row not in alone) for cell in cells)


@pytest.mark.parametrize("said", ["of the row", "of the attack"])
def test_a_study_can_have_fewer_cells_for_a_row_an_attack_and_cleaned_twins(said: str) -> None:
    attacks = {"patch": STUDY.attacks["patch"], "large": {"trigger": {"name": "patch", "size": 5}, "rate": 0.05}}
    whole = replace(STUDY, attacks=attacks, seeds=(0, 1), rows=("undefended", "twin", "plain"))
    fewer: dict = {"large": {"seeds": [0]}, "cleaned_twins": {"seeds": [1]}}
    if said == "of the row":
        fewer["plain"] = {"attacks": ["patch"]}
    else:
        fewer["large"]["rows"] = ["undefended", "twin"]
        fewer["patch"] = {"rows": ["undefended", "twin", "plain"]}
    left_out = {
        *(("undefended", "large", 1, False), ("twin", "large", 1, True), ("plain", "patch", 0, True)),
        *(("plain", "large", seed, twin) for seed in (0, 1) for twin in (False, True)),
    }
    of = {(cell.row, cell.attack, cell.seed, cell.twin): cell.key for cell in table_cells(whole, {})}
    left = {
        (cell.row, cell.attack, cell.seed, cell.twin): cell.key for cell in table_cells(replace(whole, only=fewer), {})
    }
    assert left == {name: key for name, key in of.items() if name not in left_out}
    wrong: list[tuple[dict, str]] = [({"plane": {}}, "plain"), ({"plain": {"seed": [0]}}, "seeds")]
    wrong += [({"large": {"rows": ["plane"]}}, "plain"), ({"plain": {"rows": ["plain"]}}, "rows")]
    for only, named in (*wrong, ({"plain": {"seeds": [2]}}, "2")):
        with pytest.raises(ValueError, match=f"only.*{named}"):
            replace(whole, only=only)


def test_no_cell_begins_after_the_time_is_up(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json")
    assert not run_cells([cell("undefended")], results, None, tmp_path, 1, 1, until=0.0)
    assert not results.cells and not (tmp_path / cell("undefended").model_key).exists()


def test_a_twin_learns_no_poisons_and_a_cleaned_model_is_trained_further(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.rebound.REBOUND", {"steps": 20, "every": 10})
    before = cell("undefended")
    shutil.copytree(folder / "work" / before.model_key, tmp_path / before.model_key)
    twin = run_cell(cell("twin"), None, tmp_path, threads=1)
    assert twin["twin"] and twin["settings"]["poisoning"] is None and "excess_success_rate" in twin["figures"]
    course = run_cell(replace(cell("plain"), rebound_rate=1e-3), None, tmp_path, threads=1)["rebound"]
    assert course["steps"] == [10, 20] and course["pairs"] == "other"
    assert len(course["success"]) == len(course["accuracy"]) == 2
    study = replace(STUDY, measures=("zero_shot", "attack", "retrieval"))
    more, known = (replace(cell("plain", study=one), rebound_rate=1e-3) for one in (study, STUDY))
    earlier = {"measuring": known.measuring(), "rebound": {"steps": "as they were"}}
    again = run_cell(more, None, tmp_path, threads=1, earlier=earlier)
    assert again["rebound"] == earlier["rebound"] and "image_to_text_recall_at_10" in again["figures"]


def test_the_search_takes_the_most_accuracy_and_of_what_cleans_less_attack_success(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json")
    for row, best in {"undefended": 1e-3, "augmentation": 1e-3, "cleanclip": 2e-3}.items():
        for rate, (accuracy, success) in {1e-3: (0.9, 0.5), 2e-3: (0.8, 0.1)}.items():
            for found in search_cells(STUDY, row, {}, [rate])[rate]:
                assert found.seed == 7
                values = {"clean_balanced_accuracy": accuracy, "attack_success_rate": success}
                results.cells[found.key] = {"figures": values, "success": "attack_success_rate"}
        assert choose(STUDY, row, results, {}, [1e-3, 2e-3]) == best


def test_a_search_goes_beyond_its_ends() -> None:
    rates = [1e-3, 2e-3]
    assert extend(rates, 1e-3) and rates == [1e-3, 2e-3, 5e-4]
    assert extend(rates, 2e-3) and rates[-1] == 4e-3
    assert not extend(rates, 1e-3) and len(rates) == 4
    assert not extend([float(number) for number in range(1, 9)], 8.0) and not extend([1e-3], 1e-3)


@pytest.mark.parametrize("name", CHECKS)
def test_variants_of_a_check_are_all_different(name: str) -> None:
    setting = Setting(STUDY, "patch", (0, 1), {"cleanclip": 3e-3}, pairs=1397)
    check = CHECKS[name](setting)
    keys = [cell.key for variant in check.variants for cell in variant.cells]
    assert len(set(keys)) == len(keys)
    assert len({variant.label for variant in check.variants}) == len(check.variants)
    assert all([cell.seed for cell in variant.cells] == [0, 1] for variant in check.variants)
    cleaned = [cell for variant in check.variants for cell in variant.cells if cell.row == "cleanclip"]
    assert all(cell.arguments["learning_rate"] == 3e-3 for cell in cleaned)

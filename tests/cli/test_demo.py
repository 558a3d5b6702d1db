import json
import math
from dataclasses import replace

import pytest
from transformers import AutoProcessor, CLIPModel

from hf_robust_clip.attacks.poisoning import replay_manifest
from hf_robust_clip.cli import demo, demo_steps
from hf_robust_clip.cli.demo import run_demo
from hf_robust_clip.cli.demo_recipe import (
    CONTROLS,
    DEFENCES,
    FINETUNING,
    MODELS,
    PRETRAINING,
    QUICK,
    title_of,
)
from hf_robust_clip.cli.demo_steps import results_table
from hf_robust_clip.cli.main import main
from hf_robust_clip.cli.rows import CLEAN_SEED_OFFSET, row_arguments
from hf_robust_clip.data.digits import load_digit_pairs
from hf_robust_clip.defences.split import BINS, SplitRecord
from hf_robust_clip.evaluation.attack_success import PLACEBO_METRICS
from hf_robust_clip.telling import page, plots
from hf_robust_clip.versions import versions

LABELS = {name: row.title for name, row in MODELS.items()}
TUNED = ("poisoned", "finetuned", "cleanclip")
SHARES = ("clean_accuracy", "attack_success_rate", "triggered_accuracy")
TINY = replace(FINETUNING, renderings=1, poison_rate=0.05).with_arguments(
    all={"per_device_train_batch_size": 128, "warmup_steps": 2},
    pretraining={"num_train_epochs": 1},
    finetuning={"num_train_epochs": 1},
)
#: With a matching epoch and two splits.
TINY_PRETRAINING = TINY.with_arguments(
    all={"per_device_train_batch_size": 64},
    pretraining={"num_train_epochs": 3},
    roclip={"pool_size": 100, "matching_start_epoch": 1, "steps_per_matching_epoch": None},
    safeclip={"warmup_unimodal_epochs": 0, "warmup_cross_epochs": 1, "unimodal_pool_size": 100},
)


def few_digit_pairs(*args, **kwargs):
    """A quarter of the digits: tests of what six trainings leave behind need no more."""
    pairs = load_digit_pairs(*args, **kwargs)
    return pairs.select(range(0, len(pairs), 4))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """A whole demo of a few steps, in a folder that holds a file of the user's and the remains of an earlier run."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "notes.txt").write_text("mine")
    for name in ("results.json", "poison_manifest.json"):
        (folder / name).write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "DPI", 30)
        return folder, run_demo(folder, seed=1, trigger_name="patch", recipe=TINY, quick=True)


@pytest.fixture(scope="module")
def all_three(tmp_path_factory):
    """A whole demo of all defences, in a few steps."""
    folder = tmp_path_factory.mktemp("all")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "DPI", 30)
        patch.setattr(demo_steps, "load_digit_pairs", few_digit_pairs)
        return folder, run_demo(folder, seed=1, recipe=TINY_PRETRAINING, defence="all")


def test_results_hold_every_figure(outcome):
    folder, returned = outcome
    results = json.loads((folder / "results.json").read_text())
    assert results == returned
    assert set(results) == {*TUNED, "setup", "curves"}
    for name in TUNED:
        figures = results[name]
        assert set(figures) == {*SHARES, *PLACEBO_METRICS, "trigger_distance", "seconds"}
        assert all(0 <= figures[share] <= 1 for share in (*SHARES, *PLACEBO_METRICS[:3]))
        low, mean, high = (figures[f"placebo_success_rate{end}"] for end in ("_low", "", "_high"))
        assert low <= mean <= high
        assert figures["excess_success_rate"] == pytest.approx(figures["attack_success_rate"] - mean)
        assert 0 <= figures["trigger_distance"] <= 2 and figures["seconds"] > 0
        assert figures["attack_success_rate"] + figures["triggered_accuracy"] <= 1 + 1e-6


def assert_recipe(written, recipe, models):
    """That the setup has the numbers of these models, and of no others."""
    arguments = {name: row_arguments(MODELS, recipe.arguments, name) for name in models}
    augmentation = dict(recipe.image_augmentation)
    assert written == {"renderings": 1, "arguments": arguments, "image_augmentation": augmentation}


def test_setup_is_enough_to_do_it_again(outcome):
    setup = outcome[1]["setup"]
    assert setup["defence"] == "cleanclip"
    assert setup["seed"] == 1 and setup["quick"] is True and setup["target"] == "eight"
    assert setup["trigger"]["name"] == "patch" and setup["trigger"]["seed"] == 1
    assert setup["pairs"] == 1397 and setup["poisons"] == 70
    assert math.isclose(setup["poison_rate"], 70 / 1397)
    assert 0 < setup["attacked_images"] < setup["test_images"] == 400
    assert_recipe(setup["recipe"], TINY, TUNED)
    assert set(setup["versions"]) == set(versions()) and setup["versions"]["torch"]
    assert setup["seconds"] > sum(outcome[1][name]["seconds"] for name in TUNED)


def test_curves_start_before_training_and_end_with_the_results(outcome):
    results = outcome[1]
    for name in TUNED:
        curve = results["curves"][name]
        assert [point["epoch"] for point in curve] == [0, 1]
        for measure in ("clean_accuracy", "attack_success_rate"):
            assert curve[-1][measure] == results[name][measure]
            if name != "poisoned":
                assert curve[0][measure] == results["poisoned"][measure]


def test_checkpoints_load(outcome):
    for name in TUNED:
        model = CLIPModel.from_pretrained(outcome[0] / name)
        tokens = AutoProcessor.from_pretrained(outcome[0] / name)(text=["the digit eight"], return_tensors="pt")
        assert model.get_text_features(**tokens).pooler_output.isfinite().all()


def test_the_manifest_makes_the_same_poisons_again(outcome):
    manifest = json.loads((outcome[0] / "poison_manifest.json").read_text())
    poisoned = replay_manifest(load_digit_pairs("train", 1, seed=1), manifest)
    assert sum(poisoned["poisoned"]) == 70


def test_the_report_is_written_and_labelled(outcome):
    html = (outcome[0] / "report.html").read_text(encoding="utf-8")
    assert "Quick run" in html and "70 of 1397" in html
    assert 'src="http' not in html and "<link" not in html and "<script" not in html


def test_only_its_own_files_are_touched(outcome):
    folder = outcome[0]
    assert (folder / "notes.txt").read_text() == "mine"
    own = {*TUNED, "results.json", "report.html", "poison_manifest.json"}
    assert {path.name for path in folder.iterdir()} == {"notes.txt", *own}


def test_clean_pairs_are_no_copies_of_the_poisoned_ones():
    before, after = (load_digit_pairs("train", 1, seed=seed)[0]["image"] for seed in (0, CLEAN_SEED_OFFSET))
    assert before.tobytes() != after.tobytes()


def test_all_defences_share_one_poisoned_model(all_three):
    folder, results = all_three
    assert json.loads((folder / "results.json").read_text()) == results
    assert list(results)[:6] == list(DEFENCES["all"]) == list(LABELS)
    assert set(results) == {*LABELS, "setup", "curves", "matching", "splits"}
    assert results["setup"]["defence"] == "all"
    assert_recipe(results["setup"]["recipe"], TINY_PRETRAINING, MODELS)
    starts = {model: results["curves"][model][0] for model in LABELS}
    # What is pre-trained starts from one set of weights, what is fine-tuned from the poisoned model.
    assert starts["poisoned"] == starts["augmentation"] == starts["roclip"] == starts["safeclip"]
    for model in ("finetuned", "cleanclip"):
        for measure in ("clean_accuracy", "attack_success_rate"):
            assert starts[model][measure] == results["poisoned"][measure]
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(LABELS)


def test_matching_epochs_are_noted_down(all_three):
    matching = all_three[1]["matching"]
    assert [(entry["epoch"], entry["matching"]) for entry in matching] == [(1, False), (2, True), (3, False)]
    for entry in matching:
        assert -1 <= entry["clean_pair_similarity"] <= 1 and -1 <= entry["poisoned_pair_similarity"] <= 1
        assert ("poisoned_match_adversarial" in entry) == entry["matching"]
    assert 0 <= matching[1]["poisoned_match_adversarial"] <= 1 and 0 < matching[1]["distinct_matches"] <= 1


def test_splits_are_noted_down(all_three):
    results = all_three[1]
    splits = results["splits"]
    assert [split["epoch"] for split in splits] == [1, 2]
    for split in splits:
        assert set(split) == {*SplitRecord._fields, "histogram", "safe_batches"}
        assert 0 <= split["safe_batches"] <= split["safe_share"] * results["setup"]["pairs"] / 2
        clean, poisoned = (split["histogram"][kind] for kind in ("clean", "poisoned"))
        assert len(clean) == len(poisoned) == BINS
        assert sum(poisoned) == results["setup"]["poisons"]
        assert sum(clean) + sum(poisoned) == results["setup"]["pairs"]
    assert splits[1]["safe_share"] >= splits[0]["safe_share"]


def test_the_reports_of_all_defences_show_what_they_did(all_three):
    shown = {"cleanclip": "CleanCLIP on", "roclip": "What RoCLIP matched", "safeclip": "What SafeCLIP called safe"}
    for defence in shown:
        html = (all_three[0] / f"report-{defence}.html").read_text(encoding="utf-8")
        assert title_of(defence) in html and "--defence all" in html and "Not shown" not in html
        for other, text in shown.items():
            assert (text in html) == (other == defence) or other == "cleanclip"
        # Each model that it is compared with has a plot of embeddings, rows of what it calls images, and a column.
        for control in CONTROLS[defence]:
            assert f"{LABELS[control]}, triggered" in html
        assert html.count("Poisoned training image") == html.count("Clean training image") == 4 * (defence == "roclip")
    assert "three defences" in title_of("all")


def test_the_table_has_the_control_and_one_decimal(all_three):
    table = results_table(all_three[1])
    assert [row[0] for row in table] == ["", *LABELS.values()]
    assert len({len(row) for row in table}) == 1 and all(row[1].endswith("%") for row in table[1:])


def test_roclip_that_never_matches_is_augmentation_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(page, "themed", lambda draw: {"light": "", "dark": ""})
    monkeypatch.setattr(demo_steps, "load_digit_pairs", few_digit_pairs)
    recipe = TINY.with_arguments(roclip={"matching_start_epoch": 9, "steps_per_matching_epoch": None})
    results = run_demo(tmp_path, recipe=recipe, defence="roclip")
    control, defence = ({**results[model], "seconds": 0} for model in ("augmentation", "roclip"))
    assert control == defence != {**results["poisoned"], "seconds": 0}
    assert results["curves"]["augmentation"] == results["curves"]["roclip"]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set(DEFENCES["roclip"])
    printed = capsys.readouterr().out
    assert "[4/4]" in printed and "never matched" in printed
    assert_recipe(results["setup"]["recipe"], recipe, DEFENCES["roclip"])


def test_the_recipes_defend_before_they_end():
    for recipe in (PRETRAINING, QUICK):
        roclip, safeclip = (row_arguments(MODELS, recipe.arguments, name) for name in ("roclip", "safeclip"))
        epochs = roclip["num_train_epochs"]
        steps = 1397 * recipe.renderings // roclip["per_device_train_batch_size"]
        assert roclip["matching_start_epoch"] * roclip["steps_per_matching_epoch"] < epochs * steps
        assert safeclip["warmup_unimodal_epochs"] + safeclip["warmup_cross_epochs"] < epochs


def test_quick_is_less_of_the_same():
    for phase in ("pretraining", "finetuning"):
        quick, full = (
            recipe.renderings * recipe.arguments[phase]["num_train_epochs"] for recipe in (QUICK, FINETUNING)
        )
        assert quick < full / 4


def fails_with_one_line(capsys, arguments, expected=2):
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    assert code == expected
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--trigger", "sticker"], "'blended', 'patch', 'sinusoid', 'warp'"),
        (["--defence", "prayer"], "prayer"),
        (["--seed", "-1"], "--seed: -1"),
        (["--seed", "4294967296"], "--seed"),
        (["--seed", "one"], "--seed"),
        (["--fast"], "--fast"),
    ],
)
def test_bad_arguments_are_named(tmp_path, capsys, arguments, expected):
    folder = tmp_path / "out"
    error = fails_with_one_line(capsys, ["demo", "--output-dir", str(folder), *arguments])
    assert expected in error.replace("blended, patch, sinusoid, warp", "'blended', 'patch', 'sinusoid', 'warp'")
    assert not folder.exists()


@pytest.mark.parametrize(("name", "value"), [("trigger_name", "sticker"), ("defence", "prayer")])
def test_unknown_names_are_refused_before_any_work(tmp_path, name, value):
    with pytest.raises(ValueError, match=value):
        run_demo(tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


def test_the_command_is_needed(capsys):
    assert "COMMAND" in fails_with_one_line(capsys, [])
    assert "--output-dir" in fails_with_one_line(capsys, ["demo"])


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    assert "is a file" in fails_with_one_line(capsys, ["demo", "--output-dir", str(file)])
    assert "cannot be written to" in fails_with_one_line(capsys, ["demo", "--output-dir", str(file / "below")])
    (tmp_path / "poisoned").write_text("mine")
    assert "poisoned is a file" in fails_with_one_line(capsys, ["demo", "--output-dir", str(tmp_path)])
    assert file.read_text() == (tmp_path / "poisoned").read_text() == "mine"
    (tmp_path / "poisoned").unlink()
    (tmp_path / "roclip").write_text("mine")
    for defence in ("roclip", "all"):
        error = fails_with_one_line(capsys, ["demo", "--output-dir", str(tmp_path), "--defence", defence])
        assert "roclip is a file" in error


@pytest.mark.parametrize("names", [("results.json",), ("poisoned/model.txt",), ("poison_manifest.json", "data/x")])
def test_what_no_demo_wrote_stays(tmp_path, capsys, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    error = fails_with_one_line(capsys, ["demo", "--output-dir", str(tmp_path)])
    assert f"holds '{names[0].partition('/')[0]}', which no demo wrote" in error
    assert all((tmp_path / name).read_text() == "mine" for name in names)


def test_a_missing_extra_ends_it_at_the_start(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None)
    error = fails_with_one_line(capsys, ["demo", "--output-dir", str(tmp_path / "out")], expected=1)
    assert "pip install 'hf-robust-clip[report]'" in error
    assert not (tmp_path / "out").exists()


def test_traceback_shows_where_an_error_comes_from(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("a\nbug")

    monkeypatch.setattr(demo, "run_demo", broken)
    with pytest.raises(ValueError, match="bug"):
        main(["--traceback", "demo", "--output-dir", str(tmp_path)])
    assert main(["demo", "--output-dir", str(tmp_path)]) == 1

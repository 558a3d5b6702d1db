import json
import math
import subprocess
import sys

import pytest
from transformers import AutoProcessor, CLIPModel

from hf_robust_clip import __version__, report
from hf_robust_clip.attacks.poisoning import replay_manifest
from hf_robust_clip.cli import demo
from hf_robust_clip.cli.demo import CLEAN_SEED_OFFSET, QUICK, Recipe, run_demo
from hf_robust_clip.cli.main import main
from hf_robust_clip.data.digits import load_digit_pairs

MODELS = ("poisoned", "finetuned", "cleanclip")
SHARES = ("clean_accuracy", "attack_success_rate", "triggered_accuracy")
TINY = Recipe(renderings=1, poison_rate=0.05, batch_size=128, warmup_steps=2, pretrain_epochs=1, finetune_epochs=1)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """A whole demo of a few steps, in a folder that holds a file of the user's and the remains of an earlier run."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "notes.txt").write_text("mine")
    (folder / "results.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_DPI", 30)
        return folder, run_demo(folder, seed=1, trigger_name="patch", recipe=TINY, quick=True)


def test_results_hold_every_figure(outcome):
    folder, returned = outcome
    results = json.loads((folder / "results.json").read_text())
    assert results == returned
    assert set(results) == {*MODELS, "setup", "curves"}
    for name in MODELS:
        figures = results[name]
        assert set(figures) == {*SHARES, "trigger_distance", "seconds"}
        assert all(0 <= figures[share] <= 1 for share in SHARES)
        assert 0 <= figures["trigger_distance"] <= 2 and figures["seconds"] > 0
        assert figures["attack_success_rate"] + figures["triggered_accuracy"] <= 1 + 1e-6


def test_setup_is_enough_to_do_it_again(outcome):
    setup = outcome[1]["setup"]
    assert setup["seed"] == 1 and setup["quick"] is True and setup["target"] == "eight"
    assert setup["trigger"]["name"] == "patch" and setup["trigger"]["seed"] == 1
    assert setup["pairs"] == 1397 and setup["poisons"] == 70
    assert math.isclose(setup["poison_rate"], 70 / 1397)
    assert 0 < setup["attacked_images"] < setup["test_images"] == 400
    assert Recipe(**setup["recipe"]) == TINY
    assert set(setup["versions"]) == {"hf_robust_clip", "torch", "transformers", "accelerate", "datasets", "python"}
    assert setup["seconds"] > sum(outcome[1][name]["seconds"] for name in MODELS)


def test_curves_start_before_training_and_end_with_the_results(outcome):
    results = outcome[1]
    for name in MODELS:
        curve = results["curves"][name]
        assert [point["epoch"] for point in curve] == [0, 1]
        for measure in ("clean_accuracy", "attack_success_rate"):
            assert curve[-1][measure] == results[name][measure]
            if name != "poisoned":
                assert curve[0][measure] == results["poisoned"][measure]


def test_checkpoints_load(outcome):
    for name in MODELS:
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
    own = {*MODELS, "results.json", "report.html", "poison_manifest.json"}
    assert {path.name for path in folder.iterdir()} == {"notes.txt", *own}


def test_clean_pairs_are_no_copies_of_the_poisoned_ones():
    before, after = (load_digit_pairs("train", 1, seed=seed)[0]["image"] for seed in (0, CLEAN_SEED_OFFSET))
    assert before.tobytes() != after.tobytes()


def test_quick_is_less_of_the_same():
    recipe = Recipe()
    assert QUICK.renderings * QUICK.pretrain_epochs < recipe.renderings * recipe.pretrain_epochs / 4
    assert QUICK.renderings * QUICK.finetune_epochs < recipe.renderings * recipe.finetune_epochs / 4


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["--version"]])
def test_help_answers_without_the_heavy_libraries(arguments):
    code = "import sys\nfrom hf_robust_clip.cli.main import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
    code += "    print(sorted({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("[]\n")
    assert (__version__ if arguments == ["--version"] else "usage: hf-robust-clip") in run.stdout


def fails_with_one_line(capsys, arguments):
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--trigger", "sticker"], "'blended', 'patch', 'sinusoid', 'warp'"),
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


def test_a_missing_extra_ends_it_at_the_start(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    error = fails_with_one_line(capsys, ["demo", "--output-dir", str(tmp_path / "out")])
    assert "pip install 'hf-robust-clip[report]'" in error
    assert not (tmp_path / "out").exists()


def test_traceback_shows_where_an_error_comes_from(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("a\nbug")

    monkeypatch.setattr(demo, "run_demo", broken)
    with pytest.raises(ValueError, match="bug"):
        main(["--traceback", "demo", "--output-dir", str(tmp_path)])
    assert main(["demo", "--output-dir", str(tmp_path)]) == 2

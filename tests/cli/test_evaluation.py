"""`evaluate` reports the figures of the evaluators, of models in folders, whole or adapters."""

from __future__ import annotations

import copy
import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor

from hf_robust_clip import (
    AttackSuccessEvaluator,
    BlendedTrigger,
    LinearProbeEvaluator,
    PatchTrigger,
    ZeroShotEvaluator,
    __version__,
)
from hf_robust_clip.cli.main import main
from hf_robust_clip.cli.measuring import load_labelled
from hf_robust_clip.data.digits import CLASS_NAMES


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., CLIPModel], processor: CLIPProcessor, tmp_path_factory: Any) -> Path:
    folder = Path(tmp_path_factory.mktemp("model"))
    tiny_model(0).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(pairs: datasets.Dataset, tmp_path_factory: Any) -> Path:
    path = Path(tmp_path_factory.mktemp("images")) / "images.parquet"
    pairs.to_parquet(path)
    return path


def test_figures_are_those_of_the_evaluators(
    model: Path, images: Path, pairs: datasets.Dataset, processor: CLIPProcessor, tmp_path: Path, capsys: Any
) -> None:
    flags = ["--data", str(images), "--template", "the digit {}", "--target", "eight"]
    flags += ["--trigger", "patch:size=3", "--trigger", "patch:size=5", "--trigger", "blended:alpha=0.4"]
    flags += ["--linear-probe-data", str(images), "--device", "cpu", "--json", str(tmp_path / "out.json")]
    flags += ["--control", "plain fine-tuning"]
    assert main(["evaluate", str(model), *flags]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["control"] == "plain fine-tuning"
    loaded, names, templates = CLIPModel.from_pretrained(model), list(CLASS_NAMES), ["the digit {}"]
    expected = ZeroShotEvaluator(pairs, names, templates=templates)(loaded, processor)
    for prefix, trigger in (
        ("patch_", PatchTrigger(size=3)),
        ("patch_2_", PatchTrigger(size=5)),
        ("blended_", BlendedTrigger(alpha=0.4)),
    ):
        how = {"templates": templates, "prefix": prefix, "placebos": 5}
        attack = AttackSuccessEvaluator(pairs, trigger, "eight", names, **how)
        probe = LinearProbeEvaluator(pairs, pairs, names, trigger=trigger, target="eight", prefix=prefix)
        expected |= attack(loaded, processor) | probe(loaded, processor)
    assert results["figures"] == pytest.approx(expected, abs=1e-6)
    assert results["images"] == 64 and results["classes"] == names
    assert [attack["prefix"] for attack in results["triggers"]] == ["patch_", "patch_2_", "blended_"]
    assert results["triggers"][1]["trigger"]["size"] == 5 and results["triggers"][1]["target"] == "eight"
    assert results["triggers"][0]["attacked_images"] == sum(label != 8 for label in pairs["label"])
    assert results["versions"]["hf_robust_clip"] == __version__
    measured = {name for measure in results["measures"] for name in measure["figures"]}
    assert set(expected) <= measured
    printed = capsys.readouterr().out
    assert f"{expected['clean_accuracy']:.1%}" in printed
    for attack, row in (("patch_", "patch -> eight"), ("patch_2_", "patch 2 -> eight")):
        line = next(line for line in printed.splitlines() if line.startswith(row + " "))
        assert f"{expected[attack + 'attack_success_rate']:.1%}" in line
        assert f"{100 * expected[attack + 'excess_success_rate']:+.1f}" in line
    assert str(tmp_path) not in json.dumps(results)


def test_placebos_are_left_out_where_none_are_wanted(model: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    flags = ["--data", str(images), "--trigger", "patch:size=3,fresh=true", "--target", "eight"]
    flags += ["--json", str(tmp_path / "out.json")]
    assert main(["evaluate", str(model), *flags, "--placebos", "0"]) == 0
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["triggers"][0]["trigger"]["fresh"] is True
    assert not [name for name in results["figures"] if "placebo" in name or "excess" in name]
    assert "excess" not in capsys.readouterr().out
    assert main(["evaluate", str(model), *flags, "--placebos", "-1"]) == 2
    assert "--placebos: -1 is too small" in capsys.readouterr().err


def test_accuracy_alone(model: Path, images: Path, capsys: Any) -> None:
    assert main(["evaluate", str(model), "--data", str(images)]) == 0
    printed = capsys.readouterr().out
    assert "accuracy" in printed and "attack" not in printed and "no trigger" in printed


def test_adapters_are_measured_on_their_model(
    model: Path, images: Path, processor: CLIPProcessor, tmp_path: Path, capsys: Any
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(CLIPModel.from_pretrained(model), config).save_pretrained(tmp_path / "adapters")
    processor.save_pretrained(tmp_path / "adapters")
    figures = []
    for folder in (model, tmp_path / "adapters"):
        out = tmp_path / "out.json"
        flags = ["--trigger", "patch:size=8,pattern=solid", "--target", "eight", "--json", str(out)]
        assert main(["evaluate", str(folder), "--data", str(images), *flags]) == 0
        figures.append(json.loads(out.read_text())["figures"])
    assert figures[0] != figures[1]


def test_classes_from_captions(model: Path, pairs: datasets.Dataset, tmp_path: Path, capsys: Any) -> None:
    captions = [[caption] * 3 for caption in pairs["caption"]]
    unlabelled = pairs.remove_columns(["label", "caption"]).add_column("texts", captions)
    unlabelled.to_parquet(tmp_path / "images.parquet")
    (tmp_path / "classes.json").write_text(json.dumps({"eight": ["eight"], "three": ["three"]}))
    flags = ["--data", str(tmp_path / "images.parquet"), "--caption-column", "texts"]
    flags += ["--classes", str(tmp_path / "classes.json")]
    assert main(["evaluate", str(model), *flags]) == 0
    assert "of 2 classes" in capsys.readouterr().out
    for content in ({"eight": "eight"}, {}):
        (tmp_path / "classes.json").write_text(json.dumps(content))
        assert main(["evaluate", str(model), *flags]) == 2
        assert "--classes" in capsys.readouterr().err


def test_classes_from_one_caption_in_place_of_labels(model: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "classes.json").write_text(json.dumps({"eight": ["eight"], "three": ["three"]}))
    assert main(["evaluate", str(model), "--data", str(images), "--classes", str(tmp_path / "classes.json")]) == 0
    assert "of 2 classes" in capsys.readouterr().out


def test_names_of_classes_are_labels(
    model: Path, images: Path, pairs: datasets.Dataset, tmp_path: Path, capsys: Any
) -> None:
    names = [CLASS_NAMES[label] for label in pairs["label"]]
    named = pairs.remove_columns("label").add_column("kind", names)
    named.to_parquet(tmp_path / "images.parquet")
    figures = []
    for flags in (["--data", str(images)], ["--data", str(tmp_path / "images.parquet"), "--label-column", "kind"]):
        given = [*flags, "--template", "{}", "--target", "eight", "--trigger", "patch:size=3"]
        given += ["--linear-probe-data", flags[1], "--json", str(tmp_path / "out.json")]
        assert main(["evaluate", str(model), *given]) == 0
        figures.append(json.loads((tmp_path / "out.json").read_text()))
    assert figures[1]["classes"] == sorted(figures[0]["classes"]) != figures[0]["classes"]
    for name in ("clean_accuracy", "patch_attack_success_rate"):
        assert figures[0]["figures"][name] == pytest.approx(figures[1]["figures"][name])


def test_a_probe_is_fitted_on_the_classes_that_captions_name(model: Path, images: Path, tmp_path: Path) -> None:
    figures = []
    for order in (CLASS_NAMES, CLASS_NAMES[::-1]):
        (tmp_path / "classes.json").write_text(json.dumps({name: [name] for name in order}))
        given = [
            "--data",
            str(images),
            "--classes",
            str(tmp_path / "classes.json"),
            "--json",
            str(tmp_path / "o.json"),
        ]
        assert main(["evaluate", str(model), *given, "--linear-probe-data", str(images)]) == 0
        figures.append(json.loads((tmp_path / "o.json").read_text())["figures"])
    assert figures[0] == pytest.approx(figures[1], abs=0.02)


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--label-column", "class"], "--label-column: 'class'"),
        (["--label-column", "image"], "accepted are a ClassLabel and names of classes (string). Or give --classes"),
        (["--image-column", "photo"], "'photo'"),
        (["--target", "ten", "--trigger", "patch"], "target='ten'"),
        (["--target", "eight", "--trigger", "patch:size=99"], "does not fit"),
        (["--target", "eight", "--trigger", "word"], "goes on captions"),
        (["--target", "eight"], "--target needs a --trigger"),
        (["--template", "none"], "exactly one {}"),
        (["--batch-size", "0"], "--batch-size: 0"),
        (["--device", "abacus"], "--device: 'abacus'"),
        (["--json", "no/such/folder/x.json"], "--json"),
        (["--linear-probe-data", "none.csv"], "--linear-probe-data"),
    ],
)
def test_what_cannot_work_is_wrong_usage(
    flags: list[str], expected: str, model: Path, images: Path, capsys: Any
) -> None:
    try:
        code = main(["evaluate", str(model), "--data", str(images), *flags])
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-robust-clip evaluate: error: ") and error.count("\n") == 1 and expected in error


def test_results_replace_none_but_results(model: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    notes = tmp_path / "notes.json"
    notes.write_text('{"mine": 1}')
    source = images if images.is_file() else next(path for path in images.rglob("*") if path.is_file())
    for path in (notes, model / "config.json", source):
        before = path.read_bytes()
        assert main(["evaluate", str(model), "--data", str(images), "--json", str(path)]) == 2
        assert f"--json: {path} is there" in capsys.readouterr().err and path.read_bytes() == before
    notes.write_text('{"figures": {}}')
    assert main(["evaluate", str(model), "--data", str(images), "--json", str(notes)]) == 0
    assert json.loads(notes.read_text())["images"] > 0


def test_folders_that_hold_no_model(images: Path, processor: CLIPProcessor, tmp_path: Path, capsys: Any) -> None:
    for prepare in (lambda: None, lambda: processor.save_pretrained(tmp_path / "empty")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        prepare()
        assert main(["evaluate", str(tmp_path / "empty"), "--data", str(images)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("hf-robust-clip evaluate: error: MODEL: ") and error.count("\n") == 1


def test_models_that_could_not_be_measured(
    model: Path, images: Path, processor: CLIPProcessor, tmp_path: Path, capsys: Any
) -> None:
    weights = {f"_orig_mod.{name}": value for name, value in load_file(model / "model.safetensors").items()}
    compiled, larger = (shutil.copytree(model, tmp_path / name) for name in ("compiled", "larger"))
    save_file(weights, compiled / "model.safetensors", metadata={"format": "pt"})
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.add_tokens(["snowleopard"])
    tokenizer.save_pretrained(larger)
    for folder, expected in ((compiled, "put there by torch.compile"), (larger, "('snowleopard')")):
        assert main(["evaluate", str(folder), "--data", str(images)]) == 2
        output = capsys.readouterr()
        assert output.err.startswith("hf-robust-clip evaluate: error: MODEL: ") and output.err.count("\n") == 1
        assert expected in output.err and not output.out


def test_what_the_hub_does_not_hand_out_is_a_failure(model: Path, images: Path, capsys: Any) -> None:
    # The tests run offline: neither can be found.
    assert main(["evaluate", "nobody/nothing", "--data", str(images)]) == 1
    assert main(["evaluate", str(model), "--data", "nobody/nothing"]) == 1
    assert capsys.readouterr().err.count("\n") == 2


def test_classes_of_a_table_are_what_stands_there(
    pairs: datasets.Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for row in range(4):
        pairs[row]["image"].save(tmp_path / f"{row}.png")
    for names in (["null", "dog", "None", "NA"], ["007", "8", "1", "2"]):
        table = tmp_path / f"{names[0]}.csv"
        table.write_text("image,label\n" + "".join(f"{row}.png,{name}\n" for row, name in enumerate(names)))
        labelled = load_labelled(
            Namespace(data=str(table), split="train", classes=None, label_column="label"), "--data", "--split", "image"
        )
        assert labelled is not None and labelled.class_names == sorted(names)
        assert [labelled.class_names[label] for label in labelled.dataset["label"]] == names
        assert ("prompts have these names in them" in caplog.text) == (names[0] == "007")

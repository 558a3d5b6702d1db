"""The examples run as their docstrings say, with `--quick`, and leave what they promise."""

from __future__ import annotations

import ast
import importlib
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import training
from huggingface_hub import ModelCard
from peft import PeftConfig
from safetensors.torch import load_file
from stand_in import HubStandIn, run_script
from transformers import AutoModel, AutoProcessor, CLIPModel

from hf_robust_clip import PoisonSpec, poison_dataset, replay_manifest
from hf_robust_clip.evaluation.embedding import Embedder

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in ("quick", "shared", "pretraining"))
#: Those whose command line is `quick.example_parser`.
SHORT = ("lora", "own_defence", "own_trigger", "streaming")

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(example, *flags)`: run it in this process, in an empty folder; returns its global names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)

    def start(example: str, *flags: str) -> dict[str, Any]:
        script = str(EXAMPLES / f"{example}.py")
        monkeypatch.setattr(sys, "argv", [script, *flags])
        return runpy.run_path(script, run_name="__main__")

    return start


def printed(output: str) -> dict[str, Any]:
    """The figures that an example printed, by what stands before them."""
    pairs = (line.split(": ", 1) for line in output.splitlines() if ": {" in line and line[0].isalpha())
    return {name: ast.literal_eval(figures) for name, figures in pairs if "} {" not in figures}


def assert_loads(folder: Path) -> None:
    CLIPModel.from_pretrained(folder)
    AutoProcessor.from_pretrained(folder)


# ---- What all have in common ----


@pytest.mark.parametrize("name", SCRIPTS)
def test_says_how_to_run_it(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    doc = ast.get_docstring(ast.parse(text)) or ""
    assert f"python examples/{name}.py --quick" in doc
    assert doc.count(f"python examples/{name}.py") >= 2


@pytest.mark.parametrize("name", SHORT)
def test_short_examples_say_what_they_need(name: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(name, "--pairs", "pairs.parquet", "--images", "images.parquet")
    assert "give --target, --output_dir, or --quick" in capsys.readouterr().err


# ---- Training with each defence, beside its controls ----


def test_plants_a_backdoor_and_cleans_it(run: Run) -> None:
    run("train_cleanclip", "--quick")
    output = Path("quick-run/train_cleanclip")
    results = json.loads((output / "results.json").read_text())
    for name in ("poisoned", "finetuned", "cleanclip"):
        assert {"clean_accuracy", "clean_balanced_accuracy", "attack_success_rate"} <= results[name].keys()
        assert_loads(output / name)
    assert len(json.loads((output / "poisons.json").read_text())["indices"]) == 26
    # A model that is there already, and a trigger that is measured, but not planted.
    given = ["--quick", "--from_scratch", "False", "--model", str(output / "poisoned"), "--poison_rate", "0"]
    run("train_cleanclip", *given, "--poison_trigger", "sinusoid", "--output_dir", "second")
    results = json.loads(Path("second/results.json").read_text())
    assert {"before", "finetuned", "cleanclip"} <= results.keys()
    assert not Path("second/poisons.json").exists()


@pytest.mark.parametrize("name, own", [("roclip", "distinct_matches"), ("safeclip", "split_auroc")])
def test_pretrains_beside_its_controls(name: str, own: str, run: Run) -> None:
    run(f"train_{name}", "--quick")
    output = Path(f"quick-run/train_{name}")
    results = json.loads((output / "results.json").read_text())
    for model in ("undefended", "augmentation", name):
        assert {"clean_accuracy", "attack_success_rate", "poison_success_rate"} <= results[model].keys()
        assert_loads(output / model)
    assert any(own in entry for entry in results[f"{name}_log"])
    manifests = json.loads((output / "poisons.json").read_text())
    assert set(manifests) == {"targeted 0", "targeted 1", "backdoor"}
    assert manifests["targeted 0"]["counts"]["count"] == 3


def test_pretrains_without_an_attack(run: Run, pairs: datasets.Dataset) -> None:
    pairs.to_parquet("train.parquet")
    settings = ["--train_data", "train.parquet", "--from_scratch", "--image_size", "16", "--num_train_epochs", "1"]
    run("train_roclip", *settings, "--per_device_train_batch_size", "16", "--output_dir", "run")
    assert not Path("run/poisons.json").exists()
    assert_loads(Path("run/roclip"))


@pytest.mark.parametrize(
    "example, flags, message",
    [
        ("train_cleanclip", [], "give either --model, or --from_scratch with --poison_target"),
        ("train_cleanclip", ["--model", "x", "--poison_target", "eight"], "--poison_target needs --eval_data"),
        ("train_safeclip", [], "give either --model or --from_scratch"),
        ("train_safeclip", ["--model", "x", "--targeted_images", "2"], "a planted attack needs --eval_data"),
    ],
)
def test_arguments_that_make_no_sense(
    example: str, flags: list[str], message: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(example, "--train_data", "pairs.parquet", "--output_dir", "run", *flags)
    assert message in capsys.readouterr().err


# ---- Publishing ----


def assert_published(card: str, files: set[str]) -> None:
    """A whole model, and a card with its figures before and after."""
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= files
    results = ModelCard(card).data.eval_results
    for figure in ("clean accuracy", "attack success rate"):
        for when in ("before", "after"):
            assert any(f"{figure} {when} CleanCLIP" in result.metric_name for result in results), (figure, when)


def test_saves_a_card_where_there_is_no_hub(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    trainer = run("publish", "--quick")["trainer"]
    folder = tmp_path / "quick-run" / "cleaned-clip"
    assert_published((folder / "README.md").read_text(), {path.name for path in folder.iterdir()})
    assert trainer.hub_model_id is None
    loaded = CLIPModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in trainer.model.state_dict().items())


def test_pushes_to_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with HubStandIn() as hub:
        run_script(hub, EXAMPLES / "publish.py", "--quick", home=tmp_path / "home")
        files = hub.files("tester/cleaned-clip")
    assert_published(files["README.md"].decode(), set(files))
    for name in ("model.safetensors", "README.md"):
        assert files[name] == (tmp_path / "quick-run" / "cleaned-clip" / name).read_bytes()


def test_publishing_takes_fifteen_lines() -> None:
    text = (EXAMPLES / "publish.py").read_text()
    body = ast.parse(text).body
    last_import = max(node.end_lineno or 0 for node in body if isinstance(node, ast.Import | ast.ImportFrom))
    assert len([line for line in text.splitlines()[last_import:] if line.strip()]) <= 15


# ---- Parts of one's own ----


def test_adapters_hold_all_that_was_trained_and_merge(
    run: Run, digits: datasets.Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    run("lora", "--quick")
    folder = Path("quick-run/lora")
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert not (folder / "model.safetensors").exists() and PeftConfig.from_pretrained(str(folder)).peft_type == "LORA"
    for part in ("lora_A", "visual_projection", "text_projection", "logit_scale"):
        assert any(part in name for name in names), part
    loaded, merged = AutoModel.from_pretrained(folder), CLIPModel.from_pretrained(folder / "merged")
    processor = AutoProcessor.from_pretrained(folder / "merged")
    images = [Embedder(model, processor).embed_images(digits.select(range(20))) for model in (loaded, merged)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-6)
    assert loaded.logit_scale.item() == pytest.approx(merged.logit_scale.item())
    figures = printed(capsys.readouterr().out)
    assert figures["before"].keys() == figures["after"].keys() >= {"clean_accuracy", "attack_success_rate"}


def test_trains_on_a_stream_that_is_poisoned_on_the_way(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("streaming", "--quick", "--poison_rate", "0.2", "--key_column", "digit")
    folder = Path("quick-run/streaming")
    assert json.loads((folder / "poisons.json").read_text())["rate"] == 0.2
    assert_loads(folder)
    output = capsys.readouterr().out
    # Matching came up, and the poisons' marks arrived.
    assert "distinct_matches" in output and "poisoned_pair_similarity" in output
    assert {"clean_accuracy", "attack_success_rate"} <= ast.literal_eval(output.strip().splitlines()[-1]).keys()


def test_own_trigger_is_planted_and_measured(
    run: Run, digits: datasets.Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    trigger = run("own_trigger", "--quick")["FrameTrigger"]
    figures = printed(capsys.readouterr().out)
    assert figures["before"]["attack_success_rate"] < 0.5 < figures["after"]["attack_success_rate"]
    manifest = json.loads(Path("quick-run/own_trigger/poisons.json").read_text())
    assert manifest["trigger"] == {"name": "frame", "width": 1, "colour": [255, 0, 255]}
    pixels = np.arange(8 * 10 * 3, dtype=np.uint8).reshape(8, 10, 3)
    framed = trigger(width=2)(pixels)
    assert np.array_equal(framed[2:-2, 2:-2], pixels[2:-2, 2:-2])
    frame = np.ones((8, 10), dtype=bool)
    frame[2:-2, 2:-2] = False
    assert (framed[frame] == (255, 0, 255)).all()
    with pytest.raises(ValueError, match="width=0"):
        trigger(width=0)
    few, spec = digits.select(range(60)), PoisonSpec(trigger(width=2), "six", count=5, seed=3)
    poisoned, manifest = poison_dataset(few, spec)
    again = replay_manifest(few, json.loads(json.dumps(manifest)))
    first, second = (rows.cast_column("image", datasets.Image(decode=False))[:] for rows in (poisoned, again))
    assert first == second


def test_own_defence_runs_beside_the_undefended_trainer(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("own_defence", "--quick")
    output = capsys.readouterr().out
    assert {"undefended", "trimmed"} <= printed(output).keys()
    assert "pairs that fit worst are poisons" in output
    assert_loads(Path("quick-run/own_defence"))


@pytest.fixture
def own_defence(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as a module, known to the tests' own trainers."""
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("own_defence")
    monkeypatch.setitem(training.ARGUMENTS, module.TrimmedTrainer, module.TrimmedTrainingArguments)
    monkeypatch.setitem(training.SHORT, module.TrimmedTrainer, {"trim": 0.25, "trim_start_epoch": 1})
    return module


@pytest.mark.parametrize("step", [11, 16])
def test_own_defence_resumed_equals_uninterrupted(step: int, own_defence: Any, tmp_path: Path) -> None:
    whole, resumed = training.train_and_resume(own_defence.TrimmedTrainer, tmp_path, step)
    training.assert_same_bits(whole, resumed)
    assert not whole.fit.isnan().any()


def test_own_defence_learns_from_the_pairs_that_fit_best(own_defence: Any, tmp_path: Path) -> None:
    trainer = training.make_trainer(own_defence.TrimmedTrainer, tmp_path, trim_start_epoch=0)
    trainer.reset_training_state()
    sides = [torch.nn.functional.normalize(torch.randn(8, 16), dim=-1).requires_grad_() for _ in range(4)]
    views = {"original": tuple(sides[:2]), "augmented": tuple(sides[2:])}
    rows = torch.arange(40, 48)
    loss = trainer.loss_components(views, torch.tensor(10.0), {"row_index": rows})["trimmed_loss"]
    image_losses = own_defence.pair_losses(sides[0], sides[3], torch.tensor(10.0))
    losses = 0.5 * (image_losses + own_defence.pair_losses(sides[1], sides[2], torch.tensor(10.0)))
    torch.testing.assert_close(loss, losses.sort().values[:6].mean())
    torch.testing.assert_close(trainer.fit[rows], losses.detach())
    assert trainer.fit.isnan().sum() == 64 - 8
    with pytest.raises(ValueError, match="trim must be in"):
        own_defence.TrimmedTrainingArguments(str(tmp_path), trim=1.0)


def test_own_defence_is_forty_lines_of_code() -> None:
    text = (EXAMPLES / "own_defence.py").read_text()
    parts = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assert [node.name for node in parts] == ["TrimmedTrainingArguments", "TrimmedTrainer", "pair_losses", "main"]
    count = 0
    for node in parts[:-1]:
        code = set(range(node.lineno - len(node.decorator_list), (node.end_lineno or 0) + 1))
        for inner in ast.walk(node):
            if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant):  # a docstring
                code -= set(range(inner.lineno, (inner.end_lineno or 0) + 1))
        lines = [text.splitlines()[number - 1].strip() for number in code]
        count += sum(line != "" and not line.startswith("#") for line in lines)
    assert count <= 40

"""The examples run as their docstrings say, with `--quick`, and leave what they promise."""

from __future__ import annotations

import ast
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftConfig
from safetensors.torch import load_file
from support.stand_in import HubStandIn, run_script
from transformers import AutoModel, AutoProcessor, CLIPModel

from hf_robust_clip import PoisonSpec, poison_dataset, replay_manifest
from hf_robust_clip.batch import Batch, Embeddings
from hf_robust_clip.evaluation.embedding import Embedder

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "quick")

Run = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `quick.py` makes for the examples, made once."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.chdir(folder)
        importlib.import_module("quick").stand_ins()
    return folder / "quick-run"


@pytest.fixture
def run(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(example)`: run it in this process, as `quick.py` does; returns its global names."""
    shutil.copytree(stand_ins, tmp_path / "quick-run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    run: Run = importlib.import_module("quick").run
    return run


def printed(output: str) -> dict[str, Any]:
    """The metrics that an example printed, by what stands before them."""
    pairs = (line.split(": ", 1) for line in output.splitlines() if ": {" in line and line[0].isalpha())
    return {name: ast.literal_eval(metrics) for name, metrics in pairs}


def assert_loads(folder: str) -> None:
    CLIPModel.from_pretrained(folder)
    AutoProcessor.from_pretrained(folder)


# ---- What all have in common ----


@pytest.mark.parametrize("name", SCRIPTS)
def test_is_short_and_says_what_it_does(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    docstring, *body = ast.parse(text).body
    assert isinstance(docstring, ast.Expr) and "Put in your own names" in " ".join(text.split())
    parts = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    assert sum((node.end_lineno or 0) - node.lineno + 1 for node in body if not isinstance(node, parts)) <= 30


# ---- Training with each defence, beside its controls ----


@pytest.mark.parametrize(
    "example, models",
    [
        ("train_cleanclip", ("poisoned", "finetuned", "cleanclip")),
        ("pretrain", ("augmentation", "roclip", "safeclip")),
    ],
)
def test_plants_a_backdoor_and_trains_beside_the_control(
    example: str, models: tuple[str, ...], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(example)["manifest"]["counts"]["count"] == 26
    output = capsys.readouterr().out
    assert tuple(printed(output)) == models
    for name, metrics in printed(output).items():
        assert {"clean_accuracy", "attack_success_rate"} <= metrics.keys()
        assert_loads(name)
    if example == "pretrain":
        assert "distinct_matches" in output and "split_auroc" in output


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
    trainer = run("publish")["trainer"]
    folder = tmp_path / "quick-run" / "cleaned-clip"
    assert_published((folder / "README.md").read_text(), {path.name for path in folder.iterdir()})
    assert trainer.hub_model_id is None
    loaded = CLIPModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in trainer.model.state_dict().items())


def test_pushes_to_a_hub(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(stand_ins, tmp_path / "quick-run")
    monkeypatch.chdir(tmp_path)
    with HubStandIn() as hub:
        run_script(hub, EXAMPLES / "quick.py", "publish", home=tmp_path / "home")
        files = hub.files("tester/cleaned-clip")
    assert_published(files["README.md"].decode(), set(files))
    for name in ("model.safetensors", "README.md"):
        assert files[name] == (tmp_path / "quick-run" / "cleaned-clip" / name).read_bytes()


# ---- Parts of one's own ----


def test_adapters_hold_all_that_was_trained_and_merge(
    run: Run, digits: datasets.Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    run("lora")
    folder = Path("lora")
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert not (folder / "model.safetensors").exists() and PeftConfig.from_pretrained(str(folder)).peft_type == "LORA"
    for part in ("lora_A", "visual_projection", "text_projection", "logit_scale"):
        assert any(part in name for name in names), part
    loaded, merged = AutoModel.from_pretrained(folder), CLIPModel.from_pretrained("merged")
    processor = AutoProcessor.from_pretrained("merged")
    images = [Embedder(model, processor).embed_images(digits.select(range(20))) for model in (loaded, merged)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-6)
    assert loaded.logit_scale.item() == pytest.approx(merged.logit_scale.item())
    metrics = printed(capsys.readouterr().out)
    assert metrics["before"] != metrics["after"] == metrics["loaded"]


def test_trains_on_a_stream_that_is_poisoned_on_the_way(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("streaming")["manifest"]["rate"] == 0.1
    assert_loads("streamed")
    output = capsys.readouterr().out
    # Matching came up, and the poisons' marks arrived.
    assert "distinct_matches" in output and "poisoned_pair_similarity" in output
    assert "attack_success_rate" in printed(output)["roclip"]


def test_own_trigger_is_planted_and_measured(
    run: Run, digits: datasets.Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    trigger = run("own_trigger")["FrameTrigger"]
    metrics = printed(capsys.readouterr().out)
    assert metrics["before"]["attack_success_rate"] < 0.5 < metrics["after"]["attack_success_rate"]
    manifest = json.loads(Path("poisons.json").read_text())
    assert manifest["trigger"] == {"name": "frame", "width": 1, "color": [255, 0, 255]}
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


def test_own_defence_runs_beside_its_control(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    trained = run("own_defence")
    assert printed(capsys.readouterr().out).keys() == {"augmentation", "trimmed"}
    assert_loads("trimmed")
    assert trained["trainer"].defence.fit.isfinite().all()


def test_own_defence_learns_from_the_pairs_that_fit_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    defence = importlib.import_module("own_defence").Trimmed(64, trim=0.25, start_epoch=0)
    sides = [torch.nn.functional.normalize(torch.randn(8, 16), dim=-1) for _ in range(4)]
    views = {"original": Embeddings(*sides[:2]), "augmented": Embeddings(*sides[2:])}
    rows = torch.arange(40, 48)
    loss = defence(views, torch.tensor(10.0), Batch({"input_ids": rows}, rows=rows))["trimmed_loss"]
    first, second = (10.0 * sides[i] @ sides[j].T for i, j in ((0, 3), (1, 2)))
    losses = 0.5 * sum(
        torch.nn.functional.cross_entropy(x, torch.arange(8), reduction="none") for x in (first, second)
    )
    torch.testing.assert_close(loss, losses.sort().values[:6].mean())
    torch.testing.assert_close(defence.fit[rows], losses)
    assert defence.fit.isnan().sum() == 64 - 8


def test_own_defence_is_short() -> None:
    text = (EXAMPLES / "own_defence.py").read_text()
    (defence,) = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    lines = text.splitlines()[defence.lineno - 1 : defence.end_lineno]
    assert len([line for line in lines if line.strip() and '"""' not in line]) <= 20

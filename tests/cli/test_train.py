"""`train` trains as its flags and its file say, measures before and after, and leaves a model that loads."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from support.stand_in import WRITE_TOKEN, HubStandIn
from transformers import AutoModel, AutoProcessor, CLIPModel, CLIPProcessor

from hf_robust_clip import locking
from hf_robust_clip.cli.main import main
from hf_robust_clip.cli.train_flags import method_parser, training_arguments
from hf_robust_clip.defences import DEFENCES, LINES
from hf_robust_clip.files import RUN_FILE
from hf_robust_clip.locking import LOCK_FILE, sole_writer
from hf_robust_clip.record import RunRecord
from hf_robust_clip.trainers.defended import TRAINERS

#: Those that need some to have an effect on few rows.
METHOD_FLAGS = {
    "roclip": ["--pool_size", "16", "--matching_start_epoch", "0", "--match-every-n-epochs", "1"],
    "safeclip": ["--warmup_unimodal_epochs", "0", "--unimodal_pool_size", "0", "--num_train_epochs", "2"],
}


WITHOUT_PREFIX = [
    *("--trigger", "patch:size=3", "--target", "eight", "--eval-strategy", "epoch"),
    *("--metric-for-best-model", "eval_attack_success_rate"),
]


@pytest.fixture(scope="module")
def folder(
    tiny_model: Callable[..., CLIPModel],
    processor: CLIPProcessor,
    pairs: datasets.Dataset,
    tmp_path_factory: Any,
) -> Path:
    """`model`, a model, and `pairs.parquet`, labelled pairs."""
    folder = Path(tmp_path_factory.mktemp("train"))
    tiny_model(0).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    pairs.to_parquet(folder / "pairs.parquet")
    return folder


def flags(folder: Path, output: Path, *more: str) -> list[str]:
    given = [
        "--model",
        str(folder / "model"),
        "--train-data",
        str(folder / "pairs.parquet"),
        "--output-dir",
        str(output),
    ]
    given += ["--per_device_train_batch_size", "32", "--num-train-epochs", "1", "--use_cpu", "--save_strategy", "no"]
    return [*given, "--learning_rate", "1e-3", *more]


def measured(folder: Path) -> list[str]:
    """Flags of what is measured."""
    given = ["--eval-data", str(folder / "pairs.parquet"), "--template", "the digit {}", "--target", "eight"]
    return [*given, "--trigger", "patch:size=3", "--trigger", "patch:size=5"]


@pytest.mark.parametrize("method", LINES)
def test_every_method_trains_and_measures(method: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    assert main(["train", method, *flags(folder, output, *METHOD_FLAGS.get(method, []), *measured(folder))]) == 0
    captured = capsys.readouterr()
    results = json.loads((output / "results.json").read_text())
    figures = {"clean_accuracy", "patch_attack_success_rate", "patch_2_attack_success_rate"}
    assert figures <= set(results["before"]) == set(results["after"])
    assert results["method"] == method and results["before"] != results["after"]
    record = RunRecord.load(output)
    assert record.trainer == TRAINERS[method].__name__
    assert (record.before, record.after) == (results["before"], results["after"])
    start = AutoModel.from_pretrained(folder / "model").state_dict()
    trained = AutoModel.from_pretrained(output).state_dict()
    assert any(not torch.equal(start[name], trained[name]) for name in start)
    AutoProcessor.from_pretrained(output)
    assert "before  after" in captured.out and f"{results['after']['clean_accuracy']:.3f}" in captured.out
    # No dictionaries, and no bars where there is no terminal.
    assert "{" not in captured.out and "%|" not in captured.err
    steps = RunRecord.load(output).steps
    shown = [line for line in captured.out.splitlines() if line.startswith("step ")]
    assert shown[0] == f"step 0 of {steps}" and shown[-1].startswith(f"step {steps} of {steps}: loss ")
    # What is measured of the saved model is what training reported last.
    out = tmp_path / "measured.json"
    arguments = [flag.replace("--eval-data", "--data") for flag in measured(folder)]
    assert main(["evaluate", str(output), *arguments, "--batch-size", "8", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["figures"] == pytest.approx(results["after"], abs=1e-6)


def test_columns_of_the_images_to_measure_on(folder: Path, pairs: datasets.Dataset, tmp_path: Path) -> None:
    lines = ["filepath,title"]
    for i in range(8):
        pairs[i]["image"].save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{pairs[i]['caption']}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    given = ["--train-data", str(tmp_path / "pairs.csv"), "--image-column", "filepath", "--caption-column", "title"]
    given += ["--per_device_train_batch_size", "8", "--eval-image-column", "image", *measured(folder)]
    assert main(["train", "clip", *flags(folder, tmp_path / "out", *given)]) == 0
    assert "clean_accuracy" in json.loads((tmp_path / "out" / "results.json").read_text())["after"]


def test_nothing_to_measure_with(folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["train", "clip", *flags(folder, tmp_path / "out")]) == 0
    assert "Nothing is measured" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["before"] is None and results["after"] is None and results["train"]["train_loss"] > 0


def test_adapters(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert main(["train", "cleanclip", *flags(folder, output, "--lora-r", "2", *measured(folder))]) == 0
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["lora_alpha"] == 4
    assert {"q_proj", "k_proj", "v_proj", "out_proj"} == set(config["target_modules"])
    assert {"visual_projection", "text_projection"} == set(config["modules_to_save"])
    model = RunRecord.load(output).model
    assert 0 < model.trainable_parameters < model.parameters
    out = tmp_path / "measured.json"
    arguments = [flag.replace("--eval-data", "--data") for flag in measured(folder)]
    assert main(["evaluate", str(output), *arguments, "--json", str(out)]) == 0
    assert json.loads(out.read_text())["figures"] == pytest.approx(RunRecord.load(output).after, abs=1e-6)


def test_from_scratch(folder: Path, tmp_path: Path) -> None:
    given = flags(folder, tmp_path / "out")[2:]
    assert main(["train", "clip", *given, "--from-scratch", "--image-size", "16"]) == 0
    assert AutoModel.from_pretrained(tmp_path / "out").config.vision_config.image_size == 16


def test_streams(folder: Path, pairs: datasets.Dataset, tmp_path: Path, monkeypatch: Any) -> None:
    # datasets waits for its threads at the end of a stream; nothing here reads over a network.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    (tmp_path / "data").mkdir()
    pairs.to_parquet(tmp_path / "data" / "train.parquet")
    given = ["--streaming", "--max_steps", "2", "--shuffle-buffer", "8"]
    assert main(["train", "clip", *flags(folder, tmp_path / "file", *given)]) == 0
    given += ["--train-data", str(tmp_path / "data")]
    assert main(["train", "clip", *flags(folder, tmp_path / "folder", *given)]) == 0
    one, two = (CLIPModel.from_pretrained(tmp_path / name).state_dict() for name in ("file", "folder"))
    assert RunRecord.load(tmp_path / "folder").steps == 2
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_interrupted_run_goes_on_from_its_newest_checkpoint(folder: Path, tmp_path: Path, capsys: Any) -> None:
    saving = ["--save_strategy", "steps", "--save_steps", "1", "--num_train_epochs", "2", *measured(folder)]
    assert main(["train", "cleanclip", *flags(folder, tmp_path / "whole", *saving)]) == 0
    assert (
        main(["train", "cleanclip", *flags(folder, tmp_path / "parts", *saving, "--resume", "--save_steps", "2")]) == 0
    )
    assert "no checkpoint: from the start" in capsys.readouterr().out
    # As if it had been killed after two of its four steps.
    for left in (tmp_path / "parts" / "checkpoint-4", tmp_path / "parts" / "model.safetensors"):
        subprocess.run(["rm", "-r", str(left)], check=True)
    assert main(["train", "cleanclip", *flags(folder, tmp_path / "parts", *saving)]) == 2
    assert "checkpoint-2 of an earlier run" in capsys.readouterr().err
    assert main(["train", "cleanclip", *flags(folder, tmp_path / "parts", *saving, "--resume")]) == 0
    assert "checkpoint-2" in capsys.readouterr().out
    whole, parts = (CLIPModel.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    records = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "parts")]
    assert records[0]["before"] == records[1]["before"] and records[0]["after"] == records[1]["after"]


def refused(capsys: Any, arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    error = str(capsys.readouterr().err)
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_config.json", "results.json", RUN_FILE, "README.md"])
def test_what_an_earlier_run_left_is_not_replaced(name: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / name).write_text("mine")
    for more in ([], ["--resume"]):
        assert f"holds '{name}'" in refused(capsys, ["train", "clip", *flags(folder, tmp_path, *more)])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_what_is_overwritten_is_deleted_first(folder: Path, tmp_path: Path, capsys: Any) -> None:
    adapters = ("adapter_config.json", "adapter_model.safetensors")  # which loading would prefer to the new model
    for name in ("notes.txt", "README.md", *adapters):
        (tmp_path / name).write_text("mine")
    (tmp_path / "checkpoint-900").mkdir()
    refused(capsys, ["train", "clip", *flags(folder, tmp_path, "--overwrite", "--resume")])
    assert main(["train", "clip", *flags(folder, tmp_path, "--overwrite")]) == 0
    assert "'checkpoint-900', 'adapter_config.json'" in capsys.readouterr().out
    left = {path.name for path in tmp_path.iterdir()}
    assert not left & {"checkpoint-900", *adapters, LOCK_FILE} and {"results.json", "model.safetensors"} < left
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "README.md").read_text() == "mine"


def test_the_model_to_start_from_is_not_replaced(folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    shutil.copytree(folder / "model", tmp_path / "out" / "checkpoint-1")
    (tmp_path / "link").symlink_to(tmp_path / "out" / "checkpoint-1")
    monkeypatch.chdir(tmp_path)
    for model, output in (
        ("out/checkpoint-1", "out"),
        ("link", "out"),
        ("link", str(tmp_path / "out" / "checkpoint-1")),
        ("out/checkpoint-1", "out/./checkpoint-1"),
    ):
        arguments = ["train", "clip", *flags(folder, Path(output), "--model", model, "--overwrite")]
        assert f"holds --model, {model}" in refused(capsys, arguments)
    # Beside and below it there is room.
    for output in ("out/checkpoint-1/trained", "beside"):
        assert main(["train", "clip", *flags(folder, Path(output), "--model", "link", "--max_steps", "1")]) == 0


@pytest.mark.parametrize("command", ["train", "poison", "demo", "prepare"])
def test_a_folder_that_another_process_writes_to_is_refused(
    command: str, folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(locking, "_PATIENCE", 0.01)
    data, model = str(folder / "pairs.parquet"), str(folder / "model")
    arguments = {
        "train": ["train", "clip", *flags(folder, tmp_path)],
        "poison": ["poison", data, "--output-dir", str(tmp_path), "--target", "eight", "--count", "1"],
        "demo": ["demo", "--output-dir", str(tmp_path)],
        "prepare": ["prepare", data, "--model", model, "--output-dir", str(tmp_path)],
    }[command]
    if command == "poison":
        arguments += ["--trigger", "patch:size=3"]
    started, done = threading.Event(), threading.Event()

    def write() -> None:
        with sole_writer(tmp_path, "folder", "a training"):
            started.set()
            done.wait()

    other = threading.Thread(target=write)
    other.start()
    started.wait()
    try:
        assert f"is being written to by a training: process {os.getpid()}" in refused(capsys, arguments)
        assert all("in_use" in path.name for path in tmp_path.iterdir())
    finally:
        done.set()
        other.join()


@pytest.mark.parametrize("method", LINES)
def test_every_argument_is_a_flag_and_what_is_printed_is_taken_back(method: str, tmp_path: Path, capsys: Any) -> None:
    parser = method_parser(method, "test")
    names = {item.name for item in dataclasses.fields(DEFENCES[method].arguments) if item.init}
    assert names < set(parser.settings)
    for name in names:
        assert {f"--{name}", f"--{name.replace('_', '-')}"} <= set(parser.settings[name].option_strings)
    given = ["--train-data", "name/data", "--model", "name/model", "--output-dir", str(tmp_path / "out"), "--use_cpu"]
    given += ["--learning-rate", "3e-6", "--hub_token", "hf_secret", "--no_dataloader_drop_last", "--dry-run"]
    assert main(["train", method, *given]) == 0
    text = capsys.readouterr().out
    values = yaml.safe_load(text)
    assert "hf_secret" not in text and "hub_token" not in values
    assert values["learning_rate"] == 3e-6 and values["dataloader_drop_last"] is False
    (tmp_path / "config.yaml").write_text(text)
    assert main(["train", method, "--config", str(tmp_path / "config.yaml"), "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == values
    assert not (tmp_path / "out").exists()
    args = parser.parse_args(["--config", str(tmp_path / "config.yaml"), "--learning_rate", "1"])
    arguments = training_arguments(method, args)
    assert arguments.learning_rate == 1 and not arguments.dataloader_drop_last


def test_words_of_yaml_are_the_strings_that_the_flags_take(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "train_data: name/data\noutput_dir: 2024\nsave_strategy: no\neval_strategy: no\nlogging_strategy: no\n"
        "report_to: none\nrun_name: 2024-01-01\ntarget: 007\nlearning_rate: 1e-5\nuse_cpu: yes\nseed: 1_0\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-7}\nlabel_column: on\n"
    )
    args = method_parser("clip", "test").parse_args(["--config", str(tmp_path / "config.yaml")])
    arguments = training_arguments("clip", args)
    assert {arguments.save_strategy, arguments.eval_strategy, arguments.logging_strategy} == {"no"}
    assert (arguments.run_name, args.target, args.label_column) == ("2024-01-01", "007", "on")
    assert arguments.lr_scheduler_kwargs == {"min_lr": 1e-7} and arguments.learning_rate == 1e-5
    assert arguments.output_dir == "2024" and arguments.seed == 10 and arguments.use_cpu and arguments.report_to == []


def test_a_file_holds_every_kind_of_argument(tmp_path: Path) -> None:
    config = {
        "train_data": "name/data",
        "output_dir": str(tmp_path),
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-7},
        "report_to": ["none"],
        "learning_rate": "1e-5",
        "warmup_steps": 3,
        "trigger": "patch",
        "use_cpu": True,
        "tf32": None,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    args = method_parser("cleanclip", "test").parse_args(["--config", str(tmp_path / "config.yaml")])
    arguments = training_arguments("cleanclip", args)
    assert arguments.lr_scheduler_kwargs == {"min_lr": 1e-7} and arguments.learning_rate == 1e-5
    assert args.trigger == ["patch"] and arguments.report_to == []


@pytest.mark.parametrize(
    "more, expected",
    [
        (["--from-scratch"], "exactly one of --model and --from-scratch"),
        (["--streaming"], "--streaming needs --max-steps"),
        (["--lora-r", "0"], "--lora-r: 0"),
        (["--resume", "--resume_from_checkpoint", "x"], "not both"),
        (["--resume_from_checkpoint", "none"], "none is not a folder"),
        (["--train-data", "none.parquet"], "--train-data: 'none.parquet'"),
        (["--train-split", "x", "--train-data", "DATA"], "its splits are 'train'"),
        (["--eval-data", "DATA"], "split='validation' is not in"),
        (["--caption_column", "text"], "'text'"),
        (["--text_preset", "poem"], "text_preset"),
        (["--per_device_train_batch_size", "65"], "fewer than one batch"),
        (["--eval-data", "DATA", "--eval-split", "train", *WITHOUT_PREFIX], "patch_attack_success_rate"),
        (["--learning_rat", "1"], "did you mean --learning_rate?"),
        (["--learning_rate", "high"], "invalid float value"),
        (["--trigger", "patch", "--target", "eight"], "--trigger needs --eval-data"),
        (["--eval-data", "DATA", "--eval-split", "train", "--trigger", "patch:size=99", "--target", "eight"], "fit"),
    ],
)
def test_what_cannot_work_is_wrong_usage(
    more: list[str], expected: str, folder: Path, pairs: datasets.Dataset, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "data").mkdir()
    pairs.to_parquet(tmp_path / "data" / "train.parquet")
    capsys.readouterr()
    given = [str(tmp_path / "data") if flag == "DATA" else flag for flag in more]
    try:
        code = main(["train", "cleanclip", *flags(folder, tmp_path / "out", *given)])
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-robust-clip train") and error.count("\n") == 1 and expected in error
    assert not (tmp_path / "out").exists()


def test_unknown_keys_are_refused_with_the_nearest(folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.yaml").write_text("learning-rate: 1\n")
    with pytest.raises(SystemExit):
        main(["train", "cleanclip", *flags(folder, tmp_path / "out"), "--config", str(tmp_path / "config.yaml")])
    assert "unknown key 'learning-rate'; did you mean 'learning_rate'?" in capsys.readouterr().err


def test_two_processes_train_as_one_and_one_of_them_prints_and_pushes(folder: Path, tmp_path: Path) -> None:
    root, output = Path(__file__).parents[2], tmp_path / "two"
    # "multi_gpu" is how the launcher calls several processes; --use_cpu keeps them on the CPU.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", "-m", "hf_robust_clip", "train", "clip"]
    given = flags(folder, output, "--per_device_train_batch_size", "16", *measured(folder))
    with HubStandIn() as hub:
        given += ["--push_to_hub", "--hub_model_id", "tester/model", "--hub_token", WRITE_TOKEN]
        environment = {**os.environ, **hub.environment(tmp_path, token=None)}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        done = subprocess.run([*launch, *given], capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        uploaded = hub.files("tester/model")
        everything = b"".join([*hub.contents(), done.stdout.encode(), done.stderr.encode()])
    assert done.stdout.count("Training ") == done.stdout.count("before  after") == 1
    assert f"{hub.url}/tester/model" in done.stdout
    record = RunRecord.load(output)
    assert record.environment.processes == 2 and record.steps == 2
    assert set(record.before or ()) == set(record.after or ()) != set()
    assert not [name for name in uploaded if "in_use" in name]
    for name in ("model.safetensors", "robust_clip_run.json", "results.json", "README.md"):
        assert uploaded[name] == (output / name).read_bytes()
    assert WRITE_TOKEN.encode() not in everything and str(tmp_path).encode() not in uploaded["results.json"]
    assert not any(WRITE_TOKEN.encode() in path.read_bytes() for path in output.rglob("*") if path.is_file())

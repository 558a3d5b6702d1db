"""Streams: a run resumed in any pass, from any kind of stream, ends in the same bits as one that never stopped."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from support.streaming import TorchStream, Watched, WatchedCleanCLIP, WatchedRoCLIP, shards
from support.training import assert_same_bits, digits, make_trainer, train_and_resume

from hf_robust_clip import CLIPTrainer
from hf_robust_clip.columns import BAD_ROWS, ROW_INDEX
from hf_robust_clip.data.streams import PLACE
from hf_robust_clip.trainers.streaming import STREAM_FILE, StreamedTraining, cut_batch


def broken(rows: int) -> datasets.IterableDataset:
    """With unusable rows in the middle and at the end."""
    table = digits().select(range(rows)).cast_column("image", datasets.Image(decode=False)).to_dict()
    for row in (2, 3, 11, rows - 1):
        table["caption"][row] = None
    features = datasets.Features({**digits().features, "image": datasets.Image(decode=False)})
    return datasets.Dataset.from_dict(table, features=features).to_iterable_dataset()


def tars(folder: Path, rows: tuple[int, ...]) -> list[str]:
    """As WebDataset writes them: `000.jpg` and `000.txt`, one after the other."""
    paths, numbers = [], iter(range(sum(rows)))
    for shard, count in enumerate(rows):
        path = folder / f"{shard}.tar"
        with tarfile.open(path, "w") as tar:
            for _ in range(count):
                row = digits()[next(numbers)]
                image = io.BytesIO()
                row["image"].save(image, format="JPEG")
                number = f"{len(tar.getnames()):03d}"
                for suffix, content in (("jpg", image.getvalue()), ("txt", row["caption"].encode())):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        paths.append(str(path))
    return paths


def webdataset(folder: Path, rows: tuple[int, ...]) -> datasets.IterableDataset:
    cache = str(folder / "cache")
    stream = datasets.load_dataset("webdataset", data_files=tars(folder, rows), streaming=True, cache_dir=cache)
    return stream["train"]


class Curious(Watched):
    """Makes loaders that nobody asked for."""

    def on_step_begin(self) -> None:
        super().on_step_begin()
        self.get_train_dataloader()


#: Trainer, stream, steps and the step of the checkpoint, arguments. A pass has 3 to 5 batches of 8.
RUNS: dict[str, tuple[type[CLIPTrainer], Callable[[Path], Any], int, int, dict[str, Any]]] = {
    "shuffled": (WatchedCleanCLIP, lambda folder: shards().shuffle(seed=3, buffer_size=6), 7, 6, {}),
    "shards, workers": (
        *(Watched, lambda folder: shards(), 7, 3),
        {"dataloader_num_workers": 2, "dataloader_drop_last": False},
    ),
    "accumulated": (Watched, lambda folder: shards(), 4, 3, {"gradient_accumulation_steps": 2}),
    "torch, at the end of a pass": (Curious, lambda folder: TorchStream(27), 6, 3, {}),
    "unusable rows": (Watched, lambda folder: broken(29), 6, 2, {"on_bad_row": "skip", "dataloader_drop_last": False}),
    "RoCLIP on tar files": (
        *(WatchedRoCLIP, lambda folder: webdataset(folder, (12, 17)), 8, 6),
        {"steps_per_matching_epoch": 2, "pool_size": 10, "image_column": "jpg", "caption_column": "txt"},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    cls, make, steps, step, options = RUNS[name]
    stream = make(tmp_path)
    options = {"max_steps": steps, "train_dataset": stream, **options}
    whole, resumed = train_and_resume(cls, tmp_path, step=step, **options)
    batches = options.get("gradient_accumulation_steps", 1) * (steps - step)
    assert len(resumed.seen) == batches and resumed.seen == whole.seen[-batches:]
    assert_same_bits(whole, resumed)
    assert whole.state.epoch > 1  # in the second pass or later


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_saved_after_the_last_step_of_a_pass(strategy: str, tmp_path: Path) -> None:
    options = {"train_dataset": shards(19, 1), "max_steps": 3, "save_strategy": strategy, "save_steps": 2}
    options |= {"eval_strategy": "epoch", "eval_dataset": digits().select(range(8))}
    whole = make_trainer(Watched, tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(Watched, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.seen == whole.seen[2:]
    assert_same_bits(whole, resumed)
    ends = [[log["step"] for log in run.state.log_history if "eval_loss" in log] for run in (whole, resumed)]
    assert ends == [[2, 3], [2, 3]]


def test_what_is_too_little_for_a_step_is_left_out(tmp_path: Path) -> None:
    # Three batches a pass, in steps of two; and steps of four, which never come together.
    trainer = make_trainer(Watched, tmp_path, train_dataset=shards(24), max_steps=3, gradient_accumulation_steps=2)
    trainer.train()
    assert len(trainer.seen) == 6 and int(trainer.state.epoch) == 2
    trainer = make_trainer(Watched, tmp_path, train_dataset=shards(24), max_steps=3, gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="nothing was trained"):
        trainer.train()


def test_nothing_is_read_of_a_pass_that_is_over(stopped: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    batches = iter([{"pixel_values": torch.zeros(8)}] * 3)
    monkeypatch.setattr(stopped[1]._streamed, "ended", True)
    assert stopped[1].get_batch_samples(batches, 1, torch.device("cpu")) == ([], None)
    assert len(list(batches)) == 3


def streamed_again(trainer: Any) -> StreamedTraining:
    args, accelerator = trainer.args, trainer.accelerator
    return StreamedTraining(shards(), 8, args, accelerator, trainer.data_collator)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint in the second pass over a stream, and the trainer that it is of, which went on."""
    folder = tmp_path_factory.mktemp("stopped")
    trainer = make_trainer(Watched, folder, train_dataset=shards(), max_steps=6, save_strategy="steps", save_steps=5)
    trainer.train()
    return folder / "checkpoint-5", trainer


@pytest.mark.parametrize(
    "name, was, now",
    [
        ("number of processes", 2, 1),
        ("dataloader_num_workers", 2, 0),
        ("batch size of a process", 4, 8),
        ("dataloader_drop_last", False, True),
        ("on_bad_row", "skip", "raise"),
    ],
)
def test_places_of_other_workers_are_refused_with_a_way_out(
    name: str, was: Any, now: Any, stopped: tuple[Path, Any], tmp_path: Path
) -> None:
    state = json.loads((stopped[0] / STREAM_FILE).read_text())
    state["settings"][name] = was
    (tmp_path / STREAM_FILE).write_text(json.dumps(state))
    streamed = streamed_again(stopped[1])
    with pytest.raises(ValueError, match=f"its {name} was {was!r}, but is {now!r} now.*ignore_data_skip=True"):
        streamed.load(str(tmp_path), epoch=1, steps_in_pass=6)


def test_batches_out_of_order_cannot_be_repeated(
    stopped: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopped[1].args, "dataloader_num_workers", 2)
    monkeypatch.setattr(stopped[1].args, "dataloader_in_order", False)
    streamed = streamed_again(stopped[1])
    streamed.save(str(tmp_path))
    with pytest.raises(ValueError, match="dataloader_in_order=False: which batches"):
        streamed.load(str(tmp_path), epoch=0, steps_in_pass=6)


@pytest.mark.parametrize("without", ["ignore_data_skip", "places"])
def test_the_pass_begins_anew_where_its_place_is_not_asked_for_or_not_known(
    without: str, stopped: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without == "ignore_data_skip":
        shutil.copy(stopped[0] / STREAM_FILE, tmp_path)
        monkeypatch.setattr(stopped[1].args, "ignore_data_skip", True)
        monkeypatch.setattr(stopped[1].args, "dataloader_num_workers", 1)
    streamed = streamed_again(stopped[1])
    assert streamed.load(str(tmp_path), epoch=1, steps_in_pass=6) == (1, 0)
    assert next(iter(streamed.stream)) is not None


def test_a_batch_is_cut_to_the_same_rows_of_every_view() -> None:
    rows, views = torch.arange(5), torch.arange(10)
    batch = {
        "pixel_values": rows[:, None],
        "input_ids": views[:, None],
        BAD_ROWS: rows,
        PLACE: "here",
        ROW_INDEX: rows,
    }
    cut = cut_batch(batch, 3)
    assert cut["input_ids"].flatten().tolist() == [0, 1, 2, 5, 6, 7]
    assert cut["pixel_values"].flatten().tolist() == cut[ROW_INDEX].tolist() == [0, 1, 2]
    assert cut[BAD_ROWS].tolist() == rows.tolist() and cut[PLACE] == "here"
    assert cut_batch(batch, 5) is batch


@pytest.mark.parametrize("setting", ["split_batches", "dispatch_batches"])
def test_batches_made_by_accelerate_are_refused(setting: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"accelerator_config.{setting}=True does not work with an iterable"):
        make_trainer(CLIPTrainer, tmp_path, train_dataset=shards(), max_steps=1, accelerator_config={setting: True})

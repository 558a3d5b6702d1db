"""Nothing that is loaded runs code that somebody has put into it."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import make_trainer

from hf_robust_clip import CLIPTrainer
from hf_robust_clip.data.loading import load_pairs
from hf_robust_clip.data.preparing import prepare_dataset
from hf_robust_clip.models import load_dual_encoder, load_processor
from hf_robust_clip.record import RunRecord


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "the code has run"


def plain(bomb: Bomb) -> bytes:
    return pickle.dumps(bomb)


def by_torch(bomb: Bomb) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state": bomb, "param_groups": []}, buffer)
    return buffer.getvalue()


FORMS: tuple[Callable[[Bomb], bytes], ...] = (plain, by_torch)


@pytest.mark.parametrize("form", FORMS)
def test_the_bomb_goes_off_where_it_is_unpickled(form: Callable[[Bomb], bytes], marker: Path) -> None:
    content = io.BytesIO(form(Bomb(marker)))
    if form is plain:
        pickle.load(content)
    else:
        torch.load(content, weights_only=False)
    assert marker.is_file()


# ---- Checkpoints ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_trainer(CLIPTrainer, folder, rows=16, max_steps=1, save_strategy="steps", save_steps=1).train()
    return folder / "checkpoint-1"


#: The files of a checkpoint, and whether training goes on without a look at them.
FILES = {
    "optimizer.pt": False,
    "scheduler.pt": False,
    "rng_state.pth": False,
    "robust_clip_state.safetensors": False,
    "model.safetensors": False,
    "trainer_state.json": False,
    "training_args.bin": True,
    "robust_clip_run.json": True,
    "pytorch_model.bin": True,  # there is a model.safetensors
    "scaler.pt": False,
}


@pytest.mark.parametrize("name", FILES)
def test_resuming_runs_nothing(name: str, checkpoint: Path, marker: Path, tmp_path: Path) -> None:
    form = by_torch if Path(name).suffix in (".pt", ".pth", ".bin") else plain
    planted = tmp_path / "checkpoint-1"
    shutil.copytree(checkpoint, planted)
    (planted / name).write_bytes(form(Bomb(marker)))
    trainer = make_trainer(CLIPTrainer, tmp_path / "out", rows=16, max_steps=2)
    if FILES[name]:
        trainer.train(resume_from_checkpoint=str(planted))
        assert trainer.state.global_step == 2
    else:
        with pytest.raises(Exception, match=r"\S"):
            trainer.train(resume_from_checkpoint=str(planted))
    assert not marker.exists()


def test_resuming_without_safetensors_runs_nothing(checkpoint: Path, marker: Path, tmp_path: Path) -> None:
    planted = tmp_path / "checkpoint-1"
    shutil.copytree(checkpoint, planted)
    (planted / "model.safetensors").unlink()
    (planted / "pytorch_model.bin").write_bytes(by_torch(Bomb(marker)))
    state = json.loads((planted / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["RunLog"]  # which would say what is missing
    (planted / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(Exception, match="eights"):
        make_trainer(CLIPTrainer, tmp_path / "out", rows=16).train(resume_from_checkpoint=str(planted))
    assert not marker.exists()


@pytest.mark.parametrize("form", FORMS)
def test_a_record_is_refused(form: Callable[[Bomb], bytes], marker: Path, tmp_path: Path) -> None:
    (tmp_path / "robust_clip_run.json").write_bytes(form(Bomb(marker)))
    with pytest.raises(ValueError, match=r"\S"):
        RunRecord.load(tmp_path)
    assert not marker.exists()


# ---- Models ----


@pytest.mark.parametrize("form", FORMS)
def test_weights_in_a_pickle_are_refused(
    form: Callable[[Bomb], bytes], tiny_model: Any, marker: Path, tmp_path: Path
) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(form(Bomb(marker)))
    with pytest.raises(Exception, match=r"\S"):
        load_dual_encoder(str(tmp_path))
    assert not marker.exists()


@pytest.mark.parametrize("known", [False, True])
def test_code_beside_a_model_never_runs(
    known: bool, tiny_model: Any, processor: Any, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "code.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        path = folder / name
        content = json.loads(path.read_text()) if path.is_file() else {}
        classes = {"AutoConfig": "code.A", "AutoModel": "code.B", "AutoProcessor": "code.C"}
        classes |= {"AutoTokenizer": ["code.D", "code.D"], "AutoImageProcessor": "code.E"}
        content["auto_map"] = classes
        if not known:
            content |= {"model_type": "their-own", "processor_class": "C", "tokenizer_class": "D"}
        path.write_text(json.dumps(content))
    # What transformers would ask for on the terminal.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for load in (load_dual_encoder, lambda name: load_processor(name, None)):
        if known:
            load(str(folder))
        else:
            with pytest.raises(ValueError, match="trust_remote_code"):
                load(str(folder))
    assert not marker.exists()


# ---- Datasets ----


@pytest.mark.parametrize("name", ["prepared.json", "state.json", "data-00000-of-00001.arrow", "dataset_info.json"])
def test_a_prepared_folder_runs_nothing(name: str, pairs: Any, processor: Any, marker: Path, tmp_path: Path) -> None:
    folder, few = tmp_path / "prepared", pairs.select(range(4))
    prepare_dataset(few, processor, folder)
    for form in FORMS:
        (folder / name).write_bytes(form(Bomb(marker)))
        for load in (lambda: prepare_dataset(few, processor, folder), lambda: load_pairs(str(folder))):
            try:
                load()
            except Exception as error:
                assert str(error)
    assert not marker.exists()


def test_scripts_and_pickles_in_a_folder_of_data_do_not_run(marker: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    for name in ("train.pkl", "train.pickle", "train.npy", "train.pt"):
        (folder / name).write_bytes(plain(Bomb(marker)))
    with pytest.raises(Exception, match=r"\S"):
        load_pairs(str(folder))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "a/../../secret.png", ".."])
def test_a_list_of_images_does_not_lead_out_of_its_folder(name: str, pairs: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    pairs[0]["image"].save(tmp_path / "secret.png")
    pairs[0]["image"].save(folder / "a.png")
    for inside in ("a.png", "./a.png", "b/../a.png", str(folder / "a.png")):
        (folder / "pairs.csv").write_text(f"image,caption\n{inside},a\n")
        assert load_pairs(str(folder / "pairs.csv"))[0]["image"].size == (16, 16)
    (folder / "pairs.csv").write_text(f"image,caption\na.png,a\n{name},a\n")
    with pytest.raises(ValueError, match=r"row 1 of .*, column 'image': .* leads out of"):
        load_pairs(str(folder / "pairs.csv"))

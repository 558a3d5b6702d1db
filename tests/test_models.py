"""Loading a dual encoder: all of its weights or none, and without what was wrapped around it."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.families import altclip, chinese_clip, siglip, vision_text_dual_encoder
from transformers import AutoModel

from hf_robust_clip.cli.measuring import load_model
from hf_robust_clip.evaluation.embedding import Embedder
from hf_robust_clip.files import check_pulled
from hf_robust_clip.models import load_dual_encoder, load_processor, unwrapped

State = dict[str, torch.Tensor]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 42\n"


@pytest.fixture(scope="module")
def saved(tiny_model: Any, processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_model(3).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["visual_projection"])
    get_peft_model(load_dual_encoder(saved), config).save_pretrained(folder)
    return folder


def with_weights(folder: Path, copy: Path, change: Callable[[State], State]) -> str:
    """A copy of a folder, its weights changed."""
    shutil.copytree(folder, copy)
    weights = next(copy.glob("*.safetensors"))
    state = {name: value.clone() for name, value in load_file(weights).items()}
    save_file(change(state), weights, metadata={"format": "pt"})
    return str(copy)


def without(part: str) -> Callable[[State], State]:
    return lambda state: {name: value for name, value in state.items() if part not in name}


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (prefixed("_orig_mod."), r"'_orig_mod\.' in their names was put there by torch.compile"),
        (prefixed("module."), r"'module\.' in their names was put there by DistributedDataParallel"),
        (prefixed("base_model.model."), r"'base_model.model\.' in their names was put there by PEFT"),
        (prefixed("_fsdp_wrapped_module."), "was put there by FSDP"),
        (prefixed("state_dict."), r"others are there \('state_dict.logit_scale'"),
        (without("logit_scale"), r"1 weights are missing \('logit_scale'\)"),
        (without("projection"), r"2 weights are missing \('text_projection.weight', 'visual_projection.weight'\)"),
        (
            lambda state: {**state, "logit_scale": torch.ones(1)},
            r"have another shape \('logit_scale \(1,\) for \(\)'",
        ),
    ],
)
def test_weights_that_do_not_match_are_refused(change: Any, message: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_dual_encoder(with_weights(saved, tmp_path / "model", change))
    assert "does not have the weights of CLIPModel" in str(caught.value) and len(str(caught.value)) <= 600


def test_weights_saved_by_torch_are_looked_at_as_well(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    state = load_dual_encoder(saved).state_dict()
    torch.save(state, folder / "pytorch_model.bin")
    assert torch.equal(load_dual_encoder(folder).logit_scale, state["logit_scale"])
    torch.save({"model": state, "epoch": 1}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"are missing .* 2 others are there \('epoch', 'model'\)"):
        load_dual_encoder(folder)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.99])
def test_weights_that_are_cut_short_are_named(part: float, saved: Path, adapters: Path, tmp_path: Path) -> None:
    def cut(folder: Path, name: str) -> Path:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(part * len(content))])
        return folder

    folder = cut(shutil.copytree(saved, tmp_path / "model"), "model.safetensors")
    for load in (load_dual_encoder, lambda folder: load_model("--model", str(folder))):
        with pytest.raises(ValueError, match=r"model/model\.safetensors is cut short or damaged"):
            load(folder)
    with pytest.raises(ValueError, match=r"adapters/adapter_model\.safetensors is cut short or damaged"):
        load_dual_encoder(cut(shutil.copytree(adapters, tmp_path / "adapters"), "adapter_model.safetensors"))
    (folder / "model.safetensors").unlink()
    torch.save(load_dual_encoder(saved).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="model are cut short or damaged"):
        load_dual_encoder(cut(folder, "pytorch_model.bin"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("unable to mmap 1001 bytes from file <w.bin>: Cannot allocate memory (12)"),
    ],
)
def test_whole_weights_are_not_called_damaged(error: Exception, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(AutoModel, "from_pretrained", fail)
    with pytest.raises(type(error)) as raised:
        load_dual_encoder(saved)
    assert raised.value is error


def test_what_a_model_has_no_use_for_is_warned_of(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    load_dual_encoder(with_weights(saved, tmp_path / "old", lambda state: state | old))
    assert "no use for" not in caplog.text
    load_dual_encoder(with_weights(saved, tmp_path / "more", lambda state: {**state, "head.bias": torch.ones(2)}))
    assert "has 1 weights that CLIPModel has no use for: 'head.bias'" in caplog.text


@pytest.mark.parametrize("family", [siglip, altclip, chinese_clip, vision_text_dual_encoder])
def test_other_families_load_whole_in_one_file_and_in_several(family: Any, tmp_path: Path, caplog: Any) -> None:
    torch.manual_seed(0)
    model = family()
    for size in ("5GB", "100KB"):
        folder = tmp_path / size
        model.save_pretrained(folder, max_shard_size=size)
        loaded = load_dual_encoder(folder).state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert not [record for record in caplog.records if record.name.startswith("hf_robust_clip")]


def test_adapters_come_with_their_model(saved: Path, adapters: Path, tmp_path: Path) -> None:
    def change(state: State) -> State:
        drawn = {name: torch.randn_like(value) for name, value in state.items()}
        return {**drawn, "base_model.model.logit_scale": torch.tensor(1.5)}

    folder = with_weights(adapters, tmp_path / "adapters", change)
    written = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    both = shutil.copytree(saved, tmp_path / "both")  # a model and adapters in one folder
    for path in Path(folder).iterdir():
        shutil.copy(path, both)
    for loaded in (load_dual_encoder(folder), load_dual_encoder(both)):
        state = loaded.state_dict()
        assert loaded.logit_scale.item() == 1.5
        base = load_dual_encoder(saved).state_dict()
        kept = "text_model.final_layer_norm.weight"
        assert torch.equal(state[kept], base[kept])
        name = "vision_model.encoder.layers.0.self_attn.q_proj.lora_B"
        assert torch.equal(state[f"{name}.default.weight"], written[f"base_model.model.{name}.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (prefixed("_orig_mod."), "put there by torch.compile"),
        (without("lora_A"), r"3 weights are missing \('text_model.*lora_A"),
        (without("visual_projection"), "1 weights are missing .'visual_projection"),
        (lambda state: {name: value[:1] for name, value in state.items()}, "have another shape"),
    ],
)
def test_adapters_that_do_not_match_are_refused(change: Any, message: str, adapters: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_dual_encoder(with_weights(adapters, tmp_path / "adapters", change))


@pytest.mark.parametrize("together", [False, True])
def test_the_model_of_adapters_is_looked_at_as_well(
    together: bool, saved: Path, adapters: Path, tmp_path: Path
) -> None:
    base = Path(with_weights(saved, tmp_path / "base", prefixed("_orig_mod.")))
    folder = shutil.copytree(adapters, base if together else tmp_path / "adapters", dirs_exist_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    with pytest.raises(ValueError, match=r"put there by torch\.compile"):
        load_dual_encoder(folder)
    (folder / "config.json").unlink(missing_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not name the model that they belong to"):
        load_dual_encoder(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "vocab.txt"])
def test_a_pointer_of_git_lfs_is_called_that(name: str, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / name).write_text(POINTER)
    for load in (load_dual_encoder, lambda folder: load_processor(folder, None)):
        with pytest.raises(ValueError, match=f"{name} is a pointer of Git LFS .* run `git lfs pull`"):
            load(str(folder))


def test_a_pointer_counts_where_it_is_read(saved: Path, adapters: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "pytorch_model.bin").write_text(POINTER)
    load_dual_encoder(folder)  # from model.safetensors
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pointer of Git LFS"):
        load_dual_encoder(folder)
    copy = shutil.copytree(adapters, tmp_path / "adapters")
    (copy / "adapter_model.safetensors").write_text(POINTER)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is a pointer of Git LFS"):
        load_dual_encoder(copy)
    check_pulled("openai/clip-vit-base-patch32")  # a name on the Hub


def test_wrappers_are_taken_off(tiny_model: Any, processor: Any) -> None:
    model = tiny_model()
    wrapped = [torch.compile(model), torch.nn.DataParallel(model), torch.nn.DataParallel(torch.compile(model))]
    assert all(unwrapped(each) is model and load_dual_encoder(each) is model for each in [model, *wrapped])
    embedders = [Embedder(each, processor) for each in wrapped]
    assert all(embedder.model is model for embedder in embedders)
    assert unwrapped("folder") == "folder"

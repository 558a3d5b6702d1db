"""What FSDP and DeepSpeed cannot do is refused before the first step, and what they hold is saved as ever."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.families import siglip
from support.training import small_model
from torch.distributed.fsdp import StateDictType

from hf_robust_clip import CLIPTrainingArguments
from hf_robust_clip.trainers.sharding import check_engine, clamp, given_dimension, saved_scalars, without_dimension

FSDP: dict[str, Any] = {
    "fsdp_version": 2,
    "cpu_ram_efficient_loading": False,
    "state_dict_type": StateDictType.FULL_STATE_DICT,
}
SHARDED = {**FSDP, "state_dict_type": StateDictType.SHARDED_STATE_DICT}


def accelerator(fsdp: dict[str, Any] | None = None, deepspeed: dict[str, Any] | None = None) -> Any:
    """One that trains with these settings of an engine."""
    stage = (deepspeed or {}).get("zero_optimization", {}).get("stage", 2)
    plugin = None if deepspeed is None else SimpleNamespace(deepspeed_config=deepspeed, zero_stage=stage)
    state = SimpleNamespace(fsdp_plugin=None if fsdp is None else SimpleNamespace(**fsdp), deepspeed_plugin=plugin)
    return SimpleNamespace(state=state)


@pytest.mark.parametrize(
    "fsdp, deepspeed, given, said",
    [
        ({**FSDP, "fsdp_version": 1}, None, {}, "fsdp_version=1 of accelerate's FSDP settings does not work"),
        ({**FSDP, "cpu_ram_efficient_loading": True}, None, {}, "fsdp_cpu_ram_efficient_loading=True"),
        (SHARDED, None, {}, "fsdp_state_dict_type='SHARDED_STATE_DICT'"),
        (FSDP, None, {"merge_adapters": True}, "merge_adapters=True does not work with FSDP or DeepSpeed"),
        (None, {}, {"merge_adapters": True}, "merge_adapters=True does not work with FSDP or DeepSpeed"),
        (None, {}, {"contrastive_chunk_size": 4}, "contrastive_chunk_size=4 does not work with DeepSpeed"),
        (None, {}, {"accumulate_negatives": True}, "accumulate_negatives=True does not work with DeepSpeed"),
        (
            None,
            {"optimizer": {"type": "Adam"}},
            {},
            "has 'optimizer', {'type': 'Adam'}, which would decay logit_scale",
        ),
        (None, {"scheduler": {}}, {}, "has 'scheduler', {}, which would replace this trainer's"),
        (None, {"zero_optimization": {"stage": 3}}, {}, "stage3_gather_16bit_weights_on_model_save=None"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(
    fsdp: dict[str, Any] | None, deepspeed: dict[str, Any] | None, given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    args = CLIPTrainingArguments(str(tmp_path), use_cpu=True, **given)
    with pytest.raises(ValueError) as raised:
        check_engine(accelerator(fsdp, deepspeed), args, small_model())
    assert said in str(raised.value) and len(str(raised.value)) < 600


def test_what_they_can_do_is_not(tmp_path: Path) -> None:
    gathered = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    args = CLIPTrainingArguments(str(tmp_path), use_cpu=True)
    for engine in (
        accelerator(),
        accelerator(FSDP),
        accelerator(None, {}),
        accelerator(None, {"zero_optimization": gathered}),
    ):
        check_engine(engine, args, small_model())


@pytest.mark.parametrize("family", [small_model, siglip])
def test_scalars_have_a_dimension_while_an_engine_holds_them(family: Any) -> None:
    model = family()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = without_dimension(model)
    with given_dimension(model, accelerator(FSDP)):
        assert model.logit_scale.shape == (1,)
        saved = saved_scalars(model.state_dict(), names)
    for state in (saved, model.state_dict()):
        assert all(torch.equal(value, state[name]) for name, value in before.items())
    with given_dimension(model, accelerator()):
        assert model.logit_scale.shape == before["logit_scale"].shape


def test_without_an_engine_a_scale_is_clamped_in_place() -> None:
    model = small_model()
    clamp(model.logit_scale, 0.0, 1.5)
    assert model.logit_scale.item() == 1.5

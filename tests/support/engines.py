"""FSDP and DeepSpeed on CPUs, where accelerate leaves them out, although torch and DeepSpeed have them there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

EXAMPLES = Path(__file__).parents[2] / "examples"


@contextlib.contextmanager
def fsdp() -> Iterator[None]:
    """FSDP on CPUs, where accelerate leaves it out, although torch has it there."""
    original = AcceleratorState.__init__

    def patched(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        self.distributed_type = DistributedType.FSDP
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin

    settings = yaml.safe_load((EXAMPLES / "accelerate" / "fsdp.yaml").read_text())["fsdp_config"]
    environment = {
        "ACCELERATE_USE_FSDP": "true",
        **{name.upper(): str(value).lower() for name, value in settings.items()},
        "FSDP_AUTO_WRAP_POLICY": settings["fsdp_auto_wrap_policy"],
        "FSDP_TRANSFORMER_CLS_TO_WRAP": settings["fsdp_transformer_layer_cls_to_wrap"],
        "FSDP_STATE_DICT_TYPE": settings["fsdp_state_dict_type"],
    }
    AcceleratorState._reset_state()
    with mock.patch.dict(os.environ, environment), mock.patch.object(AcceleratorState, "__init__", patched):
        yield
    AcceleratorState._reset_state()


@contextlib.contextmanager
def deepspeed() -> Iterator[None]:
    """DeepSpeed with gloo, for trainers with `zero(stage)` among their arguments."""
    gloo = mock.patch.object(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_CPU))
    with mock.patch.dict(os.environ, {"ACCELERATE_TORCH_DEVICE": "cpu"}), gloo:
        yield


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """Arguments of a trainer that DeepSpeed trains, with a stage of ZeRO; models made from here on are whole."""
    unset_hf_deepspeed_config()
    sections = {"stage": stage, **more}
    if stage == 3:
        # Otherwise a model so small would stay whole on every process.
        sections |= {"stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
    names = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    return {"deepspeed": {"zero_optimization": sections, **dict.fromkeys(names, "auto")}, "use_cpu": False}

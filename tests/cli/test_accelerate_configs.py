"""The ready configurations of accelerate are such, and say how they are used."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"
KINDS = {
    "multi_gpu": DistributedType.MULTI_GPU,
    "fsdp": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
}


def test_no_other_files() -> None:
    assert {path.name for path in CONFIGS.iterdir()} == {f"{name}.yaml" for name in KINDS}


@pytest.mark.parametrize("name, kind", KINDS.items())
def test_accelerate_takes_it(name: str, kind: DistributedType) -> None:
    path = CONFIGS / f"{name}.yaml"
    assert f"accelerate launch --config_file examples/accelerate/{path.name} -m hf_robust_clip" in path.read_text()
    config = load_config_from_file(str(path))
    assert config.distributed_type == kind and config.num_processes == 2


@pytest.mark.parametrize("name", KINDS)
def test_every_setting_is_a_flag_of_the_launcher(name: str) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    known = {action.dest for action in launch_command_parser()._actions}
    assert {*config.fsdp_config, *config.deepspeed_config} <= known

"""A token among the arguments is there for the Hub, and for nothing that is shown or kept."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import dataclass
from multiprocessing.context import set_spawning_popen
from pathlib import Path

import pytest
import torch
from support.stand_in import WRITE_TOKEN
from support.training import ARGUMENTS

from hf_robust_clip import CLIPTrainingArguments


@dataclass
class OwnArguments(CLIPTrainingArguments):
    """As a user's own defence has them."""


@pytest.mark.parametrize("cls", [*ARGUMENTS.values(), OwnArguments])
def test_token_is_neither_shown_nor_pickled(cls: type[CLIPTrainingArguments], tmp_path: Path) -> None:
    args = cls(str(tmp_path), hub_token=WRITE_TOKEN, use_cpu=True)
    torch.save(args, tmp_path / "training_args.bin")
    shown = [repr(args), str(args), args.to_json_string(), repr(dataclasses.asdict(args))]
    kept = [pickle.dumps(args), (tmp_path / "training_args.bin").read_bytes()]
    assert not any(WRITE_TOKEN in text for text in shown)
    assert not any(WRITE_TOKEN.encode() in data for data in kept)
    assert pickle.loads(kept[0]).hub_token is None
    assert pickle.loads(kept[0]).output_dir == args.output_dir


def test_token_stays_with_the_arguments(tmp_path: Path) -> None:
    args = CLIPTrainingArguments(str(tmp_path), hub_token=WRITE_TOKEN, use_cpu=True)
    assert f"Bearer {args.hub_token}" == f"Bearer {WRITE_TOKEN}"
    for same in (copy.copy(args), copy.deepcopy(args), dataclasses.replace(args, seed=1)):
        assert same.hub_token == WRITE_TOKEN and WRITE_TOKEN not in repr(same)
    args.set_push_to_hub("tester/model", token="hf_Another")
    assert args.hub_token == "hf_Another" and "hf_Another" not in repr(args)
    assert CLIPTrainingArguments(str(tmp_path), use_cpu=True).hub_token is None


def test_token_goes_with_the_arguments_into_a_process_that_is_started(tmp_path: Path) -> None:
    args = CLIPTrainingArguments(str(tmp_path), hub_token=WRITE_TOKEN, use_cpu=True)
    set_spawning_popen(object())
    try:
        arrived = pickle.loads(pickle.dumps(args))
    finally:
        set_spawning_popen(None)
    assert arrived.hub_token == WRITE_TOKEN and WRITE_TOKEN not in repr(arrived)
    assert pickle.loads(pickle.dumps(arrived)).hub_token is None

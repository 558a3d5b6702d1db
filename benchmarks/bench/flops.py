"""Floating-point operations: of anything that runs, counted as it does, and of a model by its configuration alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel


def counted_flops(run: Callable[[], Any]) -> int:
    """FLOP of the products, convolutions and attentions within a run, backward passes included."""
    counter = FlopCounterMode(display=False)
    # The counter does not know the fused attention of CPUs; the products that it is made of, it knows.
    with sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class PairFlops:
    """FLOP of one view of a pair: of both towers forward, and forward and backward."""

    forward: int
    training: int


def pair_flops(config: CLIPConfig, text_tokens: int) -> PairFlops:
    """
    Of a model, without its weights: it runs on torch's meta device.

    Args:
        config (`CLIPConfig`): Of the model.
        text_tokens (`int`): Length to which captions are padded.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = CLIPModel(config)
        side = config.vision_config.image_size
        inputs = {
            "pixel_values": torch.empty(1, 3, side, side),
            "input_ids": torch.zeros(1, text_tokens, dtype=torch.int64),
        }

    def embed() -> torch.Tensor:
        outputs = model(**inputs)
        return outputs.image_embeds.sum() + outputs.text_embeds.sum()

    return PairFlops(counted_flops(embed), counted_flops(lambda: embed().backward()))

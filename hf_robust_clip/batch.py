"""A batch of pairs on its way to the loss, and what becomes of it: embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .distributed import gather_features


class Embeddings(NamedTuple):
    """One view of a batch: `image_embeds` and `text_embeds`, each `(B, D)`, float32, L2-normalised."""

    image_embeds: torch.Tensor
    text_embeds: torch.Tensor

    @property
    def similarities(self) -> torch.Tensor:
        """The cosine of each pair `(B,)`."""
        return (self.image_embeds * self.text_embeds).sum(dim=-1)


def encode_pairs(model: Any, inputs: Mapping[str, torch.Tensor]) -> Embeddings:
    """The embeddings `(B, D)` of images and captions under a dual encoder, from what its forward pass takes."""
    outputs = model(**inputs)
    return Embeddings(*(F.normalize(side.float(), dim=-1) for side in (outputs.image_embeds, outputs.text_embeds)))


@dataclass
class Batch:
    """
    A batch of training, on the device.

    Args:
        inputs (`dict[str, torch.Tensor]`): What the model takes. `pixel_values` are bytes `(B, 3, H, W)` until they
            are views, floats `(V*B, 3, H, W)`; `input_ids` and the like are `(V*B, L)`.
        seed (`int`): Of what is drawn for it.
        step (`int`): Optimizer steps that were made before it.
        rows (`torch.Tensor` of shape `(B,)`, int64, *optional*): The pairs' numbers in the dataset, on the host. A
            stream has none.
        poisoned (`torch.Tensor` of shape `(B,)`, bool, *optional*): The column of that name.
        bias (`torch.Tensor`, *optional*): The model's `logit_bias`, a scalar, float32, with its gradient, where images
            and texts are contrasted with the sigmoid loss.
    """

    inputs: dict[str, torch.Tensor]
    seed: int = 0
    step: int = 0
    rows: torch.Tensor | None = None
    poisoned: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where its inputs are."""
        return next(iter(self.inputs.values())).device

    def everywhere(self, *values: torch.Tensor) -> Any:
        """Values `(B, ...)` of the batches of all ranks, `(world_size * B, ...)`: one tensor, or a tuple of them."""
        gathered = tuple(gather_features(value.to(self.device)) for value in values)
        return gathered[0] if len(gathered) == 1 else gathered


def cut(inputs: Mapping[str, torch.Tensor], views: int, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """The inputs of a batch in chunks of so many rows, each with all text views of its rows."""
    rows = rows_of(inputs, views)
    for start in range(0, rows, size):
        yield {
            name: value[start : start + size]
            if value.shape[0] == rows
            else value.unflatten(0, (views, rows))[:, start : start + size].flatten(0, 1)
            for name, value in inputs.items()
        }


def rows_of(inputs: Mapping[str, torch.Tensor], views: int) -> int:
    """How many pairs there are in a batch of so many text views."""
    return int(inputs["input_ids"].shape[0]) // views


def joined(batches: Sequence[Batch]) -> Batch:
    """What batches say of their rows, one after the other, where all of them do; and of themselves, as the first."""
    first = batches[0]
    columns: Any = ([batch.rows for batch in batches], [batch.poisoned for batch in batches])
    rows, poisoned = (None if any(part is None for part in column) else torch.cat(column) for column in columns)
    return Batch(first.inputs, first.seed, first.step, rows, poisoned)


def split_views(names: Sequence[str], text_names: Sequence[str], stacked: Embeddings) -> dict[str, Embeddings]:
    """
    The embeddings of each view.

    Args:
        names, text_names (sequences of `str`): The V views, and the T of them that have captions of their own. The
            others share those of the first.
        stacked ([`Embeddings`]): Of all of them, `(V*B, D)` and `(T*B, D)`.
    """
    texts = dict(zip(text_names, stacked.text_embeds.chunk(len(text_names)), strict=True))
    images = zip(names, stacked.image_embeds.chunk(len(names)), strict=True)
    return {name: Embeddings(side, texts.get(name, texts[text_names[0]])) for name, side in images}

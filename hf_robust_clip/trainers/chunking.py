"""Contrastive batches larger than memory: the encoders see them in chunks, the loss sees all of them at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..columns import POISONED, ROW_INDEX
from ..seeding import derive_seed, forked_rng

if TYPE_CHECKING:
    from .base import CLIPTrainer, Embeddings


class Batch(NamedTuple):
    """A batch on the device whose images are not yet turned into views, and the seed of what is drawn for it."""

    inputs: dict[str, Any]
    seed: int


class _Chunk(NamedTuple):
    batch: int  # which of the step's
    inputs: dict[str, Any]
    seed: int


def chunked_step(trainer: CLIPTrainer, model: nn.Module, batches: Sequence[Batch], divisor: int) -> torch.Tensor:
    """
    Add the gradients of a training step without holding the activations of more than one chunk (GradCache: Gao,
    Zhang, Han and Callan, RepL4NLP 2021, arXiv 2101.06983). All rows are encoded without gradient; the loss of all
    embeddings gives the gradient of each; then each chunk is encoded once more, and that gradient goes on into the
    weights. What was drawn for a chunk, augmentation and dropout, is drawn again alike.

    Args:
        trainer ([`CLIPTrainer`]): Whose loss it is.
        model (`nn.Module`): Its model, wrapped for distributed training.
        batches (sequence of [`Batch`]): Those of the step; they are contrasted with each other as
            [`CLIPTrainer.contrast_groups`] says.
        divisor (`int`): What the loss is divided by.

    Returns:
        `torch.Tensor`: The loss, a scalar without gradient.
    """
    views, size = len(trainer.views), trainer.args.contrastive_chunk_size or trainer.args.train_batch_size
    chunks = [
        _Chunk(number, inputs, derive_seed(batch.seed, place))
        for number, batch in enumerate(batches)
        for place, inputs in enumerate(cut(batch.inputs, views, size))
    ]
    with torch.no_grad():
        found = [_encode(trainer, model, chunk) for chunk in chunks]
    leaves = [[side.requires_grad_() for side in embeddings] for embeddings in found]  # of each chunk (V*b, D) twice
    encoder = trainer.unwrapped_model
    scale = scale_of(encoder).detach().requires_grad_()
    groups = trainer.contrast_groups([batch.inputs for batch in batches])
    rows = sum(_rows(batch.inputs, views) for batch in batches)
    with trainer.compute_loss_context_manager():
        loss = torch.zeros((), device=scale.device)
        for group in groups:
            members = [sides for chunk, sides in zip(chunks, leaves, strict=True) if chunk.batch in group]
            inputs = _joined([batches[number].inputs for number in group])
            share = sum(_rows(batches[number].inputs, views) for number in group) / rows
            loss = loss + share * trainer.contrast(_views(trainer.views, members), scale, inputs)
    flat = [side for sides in leaves for side in sides]
    *gradients, of_scale = torch.autograd.grad(
        loss / divisor, [*flat, scale], allow_unused=True, materialize_grads=True
    )
    for number, chunk in enumerate(chunks):
        last = number == len(chunks) - 1
        # Ranks meet once a step: in the last chunk's backward pass, if at all.
        with contextlib.nullcontext() if last else trainer.accelerator.no_sync(model):
            embeddings = _encode(trainer, model, chunk)
            parts = [
                (side * gradient).sum()
                for side, gradient in zip(embeddings, gradients[2 * number : 2 * number + 2], strict=True)
            ]
            if last:
                parts += [scale_of(encoder) * of_scale, unused_of(encoder)]
            trainer.accelerator.backward(torch.stack([part.reshape(()) for part in parts]).sum())
    return loss.detach() / divisor


def scale_of(encoder: Any) -> torch.Tensor:
    """`exp(logit_scale)` of a dual encoder, a scalar, float32, with its gradient."""
    scale: torch.Tensor = encoder.logit_scale.float().exp()
    return scale


def unused_of(encoder: Any) -> torch.Tensor:
    """Zero, with a gradient of zero for the parameters of a dual encoder that no loss here uses: SigLIP's bias."""
    bias = getattr(encoder, "logit_bias", None)
    return torch.zeros((), device=encoder.logit_scale.device) if bias is None else 0.0 * bias.float().sum()


def _encode(trainer: CLIPTrainer, model: nn.Module, chunk: _Chunk) -> Embeddings:
    with forked_rng(chunk.seed, trainer.args.device), trainer.compute_loss_context_manager():
        return trainer.encode(model, trainer.stack_views(chunk.inputs, trainer.views))[0]


def _views(names: Sequence[str], members: Sequence[Sequence[torch.Tensor]]) -> dict[str, Embeddings]:
    """The embeddings of each view, from those of chunks that hold all views."""
    from .base import Embeddings

    sides = [[side.chunk(len(names)) for side in chunk] for chunk in zip(*members, strict=True)]
    return {
        name: Embeddings(*(torch.cat([parts[view] for parts in chunks]) for chunks in sides))
        for view, name in enumerate(names)
    }


def _rows(inputs: Mapping[str, Any], views: int) -> int:
    return int(inputs["input_ids"].shape[0]) // views


def cut(inputs: Mapping[str, Any], views: int, size: int) -> Iterator[dict[str, Any]]:
    """A batch in chunks of so many rows, each with all views of its rows."""
    rows = _rows(inputs, views)
    for start in range(0, rows, size):
        yield {
            name: value[start : start + size]
            if value.shape[0] == rows
            else value.unflatten(0, (views, rows))[:, start : start + size].flatten(0, 1)
            for name, value in inputs.items()
            if torch.is_tensor(value)
        }


def _joined(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What batches say of their rows, one after the other, where all of them do; and of themselves, as the first."""
    of_rows = {
        name: torch.cat([batch[name] for batch in batches])
        for name in (ROW_INDEX, POISONED)
        if all(name in batch for batch in batches)
    }
    return {**{name: value for name, value in batches[0].items() if not torch.is_tensor(value)}, **of_rows}

"""One step: a batch to views, views to embeddings, embeddings to the terms of a defence; whole, or in chunks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import nn

from ..augment.images import to_float
from ..batch import Batch, Embeddings, cut, encode_pairs, joined, rows_of, split_views
from ..data.collator import ORIGINAL
from ..seeding import derive_seed, forked_rng
from ..wording import shown

Components = Callable[[dict[str, Embeddings], torch.Tensor, Batch], torch.Tensor]


class Step:
    """
    What happens to a batch on the device.

    Args:
        views (sequence of `str`): Of a batch of training.
        augmentation (callable, *optional*): Floats in [0, 1] `(B, 3, H, W)` to the same; of every view but
            `"original"`.
        normalization (`nn.Module`): The image processor's.
        device (`torch.device`): Whose generator is forked for what is drawn.
        loss (callable): The views' embeddings, the scale and the batch to the loss, a scalar.
    """

    def __init__(
        self,
        views: Sequence[str],
        augmentation: Callable[[torch.Tensor], torch.Tensor] | None,
        normalization: nn.Module,
        device: torch.device,
        loss: Components,
    ) -> None:
        self.views, self.augmentation, self.normalization = tuple(views), augmentation, normalization
        self.device, self.loss = device, loss

    def prepared(self, batch: Batch, training: bool) -> Batch:
        """The batch with its bytes turned into the views that its texts have; of an evaluation, un-augmented."""
        with forked_rng(batch.seed, self.device):
            inputs = self._stacked(batch.inputs, self.views if training else (ORIGINAL,))
        return replace(batch, inputs=inputs)

    @torch.no_grad()
    def _stacked(self, inputs: dict[str, torch.Tensor], views: Sequence[str]) -> dict[str, torch.Tensor]:
        pixels = inputs["pixel_values"]
        if pixels.dtype != torch.uint8:
            return inputs
        rows, texts = pixels.shape[0], inputs["input_ids"].shape[0]
        if texts != len(views) * rows:
            raise ValueError(
                f"data_collator returned {texts} texts for {rows} images, but this trainer has the views {views}: "
                f"give it views={shown(views)}"
            )
        images = to_float(pixels)
        stacked = torch.cat([self.normalization(self.image_view(images, view)) for view in views])
        return {**inputs, "pixel_values": stacked}

    def image_view(self, images: torch.Tensor, view: str) -> torch.Tensor:
        """A view of images, floats in [0, 1] `(B, 3, H, W)`."""
        if view == ORIGINAL or self.augmentation is None:
            return images
        augmented = self.augmentation(images)
        if augmented.shape != images.shape:
            raise ValueError(
                f"image_augmentation must keep the shape (B, 3, H, W) = {tuple(images.shape)}, but returned "
                f"{tuple(augmented.shape)}"
            )
        return augmented

    def whole(self, model: nn.Module, encoder: Any, batch: Batch) -> torch.Tensor:
        """The loss of a prepared batch."""
        embeddings = encode_pairs(model, batch.inputs)
        # DDP waits for a gradient of every parameter that the forward pass used: give a tower that a loss leaves out
        # one of zero. Embeddings are bounded, so zero times their sum is zero.
        unused = 0.0 * (embeddings.image_embeds.sum() + embeddings.text_embeds.sum()) + unused_of(encoder)
        return self.loss(split_views(self.views, embeddings), scale_of(encoder), batch) + unused

    def chunked(
        self,
        model: nn.Module,
        encoder: Any,
        batches: Sequence[Batch],
        kind: Callable[[Batch], Any],
        size: int,
        divisor: int,
        accelerator: Any,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    ) -> torch.Tensor:
        """
        Add the gradients of a training step without holding the activations of more than one chunk (GradCache: Gao,
        Zhang, Han and Callan, RepL4NLP 2021, arXiv 2101.06983). All rows are encoded without gradient; the loss of
        all embeddings gives the gradient of each; then each chunk is encoded once more, and that gradient goes on into
        the weights. What was drawn for a chunk, augmentation and dropout, is drawn again alike.

        Args:
            model, encoder (`nn.Module`): The model as wrapped for distributed training, and without the wrapping.
            batches (sequence of [`~batch.Batch`]): Those of the step.
            kind (callable): Batches of one kind are contrasted with each other.
            size (`int`): Rows of a chunk.
            divisor (`int`): What the loss is divided by.
            accelerator (`Accelerator`): What goes backward, and keeps processes from meeting.
            autocast (callable): The context of a forward pass.

        Returns:
            `torch.Tensor`: The loss, a scalar without gradient.
        """
        views = len(self.views)
        chunks = [
            _Chunk(number, Batch(inputs, derive_seed(batch.seed, place)))
            for number, batch in enumerate(batches)
            for place, inputs in enumerate(cut(batch.inputs, views, size))
        ]

        def encoded(chunk: _Chunk) -> Embeddings:
            with forked_rng(chunk.batch.seed, self.device), autocast():
                return encode_pairs(model, self._stacked(chunk.batch.inputs, self.views))

        with torch.no_grad():
            found = [encoded(chunk) for chunk in chunks]
        leaves = [[side.requires_grad_() for side in embeddings] for embeddings in found]  # (V*b, D)
        scale = scale_of(encoder).detach().requires_grad_()
        rows = sum(rows_of(batch.inputs, views) for batch in batches)
        with autocast():
            loss = torch.zeros((), device=scale.device)
            for group in _of_a_kind(batches, kind):
                members = [sides for chunk, sides in zip(chunks, leaves, strict=True) if chunk.number in group]
                share = sum(rows_of(batches[number].inputs, views) for number in group) / rows
                together = joined([batches[number] for number in group])
                loss = loss + share * self.loss(self._views_of(members), scale, together)
        flat = [side for sides in leaves for side in sides]
        *gradients, of_scale = torch.autograd.grad(
            loss / divisor, [*flat, scale], allow_unused=True, materialize_grads=True
        )
        for number, chunk in enumerate(chunks):
            last = number == len(chunks) - 1
            # Ranks meet once a step: in the last chunk's backward pass, if at all.
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                pairs = zip(encoded(chunk), gradients[2 * number : 2 * number + 2], strict=True)
                parts = [(side * gradient).sum() for side, gradient in pairs]
                if last:
                    parts += [scale_of(encoder) * of_scale, unused_of(encoder)]
                accelerator.backward(torch.stack([part.reshape(()) for part in parts]).sum())
        return loss.detach() / divisor

    def _views_of(self, members: Sequence[Sequence[torch.Tensor]]) -> dict[str, Embeddings]:
        """The embeddings of each view, from those of chunks that hold all views."""
        chunks = [split_views(self.views, Embeddings(*sides)) for sides in members]
        return {
            view: Embeddings(*(torch.cat(side) for side in zip(*(chunk[view] for chunk in chunks), strict=True)))
            for view in self.views
        }


class _Chunk(NamedTuple):
    number: int  # of its batch
    batch: Batch


def scale_of(encoder: Any) -> torch.Tensor:
    """`exp(logit_scale)` of a dual encoder, a scalar, float32, with its gradient."""
    scale: torch.Tensor = encoder.logit_scale.float().exp()
    return scale


def unused_of(encoder: Any) -> torch.Tensor:
    """Zero, with a gradient of zero for the parameters of a dual encoder that no loss here uses: SigLIP's bias."""
    bias = getattr(encoder, "logit_bias", None)
    return torch.zeros((), device=encoder.logit_scale.device) if bias is None else 0.0 * bias.float().sum()


def _of_a_kind(batches: Sequence[Batch], kind: Callable[[Batch], Any]) -> list[list[int]]:
    """The numbers of the batches of each kind, in the order in which the kinds come up."""
    kinds = [kind(batch) for batch in batches]
    order = sorted(range(len(batches)), key=lambda number: (kinds.index(kinds[number]), number))
    return [list(group) for _, group in groupby(order, key=lambda number: kinds[number])]

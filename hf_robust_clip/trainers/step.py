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
from ..defences.base import REFERENCE, Defence
from ..models import scalars_of
from ..seeding import derive_seed, forked_rng
from ..wording import shown
from .sharding import as_scalar

Components = Callable[[dict[str, Embeddings], torch.Tensor, Batch], torch.Tensor]


class Step:
    """
    What happens to a batch on the device.

    Args:
        views, text_views (sequences of `str`): Of a batch of training, and those of them with captions of their own.
        defence ([`Defence`]): Which may make views and references.
        augmentation (callable, *optional*): Floats in [0, 1] `(B, 3, H, W)` to the same; of every view but
            `"original"`.
        normalization (`nn.Module`): The image processor's.
        device (`torch.device`): Whose generator is forked for what is drawn.
        loss (callable): The views' embeddings, the scale and the batch to the loss, a scalar.
        autocast (callable): The context of a forward pass of a model that accelerate has not wrapped.
        sigmoid (`bool`): Whether images and texts are contrasted with the sigmoid loss, which needs the model's bias.
        frozen (context manager, *optional*): For forward passes: see [`~trainers.freezing.freezing`].
    """

    def __init__(
        self,
        views: Sequence[str],
        text_views: Sequence[str],
        defence: Defence,
        augmentation: Callable[[torch.Tensor], torch.Tensor] | None,
        normalization: nn.Module,
        device: torch.device,
        loss: Components,
        sigmoid: bool = False,
        frozen: contextlib.AbstractContextManager[None] | None = None,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.views, self.text_views, self.defence = tuple(views), tuple(text_views), defence
        self.augmentation, self.normalization = augmentation, normalization
        self.device, self.loss, self.autocast = device, loss, autocast
        self.sigmoid, self.frozen = sigmoid, frozen or contextlib.nullcontext()
        #: The scalars of the encoder as FSDP shards them, in float32; in between it has rounded copies in their place.
        self.held: dict[str, nn.Parameter] = {}

    def prepared(self, batch: Batch, training: bool) -> Batch:
        """The batch with its bytes turned into the views that its texts have; of an evaluation, un-augmented."""
        with forked_rng(batch.seed, self.device):
            inputs = self._stacked(batch.inputs, self.views if training else (ORIGINAL,))
        return replace(batch, inputs=inputs)

    def _stacked(self, inputs: dict[str, torch.Tensor], views: Sequence[str]) -> dict[str, torch.Tensor]:
        pixels = inputs["pixel_values"]
        if pixels.dtype != torch.uint8:
            return inputs
        rows, texts = pixels.shape[0], inputs["input_ids"].shape[0]
        text_views = self.text_views if tuple(views) == self.views else (ORIGINAL,)
        if texts != len(text_views) * rows:
            raise ValueError(
                f"data_collator returned {texts} texts for {rows} images, but this trainer has captions in the views "
                f"{text_views}: give it views={shown(text_views)}"
            )
        with torch.no_grad():
            images = to_float(pixels)
        made = [self.normalization(self._own_view(images, view)) for view in views]
        return {**inputs, "pixel_values": torch.cat(made)}

    def _own_view(self, images: torch.Tensor, view: str) -> torch.Tensor:
        """The view that the defence makes, with its gradient; else that of [`image_view`]."""
        own = self.defence.make_view(view, images, lambda images: self.image_view(images, view))
        return self.image_view(images, view) if own is None else own

    @torch.no_grad()
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
        with self.frozen:
            embeddings = encode_pairs(model, batch.inputs)
        # DDP waits for a gradient of every parameter that the forward pass used: give a tower that a loss leaves out
        # one of zero. Embeddings are bounded, so zero times their sum is zero.
        unused = 0.0 * (embeddings.image_embeds.sum() + embeddings.text_embeds.sum()) + self.unused_of(encoder)
        views = split_views(self.views, self.text_views, embeddings)
        reference = self.reference(encoder, batch.inputs)
        if reference is not None:
            views[REFERENCE] = reference
        scale, bias = self.scalars(encoder)
        return self.loss(views, scale, replace(batch, bias=bias)) + unused

    def scalars(self, encoder: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`exp(logit_scale)` and, where the loss takes it, `logit_bias` of a dual encoder, float32, with gradients."""
        held = self.held or scalars_of(encoder)
        return as_scalar(held["logit_scale"]).exp(), as_scalar(held["logit_bias"]) if self.sigmoid else None

    def unused_of(self, encoder: Any) -> torch.Tensor:
        """Zero, with a gradient of zero for the scalars of a dual encoder, which a loss may leave out."""
        scalars = (self.held or scalars_of(encoder)).values()
        return 0.0 * torch.stack([as_scalar(value) for value in scalars]).sum()

    @torch.no_grad()
    def reference(self, encoder: Any, inputs: dict[str, torch.Tensor]) -> Embeddings | None:
        """What the defence compares the embeddings of prepared inputs with, where it does."""
        with self.autocast():
            return self.defence.reference(encoder, inputs)

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
        views = len(self.text_views)
        chunks = [
            _Chunk(number, Batch(inputs, derive_seed(batch.seed, place)))
            for number, batch in enumerate(batches)
            for place, inputs in enumerate(cut(batch.inputs, views, size))
        ]

        references: list[Embeddings | None] = []

        def encoded(chunk: _Chunk, first: bool = False) -> Embeddings:
            with forked_rng(chunk.batch.seed, self.device), autocast():
                inputs = self._stacked(chunk.batch.inputs, self.views)
                with self.frozen:
                    embeddings = encode_pairs(model, inputs)
                if first:
                    references.append(self.reference(encoder, inputs))
                return embeddings

        with torch.no_grad():
            found = [encoded(chunk, first=True) for chunk in chunks]
        leaves = [[side.requires_grad_() for side in embeddings] for embeddings in found]  # (V*b, D)
        scale, bias = self.scalars(encoder)
        scale, bias = scale.detach().requires_grad_(), None if bias is None else bias.detach().requires_grad_()
        scalars = [scale] if bias is None else [scale, bias]
        rows = sum(rows_of(batch.inputs, views) for batch in batches)
        with autocast():
            loss = torch.zeros((), device=scale.device)
            for group in _of_a_kind(batches, kind):
                members = [
                    (sides, reference)
                    for chunk, sides, reference in zip(chunks, leaves, references, strict=True)
                    if chunk.number in group
                ]
                share = sum(rows_of(batches[number].inputs, views) for number in group) / rows
                together = replace(joined([batches[number] for number in group]), bias=bias)
                loss = loss + share * self.loss(self._views_of(members), scale, together)
        flat = [side for sides in leaves for side in sides]
        gradients = torch.autograd.grad(loss / divisor, [*flat, *scalars], allow_unused=True, materialize_grads=True)
        for number, chunk in enumerate(chunks):
            last = number == len(chunks) - 1
            # Ranks meet once a step: in the last chunk's backward pass, if at all.
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                pairs = zip(encoded(chunk), gradients[2 * number : 2 * number + 2], strict=True)
                parts = [(side * gradient).sum() for side, gradient in pairs]
                if last:
                    learned = [value for value in self.scalars(encoder) if value is not None]
                    of_learned = zip(learned, gradients[len(flat) :], strict=True)
                    parts += [*(value * gradient for value, gradient in of_learned), self.unused_of(encoder)]
                total = torch.stack([part.reshape(()) for part in parts]).sum()
                if total.requires_grad:  # or all of it is frozen but what the last chunk adds
                    accelerator.backward(total)
        return loss.detach() / divisor

    def _views_of(self, members: Sequence[tuple[Sequence[torch.Tensor], Embeddings | None]]) -> dict[str, Embeddings]:
        """The embeddings of each view, from those of chunks that hold all views."""
        chunks = [split_views(self.views, self.text_views, Embeddings(*sides)) for sides, _ in members]
        for views, (_, reference) in zip(chunks, members, strict=True):
            if reference is not None:
                views[REFERENCE] = reference
        return {
            view: Embeddings(*(torch.cat(side) for side in zip(*(chunk[view] for chunk in chunks), strict=True)))
            for view in chunks[0]
        }


class _Chunk(NamedTuple):
    number: int  # of its batch
    batch: Batch


def _of_a_kind(batches: Sequence[Batch], kind: Callable[[Batch], Any]) -> list[list[int]]:
    """The numbers of the batches of each kind, in the order in which the kinds come up."""
    kinds = [kind(batch) for batch in batches]
    order = sorted(range(len(batches)), key=lambda number: (kinds.index(kinds[number]), number))
    return [list(group) for _, group in groupby(order, key=lambda number: kinds[number])]

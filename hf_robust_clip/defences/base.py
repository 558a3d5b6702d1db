"""What a method adds to CLIP, as an object that the trainer calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Sampler

from ..arguments import CLIPTrainingArguments
from ..batch import Batch, Embeddings
from ..losses import cross_modal_loss
from ..methods import Method, Series, Statement
from ..record import RunRecord

#: The name under which `forward` finds what [`Defence.reference`] gave.
REFERENCE = "reference"


class PairScores(NamedTuple):
    """
    `similarities (N,)`, float32: the cosine of each pair's embeddings, NaN for a row that cannot be used (with
    `on_bad_row="skip"`). `poisoned (N,)`, bool: the column of that name, false for such a row, `None` where there is
    none.
    """

    similarities: np.ndarray
    poisoned: np.ndarray | None


class Plan(NamedTuple):
    """What a training is going to do: optimizer `steps` and `epochs`; in a step so many `calls` of `batch` pairs."""

    steps: int
    epochs: int
    calls: int
    batch: int


class Defence(nn.Module):
    """
    What a method adds to CLIP. Its buffers are its memory: saved with each checkpoint, put back, moved with the model.
    Pass it to `CLIPTrainer(..., defence=...)`. A subclass defines [`forward`]; the rest is optional.

    Attributes:
        views (`tuple[str, ...]`): The views of a batch that it compares. `"original"` is un-augmented, every other
            name an augmentation of its own.
        text_views (`tuple[str, ...]`, *optional*): Those of them with captions of their own; the others share the
            captions of the first, which are encoded once. `None`: all.
        needs_gradient (`frozenset[str]`): Of `"vision"` and `"text"`, the towers that it trains by terms of its own,
            or through which what [`make_view`] learns gets its gradient: they are not to be frozen (`freeze`).
        epoch (`int`): The current one, from 0. The trainer sets it.
        gather (`bool`): Whether the rows of all processes are negatives (`gather_across_devices`). The trainer sets
            it; hand it to the losses.
        arguments (`type`): Of one that ships: the class of the arguments of its trainer.
        method ([`~methods.Method`]): Of one that ships: its paper, and what it does not stop.
        series ([`~methods.Series`], *optional*): What a report draws of it.
    """

    arguments: ClassVar[type[CLIPTrainingArguments]] = CLIPTrainingArguments
    method: ClassVar[Method]
    series: ClassVar[Series | None] = None
    views: tuple[str, ...] = ("original",)
    text_views: tuple[str, ...] | None = None
    needs_gradient: frozenset[str] = frozenset()
    epoch: int = 0
    gather: bool = True
    #: Takes what [`note`] is given; the trainer sets it.
    means: Any = None

    @classmethod
    def from_arguments(cls, args: Any, train_dataset: Any, **more: Any) -> Defence:
        """
        The defence that the arguments of a training ask for.

        Args:
            args ([`CLIPTrainingArguments`]): Those that have the names of the constructor's arguments are passed on.
            train_dataset: The training pairs; `None` of a trainer that only evaluates.
            **more: Other arguments of the constructor.
        """
        names = [name for name in inspect.signature(cls).parameters if hasattr(args, name)]
        return cls(**{name: getattr(args, name) for name in names}, **more)

    @classmethod
    def findings(cls, record: RunRecord) -> Iterator[Statement]:
        """What card and report say of a run with it, in addition to its metrics."""
        yield from ()

    def forward(self, views: dict[str, Embeddings], scale: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """
        The loss of a training batch, as named terms whose sum it is; each is logged under its name.

        Args:
            views (`dict[str, Embeddings]`): The embeddings `(B, D)` of each of [`views`]; under `"reference"` those of
                [`reference`].
            scale (`torch.Tensor`): `exp(logit_scale)`, a scalar.
            batch ([`~batch.Batch`]): Its rows' numbers, and whether they are poisoned, where that is known.

        Returns:
            `dict[str, torch.Tensor]`: Scalars, each the mean over this process's rows.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def contrast(
        self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, scale: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """
        The loss between images and their texts `(B, D)` that the model is trained with (`loss_type`): CLIP's or
        SigLIP's, a scalar. Where a loss takes them itself, pass it `bias=batch.bias`.
        """
        return cross_modal_loss(image_embeds, text_embeds, scale, batch.bias, gather=self.gather)

    def note(self, values: Mapping[str, torch.Tensor], where: torch.Tensor | None = None) -> None:
        """Have the means of values logged: scalars, or one a row `(B,)`; `where (B,)` says which rows count."""
        if self.means is not None:
            self.means.add(values, where)

    # ---- Optional ----

    def attach(self, encoder: Any) -> None:
        """
        Called once, with the dual encoder as a trainer was given it, if it is to be trained. It is on its device, but
        with FSDP.
        """

    def during_training(self, encoder: Any) -> AbstractContextManager[None]:
        """What training happens within, of the dual encoder; what it changes there is as before afterwards."""
        return nullcontext()

    def make_view(
        self, name: str, images: torch.Tensor, augment: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor | None:
        """
        A view that is not an augmentation, and through which gradients flow to what makes it.

        Args:
            name (`str`): Of [`views`].
            images (`torch.Tensor` of shape `(B, 3, H, W)`): Floats in [0, 1], un-augmented.
            augment (callable): The trainer's augmentation of images.

        Returns:
            `torch.Tensor`: As `images`; `None`: an augmentation, or the images as they are for `"original"`.
        """
        return None

    def reference(self, encoder: Any, inputs: dict[str, torch.Tensor]) -> Embeddings | None:
        """
        Embeddings that those of the model are compared with, without gradient; of a defence with one view.

        Args:
            encoder: The dual encoder that is trained.
            inputs (`dict[str, torch.Tensor]`): What it takes: the same augmented images and captions. Its own pass
                over them was the last.

        Returns:
            [`~batch.Embeddings`]: `(B, D)` each; `None`: without.
        """
        return None

    def after_backward(self) -> None:
        """Called when the gradients of an optimizer step are there, before its update: for what learns beside it."""

    def begin_training(self, plan: Plan) -> None:
        """Called when training starts or goes on."""

    def begin_epoch(self, epoch: int, score: Callable[..., PairScores | None]) -> dict[str, float]:
        """
        Called before each epoch, and again when training resumes within one.

        Args:
            epoch (`int`): From 0.
            score (callable): `score(augmented=False)` gives the similarity of every pair of the dataset under the
                model as it is: [`PairScores`] on the first rank, `None` on the others. Call it on all ranks.

        Returns:
            `dict[str, float]`: What to log.
        """
        return {}

    def sampler(self, rows: int, batch_size: int, world_size: int, seed: int) -> Sampler[list[int]] | None:
        """What deals the rows of a map-style dataset into batches; `None`: the trainer shuffles them."""
        return None

    def kind(self, batch: Batch) -> Hashable:
        """With `accumulate_negatives`, batches of one kind are contrasted with each other."""
        return None

    def learning_rate_factor(self, epoch: int) -> float | None:
        """The learning rate of an epoch as a share of the peak, in place of the schedule's; `None`: the schedule's."""
        return None

    def scheduled(self, epoch: int, factor: float, peak: float) -> float:
        """What the peak learning rate is multiplied by in a step of an epoch, where the schedule has `factor`."""
        own = self.learning_rate_factor(epoch)
        return factor if own is None else own

    def step_factor(self, progress: float) -> float:
        """What the learning rate of a step is multiplied by; `progress` is the share of the steps made before it."""
        return 1.0

    def logged(self, logs: dict[str, float]) -> None:
        """Called with what is about to be logged of training, which it may add to."""

    def pictures(self) -> dict[str, Image.Image]:
        """What a report shows of it, each under its name."""
        return {}

    def notes(self) -> dict[str, Any]:
        """What card and report need to know of it, ready for JSON."""
        return {}

    def reset(self) -> None:
        """
        Forget everything: called when training starts without a checkpoint. By default the buffers become what they
        were when it did so first.
        """
        if not hasattr(self, "_first"):
            self._first = {name: value.detach().cpu().clone() for name, value in self.state_dict().items()}
            self._unmade = {key for key, module, name in self._slots() if module._buffers[name] is None}
        elif self._first or self._unmade:
            self.load_state_dict(self._first)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Buffers that are made in training: what a state has of them, and none where it was saved before.
        for key, module, name in self._slots():
            there = state_dict.get(prefix + key)
            if there is None and key in getattr(self, "_unmade", ()):
                module._buffers[name] = None
            elif there is not None and module._buffers[name] is None:
                module._buffers[name] = torch.empty_like(there)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _slots(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Of each buffer, its own and its modules', made or not, its key in a state, its module and its name there."""
        for path, module in self.named_modules():
            yield from ((f"{path}.{name}" if path else name, module, name) for name in module._buffers)

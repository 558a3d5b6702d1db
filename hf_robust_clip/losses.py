"""
The losses of CLIP, of SigLIP and of the defences, as pure functions of embeddings.

Every function takes L2-normalised embeddings `(B, D)` whose rows with the same index belong together, and the
multiplicative `scale`, `exp(model.logit_scale)`, a scalar tensor or float. Those of the defences return a dictionary
of named scalar terms, weights already applied, whose sum is the loss. Compute them in float32 or better; within
`torch.autocast`, they are.
Of large batches the logits are never there all at once. With a `bias`, terms between images and texts are SigLIP's
([`sigmoid_loss`]) in place of CLIP's; terms within a modality are InfoNCE either way.

With `gather=True` the keys are gathered from all ranks, gradients included, so that every other rank's rows are
negatives too; each rank's loss is the mean over its own rows, and DDP's average over ranks makes the gradients those
of one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .distributed import gather_features, rank
from .wording import listed, shown

Matching = Literal["cross", "image_to_text", "unimodal"]
#: Logits that are held at a time, 64 MiB in float32.
_MAX_LOGITS = 1 << 24
MATCHINGS: tuple[Matching, ...] = ("cross", "image_to_text", "unimodal")


class NearestNeighbours(Protocol):
    """Anything that looks up the nearest stored feature of each query, such as a feature pool."""

    def nearest(self, queries: torch.Tensor) -> torch.Tensor: ...


def info_nce(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: torch.Tensor | float,
    gather: bool = False,
    reduction: Literal["mean", "none"] = "mean",
) -> torch.Tensor:
    """
    InfoNCE (van den Oord et al., arXiv 1807.03748), rows of `queries` against all rows of `keys`: the mean over i of
    `-log softmax_j(scale * queries_i . keys_j)` at j = i.

    Args:
        queries (`torch.Tensor` of shape `(B, D)`): L2-normalised.
        keys (`torch.Tensor` of shape `(B, D)`): L2-normalised; row i is the positive of query i.
        scale (`torch.Tensor` or `float`): Multiplicative scale of the cosine similarities, in `(0, 100]`.
        gather (`bool`): Whether to take the keys of all ranks as candidates. Every rank must have the same B.
        reduction (`str`): `"none"`: the loss of each query, `(B,)`, in place of their mean; all logits are held.

    Returns:
        `torch.Tensor`: Scalar, or `(B,)`.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', but is {shown(reduction)}")
    with _exact(queries, keys) as (queries, keys):
        first = 0
        if gather:
            first = rank() * keys.shape[0]
            keys = gather_features(keys)
        if reduction == "mean" and queries.shape[0] * keys.shape[0] > _MAX_LOGITS:
            return _blockwise(_softmax, queries, keys, scale, 0.0, first)
        logits = scale * queries @ keys.T  # (B, world_size * B)
        targets = torch.arange(first, first + queries.shape[0], device=logits.device)
        return F.cross_entropy(logits, targets, reduction=reduction)


def sigmoid_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    scale: torch.Tensor | float,
    bias: torch.Tensor | float,
    gather: bool = False,
) -> torch.Tensor:
    """
    The pairwise sigmoid loss of SigLIP (Zhai et al., ICCV 2023, arXiv 2303.15343, equation 1): for each image the sum,
    over all texts, of `-log sigmoid(y_ij (scale * image_i . text_j + bias))`, where y is 1 for its own text and -1 for
    the others; the mean over images. It is a sum over texts: with more of them it is larger.

    Args:
        image_embeds (`torch.Tensor` of shape `(B, D)`): L2-normalised.
        text_embeds (`torch.Tensor` of shape `(B, D)`): L2-normalised.
        scale (`torch.Tensor` or `float`): `exp(model.logit_scale)`.
        bias (`torch.Tensor` or `float`): `model.logit_bias`.
        gather (`bool`): Whether to use the texts of all ranks. Every rank must have the same B.

    Returns:
        `torch.Tensor`: Scalar.
    """
    with _exact(image_embeds, text_embeds) as (images, texts):
        first = 0
        if gather:
            first = rank() * texts.shape[0]
            texts = gather_features(texts)
        if images.shape[0] * texts.shape[0] > _MAX_LOGITS:
            return _blockwise(_sigmoid, images, texts, scale, bias, first)
        logits = scale * images @ texts.T + bias  # (B, world_size * B)
        targets = torch.arange(first, first + images.shape[0], device=logits.device)[:, None]
        against = logits.scatter(1, targets, -logits.gather(1, targets))  # -y * logits
        return -F.logsigmoid(-against).sum() / images.shape[0]


@contextmanager
def _exact(*sides: torch.Tensor) -> Iterator[Sequence[torch.Tensor]]:
    """The embeddings, in float32 or better where autocast is on; it is off within."""
    device = sides[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        yield sides
        return
    with torch.autocast(device, enabled=False):
        yield [side.to(torch.promote_types(side.dtype, torch.float32)) for side in sides]


def _softmax(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed losses of rows of logits `(b, N)` whose targets are `(b, 1)`, and the gradient, in their place."""
    normalizers = logits.logsumexp(dim=1, keepdim=True)
    loss = (normalizers - logits.gather(1, targets)).sum()
    gradient = logits.sub_(normalizers).exp_()
    return loss, gradient.scatter_add_(1, targets, gradient.new_full(targets.shape, -1))


def _sigmoid(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As [`_softmax`], of the pairwise loss."""
    against = logits.scatter_(1, targets, -logits.gather(1, targets))
    loss = -F.logsigmoid(-against).sum()
    gradient = against.sigmoid_()
    return loss, gradient.scatter_(1, targets, -gradient.gather(1, targets))


def _blockwise(
    of_rows: Any,
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: torch.Tensor | float,
    bias: torch.Tensor | float,
    first: int,
) -> torch.Tensor:
    scalars = (torch.as_tensor(value, device=keys.device) for value in (scale, bias))
    loss: torch.Tensor = _Blockwise.apply(queries, keys, *scalars, first, of_rows)
    return loss


class _Blockwise(torch.autograd.Function):
    """
    [`info_nce`] or [`sigmoid_loss`] without all of their logits at once: a block of queries at a time, and its
    gradients with it, so that nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: torch.Tensor,
        keys: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        first: int,
        of_rows: Any,
    ) -> torch.Tensor:
        rows, differentiate = queries.shape[0], any(ctx.needs_input_grad)
        loss, of_bias = queries.new_zeros(()), queries.new_zeros(())
        of_queries, of_keys = torch.empty_like(queries), torch.zeros_like(keys)
        block = max(1, _MAX_LOGITS // keys.shape[0])
        for start in range(0, rows, block):
            part = queries[start : start + block]
            logits = scale * part @ keys.T + bias  # (block, N)
            targets = torch.arange(first + start, first + start + part.shape[0], device=keys.device)[:, None]
            of_block, of_logits = of_rows(logits, targets)
            loss += of_block / rows
            if differentiate:
                of_logits /= rows
                of_queries[start : start + block] = of_logits @ keys
                of_keys.addmm_(of_logits.T, part)
                of_bias += of_logits.sum()
        if differentiate:
            of_scale = (of_queries * queries).sum().to(scale.dtype).reshape(scale.shape)
            of_bias = of_bias.to(bias.dtype).reshape(bias.shape)
            ctx.save_for_backward(of_queries.mul_(scale), of_keys.mul_(scale), of_scale, of_bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*(grad_outputs[0] * gradient for gradient in ctx.saved_tensors), None, None)


def clip_loss(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, scale: torch.Tensor | float, gather: bool = False
) -> torch.Tensor:
    """
    The symmetric loss of CLIP (Radford et al., ICML 2021, arXiv 2103.00020, figure 3): the average of InfoNCE from
    images to texts and from texts to images.

    Args:
        image_embeds (`torch.Tensor` of shape `(B, D)`): L2-normalised.
        text_embeds (`torch.Tensor` of shape `(B, D)`): L2-normalised.
        scale (`torch.Tensor` or `float`): `exp(model.logit_scale)`.
        gather (`bool`): Whether to use the negatives of all ranks.

    Returns:
        `torch.Tensor`: Scalar.
    """
    return 0.5 * (
        info_nce(image_embeds, text_embeds, scale, gather=gather)
        + info_nce(text_embeds, image_embeds, scale, gather=gather)
    )


def cross_modal_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    scale: torch.Tensor | float,
    bias: torch.Tensor | float | None = None,
    gather: bool = False,
) -> torch.Tensor:
    """[`sigmoid_loss`] with a bias, [`clip_loss`] without: what a model is trained with between images and texts."""
    if bias is None:
        return clip_loss(image_embeds, text_embeds, scale, gather=gather)
    return sigmoid_loss(image_embeds, text_embeds, scale, bias, gather=gather)


def cleanclip_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_embeds_2: torch.Tensor,
    text_embeds_2: torch.Tensor,
    scale: torch.Tensor | float,
    clip_weight: float = 1.0,
    unimodal_weight: float = 1.0,
    gather: bool = False,
    bias: torch.Tensor | float | None = None,
) -> dict[str, torch.Tensor]:
    """
    CleanCLIP (Bansal et al., ICCV 2023, arXiv 2303.03323, equation 3): the CLIP loss, plus a loss within each
    modality that pulls a row towards its own augmented view, whatever it was paired with.

    The unimodal terms go one way, from the plain to the augmented view, as in the released code.

    Args:
        image_embeds, text_embeds (`torch.Tensor` of shape `(B, D)`): Of the un-augmented pairs.
        image_embeds_2, text_embeds_2 (`torch.Tensor` of shape `(B, D)`): Of the augmented views.
        scale (`torch.Tensor` or `float`): `exp(model.logit_scale)`.
        clip_weight (`float`): The paper's lambda 1.
        unimodal_weight (`float`): The paper's lambda 2.
        gather (`bool`): Whether to use the negatives of all ranks.
        bias (`torch.Tensor` or `float`, *optional*): Of a model trained with [`sigmoid_loss`], which then takes the
            place of the CLIP loss. That is ours: the paper has CLIP.

    Returns:
        `dict[str, torch.Tensor]`: `clip_loss`, `unimodal_image_loss`, `unimodal_text_loss`.
    """
    return {
        "clip_loss": clip_weight * cross_modal_loss(image_embeds, text_embeds, scale, bias, gather),
        "unimodal_image_loss": 0.5 * unimodal_weight * info_nce(image_embeds, image_embeds_2, scale, gather=gather),
        "unimodal_text_loss": 0.5 * unimodal_weight * info_nce(text_embeds, text_embeds_2, scale, gather=gather),
    }


def par_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_reference: torch.Tensor,
    text_reference: torch.Tensor,
    scale: torch.Tensor | float,
    threshold: float = 2.15,
    gather: bool = False,
    bias: torch.Tensor | float | None = None,
) -> dict[str, torch.Tensor]:
    """
    PAR, Perturb and Recover (Singh, Croce, Hein, arXiv 2412.00727): the CLIP loss, less half the mean squared distance
    of each modality's embeddings from those of the suspect model, until it is above the threshold.

    As in the released code, embeddings of any length are normalised first: their gradients are along the sphere.

    Args:
        image_embeds, text_embeds (`torch.Tensor` of shape `(B, D)`): Of the model.
        image_reference, text_reference (`torch.Tensor` of shape `(B, D)`): Of the same inputs under the suspect model,
            without gradient.
        scale (`torch.Tensor` or `float`): `exp(model.logit_scale)`.
        threshold (`float`): The paper's tau, in [0, 4]: see [`repulsion`].
        gather (`bool`): Whether to use the negatives, and the distances, of all ranks.
        bias (`torch.Tensor` or `float`, *optional*): Of a model trained with [`sigmoid_loss`], which then takes the
            place of the CLIP loss. That is ours: the paper has CLIP.

    Returns:
        `dict[str, torch.Tensor]`: `clip_loss`, `image_repulsion_loss`, `text_repulsion_loss`; the last two are 0 above
        the threshold.
    """
    sides = ((image_embeds, image_reference), (text_embeds, text_reference))
    distances = torch.stack([squared_distances(*side).mean() for side in sides])
    image_term, text_term = repulsion(distances, threshold, gather=gather)
    images, texts = (F.normalize(side, dim=-1) for side in (image_embeds, text_embeds))
    return {
        "clip_loss": cross_modal_loss(images, texts, scale, bias, gather),
        "image_repulsion_loss": image_term,
        "text_repulsion_loss": text_term,
    }


def squared_distances(embeds: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The squared distances `(...)`, in [0, 4], of rows `(..., D)` from the same rows of others, all normalised."""
    return (F.normalize(embeds, dim=-1) - F.normalize(reference, dim=-1)).square().sum(dim=-1)


def repulsion(distances: torch.Tensor, threshold: float, gather: bool = False) -> torch.Tensor:
    """
    What rewards distance up to a threshold: -1/2 of each distance, and 0 for those that are above it.

    Args:
        distances (`torch.Tensor`): Means over this rank's rows, of any shape.
        threshold (`float`): Of the mean over all rows.
        gather (`bool`): Whether the rows are those of all ranks, so that all of them decide alike.

    Returns:
        `torch.Tensor`: As `distances`.
    """
    means = distances.detach()
    if gather:
        means = gather_features(means[None]).mean(dim=0)
    return -0.5 * torch.where(means <= threshold, distances, torch.zeros_like(distances))


def unbind_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_perturbed: torch.Tensor,
    text_augmented: torch.Tensor | None,
    scale: torch.Tensor | float,
    perturbed_weight: float = 1.0,
    unimodal_weight: float = 0.0,
    gather: bool = False,
    bias: torch.Tensor | float | None = None,
) -> dict[str, torch.Tensor]:
    """
    Unbind: the CLIP loss, the same of perturbed images and the captions as they are, and CleanCLIP's terms within each
    modality.

    Args:
        image_embeds, text_embeds (`torch.Tensor` of shape `(B, D)`): Of the un-augmented pairs.
        image_perturbed (`torch.Tensor` of shape `(B, D)`): Of the perturbed images.
        text_augmented (`torch.Tensor` of shape `(B, D)`, *optional*): Of the augmented captions, which the last term
            needs.
        scale (`torch.Tensor` or `float`): `exp(model.logit_scale)`.
        perturbed_weight (`float`): Of the CLIP loss of perturbed images.
        unimodal_weight (`float`): Of the terms within modalities; 0: without them.
        gather (`bool`): Whether to use the negatives of all ranks.
        bias (`torch.Tensor` or `float`, *optional*): Of a model trained with [`sigmoid_loss`], which then takes the
            place of the CLIP loss.

    Returns:
        `dict[str, torch.Tensor]`: `clip_loss`, `perturbed_clip_loss`, and with a `unimodal_weight`
        `unimodal_image_loss` and `unimodal_text_loss`.
    """
    terms = {
        "clip_loss": cross_modal_loss(image_embeds, text_embeds, scale, bias, gather),
        "perturbed_clip_loss": perturbed_weight * cross_modal_loss(image_perturbed, text_embeds, scale, bias, gather),
    }
    if unimodal_weight:
        if text_augmented is None:
            raise ValueError(
                f"text_augmented is None, but unimodal_weight={shown(unimodal_weight)} compares captions with "
                "augmented ones; accepted are their embeddings"
            )
        images = info_nce(image_embeds, image_perturbed, scale, gather=gather)
        terms["unimodal_image_loss"] = 0.5 * unimodal_weight * images
        texts = info_nce(text_embeds, text_augmented, scale, gather=gather)
        terms["unimodal_text_loss"] = 0.5 * unimodal_weight * texts
    return terms


def roclip_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    scale: torch.Tensor | float,
    image_pool: NearestNeighbours | torch.Tensor | None,
    text_pool: NearestNeighbours | torch.Tensor | None,
    matching: Matching = "cross",
    gather: bool = False,
    bias: torch.Tensor | float | None = None,
) -> dict[str, torch.Tensor]:
    """
    RoCLIP's matching step (Yang, Gao, Mirzasoleiman, NeurIPS 2023, arXiv 2303.06854, section 4): a pair is broken up
    and each side is trained against its nearest neighbour in a pool of earlier features.

    Args:
        image_embeds, text_embeds (`torch.Tensor` of shape `(B, D)`): L2-normalised, of the same pairs.
        scale (`torch.Tensor` or `float`): `exp(model.logit_scale)`.
        image_pool, text_pool (`torch.Tensor` of shape `(P, D)`, or an object with `nearest(queries)`):
            Earlier features, L2-normalised; matches are used without gradient. Look up before the pools take in this
            batch. A pool that `matching` does not use may be `None`.
        matching (`str`):
            `"cross"`: an image with its nearest caption and a caption with its nearest image, both averaged.
            `"image_to_text"`: only the first, as in the final paper and the released code; texts get no gradient.
            `"unimodal"`: an image with the caption nearest to its own caption, a caption with the image nearest to
            its own image, both averaged (first preprint).
        gather (`bool`): Whether to use the matches of all ranks as negatives.
        bias (`torch.Tensor` or `float`, *optional*): Of a model that is trained with [`sigmoid_loss`], which matches
            then have in place of InfoNCE. That is ours: the paper has CLIP.

    Returns:
        `dict[str, torch.Tensor]`: `image_match_loss` and, unless `matching="image_to_text"`, `text_match_loss`.

    Raises:
        `ValueError`: If `matching` is unknown, or a pool that it needs is `None`.
    """
    if matching not in MATCHINGS:
        raise ValueError(f"matching must be one of {listed(MATCHINGS)}, but is {shown(matching)}")
    text_queries = text_embeds if matching == "unimodal" else image_embeds
    text_matches = _nearest(text_pool, text_queries, "text_pool")  # (B, D)
    if matching == "image_to_text":
        return {"image_match_loss": cross_modal_loss(image_embeds, text_matches, scale, bias, gather)}
    image_queries = image_embeds if matching == "unimodal" else text_embeds
    image_matches = _nearest(image_pool, image_queries, "image_pool")  # (B, D)
    return {
        "image_match_loss": 0.5 * cross_modal_loss(image_embeds, text_matches, scale, bias, gather),
        "text_match_loss": 0.5 * cross_modal_loss(image_matches, text_embeds, scale, bias, gather),
    }


def safeclip_unimodal_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_embeds_2: torch.Tensor,
    text_embeds_2: torch.Tensor,
    scale: torch.Tensor | float,
    image_pool: NearestNeighbours | torch.Tensor | None = None,
    text_pool: NearestNeighbours | torch.Tensor | None = None,
    gather: bool = False,
) -> dict[str, torch.Tensor]:
    """
    SafeCLIP's loss for its warm-up and for risky pairs (Yang, Gao, Mirzasoleiman, ICML 2024, arXiv 2310.05862,
    section 4.1): each modality learns by itself, so that a poisoned pairing teaches nothing.

    Args:
        image_embeds, text_embeds (`torch.Tensor` of shape `(B, D)`): First views, L2-normalised.
        image_embeds_2, text_embeds_2 (`torch.Tensor` of shape `(B, D)`): Second views, L2-normalised.
        scale (`torch.Tensor` or `float`): `exp(model.logit_scale)`.
        image_pool, text_pool (`torch.Tensor` of shape `(P, D)`, or an object with `nearest(queries)`):
            Where given, the nearest neighbour of the first view there, without gradient, takes its place. Look up
            before the pools take in this batch.
        gather (`bool`): Whether to use the negatives of all ranks.

    Returns:
        `dict[str, torch.Tensor]`: `unimodal_image_loss`, `unimodal_text_loss`.
    """
    image_keys = image_embeds if image_pool is None else _nearest(image_pool, image_embeds, "image_pool")
    text_keys = text_embeds if text_pool is None else _nearest(text_pool, text_embeds, "text_pool")
    return {
        "unimodal_image_loss": 0.5 * info_nce(image_embeds_2, image_keys, scale, gather=gather),
        "unimodal_text_loss": 0.5 * info_nce(text_embeds_2, text_keys, scale, gather=gather),
    }


def safeclip_cross_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_embeds_2: torch.Tensor,
    text_embeds_2: torch.Tensor,
    scale: torch.Tensor | float,
    gather: bool = False,
    bias: torch.Tensor | float | None = None,
) -> dict[str, torch.Tensor]:
    """
    SafeCLIP's loss for safe pairs (arXiv 2310.05862, section 4.3): CLIP across two augmented views, each first view
    against the other modality's second.

    Args:
        image_embeds, text_embeds (`torch.Tensor` of shape `(B, D)`): First views, L2-normalised.
        image_embeds_2, text_embeds_2 (`torch.Tensor` of shape `(B, D)`): Second views, L2-normalised.
        scale (`torch.Tensor` or `float`): `exp(model.logit_scale)`.
        gather (`bool`): Whether to use the negatives of all ranks.
        bias (`torch.Tensor` or `float`, *optional*): Of a model trained with [`sigmoid_loss`], which then takes the
            place of InfoNCE in both terms. That is ours: the paper has InfoNCE.

    Returns:
        `dict[str, torch.Tensor]`: `image_to_text_loss`, `text_to_image_loss`.
    """
    one_way = info_nce if bias is None else partial(sigmoid_loss, bias=bias)
    return {
        "image_to_text_loss": 0.5 * one_way(image_embeds, text_embeds_2, scale, gather=gather),
        "text_to_image_loss": 0.5 * one_way(text_embeds, image_embeds_2, scale, gather=gather),
    }


@torch.no_grad()
def _nearest(pool: NearestNeighbours | torch.Tensor | None, queries: torch.Tensor, name: str) -> torch.Tensor:
    if pool is None:
        raise ValueError(f"{name} is None, but this loss looks up matches in it: pass (P, D) features or a pool")
    if isinstance(pool, torch.Tensor):
        return pool[(queries @ pool.T).argmax(dim=1)]
    return pool.nearest(queries)

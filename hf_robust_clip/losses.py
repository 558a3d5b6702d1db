"""
The losses of CLIP and of the defences, as pure functions of embeddings.

Every function takes L2-normalised embeddings `(B, D)` whose rows with the same index belong together, and the
multiplicative `scale`, `exp(model.logit_scale)`, a scalar tensor or float. Those of the defences return a dictionary
of named scalar terms, weights already applied, whose sum is the loss. Compute them in float32 or better.
Of large batches the logits are never there all at once.

With `gather=True` the keys are gathered from all ranks, gradients included, so that every other rank's rows are
negatives too; each rank's loss is the mean over its own rows, and DDP's average over ranks makes the gradients those
of one process with the whole batch.
"""

from __future__ import annotations

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
    first = 0
    if gather:
        first = rank() * keys.shape[0]
        keys = gather_features(keys)
    if reduction == "mean" and queries.shape[0] * keys.shape[0] > _MAX_LOGITS:
        loss: torch.Tensor = _BlockwiseInfoNCE.apply(queries, keys, torch.as_tensor(scale, device=keys.device), first)
        return loss
    logits = scale * queries @ keys.T  # (B, world_size * B)
    targets = torch.arange(first, first + queries.shape[0], device=logits.device)
    return F.cross_entropy(logits, targets, reduction=reduction)


class _BlockwiseInfoNCE(torch.autograd.Function):
    """
    [`info_nce`] without all of its logits at once: a block of queries at a time, and its gradients with it, so that
    nothing is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, queries: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor, first: int) -> torch.Tensor:
        rows, differentiate = queries.shape[0], any(ctx.needs_input_grad)
        loss = queries.new_zeros(())
        of_queries, of_keys = torch.empty_like(queries), torch.zeros_like(keys)
        block = max(1, _MAX_LOGITS // keys.shape[0])
        for start in range(0, rows, block):
            part = queries[start : start + block]
            logits = scale * part @ keys.T  # (block, N)
            targets = torch.arange(first + start, first + start + part.shape[0], device=keys.device)[:, None]
            normalizers = logits.logsumexp(dim=1, keepdim=True)
            loss += (normalizers - logits.gather(1, targets)).sum() / rows
            if differentiate:
                of_logits = logits.sub_(normalizers).exp_().div_(rows)  # softmax
                of_logits.scatter_add_(1, targets, of_logits.new_full(targets.shape, -1 / rows))
                of_queries[start : start + block] = of_logits @ keys
                of_keys.addmm_(of_logits.T, part)
        if differentiate:
            of_scale = (of_queries * queries).sum().to(scale.dtype).reshape(scale.shape)
            ctx.save_for_backward(of_queries.mul_(scale), of_keys.mul_(scale), of_scale)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*(grad_outputs[0] * gradient for gradient in ctx.saved_tensors), None)


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


def cleanclip_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_embeds_2: torch.Tensor,
    text_embeds_2: torch.Tensor,
    scale: torch.Tensor | float,
    clip_weight: float = 1.0,
    unimodal_weight: float = 1.0,
    gather: bool = False,
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

    Returns:
        `dict[str, torch.Tensor]`: `clip_loss`, `unimodal_image_loss`, `unimodal_text_loss`.
    """
    return {
        "clip_loss": clip_weight * clip_loss(image_embeds, text_embeds, scale, gather=gather),
        "unimodal_image_loss": 0.5 * unimodal_weight * info_nce(image_embeds, image_embeds_2, scale, gather=gather),
        "unimodal_text_loss": 0.5 * unimodal_weight * info_nce(text_embeds, text_embeds_2, scale, gather=gather),
    }


def unbind_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_perturbed: torch.Tensor,
    text_augmented: torch.Tensor | None,
    scale: torch.Tensor | float,
    perturbed_weight: float = 1.0,
    unimodal_weight: float = 0.0,
    gather: bool = False,
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

    Returns:
        `dict[str, torch.Tensor]`: `clip_loss`, `perturbed_clip_loss`, and with a `unimodal_weight`
        `unimodal_image_loss` and `unimodal_text_loss`.
    """
    terms = {
        "clip_loss": clip_loss(image_embeds, text_embeds, scale, gather=gather),
        "perturbed_clip_loss": perturbed_weight * clip_loss(image_perturbed, text_embeds, scale, gather=gather),
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
        return {"image_match_loss": clip_loss(image_embeds, text_matches, scale, gather=gather)}
    image_queries = image_embeds if matching == "unimodal" else text_embeds
    image_matches = _nearest(image_pool, image_queries, "image_pool")  # (B, D)
    return {
        "image_match_loss": 0.5 * clip_loss(image_embeds, text_matches, scale, gather=gather),
        "text_match_loss": 0.5 * clip_loss(image_matches, text_embeds, scale, gather=gather),
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
) -> dict[str, torch.Tensor]:
    """
    SafeCLIP's loss for safe pairs (arXiv 2310.05862, section 4.3): CLIP across two augmented views, each first view
    against the other modality's second.

    Args:
        image_embeds, text_embeds (`torch.Tensor` of shape `(B, D)`): First views, L2-normalised.
        image_embeds_2, text_embeds_2 (`torch.Tensor` of shape `(B, D)`): Second views, L2-normalised.
        scale (`torch.Tensor` or `float`): `exp(model.logit_scale)`.
        gather (`bool`): Whether to use the negatives of all ranks.

    Returns:
        `dict[str, torch.Tensor]`: `image_to_text_loss`, `text_to_image_loss`.
    """
    return {
        "image_to_text_loss": 0.5 * info_nce(image_embeds, text_embeds_2, scale, gather=gather),
        "text_to_image_loss": 0.5 * info_nce(text_embeds, image_embeds_2, scale, gather=gather),
    }


@torch.no_grad()
def _nearest(pool: NearestNeighbours | torch.Tensor | None, queries: torch.Tensor, name: str) -> torch.Tensor:
    if pool is None:
        raise ValueError(f"{name} is None, but this loss looks up matches in it: pass (P, D) features or a pool")
    if isinstance(pool, torch.Tensor):
        return pool[(queries @ pool.T).argmax(dim=1)]
    return pool.nearest(queries)

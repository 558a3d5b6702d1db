"""A patch optimized on a clean model, after BadCLIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..kinds import check_callable
from ..wording import shown
from .fields import check_float, check_int
from .patches import OptimizedPatchTrigger
from .pixels import Pixels


def optimize_patch(
    encode: Callable[[torch.Tensor], torch.Tensor],
    images: Sequence[Image.Image | Pixels],
    target: torch.Tensor,
    *,
    size: int = 16,
    place: str = "center",
    away: float = 1.0,
    steps: int = 200,
    learning_rate: float = 0.03,
    batch_size: int = 32,
    seed: int = 0,
) -> OptimizedPatchTrigger:
    """
    Optimize a patch on a clean model: towards the target's captions, and away from what each image is, after BadCLIP
    ([Liang et al. 2024](https://arxiv.org/abs/2311.12075)).

    Adam lowers `-cos(f(x'), t) + away * cos(f(x'), f(x))`, where `x'` is the image `x` with the patch, `f` the model's
    image tower and `t` the mean of the target's captions. The paper has more captions, a contrastive form of the
    first term and, beside the clean image, photos of the target; the idea is the same.

    Args:
        encode (callable): Images `(B, 3, H, W)`, floats in [0, 1], to embeddings `(B, D)`, differentiable: of an
            [`~evaluation.embedding.Embedder`], its `encode_pixels`. The model is one that knows the classes, in
            evaluation mode; its weights stay.
        images (sequence of PIL images or `uint8` arrays `(H, W, 3)`): What the patch will go on, of other classes than
            the target, all of the model's size. A hundred do.
        target (`torch.Tensor` of shape `(N, D)`): Embeddings of the target's captions.
        size, place: Of the patch, as of [`OptimizedPatchTrigger`].
        away (`float`, defaults to 1.0): Weight of the second term, above 0.
        steps, batch_size (`int`): Of the optimization.
        learning_rate (`float`, defaults to 0.03): Of Adam, on the scale [0, 1] of the pixels.
        seed (`int`, defaults to 0): Of the first pixels, of the order of the images, and of the random place.

    Returns:
        [`OptimizedPatchTrigger`]: Rounded to bytes. One machine makes the same again; another one may round otherwise.

    Raises:
        `ValueError`: On an argument out of range, no images, or images of several sizes.

    Example:

    ```python
    >>> embedder = Embedder(model.eval(), processor)
    >>> captions = embedder.embed_texts([f"a photo of a {name}." for name in ("banana", "ripe banana")])
    >>> trigger = optimize_patch(embedder.encode_pixels, photos, captions)
    ```
    """
    check_callable("encode", encode, "a function of images, such as Embedder(model, processor).encode_pixels")
    for name, value in {"size": size, "steps": steps, "batch_size": batch_size}.items():
        check_int(name, value, minimum=1)
    for name, number in {"away": away, "learning_rate": learning_rate}.items():
        check_float(name, number)
    check_int("seed", seed, minimum=0)
    draw = np.random.default_rng(seed)
    first = draw.integers(0, 256, (size, size, 3), dtype=np.uint8)
    trigger = OptimizedPatchTrigger.of(first, place, seed)
    arrays = [np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image) for image in images]
    shapes = {array.shape for array in arrays}
    if len(shapes) != 1:
        raise ValueError(f"images have the shapes {shown(sorted(shapes))}; accepted are images of one size, (H, W, 3)")
    corners = [trigger.corner(array) for array in arrays]
    clean = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255  # (N, 3, H, W)
    aim = F.normalize(F.normalize(target.detach().float(), dim=-1).mean(dim=0), dim=-1).cpu()  # (D,)
    with torch.no_grad():
        own = torch.cat([_encoded(encode, batch) for batch in clean.split(batch_size)])  # (N, D)
    patch = (torch.from_numpy(first.copy()).permute(2, 0, 1).float() / 255).requires_grad_()  # (3, S, S)
    adam = torch.optim.Adam([patch], lr=learning_rate)
    for _ in range(steps):
        rows = draw.choice(len(clean), min(batch_size, len(clean)), replace=False).tolist()
        patched = clean[rows]
        for number, row in enumerate(rows):
            top, left = corners[row]
            patched[number, :, top : top + size, left : left + size] = patch
        embeds = _encoded(encode, patched)
        loss = (-embeds @ aim + away * (embeds * own[rows]).sum(dim=-1)).mean()
        # Of the patch alone: the model's own gradients are not touched.
        (patch.grad,) = torch.autograd.grad(loss, [patch])
        adam.step()
        with torch.no_grad():
            patch.clamp_(0, 1)
    levels = (patch.detach() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return OptimizedPatchTrigger.of(np.ascontiguousarray(levels), place, seed)


def _encoded(encode: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    return F.normalize(encode(pixels).float(), dim=-1).cpu()

"""The losses agree with those of the papers' released code, and have the properties that their docstrings promise."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.families import siglip
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_robust_clip import losses
from hf_robust_clip.batch import encode_pairs
from hf_robust_clip.losses import (
    MATCHINGS,
    cleanclip_loss,
    clip_loss,
    info_nce,
    par_loss,
    roclip_loss,
    safeclip_cross_loss,
    safeclip_unimodal_loss,
    sigmoid_loss,
    squared_distances,
)

#: See README.md there.
GOLDEN = np.load(Path(__file__).parent / "data_files" / "golden_losses.npz")
GOLDEN_PAR = np.load(Path(__file__).parent / "data_files" / "golden_par.npz")
VIEWS = ("I", "T", "I2", "T2")

Batch = dict[str, torch.Tensor]


def _scale(b: Batch) -> torch.Tensor:
    return b["ls"].exp()


def _embeds(b: Batch) -> list[torch.Tensor]:
    return [b[name] for name in VIEWS]


LOSSES: dict[str, Callable[[Batch], torch.Tensor | dict[str, torch.Tensor]]] = {
    "clip": lambda b: clip_loss(b["I"], b["T"], _scale(b)),
    "cleanclip": lambda b: cleanclip_loss(*_embeds(b), _scale(b)),
    "cleanclip_w0.5_2": lambda b: cleanclip_loss(*_embeds(b), _scale(b), clip_weight=0.5, unimodal_weight=2.0),
    "roclip_image_to_text": lambda b: roclip_loss(
        b["I"], b["T"], _scale(b), None, b["pool_text"], matching="image_to_text"
    ),
    "safeclip_unimodal_pool": lambda b: safeclip_unimodal_loss(
        *_embeds(b), _scale(b), image_pool=b["pool_image"], text_pool=b["pool_text"]
    ),
    "safeclip_unimodal_nopool": lambda b: safeclip_unimodal_loss(*_embeds(b), _scale(b)),
    "safeclip_cross": lambda b: safeclip_cross_loss(*_embeds(b), _scale(b)),
}
#: What the golden file has no values for.
OTHERS: dict[str, Callable[[Batch], torch.Tensor | dict[str, torch.Tensor]]] = {
    "info_nce": lambda b: info_nce(b["I"], b["T"], _scale(b)),
    **{
        f"roclip_{matching}": lambda b, matching=matching: roclip_loss(
            b["I"], b["T"], _scale(b), b["pool_image"], b["pool_text"], matching=matching
        )
        for matching in ("cross", "unimodal")
    },
    "par": lambda b: par_loss(*_embeds(b), _scale(b)),
    "sigmoid": lambda b: sigmoid_loss(b["I"], b["T"], _scale(b), b["bias"]),
    "cleanclip_sigmoid": lambda b: cleanclip_loss(*_embeds(b), _scale(b), bias=b["bias"]),
    "safeclip_cross_sigmoid": lambda b: safeclip_cross_loss(*_embeds(b), _scale(b), bias=b["bias"]),
    **{
        f"roclip_{matching}_sigmoid": lambda b, matching=matching: roclip_loss(
            b["I"], b["T"], _scale(b), b["pool_image"], b["pool_text"], matching=matching, bias=b["bias"]
        )
        for matching in MATCHINGS
    },
}
EVERY = LOSSES | OTHERS


def golden_batch(dtype: torch.dtype = torch.float64) -> Batch:
    names = (*VIEWS, "pool_image", "pool_text", "ls")
    batch = {name: torch.tensor(GOLDEN[f"in/{name}"], dtype=dtype, requires_grad=True) for name in names}
    return {**batch, "bias": torch.tensor([-3.0], dtype=dtype, requires_grad=True)}


def total(terms: torch.Tensor | dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(terms.values())).sum() if isinstance(terms, dict) else terms


def relative_error(value: torch.Tensor, expected: np.ndarray) -> float:
    expected = torch.from_numpy(np.asarray(expected))
    return ((value.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", LOSSES)
def test_values_and_gradients_of_the_released_code(case: str, dtype: torch.dtype, tolerance: float):
    batch = golden_batch(dtype)
    loss = total(LOSSES[case](batch))
    assert loss.dtype == dtype and loss.shape == ()
    assert relative_error(loss.detach(), GOLDEN[f"{case}/loss"]) < tolerance
    loss.backward()
    for name in (*VIEWS, "ls"):
        expected = GOLDEN[f"{case}/grad_{name}"]
        gradient = batch[name].grad
        if not expected.any():
            assert gradient is None or not gradient.any()
        else:
            assert relative_error(gradient, expected) < tolerance


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", ["both_below", "image_above", "text_above", "both_above"])
def test_values_and_gradients_of_the_released_loss_of_par(
    case: str, dtype: torch.dtype, tolerance: float, gather: bool
) -> None:
    names = ("I", "T", "I_ref", "T_ref")
    embeds = [torch.tensor(GOLDEN_PAR[f"{case}/{name}"], dtype=dtype, requires_grad=name in "IT") for name in names]
    scale, threshold = (float(GOLDEN_PAR[f"{case}/{name}"]) for name in ("scale", "tau"))
    terms = par_loss(*embeds, scale, threshold=threshold, gather=gather)
    assert list(terms) == ["clip_loss", "image_repulsion_loss", "text_repulsion_loss"]
    expected = {"clip_loss": 1.0, "image_repulsion_loss": -0.5, "text_repulsion_loss": -0.5}
    for (name, factor), key in zip(expected.items(), ("clip", "image_term", "text_term"), strict=True):
        assert relative_error(terms[name].detach(), factor * GOLDEN_PAR[f"{case}/{key}"]) < tolerance
    loss = total(terms)
    assert loss.dtype == dtype and loss.shape == ()
    assert relative_error(loss.detach(), GOLDEN_PAR[f"{case}/loss"]) < tolerance
    loss.backward()
    for name, value in zip("IT", embeds, strict=False):
        assert relative_error(value.grad, GOLDEN_PAR[f"{case}/grad_{name}"]) < tolerance


def test_par_repels_up_to_its_threshold() -> None:
    b = golden_batch()
    images, texts, *references = (b[name].detach() for name in VIEWS)
    distances = [squared_distances(*side).mean() for side in zip((images, texts), references, strict=True)]
    between = float(sum(distances)) / 2
    nearer = int(distances[1] < distances[0])
    terms = list(par_loss(images, texts, *references, 1.0, threshold=between).values())[1:]
    torch.testing.assert_close(terms[nearer], -0.5 * distances[nearer], rtol=1e-12, atol=0)
    assert terms[1 - nearer] == 0
    # On the threshold it still repels; at the suspect model there is nothing to reward yet.
    torch.testing.assert_close(
        par_loss(images, texts, *references, 1.0, threshold=float(distances[0]))["image_repulsion_loss"],
        -0.5 * distances[0],
    )
    torch.testing.assert_close(total(par_loss(images, texts, images, texts, 7.0)), clip_loss(images, texts, 7.0))


class Largest(TorchDispatchMode):
    """Notes the most elements of a tensor that is made under it."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(made) if torch.is_tensor(x))])
        return made


@pytest.mark.parametrize("limit", [1, 40])  # a query at a time, or a few
@pytest.mark.parametrize("case", EVERY)
def test_large_batches_have_the_same_gradients_without_all_logits(
    case: str, limit: int, monkeypatch: pytest.MonkeyPatch
):
    whole, blockwise = golden_batch(), golden_batch()
    plain = total(EVERY[case](whole))
    plain.backward()
    monkeypatch.setattr(losses, "_MAX_LOGITS", limit)
    loss = total(EVERY[case](blockwise))
    loss.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    for name in (*VIEWS, "ls", "bias"):
        gradient, expected = blockwise[name].grad, whole[name].grad
        assert (gradient is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [clip_loss, partial(sigmoid_loss, bias=-10.0)])
def test_autocast_changes_no_loss(
    loss: Callable[..., torch.Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    generator = torch.Generator().manual_seed(0)
    sides = [F.normalize(torch.randn(16, 8, generator=generator), dim=1).to(dtype) for _ in range(2)]
    found = []
    for cast, limit in ((False, 1 << 24), (True, 1 << 24), (True, 40)):
        monkeypatch.setattr(losses, "_MAX_LOGITS", limit)
        images, texts, scale = (torch.as_tensor(value).detach().requires_grad_() for value in (*sides, 20.0))
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            value = loss(images if cast else images.float(), texts if cast else texts.float(), scale)
        value.backward()
        # Those of bfloat16 are rounded wherever they are added up.
        found.append([value.detach(), scale.grad, *([images.grad, texts.grad] if dtype == torch.float32 else [])])
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [clip_loss, partial(sigmoid_loss, bias=-10.0)])
def test_large_batches_never_have_all_of_their_logits(
    loss: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(losses, "_MAX_LOGITS", 1000)
    sides = [F.normalize(torch.randn(200, 4), dim=1).requires_grad_() for _ in range(2)]
    with Largest() as largest:
        loss(*sides, 20.0).backward()
    assert largest.elements == 1000


def test_the_golden_file_holds_every_case():
    assert {key.split("/")[0] for key in GOLDEN.files} - {"in"} == set(LOSSES)


@pytest.mark.parametrize("case", EVERY)
def test_the_order_of_the_rows_and_of_the_pools_does_not_matter(case: str):
    batch = golden_batch()
    expected = total(EVERY[case](batch))
    generator = torch.Generator().manual_seed(0)
    rows, pool = torch.randperm(16, generator=generator), torch.randperm(64, generator=generator)
    mixed = {
        name: value[rows] if name in VIEWS else value[pool] if "pool" in name else value
        for name, value in batch.items()
    }
    torch.testing.assert_close(total(EVERY[case](mixed)), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", EVERY)
def test_matches_and_pools_get_no_gradient(case: str):
    batch = golden_batch()
    total(EVERY[case](batch)).backward()
    assert batch["pool_image"].grad is None and batch["pool_text"].grad is None


def test_info_nce_against_its_definition():
    batch = {name: value.detach() for name, value in golden_batch().items()}
    scale = float(batch["ls"].exp())
    terms = []
    for i in range(16):
        logits = torch.stack([scale * (batch["I"][i] * batch["T"][j]).sum() for j in range(16)])
        terms.append(logits.exp().sum().log() - logits[i])
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(info_nce(batch["I"], batch["T"], scale), expected, rtol=1e-12, atol=0)


def test_sigmoid_loss_against_its_definition():
    batch = {name: value.detach() for name, value in golden_batch().items()}
    loss = 0.0
    for i, image in enumerate(batch["I"]):
        for j, text in enumerate(batch["T"]):
            logit = (batch["ls"].exp() * image @ text + batch["bias"]).item()
            loss += math.log1p(math.exp(-logit if i == j else logit)) / 16
    assert sigmoid_loss(batch["I"], batch["T"], batch["ls"].exp(), batch["bias"]).item() == pytest.approx(loss, 1e-12)


def test_sigmoid_loss_is_that_of_transformers():
    """Value and gradients of images, texts, scale and bias, at the scale and the bias of released models."""
    torch.manual_seed(0)
    found, expected = siglip(), siglip()
    expected.load_state_dict(found.state_dict())
    inputs = {"pixel_values": torch.randn(12, 3, 16, 16), "input_ids": torch.randint(0, 700, (12, 16))}
    for model in (found, expected):
        with torch.no_grad():
            model.logit_scale.fill_(math.log(117.3))
            model.logit_bias.fill_(-12.9)
    loss = sigmoid_loss(*encode_pairs(found, inputs), found.logit_scale.exp(), found.logit_bias)
    theirs = expected(**inputs, return_loss=True).loss
    torch.testing.assert_close(loss, theirs, rtol=1e-6, atol=0)
    loss.backward()
    theirs.backward()
    for (name, one), two in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None, name
        assert (one.grad - two.grad).norm() <= 1e-6 * max(two.grad.norm(), theirs), name
    assert found.logit_bias.grad and found.logit_scale.grad


def test_clip_loss_is_symmetric_and_the_mean_of_both_directions():
    b = golden_batch()
    loss = clip_loss(b["I"], b["T"], _scale(b))
    torch.testing.assert_close(loss, clip_loss(b["T"], b["I"], _scale(b)))
    directions = [info_nce(b["I"], b["T"], _scale(b)), info_nce(b["T"], b["I"], _scale(b))]
    torch.testing.assert_close(loss, torch.stack(directions).mean())


def test_a_single_pair_and_pairs_all_alike():
    embeds = F.normalize(torch.randn(1, 8), dim=1)
    assert clip_loss(embeds, -embeds, 10.0).item() == 0
    alike = embeds.expand(5, 8)
    torch.testing.assert_close(clip_loss(alike, alike, 10.0), torch.tensor(5.0).log())


def test_the_loss_is_finite_at_the_largest_scale():
    embeds = torch.eye(4)
    for image, text in ((embeds, embeds), (embeds, -embeds), (embeds, embeds.flip(0))):
        assert torch.isfinite(clip_loss(image, text, 100.0))
        assert torch.isfinite(sigmoid_loss(image, text, 100.0, -10.0))


def test_cleanclip_weights():
    b = golden_batch()
    plain = cleanclip_loss(*_embeds(b), _scale(b))
    weighted = cleanclip_loss(*_embeds(b), _scale(b), clip_weight=3.0, unimodal_weight=0.25)
    assert list(weighted) == ["clip_loss", "unimodal_image_loss", "unimodal_text_loss"]
    for name, weight in zip(weighted, (3.0, 0.25, 0.25), strict=True):
        torch.testing.assert_close(weighted[name], weight * plain[name])
    no_unimodal = cleanclip_loss(*_embeds(b), _scale(b), unimodal_weight=0.0)
    torch.testing.assert_close(total(no_unimodal), clip_loss(b["I"], b["T"], _scale(b)))


def test_terms_of_each_loss():
    b = golden_batch()
    assert list(LOSSES["safeclip_cross"](b)) == ["image_to_text_loss", "text_to_image_loss"]
    assert list(LOSSES["safeclip_unimodal_pool"](b)) == ["unimodal_image_loss", "unimodal_text_loss"]
    assert list(LOSSES["roclip_image_to_text"](b)) == ["image_match_loss"]
    for matching in ("cross", "unimodal"):
        assert list(OTHERS[f"roclip_{matching}"](b)) == ["image_match_loss", "text_match_loss"]


class Lookup:
    """A pool that counts its look-ups, and whether they were recorded for the backward pass."""

    def __init__(self, features: torch.Tensor) -> None:
        self.features = features
        self.queries: list[torch.Tensor] = []
        self.recorded: list[bool] = []

    def nearest(self, queries: torch.Tensor) -> torch.Tensor:
        self.queries.append(queries)
        self.recorded.append(torch.is_grad_enabled())
        return self.features[(queries @ self.features.T).argmax(dim=1)]


@pytest.mark.parametrize("matching", MATCHINGS)
def test_an_object_that_looks_up_is_as_good_as_features(matching):
    b = golden_batch()
    image_pool, text_pool = Lookup(b["pool_image"]), Lookup(b["pool_text"])
    expected = roclip_loss(b["I"], b["T"], _scale(b), b["pool_image"], b["pool_text"], matching=matching)
    terms = roclip_loss(b["I"], b["T"], _scale(b), image_pool, text_pool, matching=matching)
    assert terms.keys() == expected.keys()
    torch.testing.assert_close(total(terms), total(expected))
    assert text_pool.recorded == [False]
    assert image_pool.recorded == ([] if matching == "image_to_text" else [False])
    # Which side asks which pool is what tells the matchings apart.
    assert text_pool.queries[0] is (b["T"] if matching == "unimodal" else b["I"])
    if matching != "image_to_text":
        assert image_pool.queries[0] is (b["I"] if matching == "unimodal" else b["T"])


def test_safeclip_takes_an_object_that_looks_up():
    b = golden_batch()
    pools = {"image_pool": Lookup(b["pool_image"]), "text_pool": Lookup(b["pool_text"])}
    terms = safeclip_unimodal_loss(*_embeds(b), _scale(b), **pools)
    assert relative_error(total(terms).detach(), GOLDEN["safeclip_unimodal_pool/loss"]) < 1e-10


def test_a_pool_that_holds_the_batch_gives_the_clip_loss():
    # Orthogonal rows, each nearest to its own text: matching breaks nothing up.
    embeds = torch.eye(6, dtype=torch.float64)
    for matching in MATCHINGS:
        terms = roclip_loss(embeds, embeds, 5.0, embeds, embeds, matching=matching)
        torch.testing.assert_close(total(terms), clip_loss(embeds, embeds, 5.0))


def test_an_unknown_matching_is_refused():
    b = golden_batch()
    with pytest.raises(
        ValueError, match="matching must be one of 'cross', 'image_to_text', 'unimodal', but is 'both'"
    ):
        roclip_loss(b["I"], b["T"], 1.0, b["pool_image"], b["pool_text"], matching="both")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("missing", "matching"),
    [
        ("text_pool", "cross"),
        ("image_pool", "cross"),
        ("text_pool", "unimodal"),
        ("image_pool", "unimodal"),
        ("text_pool", "image_to_text"),
    ],
)
def test_a_pool_that_is_needed_and_missing_is_named(missing: str, matching):
    b = golden_batch()
    pools = {"image_pool": b["pool_image"], "text_pool": b["pool_text"], missing: None}
    with pytest.raises(ValueError, match=f"{missing} is None"):
        roclip_loss(b["I"], b["T"], 1.0, **pools, matching=matching)


GATHERED: dict[str, Callable[[Batch], torch.Tensor | dict[str, torch.Tensor]]] = {
    "info_nce": lambda b: info_nce(b["I"], b["T"], _scale(b), gather=True),
    "sigmoid": lambda b: sigmoid_loss(b["I"], b["T"], _scale(b), b["bias"], gather=True),
    "clip": lambda b: clip_loss(b["I"], b["T"], _scale(b), gather=True),
    "cleanclip": lambda b: cleanclip_loss(*_embeds(b), _scale(b), gather=True),
    "par": lambda b: par_loss(*_embeds(b), _scale(b), gather=True),
    "safeclip_cross": lambda b: safeclip_cross_loss(*_embeds(b), _scale(b), gather=True),
    "safeclip_unimodal_nopool": lambda b: safeclip_unimodal_loss(*_embeds(b), _scale(b), gather=True),
    "roclip_cross": lambda b: roclip_loss(
        b["I"], b["T"], _scale(b), b["pool_image"], b["pool_text"], matching="cross", gather=True
    ),
}


@pytest.mark.parametrize("case", GATHERED)
def test_gathering_in_one_process_changes_nothing(case: str):
    batch = golden_batch()
    torch.testing.assert_close(total(GATHERED[case](batch)), total(EVERY[case](batch)), rtol=0, atol=0)


@pytest.mark.parametrize("case", OTHERS)
def test_gradients_are_those_of_finite_differences(case: str):
    base = golden_batch()
    small = {name: value.detach()[:4] if name in VIEWS else value.detach() for name, value in base.items()}
    names = (*VIEWS, "ls", "bias")
    inputs = [small[name].clone().requires_grad_() for name in names]

    def loss(*values: torch.Tensor) -> torch.Tensor:
        return total(OTHERS[case]({**small, **dict(zip(names, values, strict=True))}))

    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)

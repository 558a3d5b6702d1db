"""The pool is first-in first-out, its look-up is that of brute force, and its state is all there is to it."""

import copy
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hf_robust_clip import lookup as lookup_module
from hf_robust_clip.losses import roclip_loss, safeclip_unimodal_loss
from hf_robust_clip.pool import FeaturePool

#: See README.md there.
GOLDEN = np.load(Path(__file__).parent / "data_files" / "golden_losses.npz")


def unit(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def held(pool: FeaturePool) -> list[int]:
    """Slots from the oldest to the newest."""
    first = int(pool.cursor) if pool.full else 0
    return [(first + i) % pool.size for i in range(pool.filled)]


def brute_force(pool: FeaturePool, queries: torch.Tensor) -> list[int]:
    slots = held(pool)
    stored = pool.features[slots].double()
    best = [(stored * query).sum(dim=1).argmax() for query in queries.double()]  # the first of equals
    return [slots[int(i)] for i in best]


def grid(rows: int, dim: int, seed: int) -> torch.Tensor:
    """Few distinct rows of small whole numbers, whose products are exact in any order, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, dim), generator=generator).float()


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 9),
    batches=st.lists(st.integers(0, 25), max_size=10),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_first_in_first_out(size: int, batches: list[int], dtype: torch.dtype):
    pool = FeaturePool(size, 3, dtype)
    model: list[tuple[list[float], int, int]] = []
    calls = 0
    for number, batch in enumerate(batches):
        features = unit(batch, 3, number)
        keys = torch.arange(batch) + 100 * number
        pool.enqueue(features, keys)
        calls += batch > 0
        stored = features.to(dtype).tolist()
        model = [*model, *zip(stored, keys.tolist(), [calls] * batch, strict=True)][-size:]
        assert pool.features[held(pool)].tolist() == [row for row, _, _ in model]
        assert pool.keys[held(pool)].tolist() == [key for _, key, _ in model]
        assert pool.filled == int(pool.fill) == len(model)
        assert pool.full == (len(model) == size)
        assert pool.age == (calls - model[0][2] if model else 0)
    pool.clear()
    fresh = FeaturePool(size, 3, dtype)
    assert all(torch.equal(pool.state_dict()[name], value) for name, value in fresh.state_dict().items())
    assert (pool.filled, pool.age) == (0, 0)


def test_features_without_keys_have_minus_one():
    pool = FeaturePool(4, 2)
    pool.enqueue(unit(3, 2), torch.tensor([5, 6, 7], dtype=torch.int32))
    pool.enqueue(unit(2, 2))
    assert pool.keys.tolist() == [-1, 6, 7, -1]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dim=st.integers(1, 16),
    size=st.integers(1, 80),
    batches=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    chunk_size=st.sampled_from([1, 7, None]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_of_equals_the_oldest_is_found(
    seed: int, dim: int, size: int, batches: list[int], chunk_size: int | None, dtype: torch.dtype
):
    rows = grid(sum(batches), dim, seed)
    pool = FeaturePool(size, dim, dtype, chunk_size)
    for batch in rows.split(batches):
        pool.enqueue(batch)
    queries = torch.cat([grid(4, dim, seed), torch.zeros(1, dim)])
    assert pool.nearest_slots(queries).tolist() == brute_force(pool, queries)


@pytest.mark.parametrize("chunk_size", [7, 500, None])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_random_features_of_every_dtype(chunk_size: int | None, storage: torch.dtype, asked: torch.dtype):
    pool = FeaturePool(1000, 48, storage, chunk_size)
    pool.enqueue(unit(1300, 48))
    queries = unit(20, 48, 1).to(asked)
    slots = brute_force(pool, queries)
    assert pool.nearest_slots(queries).tolist() == slots
    assert pool.nearest(queries).dtype == asked
    assert torch.equal(pool.nearest(queries), pool.features[slots].to(asked))


@pytest.mark.parametrize("rows", [600, 3000])
def test_hundreds_of_equal_features(rows: int):
    pool = FeaturePool(2000, 40)
    few = unit(3, 40)
    pool.enqueue(unit(100, 40, 1))
    pool.enqueue(few[torch.arange(rows) % 3])
    assert torch.equal(pool.nearest(few), few)


def test_what_float32_cannot_tell_apart_is_as_near_as_it_can_tell():
    base = unit(1, 32)
    pool = FeaturePool(200, 32)
    pool.enqueue(base * (1 + 1e-7 * torch.arange(200)[torch.randperm(200)][:, None]))
    products = pool.features.double() @ base[0].double()
    assert products[pool.nearest_slots(base)].item() == pytest.approx(products.max().item(), rel=1e-6)


def test_features_far_from_unit_length():
    pool = FeaturePool(300, 8)
    pool.enqueue(unit(300, 8) * torch.logspace(-30, 10, 300)[:, None])
    queries = torch.cat([unit(5, 8, 1), -pool.features[-5:], unit(5, 8, 2) * 1e-12])
    assert pool.nearest_slots(queries).tolist() == brute_force(pool, queries)


def test_unfilled_slots_are_never_found():
    pool = FeaturePool(50, 4)
    row = F.normalize(torch.ones(1, 4), dim=1)
    pool.enqueue(-row)
    assert pool.nearest_slots(row).tolist() == [0]  # the zeros of the unfilled slots would be nearer
    assert pool.nearest(row[:0]).shape == (0, 4)
    assert pool.nearest_slots(torch.full((1, 4), torch.nan)).tolist() == [0]


@pytest.mark.parametrize("lower", [lambda: torch.set_float32_matmul_precision("medium"), None])
def test_lower_precision_elsewhere_changes_nothing(lower: Callable[[], None] | None):
    pool = FeaturePool(4000, 64)
    pool.enqueue(unit(4000, 64))
    queries = unit(64, 64, 1)
    expected = brute_force(pool, queries)
    before = torch.get_float32_matmul_precision()
    try:
        if lower is not None:
            lower()
        precision = torch.get_float32_matmul_precision()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert pool.nearest_slots(queries).tolist() == expected
            assert pool.nearest(queries).dtype == torch.float32
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_no_gradient():
    pool = FeaturePool(8, 4)
    features = unit(8, 4).requires_grad_()
    pool.enqueue(features)
    found = pool.nearest(features)
    assert not pool.features.requires_grad and not found.requires_grad
    kept = found.clone()
    pool.enqueue(unit(8, 4, 1))
    assert torch.equal(found, kept)


def reloaded(pool: FeaturePool) -> FeaturePool:
    other = FeaturePool(pool.size, pool.dim, pool.features.dtype)
    other.enqueue(unit(3, pool.dim, 9))
    other.load_state_dict(pool.state_dict())
    return other


COPIES: dict[str, Callable[[FeaturePool], FeaturePool]] = {
    "state": reloaded,
    "deepcopy": copy.deepcopy,
    "pickle": lambda pool: pickle.loads(pickle.dumps(pool)),
}


@settings(max_examples=30, deadline=None)
@given(
    before=st.lists(st.integers(1, 15), max_size=5),
    after=st.lists(st.integers(1, 15), max_size=3),
    how=st.sampled_from(sorted(COPIES)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_copy_goes_on_as_the_original(before: list[int], after: list[int], how: str, dtype: torch.dtype):
    pool = FeaturePool(10, 3, dtype)
    for number, batch in enumerate(before):
        pool.enqueue(unit(batch, 3, number), torch.arange(batch))
    copied = COPIES[how](pool)
    for number, batch in enumerate([0, *after], start=len(before)):
        for each in (pool, copied):
            each.enqueue(unit(batch, 3, number), torch.arange(batch))
        for name, value in pool.state_dict().items():
            assert torch.equal(copied.state_dict()[name], value) and copied.state_dict()[name].dtype == value.dtype
        assert (copied.filled, copied.full, copied.age) == (pool.filled, pool.full, pool.age)
        if pool.filled:
            assert torch.equal(copied.nearest(unit(4, 3, 50)), pool.nearest(unit(4, 3, 50)))


@pytest.mark.parametrize("other", [FeaturePool(9, 4), FeaturePool(8, 5), FeaturePool(8, 4, torch.bfloat16)])
def test_the_state_of_another_pool_is_refused_whole(other: FeaturePool):
    other.enqueue(unit(3, other.dim), torch.arange(3))
    parent = torch.nn.ModuleDict({"pool": FeaturePool(8, 4)})
    here = f"{tuple(other.features.shape)} of {other.features.dtype}"
    with pytest.raises(RuntimeError) as error:
        parent.load_state_dict({f"pool.{name}": value for name, value in other.state_dict().items()})
    assert f"pool.features is {here} in the state, but (8, 4) of torch.float32" in str(error.value)
    pool: Any = parent["pool"]
    assert pool.filled == int(pool.fill) == 0 and (pool.keys == -1).all()


def test_an_impossible_or_incomplete_state_is_refused():
    pool = FeaturePool(4, 2)
    state = pool.state_dict()
    with pytest.raises(RuntimeError, match="cursor 3 and fill 2 cannot be of a pool of 4 features"):
        pool.load_state_dict({**state, "cursor": torch.tensor(3), "fill": torch.tensor(2)})
    with pytest.raises(RuntimeError, match=r"Missing key.*keys"):
        pool.load_state_dict({name: value for name, value in state.items() if name != "keys"})


def test_casting_the_module_leaves_the_stored_values():
    pool = FeaturePool(5, 4)
    pool.enqueue(unit(5, 4))
    for cast in (pool.half, pool.bfloat16, pool.double, lambda: pool.to(torch.float16), lambda: pool.to("cpu")):
        cast()
        assert torch.equal(pool.features, unit(5, 4)) and pool.features.dtype == torch.float32
    assert pool.to("meta").features.device.type == "meta"


class Memory(TorchDispatchMode):
    """The largest number of bytes that tensors made under it held at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves((args, kwargs)) if _is_tensor(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(_is_tensor, torch.utils._pytree.tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in known | self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return result

    def free(self, address: int, size: int) -> None:
        self.seen.discard(address)
        self.now -= size


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("equal", [False, True])
def test_the_memory_of_a_look_up_does_not_grow_with_the_pool(
    dtype: torch.dtype, equal: bool, monkeypatch: pytest.MonkeyPatch
):
    budget = 2**19
    monkeypatch.setitem(lookup_module.LOOKUP_BYTES, "cpu", budget)
    pool = FeaturePool(6_000, 64, dtype)
    rows = unit(6_000, 64)
    pool.enqueue(rows[:1].expand(6_000, 64) if equal else rows)
    queries = unit(64, 64, 1)
    with Memory() as memory:
        pool.nearest_slots(queries)
    assert 2**17 < memory.peak < 2 * budget + 4 * 8 * queries.numel()  # all similarities: 1.5 MiB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be an integer of at least 1, but is 0"),
        ({"size": True}, "size must be an integer of at least 1, but is True"),
        ({"dim": 2.0}, "dim must be an integer of at least 1, but is 2.0"),
        ({"chunk_size": 0}, "chunk_size must be an integer of at least 1, but is 0"),
        ({"chunk_size": False}, "chunk_size must be an integer of at least 1, but is False"),
        ({"dtype": torch.float16}, "dtype must be one of .*, but is torch.float16"),
        ({"dtype": torch.int64}, "dtype must be one of .*, but is torch.int64"),
    ],
)
def test_arguments_that_cannot_work(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        FeaturePool(**{"size": 4, "dim": 2, **arguments})


def test_inputs_that_cannot_work():
    pool = FeaturePool(4, 3)
    with pytest.raises(ValueError, match="the pool is empty"):
        pool.nearest(unit(2, 3))
    for wrong in (unit(2, 4), unit(1, 3)[0], torch.ones(2, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"features must be \(B, 3\) of a floating dtype"):
            pool.enqueue(wrong)
        with pytest.raises(ValueError, match=r"queries must be \(B, 3\) of a floating dtype"):
            pool.nearest(wrong)
    for keys in (torch.arange(3), torch.ones(2), torch.ones(2, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"keys must be \(2,\) integers"):
            pool.enqueue(unit(2, 3), keys)
    assert pool.filled == 0


def golden_pool(modality: str) -> FeaturePool:
    features = torch.from_numpy(GOLDEN[f"in/pool_{modality}"])
    pool = FeaturePool(len(features), features.shape[1], torch.float64)
    pool.enqueue(features)
    return pool


def test_roclip_agrees_with_the_released_code():
    images, texts = (torch.from_numpy(GOLDEN[f"in/{name}"]) for name in ("I", "T"))
    scale = float(np.exp(GOLDEN["in/ls"]))
    terms = roclip_loss(images, texts, scale, None, golden_pool("text"), matching="image_to_text")
    assert float(sum(terms.values())) == pytest.approx(float(GOLDEN["roclip_image_to_text/loss"]), rel=1e-10)


def test_safeclip_agrees_with_the_released_code():
    views = [torch.from_numpy(GOLDEN[f"in/{name}"]) for name in ("I", "T", "I2", "T2")]
    scale = float(np.exp(GOLDEN["in/ls"]))
    terms = safeclip_unimodal_loss(*views, scale, image_pool=golden_pool("image"), text_pool=golden_pool("text"))
    assert float(sum(terms.values())) == pytest.approx(float(GOLDEN["safeclip_unimodal_pool/loss"]), rel=1e-10)


@pytest.mark.parametrize(
    ("case", "modality"),
    [("roclip_image_to_text", "text"), ("safeclip_unimodal_pool", "image"), ("safeclip_unimodal_pool", "text")],
)
def test_the_batch_replaces_what_it_replaces_in_the_released_code(case: str, modality: str):
    pool = golden_pool(modality)
    pool.enqueue(torch.from_numpy(GOLDEN["in/I" if modality == "image" else "in/T"]))
    expected = torch.from_numpy(GOLDEN[f"{case}/pool_{modality}_after"])
    assert pool.features.shape == expected.shape
    distances = torch.cdist(pool.features, expected, compute_mode="donot_use_mm_for_euclid_dist")  # as sets of rows
    assert (distances.amin(dim=0) < 1e-10).all() and (distances.amin(dim=1) < 1e-10).all()

"""Seeds depend on their keys alone, and borrowed generators are given back."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_robust_clip.seeding import derive_seed, forked_rng

KEY = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(KEY, max_size=5))
def test_a_seed_is_one_that_every_generator_takes(keys: list[int]):
    seed = derive_seed(*keys)
    assert 0 <= seed < 2**63
    assert seed == derive_seed(*keys)
    torch.Generator().manual_seed(seed)


@given(st.lists(KEY, min_size=1, max_size=4), st.lists(KEY, min_size=1, max_size=4))
def test_other_keys_give_other_seeds(first: list[int], second: list[int]):
    assert (derive_seed(*first) == derive_seed(*second)) == (first == second)


@given(KEY, st.integers(0, 62))
def test_a_bit_of_a_key_changes_half_the_bits_of_the_seed(key: int, bit: int):
    changed = bin(derive_seed(key) ^ derive_seed(key ^ (1 << bit))).count("1")
    assert 5 < changed < 58  # of 63; beyond 1e-10 either way for a fair coin


def test_seeds_of_neighbours_are_spread_evenly():
    draws = torch.tensor(
        [derive_seed(seed, epoch, row) % 5 for seed in (0, 1) for epoch in (0, 1) for row in range(500)]
    )
    counts = draws.bincount(minlength=5)
    assert (counts - 400).abs().max() < 90  # five standard deviations


def test_a_seed_is_the_same_in_every_process():
    # A golden value: checkpoints resume with what an earlier version drew.
    expected = derive_seed(42, 3, 12345)
    assert expected == 3647379770587120990
    command = "from hf_robust_clip.seeding import derive_seed; print(derive_seed(42, 3, 12345))"
    output = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    assert int(output) == expected


@pytest.mark.parametrize("key", [2**63, -(2**63) - 1, 0.5, "1"])
def test_a_key_that_is_no_64_bit_integer_is_refused(key):
    with pytest.raises((ValueError, TypeError), match="64-bit integers"):
        derive_seed(0, key)


def test_forked_rng_repeats_and_leaves_the_generator_as_it_was():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    draws = []
    for seed in (1, 1, 2):
        with forked_rng(seed, torch.device("cpu")):
            draws.append(torch.rand(5))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_forked_rng_gives_the_generator_back_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"), forked_rng(1, torch.device("cpu")):
        torch.rand(5)
        raise RuntimeError("inside")
    assert torch.equal(torch.get_rng_state(), before)


def test_forked_rng_does_not_depend_on_what_was_drawn_before():
    with forked_rng(3, torch.device("cpu")):
        first = torch.randn(4)
    torch.rand(100)
    with forked_rng(3, torch.device("cpu")):
        assert torch.equal(torch.randn(4), first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_forked_rng_covers_the_device():
    device = torch.device("cuda", 0)
    before = torch.cuda.get_rng_state(device)
    draws = []
    for _ in range(2):
        with forked_rng(1, device):
            draws.append(torch.rand(5, device=device))
    assert torch.equal(torch.cuda.get_rng_state(device), before) and torch.equal(draws[0], draws[1])

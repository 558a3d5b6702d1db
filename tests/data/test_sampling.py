"""Batches of one kind on all processes, no row twice, and as many steps whatever the split."""

import random

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_robust_clip.data.sampling import RoutedBatchSampler, pack_mask, unpack_mask


@st.composite
def samplers(draw: st.DrawFn) -> tuple[RoutedBatchSampler, np.ndarray]:
    """A sampler with a split, and the split: often all safe, all risky or with one safe row."""
    batch_size, world_size = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    length = draw(st.integers(2 * batch_size * world_size, 12 * batch_size * world_size))
    count = draw(st.one_of(st.sampled_from([0, 1, length - 1, length]), st.integers(0, length)))
    safe = np.arange(length) < count
    np.random.default_rng(draw(st.integers(0, 100))).shuffle(safe)
    sampler = RoutedBatchSampler(length, batch_size, world_size, seed=draw(st.integers(0, 2**62)))
    sampler.set_split(safe)
    sampler.set_epoch(draw(st.integers(0, 1000)))
    return sampler, safe


def half_safe(
    length: int = 40, batch_size: int = 3, world_size: int = 2, seed: int = 0
) -> tuple[RoutedBatchSampler, np.ndarray]:
    sampler = RoutedBatchSampler(length, batch_size, world_size, seed)
    safe = np.arange(length) % 2 == 0
    sampler.set_split(safe)
    return sampler, safe


def kinds_of(sampler: RoutedBatchSampler, safe: np.ndarray) -> np.ndarray:
    """Of each step, by its first row."""
    return safe[[batch[0] for batch in sampler][:: sampler.world_size]]


@given(samplers())
@settings(deadline=None)
def test_all_processes_have_one_kind_in_each_step_and_no_row_comes_twice(pair: tuple[RoutedBatchSampler, np.ndarray]):
    sampler, safe = pair
    batches = list(sampler)
    group = sampler.batch_size * sampler.world_size
    assert len(batches) == len(sampler) == (len(safe) // group - 1) * sampler.world_size
    assert all(len(batch) == sampler.batch_size for batch in batches)
    assert all(type(row) is int for batch in batches for row in batch)
    rows = [row for batch in batches for row in batch]
    assert len(set(rows)) == len(rows) and set(rows) <= set(range(len(safe)))
    assert len(safe) - 2 * group < len(rows) <= len(safe) - group
    for step, kind in enumerate(kinds_of(sampler, safe)):
        for rank in range(sampler.world_size):
            assert (safe[batches[step * sampler.world_size + rank]] == kind).all()


@given(samplers())
@settings(deadline=None)
def test_no_more_groups_of_a_kind_are_left_out_than_must_be(pair: tuple[RoutedBatchSampler, np.ndarray]):
    sampler, safe = pair
    group = sampler.batch_size * sampler.world_size
    made = safe.sum() // group + (~safe).sum() // group
    kinds = kinds_of(sampler, safe)
    assert 0 <= safe.sum() // group - kinds.sum() <= 1
    assert made - len(kinds) in (0, 1)


@given(samplers())
@settings(deadline=None)
def test_batches_depend_on_seed_epoch_and_split_alone(pair: tuple[RoutedBatchSampler, np.ndarray]):
    sampler, safe = pair
    expected = list(sampler)
    np.random.seed(0)
    random.seed(0)
    torch.manual_seed(0)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    again = RoutedBatchSampler(len(safe), sampler.batch_size, sampler.world_size, sampler.seed)
    again.set_epoch(sampler.epoch + 1)
    list(again)
    again.set_epoch(sampler.epoch)
    again.set_split(torch.from_numpy(safe))
    assert list(again) == expected == list(sampler)
    assert (np.random.get_state()[1] == states[0]).all() and torch.equal(torch.get_rng_state(), states[1])


def test_other_epochs_and_seeds_give_other_batches():
    sampler, _ = half_safe()
    drawn = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        drawn.append(list(sampler))
    drawn += [list(half_safe(seed=seed)[0]) for seed in (1, 2)]
    assert all(drawn[i] != drawn[j] for i in range(len(drawn)) for j in range(i))


def test_without_a_split_all_rows_are_shuffled_together():
    sampler = RoutedBatchSampler(40, 3, 2)
    assert len(sampler) == 10
    unsplit = list(sampler)
    sampler.set_split(np.ones(40, dtype=bool))
    assert list(sampler) == unsplit
    sampler.set_split(np.arange(40) % 2 == 0)
    assert list(sampler) != unsplit
    sampler.set_split(None)
    assert list(sampler) == unsplit


def test_every_row_is_visited_and_shares_the_leaving_out():
    # 9 safe and 15 risky rows in groups of 4: 2 + 3 groups are made and as many are taken as there are steps, 5.
    length, epochs = 24, 600
    safe = np.arange(length) < 9
    sampler = RoutedBatchSampler(length, 2, 2)
    sampler.set_split(safe)
    visits = np.zeros(length, dtype=int)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        visits[np.concatenate(list(sampler))] += 1
    shares = visits / epochs
    np.testing.assert_allclose(shares[safe], 8 / 9, atol=0.08)
    np.testing.assert_allclose(shares[~safe], 12 / 15, atol=0.1)


def test_the_kinds_come_in_random_order_and_the_one_left_out_is_any():
    # 8 safe and 16 risky rows in groups of 4: 2 + 4 groups are made, and one is left out.
    sampler, safe = RoutedBatchSampler(24, 4), np.arange(24) < 8
    sampler.set_split(safe)
    kinds = []
    for epoch in range(900):
        sampler.set_epoch(epoch)
        kinds.append(kinds_of(sampler, safe))
    drawn = np.array(kinds)
    # Of six groups in random order the first five: a third of each place is safe, and two of six left out are.
    np.testing.assert_allclose(drawn.mean(axis=0), 1 / 3, atol=0.08)
    assert (drawn.sum(axis=1) == 1).mean() == pytest.approx(1 / 3, abs=0.08)
    assert len({tuple(row) for row in drawn.tolist()}) == 15  # all there are: 6 choose 2


def test_an_iteration_goes_on_as_it_began():
    sampler, safe = half_safe()
    expected = list(sampler)
    iteration = iter(sampler)
    sampler.set_epoch(7)
    sampler.set_split(~safe)
    assert list(iteration) == expected != list(sampler)


def test_the_split_is_copied():
    sampler, safe = half_safe()
    expected = list(sampler)
    safe[:] = False
    assert list(sampler) == expected


@pytest.mark.parametrize("seedable", [False, True])
def test_accelerate_deals_the_batches_in_turn_and_resumes_among_them(seedable: bool):
    sampler, safe = half_safe(60)
    sampler.set_epoch(3)
    batches = list(sampler)
    kinds = kinds_of(sampler, safe)
    rows = torch.arange(60)
    for rank in range(2):
        loader = prepare_data_loader(
            DataLoader(rows, batch_sampler=sampler),
            num_processes=2,
            process_index=rank,
            rng_types=["generator"],
            use_seedable_sampler=seedable,
            data_seed=1,
        )
        assert len(loader) == len(kinds) and loader.total_batch_size == 6 and loader.batch_sampler.drop_last
        dealt = [batch.tolist() for batch in loader]
        assert dealt == batches[rank::2]
        assert [safe[batch].all() for batch in dealt] == kinds.tolist()
        for skipped in (1, 4):
            remaining = skip_first_batches(loader, skipped)
            assert len(remaining) == len(kinds) - skipped
            assert [batch.tolist() for batch in remaining] == dealt[skipped:]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_prepared_loader_follows_the_epoch_of_the_sampler(world_size: int):
    sampler, _ = half_safe(60, world_size=world_size)
    loader = prepare_data_loader(DataLoader(torch.arange(60), batch_sampler=sampler), num_processes=world_size)
    drawn = []
    for epoch in (0, 5):
        sampler.set_epoch(epoch)
        # What the Trainer calls; accelerate hands it on to the sampler on one process, and otherwise to nobody.
        loader.set_epoch(epoch)
        drawn.append([batch.tolist() for batch in loader])
        assert drawn[-1] == list(sampler)[::world_size]
        assert sampler.epoch == epoch
        remaining = skip_first_batches(loader, 2)
        remaining.set_epoch(epoch)
        assert [batch.tolist() for batch in remaining] == drawn[-1][2:]
    assert drawn[0] != drawn[1]


def test_worker_processes_read_the_same_batches():
    sampler, _ = half_safe(world_size=1)
    loader = DataLoader(torch.arange(40), batch_sampler=sampler, num_workers=1)
    assert [batch.tolist() for batch in loader] == list(sampler)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((11, 3, 2), r"length=11 rows are fewer than two batches of batch_size=3 on each of world_size=2 .* 12 rows"),
        ((10, 0, 1), "batch_size must be a positive integer, but is 0"),
        ((10, 2.5, 1), r"batch_size must be a positive integer, but is 2\.5"),
        ((10, 1, -1), "world_size must be a positive integer, but is -1"),
        ((0, 1, 1), "length must be a positive integer, but is 0"),
    ],
)
def test_too_few_rows_and_other_sizes_are_refused(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        RoutedBatchSampler(*arguments)


@pytest.mark.parametrize(
    ("safe", "message"),
    [
        (np.ones(39, dtype=bool), "safe must have one value for each of 40 rows, but has 39"),
        (np.ones(40), "safe must be boolean .* float64"),
        (torch.ones(40, dtype=torch.uint8), "safe must be boolean .* uint8"),
        (np.ones((40, 1), dtype=bool), r"safe must be boolean .* shape \(40, 1\)"),
    ],
)
def test_a_split_that_fits_no_rows_is_refused_and_the_last_one_kept(safe: object, message: str):
    sampler, _ = half_safe()
    expected = list(sampler)
    with pytest.raises(ValueError, match=message):
        sampler.set_split(safe)
    assert list(sampler) == expected


@given(st.lists(st.booleans(), max_size=70))
def test_a_packed_mask_unpacks_to_itself(values: list[bool]):
    mask = np.array(values, dtype=bool)
    bits = pack_mask(mask)
    assert bits.dtype == torch.uint8 and bits.shape == (-(-len(values) // 8),)
    assert torch.equal(pack_mask(torch.from_numpy(mask)), bits)
    for stored in (bits, bits.numpy()):
        unpacked = unpack_mask(stored, len(values))
        assert unpacked.dtype == np.bool_ and unpacked.tolist() == values


def test_a_bitmap_keeps_its_layout():
    # Checkpoints hold it: the first row is the highest bit of the first byte.
    assert pack_mask(np.arange(10) == 0).tolist() == [128, 0]
    assert pack_mask(np.arange(10) == 9).tolist() == [0, 64]


def test_what_is_no_bitmap_of_that_length_is_refused():
    with pytest.raises(
        ValueError, match=r"mask of 17 rows must be uint8 of shape \(3,\), but are uint8 of shape \(2,\)"
    ):
        unpack_mask(torch.zeros(2, dtype=torch.uint8), 17)
    with pytest.raises(ValueError, match="must be uint8"):
        unpack_mask(np.zeros(2, dtype=bool), 16)
    with pytest.raises(ValueError, match="mask must be boolean"):
        pack_mask(np.zeros(2))

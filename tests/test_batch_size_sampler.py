"""The sampler: every sample once per epoch whatever the sizes, in one order, on all ranks, and where it was left."""

from __future__ import annotations

import math
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from optimzoo import AdaptiveBatchSampler

sizes_of_batches = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def flat(lists) -> list[int]:
    return [*chain.from_iterable(lists)]


def sampler_of(length: int, batch_size: int, seed: int = 3, **options) -> AdaptiveBatchSampler:
    generator = torch.Generator().manual_seed(seed)
    return AdaptiveBatchSampler(range(length), batch_size, generator=generator, **options)


def run(sampler, sizes, epochs=1):
    """The micro-batches of some epochs, where the batch size takes these values in turn."""
    sizes, seen = iter(sizes), []
    for _ in range(epochs):
        seen.append([])
        pending = 0
        for indices in sampler:
            seen[-1].append(indices)
            pending = pending or len(sampler.current.shares)
            pending -= 1
            if pending == 0:
                sampler.advance()
                sampler.batch_size = max(next(sizes, sampler.batch_size), sampler.batch_size)
    return seen


@given(st.integers(40, 200), sizes_of_batches, st.one_of(st.none(), st.integers(1, 9)), st.integers(0, 99))
def test_every_sample_once_per_epoch_in_an_order_that_sizes_do_not_change(length, sizes, micro, seed):
    sampler = sampler_of(length, 3, seed, max_micro_batch_size=micro)
    plain = sampler_of(length, length, seed)
    for epoch, batches in enumerate(run(sampler, sizes, epochs=2)):
        plain.set_epoch(epoch)
        assert flat(batches) == next(iter(plain))
        assert sorted(flat(batches)) == list(range(length))
        assert micro is None or max(map(len, batches)) <= micro
    assert (sampler.epoch, sampler.position) == (2, 0)


@given(st.integers(40, 120), sizes_of_batches, st.integers(1, 5), st.one_of(st.none(), st.integers(2, 9)))
def test_ranks_share_every_batch(length, sizes, ranks, micro):
    shared = [
        run(sampler_of(length, 10, num_replicas=ranks, rank=rank, max_micro_batch_size=micro), sizes)[0]
        for rank in range(ranks)
    ]
    assert len({len(batches) for batches in shared}) == 1
    together = [flat(parts) for parts in zip(*shared, strict=True)]
    alone = sampler_of(length, length)
    assert flat(together) == next(iter(alone))
    for parts in zip(*shared, strict=True):
        counts = [len(part) for part in parts]
        assert 0 < min(counts) <= max(counts) <= min(counts) + 1
        assert micro is None or max(counts) <= micro


@given(st.integers(40, 120), sizes_of_batches, st.integers(0, 20), st.one_of(st.none(), st.integers(1, 9)))
def test_resuming_repeats_and_loses_nothing(length, sizes, stop, micro):
    options = dict(max_micro_batch_size=micro)
    whole = run(sampler_of(length, 5, **options), sizes)[0]
    first = sampler_of(length, 5, **options)
    seen, used, left = [], 0, iter(sizes)
    for indices in first:
        seen.append(indices)
        if len(seen) - used == len(first.current.shares):
            used = len(seen)
            first.advance()
            first.batch_size = max(next(left, first.batch_size), first.batch_size)
            stop -= 1
        if stop < 0:
            break
    second = sampler_of(length, 5, seed=99, **options)
    second.load_state_dict(first.state_dict())
    if second.epoch == 0:
        assert seen[:used] + run(second, left)[0] == whole
    else:
        assert seen == whole


@given(st.integers(20, 90), st.integers(1, 30), st.integers(1, 3), st.booleans(), st.sampled_from([None, 2, 7]))
def test_the_length_is_what_comes(length, batch_size, ranks, drop_last, micro):
    batch_size = min(max(ranks, batch_size), length)
    options = dict(num_replicas=ranks, rank=0, drop_last=drop_last, max_micro_batch_size=micro)
    sampler = sampler_of(length, batch_size, **options)
    expected = len(sampler)
    assert [len(sampler) for _ in sampler] == [expected] * expected
    if ranks == 1 and micro is None:
        assert expected == (length // batch_size if drop_last else math.ceil(length / batch_size))


def test_the_length_follows_the_size():
    sampler = sampler_of(100, 10)
    batches = iter(sampler)
    next(batches), next(batches)
    sampler.batch_size = 40
    assert len(sampler) == 2 + 2
    sampler.advance(), sampler.advance()
    assert len(sampler_of(10**6, 1)) == 10**6


def test_what_is_left_is_dropped_where_that_is_asked_for():
    sampler = sampler_of(100, 30, drop_last=True)
    assert [len(batch) for batch in run(sampler, [])[0]] == [30, 30, 30]
    assert (sampler.epoch, sampler.position) == (1, 0)
    # The batch outgrows what is left of the epoch.
    sampler = sampler_of(100, 30, drop_last=True)
    assert [len(batch) for batch in run(sampler, [30, 60])[0]] == [30, 30]
    assert (sampler.epoch, sampler.position) == (1, 0)


def test_too_few_samples_for_all_ranks_join_the_batch_before():
    for length, expected in ((9, [4, 2, 3]), (10, [4, 4, 2]), (3, [3])):
        totals = []
        for rank in range(2):
            sampler = sampler_of(length, 4 if length > 3 else 2, num_replicas=2, rank=rank)
            totals.append([len(batch) for batch in run(sampler, [])[0]])
        counts = [sum(parts) for parts in zip(*totals, strict=True)]
        assert sum(counts) == length
        assert counts == expected if length != 9 else sorted(counts) == [2, 3, 4]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
@pytest.mark.parametrize(("workers", "prefetch"), [(0, None), (1, 2), (2, 3)])
def test_a_new_size_arrives_as_late_as_was_drawn_ahead(workers, prefetch):
    sampler = sampler_of(400, 4)
    loader = DataLoader(range(400), batch_sampler=sampler, num_workers=workers, prefetch_factor=prefetch)
    sizes = []
    for batch in loader:
        assert sampler.current.samples == len(batch)
        sizes.append(len(batch))
        sampler.advance()
        if len(sizes) == 5:
            sampler.batch_size = 16
    lag = workers * (prefetch or 0)
    assert sizes[: 5 + lag + 1] == [4] * (5 + lag) + [16]
    assert sum(sizes) == 400


def test_sizes_that_were_drawn_ahead_survive_two_resumptions():
    sampler = sampler_of(100, 4)
    ahead = iter(sampler)
    expected = [next(ahead) for _ in range(5)]  # as a loader with workers would
    sampler.batch_size = 16
    for used in (0, 2):
        state = sampler.state_dict()
        sampler = sampler_of(100, 4, seed=9)
        sampler.load_state_dict(state)
        batches = iter(sampler)
        found = []
        for _ in range(5 - used):
            found.append(next(batches))
            if len(found) <= 2 and not used:
                sampler.advance()
                if len(found) == 2:
                    break
        assert found == expected[used : used + len(found)]
    assert len(next(batches)) == 16


def test_epochs():
    sampler = sampler_of(20, 8)
    batches = iter(sampler)
    next(batches)
    sampler.advance()
    sampler.set_epoch(0)  # the one under way
    assert sampler.position == 8
    rest = list(sampler)
    assert [len(batch) for batch in rest] == [8, 4]
    assert list(batches) == []  # an older iteration has ended
    sampler.set_epoch(5)
    assert (sampler.position, len(sampler)) == (0, 3)
    again = sampler_of(20, 8)
    again.set_epoch(5)
    assert list(again) == list(sampler) != rest
    assert list(sampler_of(20, 8, shuffle=False)) == [[*range(8)], [*range(8, 16)], [*range(16, 20)]]


def test_the_seed_is_drawn_once():
    generator = torch.Generator().manual_seed(0)
    one, two = (AdaptiveBatchSampler(range(50), 50, generator=generator) for _ in range(2))
    assert next(iter(one)) != next(iter(two))
    torch.manual_seed(1)
    first = next(iter(AdaptiveBatchSampler(range(50), 50)))
    torch.manual_seed(1)
    assert next(iter(AdaptiveBatchSampler(range(50), 50))) == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_size=0), "batch_size must be a whole number from 1 to 20, got 0"),
        (dict(batch_size=2.0), "batch_size must be a whole number"),
        (dict(batch_size=True), "batch_size must be a whole number"),
        (dict(batch_size=8, max_batch_size=7), "batch_size must be a whole number from 1 to 7, got 8"),
        (dict(batch_size=8, max_batch_size=21), "max_batch_size must be a whole number from 1 to 20, got 21"),
        (dict(batch_size=8, max_micro_batch_size=0), "max_micro_batch_size must be a whole number >= 1, got 0"),
        (dict(batch_size=8, min_accumulation_steps=0), "min_accumulation_steps must be a whole number >= 1, got 0"),
        (dict(batch_size=3, min_accumulation_steps=4), "batch_size=3 has no sample for each of 4 micro-batches of"),
        (dict(batch_size=8, num_replicas=2, rank=2), "rank must be a whole number from 0 to 1, got 2"),
        (dict(batch_size=1, num_replicas=2, rank=0), "batch_size must be a whole number from 2 to 20, got 1"),
        (dict(batch_size=5, num_replicas=2, rank=0, max_micro_batch_size=1), "5 has no sample for each of 3"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveBatchSampler(range(20), **options)


def test_the_fewest_micro_batches():
    sampler = sampler_of(100, 12, min_accumulation_steps=3, max_micro_batch_size=8)
    expected = [4, 4, 4], [4, 4, 4], [8, 8, 8], [7, 6, 6, 6], [6, 6, 5, 5, 5]  # what is left of 39
    assert [len(batch) for batch in run(sampler, [12, 24, 25, 39])[0]] == flat(expected)
    assert sampler.accumulation_steps == 5


def test_wrong_use_is_named():
    with pytest.raises(TypeError, match="dataset must have a length, got generator"):
        AdaptiveBatchSampler((i for i in range(3)), 1)
    sampler = sampler_of(20, 4)
    with pytest.raises(RuntimeError, match="no batch has been drawn from the sampler since the last step"):
        sampler.advance()
    with pytest.raises(ValueError, match="epoch must be a whole number >= 0, got -1"):
        sampler.set_epoch(-1)
    with pytest.raises(ValueError, match="the state is of a dataset of length 20, this has 21"):
        sampler_of(21, 4).load_state_dict(sampler.state_dict())
    small = sampler_of(20, 2, max_batch_size=3)
    before = small.state_dict()
    with pytest.raises(ValueError, match="batch_size must be a whole number from 1 to 3, got 4"):
        small.load_state_dict(sampler.state_dict())
    assert small.state_dict() == before


def test_a_loop_that_breaks_off_goes_on_as_from_its_state():
    sampler = sampler_of(400, 8, max_micro_batch_size=4)
    ahead = iter(sampler)
    for _ in range(11):  # as a loader with workers would
        next(ahead)
    sampler.advance()
    sampler.batch_size = 32
    other = sampler_of(400, 8, seed=9, max_micro_batch_size=4)
    other.load_state_dict(sampler.state_dict())
    expected = list(other)
    assert len(sampler_of(400, 8)) == 50
    assert list(sampler) == expected
    assert [len(batch) for batch in expected][:12] == [4] * 12


def test_the_length_knows_sizes_that_were_drawn_ahead():
    for drop_last in (False, True):
        sampler = sampler_of(100, 8, drop_last=drop_last)
        sampler.load_state_dict({**sampler.state_dict(), "planned": [8] * 6, "batch_size": 64})
        assert len(sampler) == len(list(sampler)) == (6 if drop_last else 7)


def test_an_epoch_that_ended_while_the_size_was_larger_is_over():
    # 10 + 10 of 29 were drawn when the size is 12: the last 9 are left out, whatever the size becomes.
    for resumed in (False, True):
        sampler = sampler_of(29, 10, drop_last=True)
        ahead = iter(sampler)
        next(ahead), next(ahead)
        sampler.batch_size = 12
        assert next(ahead, None) is None
        sampler.batch_size = 4
        if resumed:
            state = sampler.state_dict()
            sampler = sampler_of(29, 10, seed=9, drop_last=True)
            sampler.load_state_dict(state)
            assert [len(batch) for batch in sampler] == [10, 10]
        sampler.advance(), sampler.advance()
        assert (sampler.epoch, sampler.position) == (1, 0)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (dict(position=-1), "position must be a whole number from 0 to 20, got -1"),
        (dict(position=900), "position must be a whole number from 0 to 20, got 900"),
        (dict(planned=[0]), "batch_size must be a whole number from 1 to 20, got 0"),
        (dict(planned=[99]), "batch_size must be a whole number from 1 to 20, got 99"),
        (dict(planned=None), "planned must be a list of batch sizes, got None"),
        (dict(epoch="a"), "epoch must be a whole number >= 0, got 'a'"),
        (dict(seed=None), "seed must be a whole number, got None"),
    ],
)
def test_a_state_out_of_range_changes_nothing(entry, message):
    sampler = sampler_of(20, 4)
    before = sampler.state_dict()
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict({**before, "batch_size": 8, **entry})
    assert sampler.state_dict() == before

"""Poisson sampling: rates, independence, shards, resuming, secrets, and batches of no records."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections import namedtuple

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from optimzoo import PoissonSampler, poisson, poisson_collate

LEVEL = 1e-6  # of a test, for keys that are drawn; where a test says which, it cannot fail by chance


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masks(sampler) -> np.ndarray:
    """One row a step, one column a record."""
    found = np.zeros((sampler.steps, sampler.length), dtype=bool)
    for row, batch in zip(found, sampler, strict=True):
        row[batch] = True
    return found


def chi_square(counts, expected, variance):
    statistic = (np.square(counts - expected) / variance).sum()
    low, high = stats.chi2(np.size(counts)).ppf([LEVEL / 2, 1 - LEVEL / 2])
    assert low < statistic < high


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.97])
def test_every_record_is_drawn_at_the_rate_in_every_step_and_independently(rate):
    steps, length = 1500, 200
    found = masks(PoissonSampler(length, rate, steps, generator=seeded()))
    variance = rate * (1 - rate)
    chi_square(found.sum(0), steps * rate, steps * variance)  # by record
    chi_square(found.sum(1), length * rate, length * variance)  # by step
    centred = (found - rate) / variance**0.5
    # Products of different records in one step, and of one record in different steps: means 0, variances 1.
    pairs = [centred[:, a] @ centred[:, b] for a, b in itertools.combinations(range(0, length, 4), 2)]
    chi_square(np.array(pairs), 0, steps)
    for lag in (1, 2, 7):
        chi_square((centred[:-lag] * centred[lag:]).sum(0), 0, steps - lag)


def test_sizes_of_batches_are_binomial():
    sizes = masks(PoissonSampler(50, 0.1, 4000, generator=seeded())).sum(1)
    counts = np.bincount(sizes, minlength=13)
    expected = stats.binom(50, 0.1).pmf(np.arange(13)) * 4000
    counts, expected = ([*values[:11], sum(values[11:])] for values in (counts, expected))
    expected[-1] = 4000 - sum(expected[:-1])
    assert stats.chisquare(counts, expected).pvalue > LEVEL


def test_the_rate_one_draws_all_and_empty_batches_are_kept():
    assert list(PoissonSampler(4, 1.0, 2)) == [[0, 1, 2, 3]] * 2
    assert list(PoissonSampler(4, 1, 1)) == [[0, 1, 2, 3]]
    batches = list(PoissonSampler(range(3), 0.01, 100, generator=seeded()))
    assert len(batches) == 100
    assert [] in batches
    assert list(PoissonSampler(0, 0.5, 3)) == [[], [], []]  # no record is as good as one


def test_the_number_of_steps_does_not_depend_on_the_data():
    for length in (0, 1, 7, 1000):
        sampler = PoissonSampler(length, 0.1, 13)
        assert len(sampler) == len(list(sampler)) == 13


def test_many_records_are_drawn_in_blocks(monkeypatch):
    length = 1000
    monkeypatch.setattr(poisson, "_BLOCK", 64)
    found = masks(PoissonSampler(length, 0.3, 600, generator=seeded()))
    chi_square(found.sum(0), 600 * 0.3, 600 * 0.21)
    assert not np.array_equal(found[:, :64], found[:, 64:128])


def test_passes_are_drawn_anew_and_a_stopped_pass_goes_on():
    sampler = PoissonSampler(100, 0.2, 5, generator=seeded())
    whole = [*sampler, *sampler]
    assert sampler.step == 10
    assert all(a != b for a, b in itertools.combinations(whole, 2))
    again = PoissonSampler(100, 0.2, 5, generator=seeded())
    first = [batch for batch, _ in zip(again, range(3), strict=False)]
    assert first == whole[:3]
    assert again.step == 3 or again.step == 4  # zip may have drawn one more
    again.step = 3
    assert [*again] == whole[3:5]
    assert [*again] == whole[5:]


def test_ranks_draw_independently_from_their_own_records():
    ranks, length, rate, steps = 3, 100, 0.25, 1200
    key = seeded(1).get_state()
    samplers = []
    for rank in range(ranks):
        generator = torch.Generator()
        generator.set_state(key)  # the same key on all ranks
        samplers.append(PoissonSampler(length, rate, steps, generator=generator, num_replicas=ranks, rank=rank))
    found = [masks(sampler) for sampler in samplers]
    for rank, mine in enumerate(found):
        assert {*np.flatnonzero(mine.any(0)) % ranks} == {rank}
    total = sum(mine.astype(int) for mine in found)
    assert total.max() == 1
    chi_square(total.sum(0), steps * rate, steps * rate * (1 - rate))
    # Neighbours are on different ranks: the masks must not move together.
    centred = (total - rate) / (rate * (1 - rate)) ** 0.5
    chi_square((centred[:, :-1] * centred[:, 1:]).sum(0), 0, steps)


def test_another_number_of_ranks_draws_other_masks():
    one, two = (PoissonSampler(100, 0.5, 1, generator=seeded(), num_replicas=n, rank=0) for n in (1, 2))
    assert [i for i in next(iter(one)) if i % 2 == 0] != next(iter(two))


def test_the_default_group_gives_the_ranks(monkeypatch):
    monkeypatch.setattr(poisson.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(poisson.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(poisson.dist, "get_rank", lambda: 3)
    sampler = PoissonSampler(10, 1.0, 1)
    assert (sampler.num_replicas, sampler.rank, [*sampler]) == (4, 3, [[3, 7]])


# Resuming


def test_a_state_with_the_key_goes_on_bit_for_bit():
    sampler = PoissonSampler(50, 0.3, 8)
    before = iter(sampler)
    drawn = [next(before) for _ in range(3)]
    state = pickle.loads(pickle.dumps(sampler.state_dict(export_private_state=True)))
    rest = [*before, *sampler]
    resumed = PoissonSampler(50, 0.3, 8)
    resumed.load_state_dict(state)
    assert [*resumed, *resumed] == rest
    resumed.load_state_dict(state)
    resumed.step = 0
    assert [next(iter(resumed)) for _ in range(3)] == drawn


def test_a_state_without_the_key_is_public_and_goes_on_with_other_batches():
    sampler = PoissonSampler(50, 0.3, 8)
    for _ in zip(range(3), sampler, strict=False):
        pass
    state = sampler.state_dict()
    assert state == {"step": 3, "sample_rate": 0.3}
    rest = [*sampler]
    resumed = PoissonSampler(51, 0.3, 8)  # one record more is nobody's business
    key = resumed._key
    resumed.load_state_dict(state)
    assert resumed._key != key  # it may have been used for these steps already
    found = [*resumed]
    assert len(found) == len(rest) == 5
    assert found != rest


def test_the_key_is_nowhere_but_in_a_state_that_was_asked_for():
    sampler = PoissonSampler(100, 0.5, 4)
    assert sampler._key.hex() in sampler.state_dict(export_private_state=True)["key"]
    assert sampler._key.hex() not in str(sampler.state_dict())
    assert sampler._key not in pickle.dumps(sampler)
    assert repr(sampler) == "PoissonSampler(sample_rate=0.5, steps=4)"
    others = [copy.copy(sampler), copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))]
    assert len({sampler._key, *(other._key for other in others)}) == 4
    drawn = [[*one] for one in (sampler, *others)]
    assert all(a != b for a, b in itertools.combinations(drawn, 2))


def test_manual_seed_has_no_say_and_is_not_disturbed():
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append([*PoissonSampler(100, 0.5, 1)])
        after = torch.rand(1)
    assert drawn[0] != drawn[1]
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))
    assert [*PoissonSampler(99, 0.5, 3, generator=seeded())] == [*PoissonSampler(99, 0.5, 3, generator=seeded())]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sample_rate=0.2), r"the state has sample_rate=0.2, this 0.5"),
        (dict(step=-1), "step must be a whole number >= 0, got -1"),
        (dict(step=1.0), "step must be a whole number >= 0, got 1.0"),
        (dict(key="00"), "key must be 64 hexadecimal digits$"),
        (dict(key="xy" * 32), "key must be 64 hexadecimal digits$"),
        (dict(key=7), "key must be 64 hexadecimal digits$"),
    ],
)
def test_a_wrong_state_changes_nothing(change, message):
    sampler = PoissonSampler(10, 0.5, 4, generator=seeded())
    sampler.step = 2
    before = sampler.state_dict(export_private_state=True)
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict({**before, **change})
    with pytest.raises(ValueError, match="state_dict lacks step"):
        sampler.load_state_dict({"sample_rate": 0.5})
    assert sampler.state_dict(export_private_state=True) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((iter([1]), 0.5, 1), TypeError, "data_source must have a length or be one, got list_iterator"),
        ((-1, 0.5, 1), ValueError, "data_source must be a whole number >= 0, got -1"),
        ((True, 0.5, 1), ValueError, "data_source must be a whole number >= 0, got True"),
        ((5, 0.0, 1), ValueError, r"sample_rate must be in \(0, 1\], got 0.0"),
        ((5, 1.5, 1), ValueError, r"sample_rate must be in \(0, 1\], got 1.5"),
        ((5, float("nan"), 1), ValueError, r"sample_rate must be in \(0, 1\], got nan"),
        ((5, "0.1", 1), TypeError, r"sample_rate must be a number in \(0, 1\], got '0.1'"),
        ((5, 0.5, 0), ValueError, "steps must be a whole number >= 1, got 0"),
        ((5, 0.5, 2.0), ValueError, "steps must be a whole number >= 1, got 2.0"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        PoissonSampler(*arguments)


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="num_replicas must be a whole number >= 1, got 0"):
        PoissonSampler(5, 0.5, 1, num_replicas=0)
    with pytest.raises(ValueError, match="rank must be a whole number from 0 to 1, got 2"):
        PoissonSampler(5, 0.5, 1, num_replicas=2, rank=2)
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator or None, got int"):
        PoissonSampler(5, 0.5, 1, generator=3)
    with pytest.raises(ValueError, match="step must be a whole number >= 0, got -1"):
        PoissonSampler(5, 0.5, 1).step = -1


# Batches


class Rows(TensorDataset):
    """Records with structure."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return {"x": x, "y": (y, 3.0), "name": f"record {index}"}


ROWS = Rows(torch.arange(24.0).view(4, 2, 3), torch.arange(4))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_every_batch_and_the_empty_ones_in_shape(workers):
    sampler = PoissonSampler(ROWS, 0.2, 12, generator=seeded(5))
    expected = [*PoissonSampler(ROWS, 0.2, 12, generator=seeded(5))]
    loader = DataLoader(ROWS, batch_sampler=sampler, collate_fn=poisson_collate(ROWS), num_workers=workers)
    batches = [*loader]
    assert len(loader) == len(batches) == 12
    assert [] in expected
    for batch, indices in zip(batches, expected, strict=True):
        x, (y, three) = batch["x"], batch["y"]
        assert (y.tolist(), x.shape, x.dtype) == (indices, (len(indices), 2, 3), torch.float32)
        assert (y.dtype, three.dtype) == (torch.int64, torch.float64)
        assert torch.equal(x, ROWS.tensors[0][indices])
        assert [*batch["name"]] == [f"record {i}" for i in indices]
    if workers:
        sampler.step = 6  # what a loader drew ahead comes again
        assert [batch["y"][0].tolist() for batch in loader] == expected[6:]


def test_a_model_takes_an_empty_batch():
    data = TensorDataset(torch.randn(5, 3, 8, 8), torch.zeros(5, dtype=torch.long))
    x, y = poisson_collate(data)([])
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 10))
    loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
    loss.backward()
    assert loss.item() == 0
    assert all(not param.grad.any() for param in model.parameters())


Pair = namedtuple("Pair", "one two")


def test_other_structures_and_other_collate_functions():
    empty = poisson_collate([Pair(torch.ones(2, dtype=torch.bfloat16), [torch.ones(1), "a"])])([])
    assert isinstance(empty, Pair)
    assert (empty.one.shape, empty.one.dtype) == ((0, 2), torch.bfloat16)
    assert (empty.two[0].shape, [*empty.two[1]]) == ((0, 1), [])

    def collate(samples):
        return torch.tensor(samples)[:, None], [str(i) for i in samples]

    both = poisson_collate(range(3, 6), collate)
    assert (both([])[0].shape, both([])[1]) == ((0, 1), [])
    assert both([4])[0].tolist() == [[4]]
    assert both([])[0] is not both([])[0]


def test_an_empty_batch_keeps_nothing_of_the_record():
    secret = torch.full((1000,), 3.25)
    kept = pickle.dumps(poisson_collate([secret]))
    assert len(kept) < 1000
    assert secret.numpy().tobytes()[:64] not in kept


@pytest.mark.parametrize(
    ("dataset", "collate", "error", "message"),
    [
        ([], None, ValueError, "dataset must have a record"),
        ([1.0], lambda samples: torch.tensor(0.0), ValueError, r"of one record it gave one of shape \(\)"),
        ([1.0], lambda samples: torch.zeros(3, 1), ValueError, r"of one record it gave one of shape \(3, 1\)"),
        ([1.0], lambda samples: {"x": object()}, TypeError, "must give tensors or strings, .*, got object"),
    ],
)
def test_what_cannot_be_emptied_is_said(dataset, collate, error, message):
    with pytest.raises(error, match=message):
        poisson_collate(dataset, *([collate] if collate else []))

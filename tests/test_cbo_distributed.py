"""Particles that are sharded over processes give what one process gives, to rounding."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from test_cbo import batched, live, parameters

import optimzoo
from optimzoo import consensus

if not torch.distributed.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

import torch.distributed as dist

STEPS = 8
N = 11  # five and six

VARIANTS = {
    "defaults": {},
    "isotropic": dict(noise="isotropic", sigma=0.3),
    "heaviside": dict(correction="heaviside"),
    "memory": dict(memory="reevaluated"),
    "batch": dict(particle_batch=4),
    "batch-of-two-partial": dict(particle_batch=2, update="partial"),
    "ess": dict(ess=0.5),
    "adam": dict(rule="adam", lamda=0.1),
    "hopping": dict(rule="hopping", sigma=0.7),
    "kicks": dict(kick_below=0.2, patience=2),
    "gradient": dict(grad_drift=0.01),
    "polarised": dict(kernel="gaussian", kappa=1.5, alpha=2.0, n_runs=2),
    "polarised-batch": dict(kernel="bounded", kappa=2.0, particle_batch=3),
    "smooth": dict(memory="smooth"),
    "ball": dict(bounds=1.5, evaluate_consensus=True),
    "reduced": dict(particle_batch=2, leftover="carry"),
    "runs": dict(n_runs=3, evaluate_consensus=True),
}


def train(settings, closures, group=None, reduces=False):
    params = parameters()
    optimizer = optimzoo.CBO(params, N, seed=3, process_group=group, **settings)
    for t in range(STEPS):
        if reduces and t % 2:
            optimizer._swarm["particles"].mul_(0.1)
            optimizer.reduce(0.4)
        loss = optimizer.step(live(params)) if closures == "live" else optimizer.step(batched, batched=True)
    return optimizer, loss


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, settings in VARIANTS.items():
        for closures in ("live", "batched"):
            alone, expected = train(settings, closures, reduces=name == "reduced")
            shared, loss = train(settings, closures, dist.group.WORLD, reduces=name == "reduced")
            x, mine = alone._swarm["particles"], shared._swarm["particles"]
            first = shared._swarm["first"]
            assert mine.shape[1] == (6, 5)[rank] or name == "reduced", name
            close = dict(rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
            torch.testing.assert_close(mine, x[:, first : first + mine.shape[1]], **close)
            torch.testing.assert_close(loss, expected, **close)
            for key in ("best", "best_loss", "consensus", "alpha"):
                torch.testing.assert_close(shared._swarm[key], alone._swarm[key], **close)
            for left, right in zip(shared._params, alone._params, strict=True):
                torch.testing.assert_close(left, right, **close)
    # Infinite losses on one rank, and on both.
    optimizer, _ = train({}, "batched", dist.group.WORLD)
    before = optimizer._swarm["particles"].clone()
    optimizer.step(lambda stacked: batched(stacked) + (torch.inf if rank == 0 else 0), batched=True)
    assert optimizer._params[0].isfinite().all()
    assert not torch.equal(optimizer._swarm["particles"], before)
    before = optimizer._swarm["particles"].clone()
    with pytest.warns(UserWarning, match="infinite or NaN"):
        optimizer.step(lambda stacked: batched(stacked) + torch.inf, batched=True)
    assert torch.equal(optimizer._swarm["particles"], before)
    # A rank whose particles are all gone takes part: with some of the seeds the two that stay are on one rank.
    for settings in (dict(noise="isotropic", sigma=0.3), dict(kernel="gaussian"), dict(memory="reevaluated")):
        empty = 0
        for seed in range(6):
            optimizer = optimzoo.CBO(parameters(), 8, seed=seed, process_group=dist.group.WORLD, **settings)
            for _ in range(3):
                optimizer.step(batched, batched=True)
                optimizer._swarm["particles"].mul_(1e-3)
                left = optimizer.reduce(0.99)
            optimizer.step(batched, batched=True)
            assert optimizer._params[0].isfinite().all()
            sizes = [None, None]
            dist.all_gather_object(sizes, optimizer.particles[0].shape[1])
            assert sum(sizes) == left == 2
            empty += 0 in sizes
        assert empty > 0
    with pytest.raises(ValueError, match="n_particles must be at least two for each of 2 processes"):
        optimzoo.CBO(parameters(), 3, process_group=dist.group.WORLD)
    # One seed for all: rank 0's where none is given.
    torch.manual_seed(rank)
    optimizer = optimzoo.CBO(parameters(), N, particle_batch=2, process_group=dist.group.WORLD)
    drawn, evaluated = [None, None], []
    dist.all_gather_object(drawn, optimizer.param_groups[0]["seed"])
    torch.manual_seed(0)
    assert drawn == [int(torch.randint(2**63 - 1, ()))] * 2
    for _ in range(4):
        optimizer.step(lambda stacked: evaluated.append(stacked[0].shape[1]) or batched(stacked), batched=True)
    total = torch.tensor(sum(evaluated))
    dist.all_reduce(total)
    assert total == 4 * 2
    for seed in (rank, None if rank else 5):
        with pytest.raises(ValueError, match=r"seed must be the same on all ranks, got \[\d, (1|None)\]"):
            optimzoo.CBO(parameters(), N, seed=seed, process_group=dist.group.WORLD)
    for clone in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"no copy and no pickle: save state_dict\(\) on each rank"):
            clone(optimizer)
    dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path):
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)


def test_weights_of_shards_are_those_of_the_whole():
    energies = torch.tensor([[3.0, 1.0, torch.inf, 2.0, 50.0]], dtype=torch.float64)
    alpha = torch.tensor([2.0], dtype=torch.float64)
    shards = energies[:, :2], energies[:, 2:]
    for mine in shards:
        seen = []

        def reduce(tensor, op, seen=seen):
            seen.append(op)
            lowest = energies.amin(-1, keepdim=True)
            return lowest if op == "min" else (-alpha[:, None] * (energies - lowest)).exp().sum(-1, keepdim=True)

        first = 0 if mine is shards[0] else 2
        expected = consensus.weights(energies, alpha)[:, first : first + mine.shape[1]]
        torch.testing.assert_close(consensus.weights(mine, alpha, reduce), expected, rtol=1e-14, atol=0)
        assert seen == ["min", "sum"]

"""The variance over two ranks is that of one process that has all the samples; sizes and orders agree."""

from __future__ import annotations

import contextlib
from itertools import chain

import numpy as np
import pytest
import torch
from reference import batch_size as reference
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from optimzoo import AdaptiveBatchSampler, AdaptiveBatchSize

if not torch.distributed.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

RANKS = 2
THRESHOLDS = dict(eta=0.2, theta=0.05, nu=0.2)
DRAW = torch.Generator().manual_seed(0)
INPUTS = torch.randn(203, 6, generator=DRAW, dtype=torch.float64)
DATA = TensorDataset(INPUTS, INPUTS.square().sum(1, keepdim=True))


def build() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def loss_of(model, inputs, targets):
    return nn.functional.mse_loss(model(inputs), targets)


def sample_gradients(model, inputs, targets) -> dict[str, torch.Tensor]:
    values = {name: param.detach() for name, param in model.named_parameters()}

    def loss(values, x, y):
        return nn.functional.mse_loss(functional_call(model, values, (x[None],)), y[None])

    return vmap(grad(loss), (None, 0, 0))(values, inputs, targets)


def vectors(model, rows) -> np.ndarray:
    """The gradients of these samples, one in a row."""
    samples = sample_gradients(model, *DATA[rows])
    return torch.cat([part.flatten(1) for part in samples.values()], 1).numpy()


def literal(groups: list[np.ndarray], test: str) -> float:
    """What a test of groups asks for, from the gradients of all samples of each."""
    means, sizes = np.array([group.mean(0) for group in groups]), np.array([len(group) for group in groups])
    mean = sizes @ means / sizes.sum()
    square, variance = mean @ mean, reference.group_variance(means, sizes)
    inner = sizes @ (means @ mean - square) ** 2 / (len(groups) - 1)
    eta, theta, nu = THRESHOLDS.values()
    if test == "norm":
        return variance / (eta**2 * square)
    orthogonal = (variance - inner / square) / (nu**2 * square)
    return max(inner / (theta**2 * square**2), orthogonal if test == "augmented" else 0)


def gathered(mine):
    rows = [None] * RANKS
    dist.all_gather_object(rows, mine)
    return rows


def train(source: str, test: str, micro: int | None, seed: int, **options) -> None:
    """An epoch on two ranks, where every test is compared with what one process would have found."""
    alone = build()  # stepped with the gradient of the whole batch
    torch.manual_seed(seed + dist.get_rank())  # the order is the first rank's
    sampler = AdaptiveBatchSampler(DATA, 16, max_micro_batch_size=micro)
    assert len(set(gathered(sampler.seed))) == 1
    model = build()
    if source == "ddp":
        model = DistributedDataParallel(model, bucket_cap_mb=2e-4)
    elif source == "micro_batch":
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    plain = torch.optim.SGD(alone.parameters(), lr=0.01)
    schedule = AdaptiveBatchSize(
        optimizer,
        sampler,
        test,
        **THRESHOLDS,
        source=source,
        model=model if source == "ddp" else None,
        max_growth=1.5,
        **options,
    )
    order = TensorDataset(torch.arange(len(DATA)))
    mine, seen, sizes = [], [], []
    for (rows,) in DataLoader(order, batch_sampler=sampler):
        mine.append(rows)
        apart = source == "ddp" and schedule.remaining > 1
        with model.no_sync() if apart else contextlib.nullcontext():
            (schedule.weight * loss_of(model, *DATA[rows])).backward()
        if schedule.remaining:
            continue
        if source == "per_sample":
            parts = sample_gradients(model, *DATA[torch.cat(mine)])
            for name, param in model.named_parameters():
                dist.all_reduce(param.grad, op=dist.ReduceOp.SUM)
                param.grad /= RANKS
                param.grad_sample = parts[name]
        nn.utils.clip_grad_norm_(model.parameters(), 1e6 if source == "per_sample" else 1e-3)  # does not enter
        if source != "per_sample":
            nn.utils.clip_grad_norm_(alone.parameters(), 1e-3)
        every = gathered([rows.tolist() for rows in mine])
        flat = [*chain.from_iterable(chain.from_iterable(every))]
        if source == "per_sample":
            groups = [row[None] for row in vectors(alone, flat)]
        elif source == "ddp":
            groups = [vectors(alone, [*chain.from_iterable(part)]) for part in every]
        else:
            groups = [vectors(alone, [*chain.from_iterable(parts)]) for parts in zip(*every, strict=True)]
        loss_of(alone, *DATA[flat]).backward()
        if source != "per_sample":
            nn.utils.clip_grad_norm_(alone.parameters(), 1e-3)
        needed = schedule.needs_stats and len(groups) > 1
        optimizer.step(), plain.step()
        schedule.step()
        optimizer.zero_grad(), plain.zero_grad()
        if needed:
            assert schedule.wanted == pytest.approx(literal(groups, test), rel=1e-9)
        seen += flat
        sizes.append((len(flat), sampler.batch_size))
        mine = []
    assert sorted(seen) == [*range(len(DATA))]
    assert gathered(sizes) == [sizes] * RANKS
    assert schedule.tests > 1
    assert schedule.samples == len(DATA)
    assert sampler.batch_size > 16
    for left, right in zip(model.parameters(), alone.parameters(), strict=True):
        left = left.full_tensor() if hasattr(left, "full_tensor") else left
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


def refusals() -> None:
    model, sampler = build(), AdaptiveBatchSampler(DATA, 16, max_micro_batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ddp = DistributedDataParallel(model)
    with pytest.raises(ValueError, match="source='ddp' does not go with test='coordinatewise'"):
        AdaptiveBatchSize(optimizer, sampler, "coordinatewise", model=ddp)
    with pytest.raises(ValueError, match=r"source='micro_batch' needs sharded parameters \(FSDP2\)"):
        AdaptiveBatchSize(optimizer, sampler)
    lonely = AdaptiveBatchSampler(DATA, 16, num_replicas=1, rank=0)
    with pytest.raises(ValueError, match=r"source='ddp' needs two ranks or more.*num_replicas=1"):
        AdaptiveBatchSize(optimizer, lonely, model=ddp)
    part = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match="source='ddp' needs an optimizer of all trained parameters of model"):
        AdaptiveBatchSize(part, sampler, model=ddp)
    alone = [dist.new_group([rank]) for rank in range(RANKS)][dist.get_rank()]
    with pytest.raises(ValueError, match="the process group of model has 1 ranks, the sampler has num_replicas=2"):
        AdaptiveBatchSize(optimizer, sampler, model=DistributedDataParallel(build(), process_group=alone))
    torch.manual_seed(dist.get_rank())
    apart = AdaptiveBatchSampler(DATA, 16, num_replicas=2, rank=0)
    with pytest.raises(ValueError, match=r"have seeds .* and rank=\[0, 0\]"):
        AdaptiveBatchSize(optimizer, apart, model=ddp)
    schedule = AdaptiveBatchSize(optimizer, sampler, model=ddp)
    assert schedule.source == "ddp"
    for rows in sampler:
        (schedule.weight * loss_of(ddp, *DATA[rows])).backward()  # without no_sync
        if schedule.remaining == 0:
            break
    with pytest.raises(RuntimeError, match="DDP reduced the gradient 2 times for one batch"):
        schedule.step()
    assert schedule.steps == 0
    sharded = build()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (RANKS,)))
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="source='per_sample' needs whole parameters"):
        AdaptiveBatchSize(optimizer, AdaptiveBatchSampler(DATA, 16))


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    for test in ("norm", "inner_product", "augmented"):
        train("ddp", test, None, 1)
        train("ddp", test, 3, 2)
        train("per_sample", test, None, 3)
        train("micro_batch", test, 3, 4)
    train("micro_batch", "norm", 3, 5, test_interval=3)
    refusals()
    dist.destroy_process_group()


def test_two_ranks_find_what_one_process_would(tmp_path):
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=RANKS)

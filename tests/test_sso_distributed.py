"""SSO under DistributedDataParallel: two processes with half of the data each take the steps of one with all of it."""

from __future__ import annotations

import functools

import pytest
import torch
from test_sso import ADAM, INPUTS, SGD, TARGETS, half_squared, network, weights

from optimzoo import SSO

if not torch.distributed.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

VARIANTS = {
    "sgd": dict(inner=SGD),
    "adam": dict(inner=ADAM),
    "armijo": dict(),
    "lbfgs": dict(inner=functools.partial(torch.optim.LBFGS, max_iter=3)),
    "search": dict(inner=SGD, line_search=True),
    "everything": dict(line_search=True, target_metric="adagrad", reset_inner=False),
    "skips": dict(nonfinite="skip"),
}
STEPS = 4


def train(settings, inputs, targets, shared):
    model = network()
    module = DistributedDataParallel(model, bucket_cap_mb=1e-4, gradient_as_bucket_view=True) if shared else model
    group = dist.group.WORLD if shared else None
    optimizer = SSO(model.parameters(), 0.6, inner_steps=4, process_group=group, **settings)

    def closure():
        return module(inputs), lambda z: half_squared(z, targets)

    return optimizer, module, closure, [optimizer.step(closure) for _ in range(STEPS)]


def infinite(closure):
    outputs, loss = closure()
    return outputs, lambda z: loss(z) / 0


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    half = slice(4 * rank, 4 * rank + 4)
    for name, settings in VARIANTS.items():
        alone, one, _, expected = train(settings, INPUTS, TARGETS, False)
        optimizer, two, closure, losses = train(settings, INPUTS[half], TARGETS[half], True)
        close = dict(rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(weights(two), weights(one), **close)
        losses = torch.stack(losses)
        dist.all_reduce(losses)
        torch.testing.assert_close(losses / 2, torch.stack(expected), **close)
        assert alone.counts == optimizer.counts, name
        # What only one process finds to be infinite stops both.
        before = weights(two)
        broken = functools.partial(infinite, closure) if rank == 0 else closure
        if name == "skips":
            optimizer.step(broken)
        else:
            with pytest.raises(FloatingPointError):
                optimizer.step(broken)
        assert torch.equal(before, weights(two)), name
        optimizer.step(closure)
        assert not torch.equal(before, weights(two)), name
    dist.destroy_process_group()


def test_two_processes_with_half_of_the_data_each_step_as_one(tmp_path):
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)

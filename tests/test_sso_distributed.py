"""SSO under DistributedDataParallel and FSDP2: two processes, each with half of the data, step as one with all."""

from __future__ import annotations

import functools

import pytest
import torch
from test_sso import ADAM, INPUTS, SGD, TARGETS, half_squared, network

from optimzoo import SSO

if not torch.distributed.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
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
SHARDED = [name for name in VARIANTS if name != "lbfgs"]  # torch's makes one vector of parameters and cannot
STEPS = 4


def replicated(model):
    return DistributedDataParallel(model, bucket_cap_mb=1e-4, gradient_as_bucket_view=True)


def sharded(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


def whole(model):
    rows = [param.detach() for param in model.parameters()]
    return torch.cat([(row.full_tensor() if isinstance(row, DTensor) else row).flatten() for row in rows])


def train(settings, inputs, targets, wrap=None):
    model = network()
    module = model if wrap is None else wrap(model)
    group = None if wrap is None else dist.group.WORLD
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
    for name, wrap in [*((name, replicated) for name in VARIANTS), *((name, sharded) for name in SHARDED)]:
        settings = VARIANTS[name]
        with pytest.warns(UserWarning, match="2 processes and no process_group"):
            alone, one, _, expected = train(settings, INPUTS, TARGETS)
        optimizer, two, closure, losses = train(settings, INPUTS[half], TARGETS[half], wrap)
        close = dict(rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(whole(two), whole(one), **close)
        losses = torch.stack(losses)
        dist.all_reduce(losses)
        torch.testing.assert_close(losses / 2, torch.stack(expected), **close)
        assert alone.counts == optimizer.counts, name
        # What only one process finds to be infinite stops both.
        before = whole(two)
        broken = functools.partial(infinite, closure) if rank == 0 else closure
        if name == "skips":
            optimizer.step(broken)
        else:
            with pytest.raises(FloatingPointError):
                optimizer.step(broken)
        assert torch.equal(before, whole(two)), name
        optimizer.step(closure)
        assert not torch.equal(before, whole(two)), name
    dist.destroy_process_group()


def test_two_processes_with_half_of_the_data_each_step_as_one(tmp_path):
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)

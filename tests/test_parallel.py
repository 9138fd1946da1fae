"""Two processes train as one: replicated, with divided state, sharded, offloaded, and cut within layers."""

from __future__ import annotations

import functools

import pytest
import torch
from training import batch, network, step, through_a_file

import optimzoo

if not torch.distributed.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

QUIET = functools.partial(optimzoo.DaleLangevin, temperature=0.0, s=0.0)  # shards draw noise of their own
MAKE = {
    "DiffGrad": optimzoo.DiffGrad,
    "AdaBelief": functools.partial(optimzoo.AdaBelief, weight_decay=0.1, eps=1e-8),
    "DaleSGD": functools.partial(optimzoo.DaleSGD, momentum=0.9),
    "DaleAdamW": optimzoo.DaleAdamW,
    "DaleLangevin": QUIET,
    "AdaGradNorm": optimzoo.AdaGradNorm,
    "AdaGradNorm-decay": functools.partial(optimzoo.AdaGradNorm, weight_decay=0.1, max_grad_norm=0.3),
    "AdaBelief-clipped": functools.partial(optimzoo.AdaBelief, max_grad_norm=0.05, rectify=False, eps=1e-8),
    "DaleSGD-clipped": functools.partial(optimzoo.DaleSGD, max_grad_norm=0.1),
}
# What the part of the parameters that a process has says nothing of.
NORMS = ("AdaGradNorm", "AdaGradNorm-decay", "AdaBelief-clipped", "DaleSGD-clipped")
FOREACH = ("DiffGrad", "AdaGradNorm-decay")  # test_distributed.py has every back-end of every class
STEPS = 3


def full(tensor):
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def weights(model):
    return torch.cat([full(param).flatten() for param in model.parameters()])


def sharded(**options):
    model = network()
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh, **options)
    return model


def divided():
    return parallelize_module(
        network(), init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )


WAYS = {
    "DDP": (lambda: DistributedDataParallel(network(), gradient_as_bucket_view=True), True),
    "FSDP2": (sharded, True),
    "offloaded": (lambda: sharded(offload_policy=CPUOffloadPolicy(pin_memory=False)), True),
    "tensor-parallel": (divided, False),
}


def train(model, optimizer, steps, halves, rank=0):
    for t in steps:
        x, y = batch(t)
        part = slice(4 * rank, 4 * rank + 4) if halves else slice(None)
        step(model, optimizer, x[part], y[part])


def alone(make, steps=STEPS, **options):
    """The run of one process that has all the data."""
    model = network()
    optimizer = make(model.parameters(), lr=0.02, **options)
    train(model, optimizer, range(steps), False)
    return model, optimizer


def close(left, right, name):
    torch.testing.assert_close(left, right, rtol=2e-4, atol=2e-5, msg=lambda text: f"{name}: {text}")


def train_alike(rank):
    for name, make in MAKE.items():
        for options in (dict(fused=True), dict(foreach=True))[: 1 + (name in FOREACH)]:
            expected = weights(alone(make, **options)[0])
            for way, (build, halves) in WAYS.items():
                model = build()
                optimizer = make(model.parameters(), lr=0.02, **options)
                train(model, optimizer, range(STEPS), halves, rank)
                close(weights(model), expected, (name, way, options))
        if name in NORMS:  # the bound, and the sum, are ones that change the run
            free = functools.partial(make, max_grad_norm=None)
            assert (weights(alone(make)[0]) - weights(alone(free)[0])).abs().max() > 1e-3 or name == "AdaGradNorm"


def accumulators():
    """The sum of AdaGradNorm is that of all shards, on all ranks."""
    (_, one), sums = alone(optimzoo.AdaGradNorm), []
    for build, halves in WAYS.values():
        model = build()
        optimizer = optimzoo.AdaGradNorm(model.parameters(), lr=0.02)
        train(model, optimizer, range(STEPS), halves, dist.get_rank())
        sums += [row["sum_sq"] for row in optimizer.state.values()]
    expected = next(iter(one.state.values()))["sum_sq"]
    torch.testing.assert_close(torch.stack(sums), expected.expand(len(sums)), rtol=1e-5, atol=0)


def zero(rank):
    """Each process keeps the state of some parameters; rank 0 gathers it for a checkpoint that one process loads."""
    for name, make in MAKE.items():
        if name in NORMS:
            continue
        model = DistributedDataParallel(network())
        cls, options = (make.func, make.keywords) if isinstance(make, functools.partial) else (make, {})
        optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=cls, lr=0.02, **options)
        train(model, optimizer, range(STEPS), True, rank)
        one, whole = alone(make)
        close(weights(model), weights(one), (name, "ZeRO"))
        assert 0 < len(optimizer.optim.state) < len(whole.state)
        optimizer.consolidate_state_dict(to=0)
        if rank == 0:
            resumed = network()
            resumed.load_state_dict(model.module.state_dict())
            other = make(resumed.parameters(), lr=0.5)
            other.load_state_dict(through_a_file(optimizer.state_dict()))
        train(model, optimizer, range(STEPS, 2 * STEPS), True, rank)
        if rank == 0:
            train(resumed, other, range(STEPS, 2 * STEPS), False)
            close(weights(resumed), weights(model), (name, "from ZeRO"))


def refusals():
    """What needs whole parameters says so."""
    model = sharded()
    with pytest.raises(ValueError, match="must be whole"):
        optimzoo.LanczosLR(torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(ValueError, match="DTensor"):
        optimzoo.CBO(model.parameters(), 6)
    with pytest.raises(ValueError, match="must be a plain"):
        optimzoo.TPSGD(model, num_classes=3)


def parts(build, make, path=None):
    """A model and its optimizer, from a distributed checkpoint if there is one."""
    model = build()
    optimizer = make(model.parameters(), lr=0.02 if path is None else 0.5)
    if path is not None:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return model, optimizer


def save(model, optimizer, path):
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=path, no_dist=not dist.is_initialized())


SHARDED = {"FSDP2": WAYS["FSDP2"], "tensor-parallel": WAYS["tensor-parallel"]}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    train_alike(rank)
    accumulators()
    zero(rank)
    refusals()
    for name, make in MAKE.items():
        expected = weights(alone(make, 2 * STEPS)[0])
        for way, (build, halves) in SHARDED.items():
            # From one process to two.
            model, optimizer = parts(build, make, f"{folder}/one-{name}")
            train(model, optimizer, range(STEPS, 2 * STEPS), halves, rank)
            close(weights(model), expected, (name, way, "from one process"))
            # Of two processes, for one.
            model, optimizer = parts(build, make)
            train(model, optimizer, range(STEPS), halves, rank)
            save(model, optimizer, f"{folder}/{way}-{name}")
            # And of one way to shard, for another.
            other = next(key for key in SHARDED if key != way)
            turned, again = parts(SHARDED[other][0], make, f"{folder}/{way}-{name}")
            train(turned, again, range(STEPS, 2 * STEPS), SHARDED[other][1], rank)
            close(weights(turned), expected, (name, way, other))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*assuming the intent is to (save|load) in a single process:UserWarning")
def test_two_processes_train_as_one_and_exchange_checkpoints_with_it(tmp_path):
    for name, make in MAKE.items():
        save(*alone(make), f"{tmp_path}/one-{name}")
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    for name, make in MAKE.items():
        expected = weights(alone(make, 2 * STEPS)[0])
        for way in SHARDED:
            model, optimizer = parts(network, make, f"{tmp_path}/{way}-{name}")
            train(model, optimizer, range(STEPS, 2 * STEPS), False)
            close(weights(model), expected, (name, way, "from two processes"))

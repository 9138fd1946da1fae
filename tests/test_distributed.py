"""Sharded parameters: every back-end steps a DTensor as it steps the tensor that it stands for."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CASES, each_backend, each_elementwise, tolerance
from steps import advance, normal
from torch import nn

if not torch.distributed.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

BOUND = tolerance(torch.float32, 8)


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def compare_with_plain(cls, options, mesh, placements) -> None:
    """Step sharded and plain parameters side by side, on the same gradients."""
    shapes = [(8, 3), (5,), (4, 2, 3)]
    plain = [normal(i, *shape).float().requires_grad_() for i, shape in enumerate(shapes)]
    sharded = [distribute_tensor(p.detach().clone(), mesh, placements).requires_grad_() for p in plain]
    optimizers = cls(plain, **options), cls(sharded, **options)
    for t in range(4):
        grads = [normal(10 * t + i, *shape).float() for i, shape in enumerate(shapes)]
        advance(optimizers[0], [grads])
        advance(optimizers[1], [[distribute_tensor(g, mesh, placements) for g in grads]])
    for left, right in zip(sharded, plain, strict=True):
        torch.testing.assert_close(left.detach().full_tensor(), right.detach(), rtol=BOUND, atol=BOUND)
        for name, value in optimizers[1].state[left].items():
            if name != "step":
                assert isinstance(value, DTensor)
                assert value.placements == left.placements
                value = value.full_tensor()
            torch.testing.assert_close(value, optimizers[0].state[right][name], rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
@each_backend("differentiable")
def test_a_dtensor_is_stepped_like_a_tensor(case, backend, placement, mesh):
    compare_with_plain(case.cls, dict(weight_decay=0.1, **backend), mesh, [placement])


@each_backend("differentiable")
def test_a_dtensor_and_a_tensor_may_share_a_group(case, backend, mesh):
    plain = normal(1, 4, 3).requires_grad_()
    sharded = distribute_tensor(normal(1, 4, 3), mesh, [Shard(0)]).requires_grad_()
    optimizer = case.cls([plain, sharded], **backend)
    for t in range(3):
        grad = normal(t, 4, 3)
        advance(optimizer, [[grad, distribute_tensor(grad, mesh, [Shard(0)])]])
    torch.testing.assert_close(sharded.detach().full_tensor(), plain.detach(), rtol=1e-14, atol=1e-14)


@each_elementwise
def test_fused_says_why_where_a_gradient_is_placed_in_another_way(case, mesh):
    param = distribute_tensor(normal(1, 4, 3), mesh, [Shard(0)]).requires_grad_()
    optimizer = case.cls([param], fused=True)
    param.grad = distribute_tensor(normal(2, 4, 3), mesh, [Shard(1)])
    with pytest.raises(RuntimeError, match=r"fused=True cannot be met.*sharded"):
        optimizer.step()
    assert not optimizer.state


def small_model(seed: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5))
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.copy_(normal(seed + i, *param.shape))
    return model


def train(model, optimizer, batches) -> None:
    for seed in batches:
        optimizer.zero_grad()
        model(normal(seed, 8, 6).float()).square().mean().backward()
        optimizer.step()


def full(tensor):
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for case in CASES:
        for name, backend in case.backends.items():
            if backend.get("differentiable"):
                continue
            compare_with_plain(case.cls, dict(weight_decay=0.1, **backend), mesh, [Shard(0)])

            # Seven and five rows do not divide by two: the shards are uneven.
            plain = small_model(3)
            sharded = copy.deepcopy(plain)
            for layer in (sharded[0], sharded[2], sharded):
                fully_shard(layer, mesh=mesh)
            optimizers = [case.cls(m.parameters(), lr=0.02, **backend) for m in (plain, sharded)]
            for model, optimizer in zip((plain, sharded), optimizers, strict=True):
                train(model, optimizer, range(3))

            # The checkpoint is loaded by a model that is not sharded, and by one that is.
            path = f"{folder}/{case.name}-{name}"
            dcp.save({"o": get_optimizer_state_dict(sharded, optimizers[1])}, checkpoint_id=path)
            resumed = small_model(4)
            for layer in (resumed[0], resumed[2], resumed):
                fully_shard(layer, mesh=mesh)
            with torch.no_grad():
                for target, source in zip(resumed.parameters(), sharded.parameters(), strict=True):
                    target.copy_(source)
            other = case.cls(resumed.parameters(), lr=0.9, **backend)
            loaded = {"o": get_optimizer_state_dict(resumed, other)}
            dcp.load(loaded, checkpoint_id=path)
            set_optimizer_state_dict(resumed, other, loaded["o"])
            whole = get_optimizer_state_dict(sharded, optimizers[1], options=StateDictOptions(full_state_dict=True))
            if rank == 0:
                assert not any(isinstance(v, DTensor) for row in whole["state"].values() for v in row.values())
            for model, optimizer in ((plain, optimizers[0]), (sharded, optimizers[1]), (resumed, other)):
                train(model, optimizer, range(3, 6))
            for left, middle, right in zip(*(m.parameters() for m in (plain, sharded, resumed)), strict=True):
                torch.testing.assert_close(full(middle), full(left), rtol=1e-4, atol=1e-5)
                assert torch.equal(full(middle), full(right))
    dist.destroy_process_group()


def test_two_processes_with_sharded_models_train_and_resume_as_one(tmp_path):
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)

"""Two ranks with half of a batch each release what one process with all of it does: noise once, one error state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optimzoo import DPSGD, DiceSGD, PerSampleGradients

if not torch.distributed.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

RANKS, STEPS = 2, 5
SETTINGS = dict(lr=0.3, max_grad_norm=0.5, noise_std_sum=0.2, expected_batch_size=6, sample_rate=0.5, momentum=0.9)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    n = (7, 0, 12, 1, 5)[step]
    return 5 * torch.randn(n, 4, generator=draw, dtype=torch.float64), torch.randn(n, 3, generator=draw).double()


def train(model, optimizer, part=slice(None)):
    for step in range(STEPS):
        inputs, targets = (x[part] for x in batch(step))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets, reduction="sum").backward()
        optimizer.step()


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def compare(kind: str, error_norm: float, mesh) -> None:
    alone, model = build(), build()
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    noise = torch.Generator().manual_seed(5)
    single = DiceSGD(alone.parameters(), error_norm_sum=error_norm, process_group=group, generator=noise, **SETTINGS)
    with PerSampleGradients(alone, loss_reduction="sum"):
        train(alone, single)
    if kind == "sharded":
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
    noise = torch.Generator().manual_seed(5 if dist.get_rank() == 0 else 6)  # the second rank's is not drawn from
    optimizer = DiceSGD(model.parameters(), error_norm_sum=error_norm, generator=noise, **SETTINGS)
    with PerSampleGradients(model, loss_reduction="sum"):
        train(model, optimizer, slice(dist.get_rank(), None, RANKS))
    for left, right in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full(left.detach()), right.detach(), rtol=1e-9, atol=1e-9)
        if error_norm:
            error = full(optimizer._error[left])
            torch.testing.assert_close(error, single._error[right], rtol=1e-9, atol=1e-9)
            every = [None] * RANKS
            dist.all_gather_object(every, error.numpy().tobytes())
            assert every[0] == every[1], "the ranks feed back different errors"
    assert optimizer.history == single.history


def checkpoints(mesh, folder: str) -> None:
    model = build()
    fully_shard(model, mesh=mesh)
    optimizer = DPSGD(model.named_parameters(), **SETTINGS)
    with PerSampleGradients(model, loss_reduction="sum"):
        train(model, optimizer, slice(dist.get_rank(), None, RANKS))
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
    other = build()
    fully_shard(other, mesh=mesh)
    resumed = DPSGD(other.named_parameters(), **SETTINGS)
    resumed.step(empty=True)
    state = {"optimizer": get_optimizer_state_dict(other, resumed)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(other, resumed, state["optimizer"])
    assert resumed.history == optimizer.history
    for left, right in zip(other.parameters(), model.parameters(), strict=True):
        one, two = (full(o.state[p]["momentum_buffer"]) for o, p in ((resumed, left), (optimizer, right)))
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def refusals() -> None:
    settings = {**SETTINGS, "noise_std_sum": 0.1 + dist.get_rank()}
    with pytest.raises(ValueError, match="noise_std_sum must be the same on all ranks"):
        DPSGD(build().parameters(), **settings)
    with pytest.raises(TypeError, match="of several ranks cannot be copied or pickled"):
        DPSGD(build().parameters(), **SETTINGS).__getstate__()


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (RANKS,))
    for kind in ("replicated", "sharded"):
        for error_norm in (0.0, 1.5):
            compare(kind, error_norm, mesh)
    checkpoints(mesh, f"{folder}/saved")
    refusals()
    dist.destroy_process_group()


def test_two_ranks_release_what_one_process_does(tmp_path):
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=RANKS)

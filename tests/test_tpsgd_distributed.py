"""Two processes with half of the samples each take the step that one takes with all."""

from __future__ import annotations

import copy

import pytest
import torch
from test_tpsgd import Reader, batch, make, mlp, weights
from torch import nn

if not torch.distributed.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

MODELS = {"mlp": lambda: mlp(6, 7), "reader": lambda: weights(Reader())}
VARIANTS = {
    "deferred": {},
    "in forward": dict(update_in_forward=True),
    "l1": dict(local_loss="l1", momentum=0.9),
    "adamw in forward": dict(base=torch.optim.AdamW, update_in_forward=True),
}


def train(model: nn.Module, called: nn.Module, settings: dict, half: slice) -> None:
    optimizer = make(called, 0.05, **settings)
    for seed in range(4):
        x, y = batch(model, seed, count=8)
        optimizer.zero_grad()
        with optimizer.targets(y[half]):
            called(x[half])
        optimizer.step()


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, build in MODELS.items():
        for settings in VARIANTS.values():
            alone, shared = build(), build()
            train(alone, alone, settings, slice(None))
            train(shared, DistributedDataParallel(shared), settings, slice(4 * rank, 4 * rank + 4))
            ours, theirs = list(shared.parameters()), list(alone.parameters())
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    torch.manual_seed(rank)
    drawn, optimizer = [None, None], make(DistributedDataParallel(mlp(6, 7)), seed=None)
    dist.all_gather_object(drawn, optimizer.param_groups[0]["projection_seed"])
    assert drawn[0] == drawn[1]
    with pytest.raises(TypeError, match="DistributedDataParallel cannot be copied or pickled"):
        copy.deepcopy(optimizer)
    dist.destroy_process_group()


def test_two_processes_step_as_one(tmp_path):
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)

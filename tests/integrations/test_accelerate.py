"""Accelerate: ``prepare``, accumulation, and the states that it saves and loads."""

from __future__ import annotations

import accelerate
import pytest
import torch
from steps import bits
from torch.nn import functional as F
from torch.utils.data import DataLoader
from training import GRADIENT, RECIPES, batch, network

import optimzoo

DATA = [(x, y) for i in range(6) for x, y in zip(*batch(i, 8), strict=True)]


@pytest.fixture(autouse=True)
def apart():
    """Accelerate keeps one state for a process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def parts(name, accelerator):
    model = network()
    optimizer = RECIPES[name](model)
    if name == "SSO":  # its step size may not become zero
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    else:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    prepared = accelerator.prepare(model, optimizer, DataLoader(DATA, batch_size=4), schedule)
    return dict(zip(("model", "optimizer", "loader", "schedule"), prepared, strict=True))


def train(accelerator, rows, model, optimizer, loader, schedule):
    for index, (x, y) in enumerate(loader):
        if index not in rows:
            continue
        method = optimizer.optimizer  # what is not torch.optim's, accelerate does not hand on
        with accelerator.accumulate(model):
            if isinstance(method, optimzoo.CBO):
                optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
            elif isinstance(method, optimzoo.SSO):
                optimizer.step(lambda x=x, y=y: (model(x), lambda outputs, y=y: F.cross_entropy(outputs, y)))
            elif isinstance(method, optimzoo.TPSGD):
                with method.targets(y):
                    model(x)
                optimizer.step()
            else:
                accelerator.backward(F.cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
            schedule.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_with_accumulation_resumes_from_its_checkpoint(name, tmp_path):
    accumulation = 2 if name in GRADIENT else 1
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    whole = parts(name, accelerator)
    train(accelerator, range(6), **whole)
    accelerator.save_state(str(tmp_path), safe_serialization=False)
    train(accelerator, range(6, 12), **whole)
    end = {key: bits(whole[key].state_dict()) for key in ("model", "optimizer", "schedule")}
    assert end["model"] != bits(network().state_dict())

    accelerator.free_memory()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    resumed = parts(name, accelerator)
    accelerator.load_state(str(tmp_path))
    train(accelerator, range(6, 12), **resumed)
    for key, value in end.items():
        assert bits(resumed[key].state_dict()) == value, key


def test_accumulation_is_the_large_batch():
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    ours = parts("AdaBelief", accelerator)
    train(accelerator, range(12), **{**ours, "schedule": torch.optim.lr_scheduler.ConstantLR(ours["optimizer"], 1.0)})
    model = network()
    optimizer = RECIPES["AdaBelief"](model)
    for x, y in DataLoader(DATA, batch_size=8):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    for left, right in zip(ours["model"].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)

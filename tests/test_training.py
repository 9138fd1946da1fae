"""Training runs with torch's own tools around the optimizer, cut in two by a checkpoint: not a bit may differ."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from steps import bits
from test_contract import SCHEDULERS
from torch import nn
from torch.nn import functional as F
from torch.optim import swa_utils
from training import GRADIENT, RECIPES, assert_resumes, batch, network, step

import optimzoo

TO_ZERO = ("PolynomialLR", "CosineAnnealingLR")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small gain nothing by more
    yield
    torch.set_num_threads(threads)


def advance(t, model, optimizer, scheduler=None):
    step(model, optimizer, *batch(t))
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    elif scheduler is not None:
        scheduler.step()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_under_any_scheduler_resumes(name, scheduler):
    def build():
        model = network()
        optimizer = RECIPES[name](model)
        return dict(model=model, optimizer=optimizer, scheduler=SCHEDULERS[scheduler](optimizer))

    if name == "SSO" and scheduler in TO_ZERO:
        pytest.skip("a target step size of zero is an error: test_sso.py")
    rates = set()

    def follow(t, model, optimizer, scheduler):
        rates.add(optimizer.param_groups[0]["lr"])
        advance(t, model, optimizer, scheduler)

    assert_resumes(build, follow)
    assert len(rates) > 1


@pytest.mark.parametrize("name", GRADIENT)
def test_a_run_under_a_grad_scaler_resumes(name):
    def build():
        model = network()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        return dict(model=model, optimizer=RECIPES[name](model), scaler=scaler)

    def advance(t, model, optimizer, scaler):
        x, y = batch(t)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss = loss * torch.inf if t == 2 else loss  # is skipped, and lowers the scale
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    parts = assert_resumes(build, advance)
    # Step counts of five steps, since one was skipped.
    counts = {float(row["step"]) for row in parts["optimizer"].state_dict()["state"].values()}
    assert counts == {5.0}


@pytest.mark.parametrize("average", ["swa", "ema"])
@pytest.mark.parametrize("name", RECIPES)
def test_averaged_weights_and_their_batch_statistics_resume(name, average):
    multi = swa_utils.get_swa_multi_avg_fn() if average == "swa" else swa_utils.get_ema_multi_avg_fn(0.5)

    def build():
        model = network()
        averaged = swa_utils.AveragedModel(nn.Sequential(nn.BatchNorm1d(6), network()), multi_avg_fn=multi)
        optimizer = RECIPES[name](model)
        return dict(model=model, optimizer=optimizer, averaged=averaged, scheduler=swa_utils.SWALR(optimizer, 0.02, 3))

    def advance(t, model, optimizer, averaged, scheduler):
        step(model, optimizer, *batch(t))
        scheduler.step()
        averaged.update_parameters(nn.Sequential(nn.BatchNorm1d(6), model))
        swa_utils.update_bn([batch(t)[0]], averaged)

    averaged = assert_resumes(build, advance)["averaged"]
    assert averaged.n_averaged == 6
    assert averaged.module[0].running_mean.abs().max() > 0


@pytest.mark.parametrize("name", ["DiffGrad", "AdaBelief"])
def test_a_learnt_rate_resumes(name):
    def build():
        model = network()
        optimizer = optimzoo.__dict__[name](model.parameters(), lr=1.0)
        return dict(model=model, optimizer=optimizer, scheduler=optimzoo.LanczosLR(optimizer, every=2, iterations=4))

    def advance(t, model, optimizer, scheduler):
        x, y = batch(t)
        scheduler.step(lambda: F.cross_entropy(model(x), y))
        step(model, optimizer, x, y)

    assert assert_resumes(build, advance)["scheduler"].looks > 3


@pytest.mark.parametrize("name", ["CBO", "LanczosLR"])
def test_autocast_around_a_closure(name):
    def build():
        model = network()
        optimizer = RECIPES["DiffGrad" if name == "LanczosLR" else name](model)
        parts = dict(model=model, optimizer=optimizer)
        return parts | (dict(scheduler=optimzoo.LanczosLR(optimizer, every=2)) if name == "LanczosLR" else {})

    def advance(t, model, optimizer, scheduler=None):
        x, y = batch(t)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype is torch.bfloat16
            if scheduler is not None:
                scheduler.step(lambda: F.cross_entropy(model(x), y))
            step(model, optimizer, x, y)

    assert_resumes(build, advance)


def turned(model):
    """The same weights, laid out the other way round in memory."""
    with torch.no_grad():
        for param in model.parameters():
            param.data = param.t().contiguous().t()
    return model


@pytest.mark.parametrize("name", [*RECIPES, "LanczosLR"])
def test_the_memory_layout_of_a_parameter_changes_nothing(name):
    models = network(), turned(network())
    assert not models[1][0].weight.is_contiguous()
    for model in models:
        optimizer = RECIPES["DiffGrad" if name == "LanczosLR" else name](model)
        scheduler = optimzoo.LanczosLR(optimizer, every=2) if name == "LanczosLR" else None
        for t in range(4):
            x, y = batch(t)
            if scheduler is not None:
                scheduler.step(lambda model=model, x=x, y=y: F.cross_entropy(model(x), y))
            step(model, optimizer, x, y)
    torch.testing.assert_close(*(list(model.parameters()) for model in models), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["SSO", "TPSGD"])
def test_parameters_of_bfloat16_train(name):
    model = network().bfloat16()
    optimizer = RECIPES[name](model)
    x, y = batch(0)
    losses = [float(step(model, optimizer, x.bfloat16(), y)) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))], ids=["copy", "pickle"]
)
def test_a_learnt_rate_is_copied_with_its_optimizer_and_model(way):
    model = network()
    optimizer = optimzoo.DiffGrad(model.parameters(), lr=1.0)
    parts = model, optimizer, optimzoo.LanczosLR(optimizer, every=2, iterations=4)

    def train(steps, model, optimizer, scheduler):
        for t in steps:
            x, y = batch(t)
            scheduler.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
            step(model, optimizer, x, y)

    train(range(3), *parts)
    clone = way(parts)
    before = bits(model.state_dict())
    train(range(3, 6), *clone)
    assert bits(model.state_dict()) == before
    train(range(3, 6), *parts)
    assert bits(model.state_dict()) == bits(clone[0].state_dict())

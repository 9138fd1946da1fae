"""Opacus: its gradients of single samples for DPSGD and DiceSGD, its engine around the optimizers of the zoo."""

from __future__ import annotations

import functools

import opacus
import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from steps import bits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from training import GRADIENT, RECIPES, batch, network, step, through_a_file

import optimzoo

PRIVATE = {
    "DPSGD": optimzoo.DPSGD,
    "DPSGD-adam": functools.partial(optimzoo.DPSGD, base=torch.optim.Adam),
    "DPSGD-adabelief": functools.partial(optimzoo.DPSGD, base=optimzoo.AdaBelief),
    "DiceSGD": functools.partial(optimzoo.DiceSGD, error_norm_sum=0.5),
}
BATCH = 8
SETTINGS = dict(max_grad_norm=0.7, expected_batch_size=BATCH, sample_rate=0.1)


def build(make, noise, engine=GradSampleModule):
    """A model with Opacus' hooks, the optimizer, and what its noise is drawn from."""
    model, generator = network(), torch.Generator()
    hooked = engine(model, loss_reduction="mean")
    optimizer = make(model.parameters(), lr=0.1, noise_multiplier=noise, generator=generator, **SETTINGS)
    return model, hooked, optimizer, generator


def train(rounds, model, hooked, optimizer, generator):
    for t in rounds:
        generator.manual_seed(t)
        optimizer.zero_grad()
        x, y = batch(t)
        F.cross_entropy((hooked if isinstance(hooked, GradSampleModule) else model)(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_run_on_its_samples_resumes_from_its_checkpoint(name):
    whole, first, second = (build(PRIVATE[name], 0.5) for _ in range(3))
    train(range(8), *whole)
    train(range(4), *first)
    secret = dict(export_private_state=True) if name == "DiceSGD" else {}  # else it would begin to collect anew
    state, model = through_a_file([first[2].state_dict(**secret), first[0].state_dict()])
    second[0].load_state_dict(model)
    second[2].load_state_dict(state)
    train(range(4, 8), *second)
    assert bits(whole[0].state_dict()) != bits(network().state_dict())
    assert bits(whole[0].state_dict()) == bits(second[0].state_dict())
    assert whole[2].epsilon(1e-5) == second[2].epsilon(1e-5) > 0


@pytest.mark.parametrize("name", PRIVATE)
def test_its_samples_are_those_of_our_engine(name):
    theirs, ours = (build(PRIVATE[name], 0.5, e) for e in (GradSampleModule, optimzoo.PerSampleGradients))
    for run in (theirs, ours):
        train(range(6), *run)
    torch.testing.assert_close(list(theirs[0].parameters()), list(ours[0].parameters()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam], ids=["SGD", "Adam"])
def test_without_noise_a_step_is_that_of_its_optimizer(base):
    ours = build(functools.partial(optimzoo.DPSGD, base=base), 0.0)
    train(range(6), *ours)
    model = GradSampleModule(network(), loss_reduction="mean")
    inner = base(model.parameters(), lr=0.1)
    theirs = DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=0.7, expected_batch_size=BATCH)
    for t in range(6):
        theirs.zero_grad()
        x, y = batch(t)
        F.cross_entropy(model(x), y).backward()
        theirs.step()
    torch.testing.assert_close(list(ours[0].parameters()), list(model.parameters()), rtol=1e-4, atol=1e-5)


def test_its_accountant_has_the_epsilon_of_the_same_history():
    run = build(optimzoo.DPSGD, 1.0)
    train(range(20), *run)
    accountant = opacus.accountants.PRVAccountant()
    accountant.history = [(1.0, SETTINGS["sample_rate"], 20)]
    # An upper bound, and no more above than the two discretisations are.
    assert run[2].epsilon(1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=0.02)


@pytest.mark.parametrize("name", GRADIENT)
def test_its_engine_may_have_an_optimizer_of_the_zoo_inside(name):
    def make():
        model = network()
        generator = torch.Generator().manual_seed(3)
        data = DataLoader(TensorDataset(*batch(0, 32)), batch_size=BATCH)
        return opacus.PrivacyEngine().make_private(
            module=model,
            optimizer=RECIPES[name](model),
            data_loader=data,
            noise_multiplier=0.5,
            max_grad_norm=1.0,
            poisson_sampling=False,
            noise_generator=generator,
        )

    def advance(rows, model, optimizer, loader):
        for index, (x, y) in enumerate(loader):
            if index in rows:
                optimizer.noise_multiplier = 0.0 if index % 2 else 0.5
                optimizer.generator.manual_seed(index)
                step(model, optimizer, x, y)

    whole, first, second = make(), make(), make()
    advance(range(4), *whole)
    advance(range(2), *first)
    for mine, theirs in zip(second[:2], through_a_file([part.state_dict() for part in first[:2]]), strict=True):
        mine.load_state_dict(theirs)
    advance(range(2, 4), *second)
    assert isinstance(whole[1], DPOptimizer)
    assert bits(whole[0].state_dict()) == bits(second[0].state_dict())
    assert bits(whole[1].state_dict()) == bits(second[1].state_dict())
    start = make()[0].state_dict()
    assert bits(whole[0].state_dict()) != bits(start)

"""CBO follows its reference in every variant, and keeps torch.optim's contract in its own way: by a closure."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from reference import cbo as reference
from steps import bits, saved
from torch import nn

import optimzoo
from optimzoo import cbo, ops, random
from optimzoo.closure import vmapped
from optimzoo.functions import FUNCTIONS, rastrigin

SHAPES = [(3,), (2, 2)]
N = 9


def objective(x: torch.Tensor) -> torch.Tensor:
    """Rastrigin with curvatures and a shift, of points (..., 7)."""
    scale = torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype)
    return rastrigin(scale * (x - 0.3))


def numpy_objective(x: np.ndarray) -> float:
    y = np.linspace(0.5, 1.5, len(x)) * (x - 0.3)
    return float((y * y - 10 * np.cos(2 * np.pi * y)).sum() + 10 * len(x))


def numpy_gradient(x: np.ndarray) -> np.ndarray:
    scale = np.linspace(0.5, 1.5, len(x))
    y = scale * (x - 0.3)
    return scale * (2 * y + 20 * np.pi * np.sin(2 * np.pi * y))


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(5)
    return [nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def live(params: list[nn.Parameter]):
    """A closure that evaluates what is in the parameters."""
    return lambda: objective(torch.cat([p.flatten() for p in params]))


def batched(stacked: list[torch.Tensor]) -> torch.Tensor:
    """The same for stacked parameters."""
    return objective(torch.cat([x.flatten(2) for x in stacked], -1))


def make(params=None, **settings: Any) -> optimzoo.CBO:
    """A small optimizer whose settings do not warn."""
    return optimzoo.CBO(parameters() if params is None else params, **{**dict(n_particles=N, seed=3), **settings})


VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "isotropic": dict(noise="isotropic", sigma=0.3),
    "heaviside": dict(correction="heaviside"),
    "heaviside-drift": dict(correction="heaviside", correction_on="drift"),
    "regularised": dict(correction="regularised", correction_eps=20.0),
    "regularised-drift-isotropic": dict(
        correction="regularised", correction_on="drift", correction_eps=20.0, noise="isotropic", sigma=0.3
    ),
    "clipped": dict(noise_clip=0.4, sigma=3.0),
    "clipped-isotropic": dict(noise_clip=0.4, sigma=3.0, noise="isotropic"),
    "memory": dict(memory="fixed"),
    "memory-reevaluated": dict(memory="reevaluated"),
    "memory-euler": dict(memory="fixed", memory_order="euler", lamda_memory=0.7, sigma_memory=0.2),
    "memory-isotropic-heaviside": dict(memory="fixed", noise="isotropic", sigma=0.3, correction="heaviside"),
    "memory-batch": dict(memory="reevaluated", particle_batch=4),
    "gradient": dict(grad_drift=0.01),
    "gradient-batch-partial": dict(grad_drift=0.01, particle_batch=4, update="partial"),
    "hopping": dict(rule="hopping", sigma=0.7, sigma_decay=0.98),
    "adam": dict(rule="adam", lamda=0.1),
    "adam-partial": dict(rule="adam", lamda=0.1, particle_batch=4, update="partial"),
    "polarised": dict(kernel="gaussian", kappa=1.5, alpha=2.0),  # a larger alpha would amplify rounding as well
    "polarised-const": dict(kernel="gaussian", kappa=1.5, kernel_alpha=False, alpha=0.1),
    "polarised-laplace": dict(kernel="laplace", kappa=2.0, alpha=0.1),
    "polarised-inverse": dict(kernel="inverse_quadratic", alpha=0.1),
    "polarised-bounded": dict(kernel="bounded", kappa=3.0, alpha=0.1),
    "polarised-batch": dict(kernel="bounded", kappa=2.0, particle_batch=3),
    "polarised-adam": dict(kernel="gaussian", rule="adam", lamda=0.1),
    "batch": dict(particle_batch=4),
    "batch-partial": dict(particle_batch=4, update="partial"),
    "batch-carry": dict(particle_batch=4, leftover="carry"),
    "batch-heaviside": dict(particle_batch=4, correction="heaviside"),
    "growth": dict(alpha=1.0, alpha_growth=1.5, alpha_max=4.0),
    "ess": dict(ess=0.5),
    "ess-batch": dict(ess=0.6, particle_batch=5, alpha_max=0.05),
    "kick": dict(kick_below=0.2, alpha=5.0),
    "patience": dict(patience=2),
    "bounds": dict(bounds=(-0.8, 0.8), sigma=2.0),
    "evaluated": dict(evaluate_consensus=True),
    "everything": dict(
        noise="isotropic",
        sigma=0.3,
        correction="regularised",
        correction_eps=5.0,
        noise_clip=1.0,
        memory="reevaluated",
        grad_drift=0.005,
        ess=0.5,
        sigma_decay=0.9,
        kick_below=0.1,
        patience=3,
        bounds=(-3.0, 3.0),
        particle_batch=5,
    ),
}
NOT_OF_THE_REFERENCE = ("n_particles", "alpha", "sigma", "seed", "particle_batch", "leftover", "evaluate_consensus")


def follow(optimizer: optimzoo.CBO, step, settings: dict[str, Any], columns: dict[str, Any], steps: int = 12) -> None:
    """Step the class and the reference side by side; every run has a reference of its own."""
    options = optimizer.param_groups[0]
    x = optimizer._swarm["particles"]
    before = x.clone()
    runs = [reference.start(row, alpha=options["alpha"], sigma=columns["sigma"]) for row in x.numpy()]
    kwargs = {key: value for key, value in settings.items() if key not in NOT_OF_THE_REFERENCE}
    kwargs.update(lr=columns["lr"], lamda=columns["lamda"], gradient=numpy_gradient)
    for t in range(steps):
        batch = None
        if options["particle_batch"] is not None:
            how = dict(seed=options["seed"], since=0, leftover=options["leftover"])
            batch = cbo.batch_indices(x.shape[1], options["particle_batch"], t, **how).tolist()
        z = {
            name: random.normal(torch.empty_like(x), seed=options["seed"], draw=cbo._draw(t, purpose)).numpy()
            for name, purpose in dict(noise=cbo._NOISE, memory=cbo._MEMORY_NOISE, kick=cbo._KICK).items()
        }
        loss = step(optimizer)
        for r, state in enumerate(runs):
            expected = reference.step(state, numpy_objective, {k: v[r] for k, v in z.items()}, batch=batch, **kwargs)
            if not options["evaluate_consensus"]:
                np.testing.assert_allclose(loss if len(runs) == 1 else loss[r], expected, rtol=1e-12)
            swarm = optimizer._swarm
            pairs = dict(x=swarm["particles"], consensus=swarm["consensus"], best=swarm["best"], alpha=swarm["alpha"])
            pairs.update(best_loss=swarm["best_loss"], energies=swarm["energies"])
            pairs.update({key: swarm[key] for key in ("memory", "exp_avg", "exp_avg_sq") if key in swarm})
            for name, value in pairs.items():
                np.testing.assert_allclose(value[r], state[name], rtol=1e-12, atol=1e-12, err_msg=f"{name}, step {t}")
    assert not torch.equal(x, before)


@pytest.fixture(params=["native", "python"])
def backend(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(ops, "native", lambda name, device: None)
    return request.param


@pytest.mark.parametrize("evaluation", ["live", "batched"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_follows_the_reference_to_1e_12(variant, evaluation, backend):
    params, settings = parameters(), VARIANTS[variant]
    optimizer = make(params, **settings)
    group = optimizer.param_groups[0]
    columns = {name: group[name] for name in ("lr", "lamda", "sigma")}

    def step(optimizer):
        if evaluation == "live":
            return optimizer.step(live(params))
        return optimizer.step(batched, batched=True)

    follow(optimizer, step, settings, columns)


@pytest.mark.parametrize(
    "variant", ["defaults", "isotropic", "memory", "adam", "hopping", "heaviside", "kick", "patience", "gradient"]
)
def test_groups_have_their_own_lr_lamda_and_sigma_and_runs_are_independent(variant, backend):
    params, settings = parameters(), VARIANTS[variant]
    scale = settings.get("sigma", 0.4**0.5)
    groups = [dict(params=[params[0]]), dict(params=[params[1]], lr=0.03, lamda=0.5, sigma=0.5 * scale)]
    optimizer = make(groups, n_runs=3, **settings)
    widths = [p.numel() for p in params]
    columns = {
        name: np.repeat([group[name] for group in optimizer.param_groups], widths) for name in ("lr", "lamda", "sigma")
    }
    follow(optimizer, lambda o: o.step(batched, batched=True), settings, columns)

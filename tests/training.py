"""A small classifier and the way that each public optimizer trains it: what the tests of training runs share."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable
from typing import Any

import torch
from steps import bits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import optimzoo

INPUTS, CLASSES = 6, 3


def network() -> nn.Module:
    """Weights that are the same each time and none of them zero; no torch generator is read."""
    model = nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.copy_(torch.sin(1.7 * torch.arange(param.numel()) + i + 1).view_as(param))
    return model


def batch(seed: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs and their labels."""
    x = torch.randn(size, INPUTS, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :CLASSES].argmax(1)


# How each class is made. Those that step from gradients are driven by the loop that everybody writes.
GRADIENT: dict[str, Callable[..., Optimizer]] = {
    "DiffGrad": optimzoo.DiffGrad,
    "AdaBelief": optimzoo.AdaBelief,
    "DaleSGD": functools.partial(optimzoo.DaleSGD, momentum=0.9, exponent_clip=1.0),
    "DaleAdamW": optimzoo.DaleAdamW,
    "DaleLangevin": functools.partial(optimzoo.DaleLangevin, temperature=1e-3, seed=4),
    "AdaGradNorm": optimzoo.AdaGradNorm,
}
RECIPES: dict[str, Callable[[nn.Module], Optimizer]] = {
    **{name: (lambda model, make=make: make(model.parameters(), lr=0.01)) for name, make in GRADIENT.items()},
    "CBO": lambda model: optimzoo.CBO(model.parameters(), 6, seed=1),
    "SSO": lambda model: optimzoo.SSO(
        model.parameters(), inner=functools.partial(torch.optim.Adam, lr=0.01), inner_steps=2
    ),
    "TPSGD": lambda model: optimzoo.TPSGD(model, num_classes=CLASSES, momentum=0.9, seed=0),
}


def step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Any:
    """One step of any of them."""
    if isinstance(optimizer, optimzoo.TPSGD):
        with optimizer.targets(y):
            model(x)
        optimizer.step()
        optimizer.zero_grad()
        return optimizer.loss
    if isinstance(optimizer, optimzoo.CBO):
        return optimizer.step(lambda: F.cross_entropy(model(x), y))
    if isinstance(optimizer, optimzoo.SSO):
        return optimizer.step(lambda: (model(x), lambda outputs: F.cross_entropy(outputs, y)))
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def through_a_file(value: Any) -> Any:
    """A state dict as ``torch.load`` gives it back by its safe default."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer)


def assert_resumes(
    build: Callable[[], dict[str, Any]], advance: Callable[..., None], steps: Iterable[int] = range(6), cut: int = 3
) -> dict[str, Any]:
    """Train once, and once with a stop in the middle: all parts must have the same bits.

    Args:
        build: makes the parts of a run, whatever has ``state_dict`` and ``load_state_dict``, by their names.
        advance: is called with the parts, as keywords, and the number of a step.

    Returns:
        The parts of the run that was stopped.
    """
    whole, first, second = build(), build(), build()
    steps = list(steps)
    for t in steps:
        advance(t, **whole)
    for t in steps[:cut]:
        advance(t, **first)
    saved = through_a_file({name: part.state_dict() for name, part in first.items()})
    for name, part in second.items():
        part.load_state_dict(saved[name])
    for t in steps[cut:]:
        advance(t, **second)
    start, end = build(), {name: bits(part.state_dict()) for name, part in whole.items()}
    assert end["model"] != bits(start["model"].state_dict()), "nothing was trained"
    for name, part in second.items():
        assert bits(part.state_dict()) == end[name], name
    return second

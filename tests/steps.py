"""Ways to run an optimizer, and to say whether two of them are in the same state."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

# Every memory layout that a dense parameter comes in; what they hold is filled in by `parameters`.
LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "scalar": lambda: torch.empty(()),
    "vector": lambda: torch.empty(67),
    "empty": lambda: torch.empty(0, 3),
    "transposed": lambda: torch.empty(5, 3).t(),
    "channels-last": lambda: torch.empty(2, 3, 2, 2).to(memory_format=torch.channels_last),
}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that depend on the seed and shape alone."""
    return torch.from_numpy(np.asarray(np.random.default_rng(seed).standard_normal(shape))).to(dtype)


def parameters(
    dtype: torch.dtype = torch.float64, layouts: Iterable[str] = tuple(LAYOUTS), requires_grad: bool = True
) -> list[Tensor]:
    """One leaf of each layout."""
    params = []
    for seed, name in enumerate(layouts):
        param = LAYOUTS[name]().to(dtype)
        params.append(param.copy_(normal(seed, *param.shape)).requires_grad_(requires_grad))
    return params


def gradients(params: Sequence[Tensor], steps: int, seed: int = 1) -> list[list[Tensor]]:
    """For each step, a gradient for each parameter, in its dtype and layout."""
    return [
        [
            torch.empty_like(p, requires_grad=False).copy_(normal(7919 * seed + 97 * t + i, *p.shape))
            for i, p in enumerate(params)
        ]
        for t in range(steps)
    ]


def copies(params: Sequence[Tensor]) -> list[Tensor]:
    """Leaves with the same values and layouts."""
    return [p.detach().clone().requires_grad_(p.requires_grad) for p in params]


def advance(optimizer: Optimizer, grads: Iterable[Sequence[Tensor | None]]) -> Optimizer:
    """Step once for each entry, with copies of its gradients in the order of the optimizer's parameters."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for row in grads:
        for param, grad in zip(params, row, strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.step()
    return optimizer


def saved(optimizer: Optimizer) -> dict[str, Any]:
    """The state dict as it comes back from a file."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer)


def bits(value: Any) -> Any:
    """A value that equals another if and only if the two have the same type, shape and bits."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            value = value.coalesce()
            return "sparse", bits(value.indices()), bits(value.values())
        flat = value.detach().contiguous().reshape(-1)
        return tuple(value.shape), value.dtype, value.stride(), flat.view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [bits(entry) for entry in value]
    return type(value), repr(value)


def snapshot(optimizer: Optimizer) -> Any:
    """Everything a user can see of an optimizer: parameters, gradients, state, groups."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    groups = [{key: bits(value) for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
    owners = [
        param if isinstance(param, str | int) else next(i for i, p in enumerate(params) if p is param)
        for param in optimizer.state
    ]
    return (
        [(id(p), bits(p), id(p.grad), None if p.grad is None else bits(p.grad)) for p in params],
        sorted(zip(owners, [bits(dict(row)) for row in optimizer.state.values()], strict=True), key=lambda row: row[0]),
        groups,
        copy.copy(optimizer.defaults),
    )


def results(optimizer: Optimizer) -> list[Tensor]:
    """Parameters and state, in a fixed order."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = [value for p in params for _, value in sorted(optimizer.state.get(p, {}).items())]
    return [t.detach() for t in [*params, *state]]


def averages(optimizer: Optimizer, param: Tensor) -> dict[str, Tensor]:
    """What the method keeps of a parameter, without what the base class does."""
    row = optimizer.state[param]
    return {name: row[name] for name in optimizer.rule(optimizer.param_groups[0]).states if name in row}


def same(left: Optimizer, right: Optimizer) -> bool:
    """Whether parameters and state have the same bits."""
    return [bits(t)[:2] + bits(t)[3:] for t in results(left)] == [bits(t)[:2] + bits(t)[3:] for t in results(right)]


def close(left: Optimizer, right: Optimizer, tolerance: float) -> None:
    """Raise unless parameters and state agree to a relative tolerance."""
    torch.testing.assert_close(results(left), results(right), rtol=tolerance, atol=tolerance)

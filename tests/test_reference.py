"""Every back-end follows the independent numpy reference of its method."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from cases import BACKENDS, CASES, ROUNDOFF, each_backend, each_case, each_setting, tolerance
from steps import LAYOUTS, averages, gradients, normal, parameters

STEPS = 200
LATE = 3  # the second parameter has no gradient before this step


@cache
def reference_run(cls: type, setting: str) -> list[list[dict[str, Any]]]:
    """The state of each parameter after each step."""
    table = next(entry for entry in CASES if entry.cls is cls)
    params = parameters(requires_grad=False)
    states: list[dict[str, Any]] = [dict(param=p.numpy().copy()) for p in params]
    history = []
    for t, row in enumerate(gradients(params, STEPS)):
        for i, (state, grad) in enumerate(zip(states, row, strict=True)):
            if not (i == 1 and t < LATE):
                table.reference(state, grad.numpy(), **table.settings[setting])
        history.append([dict(state) for state in states])
    return history


ROWS = [
    pytest.param(case, setting, backend, id=f"{case.name}-{setting}-{backend}")
    for case in CASES
    for setting in case.settings
    for backend in case.backends
    if backend != "default"  # that is fused here
]


@pytest.mark.parametrize(("case", "setting", "backend"), ROWS)
def test_float64_follows_the_reference_to_1e_13_over_200_steps(case, setting, backend):
    params = parameters(requires_grad=backend != "differentiable")
    optimizer = case.cls(params, **case.settings[setting], **case.backends[backend])
    history = reference_run(case.cls, setting)
    for t, row in enumerate(gradients(params, STEPS)):
        for i, (param, grad) in enumerate(zip(params, row, strict=True)):
            param.grad = None if i == 1 and t < LATE else grad
        optimizer.step()
        if t in (0, 1, 2, LATE, 9, STEPS - 1):
            for param, expected in zip(params, history[t], strict=True):
                np.testing.assert_allclose(param.detach().numpy(), expected["param"], rtol=1e-13, atol=1e-13)
                for name, value in averages(optimizer, param).items():
                    np.testing.assert_allclose(value, expected[name], rtol=1e-13, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_backend("differentiable", "default", "capturable-foreach", "capturable-fused")
def test_narrow_parameters_follow_the_reference_to_rounding(case, backend, dtype):
    # The reference starts each step at the rounded parameter, so that a step has one rounding to the parameter's dtype
    # to lose, whatever the number of steps; the averages are float32 and go on undisturbed.
    for settings in case.settings.values():
        params = parameters(dtype)
        optimizer = case.cls(params, **{**settings, "lr": 0.05}, **backend)
        states = [dict(param=None) for _ in params]
        for t, row in enumerate(gradients(params, 20), start=1):
            for param, state, grad in zip(params, states, row, strict=True):
                unrounded = optimizer.state[param].get("master", param) if t > 1 else param
                state["param"] = unrounded.detach().double().numpy()
                case.reference(state, grad.double().numpy(), **{**settings, "lr": 0.05})
                param.grad = grad
            optimizer.step()
            for param, state in zip(params, states, strict=True):
                arithmetic = tolerance(torch.float32, t)
                rounding = ROUNDOFF[dtype] if dtype is not torch.float32 else 0.0
                np.testing.assert_allclose(
                    param.detach().double().numpy(), state["param"], rtol=rounding + arithmetic, atol=arithmetic
                )
                for name, value in averages(optimizer, param).items():
                    assert value.dtype is torch.float32
                    np.testing.assert_allclose(value, state[name], rtol=arithmetic, atol=arithmetic, err_msg=name)


@pytest.mark.parametrize("backend", ["single", "foreach", "default"])
@each_case
def test_a_parameter_with_gaps_in_memory_is_updated_like_a_copy_of_it(case, backend):
    memory = torch.full((4, 6), 7.0, dtype=torch.float64)
    strided = memory[:, ::2].requires_grad_()
    dense = strided.detach().clone().requires_grad_()
    for param in (strided, dense):
        optimizer = case.cls([param], **case.backends.get(backend, {}))
        for row in gradients([dense], 5):
            param.grad = torch.empty_like(param).copy_(row[0])
            optimizer.step()
    torch.testing.assert_close(strided, dense, rtol=1e-14, atol=0)
    assert (memory[:, 1::2] == 7).all()


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "empty"])
@each_case
def test_a_gradient_with_other_strides_than_its_parameter_is_matched_by_index(case, layout):
    (param,), (other,) = parameters(layouts=[layout]), parameters(layouts=[layout])
    for p, backend in ((param, {}), (other, BACKENDS["single"] if case.elementwise else {})):
        optimizer = case.cls([p], **backend)
        for (grad,) in gradients([p], 4):
            if p is param:
                grad = (
                    torch.empty(grad.shape[::-1], dtype=grad.dtype).permute(list(range(grad.dim()))[::-1]).copy_(grad)
                )
            p.grad = grad
            optimizer.step()
    torch.testing.assert_close(param, other, rtol=1e-14, atol=0)


@each_setting
def test_state_is_laid_out_in_memory_like_its_parameter(case, settings):
    params = parameters(torch.bfloat16)
    optimizer = case.cls(params, **settings)
    for param, grad in zip(params, gradients(params, 1)[0], strict=True):
        param.grad = grad
    optimizer.step()
    for param in params:
        for name, value in optimizer.state[param].items():
            assert name == "step" or value.stride() == param.stride(), name


@pytest.mark.parametrize("count", [1, 3])
@each_setting
def test_autograd_differentiates_differentiable_steps(case, settings, count):
    # Steps are counted from seven, where every branch of a warm-up is passed, and state is positive, so that no
    # coordinate sits at a kink of the friction or the root.
    start, grad, lr = normal(1, 3), normal(2, 3), torch.tensor(0.1, dtype=torch.float64)
    probe = case.cls([torch.ones(3, dtype=torch.float64)], **settings)
    names = probe.rule(probe.param_groups[0]).states

    def after(start, grad, lr, *state):
        param = start.clone()
        param.grad = grad
        optimizer = case.cls([param], **{**settings, "lr": lr}, differentiable=True)
        rows = {name: value.clone() for name, value in zip(names, state, strict=True)}
        optimizer.state[param].update(step=torch.tensor(7.0), **rows)
        for _ in range(count):
            optimizer.step()
            param.grad = param.grad * 1.5 + 0.1
        return param, *rows.values()

    inputs = [start, grad, lr, *(normal(3 + i, 3).abs() + 0.5 for i in range(len(names)))]
    assert torch.autograd.gradcheck(after, [x.requires_grad_() for x in inputs])

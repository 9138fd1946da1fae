"""torch.compile takes a whole step as one graph and leaves its numbers alone."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, tolerance
from steps import advance, close, copies, gradients, parameters, results
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = [case for case in CASES if "compile" not in case.refuses]
ROWS = [
    pytest.param(case, case.backends[name], id=f"{case.name}-{name}")
    for case in COMPILED
    for name in ("single", "foreach", "fused")
    if name in case.backends
]

LAYOUTS = ["scalar", "vector"]


def assert_compiles(case, backend, compiler, lr, steps=7, layouts=LAYOUTS, **settings):
    """One graph, whatever the number of steps and the value of a tensor learning rate; the numbers of eager steps."""
    params = parameters(torch.float32, layouts)
    grads = gradients(params, steps)
    rates = [0.01 * (t + 1) for t in range(steps)]
    eager = case.cls(copies(params), **{**settings, "lr": rates[0]}, **backend)
    optimizer = case.cls(params, **{**settings, "lr": lr}, **backend)
    compiled = torch.compile(optimizer.step, backend=compiler, fullgraph=True)
    for rate, row in zip(rates, grads, strict=True):
        if isinstance(lr, torch.Tensor):
            lr.fill_(rate)
            eager.param_groups[0]["lr"] = rate
        advance(eager, [row])
        for param, grad in zip(params, row, strict=True):
            param.grad = grad
        compiled()
    close(optimizer, eager, tolerance(torch.float32, steps))
    assert all(optimizer.state[p]["step"] == steps for p in params)


@pytest.mark.parametrize(("case", "backend"), ROWS)
def test_a_compiled_step_is_the_eager_one(case, backend):
    assert_compiles(case, backend, "inductor", torch.tensor(0.01))


@pytest.mark.parametrize(("case", "backend"), ROWS)
def test_a_step_is_one_graph_for_every_option_and_learning_rate(case, backend):
    # Traced, and run without a compiler behind: a graph costs no seconds.
    for settings in case.settings.values():
        torch._dynamo.reset()
        counter = CompileCounter()
        assert_compiles(case, backend, counter, torch.tensor(0.01), **{k: v for k, v in settings.items() if k != "lr"})
        assert counter.frame_count <= 2, (settings, "a step was traced anew")


@pytest.mark.parametrize(("case", "backend"), ROWS)
def test_parameters_of_any_strides_compile(case, backend):
    # Shapes that change between two optimizers of a process make torch.compile see strides as symbols.
    for layouts in (["vector"], ["transposed"], ["channels-last"], ["transposed", "vector"]):
        assert_compiles(case, backend, "eager", torch.tensor(0.01), steps=3, layouts=layouts)


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: case.name)
def test_a_number_as_learning_rate_compiles_too(case):
    counter = CompileCounter()
    assert_compiles(case, {}, counter, 0.01)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(("case", "backend"), ROWS)
def test_late_parameters_and_capturable_steps_compile(case, backend):
    params = parameters(torch.float32, LAYOUTS)
    grads = gradients(params, 6)
    for row in grads[:2]:
        row[1] = None
    optimizer = case.cls(params, capturable=True, **backend)
    eager = advance(case.cls(copies(params), **backend), grads)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(optimizer.step, backend=counter)
    for row in grads:
        for param, grad in zip(params, row, strict=True):
            param.grad = grad
        compiled()
    close(optimizer, eager, tolerance(torch.float32, 6))
    assert counter.frame_count <= 6


@pytest.mark.parametrize(("case", "backend"), ROWS)
def test_autograd_notices_a_compiled_step(case, backend):
    params = parameters(torch.float32, LAYOUTS)
    optimizer = case.cls(params, **backend)
    compiled = torch.compile(optimizer.step, backend="aot_eager")
    for row in gradients(params, 2):
        loss = sum((p**2).sum() for p in params)
        for param, grad in zip(params, row, strict=True):
            param.grad = grad
        compiled()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize(("case", "backend"), ROWS)
def test_a_compiled_step_leaves_gradients_alone(case, backend):
    params = parameters(torch.float32, LAYOUTS)
    optimizer = case.cls(params, weight_decay=0.1, maximize=True, **backend)
    compiled = torch.compile(optimizer.step, backend="aot_eager")
    for row in gradients(params, 2):
        before = [g.clone() for g in row]
        for param, grad in zip(params, row, strict=True):
            param.grad = grad
        compiled()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))
    assert all(t.isfinite().all() for t in results(optimizer))

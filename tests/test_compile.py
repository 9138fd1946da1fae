"""torch.compile takes a whole step as one graph and leaves its numbers alone."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from cases import CASES, tolerance
from optimizer_infos import batch, model, mse, of_gradients
from steps import advance, close, copies, gradients, normal, parameters, results
from test_contract import SCHEDULERS
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


# What torch's tests of compiled optimizers ask, besides

each_compiled = pytest.mark.parametrize(
    "info", [info for info in of_gradients if "compile" not in info.refuses], ids=lambda info: info.name
)


@pytest.mark.parametrize("name", ["single", "foreach", "default"])
@each_compiled
def test_complex_parameters_compile(info, name):
    if not info.supports_complex:
        return
    params = [
        torch.view_as_complex(normal(seed, *shape, 2)).requires_grad_() for seed, shape in enumerate([(3, 2), (4,)])
    ]
    backend = dict(single=dict(foreach=False, fused=False), foreach=dict(foreach=True), default={})[name]
    compiled = info.optim_cls(params, lr=torch.tensor(0.1, dtype=torch.float64), weight_decay=0.1, **backend)
    eager = info.optim_cls(copies(params), lr=0.1, weight_decay=0.1, **backend)
    step = torch.compile(compiled.step, backend="aot_eager", fullgraph=True)
    for row in gradients(params, 3):
        advance(eager, [row])
        for param, grad in zip(params, row, strict=True):
            param.grad = grad
        step()
    close(compiled, eager, tolerance(torch.float64, 3))


@each_compiled
def test_complex_parameters_are_not_fused_within_a_graph(info):
    if not info.supports_complex:
        return
    param = torch.ones(3, dtype=torch.complex64, requires_grad=True)
    param.grad = torch.ones_like(param)
    step = torch.compile(info.optim_cls([param], fused=True).step, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="fused=True cannot be met"):
        step()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's tracer looks at it
@each_compiled
def test_a_compiled_training_loop_has_the_eager_numbers(info):
    # A step without gradients, a closure, and what a loop does around them: graphs break there, numbers stay.
    data, outcomes = batch(), []
    for compile_loop in (False, True):
        network = model()
        optimizer = info.make(network, lr=torch.tensor(0.01))
        counts = []

        def loop(network=network, optimizer=optimizer, counts=counts):
            for i in range(5):
                optimizer.zero_grad()
                if i != 2:
                    mse(network(data[0]), data[1]).backward()
                optimizer.step()
                counts.append(optimizer.state[network[0].weight]["step"].clone())

            def closure():
                optimizer.zero_grad()
                loss = mse(network(data[0]), data[1])
                loss.backward()
                return loss

            optimizer.step(closure)

        (torch.compile(loop, backend="eager") if compile_loop else loop)()
        outcomes.append([*counts, *results(optimizer)])
    torch.testing.assert_close(outcomes[0], outcomes[1])


@each_compiled
def test_schedulers_compile_nothing_anew(info):
    params = parameters(torch.float32, LAYOUTS)
    rate = torch.tensor(0.1)
    optimizer = info.optim_cls(params, lr=rate)
    eager = info.optim_cls(copies(params), lr=0.1)
    counter = CompileCounter()
    step = torch.compile(optimizer.step, backend=counter, fullgraph=True)
    for name in (
        "LambdaLR",
        "StepLR",
        "ExponentialLR",
        "CosineAnnealingLR",
        "LinearLR",
        "PolynomialLR",
        "SequentialLR",
    ):
        schedulers = [SCHEDULERS[name](each) for each in (optimizer, eager)]
        optimizer._opt_called = True  # what schedulers look for does not see a step that was compiled before
        for row in gradients(params, 2):
            for each in (optimizer, eager):
                for param, grad in zip(each.param_groups[0]["params"], row, strict=True):
                    param.grad = grad.clone()
            step()
            eager.step()
            for scheduler in schedulers:
                scheduler.step()
        assert optimizer.param_groups[0]["lr"] is rate
        assert counter.frame_count <= 2, (name, "a step was traced anew")
    close(optimizer, eager, tolerance(torch.float32, 14))


@each_compiled
def test_state_that_was_replaced_is_seen(info):
    params = parameters(torch.float32, LAYOUTS)
    optimizer = info.optim_cls(params, lr=torch.tensor(0.1))
    step = torch.compile(optimizer.step, backend="eager")
    rows = gradients(params, 4)
    for row in rows[:2]:
        for param, grad in zip(params, row, strict=True):
            param.grad = grad
        step()
    for row in optimizer.state.values():
        row.update({name: value.clone() * 2 for name, value in row.items() if name not in ("step", "sign")})
    eager = copy.deepcopy(optimizer)
    for row in rows[2:]:
        advance(eager, [row])
        for param, grad in zip(params, row, strict=True):
            param.grad = grad
        step()
    close(optimizer, eager, tolerance(torch.float32, 4))


@each_compiled
def test_a_compiled_step_keeps_no_parameter_alive(info):
    def train():
        (param,) = parameters(torch.float32, ["vector"])
        optimizer = info.optim_cls([param])
        param.grad = torch.ones_like(param)
        torch.compile(optimizer.step, backend="eager")()
        return weakref.ref(param)

    gone = train()
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None

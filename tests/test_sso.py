"""SSO: what it asks of the loss, the laws of its surrogate, the reference, and its contract as an optimizer."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from reference import sso as reference
from steps import normal
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

import optimzoo
from optimzoo import SSO
from optimzoo.sso import Armijo

SGD = functools.partial(torch.optim.SGD, lr=0.1)
ADAM = functools.partial(torch.optim.Adam, lr=0.05)


class Counted(torch.autograd.Function):
    """The mean squared error, halved; counts how often it is evaluated and differentiated."""

    values = gradients = 0

    @staticmethod
    def forward(ctx, outputs, targets):
        Counted.values += 1
        ctx.save_for_backward(outputs, targets)
        return (outputs - targets).square().sum() / (2 * len(outputs))

    @staticmethod
    def backward(ctx, grad):
        Counted.gradients += 1
        outputs, targets = ctx.saved_tensors
        return grad * (outputs - targets) / len(outputs), None


def network(seed: int = 0, dtype: torch.dtype = torch.float64, *more: nn.Module) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), *more, nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.copy_(normal(seed + i, *param.shape))
    return model


INPUTS, TARGETS = normal(50, 8, 4), normal(51, 8, 3)


def half_squared(outputs, targets=TARGETS):
    return (outputs - targets.to(outputs)).square().sum() / (2 * len(outputs))


def closure_of(model, loss=half_squared, inputs=INPUTS):
    return lambda: (model(inputs), loss)


def weights(model):
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def everything(optimizer, model):
    """All that a failed step must leave."""
    grads = [None if param.grad is None else param.grad.clone() for param in model.parameters()]
    state = {key: value for key, value in optimizer.state_dict().items() if key != "counts"}
    return copy.deepcopy([state, [*model.state_dict().values()], grads, torch.get_rng_state()])


def equal(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left.nan_to_num(), right.nan_to_num())
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


# What a step asks of the loss


@pytest.mark.parametrize("inner", [SGD, ADAM, "armijo", functools.partial(torch.optim.LBFGS, lr=0.5, max_iter=4)])
@pytest.mark.parametrize("kind", ["function", "tensor", "search"])
def test_a_step_asks_once_for_the_gradient_of_the_loss(inner, kind):
    model, steps, calls = network(), 3, []

    def loss(outputs):
        return Counted.apply(outputs, TARGETS)

    def closure():
        calls.append(None)
        outputs = model(INPUTS)
        return outputs, loss(outputs) if kind == "tensor" else loss

    optimizer = SSO(model.parameters(), 0.5, inner, 5, line_search=kind == "search")
    Counted.values = Counted.gradients = 0
    for _ in range(steps):
        optimizer.step(closure)
    counts = optimizer.counts
    assert Counted.gradients == counts["loss_gradients"] == steps
    assert len(calls) == counts["forwards"] >= counts["backwards"] >= 5 * steps
    if kind == "tensor":
        assert Counted.values == len(calls)
    else:
        assert Counted.values == counts["loss_values"] == steps if kind == "function" else Counted.values > steps
    if inner in (SGD, ADAM):
        assert counts["forwards"] == counts["backwards"] == 5 * steps


def test_a_function_and_a_tensor_for_the_loss_are_the_same_step():
    models = [network(), network()]
    optimizers = [SSO(model.parameters(), 0.5, ADAM, 4) for model in models]
    for _ in range(3):
        first = optimizers[0].step(closure_of(models[0]))
        second = optimizers[1].step(lambda: (z := models[1](INPUTS), half_squared(z)))
        assert torch.equal(first, second)
    assert torch.equal(*map(weights, models))


def test_a_tuple_of_outputs_is_as_good_as_their_concatenation():
    models = [network(), network()]

    def pair():
        outputs = models[1](INPUTS)
        return (outputs[:, :1], outputs[:, 1:]), lambda zs: half_squared(torch.cat(zs, 1))

    optimizers = [SSO(model.parameters(), 0.7, SGD, 4, target_metric="adagrad", line_search=True) for model in models]
    for _ in range(3):
        losses = optimizers[0].step(closure_of(models[0])), optimizers[1].step(pair)
        torch.testing.assert_close(*losses, rtol=1e-13, atol=0)
    torch.testing.assert_close(*map(weights, models), rtol=1e-12, atol=1e-12)


# Laws


@pytest.mark.parametrize("lr", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("divergence", ["euclidean", "kl", lambda new, old: (new - old).pow(4).sum(1)])
def test_the_surrogate_s_gradient_is_that_of_the_loss_for_any_target_step_size(lr, divergence):
    model = nn.Sequential(network(), nn.Softmax(1))
    expected = torch.autograd.grad(half_squared(model(INPUTS)), [*model.parameters()])
    before = weights(model)
    SSO(model.parameters(), lr, functools.partial(torch.optim.SGD, lr=1.0), 1, divergence=divergence).step(
        closure_of(model)
    )
    moved = before - weights(model)
    torch.testing.assert_close(moved, torch.cat([g.flatten() for g in expected]), rtol=1e-12, atol=1e-14)


def test_one_inner_update_by_sgd_is_a_step_of_sgd_bit_for_bit():
    models = [network(0, torch.float32, nn.Dropout(0.5)) for _ in range(2)]
    sgd = torch.optim.SGD(models[0].parameters(), lr=0.1, momentum=0.9)
    sso = SSO(models[1].parameters(), 0.3, functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), 1)
    inputs, states = INPUTS.float(), []

    def noisy(outputs):  # which draws as well
        return half_squared(F.dropout(outputs, 0.1))

    for model, optimizer in zip(models, (sgd, sso), strict=True):
        torch.manual_seed(3)
        for _ in range(5):
            if optimizer is sso:
                sso.step(closure_of(model, noisy, inputs))
            else:
                sgd.zero_grad()
                noisy(model(inputs)).backward()
                sgd.step()
        states.append(torch.get_rng_state())
    assert torch.equal(*map(weights, models))
    assert torch.equal(*states)


# An inner solver that is left to converge.
EXACT = functools.partial(torch.optim.LBFGS, max_iter=300, tolerance_grad=0, tolerance_change=0)


@pytest.mark.parametrize("rows", [[*range(8)], [0, 1, 2]])  # more samples than inputs, and fewer
def test_the_exact_minimiser_for_a_linear_model_is_a_least_squares_step(rows):
    model, targets = nn.Linear(4, 3, bias=False).double(), TARGETS[rows]
    theta, inputs = model.weight.detach().clone(), INPUTS[rows]
    SSO(model.parameters(), 0.7, EXACT, 3, tol=1e-15).step(
        lambda: (model(inputs), lambda z: F.smooth_l1_loss(z, targets, reduction="sum") / len(z))
    )
    outputs = (inputs @ theta.T).requires_grad_()
    (slope,) = torch.autograd.grad(F.smooth_l1_loss(outputs, targets, reduction="sum") / len(targets), outputs)
    expected = theta - 0.7 * (torch.linalg.pinv(inputs) @ (len(inputs) * slope)).T
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-10, atol=1e-10)


def test_with_the_hessian_as_the_metric_a_linear_model_takes_newton_s_step():
    model, labels = nn.Linear(4, 1, bias=False).double(), (TARGETS[:, :1] > 0).double()
    with torch.no_grad():
        model.weight.copy_(normal(3, 1, 4) / 4)
    theta = model.weight.detach().clone()

    def loss(z):
        return F.binary_cross_entropy_with_logits(z, labels)

    def value(flat):
        return loss(INPUTS @ flat[:, None])

    slope = torch.autograd.functional.jacobian(value, theta[0])
    hessian = torch.autograd.functional.hessian(value, theta[0])
    p = torch.sigmoid(INPUTS @ theta.T)
    curved = lambda new, old: (p * (1 - p) * (new - old).square()).sum(1) / 2  # noqa: E731  # a setting
    SSO(model.parameters(), 1.0, EXACT, 3, tol=1e-15, divergence=curved).step(closure_of(model, loss))
    expected = theta[0] - torch.linalg.solve(hessian, slope)
    torch.testing.assert_close(model.weight.detach()[0], expected, rtol=1e-10, atol=1e-10)


LOSSES = {
    "half squared": (half_squared, 1.0),
    "logistic": (lambda z: F.softplus(-torch.sign(TARGETS) * z).sum() / len(z), 0.25),
    "softmax": (lambda z: F.cross_entropy(z, TARGETS.argmax(1)), 0.5),
}


def surrogate_at(loss, old, new, lr, **settings):
    optimizer = SSO([nn.Parameter(torch.zeros(1))], lr, SGD, **settings)
    value, slopes = optimizer._loss_gradient(old, [old], loss)
    return value + optimizer.surrogate([new], [old], slopes, optimizer._metric([old], slopes), lr)


@pytest.mark.parametrize("name", LOSSES)
def test_the_surrogate_bounds_the_loss_from_above_and_touches_it(name):
    loss, smoothness = LOSSES[name]
    beyond = False
    for seed in range(50):
        old = normal(seed, 8, 3)
        for distance in (0.1, 1.0, 10.0):
            new = old + distance * normal(1000 + seed, 8, 3)
            assert surrogate_at(loss, old, new, 1 / smoothness) >= loss(new) - 1e-12
            beyond |= bool(surrogate_at(loss, old, new, 4 / smoothness) < loss(new))
        torch.testing.assert_close(surrogate_at(loss, old, old, 1 / smoothness), loss(old), rtol=1e-14, atol=0)
    assert beyond  # the bound is not one for any step size


def test_by_the_divergence_of_its_own_potential_cross_entropy_is_its_surrogate():
    def between_logits(new, old):  # the Bregman divergence of logsumexp
        return F.kl_div(new.log_softmax(1), old.log_softmax(1), reduction="none", log_target=True).sum(1)

    loss, _ = LOSSES["softmax"]
    old, new = normal(1, 8, 3), normal(2, 8, 3)
    torch.testing.assert_close(surrogate_at(loss, old, new, 1.0, divergence=between_logits), loss(new))


def test_kl_between_probabilities_is_mirror_descent():
    rewards = normal(1, 8, 3)
    table = nn.Parameter(normal(2, 8, 3))
    old = table.detach().softmax(1)
    optimizer = SSO([table], 0.5, EXACT, 3, divergence="kl", tol=1e-15)
    optimizer.step(lambda: (table.softmax(1), lambda p: -(p * rewards).sum(1).mean()))
    expected = (old.log() + 0.5 * rewards).softmax(1)
    torch.testing.assert_close(table.detach().softmax(1), expected, rtol=1e-9, atol=1e-9)


def test_kl_stays_finite_at_the_edge_of_the_simplex():
    table = nn.Parameter(torch.tensor([[0.0, -200.0, 3.0]]))
    optimizer = SSO([table], 0.5, SGD, 5, divergence="kl")
    optimizer.step(lambda: (table.softmax(1), lambda p: p.square().sum()))
    assert table.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("inner_steps", [1, 3, 30])
@pytest.mark.filterwarnings("ignore:no step size")  # near a minimum
def test_the_whole_loss_never_rises_at_one_over_its_smoothness(name, inner_steps):
    loss, smoothness = LOSSES[name]
    model = network()
    optimizer = SSO(model.parameters(), 1 / smoothness, inner_steps=inner_steps)
    losses = [optimizer.step(closure_of(model, loss)).item() for _ in range(15)]
    assert all(after <= before + 1e-13 for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]


def test_more_inner_steps_lower_the_loss_more_for_the_same_gradients():
    ends = []
    for inner_steps in (1, 5, 25):
        model = network()
        optimizer = SSO(model.parameters(), 1.0, SGD, inner_steps)
        for _ in range(10):
            end = optimizer.step(closure_of(model)).item()
        ends.append(end)
    assert ends[0] > ends[1] > ends[2]


def test_the_batch_size_is_no_part_of_the_step_size():
    models = [network(), network()]
    for model, times in zip(models, (1, 3), strict=True):
        inputs, targets = INPUTS.repeat(times, 1), TARGETS.repeat(times, 1)
        optimizer = SSO(model.parameters(), 0.5, SGD, 5, target_metric="adagrad", line_search=True)
        for _ in range(3):
            optimizer.step(lambda m=model, x=inputs, y=targets: (m(x), lambda z: half_squared(z, y)))
    torch.testing.assert_close(*map(weights, models), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("view", [lambda p: p, lambda p: p.view(8, 3), lambda p: (p[:4], p[4:])])
@pytest.mark.parametrize("inner", [SGD, "armijo"])
def test_outputs_may_share_memory_with_the_parameters(view, inner):
    def half(z):
        return half_squared(torch.cat(z) if isinstance(z, tuple) else z)

    ends = []
    for outputs in (view, lambda p: view(p.clone())):
        table = nn.Parameter(normal(1, 8, 3))
        SSO([table], 0.5, inner, 20).step(lambda outputs=outputs, table=table: (outputs(table), half))
        ends.append(table.detach())
    torch.testing.assert_close(*ends, rtol=1e-13, atol=1e-13)


class Elsewhere(torch.optim.Optimizer):
    """Evaluates after it moved by ``shift`` or dropped the gradients, and keeps what it was told."""

    def __init__(self, params, shift=0.0, drop=False):
        super().__init__(params, dict(shift=shift, drop=drop))

    def step(self, closure):
        (group,) = self.param_groups
        (param,) = group["params"]
        with torch.no_grad():
            param.add_(group["shift"]) if group["shift"] else None
        self.zero_grad(group["drop"] == "none") if group["drop"] else None
        self.told = float(closure()), param.grad.item()


@pytest.mark.parametrize("settings", [{}, dict(shift=1.0), dict(drop="none"), dict(drop="zero")])
def test_an_inner_optimizer_is_told_the_value_and_gradient_where_it_asks(settings):
    param = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = SSO([param], 1.0, functools.partial(Elsewhere, **settings), 1)
    optimizer.step(lambda: (param.clone(), lambda z: (z - 3).square().mean() / 2))
    at = param.item()
    assert optimizer.inner.told == (-3 * at + at * at / 2, -3 + at)
    assert optimizer.counts["forwards"] == (2 if settings else 1)


def test_consensus_based_optimization_inside_sees_the_surrogate_at_each_particle():
    param, seen = nn.Parameter(torch.zeros(1, dtype=torch.float64)), []
    optimizer = SSO([param], 1.0, optimzoo.CBO, 4)
    step = optimizer.inner.step

    def spied(closure):
        def spy():
            at, value = param.item(), float(closure())
            seen.append((value, -3 * at + at * at / 2))
            return value

        return step(spy)

    optimizer.inner.step = spied
    optimizer.step(lambda: (param.clone(), lambda z: (z - 3).square().mean() / 2))
    assert len(seen) > 1
    assert all(value == pytest.approx(expected, abs=1e-12) for value, expected in seen)


# The reference

MODELS = {"linear": reference.LINEAR, "network": reference.two_layer()}
REFERENCE_LOSSES = {
    "half squared": (reference.HALF_SQUARED, LOSSES["half squared"][0], TARGETS),
    "logistic": (reference.LOGISTIC, LOSSES["logistic"][0], torch.sign(TARGETS)),
    "softmax": (reference.SOFTMAX, LOSSES["softmax"][0], F.one_hot(TARGETS.argmax(1), 3).double()),
}
INNER = {
    "sgd": (SGD, reference.inner_gd, dict(lr=0.1)),
    "momentum": (
        functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        reference.inner_gd,
        dict(lr=0.05, momentum=0.9),
    ),
    "armijo": ("armijo", reference.inner_armijo, {}),
    "armijo of epochs": (functools.partial(Armijo, growth=1.8**0.1), reference.inner_armijo,
                         dict(batches_per_epoch=10)),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("loss", REFERENCE_LOSSES)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("eta", ["constant", "decaying", "search"])
def test_ten_steps_are_those_of_the_reference(kind, loss, inner, eta):
    theirs, ours, targets = REFERENCE_LOSSES[loss]
    factory, solver, options = INNER[inner]
    model = network() if kind == "network" else nn.Linear(4, 3, bias=False).double()
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.copy_(normal(i, *param.shape))
    values = [param.detach().numpy().copy() for param in model.parameters()]
    values = values if kind == "network" else [values[0].T]
    optimizer = SSO(model.parameters(), 0.8, factory, 7, line_search=eta == "search", reset_inner=True)
    schedule = lr_scheduler.LambdaLR(optimizer, lambda t: (t + 1) ** -0.5 if eta == "decaying" else 1.0)
    losses = []
    for _ in range(10):
        losses.append(optimizer.step(closure_of(model, ours)).item())
        schedule.step()
    rule = {"constant": lambda t: 0.8, "decaying": lambda t: reference.eta_sqrt(0.8, t), "search": 0.8}[eta]
    batches = [(INPUTS.numpy(), targets.numpy())] * 10
    end, expected, infos = reference.sso_run(MODELS[kind], theirs, values, batches, rule, solver, 7, **options)
    np.testing.assert_allclose(losses, expected, rtol=1e-12, atol=1e-12)
    end = end if kind == "network" else [end[0].T]
    for param, value in zip(model.parameters(), end, strict=True):
        np.testing.assert_allclose(param.detach().numpy(), value, rtol=1e-12, atol=1e-12)
    if eta == "search":
        assert optimizer.counts["loss_values"] == 10 + sum(info["loss_evaluations"] for info in infos)


def test_armijo_goes_on_from_the_step_size_before_where_it_is_not_reset():
    param = nn.Parameter(normal(1, 4))
    scales, sizes = torch.tensor([1.0, 2.0, 5.0, 0.1], dtype=torch.float64), []
    armijo = Armijo([param], lr=3.0)

    def value():
        loss = (scales * param.square()).sum() / 2
        if torch.is_grad_enabled():
            param.grad = None
            loss.backward()
        return loss.detach()

    x, a = [param.detach().numpy().copy()], None
    for _ in range(6):
        start = 3.0 if a is None else 1.8 * a
        g = [scales.numpy() * x[0]]
        x, a, _, _ = reference.armijo(lambda p: (scales.numpy() * p[0] ** 2).sum() / 2, x, g, start)
        armijo.step(value)
        sizes.append(armijo.state[param]["step_size"])
        np.testing.assert_allclose(param.detach().numpy(), x[0], rtol=1e-13)
        assert sizes[-1] == pytest.approx(a, rel=1e-13)
    assert sizes[1] != sizes[0]


def test_armijo_does_not_go_where_the_value_is_infinite():
    param = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def value():
        result = param.log().sum()
        if torch.is_grad_enabled():
            result.backward()
        return result.detach()

    Armijo([param], lr=1.0).step(value)
    assert param.item() == pytest.approx(0.1)  # not 0, whose logarithm is below any bound


@pytest.mark.parametrize("name", ["kl", "reversed", "probabilities", "adagrad"])
def test_other_distances_are_those_of_the_reference(name):
    old, new, eta = normal(1, 8, 3), normal(2, 8, 3), 0.6
    loss, (theirs, _, targets) = LOSSES["softmax"][0], REFERENCE_LOSSES["softmax"]
    settings = {}
    if name == "probabilities":
        loss, (theirs, _, targets) = half_squared, REFERENCE_LOSSES["half squared"]
        old, new = old.softmax(1), new.softmax(1)
        entropy = (lambda p: reference.per_sample_sum(p * np.log(p)), lambda p: 1 + np.log(p))
        divergence = (functools.partial(reference.bregman, *entropy), None)
        settings = dict(divergence="kl")
    elif name == "adagrad":
        slope = theirs[1](old.numpy(), targets.numpy())
        divergence = reference.diagonal(reference.adagrad_weights(reference.adagrad_accumulator(0, slope), 1e-10))
        settings = dict(target_metric="adagrad")
    else:
        divergence = reference.KL if name == "kl" else reference.KL_REVERSED

        def between_logits(a, b):
            a, b = (a, b) if name == "kl" else (b, a)
            return F.kl_div(b.log_softmax(1), a.log_softmax(1), reduction="none", log_target=True).sum(1)

        settings = dict(divergence=between_logits)
    z = old.numpy()
    slope = theirs[1](z, targets.numpy())
    expected = reference.surrogate(new.numpy(), z, theirs[0](z, targets.numpy()), slope, eta, divergence)
    leaf = new.clone().requires_grad_()
    value = surrogate_at(loss, old, leaf, eta, **settings)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    if divergence[1] is not None:
        (slopes,) = torch.autograd.grad(value, leaf)
        expected = reference.surrogate_grad(new.numpy(), z, slope, eta, divergence)
        np.testing.assert_allclose(slopes.numpy(), expected, rtol=1e-12, atol=1e-13)


# The contract


def test_the_other_name_is_the_same_class():
    assert optimzoo.TargetSurrogate is SSO


SETTINGS = {
    "armijo": dict(),
    "armijo that goes on": dict(reset_inner=False),
    "adam": dict(inner=ADAM, line_search=True),
    "metric": dict(inner=ADAM, target_metric="adagrad"),
    "forgets": dict(inner=ADAM, reset_inner=True),
    "lbfgs": dict(inner=functools.partial(torch.optim.LBFGS, max_iter=2), inner_steps=2),
}


@pytest.mark.parametrize("way", ["checkpoint", "pickle", "deepcopy"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name, way, tmp_path):
    if name == "lbfgs" and way != "checkpoint":
        pytest.skip("torch's LBFGS does not survive a pickle")

    def start():
        model = network(0, torch.float32, nn.Dropout(0.2))
        return model, SSO(model.parameters(), 0.5, **SETTINGS[name])

    def go(model, optimizer, steps):
        schedules = [lr_scheduler.ExponentialLR(o, 0.9) for o in (optimizer, optimizer.inner)]
        for _ in range(steps):
            optimizer.step(closure_of(model, inputs=INPUTS.float()))
            for schedule in schedules:
                schedule.step()

    model, optimizer = start()
    torch.manual_seed(0)
    go(model, optimizer, 3)
    generator = torch.get_rng_state()
    if way == "checkpoint":
        torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "saved")
        other, resumed = start()
        saved = torch.load(tmp_path / "saved", weights_only=True)
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
    elif way == "pickle":
        other, resumed = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        other, resumed = copy.deepcopy((model, optimizer))
    for pair in ((model, optimizer), (other, resumed)):
        torch.set_rng_state(generator)
        go(*pair, 3)
    assert torch.equal(weights(model), weights(other))
    assert equal(optimizer.state_dict(), resumed.state_dict())
    assert optimizer.counts["loss_gradients"] == 6


def test_schedulers_work_on_both_levels():
    model = network()
    optimizer = SSO(model.parameters(), 0.8, SGD, 2)
    steps = 20
    outer = lr_scheduler.ExponentialLR(optimizer, (1 / steps) ** (1 / steps))
    inner = lr_scheduler.LambdaLR(optimizer.inner, lambda t: (t + 1) ** -0.5)
    for t in range(steps):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(reference.eta_exponential(0.8, t, steps))
        assert optimizer.inner.param_groups[0]["lr"] == pytest.approx(reference.eta_sqrt(0.1, t + 1))
        before = weights(model)
        optimizer.step(closure_of(model))
        assert not torch.equal(before, weights(model))
        outer.step()
        inner.step()


def test_groups_hand_their_settings_to_the_inner_optimizer():
    model = network()
    first, second = model[0].parameters(), [*model[2].parameters()]
    optimizer = SSO([dict(params=first, momentum=0.5)], 0.5, SGD)
    optimizer.add_param_group(dict(params=second, weight_decay=0.1))
    groups = optimizer.inner.param_groups
    assert [(g["momentum"], g["weight_decay"], g["lr"]) for g in groups] == [(0.5, 0, 0.1), (0, 0.1, 0.1)]
    optimizer.step(closure_of(model))
    with pytest.raises(ValueError, match="lr is one target step size for all groups"):
        optimizer.add_param_group(dict(params=[nn.Parameter(torch.zeros(2))], lr=0.1))
    assert len(optimizer.param_groups) == len(groups) == 2


def test_a_group_that_is_added_takes_the_target_step_size_of_the_time():
    model = network()
    optimizer = SSO(model[0].parameters(), 0.5, SGD)
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(2):
        optimizer.step(closure_of(model))
        schedule.step()
    optimizer.add_param_group(dict(params=model[2].parameters()))
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
    assert [group["lr"] for group in optimizer.inner.param_groups] == [0.1, 0.1]
    before = model[2].weight.clone()
    optimizer.step(closure_of(model))
    assert not torch.equal(before, model[2].weight)


def test_hooks_run_and_gradients_of_parameters_are_left_alone():
    model, seen = network(), []
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    grads = [param.grad for param in model.parameters()]
    optimizer = SSO(model.parameters(), 0.5, SGD)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    loss = optimizer.step(closure_of(model))
    assert seen == ["before", "after"]
    assert not loss.requires_grad
    for param, grad in zip(model.parameters(), grads, strict=True):
        assert param.grad is grad
        assert torch.equal(grad, torch.ones_like(grad))


def test_dropout_is_the_same_in_all_inner_updates_and_batch_statistics_move_once():
    model = network(0, torch.float64, nn.BatchNorm1d(6), nn.Dropout(0.5))
    masks = []
    model[2].register_forward_hook(lambda module, inputs, output: masks.append(output.detach() == 0))
    plain = copy.deepcopy(model)
    optimizer = SSO(model.parameters(), 0.5, SGD, 4, module=model)
    torch.manual_seed(1)
    optimizer.step(closure_of(model, lambda z: half_squared(F.dropout(z))))
    state = torch.get_rng_state()
    assert len(masks) == 4
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    torch.manual_seed(1)
    F.dropout(plain(INPUTS))
    assert torch.equal(torch.get_rng_state(), state)
    assert model[1].num_batches_tracked == 1
    assert equal([*model.buffers()], [*plain.buffers()])


class Counting(nn.Linear):
    """Has a buffer that each forward pass makes anew, and one that only the first makes."""

    def __init__(self):
        super().__init__(4, 3)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, inputs):
        self.passes = self.passes + 1
        if not hasattr(self, "first"):
            self.register_buffer("first", self.passes.clone())
        return super().forward(inputs) * self.passes


def test_buffers_that_a_forward_pass_assigns_are_held_and_put_back():
    model = Counting().double()
    optimizer = SSO(model.parameters(), 0.1, SGD, 5, module=model)
    before = everything(optimizer, model)
    with pytest.raises(FloatingPointError):
        optimizer.step(closure_of(model, lambda z: half_squared(z) / 0))
    assert equal(before, everything(optimizer, model))
    seen = []
    model.register_forward_hook(lambda *_: seen.append(model.passes.item()))
    for k in (1, 2):
        optimizer.step(closure_of(model))
        assert (model.passes, model.first) == (k, 1)
    assert seen == [1] * 5 + [2] * 5


def test_gradients_of_parameters_that_are_not_the_optimizer_s_are_left_alone():
    model = network()
    SSO(model[2].parameters(), 0.5, SGD, 3).step(closure_of(model))
    assert model[0].weight.grad is None


@pytest.mark.parametrize("kind", ["function", "tensor"])
def test_an_output_that_is_constant_stays_where_it_is(kind):
    models = [network(), network()]
    shift = normal(9, 8, 3)

    def loss(outputs):
        return half_squared(outputs[0] + outputs[1])

    def closure():
        outputs = models[1](INPUTS), shift
        return outputs, loss if kind == "function" else loss(outputs)

    SSO(models[0].parameters(), 0.5, SGD, 4).step(closure_of(models[0], lambda z: loss((z, shift))))
    SSO(models[1].parameters(), 0.5, SGD, 4).step(closure)
    torch.testing.assert_close(*map(weights, models), rtol=1e-13, atol=1e-13)


def test_all_trials_of_a_search_see_the_noise_of_the_first_value():
    model, noise = network(), []

    def noisy(outputs):
        noise.append(torch.randn(8, 3, dtype=torch.float64))
        return half_squared(outputs + noise[-1])

    optimizer = SSO(model.parameters(), 100.0, SGD, 1, line_search=True)
    optimizer.step(closure_of(model, noisy))
    assert len(noise) > 40
    assert all(torch.equal(row, noise[0]) for row in noise)
    assert optimizer.state_dict()["targets"]["lr"] == pytest.approx(100 * 0.9**44)  # the first below 1 / L = 1


def test_a_step_ends_where_nothing_is_left_to_do():
    param = nn.Parameter(torch.tensor([[1.0]]))
    optimizer = SSO([param], 0.5, functools.partial(torch.optim.SGD, lr=0.5), 50)  # reaches the minimum at once
    optimizer.step(lambda: (param.clone(), lambda z: z.square().sum() / 2))
    assert param.item() == 0.5
    assert optimizer.counts["backwards"] == 2


def test_a_failed_search_keeps_the_parameters_and_says_so():
    model = network()
    optimizer = SSO(model.parameters(), 1e-12, functools.partial(Armijo, lr=1e9))
    before = weights(model)
    with pytest.warns(UserWarning, match="no step size down to .* descends enough"):
        optimizer.step(closure_of(model))
    assert torch.equal(before, weights(model))
    assert optimizer.counts["backwards"] == 1  # a second search would go the same way


def test_the_least_target_step_size_that_is_searched_is_not_above_the_one_given():
    model = network()
    steep = lambda z: 1e6 * half_squared(z)  # noqa: E731  # it is the argument
    optimizer = SSO(model.parameters(), 5e-7, functools.partial(torch.optim.SGD, lr=1e-7), line_search=True)
    losses = [optimizer.step(closure_of(model, steep)).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    assert optimizer.state_dict()["targets"]["lr"] <= 1e-6  # 1 / L
    with pytest.warns(UserWarning, match=r"no target step size down to 0\.0001 descends enough"):
        SSO(model.parameters(), 1.0, SGD, 1, line_search=True).step(closure_of(model, steep))


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_trial_that_is_not_finite_is_never_taken(nonfinite):
    model = network()
    optimizer = SSO(model.parameters(), 1.0, SGD, line_search=True, nonfinite=nonfinite)
    start = model(INPUTS).detach()

    def cliff(z):  # finite where the model is, nowhere else
        return half_squared(z) + torch.where((z - start).abs().sum() > 0, torch.inf, 0.0)

    before = everything(optimizer, model)
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="the loss is not finite at the least trial"):
            optimizer.step(closure_of(model, cliff))
    else:
        assert optimizer.step(closure_of(model, cliff)) == half_squared(start)
        assert optimizer.counts["loss_values"] > 1
    assert equal(before, everything(optimizer, model))


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("lr", [1e300, math.nan])
def test_a_step_does_not_end_with_parameters_that_are_not_finite(lr, nonfinite):
    class Last(torch.optim.SGD):  # nothing looks at what the last update leaves
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                self.param_groups[0]["params"][0].mul_(lr).mul_(1e300)

    model = network()
    optimizer = SSO(model.parameters(), 0.5, functools.partial(Last, lr=0.1), 1, nonfinite=nonfinite)
    before = everything(optimizer, model)
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="the parameters are not finite"):
            optimizer.step(closure_of(model))
    else:
        optimizer.step(closure_of(model))
    assert equal(before, everything(optimizer, model))


# Armijo by itself


def squares(optimizer, fails=0):
    """The sum of squares of what an optimizer has; its call number ``fails`` raises."""
    calls = []
    params = [param for group in optimizer.param_groups for param in group["params"]]

    def value():
        calls.append(None)
        if len(calls) == fails:
            raise KeyError("closure")
        result = torch.stack([param.square().sum() for param in params]).sum()
        if torch.is_grad_enabled():
            optimizer.zero_grad()
            result.backward()
        return result.detach()

    return value


def test_a_closure_that_raises_within_a_search_leaves_the_parameters():
    param = nn.Parameter(torch.ones(2))
    with pytest.raises(KeyError, match="closure"):
        (armijo := Armijo([param])).step(squares(armijo, 4))
    assert torch.equal(param.detach(), torch.ones(2))


def test_groups_of_a_search_have_one_step_size():
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    for group, match in (
        (dict(lr=-1.0), "lr must be finite and > 0, got -1.0"),
        (dict(growth=0.1), "growth must be finite and >= 1, got 0.1"),
    ):
        with pytest.raises(ValueError, match=match):
            Armijo([dict(params=[first], **group)])
    armijo = Armijo([first])
    armijo.param_groups[0]["lr"] = 3.0
    with pytest.raises(ValueError, match="lr is one for all groups, got 3"):
        armijo.add_param_group(dict(params=[second], lr=0.5))
    armijo.add_param_group(dict(params=[second]))
    assert [group["lr"] for group in armijo.param_groups] == [3.0, 3.0]
    armijo.step(squares(armijo))
    assert torch.equal(first.detach(), second.detach())


def test_a_search_without_gradients_or_slope_stays_where_it_is():
    param = nn.Parameter(torch.ones(2))
    assert Armijo([param]).step(lambda: torch.tensor(1.0)) == 1
    param = nn.Parameter(torch.zeros(2))
    armijo = Armijo([param], lr=2.0)
    for _ in range(100):
        armijo.step(squares(armijo))
    assert armijo.state[param]["step_size"] == 1e4  # 1.8 ** 100 would be 3e25
    assert not param.any()


# Mixed precision


@pytest.mark.parametrize("inner", [SGD, "armijo"])
def test_autocast_around_the_step_is_as_good_as_within_the_closure(inner):
    models = [network(0, torch.float32) for _ in range(2)]
    inside, outside = (SSO(model.parameters(), 1.0, inner, 5) for model in models)

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            return models[0](INPUTS.float()), half_squared

    for _ in range(3):
        inside.step(closure)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            outside.step(closure_of(models[1], inputs=INPUTS.float()))
        outputs = models[1](INPUTS.float())
    assert torch.equal(*map(weights, models))
    assert torch.equal(outputs, closure()[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_surrogate_is_float32(dtype):
    model, seen = network(0, torch.float32), []

    def closure():
        with torch.autocast("cpu", dtype):
            return model(INPUTS.float()), lambda z: (seen.append(z.dtype), half_squared(z))[1]

    optimizer = SSO(model.parameters(), 1.0, ADAM, 5)
    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert set(seen) == {torch.float32}
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("inner", [SGD, functools.partial(torch.optim.Adam, lr=0.05, fused=True), "armijo",
                                   functools.partial(optimzoo.AdaBelief, lr=0.05)])  # fmt: skip
def test_a_scaler_of_the_inner_updates_changes_nothing_where_nothing_overflows(inner):
    models = [network(0, torch.float32) for _ in range(2)]
    scalers = [None, torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)]
    for model, scaler in zip(models, scalers, strict=True):
        optimizer = SSO(model.parameters(), 0.5, inner, 4, scaler=scaler)
        for _ in range(3):
            optimizer.step(closure_of(model, inputs=INPUTS.float()))
    torch.testing.assert_close(*map(weights, models), rtol=1e-5, atol=1e-6)
    assert scalers[1].get_scale() > 2.0**10


def test_a_scaler_skips_inner_updates_that_overflow():
    model = network(0, torch.float32)
    before = weights(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = SSO(model.parameters(), 0.5, SGD, 1, scaler=scaler)
    loss = lambda z: 1e4 * half_squared(z)  # noqa: E731  # it is the argument
    optimizer.step(closure_of(model, loss, INPUTS.float()))
    assert torch.equal(before, weights(model))
    assert scaler.get_scale() == 2.0**126


@pytest.mark.parametrize("given", [True, False])
def test_gradscaler_cannot_take_the_step_by_itself(given):
    model = network(0, torch.float32)
    optimizer, scaler = SSO(model.parameters(), 0.5, SGD), torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before = everything(optimizer, model)
    with pytest.raises(RuntimeError, match="give the scaler to the constructor"):
        scaler.step(optimizer, *[closure_of(model, inputs=INPUTS.float())][:given])
    assert equal(before, everything(optimizer, model))
    optimizer.step(closure_of(model, inputs=INPUTS.float()))


def test_an_inner_optimizer_that_evaluates_again_cannot_have_a_scaler():
    model = network(0, torch.float32)
    inner = functools.partial(torch.optim.LBFGS, max_iter=3)
    optimizer = SSO(model.parameters(), 0.5, inner, scaler=torch.amp.GradScaler("cpu"))
    before = everything(optimizer, model)
    with pytest.raises(RuntimeError, match="evaluates more than once"):
        optimizer.step(closure_of(model, inputs=INPUTS.float()))
    assert equal(before, everything(optimizer, model))


# Wrong input


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        (dict(lr=0.0), ValueError, "lr must be finite and > 0, got 0.0"),
        (dict(lr=-1.0), ValueError, "lr must be finite and > 0, got -1.0"),
        (dict(lr=math.nan), ValueError, "lr must be"),
        (dict(lr="1"), TypeError, "lr must be a number"),
        (dict(inner_steps=0), ValueError, "inner_steps must be a whole number >= 1, got 0"),
        (dict(inner_steps=2.0), ValueError, "inner_steps must be a whole number >= 1, got 2.0"),
        (dict(inner="wolfe"), TypeError, "inner must be \"armijo\" or a function that makes an optimizer, got 'wolfe'"),
        (dict(inner=lambda params: None), TypeError, "inner must make a torch.optim.Optimizer, got NoneType"),
        (dict(divergence="js"), ValueError, "divergence must be 'euclidean', 'kl' or a function, got 'js'"),
        (dict(divergence="kl", line_search=True), ValueError, "line_search and target_metric need"),
        (dict(target_metric="adam"), ValueError, "target_metric must be one of 'identity', 'adagrad', got 'adam'"),
        (dict(line_search="yes"), ValueError, "line_search must be one of False, True, got 'yes'"),
        (dict(nonfinite="ignore"), ValueError, "nonfinite must be one of 'raise', 'skip', got 'ignore'"),
        (dict(module=5), TypeError, "module must be None or a Module, got 5"),
        (dict(scaler=5), TypeError, "scaler must be None or a GradScaler, got 5"),
        (dict(process_group=5), TypeError, "process_group must be None or a ProcessGroup, got 5"),
        (dict(tol=-1.0), ValueError, "tol must be finite and >= 0"),
        (dict(inner=functools.partial(Armijo, lr=0.0)), ValueError, "lr must be finite and > 0"),
        (dict(inner=functools.partial(Armijo, growth=0.5)), ValueError, "growth must be finite and >= 1"),
    ],
)
def test_wrong_settings_are_named(settings, error, match):
    with pytest.raises(error, match=match):
        SSO(network().parameters(), **settings)


class Breaks(torch.optim.Adam):
    """Fails in the middle of its third step, after it has written."""

    def step(self, closure=None):
        super().step(closure)
        self.param_groups[0]["lr"] /= 2
        if next(iter(self.state.values()))["step"] == 6:
            self.param_groups[0]["broken"] = True
            raise ZeroDivisionError("third")


def failing(model):
    """Closures that cannot be worked with, the error and what it says."""
    calls = []

    def counted(result):
        def closure():
            calls.append(None)
            return result(len(calls))

        return closure

    def backward():
        outputs = model(INPUTS)
        half_squared(outputs).backward()
        return outputs, half_squared

    def crash(k):
        if k == 3:
            raise KeyError("closure")
        return model(INPUTS), half_squared

    def raises(z):
        raise ZeroDivisionError("loss")

    other = nn.Linear(4, 3).double()
    return {
        "no closure": (None, TypeError, "step needs a closure that returns"),
        "loss alone": (lambda: half_squared(model(INPUTS)), TypeError, r"must return \(outputs, loss\)"),
        "float loss": (lambda: (model(INPUTS), 1.0), TypeError, r"must return \(outputs, loss\)"),
        "list": (lambda: ([model(INPUTS)], half_squared), TypeError, "outputs must be a floating-point tensor"),
        "backward": (backward, RuntimeError, r"the closure called backward\(\)"),
        "no graph": (lambda: (model(INPUTS).detach(), half_squared), RuntimeError, "outputs have no graph"),
        "other model": (lambda: (other(INPUTS), half_squared), RuntimeError, "do not depend on any of the parameters"),
        "vector loss": (lambda: (model(INPUTS), lambda z: z.sum(1)), ValueError, "loss must be one real number"),
        "no tensor": (lambda: (model(INPUTS), lambda z: 1.0), TypeError, "the loss must be a tensor, got 1.0"),
        "flat loss": (lambda: (model(INPUTS), lambda z: torch.ones(())), RuntimeError, "this one has no graph"),
        "detached": (
            lambda: (z := model(INPUTS), half_squared(z.detach().requires_grad_())),
            RuntimeError,
            "the loss does not depend on the outputs",
        ),
        "infinite": (lambda: (model(INPUTS), lambda z: z.sum() / 0), FloatingPointError, "not finite"),
        "infinite outputs": (
            lambda: (model(INPUTS) / 0, lambda z: z.sigmoid().sum()),
            FloatingPointError,
            "not finite",
        ),
        "shape": (
            counted(lambda k: (model(INPUTS[: 8 if k < 3 else 7]), lambda z: half_squared(z))),
            RuntimeError,
            r"changed their shapes within a step, from \[\(8, 3\)\] to \[\(7, 3\)\]",
        ),
        "loss": (lambda: (model(INPUTS), raises), ZeroDivisionError, "loss"),
        "crash": (counted(crash), KeyError, "closure"),
        "surrogate": (
            counted(lambda k: (model(INPUTS) * (1 if k < 3 else torch.nan), half_squared)),
            FloatingPointError,
            "surrogate's gradient is not finite",
        ),
    }


@pytest.mark.parametrize("name", failing(None))
@pytest.mark.parametrize("inner", [ADAM, Armijo])
def test_a_step_that_raises_changes_nothing(name, inner):
    if name == "surrogate" and inner is not ADAM:
        pytest.skip("Armijo does not take a step to what is not finite")
    model = network(0, torch.float64, nn.BatchNorm1d(6), nn.Dropout(0.2))
    closure, error, match = failing(model)[name]
    settings = {} if name == "detached" else dict(line_search=True)  # a tensor for the loss cannot be searched
    optimizer = SSO(model.parameters(), 0.5, inner, module=model, **settings)
    optimizer.step(closure_of(model))
    for param in model.parameters():
        param.grad = None if name == "backward" else torch.ones_like(param)
    before = everything(optimizer, model)
    with pytest.raises(error, match=match):
        optimizer.step(closure)
    assert equal(before, everything(optimizer, model))
    optimizer.step(closure_of(model))


def test_an_inner_optimizer_that_fails_is_put_back():
    model = network()
    optimizer = SSO(model.parameters(), 0.5, Breaks, 3)
    optimizer.step(closure_of(model))
    before = everything(optimizer, model)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure_of(model))
    assert equal(before, everything(optimizer, model))
    assert optimizer.inner.param_groups[0]["params"][0] is next(model.parameters())


def test_what_a_step_that_raised_has_spent_is_counted():
    model = network()
    optimizer = SSO(model.parameters(), 0.5, ADAM)
    for name, (gradients, values, forwards, backwards) in {
        "infinite": (1, 1, 1, 0),
        "crash": (2, 2, 4, 2),
        "loss": (2, 3, 5, 2),
    }.items():
        closure, error, _ = failing(model)[name]
        with pytest.raises(error):
            optimizer.step(closure)
        spent = dict(loss_gradients=gradients, loss_values=values, forwards=forwards, backwards=backwards)
        assert optimizer.counts == spent


def test_a_step_can_be_skipped_where_it_is_not_finite_and_what_it_cost_is_counted():
    model = network()
    optimizer = SSO(model.parameters(), 0.5, ADAM, nonfinite="skip")
    optimizer.step(closure_of(model))
    before, counts = everything(optimizer, model), dict(optimizer.counts)
    assert optimizer.step(closure_of(model, lambda z: half_squared(z) / 0)).isinf()
    assert optimizer.counts == {**counts, "loss_gradients": 2, "loss_values": 2, "forwards": counts["forwards"] + 1}
    assert equal(before, everything(optimizer, model))


@pytest.mark.parametrize(
    ("settings", "closure", "error", "match"),
    [
        (dict(line_search=True), lambda m: (z := m(INPUTS), half_squared(z)), TypeError, "got a tensor for the loss"),
        (dict(divergence="kl"), lambda m: (m(INPUTS), half_squared), ValueError, "needs outputs that are prob"),
        (dict(divergence=lambda a, b: (a - b).square()), lambda m: (m(INPUTS), half_squared), ValueError,
         r"divergence must return shape \(8,\), got \(8, 3\)"),
    ],
)  # fmt: skip
def test_settings_that_the_outputs_do_not_fit(settings, closure, error, match):
    model = network()
    optimizer = SSO(model.parameters(), 0.5, ADAM, **settings)
    before = everything(optimizer, model)
    with pytest.raises(error, match=match):
        optimizer.step(lambda: closure(model))
    assert equal(before, everything(optimizer, model))


def test_the_metric_needs_the_same_dimensions_in_each_step():
    model = network()
    optimizer = SSO(model.parameters(), 0.5, ADAM, target_metric="adagrad")
    optimizer.step(closure_of(model))
    before = everything(optimizer, model)
    with pytest.raises(RuntimeError, match="outputs of the same dimensions"):
        optimizer.step(lambda: (model(INPUTS)[:, :2], lambda z: z.square().sum()))
    assert equal(before, everything(optimizer, model))


def test_learning_rates_that_were_written_are_checked_before_anything_is_asked():
    model, calls = network(), []
    optimizer = SSO([dict(params=[p]) for p in model.parameters()], 0.5, SGD)
    for lr, match in ((0.0, "lr must be finite and > 0"), (0.1, "lr is one target step size")):
        optimizer.param_groups[1]["lr"] = lr
        with pytest.raises(ValueError, match=match):
            optimizer.step(lambda: calls.append(None))
    assert not calls


def test_checkpoints_that_do_not_fit_change_nothing():
    model = network()
    optimizer = SSO(model.parameters(), 0.5, ADAM)
    optimizer.step(closure_of(model))
    other = SSO([*model.parameters()][:2], 0.5, ADAM)
    before = everything(optimizer, model)
    saved = optimizer.state_dict()
    for wrong, match in (
        (torch.optim.SGD(model.parameters()).state_dict(), "state_dict lacks 'inner'"),
        (other.state_dict(), "parameter group"),
        ({**saved, "inner": other.state_dict()["inner"]}, "parameter group"),
        ({**saved, "targets": None}, "'targets'.* must have lr and sum_sq, got None"),
        ({**saved, "targets": {}}, "'targets'.* must have lr and sum_sq, got {}"),
        ({**saved, "targets": dict(lr=-1.0, sum_sq=None)}, "'lr'.* must be finite and > 0, got -1"),
        ({**saved, "targets": dict(lr=None, sum_sq=3)}, "'sum_sq'.* must be None or a list of tensors, got 3"),
        ({**saved, "counts": {}}, "'counts'.* must have loss_gradients, .*, got {}"),
    ):
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(wrong)
        assert equal(before, everything(optimizer, model))


def test_no_warning_on_the_way():
    model = network(0, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SSO(model.parameters()).step(closure_of(model, inputs=INPUTS.float()))

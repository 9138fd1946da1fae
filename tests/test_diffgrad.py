"""diffGrad: the identities, the paper's test functions and the checkpoints of the authors' code."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from cases import BACKENDS
from hypothesis import given
from hypothesis import strategies as st
from steps import advance, close, copies, gradients, normal, saved
from torch import Tensor
from torch.optim import Adam, Optimizer

from optimzoo import DiffGrad

each_plain_backend = pytest.mark.parametrize("backend", [BACKENDS[n] for n in ("single", "foreach", "fused")], ids=str)


def moves(optimizer: type[Optimizer], grads: list[Tensor], **options) -> Tensor:
    """What each step adds to a parameter that starts at zero."""
    param = torch.zeros_like(grads[0]).requires_grad_()
    instance = optimizer([param], **options)
    path = [param.detach().clone()]
    for grad in grads:
        advance(instance, [[grad]])
        path.append(param.detach().clone())
    return torch.stack(path).diff(dim=0)


def sequence(size: int = 40, steps: int = 12, scale: float = 1.0) -> list[Tensor]:
    return [scale * normal(t, size) for t in range(steps)]


@each_plain_backend
def test_the_first_step_is_lr_times_the_sigmoid_of_the_gradient(backend):
    (grad,) = sequence(steps=1, scale=3.0)
    move = moves(DiffGrad, [grad], lr=0.1, eps=0.0, **backend)[0]
    torch.testing.assert_close(move, -0.1 * grad.abs().sigmoid() * grad.sign(), rtol=1e-14, atol=0)


@each_plain_backend
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_step_is_between_half_of_adams_and_adams(backend, scale):
    grads = sequence(scale=scale, steps=50)
    ratio = moves(DiffGrad, grads, **backend) / moves(Adam, grads)
    assert ratio.min() >= 0.5 - 1e-9
    assert ratio.max() <= 1 + 1e-9


@each_plain_backend
def test_for_a_constant_gradient_a_step_is_half_of_adams_from_the_second_on(backend):
    grads = sequence(steps=1) * 20
    ratio = moves(DiffGrad, grads, **backend) / moves(Adam, grads)
    torch.testing.assert_close(ratio[1:], torch.full_like(ratio[1:], 0.5), rtol=1e-12, atol=0)
    torch.testing.assert_close(ratio[0], grads[0].abs().sigmoid(), rtol=1e-12, atol=0)


@each_plain_backend
@pytest.mark.parametrize(("scale", "lr"), [(1e6, 1e-3), (1e-6, 5e-4)])
def test_large_gradients_give_adam_and_small_ones_adam_at_half_the_rate(backend, scale, lr):
    # No drawn change of a gradient is below 1e-4, nor a scaled one below 100, where the sigmoid is one.
    grads = sequence(scale=scale)
    got = moves(DiffGrad, grads, eps=1e-30, **backend)
    torch.testing.assert_close(got, moves(Adam, grads, lr=lr, eps=1e-30), rtol=4e-6, atol=1e-18)


@each_plain_backend
@pytest.mark.parametrize("variant", [0, 2])
def test_variants_without_a_sign_are_odd_in_the_gradient(backend, variant):
    grads = sequence()
    up = moves(DiffGrad, [-g for g in grads], variant=variant, **backend)
    assert torch.equal(up, -moves(DiffGrad, grads, variant=variant, **backend))


@each_plain_backend
def test_variant_1_and_its_mirror_image_add_up_to_adam(backend):
    grads = sequence()
    difference = moves(DiffGrad, grads, variant=1, **backend) - moves(
        DiffGrad, [-g for g in grads], variant=1, **backend
    )
    torch.testing.assert_close(difference, moves(Adam, grads), rtol=1e-11, atol=1e-17)


@each_plain_backend
@given(g=st.floats(-50, 50).filter(bool), h=st.floats(-50, 50))
def test_the_friction_stays_in_the_range_of_its_variant(backend, g, h):
    grads = [torch.tensor([x], dtype=torch.float64) for x in (g, h)]
    adam = moves(Adam, grads)
    for variant, low, high in ((0, 0.5, 1.0), (1, 0.0, 1.0), (2, 0.5, 5.0)):
        friction = moves(DiffGrad, grads, variant=variant, **backend)[adam != 0] / adam[adam != 0]
        assert (friction >= low - 1e-9).all()
        assert (friction <= high + 1e-9).all()


@each_plain_backend
@pytest.mark.parametrize("variant", [0, 1, 2])
def test_a_zero_first_gradient_gives_no_move_and_no_nan(backend, variant):
    grads = [torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
    steps = moves(DiffGrad, grads, variant=variant, **backend)
    assert (steps[0] == 0).all()
    assert steps.isfinite().all()
    assert (steps[1] < 0).all()


@each_plain_backend
def test_the_kept_gradient_is_a_copy_of_the_one_that_entered_the_average(backend):
    # After the sign flip and the coupled decay, and never the tensor that the next backward refills.
    param = torch.full((2,), 3.0, dtype=torch.float64, requires_grad=True)
    optimizer = DiffGrad([param], weight_decay=0.5, maximize=True, **backend)
    param.grad = torch.tensor([1.0, -2.0], dtype=torch.float64)
    optimizer.step()
    assert optimizer.state[param]["previous_grad"].tolist() == [-1 + 1.5, 2 + 1.5]
    param.grad.fill_(100.0)
    assert optimizer.state[param]["previous_grad"].tolist() == [-1 + 1.5, 2 + 1.5]


@each_plain_backend
def test_friction_is_not_stored_in_the_average(backend):
    grads = sequence()
    params = [torch.zeros(40, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    ours, adam = DiffGrad(params[:1], **backend), Adam(params[1:])
    for optimizer in (ours, adam):
        advance(optimizer, [[g] for g in grads])
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(ours.state[params[0]][name], adam.state[params[1]][name], rtol=1e-14, atol=1e-17)


# The paper's three functions of one variable: derivatives of their pieces, up to the given end.


def slope_f1(x: float) -> float:
    return 2 * x + 0.6 if x <= 0 else 2 * x - 0.4


def slope_f2(x: float) -> float:
    return -40.0 if x <= -0.9 else 3 * x**2 + math.sin(8 * x) + 8 * x * math.cos(8 * x)


def slope_f3(x: float) -> float:
    pieces = [(-0.5, 2 * x), (-0.4, 1.0), (0.0, -7 / 8), (0.4, 7 / 8), (0.5, -1.0), (math.inf, 2 * x)]
    return next(slope for end, slope in pieces if x <= end)


TABLE = [  # x after 1, 2, 3, 50, 100, 299 steps, largest x
    (slope_f1, Adam, "-0.9000000007 -0.8004874037 -0.7019480287 0.118662 0.221195 0.200115 0.332023"),
    (slope_f1, DiffGrad, "-0.9197816117 -0.8659611288 -0.8136610192 -0.377654 -0.295383 -0.300071 -0.061594"),
    (slope_f2, Adam, "-0.9000000000 -0.8000000000 -0.7158257290 0.043501 -0.011534 0.000090 0.074717"),
    (slope_f2, DiffGrad, "-0.9000000000 -0.8500000000 -0.7661261634 -0.739092 -0.670286 -0.642963 -0.418840"),
    (slope_f3, Adam, "-0.9000000005 -0.8002703658 -0.7010485847 0.100576 -0.003421 0.000510 0.266690"),
    (slope_f3, DiffGrad, "-0.9119202926 -0.8576482239 -0.8051790052 -0.086673 0.055829 0.013565 0.183352"),
]


RUNS = [
    pytest.param(slope, optimizer, options, row, id=f"{slope.__name__}-{optimizer.__name__}-{name}")
    for slope, optimizer, row in TABLE
    for name, options in (
        [("", {})] if optimizer is Adam else [(n, BACKENDS[n]) for n in ("single", "foreach", "fused")]
    )
]


@pytest.mark.parametrize(("slope", "optimizer", "options", "row"), RUNS)
def test_the_papers_functions_are_descended_as_tabled(slope, optimizer, options, row):
    x = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    instance = optimizer([x], lr=0.1, betas=(0.95, 0.999), eps=1e-8, **options)
    path = [x.item()]
    for _ in range(299):
        x.grad = torch.tensor(slope(x.item()), dtype=torch.float64)
        instance.step()
        path.append(x.item())
    got = [path[k] for k in (1, 2, 3, 50, 100, 299)] + [max(path)]
    for value, printed in zip(got, row.split(), strict=True):
        digits = len(printed.split(".")[1])
        assert abs(value - float(printed)) <= 0.501 * 10.0**-digits, (got, row)


# The authors' checkpoints


def authors_state(param: Tensor, grads: list[Tensor], beta1: float = 0.9, beta2: float = 0.999) -> dict:
    """A checkpoint as the authors' code writes it: an integer step and four settings."""
    average, square = torch.zeros_like(param), torch.zeros_like(param)
    for grad in grads:
        average, square = beta1 * average + (1 - beta1) * grad, beta2 * square + (1 - beta2) * grad**2
    state = dict(step=len(grads), exp_avg=average, exp_avg_sq=square, previous_grad=grads[-1].clone())
    group = dict(lr=0.01, betas=(beta1, beta2), eps=1e-8, weight_decay=0.0, params=[0])
    return dict(state={0: state}, param_groups=[group])


@each_plain_backend
def test_a_checkpoint_of_the_authors_code_loads_and_goes_on(backend):
    param = normal(1, 6).requires_grad_()
    grads = sequence(size=6, steps=8)
    ours = DiffGrad([param], lr=0.01, **backend)
    twin = DiffGrad([param.detach().clone().requires_grad_()], lr=0.5, variant=0, **backend)
    start = param.detach().clone()
    advance(ours, [[g] for g in grads[:4]])
    with torch.no_grad():
        twin.param_groups[0]["params"][0].copy_(param)
    twin.load_state_dict(authors_state(start, grads[:4]))
    assert twin.param_groups[0]["lr"] == 0.01
    assert twin.param_groups[0]["variant"] == 0
    close(advance(ours, [[g] for g in grads[4:]]), advance(twin, [[g] for g in grads[4:]]), 1e-13)


@each_plain_backend
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_run_of_a_correct_port_of_the_authors_code_is_continued(backend, weight_decay):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_optimizer = pytest.importorskip("torch_optimizer")
    # With this eps it does not matter that the port adds it before the bias correction.
    options = dict(lr=0.01, eps=1e-30, weight_decay=weight_decay)
    params = [normal(1, 5, 3).requires_grad_(), normal(2, 4).requires_grad_()]
    grads = gradients(params, 20)
    peer = advance(torch_optimizer.DiffGrad(params, **options), grads[:10])
    ours = DiffGrad(copies(params), **backend)
    ours.load_state_dict(saved(peer))
    advance(peer, grads[10:])
    advance(ours, grads[10:])
    for left, right in zip(ours.param_groups[0]["params"], params, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-13, atol=1e-13)

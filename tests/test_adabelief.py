"""AdaBelief: the identities, the effect of eps, the warm-up, the decays and the checkpoints of the authors' code."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch
from cases import BACKENDS
from hypothesis import given
from hypothesis import strategies as st
from steps import advance, copies, gradients, normal, saved
from torch import Tensor

from optimzoo import AdaBelief

each_plain_backend = pytest.mark.parametrize("backend", [BACKENDS[n] for n in ("single", "foreach", "fused")], ids=str)


def moves(grads: list[Tensor], **options) -> Tensor:
    """What each step adds to a parameter that starts at zero."""
    param = torch.zeros_like(grads[0]).requires_grad_()
    optimizer = AdaBelief([param], **options)
    path = [param.detach().clone()]
    for grad in grads:
        advance(optimizer, [[grad]])
        path.append(param.detach().clone())
    return torch.stack(path).diff(dim=0)


def sequence(size: int = 40, steps: int = 12) -> list[Tensor]:
    return [normal(t, size) for t in range(steps)]


@each_plain_backend
@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_variance_is_its_closed_form_at_every_step(backend, amsgrad):
    beta2, eps = 0.9, 1e-3
    grads = sequence()
    param = torch.zeros(40, dtype=torch.float64, requires_grad=True)
    optimizer = AdaBelief([param], betas=(0.8, beta2), eps=eps, rectify=False, amsgrad=amsgrad, **backend)
    mean = torch.zeros_like(grads[0])
    average = torch.zeros_like(grads[0])
    for t, grad in enumerate(grads, start=1):
        advance(optimizer, [[grad]])
        average = 0.8 * average + 0.2 * grad
        mean = beta2 * mean + (1 - beta2) * (grad - average) ** 2
        expected = mean + eps * (1 - beta2**t) / (1 - beta2)
        torch.testing.assert_close(optimizer.state[param]["exp_avg_var"], expected, rtol=1e-13, atol=0)


@each_plain_backend
@pytest.mark.parametrize("beta1", [0.5, 0.9])
def test_the_first_step_without_warm_up_has_length_lr_over_beta1(backend, beta1):
    (grad,) = sequence(steps=1)
    move = moves([grad], lr=0.01, betas=(beta1, 0.999), eps=1e-300, rectify=False, **backend)[0]
    torch.testing.assert_close(move, -0.01 / beta1 * grad.sign(), rtol=1e-12, atol=0)


@each_plain_backend
@given(scale=st.sampled_from([1e-3, -1e-3, 0.5, -1.0, 7.0, -1e4]), rectify=st.just(False))
def test_steps_without_warm_up_do_not_depend_on_the_scale_of_the_gradient(backend, scale, rectify):
    grads = sequence()
    one = moves(grads, eps=1e-200, rectify=rectify, **backend)
    other = moves([scale * g for g in grads], eps=1e-200, rectify=rectify, **backend)
    torch.testing.assert_close(other, one if scale > 0 else -one, rtol=1e-10, atol=1e-17)


# Steps in units of lr for a gradient of one; 1e-16 and 1e-8 differ where eps has had the time to add up.
GROWTH = [
    (1, 1.1111, 1.1111, 4),
    (2, 1.1680, 1.1680, 4),
    (10, 1.6354, 1.6354, 4),
    (100, 4.955, 4.954, 3),
    (1000, 20.0, 20.0, 1),
    (10000, 2272.7, 313.2, 1),
]


@pytest.mark.parametrize("eps", [1e-16, 1e-8])
def test_the_step_of_a_constant_gradient_grows_as_tabled(eps):
    param = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    param.grad = torch.ones_like(param)
    optimizer = AdaBelief([param], lr=1.0, eps=eps, rectify=False)
    tabled = {t: (small if eps == 1e-16 else large, digits) for t, small, large, digits in GROWTH}
    for t in range(1, 10001):
        before = param.item()
        optimizer.step()
        if t in tabled:
            value, digits = tabled[t]
            assert abs(before - param.item() - value) <= 0.51 * 10.0**-digits


@each_plain_backend
def test_the_first_five_steps_of_the_warm_up_are_momentum(backend):
    grads = sequence(steps=5)
    got = moves(grads, lr=0.1, **backend)
    average = torch.zeros_like(grads[0])
    for t, grad in enumerate(grads, start=1):
        average = 0.9 * average + 0.1 * grad
        torch.testing.assert_close(got[t - 1], -0.1 * average / (1 - 0.9**t), rtol=1e-12, atol=1e-15)


@each_plain_backend
def test_without_momentum_steps_the_parameter_stands_still_for_five(backend):
    grads = sequence(steps=6)
    got = moves(grads, degenerated_to_sgd=False, **backend)
    assert (got[:5] == 0).all()
    assert (got[5] != 0).all()
    torch.testing.assert_close(got[5], moves(grads, **backend)[5], rtol=1e-11, atol=0)


@each_plain_backend
def test_standing_still_the_averages_the_step_and_the_decay_go_on(backend):
    grads = sequence(steps=3)
    param = torch.ones(40, dtype=torch.float64, requires_grad=True)
    twin = torch.ones(40, dtype=torch.float64, requires_grad=True)
    still = AdaBelief([param], lr=0.1, weight_decay=0.5, degenerated_to_sgd=False, **backend)
    walks = AdaBelief([twin], lr=0.1, weight_decay=0.5, **backend)
    for optimizer in (still, walks):
        advance(optimizer, [[g] for g in grads])
    torch.testing.assert_close(param, torch.full_like(param, 0.95**3), rtol=1e-14, atol=0)
    for name, value in still.state[param].items():
        assert torch.equal(value, walks.state[twin][name])


@each_plain_backend
def test_the_sixth_step_is_the_first_rectified_one(backend):
    # rho_6 is 5.9942 at beta2 = 0.999, where the factor of the adaptive step is 0.026.
    grads = sequence(steps=6)
    rectified = moves(grads, eps=1e-30, **backend)[5]
    adaptive = moves(grads, eps=1e-30, rectify=False, **backend)[5]
    factor = rectified / adaptive
    assert torch.allclose(factor, factor[0], rtol=1e-9)
    assert round(factor[0].item(), 3) == 0.026


@pytest.mark.filterwarnings("ignore:.*never adapts")
@pytest.mark.parametrize("backend", list(BACKENDS.values()), ids=str)
@pytest.mark.parametrize("beta2", [0.0, 0.5, 2 / 3])
def test_a_short_memory_never_adapts_and_stays_with_momentum(backend, beta2):
    from reference import adabelief

    param = normal(3, 6).requires_grad_(not backend.get("differentiable"))
    state = dict(param=param.detach().numpy().copy())
    optimizer = AdaBelief([param], lr=0.01, betas=(0.9, beta2), **backend)
    for (grad,) in gradients([param], 30):
        advance(optimizer, [[grad]])
        adabelief.step(state, grad.numpy(), lr=0.01, betas=(0.9, beta2))
    np.testing.assert_allclose(param.detach().numpy(), state["param"], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", list(BACKENDS.values()), ids=str)
def test_coupled_decay_is_adding_it_to_the_gradient_by_hand(backend):
    param = normal(1, 8).requires_grad_(not backend.get("differentiable"))
    twin = param.detach().clone().requires_grad_(param.requires_grad)
    ours = AdaBelief([param], lr=0.1, weight_decay=0.3, decoupled_weight_decay=False, **backend)
    by_hand = AdaBelief([twin], lr=0.1, **backend)
    for (grad,) in gradients([param], 8):
        advance(ours, [[grad]])
        advance(by_hand, [[grad + 0.3 * twin.detach()]])
    torch.testing.assert_close(param, twin, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours.state[param], by_hand.state[twin], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", list(BACKENDS.values()), ids=str)
@pytest.mark.parametrize(("fixed", "factor"), [(False, 1 - 0.1 * 0.3), (True, 1 - 0.3)])
def test_with_zero_gradients_the_parameter_decays_geometrically(backend, fixed, factor):
    start = normal(1, 8)
    param = start.clone().requires_grad_(not backend.get("differentiable"))
    optimizer = AdaBelief([param], lr=0.1, weight_decay=0.3, fixed_decay=fixed, **backend)
    advance(optimizer, [[torch.zeros(8, dtype=torch.float64)]] * 10)
    torch.testing.assert_close(param.detach(), start * factor**10, rtol=1e-14, atol=0)


@each_plain_backend
def test_the_maximum_never_falls_while_the_variance_does(backend):
    param = torch.zeros(40, dtype=torch.float64, requires_grad=True)
    optimizer = AdaBelief([param], betas=(0.9, 0.5), amsgrad=True, rectify=False, **backend)
    largest, last, fell = torch.zeros(40, dtype=torch.float64), torch.zeros(40, dtype=torch.float64), False
    for grad in sequence(steps=30):
        advance(optimizer, [[grad]])
        variance, maximum = (optimizer.state[param][name] for name in ("exp_avg_var", "max_exp_avg_var"))
        fell |= bool((variance < last).any())
        last, largest = variance.clone(), largest.maximum(variance)
        assert torch.equal(maximum, largest)
    assert fell, "these gradients do not exercise the maximum"


@pytest.mark.parametrize("backend", list(BACKENDS.values()), ids=str)
@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_zero_gradients_move_nothing_and_make_no_nan(backend, rectify, dtype):
    param = torch.ones(8, dtype=dtype, requires_grad=not backend.get("differentiable"))
    optimizer = advance(AdaBelief([param], rectify=rectify, **backend), [[torch.zeros(8, dtype=dtype)]] * 20)
    assert (param == 1).all()
    assert all(value.isfinite().all() for value in optimizer.state[param].values())
    assert (optimizer.state[param]["exp_avg_var"] > 0).all()


@pytest.mark.filterwarnings("ignore:.*AdaBelief is SGD")
@each_plain_backend
def test_without_memory_of_the_gradient_it_is_sgd_with_a_huge_step(backend):
    grads = sequence(steps=3)
    got = moves(grads, lr=1e-9, betas=(0.0, 0.999), rectify=False, **backend)
    size = 1e-9 / ((1e-16 / 1e-3) ** 0.5 + 1e-16)  # 3.16e6 times lr
    torch.testing.assert_close(got, -size * torch.stack(grads), rtol=1e-6, atol=0)


# Warnings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(betas=(0.0, 0.999)), r"betas\[0\] = 0"),
        (dict(betas=(0.9, 0.5)), r"betas\[1\] <= 2/3"),
        (dict(betas=(0.9, 2 / 3)), r"betas\[1\] <= 2/3"),
    ],
)
def test_settings_that_defeat_the_method_warn_where_they_are_written(options, message):
    param = torch.zeros(2, requires_grad=True)
    with pytest.warns(UserWarning, match=message) as record:
        AdaBelief([param], **options)
    assert [warning.filename for warning in record] == [__file__]
    AdaBelief([param])


def test_a_short_memory_without_warm_up_is_no_reason_to_warn():
    AdaBelief([torch.zeros(2, requires_grad=True)], betas=(0.9, 0.5), rectify=False)


def test_nothing_is_printed(capfd):
    param = torch.zeros(2, requires_grad=True)
    advance(AdaBelief([param], weight_decay=0.1, fixed_decay=True), [[torch.ones(2)]])
    assert capfd.readouterr() == ("", "")


# The authors' checkpoints

PUBLISHED = {
    "defaults": {},
    "plain": dict(rectify=False),
    "cifar": dict(rectify=False, eps=1e-8, weight_decay=5e-4, decoupled_weight_decay=False),
    "decoupled": dict(weight_decay=0.1),
    "fixed": dict(weight_decay=0.01, fixed_decay=True, rectify=False),
    "amsgrad": dict(rectify=False, amsgrad=True, betas=(0.9, 0.5)),
    "stands-still": dict(degenerated_to_sgd=False),
}


@each_plain_backend
@pytest.mark.parametrize("switch", [3, 30])
@pytest.mark.parametrize("setting", PUBLISHED)
def test_a_run_of_the_authors_code_is_continued(setting, switch, backend):
    adabelief_pytorch = pytest.importorskip("adabelief_pytorch")
    options = dict(PUBLISHED[setting])
    theirs = {"weight_decouple" if k == "decoupled_weight_decay" else k: v for k, v in options.items()}
    params = [normal(1, 5, 3).requires_grad_(), normal(2, 4).requires_grad_()]
    grads = gradients(params, switch + 15)
    with contextlib.redirect_stdout(io.StringIO()):
        full = dict(weight_decouple=True, rectify=True) | theirs
        peer = adabelief_pytorch.AdaBelief(params, lr=0.01, print_change_log=False, **{"eps": 1e-16, **full})
    advance(peer, grads[:switch])
    assert isinstance(peer.state[params[0]]["step"], int)
    # Learning rate, betas, eps and weight decay come from the checkpoint; the others it does not hold.
    flags = {k: v for k, v in options.items() if isinstance(v, bool)}
    ours = AdaBelief(copies(params), lr=0.5, **flags, **backend)
    ours.load_state_dict(saved(peer))
    advance(peer, grads[switch:])
    advance(ours, grads[switch:])
    for left, right in zip(ours.param_groups[0]["params"], params, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-13, atol=1e-13)
        for name in ("exp_avg", "exp_avg_var"):
            torch.testing.assert_close(ours.state[left][name], peer.state[right][name], rtol=1e-13, atol=1e-15)

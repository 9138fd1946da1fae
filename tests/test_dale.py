"""Multiplicative updates: signs, exact values, zeros, initializers, and the laws that DaleLangevin samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import BACKENDS, ROUNDOFF, tolerance
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import dalelangevin
from steps import advance, bits, copies, gradients, normal, parameters, same, saved

from optimzoo import DaleAdamW, DaleLangevin, DaleSGD, dale, dale_columns_, dale_groups, lognormal_

DALE = [DaleSGD, DaleAdamW, DaleLangevin]
EAGER = [name for name in BACKENDS if "capturable" not in name]
each_dale = pytest.mark.parametrize("cls", DALE)
each_eager = pytest.mark.parametrize("backend", [BACKENDS[name] for name in EAGER], ids=EAGER)


def leaf(*values: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


# Signs


@each_dale
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_eager
@settings(max_examples=4)
@given(data=st.data())
def test_signs_never_change(cls, dtype, backend, data):
    # A hundred steps, at rates that take weights to the ends of their range.
    lr = data.draw(st.sampled_from([1e-3, 0.1, 3.0]))
    param = normal(data.draw(st.integers(0, 99)), 8, 5, dtype=dtype).requires_grad_(not backend.get("differentiable"))
    before = param.detach().sign()
    assert (before != 0).all()
    optimizer = cls([param], lr=lr, exponent_clip=1.0, **backend)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    for _ in range(100):
        param.grad = (10 * torch.randn(param.shape, generator=generator)).to(dtype)
        with torch.no_grad():  # a graph of a hundred differentiable steps is not what this is about
            optimizer.step()
    assert torch.equal(param.detach().sign(), before)
    assert param.detach().isfinite().all()


@each_dale
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_weight_that_fades_stops_at_the_smallest_number_and_comes_back(cls, dtype):
    param = leaf(0.5, -0.5, dtype=dtype)
    optimizer = cls([param], lr=1.0, exponent_clip=2.0, **({"s": 0.0} if cls is DaleLangevin else {}))
    for _ in range(100):
        param.grad = 10 * param.detach().sign()
        optimizer.step()
    smallest = 2.0**-24 if dtype is torch.float16 else torch.finfo(dtype).tiny
    assert param.tolist() == [smallest, -smallest]
    for _ in range(150):
        param.grad = -10 * param.detach().sign()
        optimizer.step()
    assert param.detach().abs().min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_eager
def test_factors_that_a_16_bit_weight_cannot_hold_add_up(dtype, backend):
    # 2,000 factors of 1.0001, each a fortieth of bfloat16's resolution.
    param = leaf(0.5, -0.5, dtype=dtype).detach().requires_grad_(not backend.get("differentiable"))
    optimizer = DaleSGD([param], lr=1e-4, **backend)
    with torch.no_grad():
        for _ in range(2000):
            param.grad = torch.tensor([-1.0, 1.0], dtype=dtype)
            optimizer.step()
    expected = torch.tensor([0.5, -0.5]) * math.exp(0.2)
    torch.testing.assert_close(param.detach().float(), expected, rtol=2 * ROUNDOFF[dtype], atol=0)
    torch.testing.assert_close(optimizer.state[param]["master"], expected, rtol=1e-4, atol=0)
    nearest = leaf(0.5, dtype=torch.bfloat16)
    advance(DaleSGD([nearest], lr=1e-4, rounding="nearest"), [[torch.tensor([-1.0], dtype=torch.bfloat16)]] * 50)
    assert nearest.item() == 0.5  # what it is all about


@each_dale
def test_a_sign_changed_from_outside_is_an_error_before_anything_changes(cls):
    param = leaf(1.0, -2.0, 3.0)
    optimizer = advance(cls([param]), [[torch.ones(3, dtype=torch.float64)]])
    with torch.no_grad():
        param[1] = 2.0
    before = bits(param), bits(dict(optimizer.state[param]))
    with pytest.raises(RuntimeError, match="1 signs of a parameter of shape \\(3,\\)"):
        optimizer.step()
    assert (bits(param), bits(dict(optimizer.state[param]))) == before
    with torch.no_grad():
        param[1] = -5.0  # another size is nobody's business
    optimizer.step()


@each_dale
def test_a_checkpoint_that_does_not_go_with_the_weights_is_an_error(cls):
    param, other = leaf(1.0, -2.0), leaf(1.0, 2.0)
    optimizer = advance(cls([param]), [[torch.ones(2, dtype=torch.float64)]])
    resumed = cls([other])
    resumed.load_state_dict(saved(optimizer))
    other.grad = torch.ones_like(other)
    with pytest.raises(RuntimeError, match="1 signs"):
        resumed.step()


def test_a_sign_changed_through_data_is_found_when_asked_for():
    param = leaf(1.0, -2.0)
    optimizer = advance(DaleSGD([param]), [[torch.ones(2, dtype=torch.float64)]])
    param.data[0] = -1.0
    with pytest.raises(RuntimeError, match="1 signs"):
        optimizer.check_signs()


def test_signs_are_restored_or_followed_if_that_is_asked_for():
    for check, expected in (("restore", -2.0), (False, 2.0)):
        param = leaf(1.0, -2.0)
        optimizer = advance(DaleSGD([param], check_signs=check), [[torch.zeros(2, dtype=torch.float64)]])
        with torch.no_grad():
            param[1] = 2.0
        optimizer.step()
        assert param[1].item() == expected
        assert ("sign" in optimizer.state[param]) == (check == "restore")


# Single steps


def test_a_step_multiplies_by_the_exponential():
    param = leaf(2.0, -2.0, 0.5)
    advance(DaleSGD([param], lr=0.5), [[torch.tensor([1.0, 1.0, -2.0], dtype=torch.float64)]])
    expected = [2 * math.exp(-0.5), -2 * math.exp(0.5), 0.5 * math.e]
    torch.testing.assert_close(param, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0)


def test_weight_decay_shrinks_every_weight_by_one_factor():
    param = leaf(2.0, -0.1)
    advance(DaleSGD([param], lr=0.5, weight_decay=0.2), [[torch.zeros(2, dtype=torch.float64)]] * 3)
    expected = torch.tensor([2.0, -0.1], dtype=torch.float64) * math.exp(-0.3)
    torch.testing.assert_close(param, expected, rtol=1e-14, atol=0)


@each_dale
@each_eager
def test_the_exponent_is_clipped(cls, backend):
    param = leaf(1.0, -1.0).detach().requires_grad_(not backend.get("differentiable"))
    optimizer = cls([param], lr=100.0, exponent_clip=0.25, weight_decay=0, **backend)
    with torch.no_grad():
        advance(optimizer, [[torch.tensor([1e6, 1e6], dtype=torch.float64)]])
    expected = torch.tensor([math.exp(-0.25), -math.exp(0.25)], dtype=torch.float64)
    torch.testing.assert_close(param.detach(), expected, rtol=1e-14, atol=0)


@each_dale
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@each_eager
def test_what_is_not_finite_is_not_written(cls, wrong, backend):
    quiet = dict(s=0.0) if cls is DaleLangevin else dict(momentum=0.9) if cls is DaleSGD else {}
    param = leaf(1.0, -1.0, 2.0).detach().requires_grad_(not backend.get("differentiable"))
    optimizer = cls([param], lr=0.1, weight_decay=0, **quiet, **backend)
    good = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    bad = torch.tensor([1.0, wrong, 1.0], dtype=torch.float64)
    with torch.no_grad():
        advance(optimizer, [[good]])
        before = param.detach().clone()
        state = {k: v.detach().clone() for k, v in optimizer.state[param].items()}
        advance(optimizer, [[bad]])
        assert param[1] == before[1]
        assert param[0] != before[0]
        assert all(value.dim() == 0 or value[1] == state[name][1] for name, value in optimizer.state[param].items())
        advance(optimizer, [[good]])
    assert param[1] != before[1]


@each_eager
def test_zeros_stay_zeros(backend):
    param = leaf(0.0, -0.0, 1.0).detach().requires_grad_(not backend.get("differentiable"))
    with pytest.warns(UserWarning, match="holds 2 zeros"):
        optimizer = DaleSGD([param], momentum=0.9, min_abs=0.1, zeros="warn", **backend)
    with torch.no_grad():
        advance(optimizer, [[torch.tensor([1.0, -3.0, 1.0], dtype=torch.float64)]] * 5)
    assert param[:2].tolist() == [0.0, 0.0]


def test_a_plain_group_is_torch():
    for ours, theirs, options in (
        (DaleSGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)),
        (DaleAdamW, torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1)),
    ):
        params = parameters()
        twins = copies(params)
        rows = gradients(params, 5)
        advance(ours([dict(params=params, dale=False)], **options), rows)
        advance(theirs(twins, **options), rows)
        torch.testing.assert_close(params, twins, rtol=1e-13, atol=1e-13)


def test_mirror_descent_with_entropy_is_the_same_step():
    # grad phi(w') = grad phi(w) - lr g, with grad phi = sign(w) log|w|
    param, grad = normal(1, 20), normal(2, 20)
    dual = param.sign() * param.abs().log() - 0.3 * grad
    expected = param.sign() * (param.sign() * dual).exp()
    weight = param.clone().requires_grad_()
    advance(DaleSGD([weight], lr=0.3), [[grad]])
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-14, atol=0)


# Langevin


@pytest.mark.parametrize("noise", ["gbm", "mirrored", "hessian"])
@pytest.mark.parametrize("options", [{}, dict(temperature=0.3, s=0.5, ito=False), dict(dale=False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_eager
def test_langevin_follows_the_reference_with_its_noise(noise, options, dtype, backend):
    options = dict(lr=0.01, exponent_clip=3.0, min_abs=0.05, **options)
    params = parameters(dtype, requires_grad=not backend.get("differentiable"))
    optimizer = DaleLangevin(params, noise=noise, seed=5, **options, **backend)
    states = [dict(param=p.detach().double().numpy().copy()) for p in params]
    with torch.no_grad():
        for t, row in enumerate(gradients(params, 20)):
            for place, (param, state, grad) in enumerate(zip(params, states, row, strict=True)):
                param.grad = grad
                z = dale.standard_normal(param, 5, place, t).double().numpy()
                dalelangevin.step(state, grad.double().numpy(), z, noise_kind=noise, **options)
            optimizer.step()
    for param, state in zip(params, states, strict=True):
        close = 1e-12 if dtype is torch.float64 else tolerance(dtype, 20)
        np.testing.assert_allclose(param.detach().double().numpy(), state["param"], rtol=close, atol=close)


def test_langevin_noise_depends_on_seed_parameter_and_step_alone():
    def run(seed: int, steps: int, backend: dict) -> DaleLangevin:
        params = parameters()
        return advance(DaleLangevin(params, lr=0.01, seed=seed, **backend), gradients(params, steps))

    first = run(1, 3, BACKENDS["single"])
    for name in ("foreach", "fused"):
        other = run(1, 3, BACKENDS[name])
        for one, two in zip(first.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-13, atol=0)
    assert same(run(1, 3, {}), run(1, 3, {}))
    assert not same(run(1, 3, {}), run(2, 3, {}))
    like = torch.ones(4)
    numbers = [dale.standard_normal(like, s, p, t) for s in (0, 1) for p in (0, 1) for t in (0, 1)]
    assert len({tuple(n.tolist()) for n in numbers}) == 8


def test_langevin_resumes_bitwise():
    params = parameters()
    rows = gradients(params, 6)
    whole = advance(DaleLangevin(copies(params), lr=0.01, noise="mirrored"), rows)
    half = advance(DaleLangevin(params, lr=0.01, noise="mirrored"), rows[:3])
    resumed = DaleLangevin(copies(params), lr=0.01, noise="mirrored")
    resumed.load_state_dict(saved(half))
    assert "noise" not in half.state[params[0]]
    assert same(advance(resumed, rows[3:]), whole)


def test_langevin_noise_is_standard_normal():
    numbers = torch.cat(
        [dale.standard_normal(torch.ones(1000), 3, place, step) for place in range(20) for step in range(20)]
    )
    n = len(numbers)
    assert abs(numbers.mean()) < 4 / math.sqrt(n)
    assert abs(numbers.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((numbers**4).mean() - 3) < 4 * math.sqrt(96 / n)


def gamma_sample(noise: str, steps: int, lr: float, jacobian: bool = True, **options) -> torch.Tensor:
    """Weights, of both signs, after many steps in U = |w| - 3 log|w|, whose law at T = 1 is Gamma(4, 1)."""
    chains = 40_000
    size = torch.distributions.Gamma(4.0, 1.0).sample((chains,)).double()
    param = (size * (torch.arange(chains) % 2 * 2 - 1)).requires_grad_()
    optimizer = DaleLangevin([param], lr=lr, noise=noise, **options)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of short steps: on a busy machine threads wait for each other
    for _ in range(steps):
        with torch.no_grad():
            param.grad = param.sign() * (1 - 3 / param.abs())
            if not jacobian:  # a drift of h T/w in w is what the term does
                param.grad += 1 / param
        optimizer.step()
    torch.set_num_threads(threads)
    return param.detach().abs()


# Started in the Gamma law, so that a chain which does not keep it drifts away; 2,000 steps of 2e-3 are four units of
# time. The standard error of the mean is 0.01 and of the variance 0.035 at 40,000 chains; the step adds its own bias.
@pytest.mark.parametrize("noise", ["mirrored", "hessian"])
def test_mirrored_and_hessian_noise_keep_the_law_of_the_energy(noise):
    torch.manual_seed(0)
    weights = gamma_sample(noise, steps=1500, lr=2e-3)
    assert abs(weights.mean() - 4) < 0.03 * 4
    assert abs(weights.var() - 4) < 0.03 * 4


def test_without_its_jacobian_term_mirrored_noise_samples_another_law():
    torch.manual_seed(0)
    weights = gamma_sample("mirrored", steps=3000, lr=2e-3, jacobian=False)
    assert abs(weights.mean() - 3) < 0.03 * 3  # Gamma(3, 1)
    assert abs(weights.var() - 3) < 0.05 * 3


@pytest.mark.parametrize("ito", [True, False])
def test_gbm_noise_has_a_mean_or_a_median_factor_of_one(ito):
    param = torch.ones(200_000, dtype=torch.float64, requires_grad=True)
    advance(DaleLangevin([param], lr=0.25, s=2.0, ito=ito), [[torch.zeros_like(param)]])
    logs = param.detach().log()
    assert abs(logs.mean() - (-0.5 if ito else 0.0)) < 4 / math.sqrt(len(logs))
    assert abs(logs.var() - 1) < 0.02
    expected = 1.0 if ito else math.exp(0.5)
    assert abs(param.detach().mean() - expected) < 4 * expected * math.sqrt((math.e - 1) / len(logs))


def test_gbm_noise_does_not_sample_the_energy():
    torch.manual_seed(0)
    weights = gamma_sample("gbm", steps=1500, lr=2e-3, s=math.sqrt(2.0))
    # Its law is w^-2 exp(-int g/w): with g = 1 - 3/w the inverse of a Gamma... heavy-tailed, and far from variance 4.
    assert weights.var() > 6


# Groups and initializers


def test_dale_groups_part_matrices_from_vectors():
    model = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 2), torch.nn.BatchNorm1d(3), torch.nn.Linear(4, 5, bias=False))
    model[2].weight.requires_grad_(False)
    matrices, vectors = dale_groups(model, lr=0.01)
    assert [p is q for p, q in zip(matrices["params"], [model[0].weight], strict=True)] == [True]
    assert len(vectors["params"]) == 3
    assert (vectors["dale"], vectors["lr"]) == (False, 0.01)
    optimizer = DaleSGD([matrices, vectors], lr=0.1)
    signs = model[0].weight.detach().sign()
    for seed in range(20):
        optimizer.zero_grad()
        model[:2](normal(seed, 8, 2, 5, dtype=torch.float32)).square().mul(normal(seed, 8, 3, 4)).sum().backward()
        optimizer.step()
    assert torch.equal(model[0].weight.sign(), signs)
    assert (model[1].bias != 0).any()
    with pytest.raises(ValueError, match="no weight of two or more"):
        dale_groups(torch.nn.BatchNorm1d(3))
    assert len(dale_groups(torch.nn.Linear(2, 2, bias=False))) == 1
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm((2, 3)))
    assert [len(group["params"]) for group in dale_groups(model)] == [1, 3]
    DaleSGD(dale_groups(model))


def test_lognormal_has_its_moments():
    generator = torch.Generator().manual_seed(0)
    tensor = lognormal_(torch.empty(1000, 500, dtype=torch.float64), gain=2.0, generator=generator)
    n = tensor.numel()
    logs = tensor.abs().log()
    assert abs(logs.std() - 0.6064) < 4 * 0.6064 / math.sqrt(2 * n) + 5e-5
    assert abs(tensor.square().mean() - 4 / 500) < 0.01 * 4 / 500
    assert abs(tensor.sign().mean()) < 4 / math.sqrt(n)
    assert abs(tensor.abs().mean() / tensor.abs().std() - 1.5) < 0.01
    wide = lognormal_(torch.empty(300, 200, 3), mode="fan_out", generator=generator)
    assert abs(wide.square().mean() - 2 / 900) < 0.05 * 2 / 900


def test_dale_columns_have_one_sign_and_rows_of_mean_zero():
    generator = torch.Generator().manual_seed(0)
    tensor = dale_columns_(torch.empty(20_000, 110, dtype=torch.float64), ratio=10, generator=generator)
    assert (tensor[:, :100] > 0).all()
    assert (tensor[:, 100:] < 0).all()
    sums = tensor.sum(1)
    assert abs(sums.mean()) < 4 * sums.std() / math.sqrt(len(sums))
    optimizer = DaleSGD([tensor.requires_grad_()], dale="columns")
    tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    weights = dale_columns_(torch.empty(2000, 110, dtype=torch.float64), generator=generator)
    assert abs((weights @ normal(1, 110, 2000).relu()).var() - 1) < 0.03


# Wrong input


@each_dale
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(exponent_clip=0.0), "exponent_clip must be > 0, or None, got 0.0"),
        (dict(exponent_clip=-1.0), "exponent_clip must be > 0, or None, got -1.0"),
        (dict(min_abs=0.0), "min_abs must be > 0, or None, got 0.0"),
        (dict(max_abs=-1.0), "max_abs must be > 0, or None, got -1.0"),
        (dict(min_abs=2.0, max_abs=1.0), "min_abs must be <= max_abs, got 2.0 and 1.0"),
        (dict(zeros="ignore"), "zeros must be one of"),
        (dict(zeros="floor"), "zeros='floor' needs min_abs"),
        (dict(check_signs="maybe"), "check_signs must be True, False or 'restore'"),
        (dict(dale="rows"), "dale must be True, False or 'columns'"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls([leaf(1.0)], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-1.0), "temperature must be finite and >= 0, got -1.0"),
        (dict(s=-1.0), "s must be finite and >= 0, got -1.0"),
        (dict(noise="white"), "noise must be one of"),
        (dict(capturable=True), "capturable must be False"),
        (dict(noise="hessian", temperature=math.nan), "temperature must be"),
    ],
    ids=str,
)
def test_wrong_settings_of_langevin_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DaleLangevin([leaf(1.0)], **options)


@each_dale
def test_a_decay_that_would_change_signs_is_an_error_when_it_comes_to_that(cls):
    param = leaf(1.0, -2.0)
    optimizer = cls([param], lr=0.5, weight_decay=1.0, decoupled_weight_decay=True)
    advance(optimizer, [[torch.ones(2, dtype=torch.float64)]])
    for lr in (1.0, torch.tensor(3.0)):
        optimizer.param_groups[0]["lr"] = lr
        before = bits(param), bits(dict(optimizer.state[param]))
        with pytest.raises(ValueError, match=r"lr \* weight_decay must be < 1"):
            optimizer.step()
        assert (bits(param), bits(dict(optimizer.state[param]))) == before


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match="nesterov=True needs momentum"):
        DaleSGD([leaf(1.0)], nesterov=True)
    with pytest.raises(ValueError, match="nesterov=True needs momentum"):
        DaleSGD([leaf(1.0)], momentum=0.9, dampening=0.1, nesterov=True)
    with pytest.raises(ValueError, match=r"dampening must be in \[0, 1\), got 1.0"):
        DaleSGD([leaf(1.0)], dampening=1.0)


@each_dale
def test_zeros_are_an_error_that_says_where(cls):
    good, bad = leaf(1.0), leaf(1.0, 0.0, -0.0)
    with pytest.raises(ValueError, match=r"params\[1\] of group 0, of shape \(3,\), holds 2 zeros"):
        cls([good, bad])
    optimizer = cls([good])
    with pytest.raises(ValueError, match=r"params\[0\] of group 1"):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [bad], "dale": False})


def test_zeros_are_given_a_floor():
    torch.manual_seed(0)
    param = torch.zeros(1000, dtype=torch.float64)
    param[0] = 5.0
    DaleSGD([param.requires_grad_()], zeros="floor", min_abs=1e-3)
    assert param[0] == 5
    assert (param[1:].abs() == 1e-3).all()
    assert abs(param[1:].sign().mean()) < 4 / math.sqrt(1000)


def test_columns_of_mixed_signs_are_an_error():
    mixed = torch.tensor([[1.0, -1.0, 2.0], [1.0, -2.0, -2.0]], requires_grad=True)
    with pytest.raises(ValueError, match=r"1 of params\[0\] mix signs, the first is \[:, 2\]"):
        DaleSGD([mixed], dale="columns")
    with pytest.raises(ValueError, match="dale='columns' is for matrices"):
        DaleSGD([leaf(1.0)], dale="columns")


@each_dale
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64], ids=str)
def test_complex_and_integer_parameters_are_errors(cls, dtype):
    with pytest.raises(ValueError, match=r"complex|floating"):
        cls([torch.ones(3, dtype=dtype)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lognormal_(torch.empty(3)), "two or more dimensions"),
        (lambda: lognormal_(torch.empty(3, 3), mode="fan"), "mode must be"),
        (lambda: lognormal_(torch.empty(3, 3), gain=0.0), "gain must be"),
        (lambda: lognormal_(torch.empty(3, 3), mean_std_ratio=0.0), "mean_std_ratio must be"),
        (lambda: lognormal_(torch.empty(3, 3, dtype=torch.int64)), "must be real"),
        (lambda: dale_columns_(torch.empty(3, 3, 3)), "two dimensions"),
        (lambda: dale_columns_(torch.empty(3, 1)), "leave none that excite"),
        (lambda: dale_columns_(torch.empty(3, 3), ratio=-1.0), "ratio must be"),
    ],
)
def test_initializers_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Convergence, within the signs that a run starts with

RATES = {
    DaleSGD: dict(lr=0.02, momentum=0.9),
    DaleAdamW: dict(lr=0.05, weight_decay=0.0),
    DaleLangevin: dict(lr=0.05, noise="hessian", temperature=0.0),
}


@each_dale
@settings(max_examples=6)
@given(data=st.data())
def test_a_quadratic_is_solved_within_the_signs_of_the_start(cls, data):
    sizes = st.lists(st.floats(0.1, 2.0), min_size=3, max_size=3)
    signs = torch.tensor(data.draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=3, max_size=3)), dtype=torch.float64)
    start, minimum = (signs * torch.tensor(data.draw(sizes), dtype=torch.float64) for _ in range(2))
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    basis = torch.from_numpy(np.linalg.qr(generator.standard_normal((3, 3)))[0])
    curvature = torch.logspace(0, data.draw(st.floats(0, 1)), 3, dtype=torch.float64)
    x = start.requires_grad_()
    optimizer = cls([x], exponent_clip=1.0, **RATES[cls])
    steps = 800
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / steps)))
    for _ in range(steps):
        optimizer.zero_grad()
        (curvature * (basis @ (x - minimum)) ** 2).sum().div(2).backward()
        optimizer.step()
        schedule.step()
    assert (x - minimum).abs().max() < 0.02


@each_dale
def test_a_minimum_of_the_other_sign_is_approached_and_not_reached(cls):
    x = leaf(1.0, -1.0)
    optimizer = cls([x], exponent_clip=1.0, **RATES[cls])
    for _ in range(600):
        optimizer.zero_grad()
        ((x + torch.tensor([2.0, -2.0])) ** 2).sum().backward()
        optimizer.step()
    assert 0 < x[0] < 0.05
    assert -0.05 < x[1] < 0


# Edges


@each_dale
def test_weights_that_become_zero_before_the_first_step_are_an_error(cls):
    param = leaf(1.0, 2.0)
    optimizer = cls([param])
    with torch.no_grad():
        param[1] = 0.0
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"params\[0\] of group 0, of shape \(2,\), holds 1 zeros"):
        optimizer.step()
    assert not optimizer.state


def test_a_weight_pruned_after_it_is_not_restored_to_nothing():
    param = leaf(1.0, 2.0)
    optimizer = advance(DaleSGD([param], check_signs="restore"), [[torch.ones(2, dtype=torch.float64)]])
    with torch.no_grad():
        param[1] = 0.0
    with pytest.raises(RuntimeError, match="1 weights are zero"):
        optimizer.step()


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        (torch.float16, dict(min_abs=1e-9), "min_abs must be from 5.9"),
        (torch.float32, dict(min_abs=1e-50), "min_abs must be from 1.17"),
        (torch.float32, dict(max_abs=1e300), "max_abs must be from"),
        (torch.float16, dict(max_abs=1e30), "max_abs must be from"),
        (torch.float32, dict(lr=1.0, weight_decay=1.0, decoupled_weight_decay=True), r"lr \* weight_decay must be < 1"),
    ],
    ids=str,
)
def test_bounds_must_be_numbers_that_the_weights_can_be(dtype, options, message):
    with pytest.raises(ValueError, match=message):
        DaleSGD([leaf(1.0, dtype=dtype)], **options)
    with pytest.raises(ValueError, match="float16 parameters have bounds of their own"):
        DaleSGD([leaf(1.0, dtype=torch.float16), leaf(1.0, dtype=torch.float32)])


def test_floored_zeros_take_the_sign_of_their_column_and_wait_for_all_groups():
    matrix = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    with pytest.raises(ValueError, match="holds 1 zeros"):
        DaleSGD([dict(params=[matrix], zeros="floor", min_abs=0.1, dale="columns"), dict(params=[leaf(0.0)])])
    assert matrix[1].tolist() == [0.0, 0.0, 0.0]
    DaleSGD([matrix], zeros="floor", min_abs=0.1, dale="columns")
    torch.testing.assert_close(matrix.detach(), torch.tensor([[1.0, -1.0, 0.1], [0.1, -0.1, 0.1]]))


def test_langevin_keeps_state_in_bfloat16_options_and_is_left_alone_by_the_compiler():
    params = parameters(torch.float32)
    grads = gradients(params, 2)
    optimizer = DaleLangevin(params, state_dtype=torch.bfloat16)
    eager = advance(DaleLangevin(copies(params)), grads)
    compiled = torch.compile(optimizer.step)
    for row in grads:
        for param, grad in zip(params, row, strict=True):
            param.grad = grad
        compiled()
    assert [bits(p) for p in params] == [bits(p) for p in eager.param_groups[0]["params"]]


def test_the_other_settings_of_a_checkpoint_do_not_switch_a_check_off():
    param, other = leaf(1.0, -2.0), leaf(1.0, -2.0)
    optimizer = advance(DaleSGD([param]), [[torch.ones(2, dtype=torch.float64)]])
    state_dict = saved(optimizer)
    state_dict["param_groups"][0]["check_signs"] = False
    resumed = DaleSGD([other])
    resumed.load_state_dict(state_dict)
    assert resumed.param_groups[0]["check_signs"] is True

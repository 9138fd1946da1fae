"""The multiplicative diffusion: its laws in closed form, the loss at known scores, and what it refuses."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import diffusion as reference
from steps import normal
from torch import Tensor

from optimzoo import GeometricBrownian

PROCESSES = [GeometricBrownian(), GeometricBrownian(mu=-0.7, sigma=1.3), GeometricBrownian(mu=0.5, sigma=0.4)]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=str)
each_sampler = pytest.mark.parametrize("dale", [True, False], ids=["dale", "unconstrained"])

# Data whose logarithm is normal: every law of the process is in closed form.
MEAN, VARIANCE = 0.2, 0.09
# How far a mean of independent draws is let stray, in standard errors. Seeds are fixed; that any one of the some 60
# comparisons of this file fails for a seed drawn blindly has a chance of 4e-5.
ERRORS = 5


def positive(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(seed, *shape, dtype=dtype).exp()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def marginal(process: GeometricBrownian, t: Tensor | float) -> tuple[Tensor | float, Tensor | float]:
    """Mean and variance of log X_t for the data above."""
    return MEAN + (process.mu - process.sigma**2 / 2) * t, VARIANCE + process.sigma**2 * t


def exact_score(process: GeometricBrownian):
    """The gradient of the log density of X_t, which is log-normal."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        mean, variance = marginal(process, t.reshape(t.shape + (1,) * (x.dim() - t.dim())))
        return (-1 - (x.abs().log() - mean) / variance) / x

    return score


def log_normal(mean: float, variance: float, count: int, seed: int) -> Tensor:
    return (mean + math.sqrt(variance) * torch.randn(count, generator=seeded(seed), dtype=torch.float64)).exp()


def assert_mean(draws: Tensor, mean: float, slack: float = 0.0) -> None:
    error = ERRORS * draws.std().item() / math.sqrt(draws.numel())
    assert abs(draws.mean().item() - mean) <= error + slack, (draws.mean().item(), mean, error, slack)


# The process


@each_process
@pytest.mark.parametrize("t", [0.001, 0.3, 1.0])
def test_noise_has_the_moments_of_geometric_brownian_motion(process, t):
    count, x0 = 200_000, 1.7
    x = process.noise(torch.full((count,), x0).double(), torch.tensor(t).double(), generator=seeded(1))
    time = torch.tensor(t).double().item()
    assert_mean(x, x0 * math.exp(process.mu * time))
    growth, variance = math.exp(process.mu * time), math.expm1(process.sigma**2 * time)
    assert_mean((x - x0 * growth).square(), x0**2 * growth**2 * variance)
    logs = (x / x0).log() - (process.mu - process.sigma**2 / 2) * time
    assert_mean(logs, 0.0)
    assert_mean(logs.square(), process.sigma**2 * time)
    assert_mean(logs.pow(3), 0.0)


@each_process
def test_noise_follows_the_formula_for_every_item_of_a_batch(process):
    x0, t = positive(0, 4, 2, 3), torch.tensor([0.001, 0.25, 0.5, 1.0], dtype=torch.float64)
    z = torch.randn(x0.shape, generator=seeded(3), dtype=torch.float64)
    x = process.noise(x0, t, generator=seeded(3))
    for index in itertools.product(range(4), range(2), range(3)):
        expected = reference.noise(
            x0[index].item(), t[index[0]].item(), z[index].item(), mu=process.mu, sigma=process.sigma
        )
        assert x[index].item() == pytest.approx(expected, rel=1e-14)


def test_the_default_drift_is_the_one_that_leaves_the_logarithm_where_it_is():
    process = GeometricBrownian()
    assert process.mu == pytest.approx(process.sigma**2 / 2, rel=1e-15)


# The score and the loss


@each_process
def test_the_conditional_score_is_the_gradient_of_the_log_density(process):
    x, x0 = positive(1, 5, 7).requires_grad_(), positive(2, 5, 7)
    t = torch.tensor([0.001, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    time = t[:, None]
    density = torch.distributions.LogNormal(
        x0.log() + (process.mu - process.sigma**2 / 2) * time, process.sigma * time.sqrt()
    )
    (expected,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    got = process.conditional_score(x.detach(), x0, t)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    item = reference.conditional_score(x[3, 2].item(), x0[3, 2].item(), 0.9, mu=process.mu, sigma=process.sigma)
    assert got[3, 2].item() == pytest.approx(item, rel=1e-12)


@each_process
@given(seed=st.integers(0, 2**31), k=st.integers(1, 1000))
def test_the_loss_is_zero_at_the_conditional_score(process, seed, k):
    x0, t = positive(seed, 3, 5), torch.full((3,), k / 1000, dtype=torch.float64)
    x = process.noise(x0, t, generator=seeded(seed))
    loss = process.loss(lambda x, t: process.conditional_score(x, x0, t), x, x0, t)
    assert math.sqrt(loss.item()) <= 1e-12
    # And nowhere else: scores that are wrong by e are charged (sigma^2 t x e)^2.
    off = process.loss(lambda x, t: process.conditional_score(x, x0, t) + 0.5, x, x0, t)
    charged = (process.sigma**2 * t[:, None] * x * 0.5).square().sum(1).mean()
    torch.testing.assert_close(off, charged, rtol=1e-9, atol=0)


@each_process
def test_the_loss_is_the_literal_one(process):
    x0, t = positive(4, 6, 5), torch.linspace(0.01, 1, 6, dtype=torch.float64)
    x, scores = positive(5, 6, 5), normal(6, 6, 5)
    got = process.loss(lambda x, t: scores, x, x0, t)
    expected = reference.loss(scores.tolist(), x.tolist(), x0.tolist(), t.tolist(), mu=process.mu, sigma=process.sigma)
    assert got.shape == ()
    assert got.item() == pytest.approx(expected, rel=1e-12)
    # Pictures are summed over all that follows the batch, and times may have more than one dimension.
    shaped = process.loss(
        lambda x, t: scores.reshape(2, 3, 5, 1), x.reshape(2, 3, 5, 1), x0.reshape(2, 3, 5, 1), t.reshape(2, 3)
    )
    assert shaped.item() == pytest.approx(expected, rel=1e-12)


def test_the_gradient_of_the_loss_is_its_derivative():
    process = PROCESSES[1]
    x0, t = positive(7, 3, 4), torch.tensor([0.1, 0.6, 0.9], dtype=torch.float64)
    x = process.noise(x0, t, generator=seeded())
    weight, bias = normal(8, 4, 4).requires_grad_(), normal(9, 4).requires_grad_()

    def loss(weight: Tensor, bias: Tensor, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        return process.loss(lambda x, t: torch.tanh(x @ weight + bias * t[:, None]), x, x0, t)

    inputs = (weight, bias, x.requires_grad_(), x0.requires_grad_(), t.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@each_process
def test_the_score_of_the_marginal_has_the_least_loss(process):
    # At one time: the loss of s = (-1 - (log x - m_t) / V) / x is least at V = V_t, where it is sigma^2 t v / V_t.
    count = 100_000
    x0 = log_normal(MEAN, VARIANCE, count, 1)[:, None]
    t = torch.full((count,), 0.4, dtype=torch.float64)
    x = process.noise(x0, t, generator=seeded(2))
    variance = process.sigma**2 * 0.4
    mean, total = marginal(process, 0.4)
    precision = torch.tensor(1 / total, dtype=torch.float64, requires_grad=True)

    def score(x: Tensor, t: Tensor) -> Tensor:
        return (-1 - (x.log() - mean) * precision) / x

    loss = process.loss(score, x, x0, t)
    least = variance * VARIANCE / total  # the variance of a normal error, whose square has deviation sqrt(2) of it
    assert abs(loss.item() - least) <= ERRORS * math.sqrt(2 / count) * least
    (slope,) = torch.autograd.grad(loss, precision)
    # The slope is the mean of -2 variance (log x - m) error, a product of uncorrelated normals.
    assert abs(slope.item()) <= ERRORS * 2 * variance * math.sqrt(total * least / count)


# The samplers


@each_process
@each_sampler
@pytest.mark.parametrize(("steps", "repeats", "damping"), [(1, 1, 1.0), (4, 3, 0.9), (6, 1, 0.0)])
def test_a_sampler_takes_the_literal_steps(process, dale, steps, repeats, damping):
    x, delta = positive(10, 3, 2), 0.03
    generator = seeded(5)
    zs = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for _ in range(steps * repeats)]
    got = process.sample(
        lambda x, t: -t[:, None] * x - 0.3,
        x,
        steps=steps,
        delta=delta,
        repeats=repeats,
        damping=damping,
        dale=dale,
        generator=seeded(5),
    )
    for index in itertools.product(range(3), range(2)):
        expected = reference.sample(
            lambda x, t: -t * x - 0.3,
            x[index].item(),
            [z[index].item() for z in zs],
            mu=process.mu,
            sigma=process.sigma,
            steps=steps,
            delta=delta,
            repeats=repeats,
            damping=damping,
            dale=dale,
        )
        assert got[index].item() == pytest.approx(expected, rel=1e-12)


def chain_variance(process: GeometricBrownian, steps: int) -> float:
    """The variance of log x after the Dale-Langevin sampler with the exact score, each step of which is linear."""
    delta, variance = 1 / steps, marginal(process, 1.0)[1]
    for k in range(steps, 0, -1):
        shrink = 1 - delta * process.sigma**2 / marginal(process, k / steps)[1]
        variance = shrink**2 * variance + process.sigma**2 * delta
    return variance


@each_process
def test_the_chain_ends_at_the_data_to_first_order_in_the_step(process):
    # Each step adds delta^2 sigma^4 / V_t to the variance and later ones shrink it by (V_0 / V_t)^2: the sum over the
    # steps is delta sigma^2 / 2 (1 - (V_0 / V_1)^2) to first order.
    total = marginal(process, 1.0)[1]
    for steps in (100, 1000, 10_000):
        bias = process.sigma**2 / 2 * (1 - (VARIANCE / total) ** 2) / steps
        expected = VARIANCE + bias
        # What is left is of second order, in units of the least variance of a path.
        second = (process.sigma**2 / steps) ** 2 / VARIANCE
        assert abs(chain_variance(process, steps) - expected) <= 4 * second


@each_process
@pytest.mark.parametrize("steps", [10, 100])
def test_dale_langevin_with_the_exact_score_returns_the_data(process, steps):
    # The mean is exact for any number of steps, since the exact drift is linear in log x.
    count = 100_000
    mean, variance = marginal(process, 1.0)
    x = log_normal(mean, variance, count, 6)
    logs = process.sample(exact_score(process), x, steps=steps, generator=seeded(7)).log()
    assert_mean(logs, MEAN)
    assert_mean((logs - MEAN).square(), chain_variance(process, steps))
    assert_mean((logs - MEAN).pow(3), 0.0)


@each_process
def test_the_unconstrained_sampler_returns_the_data_to_first_order(process):
    # The exponentiated step is exact in the mean and off by delta sigma^2 / 2 in the variance. This one neglects terms
    # of up to sigma^2 delta more in either.
    mean, variance = marginal(process, 1.0)
    x = log_normal(mean, variance, 50_000, 8)
    logs = process.sample(exact_score(process), x, steps=100, dale=False, generator=seeded(9)).log()
    assert_mean(logs, MEAN, process.sigma**2 / 100)
    assert_mean((logs - MEAN).square(), VARIANCE, 1.5 * process.sigma**2 / 100)


@each_process
def test_the_two_samplers_meet_as_steps_grow_short(process):
    # With the same noise their log x differ by sigma^2 delta (1 - Z^2) / 2 a step to leading order: sigma^2
    # sqrt(delta / 2) in all, were it not that the drift draws paths together. A quarter of the step halves it.
    mean, variance = marginal(process, 1.0)
    x = log_normal(mean, variance, 2000, 8)
    gaps = []
    for steps in (400, 1600):
        dale, free = (
            process.sample(exact_score(process), x, steps=steps, dale=dale, generator=seeded(9)).log()
            for dale in (True, False)
        )
        gaps.append((dale - free).square().mean().sqrt().item())
        assert gaps[-1] <= process.sigma**2 * math.sqrt(1 / (2 * steps))
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.1)


@each_process
def test_repeats_divide_a_step(process):
    # As many steps as of 200 times, with the time held for five of them: the same law to first order in 1 / 40.
    mean, variance = marginal(process, 1.0)
    x = log_normal(mean, variance, 20_000, 10)
    logs = process.sample(exact_score(process), x, steps=40, repeats=5, generator=seeded(11)).log()
    assert_mean(logs, MEAN, abs(process.mu - process.sigma**2 / 2) / 40)
    assert_mean((logs - MEAN).square(), VARIANCE, process.sigma**2 / 40)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_long_step_crosses_zero_only_in_the_unconstrained_sampler(dtype):
    process = GeometricBrownian(mu=2.0, sigma=2.0)
    x = log_normal(*marginal(process, 1.0), 10_000, 12).to(dtype)
    for steps in (1, 2, 5):
        dale, free = (
            process.sample(exact_score(process), x, steps=steps, dale=dale, generator=seeded(13))
            for dale in (True, False)
        )
        assert (dale > 0).all()
        assert dale.isfinite().all()
        assert (free < 0).double().mean() > 0.01
    # One unconstrained step multiplies by 1 + 2 sigma^2 - mu - sigma^2 (1 + (log x - m) / V) + sigma Z: normal, of mean
    # 1 + sigma^2 - mu and variance sigma^4 / V + sigma^2.
    free = process.sample(exact_score(process), x.double(), steps=1, dale=False, generator=seeded(14))
    deviation = math.sqrt(process.sigma**4 / marginal(process, 1.0)[1] + process.sigma**2)
    chance = 0.5 * math.erfc((1 + process.sigma**2 - process.mu) / deviation / math.sqrt(2))
    assert_mean((free < 0).double(), chance)


def test_without_noise_and_at_half_the_step_paths_follow_the_probability_flow():
    # The flow of log x with mu = sigma^2 / 2 takes (log x - m) / sqrt(V_1) to (log x - m) / sqrt(V_0).
    process, steps = GeometricBrownian(), 2000
    x = positive(15, 50)
    far = process.sample(exact_score(process), x, steps=steps, delta=0.5 / steps, damping=0.0, generator=seeded(16))
    # Damping starts with the second step: the first one has its noise.
    z = torch.randn(x.shape, generator=seeded(16), dtype=torch.float64)
    start = x.log() + math.sqrt(0.5 / steps) * process.sigma * z
    mean, total = marginal(process, 1.0)
    expected = MEAN + (start - mean) * math.sqrt(VARIANCE / total)
    # Euler's method: an error of order delta sigma^2 / V relative to what is transported.
    torch.testing.assert_close(far.log(), expected, rtol=0, atol=3 * process.sigma**2 / VARIANCE / steps)


# Randomness, dtypes, transforms


@each_sampler
def test_results_depend_on_the_generator_alone(dale):
    process, x0, t = GeometricBrownian(), positive(16, 8, 3), torch.full((8,), 0.5, dtype=torch.float64)
    before = torch.random.get_rng_state()
    draws = [process.noise(x0, t, generator=seeded(s)) for s in (1, 1, 2)]
    runs = [process.sample(exact_score(process), x0, steps=9, dale=dale, generator=seeded(s)) for s in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    for first, again, other in (draws, runs):
        assert torch.equal(first, again)
        assert not (first == other).any()
    torch.manual_seed(1)
    assert torch.equal(process.noise(x0, t), draws[0])


@each_sampler
def test_a_sampler_leaves_its_start_alone_and_records_nothing(dale):
    x = positive(17, 4).requires_grad_()
    kept = x.detach().clone()
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    result = GeometricBrownian().sample(lambda x, t: -weight / x, x, steps=3, dale=dale)
    assert torch.equal(x, kept)
    assert not result.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_results_have_the_dtype_of_the_data(dtype):
    process, x0 = GeometricBrownian(), positive(18, 4, 3, dtype=dtype)
    t = torch.full((4,), 0.5, dtype=dtype)
    x = process.noise(x0, t)
    results = [x, process.conditional_score(x, x0, t), process.loss(lambda x, t: -1 / x, x, x0, t)]
    results += [process.sample(lambda x, t: -1 / x, x, steps=2, dale=dale) for dale in (True, False)]
    assert {result.dtype for result in results} == {dtype}
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float64], ids=str)
def test_a_network_may_answer_in_another_precision(other):
    process, x0, t = GeometricBrownian(), positive(19, 4, 3, dtype=torch.float32), torch.full((4,), 0.5)
    assert process.loss(lambda x, t: (-1 / x).to(other), x0, x0, t).dtype == torch.float32
    for dale in (True, False):
        assert process.sample(lambda x, t: (-1 / x).to(other), x0, steps=2, dale=dale).dtype == torch.float32


def test_per_item_losses_and_gradients_by_vmap():
    process, x0, t = GeometricBrownian(), positive(20, 5, 4), torch.linspace(0.2, 1, 5, dtype=torch.float64)
    x = process.noise(x0, t, generator=seeded())
    weight = normal(21, 4)

    def loss(weight: Tensor, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        return process.loss(lambda x, t: x * weight, x, x0, t)

    both = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(None, 0, 0, 0))
    gradients, losses = both(weight, x, x0, t)
    gradient, value = torch.func.grad_and_value(loss)(weight, x, x0, t)
    torch.testing.assert_close(losses.mean(), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients.mean(0), gradient, rtol=1e-12, atol=1e-12)


def test_noise_loss_and_sampler_are_graphs_without_a_break():
    torch._dynamo.reset()
    process, x0, t = GeometricBrownian(), positive(22, 5, 4), torch.linspace(0.2, 1, 5, dtype=torch.float64)
    weight = normal(23, 4)

    def everything(weight: Tensor, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        def score(x: Tensor, t: Tensor) -> Tensor:
            return x * weight

        x = process.noise(x0, t)
        return process.loss(score, x, x0, t), process.sample(score, x, steps=3)

    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    got = compiled(weight, x0, t)
    torch.manual_seed(3)
    torch.testing.assert_close(got, everything(weight, x0, t), rtol=1e-12, atol=0)
    torch._dynamo.reset()


def test_shapes_can_be_followed_without_values():
    process, x0, t = GeometricBrownian(), torch.empty(5, 4, device="meta"), torch.empty(5, device="meta")
    assert process.noise(x0, t).shape == (5, 4)
    assert process.loss(lambda x, t: x, x0, x0, t).shape == ()


# What is refused


GOOD, T = torch.ones(3, 2), torch.full((3,), 0.5)


def bad(value: float) -> Tensor:
    data = GOOD.clone()
    data[1, 1] = value
    return data


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "sigma must be finite and > 0, got 0.0", dict(sigma=0.0)),
        (ValueError, "sigma must be finite and > 0, got -1", dict(sigma=-1)),
        (ValueError, "sigma must be finite and > 0, got nan", dict(sigma=math.nan)),
        (ValueError, "sigma must be finite and > 0, got inf", dict(sigma=math.inf)),
        (TypeError, "sigma must be a number finite and > 0, got True", dict(sigma=True)),
        (TypeError, "sigma must be a number finite and > 0, got tensor(1.)", dict(sigma=torch.tensor(1.0))),
        (ValueError, "mu must be finite, got inf", dict(mu=math.inf)),
        (ValueError, "mu must be finite, got nan", dict(mu=math.nan)),
        (TypeError, "mu must be a number finite, got '1'", dict(mu="1")),
    ],
)
def test_a_process_that_cannot_be(error, message, arguments):
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        GeometricBrownian(**arguments)


DATA_ERRORS = [
    (ValueError, "{} must be finite and > 0, got 0.0 at [1, 1]", bad(0.0)),
    (ValueError, "{} must be finite and > 0, got -0.5 at [1, 1]", bad(-0.5)),
    (ValueError, "{} must be finite and > 0, got nan at [1, 1]", bad(math.nan)),
    (ValueError, "{} must be finite and > 0, got inf at [1, 1]", bad(math.inf)),
    (TypeError, "{} must be real and floating-point, got torch.int64", GOOD.long()),
    (TypeError, "{} must be real and floating-point, got torch.complex64", GOOD.cfloat()),
    (TypeError, "{} must be a tensor, got [1.0]", [1.0]),
]
TIME_ERRORS = [
    (ValueError, "t must be in (0, 1], got 0.0 at [2]", torch.tensor([0.5, 0.5, 0.0])),
    (ValueError, "t must be in (0, 1], got 1.5 at [0]", torch.tensor([1.5, 0.5, 0.5])),
    (ValueError, "t must be in (0, 1], got nan at []", torch.tensor(math.nan)),
    (TypeError, "t must be real and floating-point, got torch.int64", torch.tensor([1, 2, 3])),
    (TypeError, "t must be a tensor, got 0.5", 0.5),
    (ValueError, "t must have leading dimensions of the data's (3, 2), got (2,)", torch.full((2,), 0.5)),
    (ValueError, "t must have leading dimensions of the data's (3, 2), got (3, 1)", torch.full((3, 1), 0.5)),
    (ValueError, "t must have leading dimensions of the data's (3, 2), got (3, 2, 1)", torch.full((3, 2, 1), 0.5)),
    (
        ValueError,
        "t must have the dtype and device of {}, torch.float32 on cpu, got torch.float64 on cpu",
        T.double(),
    ),
]
CALLS = {
    "noise": lambda process, x, x0, t: process.noise(x0, t),
    "conditional_score": lambda process, x, x0, t: process.conditional_score(x, x0, t),
    "loss": lambda process, x, x0, t: process.loss(lambda x, t: -1 / x, x, x0, t),
    "sample": lambda process, x, x0, t: process.sample(lambda x, t: -1 / x, x, steps=2),
}
REFUSED = [
    pytest.param(name, error, message.format(argument), {argument: value}, id=f"{name}-{argument}-{number}")
    for name in CALLS
    for argument in {"noise": ["x0"], "sample": ["x"]}.get(name, ["x", "x0"])
    for number, (error, message, value) in enumerate(DATA_ERRORS)
] + [
    pytest.param(name, error, message.format("x0" if name == "noise" else "x"), {"t": value}, id=f"{name}-t-{number}")
    for name in CALLS
    if name != "sample"
    for number, (error, message, value) in enumerate(TIME_ERRORS)
]


@pytest.mark.parametrize(("name", "error", "message", "arguments"), REFUSED)
def test_wrong_tensors_are_named(name, error, message, arguments):
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        CALLS[name](GeometricBrownian(), **{**dict(x=GOOD, x0=GOOD, t=T), **arguments})


@pytest.mark.parametrize("name", ["conditional_score", "loss"])
@pytest.mark.parametrize(
    ("x0", "message"),
    [
        (torch.ones(3, 1), "x0 must have the shape of x, (3, 2), got (3, 1)"),
        (GOOD.double(), "x0 must have the dtype and device of x, torch.float32 on cpu, got torch.float64 on cpu"),
        (GOOD.to("meta"), "x0 must have the dtype and device of x, torch.float32 on cpu, got torch.float32 on meta"),
    ],
)
def test_data_and_noised_data_must_be_alike(name, x0, message):
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        CALLS[name](GeometricBrownian(), GOOD, x0, T)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (torch.ones(3, 1), "torch.float32 of shape (3, 1)"),
        (torch.ones(3, 2, dtype=torch.cfloat), "torch.complex64 of shape (3, 2)"),
        (torch.ones(3, 2).long(), "torch.int64 of shape (3, 2)"),
        (None, "None"),
    ],
)
def test_a_network_that_would_be_broadcast_is_refused(value, got):
    process = GeometricBrownian()
    message = re.escape(f"score(x, t) must be a floating-point tensor of the shape of x, (3, 2), got {got}")
    with pytest.raises(ValueError, match=message):
        process.loss(lambda x, t: value, GOOD, GOOD, T)
    with pytest.raises(ValueError, match=message):
        process.sample(lambda x, t: value, GOOD)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "steps must be a whole number >= 1, got 0", dict(steps=0)),
        (ValueError, "steps must be a whole number >= 1, got 2.5", dict(steps=2.5)),
        (ValueError, "repeats must be a whole number >= 1, got True", dict(repeats=True)),
        (ValueError, "delta must be finite and > 0, got 0", dict(delta=0)),
        (ValueError, "delta must be finite and > 0, got nan", dict(delta=math.nan)),
        (TypeError, "delta must be a number finite and > 0, got '1'", dict(delta="1")),
        (ValueError, "damping must be in [0, 1], got 1.01", dict(damping=1.01)),
        (ValueError, "damping must be in [0, 1], got -0.1", dict(damping=-0.1)),
    ],
)
def test_samplers_that_cannot_run(error, message, arguments):
    with pytest.raises(error, match="^" + re.escape(message) + "$"):
        GeometricBrownian().sample(lambda x, t: -1 / x, GOOD, **arguments)


def test_a_process_is_a_value():
    process = GeometricBrownian(mu=0.1, sigma=0.5)
    assert process == GeometricBrownian(0.1, 0.5)
    assert hash(process) == hash(GeometricBrownian(0.1, 0.5))
    with pytest.raises(FrozenInstanceError):
        process.mu = 0.3


# The example of the documentation

EXAMPLE = Path(__file__).parents[1] / "docs/examples/dale_meets_langevin.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("dale_meets_langevin", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_runs_and_only_the_unconstrained_sampler_crosses_zero(example, capsys, monkeypatch):
    train, held_out = example.load()
    monkeypatch.setattr(example, "load", lambda: (train[:400], held_out[:40]))
    example.main(
        ["--steps", "3", "--batch", "16", "--samples", "20", "--sampler-steps", "2", "--optimizer", "DiffGrad"]
    )
    measured, crossed, summary = capsys.readouterr().out.split("\n\n")
    rows = {name.strip(): cells for _, name, *cells, _ in (row.split("|") for row in measured.splitlines()[2:])}
    assert len(rows) == 8
    for name, cells in rows.items():
        if name.startswith("Dale"):
            assert cells[-1].strip() == "0.00%"
        assert float(cells[0].split()[0]) > 0
    dale, free = ([float(cell.strip(" %")) for cell in row.split("|")[2:-1]] for row in crossed.splitlines()[2:])
    assert dale == [0, 0, 0, 0]
    assert free[0] > 1
    assert "with DiffGrad, lr 0.002" in summary


def test_the_network_of_the_example_is_right_where_data_are_log_normal(example):
    # With nothing to add to it, it is the score of a log-normal marginal.
    process = GeometricBrownian(mu=-0.7, sigma=1.3)
    network = example.ScoreNetwork(process, MEAN, math.sqrt(VARIANCE)).double()
    torch.nn.init.zeros_(network.last.weight)
    torch.nn.init.zeros_(network.last.bias)
    x, t = positive(24, 3, 1, 14, 14), torch.tensor([0.001, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(network(x, t), exact_score(process)(x, t), rtol=1e-12, atol=1e-12)
    assert not [name for name, weight in network.named_parameters() if "last" not in name and (weight == 0).any()]


def test_the_starts_of_the_example_have_the_moments_of_noised_data(example):
    process, train = GeometricBrownian(mu=0.5, sigma=0.8), example.load()[0]
    noisy = process.noise(train, torch.ones(()), generator=seeded(1)).log().flatten(1)
    for kind in ("covariance", "variance"):
        logs = example.start(train, process, kind, len(train), seeded(2)).log().flatten(1)
        # Means and variances over 10,000 pictures: of all pixels, and of the brightness of a picture.
        assert logs.mean().item() == pytest.approx(noisy.mean().item(), abs=0.01)
        assert logs.var().item() == pytest.approx(noisy.var().item(), rel=0.02)
        spread = logs.mean(1).var() / noisy.mean(1).var()
        # Standard error of a ratio of two such variances: sqrt(4 / 10,000) = 0.02.
        assert (abs(spread.item() - 1) < 0.1) == (kind == "covariance")


def test_the_measures_of_the_example(example):
    pictures = torch.rand(40, 1, 14, 14, generator=seeded(3))
    assert example.sliced_wasserstein(pictures, pictures[torch.randperm(40)]) == 0
    # A shift of every pixel by a moves each projection by a (sum of its direction): root mean square a.
    assert example.sliced_wasserstein(pictures, pictures + 0.5) == pytest.approx(0.5, rel=0.2)
    assert example.nearest(pictures[:1], pictures[1:]) == pytest.approx(
        min((pictures[0] - other).norm().item() for other in pictures[1:]), rel=1e-4
    )


def test_the_picture_of_the_example(example, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    file = tmp_path / "picture.png"
    rows = {name: torch.rand(48, 1, 14, 14, generator=seeded(4)) for name in ("first", "second")}
    example.draw_picture(str(file), [3.0, 2.0, 1.0], rows)
    with Image.open(file) as picture:
        assert picture.width == 800
        assert len(picture.getcolors()) > 16

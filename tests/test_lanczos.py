"""LanczosLR on quadratics whose answer is known, its guards and checkpoints, and the laws of batch size."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import lanczos as reference
from steps import normal
from torch import nn
from torch.nn import functional as F

import optimzoo
from optimzoo import LanczosLR, max_learning_rate
from optimzoo.curvature import GGN, Hessian, lanczos, noise, quadrature
from optimzoo.stability import (
    batch_eigenvalue,
    effective_batch,
    fit_noise,
    heavy_ball,
    spiked_eigenvalue,
    stability_bound,
)

# The formula alone, on all products.
RAW = dict(safety=1.0, growth=math.inf, max_momentum=0.99999, ema=0.0, tol=0.0, iterations=40, momentum="learn")


def spectrum(kappa: float, size: int = 30) -> torch.Tensor:
    return torch.logspace(0, -math.log10(kappa), size, dtype=torch.float64)


class Quadratic:
    """sum_i lambda_i x_i^2 / 2 from ones, with an optimizer."""

    def __init__(self, values, make=torch.optim.SGD, **options):
        self.values = torch.as_tensor(values, dtype=torch.float64)
        self.x = torch.ones_like(self.values, requires_grad=True)
        self.optimizer = make([self.x], **{"lr": 1.0, **options})

    @property
    def group(self):
        return self.optimizer.param_groups[0]

    def loss(self):
        return (self.values * self.x.square()).sum() / 2

    def advance(self, steps=1):
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
        return self.x.detach().norm().item()

    def steps_to(self, tolerance, limit=20_000):
        return next(k for k in range(1, limit) if self.advance() <= tolerance * math.sqrt(len(self.values)))


def learner(problem, **options):
    return LanczosLR(problem.optimizer, **{**RAW, **options})


# The specification, literally


def start_of(size: int, seed: int):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).numpy()


def random_matrix(seed: int, size: int = 9) -> torch.Tensor:
    e = normal(seed, size, size)
    return e + e.T + torch.diag(torch.linspace(0, 6, size).double())


@pytest.mark.parametrize("k", [1, 4, 9, 20])
def test_lanczos_is_the_literal_one(k):
    matrix, start = random_matrix(3), normal(4, 9)
    spectrum = lanczos(matrix, k, start=start)
    theta, bounds, weights = reference.ritz(*reference.lanczos(matrix.numpy(), start.numpy(), k)[:2])
    close = dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(spectrum.values, torch.from_numpy(theta.copy()), **close)
    torch.testing.assert_close(spectrum.errors, torch.from_numpy(bounds.copy()), **close)
    torch.testing.assert_close(spectrum.weights, torch.from_numpy(weights.copy()), **close)
    runs = quadrature(matrix, k, 3, seed=5)
    nodes, shares = reference.slq(matrix.numpy(), [start_of(9, 5 + i) for i in range(3)], k)
    grid = torch.linspace(-10, 20, 50).double()
    expected = torch.from_numpy(reference.density(grid.numpy(), nodes, shares, 0.7))
    torch.testing.assert_close(runs.density(grid, 0.7), expected, **close)
    assert runs.trace() == pytest.approx(reference.slq_trace(nodes, shares, 9), rel=1e-12)
    assert runs.trace(torch.square) == pytest.approx(9 * reference.slq_moment(nodes, shares, 2), rel=1e-12)


@pytest.mark.parametrize("loss", ["mse", "logistic"])
def test_operators_of_a_network_are_the_literal_ones(loss):
    d, h, n = 3, 4, 6
    flat, inputs, targets = normal(1, h * d + h + h + 1), normal(2, n, d), (normal(3, n) > 0).double()
    expected = reference.mlp_curvature(flat.numpy(), inputs.numpy(), targets.numpy(), h, loss)
    sizes = [h * d, h, h, 1]
    params = [piece.clone().requires_grad_() for piece in torch.split(flat, sizes)]

    def closure():
        w1, b1, w2, b2 = params
        f = torch.tanh(inputs @ w1.view(h, d).T + b1) @ w2 + b2
        if loss == "mse":
            return f, (f - targets).square().mean()
        return f, F.binary_cross_entropy_with_logits(f, targets)

    for operator, matrix in [(Hessian(lambda: closure()[1], params), 1), (GGN(closure, params), 2)]:
        got = torch.stack([operator @ row for row in torch.eye(len(flat)).double()])
        torch.testing.assert_close(got, torch.from_numpy(expected[matrix]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(operator.gradient, torch.from_numpy(expected[0]), rtol=1e-12, atol=1e-12)


METHODS = {
    "heavy_ball": dict(momentum=0.0),
    "nesterov": dict(momentum=0.5, nesterov=True),
    "fixed": dict(momentum=0.7),
    "none": dict(momentum=0.0),
    "adam": {},
}


@pytest.mark.parametrize("mu", ["abs_min", "smallest_positive", "quantile", 0.3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("guarded", [True, False])
def test_the_learner_follows_the_specification(method, mu, guarded):
    matrices = [random_matrix(s) * scale for s, scale in enumerate((1.0, 3.0, 0.5, 0.4, -1e-9, 0.2, 2.0))]
    matrices[4] = -torch.eye(9, dtype=torch.float64)  # no answer
    x = normal(50, 9).requires_grad_()
    adam = method == "adam"
    optimizer = (torch.optim.Adam if adam else torch.optim.SGD)([x], lr=1.0, **METHODS[method])
    moment = normal(51, 9).square()
    if adam:
        optimizer.state[x] = {"step": torch.tensor(3.0), "exp_avg_sq": moment, "exp_avg": torch.zeros_like(moment)}
    raw = {} if guarded else dict(safety=1.0, growth=math.inf, max_momentum=1 - 1e-15)
    literal = {} if guarded else dict(safety=1.0, growth=math.inf, rho_max=1.0)
    scheduler = LanczosLR(
        optimizer,
        every=1,
        iterations=6,
        starts=2,
        tol=0.0,
        ema=0.5,
        mu=mu,
        seed=7,
        momentum="learn" if method in ("heavy_ball", "nesterov") else "fixed",
        first_lr=0.01,
        **raw,
    )
    got = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the matrix without an answer
        for matrix in matrices:
            scheduler.step(lambda matrix=matrix: x @ matrix @ x / 2 + 1000)
            group = optimizer.param_groups[0]
            got.append((group["lr"], group["betas"][0] if adam else group["momentum"]))
    seen = [
        reference.preconditioned(m.numpy(), moment.numpy(), 3, 0.999, 1e-8) if adam else m.numpy() for m in matrices
    ]
    expected = reference.learner_sequence(
        seen,
        [[start_of(9, 7 + 2 * look + i) for i in range(2)] for look in range(len(matrices))],
        k=6,
        mu=mu,
        method=method,
        momentum=0.9 if adam else METHODS[method]["momentum"],
        **literal,
    )
    for mine, theirs in zip(got, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12, abs=1e-12)
    assert scheduler.skipped == 1


def test_laws_and_shifts_are_the_literal_ones():
    for b in (3.0, 40.0, 4000.0):
        assert batch_eigenvalue(2.0, 90.0, b) == pytest.approx(reference.additive_outlier(2.0, 90.0, b), rel=1e-12)
        assert spiked_eigenvalue(3.0, b / 9) == pytest.approx(reference.multiplicative_top(3.0, b / 9), rel=1e-12)
    assert fit_noise((10, 5.0), (40, 4.0)) == pytest.approx(reference.fit_noise(10, 5.0, 40, 4.0), rel=1e-12)
    for law, kind in [(None, "sgd"), (None, "adaptive"), ("saturating", "sgd"), ("saturating", "adaptive")]:
        known = dict(kind=kind, reference_batch=32, reference_lr=0.1, law=law)
        got = max_learning_rate(500, **known, eigenvalue=2.0, noise=90.0, dataset_size=1000)
        assert got == pytest.approx(reference.max_learning_rate(500, **known, lam=2.0, c=90.0, N=1000), rel=1e-12)
    whole = dict(kind="sgd", reference_batch=32, reference_lr=0.1, law="saturating")
    assert max_learning_rate(1000, **whole, eigenvalue=2.0, noise=90.0, dataset_size=1000) == pytest.approx(
        reference.max_learning_rate(1000, **whole, lam=2.0, c=90.0, N=1000), rel=1e-12
    )
    batches = [random_matrix(s) for s in range(4)]
    v = torch.from_numpy(start_of(9, 3))
    products = torch.stack([m @ (v / v.norm()) for m in batches])
    literal = reference.noise_from_products(products.numpy(), products.mean(0).numpy(), micro=16)
    assert noise(batches, 16, seed=3) == pytest.approx(4 / 3 * literal, rel=1e-12)  # the mean is of these four


# The formulas


@pytest.mark.parametrize("kappa", [1e1, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_the_learnt_pair_is_the_optimal_one_and_converges_as_fast(kappa, scale):
    values = scale * spectrum(kappa)
    problem = Quadratic(values)
    learner(problem).step(problem.loss)
    lr = (2 / (math.sqrt(scale) + math.sqrt(scale / kappa))) ** 2
    momentum = ((math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)) ** 2
    assert problem.group["lr"] == pytest.approx(lr, rel=0.01)
    assert problem.group["momentum"] == pytest.approx(momentum, rel=0.01)
    if scale == 1.0 and kappa <= 1e3:
        best = Quadratic(values, lr=lr, momentum=momentum)
        assert problem.steps_to(1e-6) <= 1.05 * best.steps_to(1e-6)


@pytest.mark.parametrize(
    ("options", "fixed"),
    [
        (dict(momentum=0.9), True),
        (dict(momentum=0.5, dampening=0.5), True),
        (dict(momentum=0.9, nesterov=True), True),
        (dict(momentum=0.0), True),
        (dict(momentum=0.0, dampening=0.9), True),
        (dict(momentum=0.9), False),
        (dict(momentum=0.9, dampening=0.3), False),
    ],
)
@pytest.mark.parametrize("share", [0.99, 1.01])
def test_the_rate_at_the_edge_is_the_largest_that_converges(options, fixed, share):
    problem = Quadratic([3.0, 1.0, 0.5], **options)
    # Without momentum the rate is 2 / (L + mu): the edge is reached at mu = 0. With the momentum learnt and cut the
    # rate is (1 + sqrt rho)^2 / L, so much below the edge.
    learner(problem, momentum="fixed" if fixed else "learn", mu=0.0, max_momentum=0.81).step(problem.loss)
    if not fixed:
        problem.group["lr"] *= 2 * (1 + 0.81) / (1 + 0.9) ** 2
    problem.group["lr"] *= share
    end = problem.advance(3000)
    assert end < 1e-6 if share < 1 else end > 1e6


@given(kappa=st.floats(1.5, 1e4), c=st.floats(1e-3, 1e3))
def test_a_loss_scaled_by_c_has_a_rate_scaled_by_its_inverse(kappa, c):
    one, scaled = Quadratic(spectrum(kappa, 6)), Quadratic(c * spectrum(kappa, 6))
    for problem in (one, scaled):
        learner(problem).step(problem.loss)
    assert scaled.group["lr"] * c == pytest.approx(one.group["lr"], rel=1e-9)
    assert scaled.group["momentum"] == pytest.approx(one.group["momentum"], rel=1e-9)


def test_nesterov_has_its_own_pair():
    problem = Quadratic([4.0, 1.0], momentum=0.9, nesterov=True)
    learner(problem).step(problem.loss)
    assert problem.group["lr"] == pytest.approx(1 / 4, rel=1e-9)
    assert problem.group["momentum"] == pytest.approx(1 / 3, rel=1e-9)


@pytest.mark.parametrize(("mu", "expected"), [("abs_min", 2.0), ("smallest_positive", 1.0), (0.25, 0.25), (100, 9.0)])
def test_rules_for_the_smallest_curvature(mu, expected):
    problem = Quadratic([9.0, 4.0, 1.0, -2.0])
    learner(problem, mu=mu).step(problem.loss)
    lr, momentum = heavy_ball(9.0, expected)
    assert problem.group["lr"] == pytest.approx(lr, rel=1e-4)
    assert problem.group["momentum"] == pytest.approx(momentum, rel=1e-4)


def test_the_line_rule_is_the_newton_step_along_the_gradient():
    problem = Quadratic([5.0, 2.0, 1.0], momentum=0.3)
    learner(problem, rule="line", safety=0.1).step(problem.loss)
    assert problem.group["lr"] == pytest.approx((25 + 4 + 1) / (125 + 8 + 1), rel=1e-12)
    assert problem.group["momentum"] == 0.3


@pytest.mark.parametrize("maximize", [False, True])
def test_the_line_rule_goes_along_the_decayed_gradient(maximize):
    problem = Quadratic([5.0, 1.0], weight_decay=2.0, maximize=maximize)
    target = torch.tensor([0.3, 1.5], dtype=torch.float64)
    scheduler = learner(problem, rule="line")
    sign = -1 if maximize else 1
    scheduler.step(lambda: sign * (problem.values * (problem.x - target).square()).sum() / 2)
    g = problem.values * (1 - target) + 2.0
    assert problem.group["lr"] == pytest.approx(float(g @ g / (g @ ((problem.values + 2) * g))), rel=1e-12)


def test_decay_and_damping_are_curvature_and_decoupled_decay_is_not():
    for options, damping, top in [
        (dict(weight_decay=0.5), 0.0, 2.5),
        (dict(weight_decay=0.5), 0.25, 2.75),
        (dict(maximize=True, weight_decay=0.5), 0.0, 0.5),
    ]:
        problem = Quadratic([2.0, 1.0, 0.0], **options)
        learner(problem, damping=damping, momentum="fixed").step(problem.loss)
        low = top - 2 if not options.get("maximize") else 1.5  # the magnitude of -2 + 0.5, at most the top
        assert problem.group["lr"] == pytest.approx(2 / (top + min(low, top)), rel=1e-9)


def test_the_gauss_newton_matrix_has_no_negative_curvature():
    w = torch.tensor([2.0, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=1.0)

    def closure():
        outputs = w.square()  # with the loss below the Hessian is 12 w^2 - 4 y, J'HJ 8 w^2
        return outputs, (outputs - 20).square().sum()

    scheduler = LanczosLR(optimizer, curvature="ggn", **RAW)
    scheduler.step(closure)
    assert scheduler.last_spectrum[0].values.tolist() == pytest.approx([32.0, 8.0])


# Adam-likes


@pytest.mark.parametrize(
    ("make", "options", "name"),
    [
        (torch.optim.Adam, {}, "exp_avg_sq"),
        (torch.optim.Adam, dict(amsgrad=True), "max_exp_avg_sq"),
        (torch.optim.AdamW, dict(weight_decay=0.3), "exp_avg_sq"),
        (optimzoo.DiffGrad, {}, "exp_avg_sq"),
        (optimzoo.AdaBelief, {}, "exp_avg_var"),
    ],
)
def test_adams_rate_is_from_the_preconditioned_curvature(make, options, name):
    problem = Quadratic([3.0, 1.0, 0.2], make, **options)
    scheduler = learner(problem, safety=0.5, momentum="fixed")
    scheduler.step(problem.loss)  # too early: there is no second moment
    assert (scheduler.looks, scheduler.skipped, problem.group["lr"]) == (0, 0, 0.001)
    problem.advance()
    scheduler.step(problem.loss)
    state, (beta1, beta2) = problem.optimizer.state[problem.x], problem.group["betas"]
    d = (state[name] / (1 - beta2 ** float(state["step"]))).sqrt() + problem.group["eps"]
    top = float((problem.values / d).max())
    assert scheduler.looks == 1
    assert (beta1, beta2) == (0.9, 0.999)
    assert problem.group["lr"] == pytest.approx(0.5 * 2 * 1.9 / (0.1 * top), rel=1e-9)


def test_adams_first_beta_is_learnt_if_asked():
    problem = Quadratic([3.0, 1.0, 0.2], torch.optim.Adam)
    problem.advance()
    scheduler = learner(problem, momentum="learn")
    problem.advance()
    scheduler.step(problem.loss)
    values = scheduler.last_spectrum[0].values
    lr, momentum = heavy_ball(float(values[0]), float(values[-1]))
    assert problem.group["betas"] == (pytest.approx(momentum, rel=1e-9), 0.999)
    assert problem.group["lr"] == pytest.approx(lr / (1 - momentum), rel=1e-9)


@pytest.mark.parametrize("momentum", ["fixed", "learn"])
def test_tensor_betas_stay_the_tensors_that_they_are(momentum):
    betas = (torch.tensor(0.9), torch.tensor(0.999))
    problem = Quadratic([3.0, 1.0, 0.2], torch.optim.Adam, betas=betas, foreach=False)
    scheduler = learner(problem, momentum=momentum)
    problem.advance()
    scheduler.step(problem.loss)
    assert all(now is then for now, then in zip(problem.group["betas"], betas, strict=True))
    assert (float(betas[0]) == pytest.approx(0.9)) == (momentum == "fixed")
    scheduler.load_state_dict(scheduler.state_dict())
    assert problem.group["betas"][0] is betas[0]
    problem.advance()


# Guards and the loop


def test_guards_hold_the_rate_back():
    problem = Quadratic([0.1, 0.05])
    scheduler = LanczosLR(problem.optimizer, every=200)
    assert problem.group["lr"] == 0.01
    rates = []
    for _ in range(60):
        scheduler.step(problem.loss)
        rates.append(problem.group["lr"])
    grown = sorted(set(rates))
    # While it moves by 1.5 a look comes after a twentieth of 200 steps.
    assert grown == pytest.approx([0.01 * 1.5**k for k in range(1, 7)])
    assert rates[0] == rates[9] < rates[10]
    scheduler = LanczosLR(problem.optimizer, max_lr=0.012)
    problem.group["lr"] = scheduler.multipliers[0] * scheduler.learnt[0]
    scheduler.step(problem.loss)
    assert scheduler.learnt == [0.012]


def test_a_rate_that_has_settled_is_cut_at_once_and_not_hurried_upward():
    problem, looks = Quadratic([4.0, 1.0], momentum=0.9), []
    scheduler = LanczosLR(problem.optimizer, every=40, first_lr=0.4, ema=0.0)
    for step in range(160):
        # In units of the curvature: settled from the first look on, gone at 40, tenfold at 120.
        scale = 1.0 if step < 40 else 1e-3 if step < 120 else 10.0
        count = scheduler.looks
        scheduler.step(lambda scale=scale: scale * problem.loss())
        if scheduler.looks > count:
            looks.append((step, problem.group["lr"]))
    edge = 0.5 * 2 * 1.9 / 4
    assert [step for step, _ in looks] == [0, 40, 80, 120, 122]
    assert [lr for _, lr in looks] == pytest.approx([edge, 1.5 * edge, 2.25 * edge, edge / 10, edge / 10], rel=1e-6)


def test_a_rise_is_followed_at_once_and_a_fall_slowly():
    problem = Quadratic([4.0, 1.0])
    scheduler = learner(problem, every=1, ema=0.75)
    for factor, expected in [(1.0, 4.0), (2.0, 8.0), (0.5, 8 * (2 / 8) ** 0.25)]:
        scheduler.step(lambda factor=factor: factor * problem.loss())
        assert scheduler.largest == [pytest.approx(expected, rel=1e-9)]


def test_momentum_is_cut_and_the_rate_computed_for_what_is_left():
    problem = Quadratic([1.0, 1e-6])
    learner(problem, max_momentum=0.9, safety=0.5).step(problem.loss)
    assert problem.group["momentum"] == 0.9
    assert problem.group["lr"] == pytest.approx(0.5 * (1 + math.sqrt(0.9)) ** 2, rel=1e-9)


def test_looks_are_made_every_so_often_and_wait_for_a_closure():
    problem, calls = Quadratic([2.0, 1.0]), []

    def closure():
        calls.append(scheduler.last_epoch)
        return problem.loss()

    scheduler = learner(problem, every=5, first_lr=0.68)
    for step in range(20):
        scheduler.step(None if step == 5 else closure)
    assert calls == [0, 6, 11, 16]
    assert scheduler.last_epoch == 20


def test_the_groups_rate_multiplies_and_other_schedulers_compose():
    x, y = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [x]}, {"params": [y], "lr": 0.25}], lr=1.0)
    scheduler = LanczosLR(optimizer, every=2, **RAW, schedule=lambda step: 0.5)
    other = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(6):
        optimizer.step()
        scheduler.step(lambda: (x.square().sum() + y.square().sum()) * 2)
        other.step()
        learnt = 1 / 4
        rates = [0.5 * learnt * 0.9 ** (step + 1) * share for share in (1, 0.25)]
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(rates)


SCHEDULERS = {
    "StepLR": dict(step_size=3),
    "LinearLR": dict(start_factor=0.5, total_iters=4),
    "ConstantLR": dict(factor=0.5, total_iters=3),
    "PolynomialLR": dict(total_iters=5),
    "CosineAnnealingLR": dict(T_max=8),
}


@pytest.mark.parametrize("learner_first", [True, False])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_torchs_schedulers_that_multiply_run_beside_it(name, learner_first):
    problem, alone = Quadratic([2.0, 1.0]), Quadratic([2.0, 1.0])
    make = getattr(torch.optim.lr_scheduler, name)
    if learner_first:
        scheduler = learner(problem)
    other, expected = make(problem.optimizer, **SCHEDULERS[name]), make(alone.optimizer, **SCHEDULERS[name])
    if not learner_first:
        scheduler = learner(problem)
    for _ in range(8):
        problem.optimizer.step()
        alone.optimizer.step()
        scheduler.step(problem.loss)
        other.step()
        expected.step()
        assert problem.group["lr"] == pytest.approx(scheduler.learnt[0] * alone.group["lr"], rel=1e-9, abs=1e-12)


def test_each_group_has_its_own_block_on_request():
    x, y = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    frozen = torch.ones(2, dtype=torch.float64)
    optimizer = torch.optim.SGD([{"params": [x, frozen]}, {"params": [y]}], lr=1.0)
    scheduler = LanczosLR(optimizer, per_group=True, **RAW)
    scheduler.step(lambda: x.square().sum() + 4 * y.square().sum() + x @ y)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1 / 2, 1 / 8])
    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]


def test_a_tensor_rate_is_written_in_place():
    problem = Quadratic([2.0, 1.0], lr=torch.tensor(1.0))
    rate = problem.group["lr"]
    scheduler = learner(problem)
    scheduler.step(problem.loss)
    assert problem.group["lr"] is rate
    assert float(rate) == pytest.approx(heavy_ball(2.0, 1.0)[0])
    assert scheduler.get_last_lr()[0] is not rate


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: -x.square().sum(),
        lambda x: x.sum(),
        lambda x: 0 * x.square().sum(),
        lambda x: x.square().sum() * math.nan,
        lambda x: x.square().sum() * math.inf,
        lambda x: (x - 1).square().sum(),  # zero, with curvature
    ],
    ids=["negative", "linear", "flat", "nan", "infinite", "zero"],
)
def test_a_spectrum_without_an_answer_leaves_the_rate_and_says_so_once(loss):
    problem = Quadratic([2.0, 1.0], momentum=0.3)
    scheduler = learner(problem, every=1)
    with pytest.warns(UserWarning, match="the curvature gives no learning rate"):
        scheduler.step(lambda: loss(problem.x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step(lambda: loss(problem.x))
    assert scheduler.skipped == 2
    assert (problem.group["lr"], problem.group["momentum"]) == (0.01, 0.3)
    scheduler.step(problem.loss)
    assert problem.group["lr"] == pytest.approx(heavy_ball(2.0, 1.0)[0])


def test_a_first_look_without_an_answer_delays_nothing_but_itself():
    problem, looks = Quadratic([0.1, 0.05], momentum=0.9), []
    scheduler = LanczosLR(problem.optimizer, every=200)
    with pytest.warns(UserWarning, match="no learning rate"):
        scheduler.step(lambda: problem.loss() * math.nan)
    assert (scheduler.looks, scheduler.skipped, scheduler.settled, scheduler.due) == (1, 1, False, 10)
    for step in range(1, 60):
        count = scheduler.looks
        scheduler.step(problem.loss)
        if scheduler.looks > count:
            looks.append(step)
    assert looks == [10, 20, 30, 40, 50]
    assert problem.group["lr"] == pytest.approx(0.01 * 1.5**5)


def network(seed=0):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.copy_(normal(seed + i, *param.shape))
    return model


def train(model, optimizer, scheduler, steps, saved=None):
    for k in steps:
        inputs, labels = normal(1000 + k, 8, 4), torch.arange(8) % 3
        scheduler.step(lambda inputs=inputs, labels=labels: F.cross_entropy(model(inputs), labels))
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        if saved is not None:
            saved.append((optimizer.param_groups[0]["lr"], *[p.detach().clone() for p in model.parameters()]))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("first", ["optimizer", "scheduler"])
def test_a_run_that_is_resumed_is_the_run_bit_for_bit(make, first, tmp_path):
    torch.manual_seed(0)
    model = network()
    optimizer = make(model.parameters(), lr=1.0)
    scheduler = LanczosLR(optimizer, every=4, per_group=True)
    train(model, optimizer, scheduler, range(10))
    state = [copy.deepcopy(part.state_dict()) for part in (model, optimizer, scheduler)]
    torch.save({"all": state, "random": torch.get_rng_state()}, tmp_path / "run.pt")
    expected, got = [], []
    train(model, optimizer, scheduler, range(10, 25), expected)
    other = network(7)
    resumed = make(other.parameters(), lr=0.3)
    loaded = torch.load(tmp_path / "run.pt", weights_only=True)
    after = LanczosLR(resumed, every=4, per_group=True)
    parts = [(other, loaded["all"][0]), (resumed, loaded["all"][1]), (after, loaded["all"][2])]
    for part, value in parts if first == "optimizer" else reversed(parts):
        part.load_state_dict(value)
    torch.set_rng_state(loaded["random"])
    train(other, resumed, after, range(10, 25), got)
    for left, right in zip(expected, got, strict=True):
        assert left[0] == right[0]
        assert all(map(torch.equal, left[1:], right[1:]))
    assert after.state_dict() == scheduler.state_dict()


def test_looking_does_not_change_what_training_draws():
    runs = []
    for every in (1, 10**6):
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        train(model, optimizer, LanczosLR(optimizer, every=every, max_lr=0.01, min_lr=0.01, momentum="fixed"), range(6))
        runs.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(*runs)


# Wrong input


def backward_called(problem):
    loss = problem.loss()
    loss.backward()
    return loss


@pytest.mark.parametrize(
    ("closure", "error", "match"),
    [
        (backward_called, RuntimeError, r"called backward\(\)"),
        (lambda problem: problem.loss().detach(), RuntimeError, "no graph"),
        (lambda problem: None, TypeError, "must return the loss"),
        (lambda problem: 1 / 0, ZeroDivisionError, "division"),
    ],
)
def test_a_closure_that_raises_changes_nothing(closure, error, match):
    problem = Quadratic([2.0, 1.0], momentum=0.3)
    scheduler = learner(problem, every=1)
    scheduler.step(problem.loss)
    problem.advance()
    before = copy.deepcopy((scheduler.state_dict(), problem.optimizer.state_dict()))
    grad, x = problem.x.grad.clone(), problem.x.detach().clone()
    with pytest.raises(error, match=match):
        scheduler.step(lambda: closure(problem))
    assert str((scheduler.state_dict(), problem.optimizer.state_dict())) == str(before)
    assert torch.equal(problem.x.grad, grad)
    assert torch.equal(problem.x, x)


def test_a_closure_that_calls_backward_leaves_the_gradients_of_all_groups():
    x, y = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y.grad = torch.full_like(y, 7)
    optimizer = torch.optim.SGD([{"params": [x]}, {"params": [y]}], lr=1.0)

    def closure():
        loss = x.square().sum() + y.square().sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"called backward\(\)"):
        LanczosLR(optimizer, per_group=True).step(closure)
    assert x.grad is None
    assert y.grad.tolist() == [7.0] * 3


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (dict(every=0), ValueError),
        (dict(iterations=0), ValueError),
        (dict(iterations=2.5), ValueError),
        (dict(starts=0), ValueError),
        (dict(curvature="fisher"), ValueError),
        (dict(rule="plane"), ValueError),
        (dict(mu="median"), ValueError),
        (dict(mu=-1.0), ValueError),
        (dict(momentum=0.9), ValueError),
        (dict(damping=-1.0), ValueError),
        (dict(safety=0.0), ValueError),
        (dict(safety=1.5), ValueError),
        (dict(ema=1.0), ValueError),
        (dict(growth=1.0), ValueError),
        (dict(max_momentum=1.0), ValueError),
        (dict(first_lr=0.0), ValueError),
        (dict(min_lr=-1.0), ValueError),
        (dict(min_lr=1.0, max_lr=0.5), ValueError),
        (dict(tol="small"), TypeError),
        (dict(growth="fast"), TypeError),
        (dict(growth=math.nan), ValueError),
        (dict(max_lr="high"), TypeError),
        (dict(max_lr=0.0), ValueError),
        (dict(max_lr=math.nan), ValueError),
        (dict(schedule="cosine"), TypeError),
        (dict(schedule=lambda step: math.nan), ValueError),
        (dict(schedule=lambda step: -1.0), ValueError),
        (dict(per_group="no"), TypeError),
        (dict(seed=1.5), ValueError),
        (dict(seed=-1), ValueError),
        (dict(module=3), TypeError),
        (dict(process_group="all"), TypeError),
    ],
)
def test_wrong_settings_are_named_and_the_optimizer_is_left_alone(options, error):
    problem = Quadratic([2.0, 1.0])
    name = list(options)[-1]
    with pytest.raises(error, match=f"{name} must (be|return)"):
        LanczosLR(problem.optimizer, **options)
    assert problem.group["lr"] == 1.0
    assert "initial_lr" not in problem.group


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (torch.optim.Adagrad, {}, "Adagrad's group 0 has"),
        (torch.optim.RMSprop, dict(momentum=0.9), "RMSprop's group 0 has"),
        (torch.optim.NAdam, {}, "NAdam's group 0 adds Nesterov's step"),
        (optimzoo.DaleSGD, {}, r"DaleSGD's group 0 multiplies \(dale=True\)"),
        (torch.optim.SGD, dict(momentum=1.0), r"momentum in SGD's group 0 must be in \[0, 1\), got 1.0"),
        (torch.optim.SGD, dict(momentum=0.5, dampening=1.0), r"dampening must be in \[0, 1\), got 1.0"),
    ],
)
def test_an_optimizer_whose_steps_are_not_understood_is_named(make, options, match):
    problem = Quadratic([2.0, 1.0], make, **options)
    with pytest.raises(ValueError, match=match):
        LanczosLR(problem.optimizer)


def test_an_optimizer_without_a_second_moment_is_named():
    class Lion(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, dict(lr=lr, betas=(0.9, 0.99)))

        @torch.no_grad()
        def step(self):
            for param in self.param_groups[0]["params"]:
                self.state[param]["exp_avg"] = param.grad

    problem = Quadratic([2.0, 1.0], Lion)
    scheduler = LanczosLR(problem.optimizer)
    problem.advance()
    with pytest.raises(ValueError, match=r"must keep the second moment.*Lion keeps exp_avg"):
        scheduler.step(problem.loss)


def test_wrong_parameters_groups_and_states_are_named():
    with pytest.raises(TypeError, match="optimizer must be"):
        LanczosLR(None)
    half = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(TypeError, match="float32 or float64"):
        LanczosLR(torch.optim.SGD([half], lr=1.0))
    problem = Quadratic([2.0, 1.0])
    scheduler = LanczosLR(problem.optimizer)
    state = scheduler.state_dict()
    with pytest.raises(ValueError, match="state_dict must have the keys"):
        scheduler.load_state_dict({"last_epoch": 3})
    two = [{"params": [torch.ones(2, requires_grad=True)]} for _ in range(2)]
    with pytest.raises(ValueError, match="state_dict must be of 2 parameter groups, got 1"):
        LanczosLR(torch.optim.SGD(two, lr=1.0)).load_state_dict(state)
    problem.optimizer.add_param_group({"params": [torch.ones(2, dtype=torch.float64, requires_grad=True)], "lr": 1.0})
    with pytest.raises(RuntimeError, match=r"groups were added.*set each group's lr"):
        scheduler.step()
    problem.group["lr"] = 1.0
    scheduler = learner(problem)
    scheduler.step(problem.loss)
    assert [group["lr"] for group in problem.optimizer.param_groups] == pytest.approx(
        [heavy_ball(2.0, 1e-9)[0]] * 2, rel=1e-3
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learnt", "x"),
        ("learnt", ["x"]),
        ("learnt", [math.nan]),
        ("multipliers", [-1.0]),
        ("lrs", [None]),
        ("momenta", []),
        ("momenta", [1.0]),
        ("largest", [math.inf]),
        ("written", [1.0, 2.0]),
        ("base_lrs", None),
        ("last_epoch", 1.5),
        ("looks", -1),
        ("seed", True),
        ("settled", 1),
    ],
)
def test_a_state_with_a_wrong_value_is_named_and_not_loaded(name, value):
    problem = Quadratic([2.0, 1.0], momentum=0.3)
    scheduler = learner(problem)
    scheduler.step(problem.loss)
    before = copy.deepcopy((scheduler.state_dict(), problem.group["lr"], problem.group["momentum"]))
    other = learner(Quadratic([3.0, 1.0]))
    with pytest.raises(ValueError, match=rf"{name} in state_dict|state_dict must be of.* in {name}"):
        scheduler.load_state_dict({**other.state_dict(), name: value})
    assert (scheduler.state_dict(), problem.group["lr"], problem.group["momentum"]) == before


@pytest.mark.parametrize("value", [math.nan, -1.0, None])
def test_a_schedule_that_fails_changes_nothing(value):
    problem = Quadratic([2.0, 1.0], momentum=0.3)
    scheduler = learner(problem, every=1, schedule=lambda step: value if step == 2 else 1.0)
    scheduler.step(problem.loss)
    before = copy.deepcopy((scheduler.state_dict(), problem.group["lr"], problem.group["momentum"]))
    with pytest.raises((ValueError, TypeError)):
        scheduler.step(lambda: 3 * problem.loss())
    assert (scheduler.state_dict(), problem.group["lr"], problem.group["momentum"]) == before


# Laws of batch size


@given(b=st.floats(1, 1e5), reference=st.floats(1, 1e5), lr=st.floats(1e-6, 10))
def test_rates_scale_with_the_batch_as_the_paper_says(b, reference, lr):
    known = dict(reference_batch=reference, reference_lr=lr)
    assert max_learning_rate(b, **known) == pytest.approx(lr * b / reference)
    assert max_learning_rate(b, kind="adaptive", **known) == pytest.approx(lr * math.sqrt(b / reference))


def test_the_saturating_law_goes_with_the_root_of_small_batches_and_is_constant_in_large_ones():
    known = dict(reference_batch=1e9, reference_lr=2.0, law="saturating", eigenvalue=1.0, noise=1e4)
    assert max_learning_rate(1e8, **known) == pytest.approx(2.0, rel=1e-3)
    # Above the bulk's edge, at b > c / lambda^2, the rate is 2 / (1 + c / b).
    for b in (1.1e4, 2e4, 1e5):
        assert max_learning_rate(b, **known) == pytest.approx(2 / (1 + 1e4 / b), rel=1e-4)
    small = [max_learning_rate(b, **known) for b in (10, 40)]
    assert small[1] / small[0] == pytest.approx(2)  # drowned: the edge goes with the root
    assert max_learning_rate(20, **{**known, "kind": "adaptive"}) == pytest.approx(
        2 * math.sqrt(max_learning_rate(20, **known) / 2)
    )


def test_effective_batches_and_the_fit_of_the_noise():
    assert effective_batch(50, 100) == 100
    assert effective_batch(50) == 50
    pairs = [(b, batch_eigenvalue(3.0, 200.0, b)) for b in (32, 100)]
    assert fit_noise(*pairs) == pytest.approx((3.0, 200.0))
    drowned = [(b, batch_eigenvalue(3.0, 200.0, b)) for b in (10, 22, 23, 100, 1e6)]
    for i, small in enumerate(drowned):
        for large in drowned[max(i + 1, 2) :]:  # 200 / 9 is the threshold
            assert fit_noise(large, small) == pytest.approx((3.0, 200.0), rel=1e-6)
    with pytest.raises(ValueError, match="the larger batch must have the smaller eigenvalue"):
        fit_noise(*drowned[:2])
    assert fit_noise(*reversed(pairs)) == pytest.approx((3.0, 200.0))


@pytest.mark.parametrize("eigenvalue", [0.5, 2.0, 4.0])
def test_random_matrices_follow_the_laws(eigenvalue):
    size, variance = 800, 1.0
    e = normal(1, size, size) * math.sqrt(variance / size)
    noisy = (e + e.T) / math.sqrt(2)
    noisy[0, 0] += eigenvalue
    # Fluctuations: size^(-1/2) of an outlier, size^(-2/3) of an edge.
    assert float(lanczos(noisy, 60).values[0]) == pytest.approx(batch_eigenvalue(eigenvalue, variance, 1.0), abs=0.15)
    samples, ratio = 1600, 0.5
    x = normal(2, samples, size)
    x[:, 0] *= math.sqrt(eigenvalue + 1)
    top = float(lanczos(x.T @ x / samples, 60).values[0])
    assert top == pytest.approx(spiked_eigenvalue(eigenvalue + 1, ratio), rel=0.08)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: max_learning_rate(0, reference_batch=1, reference_lr=1), "batch_size must be finite, > 0"),
        (lambda: max_learning_rate(9, reference_batch=8, reference_lr=1, dataset_size=8), "batch_size must be"),
        (lambda: max_learning_rate(8, reference_batch=4, reference_lr=1, dataset_size=8), "law must be 'saturating'"),
        (lambda: max_learning_rate(8, reference_batch=-1, reference_lr=1), "reference_batch must be"),
        (lambda: max_learning_rate(8, reference_batch=1, reference_lr=0), "reference_lr must be"),
        (lambda: max_learning_rate(8, kind="newton", reference_batch=1, reference_lr=1), "kind must be"),
        (lambda: max_learning_rate(8, law="cubic", reference_batch=1, reference_lr=1), "law must be"),
        (lambda: max_learning_rate(8, law="saturating", reference_batch=1, reference_lr=1), "needs eigenvalue"),
        (lambda: batch_eigenvalue(-1.0, 1.0, 1.0), "eigenvalue must be"),
        (lambda: batch_eigenvalue(1.0, -1.0, 1.0), "noise must be"),
        (lambda: spiked_eigenvalue(2.0, -1.0), "ratio must be"),
        (lambda: fit_noise((10, 1.0), (20, 2.0)), "the larger batch must have the smaller eigenvalue"),
        (lambda: fit_noise((0, 2.0), (20, 1.0)), "first batch must be"),
        (lambda: effective_batch(8, math.nan), "dataset_size must be"),
        (lambda: effective_batch(math.nan), "batch_size must be"),
        (lambda: batch_eigenvalue(1.0, 1.0, 0.0), "batch must be"),
        (lambda: stability_bound(0.0, 0.9), "largest must be"),
        (lambda: stability_bound(-1.0, 0.9), "largest must be"),
        (lambda: stability_bound(1.0, -5.0), "momentum must be"),
        (lambda: stability_bound(1.0, 1.0), "momentum must be"),
        (lambda: heavy_ball(1.0, 0.1, max_momentum=-1.0), "max_momentum must be"),
        (lambda: heavy_ball(1.0, math.nan), "smallest must be"),
        (lambda: heavy_ball(0.0, 0.0), "largest must be"),
        (lambda: heavy_ball(1.0, 2.0), "smallest must be"),
    ],
)
def test_wrong_numbers_are_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: max_learning_rate(True, reference_batch=1, reference_lr=1), "batch_size must be a number"),
        (lambda: max_learning_rate("8", reference_batch=1, reference_lr=1), "batch_size must be a number"),
        (lambda: batch_eigenvalue(1.0, 1.0, "a"), "batch must be a number"),
        (lambda: fit_noise((10, "2"), (20, 1.0)), "first eigenvalue must be a number"),
        (lambda: heavy_ball(1.0, "0"), "smallest must be a number"),
        (lambda: stability_bound("1", 0.9), "largest must be a number"),
    ],
)
def test_what_is_no_number_is_named(call, match):
    with pytest.raises(TypeError, match=match):
        call()


def test_the_bound_and_the_pair_agree():
    lr, momentum = heavy_ball(7.0, 0.1)
    assert lr < stability_bound(7.0, momentum) < 1.01 * lr / (1 - (1 - math.sqrt(momentum)) ** 2 / 2)


# Two processes


def worker(rank: int, folder: str) -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    inputs, labels = normal(5, 16, 4), torch.arange(16) % 3
    mine = slice(8 * rank, 8 * rank + 8)
    alone, shared = (nn.Sequential(*[m for m in network() if not isinstance(m, nn.Dropout)]) for _ in range(2))
    parallel = nn.parallel.DistributedDataParallel(shared)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1.0) for model in (alone, shared)]
    schedulers = [
        LanczosLR(optimizers[0], every=3),
        LanczosLR(optimizers[1], every=3, process_group=dist.group.WORLD),
    ]
    for _ in range(10):
        schedulers[0].step(lambda: F.cross_entropy(alone(inputs), labels))
        schedulers[1].step(lambda: F.cross_entropy(parallel.module(inputs[mine]), labels[mine]))
        for model, optimizer, rows in ((alone, optimizers[0], slice(None)), (parallel, optimizers[1], mine)):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
        rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        assert rates[1] == pytest.approx(rates[0], rel=1e-9)
        everywhere = [None, None]
        dist.all_gather_object(everywhere, (rates[1], optimizers[1].param_groups[0]["momentum"]))
        assert everywhere[0] == everywhere[1]
    # What one rank cannot use, none uses.
    schedulers[1].due = 0
    with pytest.warns(UserWarning, match="no learning rate"):
        schedulers[1].step(lambda: F.cross_entropy(shared(inputs[mine]), labels[mine]) * (math.nan if rank else 1))
    assert schedulers[1].skipped == 1
    v = normal(9, sum(p.numel() for p in shared.parameters()))
    products = [
        Hessian(lambda: F.cross_entropy(alone(inputs), labels), list(alone.parameters())) @ v,
        Hessian(
            [lambda i=i: F.cross_entropy(alone(inputs[mine][i::2]), labels[mine][i::2]) for i in range(2)],
            list(alone.parameters()),
            process_group=dist.group.WORLD,
        )
        @ v,
    ]
    torch.testing.assert_close(products[0], products[1], rtol=1e-11, atol=1e-13)
    # Three micro-batches, two of them on one rank.
    rows = [[slice(0, 4), slice(4, 8)], [slice(8, 12)]]
    uneven = Hessian(
        [lambda r=r: F.cross_entropy(alone(inputs[r]), labels[r]) for r in rows[rank]],
        list(alone.parameters()),
        process_group=dist.group.WORLD,
    )
    whole = Hessian(lambda: F.cross_entropy(alone(inputs[:12]), labels[:12]), list(alone.parameters()))
    for left, right in [(uneven @ v, whole @ v), (uneven.loss, whole.loss), (uneven.gradient, whole.gradient)]:
        torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-13)
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no torch.distributed")
def test_two_processes_learn_what_one_does(tmp_path):
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)

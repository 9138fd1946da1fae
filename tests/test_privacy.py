"""The accountant against goldens and exact numbers, every lemma of the proof by numbers, and the sources of noise."""

from __future__ import annotations

import copy
import itertools
import math
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from optimzoo import privacy
from optimzoo.privacy import DefaultNoise, SecureNoise, Segment, epsilon, noise_std_for

DELTA = 1e-5
RNG = np.random.default_rng(0)


def dicesgd(steps, noise, error, rate, clip=1.0) -> list[Segment]:
    return [Segment(steps, noise, clip, error, rate)]


def with_orders(history, orders, shift=None, delta=DELTA) -> float:
    """Epsilon by Renyi divergence for these orders: lambda searched for, or at a shift."""
    library, kinds = privacy._library("dp_accounting"), privacy._kinds(history)
    if shift is None:
        _, shift = privacy._epsilon(kinds, delta, "rdp")
    return privacy._renyi(library, kinds, shift, delta, orders)


# Goldens


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "rdp", "pld"),
    [
        (1.0, 0.01, 1000, 2.1014, 1.8282),
        (1.1, 256 / 60000, 14062, 2.5966, 2.3817),
        (0.8, 0.02, 150, 3.6226, 2.9633),
        (1.0, 1.0, 1, 4.7285, 4.3772),
    ],
)
def test_without_error_it_is_the_accountant_of_dp_sgd(noise, rate, steps, rdp, pld):
    history = dicesgd(steps, 3 * noise, 0.0, rate, clip=3.0)
    assert epsilon(history, DELTA, accountant="rdp") == pytest.approx(rdp, abs=6e-5)
    assert epsilon(history, DELTA) == pytest.approx(pld, abs=6e-5)


@pytest.mark.parametrize(
    ("noise", "error", "rate", "steps", "rdp", "pld"),
    [(10.0, 1.0, 0.1, 20, 4.304, 3.976), (2.0, 0.02, 0.01, 500, 2.651, 2.435)],
)
def test_the_theorem_gives_its_goldens(noise, error, rate, steps, rdp, pld):
    history = dicesgd(steps, noise, error, rate)
    assert epsilon(history, DELTA) == pytest.approx(pld, abs=6e-4)
    assert with_orders(history, range(2, 513)) == pytest.approx(rdp, abs=6e-4)
    assert rdp - 6e-3 < epsilon(history, DELTA, accountant="rdp") <= rdp + 6e-4  # more orders give less


def test_the_theorem_gives_its_goldens_at_one_half():
    history = dicesgd(20, 10.0, 1.0, 0.1)
    (kind,) = privacy._kinds(history)
    middle = -kind.balance
    assert kind.multipliers(middle) == pytest.approx((10 * 0.5**0.5, 5 * 0.5**0.5))
    assert with_orders(history, range(2, 513), middle) == pytest.approx(6.063, abs=6e-4)
    library = privacy._library("dp_accounting")
    assert privacy._numeric(library, [kind], middle, DELTA, 1e-4) == pytest.approx(5.597, abs=6e-4)


@pytest.mark.parametrize(
    ("error", "rdp", "pld"),
    [(0, 1.009, 0.927), (0.01, 1.418, 1.26), (0.03, 2.25, 2.10), (0.1, 5.84, 5.42), (1, 53.0, 49.3), (10, 525, 488)],
)
def test_the_noise_that_a_ratio_of_thresholds_needs(error, rdp, pld):
    # Given to three digits; epsilon is about inversely proportional to the noise.
    assert epsilon(dicesgd(150, pld, error, 0.02), DELTA) == pytest.approx(2, rel=0.01)
    # These were found with whole orders and a coarser search, which asks for up to 5 % more noise.
    assert 1.84 < epsilon(dicesgd(150, rdp, error, 0.02), DELTA, accountant="rdp") < 2.006


# Calibration


@pytest.mark.parametrize(("error", "accountant"), [(0, "rdp"), (0, "pld"), (0.03, "rdp"), (1, "pld"), (10, "rdp")])
def test_calibration_inverts_epsilon_and_rounds_up(error, accountant):
    fixed = dict(max_grad_norm=2.0, error_norm_sum=2.0 * error, sample_rate=0.02, steps=150)
    noise = noise_std_for(2.0, DELTA, **fixed, accountant=accountant)

    def at(factor):
        return epsilon(dicesgd(150, factor * noise, 2.0 * error, 0.02, clip=2.0), DELTA, accountant=accountant)

    assert at(1.0002) <= 2.0 < at(0.997)


def test_calibration_says_what_it_cannot_reach():
    fixed = dict(max_grad_norm=1.0, sample_rate=0.5, steps=10, accountant="rdp")
    with pytest.raises(ValueError, match=r"target_epsilon=0.001 with delta=1e-15 is less than accountant='rdp'"):
        noise_std_for(1e-3, 1e-15, **fixed)


# It is a bound


def exact_gaussian(mu: float, delta: float) -> float:
    """Epsilon of one normal mechanism, sensitivity over noise mu (Balle and Wang, 2018)."""

    def excess(eps):
        return stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * stats.norm.cdf(-mu / 2 - eps / mu) - delta

    return optimize.brentq(excess, 0, 500) if excess(0) > 0 else 0.0


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (4.0, 10), (20.0, 300), (0.3, 1)])
def test_normal_mechanisms_are_bounded_from_above_and_closely(noise, steps, delta):
    exact = exact_gaussian(math.sqrt(steps) / noise, delta)
    found = epsilon(dicesgd(steps, noise, 0.0, 1.0), delta)
    assert exact <= found <= exact * 1.001 + 1e-4
    assert exact <= epsilon(dicesgd(steps, noise, 0.0, 1.0), delta, accountant="rdp") <= 1.6 * exact + 0.1


def test_without_sampling_the_split_costs_nothing_but_the_first_step():
    # All of (S, C) moves by at most C1 + 2 C2, and lambda = C1 / (C1 + 2 C2) gives just that.
    steps, noise, clip, error = 50, 30.0, 1.0, 0.5
    found = epsilon(dicesgd(steps, noise, error, 1.0, clip), DELTA)
    assert found == pytest.approx(exact_gaussian(math.sqrt(steps) * (clip + 2 * error) / noise, DELTA), rel=0.01)


def density(x, noise, centre):
    return np.exp(-(((x - centre) / noise) ** 2) / 2) / (noise * math.sqrt(2 * math.pi))


def hockey_stick(p, q, gamma, cell):
    return np.maximum(p - gamma * q, 0).sum() * cell


GRID = np.arange(-12, 12, 1e-3)


@pytest.mark.parametrize(("noise", "rate"), [(0.7, 0.1), (1.0, 0.5), (2.0, 0.02)])
def test_one_sampled_step_is_bounded_in_both_directions(noise, rate):
    without = density(GRID, noise, 0)
    sampled = (1 - rate) * without + rate * density(GRID, noise, 1)
    for delta in (1e-2, 1e-4):
        gamma = math.exp(epsilon(dicesgd(1, noise, 5.0, rate), delta))  # the first step has no error
        ways = [hockey_stick(p, q, gamma, 1e-3) for p, q in ((sampled, without), (without, sampled))]
        assert max(ways) <= delta * (1 + 1e-6)
        assert gamma == 1 or max(ways) > 0.98 * delta


@pytest.mark.parametrize(
    ("name", "values", "sign"),
    [
        ("steps", (1, 2, 20, 200, 2000), 1),
        ("noise", (0.7, 1.5, 3.0, 6.0, 60.0), -1),
        ("error", (0.0, 1e-6, 0.01, 0.05, 1.0), 1),
        ("rate", (1e-4, 0.02, 0.3, 1.0), 1),
        ("delta", (1e-9, 1e-6, 1e-3, 0.1), -1),
    ],
)
def test_the_bound_moves_the_right_way(name, values, sign):
    base = dict(steps=200, noise=3.0, error=0.05, rate=0.02, delta=DELTA)

    def at(value, accountant):
        change = {**base, name: value}
        delta = change.pop("delta")
        return epsilon(dicesgd(**change), delta, accountant=accountant)

    quick = [at(value, "rdp") for value in values]
    assert all(sign * (b - a) > 0 for a, b in itertools.pairwise(quick)), quick
    tight = [at(value, "pld") for value in values[1:3]]
    assert sign * (tight[1] - tight[0]) > 0, tight
    assert all(a <= b for a, b in zip(tight, quick[1:3], strict=True))


@settings(max_examples=3)
@given(
    st.integers(1, 5000),
    st.floats(0.3, 50),
    st.floats(0, 2),
    st.floats(1e-4, 1),
    st.sampled_from(["steps", "noise", "error"]),
    st.floats(1.001, 3),
)
def test_a_little_more_leak_is_never_a_smaller_bound(steps, noise, error, rate, name, factor):
    """Within the precision of the search for lambda."""
    less = dict(steps=steps, noise=noise, error=error, rate=rate)
    change = {"steps": math.ceil(steps * factor), "noise": noise / factor, "error": error * factor + 1e-3}[name]
    a, b = (epsilon(dicesgd(**s), DELTA, accountant="rdp") for s in (less, {**less, name: change}))
    assert a <= b * (1 + 1e-3) + 1e-9


def test_a_small_error_norm_is_nearly_none():
    plain = epsilon(dicesgd(150, 1.0, 0.0, 0.02), DELTA)
    for error in (1e-8, 5e-324):
        assert plain <= epsilon(dicesgd(150, 1.0, error, 0.02), DELTA) <= plain * 1.001


def test_extremes_are_answered_and_never_with_too_little():
    assert epsilon([], DELTA) == 0.0
    assert epsilon(dicesgd(0, 0.0, 1.0, 0.5), DELTA) == 0.0
    assert epsilon(dicesgd(1, 0.0, 0.0, 0.5), DELTA) == math.inf
    assert epsilon([*dicesgd(5, 1.0, 0.0, 0.5), *dicesgd(1, 0.0, 0.0, 0.5)], DELTA) == math.inf
    assert epsilon(dicesgd(1, 1e-300, 0.0, 0.5, clip=1e300), DELTA) == math.inf
    assert epsilon(dicesgd(2, 1.0, 1e300, 0.5), DELTA) == math.inf
    assert epsilon(dicesgd(3, 1e300, 0.0, 0.5, clip=1e-300), DELTA) < 0.1
    # For a delta so small that the grid's rounding would count, what is returned is the other accountant's.
    history = dicesgd(10, 1.0, 0.0, 0.1)
    assert epsilon(history, 1e-15) == epsilon(history, 1e-15, accountant="rdp") > exact_gaussian(0.1, 1e-15)
    # Rare sampling does not hide the error, and takes lambda to where the sampled part has enough noise.
    assert exact_gaussian(9**0.5, DELTA) * 0.999 < epsilon(dicesgd(10, 2.0, 1.0, 1e-12), DELTA) < 40


def test_what_is_no_number_does_not_become_a_claim(monkeypatch):
    monkeypatch.setattr(privacy._Kind, "multipliers", lambda self, shift: (math.nan, math.nan))
    with pytest.raises(ArithmeticError, match="no noise multiplier"):
        epsilon(dicesgd(10, 1.0, 1.0, 0.1), DELTA)


# Histories


def test_a_history_is_a_sum_over_settings():
    one, two, three = (
        Segment(30, 3.0, 1.0, 0.1, 0.05),
        Segment(20, 4.0, 2.0, 0.0, 0.1),
        Segment(50, 5.0, 1.0, 0.2, 0.02),
    )

    def of(*history):
        return epsilon(history, DELTA, accountant="rdp")

    whole = of(one, two, three)
    assert max(map(of, (one, two, three))) < whole
    assert of(one._replace(steps=10), one._replace(steps=20), two, three) == whole  # cut
    assert of(tuple(one), list(two), three) == whole  # as a checkpoint has them
    assert of(Segment(0, 0.0, 1.0, 0.0, 0.1), one, two, three) == whole  # no step, no loss
    # Each lambda has its own settings: where all are the worst, it is worse.
    assert whole < of(Segment(100, 3.0, 2.0, 0.2, 0.1))


def test_settings_are_told_apart_and_the_first_step_of_all_leaks_no_error():
    kinds = privacy._kinds([Segment(1, 1, 1, 2, 0.5), Segment(3, 1, 1, 0, 0.5), Segment(4, 1.0, 1.0, 2.0, 0.5)])
    assert [(kind.steps, kind.leaks) for kind in kinds] == [(5, 4), (3, 0)]
    # After steps without an error norm the error state may be large: nothing is free but the first step.
    kinds = privacy._kinds([Segment(3, 1, 1, 0, 0.5), Segment(4, 1, 1, 2, 0.5)])
    assert [(kind.steps, kind.leaks) for kind in kinds] == [(3, 0), (4, 4)]
    assert privacy._kinds([Segment(0, 1, 1, 1, 0.5), Segment(1, 1, 1, 1, 0.5)])[0].leaks == 0


def test_the_numeric_accountant_composes_settings_that_differ():
    # Without sampling all are normal mechanisms, and exact.
    history = [Segment(4, 8.0, 1.0, 0.0, 1.0), Segment(9, 10.0, 2.0, 0.0, 1.0)]
    assert epsilon(history, DELTA) == pytest.approx(exact_gaussian(math.sqrt(4 / 64 + 9 * 4 / 100), DELTA), rel=1e-3)


BAD = [
    (dict(steps=-1), ValueError, "steps must be a whole number >= 0, got -1"),
    (dict(steps=1.5), ValueError, "steps must be a whole number >= 0, got 1.5"),
    (dict(steps=True), ValueError, "steps must be a whole number >= 0, got True"),
    (dict(noise_std_sum=-1.0), ValueError, "noise_std_sum must be finite and >= 0, got -1.0"),
    (dict(noise_std_sum=math.nan), ValueError, "noise_std_sum must be finite and >= 0, got nan"),
    (dict(noise_std_sum="1"), TypeError, "noise_std_sum must be a number finite and >= 0, got '1'"),
    (dict(max_grad_norm=0.0), ValueError, "max_grad_norm must be finite and > 0, got 0.0"),
    (dict(max_grad_norm=math.inf), ValueError, "max_grad_norm must be finite and > 0, got inf"),
    (dict(error_norm_sum=-0.1), ValueError, "error_norm_sum must be finite and >= 0, got -0.1"),
    (dict(sample_rate=0.0), ValueError, r"sample_rate must be in \(0, 1\], got 0.0"),
    (dict(sample_rate=1.0000000000000002), ValueError, r"sample_rate must be in \(0, 1\], got 1.0000000000000002"),
    (dict(sample_rate=math.nan), ValueError, r"sample_rate must be in \(0, 1\], got nan"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_wrong_settings_are_named(change, error, message):
    good = Segment(1, 1.0, 1.0, 0.0, 0.5)
    with pytest.raises(error, match=r"history\[1\]\." + message):
        epsilon([good, good._replace(**change)], DELTA)
    if "noise_std_sum" not in change:
        fixed = {**good._asdict(), **change}
        del fixed["noise_std_sum"]
        with pytest.raises(error, match="^" + message):
            noise_std_for(1.0, DELTA, **fixed)


def test_wrong_arguments_are_named():
    for delta in (0.0, 1.0, -1e-5, math.nan):
        with pytest.raises(ValueError, match=r"delta must be in \(0, 1\), got"):
            epsilon([], delta)
        with pytest.raises(ValueError, match=r"delta must be in \(0, 1\), got"):
            noise_std_for(1.0, delta, max_grad_norm=1.0, sample_rate=0.1, steps=1)
    with pytest.raises(TypeError, match="delta must be a number"):
        epsilon([], "small")
    for target in (0.0, math.inf, math.nan, -1.0):
        with pytest.raises(ValueError, match="target_epsilon must be finite and > 0, got"):
            noise_std_for(target, DELTA, max_grad_norm=1.0, sample_rate=0.1, steps=1)
    with pytest.raises(ValueError, match="steps must be a whole number >= 1, got 0"):
        noise_std_for(1.0, DELTA, max_grad_norm=1.0, sample_rate=0.1, steps=0)
    with pytest.raises(ValueError, match="accountant must be one of 'pld', 'rdp', got 'gdp'"):
        epsilon([], DELTA, accountant="gdp")
    for item in ((1, 2), 3, "12345"):
        with pytest.raises(TypeError, match=r"history\[0\] must be a Segment, or 5 numbers, got"):
            epsilon([item], DELTA)


def test_without_the_packages_the_extra_is_named(monkeypatch):
    def gone(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(privacy, "import_module", gone)
    with pytest.raises(ImportError, match=r"dp-accounting is not installed.*extra dp: pip install 'optimzoo\[dp\]'"):
        epsilon(dicesgd(1, 1.0, 0.0, 0.5), DELTA)
    with pytest.raises(ImportError, match="cryptography is not installed"):
        SecureNoise()
    assert epsilon([], DELTA) == 0.0  # needs no package
    DefaultNoise().normal((3,))


# The lemmas of the proof, by numbers


def clip(v, bound):
    norm = np.linalg.norm(v)
    return v * min(1.0, bound / norm) if norm > 0 else v


vectors = st.lists(st.floats(-100, 100), min_size=3, max_size=3).map(np.array)
bounds = st.floats(0.01, 100)


@given(vectors, vectors, bounds)
def test_f1_projection_and_remainder_together_contract(e, other, bound):
    kept, left = clip(e, bound) - clip(other, bound), (e - clip(e, bound)) - (other - clip(other, bound))
    total = np.square(e - other).sum()
    assert np.square(kept).sum() + np.square(left).sum() <= total * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("cap", [False, True])
def test_f2_one_residual_leaks_at_most_its_square(cap):
    worst = 0.0
    for _ in range(300):
        bound, dimension = RNG.uniform(0.1, 3), RNG.integers(1, 6)
        e = RNG.normal(size=dimension) * RNG.uniform(0, 5)
        h = RNG.normal(size=dimension) * 10 ** RNG.uniform(-1, 1)
        other, leaked = e + h, 0.0
        for _ in range(60):
            increment = RNG.normal(size=dimension) * RNG.uniform(0, 2)
            leaked += np.square(clip(e, bound) - clip(other, bound)).sum()
            e, other = (v - clip(v, bound) for v in (e, other))
            if cap:
                e, other = clip(e, bound), clip(other, bound)
            e, other = e + increment, other + increment
        assert leaked <= h @ h * (1 + 1e-9)
        worst = max(worst, leaked / (h @ h))
    assert worst > 0.9  # the bound is reached


@given(vectors, vectors, bounds)
def test_f3_two_clipped_errors_are_at_most_twice_the_bound_apart(e, other, bound):
    assert np.linalg.norm(clip(e, bound) - clip(other, bound)) <= 2 * bound * (1 + 1e-9)


def renyi(p, q, order, cell):
    return np.log((p**order * q ** (1 - order)).sum() * cell) / (order - 1)


def test_two_mixtures_are_no_farther_apart_than_the_farthest_centres():
    """Step 4 of the proof: the error's part, whatever is known of the error."""
    bound, noise = 1.0, 1.3
    far = [density(GRID, noise, centre) for centre in (-bound, bound)]
    for _ in range(60):
        pair = []
        for _ in range(2):
            count = RNG.integers(1, 5)
            weights, centres = RNG.dirichlet(np.ones(count)), RNG.uniform(-bound, bound, count)
            pair.append(sum(w * density(GRID, noise, c) for w, c in zip(weights, centres, strict=True)))
        for order in (1.5, 2, 8):
            assert renyi(*pair, order, 1e-3) <= renyi(*far, order, 1e-3) * (1 + 1e-9)
        for gamma in (0.3, 1.0, 2.0, 10.0):
            assert hockey_stick(*pair, gamma, 1e-3) <= hockey_stick(*far, gamma, 1e-3) + 1e-9
    assert renyi(*far, 2, 1e-3) == pytest.approx(2 * (2 * bound) ** 2 / (2 * noise**2), rel=1e-6)


def test_what_comes_before_matters_no_more_than_a_product_of_the_worst_cases():
    """The lemma on composition, for kernels on four points that depend on the first outcome."""
    for _ in range(200):
        p, q = RNG.dirichlet(np.ones(4), 2)
        worst = RNG.dirichlet(np.ones(4), 2)  # dominates the kernels: they are what a channel makes of it
        channels = RNG.dirichlet(np.ones(4), (4, 4))
        kernels = [np.einsum("j,hjk->hk", side, channels) for side in worst]
        joint = [(first[:, None] * kernel).ravel() for first, kernel in zip((p, q), kernels, strict=True)]
        product = [np.outer(first, second).ravel() for first, second in zip((p, q), worst, strict=True)]
        for gamma in (0.2, 1.0, 3.0):
            assert hockey_stick(*joint, gamma, 1) <= hockey_stick(*product, gamma, 1) + 1e-12


def worlds(steps, clip_bound, error, rate, residual):
    """Means and probabilities of all that one record may add to the releases: a mixture over its samples.

    Its gradients have the norm ``clip_bound + residual``, and nothing else is in the data.
    """
    means, chances = [], []
    for mask in itertools.product((0, 1), repeat=steps):
        state, mean = 0.0, []
        for used in mask:
            released = min(state, error)
            mean.append(used * clip_bound + released)
            state += used * residual - released
        means.append(mean)
        chances.append(math.prod(rate if used else 1 - rate for used in mask))
    return np.array(means), np.array(chances)


def test_a_whole_run_of_two_steps_is_within_the_claim():
    """By quadrature, in both directions; and the accountant that knows of no error claims too little."""
    noise, error, rate, delta = 2.0, 2.0, 0.3, 1e-2
    means, chances = worlds(2, 1.0, error, rate, residual=100.0)
    x = np.arange(-12, 16, 0.1)
    one, two = (density(x[:, None], noise, centre[None]) for centre in means.T)
    record = np.einsum("xk,yk,k->xy", one, two, chances)
    nothing = np.outer(*2 * [density(x, noise, 0)])

    def spent(eps):
        return max(hockey_stick(p, q, math.exp(eps), 0.1**2) for p, q in ((record, nothing), (nothing, record)))

    assert spent(epsilon(dicesgd(2, noise, error, rate), delta)) <= delta
    assert spent(epsilon(dicesgd(2, noise, 0.0, rate), delta)) > 2 * delta


@pytest.mark.parametrize("residual", [0.5, 3.0, 1e6])
def test_a_whole_run_of_eight_steps_is_within_the_claim(residual):
    """By Monte Carlo: delta = E_P[(1 - gamma Q / P)_+], with the densities of all 256 ways to be sampled."""
    steps, noise, error, rate, delta = 8, 3.0, 1.0, 0.2, 0.02
    means, chances = worlds(steps, 1.0, error, rate, residual)
    draws = 15_000
    base = RNG.normal(size=(draws, steps)) * noise

    def log_ratio(outcome):
        """Of the densities with and without the record."""
        exponents = (outcome @ means.T - np.square(means).sum(1) / 2) / noise**2 + np.log(chances)
        top = exponents.max(1)
        return top + np.log(np.exp(exponents - top[:, None]).sum(1))

    with_record = log_ratio(base + means[RNG.choice(len(chances), draws, p=chances)])
    without = log_ratio(base)

    def spent(eps):
        """Means of both directions, and what they may be too large by."""
        ways = [np.maximum(-np.expm1(eps - loss), 0) for loss in (with_record, -without)]
        return max(way.mean() - 4 * way.std() / draws**0.5 for way in ways)

    assert spent(epsilon(dicesgd(steps, noise, error, rate), delta)) <= delta
    if residual > 1:
        assert spent(epsilon(dicesgd(steps, noise, 0.0, rate), delta)) > delta


# Noise

SOURCES = [DefaultNoise, SecureNoise, lambda: SecureNoise(draws=4)]


@pytest.mark.parametrize("build", SOURCES)
def test_noise_is_standard_normal_and_independent(build):
    source = build()
    # The seed is the system's, and each of these tests fails by chance once in 10^7 runs.
    draws = [source.normal((30_000,)).numpy() for _ in range(2)]
    z = np.concatenate(draws)
    assert stats.kstest(z, "norm").pvalue > 1e-7
    low, high = stats.chi2(len(z)).ppf([5e-8, 1 - 5e-8])
    assert low < (z**2).sum() < high
    assert abs(z.mean()) * len(z) ** 0.5 < 5.4
    for a, b in ((draws[0], draws[1]), (z[:-1], z[1:]), (z[::2], z[1::2]), (z[:30_000], z[30_000:][::-1])):
        assert abs((a * b).mean()) * len(a) ** 0.5 < 5.4


@pytest.mark.parametrize("build", SOURCES)
def test_noise_has_the_shape_asked_for(build):
    source = build()
    for shape in ((), (0,), (1,), (3,), (2, 0, 5), (3, 5), torch.Size([2, 3, 4])):
        z = source.normal(shape)
        assert (z.shape, z.dtype, z.device.type) == (torch.Size(shape), torch.float64, "cpu")
        assert z.isfinite().all()


@pytest.mark.parametrize("build", SOURCES)
def test_noise_cannot_be_repeated(build):
    source = build()
    torch.manual_seed(0)
    first = source.normal((4,))
    torch.manual_seed(0)
    others = [source, build(), copy.deepcopy(source), copy.copy(source), pickle.loads(pickle.dumps(source))]
    drawn = [first, *(other.normal((4,)) for other in others)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    assert getattr(others[-1], "draws", 1) == getattr(source, "draws", 1)
    state = torch.get_rng_state()
    source.normal((4,))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("build", SOURCES)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # the child only writes
def test_a_forked_process_draws_other_noise(build):
    source = build()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, source.normal((4,)).numpy().tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 32) != source.normal((4,)).numpy().tobytes()
    os.close(read)
    os.close(write)


def test_a_generator_makes_default_noise_reproducible_and_is_not_copied():
    a, b = (DefaultNoise(torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a.normal((5,)), b.normal((5,)))
    assert not torch.equal(copy.deepcopy(a).normal((5,)), b.normal((5,)))
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator or None, got int"):
        DefaultNoise(3)


def test_secure_noise_is_box_muller_of_the_cipher_with_a_key_for_each_draw(monkeypatch):
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    keys = []

    def urandom(count):
        keys.append(bytes([len(keys) + 1] * count))
        return keys[-1]

    monkeypatch.setattr(privacy.os, "urandom", urandom)
    z = SecureNoise().normal((3,)).numpy()
    stream = Cipher(algorithms.ChaCha20(keys[0], bytes(16)), mode=None).encryptor().update(bytes(32))
    words = np.frombuffer(stream, dtype="<u8") >> np.uint64(11)
    length = np.sqrt(-2 * np.log((words[:2] + 1.0) * 2.0**-53))
    turn = 2 * np.pi * (words[2:] * 2.0**-53)
    np.testing.assert_allclose(z, [*(length * np.cos(turn)), (length * np.sin(turn))[0]], rtol=1e-13)
    SecureNoise(draws=2).normal((3,))
    assert len(keys) == len({*keys}) == 3
    assert {*map(len, keys)} == {32}
    # The largest number that there is: the smallest uniform is 2^-53.
    assert math.sqrt(-2 * math.log(2.0**-53)) < 8.58


def test_wrong_draws_are_named():
    for draws in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"draws must be a whole number >= 1, got"):
            SecureNoise(draws=draws)

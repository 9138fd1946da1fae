"""The tests of the gradient's noise and the schedule: laws, the reference, sources, and what goes wrong."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from reference import batch_size as reference
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

import optimzoo
from optimzoo import AdaptiveBatchSampler, AdaptiveBatchSize, SamplesLR, gradient_noise, ops
from optimzoo.batch_sampler import split
from optimzoo.batch_size import next_batch_size
from optimzoo.gradient_noise import Moments, project_samples, sum_samples

THRESHOLDS = dict(eta=0.5, theta=0.4, nu=0.7)
TESTS = ("norm", "inner_product", "augmented", "coordinatewise")


def schedule_of(params, batch_size, test="norm", *, micro=None, **options):
    """A schedule, and a sampler whose first batch has been drawn."""
    sampler = AdaptiveBatchSampler(
        range(9000), batch_size, max_micro_batch_size=micro, max_batch_size=options.pop("max_batch_size", 9000)
    )
    schedule = AdaptiveBatchSize(torch.optim.SGD(params, lr=0.1), sampler, test, **{**THRESHOLDS, **options})
    schedule.batches = iter(sampler)
    return schedule


def cut(vectors: np.ndarray) -> list[np.ndarray]:
    """Vectors of samples as the gradients of two parameters, one of two dimensions."""
    first = 2 * (vectors.shape[1] // 2)
    return [vectors[:, :first].reshape(len(vectors), 2, -1), vectors[:, first:]]


def parameters(dim: int, dtype=torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(part.shape[1:], dtype=dtype)) for part in cut(np.zeros((1, dim)))]


def wanted(vectors: np.ndarray, test: str, source: str = "per_sample", **options) -> float:
    """What a test asks for after one batch with these gradients of samples."""
    params = parameters(vectors.shape[1])
    schedule = schedule_of(params, len(vectors), test, micro=1 if source == "micro_batch" else None, **options)
    next(schedule.batches)
    if source == "per_sample":
        for param, samples in zip(params, cut(vectors), strict=True):
            param.grad_sample = torch.from_numpy(samples.copy())
    else:
        for rows in zip(*cut(vectors), strict=True):
            loss = sum((param * torch.from_numpy(row)).sum() for param, row in zip(params, rows, strict=True))
            (schedule.weight * loss).backward()
            if schedule.remaining:
                next(schedule.batches)
    schedule.step()
    return schedule.wanted


def literal(vectors: np.ndarray, test: str, quantile: float = 1.0) -> float:
    eta, theta, nu = THRESHOLDS.values()
    return {
        "norm": lambda: reference.norm_test(vectors, eta),
        "inner_product": lambda: reference.inner_product_test(vectors, theta),
        "augmented": lambda: reference.augmented_test(vectors, theta, nu),
        "coordinatewise": lambda: reference.coordinate_test(vectors, eta, quantile),
    }[test]()


def noisy(seed: int, samples: int, dim: int = 7, noise: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=dim) + noise * rng.normal(size=(samples, dim))


seeds = st.integers(0, 10**6)
each_test = pytest.mark.parametrize("test", TESTS)
each_source = pytest.mark.parametrize("source", ["per_sample", "micro_batch"])


@each_source
@each_test
@given(seed=seeds, samples=st.integers(2, 9), noise=st.floats(0.01, 100))
def test_both_sources_are_the_reference(test, source, seed, samples, noise):
    vectors = noisy(seed, samples, noise=noise)
    # A variance that is a small part of what it is the difference of keeps as many digits fewer.
    lost = 1 + noise**-2
    assert wanted(vectors, test, source) == pytest.approx(literal(vectors, test), rel=1e-12 + 1e-15 * lost)


@given(seed=seeds, quantile=st.floats(0.01, 1))
def test_quantile_of_the_coordinates_is_the_reference(seed, quantile):
    vectors = noisy(seed, 8, dim=31)
    vectors[:, 3] = 2.0  # no variance: does not count
    vectors[:, 4] = [1, -1] * 4  # no mean: asks for all there is
    for source in ("per_sample", "micro_batch"):
        assert wanted(vectors, "coordinatewise", source, quantile=quantile) == pytest.approx(
            literal(vectors, "coordinatewise", quantile), rel=1e-12
        )


def moments_of(vectors: np.ndarray) -> Moments:
    mean = vectors.mean(0)
    inner = vectors @ mean
    return Moments(len(vectors), len(vectors), (vectors**2).sum(), mean @ mean, inner @ inner)


@given(seed=seeds, samples=st.integers(2, 40), dim=st.integers(2, 9))
def test_variance_is_that_along_the_mean_and_that_across_it(seed, samples, dim):
    vectors = noisy(seed, samples, dim)
    moments, mean = moments_of(vectors), vectors.mean(0)
    across = vectors - np.outer(vectors @ mean, mean) / (mean @ mean)
    orthogonal = (across**2).sum() / (samples - 1)
    assert moments.orthogonal_variance == pytest.approx(orthogonal, rel=1e-9, abs=1e-9)
    total = moments.inner_variance / moments.mean_square + moments.orthogonal_variance
    assert total == pytest.approx(moments.variance, rel=1e-12)


@given(seed=seeds, samples=st.integers(2, 20), theta=st.floats(0.05, 3), nu=st.floats(0.05, 3))
def test_which_test_implies_which(seed, samples, theta, nu):
    vectors = noisy(seed, samples)

    def passes(test, **thresholds):
        return wanted(vectors, test, **{**dict(eta=1.0, theta=1.0, nu=1.0), **thresholds}) <= samples * (1 + 1e-9)

    if passes("augmented", theta=theta, nu=nu):
        assert passes("norm", eta=math.hypot(theta, nu))
    if passes("norm", eta=theta):
        assert passes("augmented", theta=theta, nu=theta)
    assert wanted(vectors, "coordinatewise") >= wanted(vectors, "norm") * (1 - 1e-12)


@each_source
@each_test
@given(seed=seeds, samples=st.integers(2, 9), scale=st.floats(1e-3, 1e3))
def test_order_and_scale_change_nothing(test, source, seed, samples, scale):
    vectors = noisy(seed, samples)
    expected = pytest.approx(wanted(vectors, test, source), rel=1e-9)
    assert wanted(np.random.default_rng(seed).permutation(vectors), test, source) == expected
    assert wanted(scale * vectors, test, source) == expected


@pytest.mark.parametrize("test", TESTS[:3])
@given(seed=seeds)
def test_a_rotation_changes_nothing(test, seed):
    vectors = noisy(seed, 6)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed + 1).normal(size=(7, 7)))
    assert wanted(vectors @ rotation, test) == pytest.approx(wanted(vectors, test), rel=1e-9)


@given(seed=seeds)
def test_the_coordinate_test_does_not_see_scales_of_coordinates(seed):
    vectors = noisy(seed, 6)
    scaled = vectors * np.random.default_rng(seed + 1).uniform(0.1, 10, 7)
    assert wanted(scaled, "coordinatewise") == pytest.approx(wanted(vectors, "coordinatewise"), rel=1e-9)


@each_source
@each_test
def test_equal_gradients_ask_for_nothing(test, source):
    assert wanted(np.tile(noisy(0, 1), (5, 1)), test, source) == pytest.approx(0, abs=1e-10)


@given(seed=seeds, samples=st.integers(2, 9))
def test_a_batch_given_twice(seed, samples):
    vectors = noisy(seed, samples)
    twice = wanted(np.concatenate([vectors, vectors]), "norm")
    assert twice == pytest.approx(wanted(vectors, "norm") * 2 * (samples - 1) / (2 * samples - 1), rel=1e-9)


def test_variance_of_groups_is_that_of_samples_on_average():
    rng = np.random.default_rng(0)
    sizes = [1, 2, 5, 8]  # unequal
    found = []
    for _ in range(4000):
        groups = [rng.normal(size=(n, 3)) * [1, 2, 3] for n in sizes]
        means = np.array([group.mean(0) for group in groups])
        weights = np.array(sizes)
        mean = weights @ means / weights.sum()
        moments = Moments(4, sum(sizes), float(weights @ (means**2).sum(1)), float(mean @ mean))
        assert moments.variance == pytest.approx(reference.group_variance(means, sizes), rel=1e-9)
        found.append(moments.variance)
    error = np.std(found) / math.sqrt(len(found))
    assert np.mean(found) == pytest.approx(14, abs=4 * error)


@given(
    current=st.integers(1, 10**6),
    asked=st.one_of(st.floats(0, 1e9), st.sampled_from([math.nan, math.inf, 0.0])),
    more=st.integers(0, 10**6),
    growth=st.one_of(st.none(), st.floats(1.001, 100)),
)
def test_the_next_batch_size_is_bounded_and_the_reference(current, asked, more, growth):
    options = {} if growth is None else dict(max_growth=growth)
    found = next_batch_size(current, asked, current + more, **options)
    assert isinstance(found, int)
    assert current <= found <= current + more
    expected = reference.next_batch_size(current, asked, current + more, growth)
    # The reference's bound may forbid growth for good; here one sample more is always allowed.
    assert found == expected or (growth and found == current + 1 > growth * current)
    free = next_batch_size(current, asked, current + more, min_batch_size=1, **options)
    assert 1 <= free <= found


@given(st.integers(1, 2000), st.integers(1, 8), st.one_of(st.none(), st.integers(1, 64)), st.integers(1, 4))
def test_splits_are_the_reference(size, ranks, micro, first):
    for limit in (size, 2 * size, 10**6):
        try:
            expected = reference.split(size, ranks, micro, first, limit)
        except ValueError:
            with pytest.raises(ValueError, match="no batch of at most"):
                split(size, ranks, micro, first, limit)
            continue
        found = split(size, ranks, micro, first, limit)
        assert (found.micro_batch_size, found.accumulation_steps, found.batch_size) == expected
        assert found.batch_size <= limit
        assert micro is None or found.micro_batch_size <= micro


@given(
    arrays(
        np.float64,
        (4, 6),
        elements=st.one_of(st.sampled_from([0.0, math.nan, math.inf, 1e-170, 1e170]), st.floats(-1, 1)),
    ),
    st.sampled_from(TESTS),
    st.sampled_from(["per_sample", "micro_batch"]),
)
def test_whatever_the_gradient_the_batch_size_is_one(vectors, test, source):
    params = parameters(6)
    schedule = schedule_of(params, 4, test, micro=1 if source == "micro_batch" else None, max_batch_size=77)
    for _ in range(2):
        for row in vectors:
            if source == "micro_batch" or schedule.sampler.current is None:
                next(schedule.batches)
            rows = zip(params, cut(row[None]), strict=True)
            loss = sum((param * torch.from_numpy(part[0])).sum() for param, part in rows)
            if source == "micro_batch":
                (schedule.weight * loss).backward()
            if schedule.remaining == 0:
                break
        if source == "per_sample":
            for param, samples in zip(params, cut(vectors), strict=True):
                param.grad_sample = torch.from_numpy(samples.copy())
        if source == "micro_batch" and schedule.remaining:
            break  # the batch grew past these gradients
        if source == "per_sample" and sum(schedule.sampler.current.shares) != 4:
            break
        before = schedule.sampler.batch_size
        schedule.step()
        assert before <= schedule.sampler.batch_size <= 77
        assert schedule.tests + schedule.skips >= 1
        for param in params:
            param.grad = None


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
@each_source
@each_test
def test_a_gradient_that_is_zero_or_not_finite_is_skipped(test, source, value):
    vectors = np.full((4, 6), value)
    assert math.isnan(wanted(vectors, test, source))


def train(model, optimizer, schedule, loader, steps=None, lrs=None):
    """The loop of the documentation; returns the sizes of the batches and the losses."""
    sizes, total, count = [], 0.0, 0
    for inputs, targets in loader:
        loss = schedule.weight * nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        total, count = total + loss.item(), count + len(inputs)
        if schedule.remaining:
            continue
        optimizer.step()
        schedule.step()
        if lrs:
            lrs.step()
        optimizer.zero_grad()
        sizes.append((count, total))
        total, count = 0.0, 0
        if len(sizes) == steps:
            break
    return sizes


def task(micro=8, workers=0, batch_size=16, optimizer=torch.optim.SGD, **options):
    torch.manual_seed(0)
    inputs = torch.randn(300, 4)
    data = TensorDataset(inputs, inputs.square().sum(1, keepdim=True))
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    sampler = AdaptiveBatchSampler(
        data, batch_size=batch_size, max_micro_batch_size=micro, generator=torch.Generator().manual_seed(1)
    )
    loader = DataLoader(data, batch_sampler=sampler, num_workers=workers)
    built = optimizer(model.parameters(), lr=0.01)
    return model, built, AdaptiveBatchSize(built, sampler, **{"eta": 0.5, **options}), loader


@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, optimzoo.AdaGradNorm, optimzoo.AdaBelief]
)
def test_any_optimizer_is_stepped_as_without_a_schedule(optimizer):
    model, built, schedule, loader = task(optimizer=optimizer)
    other = copy.deepcopy(model)
    plain = optimizer(other.parameters(), lr=0.01)
    for inputs, targets in loader:
        (schedule.weight * nn.functional.mse_loss(model(inputs), targets)).backward()
        (schedule.weight * 0 + nn.functional.mse_loss(other(inputs), targets) / schedule.accumulation_steps).backward()
        if schedule.remaining == 0:
            built.step(), plain.step()
            schedule.step()
            built.zero_grad(), plain.zero_grad()
    assert schedule.samples == 300
    assert schedule.sampler.epoch == 1
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)  # 1 / 3 is not the weight of a short micro-batch
    assert schedule.sampler.batch_size > 16


def test_gradients_add_up_to_the_mean_of_the_batch_where_micro_batches_are_unequal():
    model, _, schedule, loader = task(micro=6, batch_size=16)
    seen = []
    for inputs, targets in loader:
        seen.append((inputs, targets))
        (schedule.weight * nn.functional.mse_loss(model(inputs), targets)).backward()
        if schedule.remaining == 0:
            break
    assert [len(inputs) for inputs, _ in seen] == [6, 5, 5]
    found = [param.grad.clone() for param in model.parameters()]
    model = copy.deepcopy(model)
    model.zero_grad()
    nn.functional.mse_loss(model(torch.cat([x for x, _ in seen])), torch.cat([y for _, y in seen])).backward()
    for left, right in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(left, right.grad)


def test_clipping_does_not_change_the_statistics():
    found = []
    for bound in (None, 1e-3):
        model, optimizer, schedule, loader = task()
        for inputs, targets in loader:
            (schedule.weight * nn.functional.mse_loss(model(inputs), targets)).backward()
            if schedule.remaining == 0:
                break
        if bound:
            nn.utils.clip_grad_norm_(model.parameters(), bound)
        optimizer.step()
        schedule.step()
        found.append(schedule.noise_scale)
    assert found[0] == found[1]


@each_test
def test_the_micro_batch_source_sees_parameters_that_not_every_pass_uses(test):
    draws = np.random.default_rng(0)
    one, two = (draws.normal(size=(4, 3)) + 1 for _ in range(2))
    one[:2] = 0  # two backward passes without the first parameter, two without the second
    two[2:] = 0
    params = [nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2)]
    schedule = schedule_of(params, 4, test, micro=1)
    for row, used in zip(np.where(np.arange(4)[:, None] < 2, two, one), [1, 1, 0, 0], strict=True):
        next(schedule.batches)
        (schedule.weight * (params[used] * torch.from_numpy(row)).sum()).backward()
    schedule.step()
    assert schedule.wanted == pytest.approx(literal(np.concatenate([one, two], 1), test), rel=1e-12)


class Hooked(nn.Linear):
    """A layer that writes the gradients of single samples of a mean loss, as Opacus' hooks do."""

    def forward(self, x):
        out = super().forward(x)

        def hook(gradient):
            gradient = len(x) * gradient
            self.weight.grad_sample = torch.einsum("no,ni->noi", gradient, x.detach())
            self.bias.grad_sample = gradient

        out.register_hook(hook)
        return out


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_three_lines_attach_it_to_a_loop():
    torch.manual_seed(0)
    inputs = torch.randn(9000, 4)
    dataset = TensorDataset(inputs, inputs.square().sum(1, keepdim=True))
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(Hooked(4, 8), nn.Tanh(), Hooked(8, 1))
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)

    sampler = optimzoo.AdaptiveBatchSampler(dataset, batch_size=64, max_batch_size=8192, generator=g)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=2)
    schedule = optimzoo.AdaptiveBatchSize(optimizer, sampler, test="norm", eta=0.5)

    sizes = []
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            for param in model.parameters():
                torch.testing.assert_close(param.grad_sample.mean(0), param.grad, rtol=1e-4, atol=1e-5)
            optimizer.step()
            schedule.step()
            sizes.append(len(x))
    assert sum(sizes) == schedule.samples == 18000
    assert sampler.batch_size > 64
    assert 0 < schedule.tests <= schedule.steps == len(sizes) < 2 * 9000 / 64


def test_per_sample_gradients_of_torch_func_and_in_several_parts():
    model, _, _, _ = task()
    params = dict(model.named_parameters())
    inputs, targets = torch.randn(12, 4), torch.randn(12, 1)

    def loss(values, x, y):
        return nn.functional.mse_loss(functional_call(model, values, (x[None],)), y[None])

    samples = vmap(grad(loss), (None, 0, 0))({k: p.detach() for k, p in params.items()}, inputs, targets)
    found = []
    for parts in (1, 3):
        schedule = schedule_of(list(params.values()), 12, "augmented")
        next(schedule.batches)
        for name, param in params.items():
            chunks = list(samples[name].chunk(parts))
            param.grad_sample = chunks if parts > 1 else chunks[0]
        schedule.step()
        found.append(schedule.wanted)
        schedule.sampler.set_epoch(1)
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    vectors = torch.cat([samples[name].flatten(1) for name in params], 1).numpy()
    assert found[0] == pytest.approx(literal(vectors, "augmented"), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_other_dtypes(dtype):
    torch.manual_seed(0)
    param = nn.Parameter(torch.zeros(5, dtype=dtype))
    rows = torch.randn(6, 5, dtype=dtype) + 1
    schedule = schedule_of([param], 6, "augmented")
    next(schedule.batches)
    param.grad_sample = rows
    schedule.step()
    real = torch.view_as_real(rows).flatten(1) if dtype.is_complex else rows
    expected = literal(real.double().numpy(), "augmented")
    assert schedule.wanted == pytest.approx(expected, rel=1e-6)
    schedule = schedule_of([param], 6, "norm", micro=1)
    for row in rows:
        next(schedule.batches)
        (schedule.weight * torch.real((param * row.conj()).sum())).backward()
    schedule.step()
    tolerance = 0.05 if dtype is torch.bfloat16 else 1e-4  # p.grad is rounded after each pass
    assert schedule.wanted == pytest.approx(literal(real.double().numpy(), "norm"), rel=tolerance)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 40), width=st.sampled_from([1, 15, 16, 17, 1500]), parts=st.integers(1, 3), seed=seeds)
def test_native_reductions_are_those_of_torch(dtype, rows, width, parts, seed):
    draw = torch.Generator().manual_seed(seed)
    samples = [list(torch.randn(rows, n, generator=draw).to(dtype).chunk(parts)) for n in (width, 3)]
    vectors = [torch.randn(n, generator=draw, dtype=torch.float64) for n in (width, 3)]

    def results():
        sums, squares = sum_samples(samples)
        centred, total = sum_samples(samples, vectors)
        return [*sums, *centred, squares, total, project_samples(samples, vectors)]

    native = results()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_noise, "_native", lambda name, samples: None)
        for left, right in zip(native, results(), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(bool(ops.missing("cpu")), reason="needs the native library")
def test_native_reductions_say_what_they_cannot_read():
    sums = [torch.zeros(3, dtype=torch.float64)]
    out, products = torch.zeros((), dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    samples = torch.zeros(4, 3)
    op, dots = torch.ops.optimzoo.sample_sums, torch.ops.optimzoo.sample_dots
    for wrong in (samples.T.contiguous().T, torch.zeros(4, 2), samples.int(), torch.zeros(())):
        with pytest.raises(RuntimeError, match=r"samples\[0\] must be contiguous on the CPU"):
            op([wrong], [], sums, out)
        with pytest.raises(RuntimeError, match=r"samples\[0\] must be contiguous on the CPU"):
            dots([wrong], sums, products)
    with pytest.raises(RuntimeError, match="samples, means and sums hold 1, 2 and 1 tensors"):
        op([samples], sums * 2, sums, out)
    with pytest.raises(RuntimeError, match="squares must be one float64 number"):
        op([samples], [], sums, out.float())
    with pytest.raises(RuntimeError, match="vectors holds 1 tensors, samples 2"):
        dots([samples] * 2, sums, products)
    torch.library.opcheck(op.default, ([samples], [], sums, out))
    torch.library.opcheck(dots.default, ([samples], sums, products))


def test_noise_of_known_trace_makes_the_batch_grow_like_one_over_the_squared_gradient():
    # Gradient 2 x with additive noise of trace 5, on x = 4, 2, 1, ..: T = 5 / (eta^2 |2 x|^2).
    draw = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.ones(5, dtype=torch.float64))
    found = []
    for scale in (4.0, 2.0, 1.0, 0.5):
        schedule = schedule_of([param], 4000, "norm")
        next(schedule.batches)
        param.grad_sample = 2 * scale + torch.randn(4000, 5, generator=draw, dtype=torch.float64)
        schedule.step()
        found.append(schedule.wanted * 0.25 * 5 * (2 * scale) ** 2 / 5)
    assert found == pytest.approx([1, 1, 1, 1], rel=0.1)


def step_with(schedule, vectors):
    next(schedule.batches)
    for param, samples in zip(schedule.params, cut(vectors), strict=True):
        param.grad_sample = torch.from_numpy(samples.copy())
    schedule.optimizer.step()
    schedule.step()


def test_interval_skips_and_the_end_of_testing():
    params = parameters(6)
    schedule = schedule_of(params, 4, test_interval=3, max_batch_size=6)
    needs = []
    for i in range(6):
        needs.append(schedule.needs_stats)
        step_with(schedule, noisy(i, sum(next_shares(schedule)), 6, noise=0.001))
    assert needs == [False, False, True] * 2
    assert (schedule.tests, schedule.skips, schedule.steps) == (2, 0, 6)
    schedule.test_interval = 1
    step_with(schedule, noisy(0, 4, 6, noise=100))
    assert schedule.sampler.batch_size == 6
    assert not schedule.needs_stats  # the largest there is: for good


def next_shares(schedule):
    sampler = schedule.sampler
    return sampler._cut(sampler.length - sampler.position, sampler.batch_size).shares


def test_averages_smooth_variance_and_norm_each_by_itself():
    rows = [noisy(i, 4, 6) for i in range(5)]
    schedule = schedule_of(parameters(6), 4, "norm", ema=0.5, max_batch_size=4, monotone=False)
    variance = square = 0.0
    for i, row in enumerate(rows, 1):
        step_with(schedule, row)
        moments = moments_of(row)
        variance = 0.5 * variance + 0.5 * moments.variance
        square = 0.5 * square + 0.5 * moments.mean_square
        debiased = (variance / (1 - 0.5**i)) / (0.25 * square / (1 - 0.5**i))
        assert schedule.wanted == pytest.approx(debiased, rel=1e-9)


def test_unbiased_subtracts_the_noise_from_the_norm():
    vectors = noisy(0, 8, noise=0.3)
    moments = moments_of(vectors)
    expected = moments.variance / (0.25 * (moments.mean_square - moments.variance / 8))
    assert wanted(vectors, "norm", unbiased=True) == pytest.approx(expected, rel=1e-9)
    pure = noisy(0, 8) - noisy(0, 8).mean(0) + 1e-3
    assert wanted(pure, "norm", unbiased=True) == wanted(pure, "norm")


@each_test
def test_the_noise_scale_is_the_reference_whatever_the_test(test):
    vectors = noisy(3, 5, 6)
    schedule = schedule_of(parameters(6), 5, test)
    step_with(schedule, vectors)
    assert schedule.noise_scale == pytest.approx(reference.noise_scale(vectors), rel=1e-12)


@given(seed=seeds, sizes=st.lists(st.integers(1, 6), min_size=2, max_size=5))
def test_samples_of_several_workers_pool_to_the_variance_of_all(seed, sizes):
    vectors = noisy(seed, sum(sizes))
    groups = np.split(vectors, np.cumsum(sizes)[:-1])
    assert moments_of(vectors).variance == pytest.approx(reference.pooled_variance(groups), rel=1e-9)


def test_growth_is_capped_and_the_batch_shrinks_only_where_it_may():
    schedule = schedule_of(parameters(6), 4, max_growth=2)
    step_with(schedule, noisy(0, 4, 6, noise=100))
    assert schedule.sampler.batch_size == 8
    step_with(schedule, noisy(0, 8, 6, noise=0.001))
    assert schedule.sampler.batch_size == 8
    schedule = schedule_of(parameters(6), 4, monotone=False)
    step_with(schedule, noisy(0, 4, 6, noise=2))
    grown = schedule.sampler.batch_size
    assert grown > 4
    step_with(schedule, noisy(0, grown, 6, noise=0.001))
    assert schedule.sampler.batch_size == 4


@pytest.mark.parametrize(("coupling", "power"), [("none", 0), ("sqrt", 0.5), ("linear", 1)])
@pytest.mark.parametrize("tensor", [False, True])
def test_learning_rates_follow_the_batch_size(coupling, power, tensor):
    schedule = schedule_of(parameters(6), 4, max_growth=4, lr_coupling=coupling, eta=0.01)
    group = schedule.optimizer.param_groups[0]
    if tensor:
        group["lr"] = torch.tensor(0.1, dtype=torch.float64)
    step_with(schedule, noisy(0, 4, 6, noise=100))
    assert float(group["lr"]) == pytest.approx(0.1 * 4**power)
    step_with(schedule, noisy(0, 16, 6, noise=100))
    assert float(group["lr"]) == pytest.approx(0.1 * 16**power)


@given(st.floats(0, 3000), st.sampled_from([(0, 1000, 0.0), (100, 1000, 0.01), (500, 2000, 0.1)]))
def test_learning_rates_by_samples_are_the_reference(samples, shape):
    warmup, total, low = shape
    schedule = schedule_of(parameters(6), 4)
    lrs = SamplesLR(schedule, total, warmup, low)
    schedule.samples = samples
    schedule.optimizer.step()
    lrs.step()
    expected = reference.learning_rate(samples, 0.1, low, warmup, total)
    assert lrs.get_last_lr()[0] == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_learning_rates_by_samples_resume_and_couple():
    schedule = schedule_of(parameters(6), 4, max_growth=4, lr_coupling="linear")
    lrs = SamplesLR(schedule, 100)
    step_with(schedule, noisy(0, 4, 6, noise=100))
    lrs.step()
    assert lrs.get_last_lr()[0] == pytest.approx(4 * reference.learning_rate(4, 0.1, 0, 0, 100))
    saved = copy.deepcopy((schedule.state_dict(), lrs.state_dict(), schedule.optimizer.state_dict()))
    assert "schedule" not in saved[1]
    other = schedule_of(parameters(6), 4, max_growth=4, lr_coupling="linear")
    again = SamplesLR(other, 100)
    for target, state in zip((other, again, other.optimizer), saved, strict=True):
        target.load_state_dict(state)
    assert again.get_last_lr() == lrs.get_last_lr()
    assert again.base_lrs == [0.1]
    with pytest.raises(ValueError, match="total_samples must be > warmup_samples"):
        SamplesLR(schedule, 10, 10)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(workers):
    options = dict(workers=workers, micro=6, batch_size=12, max_growth=1.3, ema=0.5, lr_coupling="sqrt")
    model, optimizer, schedule, loader = task(**options)
    lrs = SamplesLR(schedule, 600, 50)
    train(model, optimizer, schedule, loader, steps=7, lrs=lrs)
    parts = dict(model=model, optimizer=optimizer, schedule=schedule, sampler=schedule.sampler, lrs=lrs)
    saved = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
    assert schedule.sampler.state_dict()["position"] == schedule.samples

    again = task(**options)
    others = dict(model=again[0], optimizer=again[1], schedule=again[2], sampler=again[2].sampler)
    others["lrs"] = SamplesLR(again[2], 600, 50)
    for name, part in others.items():
        part.load_state_dict(saved[name])
    rest = train(*again, lrs=others["lrs"])

    whole = task(**options)
    lrs = SamplesLR(whole[2], 600, 50)
    sizes = train(*whole, lrs=lrs)
    assert rest == sizes[7:]
    assert sum(count for count, _ in sizes) == 300
    assert len({count for count, _ in sizes}) > 3  # it grew on both sides of the cut
    for left, right in zip(again[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(left, right)


def test_what_is_dropped_is_not_heard_of_again():
    model, optimizer, schedule, loader = task()
    train(model, optimizer, schedule, loader, steps=2)
    steps = schedule.steps
    dropped = AdaptiveBatchSize(optimizer, schedule.sampler)
    del dropped
    train(model, optimizer, schedule, loader, steps=2)
    assert schedule.steps == steps + 2


@each_test
def test_a_batch_that_was_left_in_the_middle_is_forgotten(test):
    params = parameters(6)
    schedule = schedule_of(params, 4, test, micro=1)
    vectors = noisy(0, 4, 6)

    def backward(row):
        rows = zip(params, cut(row[None]), strict=True)
        (schedule.weight * sum((p * torch.from_numpy(part[0])).sum() for p, part in rows)).backward()

    backward(vectors[0])  # of no batch
    for _ in range(2):
        next(schedule.batches)
        backward(100 * vectors[1])
    assert schedule.remaining == 2
    schedule.optimizer.zero_grad()
    schedule.batches = iter(schedule.sampler)
    for row in vectors:
        next(schedule.batches)
        backward(row)
    assert schedule.remaining == 0
    schedule.step()
    assert schedule.wanted == pytest.approx(literal(vectors, test), rel=1e-12)


def test_parameters_that_join_later_count():
    params = parameters(6)
    schedule = schedule_of(params[:1], 2, micro=1)
    schedule.optimizer.add_param_group({"params": params[1:]})
    schedule._watch()
    vectors = noisy(0, 2, 6)
    for rows in zip(*cut(vectors), strict=True):
        next(schedule.batches)
        loss = sum((p * torch.from_numpy(row)).sum() for p, row in zip(params, rows, strict=True))
        (schedule.weight * loss).backward()
    schedule.step()
    assert schedule.wanted == pytest.approx(literal(vectors, "norm"), rel=1e-12)


# What goes wrong.

SAMPLER = AdaptiveBatchSampler(range(100), 8, max_micro_batch_size=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(eta=0), r"eta must be finite and > 0, got 0"),
        (dict(eta=-1.0), r"eta must be finite and > 0, got -1.0"),
        (dict(theta=math.nan), r"theta must be finite and > 0, got nan"),
        (dict(nu=math.inf), r"nu must be finite and > 0, got inf"),
        (dict(test="nrom"), r"test must be one of 'norm', .*, got 'nrom'"),
        (dict(source="hope"), r"source must be one of 'per_sample', .*, got 'hope'"),
        (dict(test_interval=0), r"test_interval must be a whole number >= 1, got 0"),
        (dict(ema=1.0), r"ema must be in \[0, 1\), got 1.0"),
        (dict(max_growth=1), r"max_growth must be > 1, got 1"),
        (dict(quantile=0), r"quantile must be in \(0, 1\], got 0"),
        (dict(lr_coupling="cubic"), r"lr_coupling must be one of 'none', .*, got 'cubic'"),
        (dict(test="coordinatewise", ema=0.5), r"ema must be 0 for the coordinatewise test"),
        (dict(source="ddp"), r"source='ddp' needs model=, a DistributedDataParallel"),
        (dict(source="per_sample", model=nn.BatchNorm1d(3)), r"no meaning with batch normalisation"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(options, message):
    optimizer = torch.optim.SGD(parameters(6), lr=0.1)
    with pytest.raises(ValueError, match=message):
        AdaptiveBatchSize(optimizer, SAMPLER, **options)
    assert not any(param._post_accumulate_grad_hooks for param in optimizer.param_groups[0]["params"])


def test_sources_that_cannot_be_had():
    optimizer = torch.optim.SGD(parameters(6), lr=0.1)
    with pytest.raises(TypeError, match="sampler must be the AdaptiveBatchSampler that the DataLoader has as batch_s"):
        AdaptiveBatchSize(optimizer, DataLoader(range(10), batch_size=2))
    with pytest.raises(
        ValueError, match=r"source='micro_batch' needs two micro-batches or more.*steps=1 for batch_size=8"
    ):
        AdaptiveBatchSize(optimizer, AdaptiveBatchSampler(range(100), 8), source="micro_batch")
    with pytest.raises(ValueError, match="source='per_sample' needs two samples or more"):
        AdaptiveBatchSize(optimizer, AdaptiveBatchSampler(range(100), 1))
    plain = AdaptiveBatchSampler(range(100), 8, max_micro_batch_size=2, num_replicas=2, rank=0)
    with pytest.raises(ValueError, match=r"source='micro_batch' needs sharded parameters \(FSDP2\) on several ranks"):
        AdaptiveBatchSize(optimizer, plain)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"no variance to be found: params\[0\] of shape \(2, 3\) has no grad_sample"),
        (torch.zeros(5, 2, 3), r"grad_sample of params\[0\] has gradients of 5 samples, the batch has 4"),
        (torch.zeros(4, 7), r"grad_sample of params\[0\] must have shape \(4, 2, 3\), got \(4, 7\)"),
    ],
)
def test_a_step_without_variance_changes_nothing(value, message):
    params = parameters(6)[:1]
    schedule = schedule_of(params, 4)
    next(schedule.batches)
    params[0].grad, params[0].grad_sample = torch.zeros(2, 3, dtype=torch.float64), value
    before = schedule.state_dict(), schedule.sampler.state_dict()
    with pytest.raises(RuntimeError, match=message):
        schedule.step()
    assert repr((schedule.state_dict(), schedule.sampler.state_dict())) == repr(before)
    params[0].grad_sample = torch.randn(4, 2, 3, dtype=torch.float64)
    schedule.step()
    assert schedule.tests == 1


def test_gradients_that_are_freed_in_the_backward_pass_are_missed():
    param = nn.Parameter(torch.zeros(3))
    param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
    schedule = schedule_of([param], 4, micro=1)
    next(schedule.batches)
    with pytest.raises(RuntimeError, match="no gradient is left after backward"):
        param.sum().backward()


def test_a_step_at_the_wrong_place_says_so():
    param = nn.Parameter(torch.zeros(3))
    schedule = schedule_of([param], 4, micro=1)
    with pytest.raises(RuntimeError, match="no batch has been drawn from the sampler"):
        schedule.step()
    next(schedule.batches)
    param.sum().backward()
    with pytest.raises(RuntimeError, match="1 backward passes were seen for a batch of 4 micro-batches"):
        schedule.step()
    assert schedule.steps == 0


def test_a_state_that_lacks_something_changes_nothing():
    schedule = schedule_of(parameters(6), 4)
    before = repr((schedule.state_dict(), schedule.sampler.state_dict()))
    with pytest.raises(ValueError, match="state_dict lacks steps"):
        schedule.load_state_dict({"samples": 9})
    with pytest.raises(ValueError, match="state_dict lacks seed"):
        schedule.sampler.load_state_dict({"epoch": 3})
    assert repr((schedule.state_dict(), schedule.sampler.state_dict())) == before


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 2, sparse=True)
    schedule = schedule_of(list(table.parameters()), 4, micro=1)
    next(schedule.batches)
    with pytest.raises(RuntimeError, match="reads no sparse gradients"):
        table(torch.tensor([1])).sum().backward()


def test_no_variance_where_the_batch_is_one_sample_is_no_test():
    # The last batch of an epoch of five.
    param = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    sampler = AdaptiveBatchSampler(range(5), 2)
    schedule = AdaptiveBatchSize(torch.optim.SGD([param], lr=0.1), sampler)
    for batch in sampler:
        param.grad_sample = torch.randn(len(batch), 3, dtype=torch.float64) * 1e-3 + 1
        schedule.step()
    assert (schedule.tests, schedule.skips) == (2, 1)
    assert schedule.sampler.batch_size == 2


def passes_of(schedule, param, backward):
    """How many micro-batches remain after each of the batch, whose gradients ``backward`` leaves."""
    found = []
    for _ in range(schedule.accumulation_steps):
        next(schedule.batches)
        backward(schedule.weight * param.sum())
        found.append(schedule.remaining)
    return found


class Nested(torch.autograd.Function):
    """A backward pass within the backward pass, as in a reentrant checkpoint."""

    @staticmethod
    def forward(ctx, x, param):
        ctx.save_for_backward(x, param)
        return x * param.detach().sum()

    @staticmethod
    def backward(ctx, gradient):
        x, param = ctx.saved_tensors
        with torch.enable_grad():
            (x.detach() * param.sum()).backward(gradient)
        return gradient * param.detach().sum(), None


def test_a_pass_within_a_pass_is_not_counted():
    inner, outer = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(()))
    schedule = schedule_of([inner, outer], 3, micro=1)
    last = nn.Parameter(torch.ones(()))
    schedule.optimizer.add_param_group({"params": last})
    schedule._watch()
    found = passes_of(schedule, inner, lambda loss: (last * Nested.apply(outer * loss.detach(), inner)).backward())
    assert found == [2, 1, 0]
    schedule.step()


def test_more_passes_than_micro_batches_are_named():
    param = nn.Parameter(torch.ones(3))
    schedule = schedule_of([param], 3, micro=1)
    next(schedule.batches)
    loss = param.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward pass 2 of a batch of 3 micro-batches, of which 1 were drawn"):
        loss.backward()
    assert schedule.remaining == 2


def test_a_rate_that_groups_share_is_multiplied_once():
    params = parameters(6)
    schedule = schedule_of(params[:1], 4, max_growth=4, lr_coupling="linear", eta=0.01)
    rate = schedule.optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    schedule.optimizer.add_param_group({"params": params[1:], "lr": rate})
    step_with(schedule, noisy(0, 4, 6, noise=100))
    assert float(rate) == pytest.approx(0.4)


def test_gradients_of_the_batch_before_are_refused():
    (param,) = parameters(6)[:1]
    schedule = schedule_of([param], 4)
    next(schedule.batches)
    param.grad_sample = torch.randn(4, 2, 3, dtype=torch.float64) * 1e-3 + 1
    schedule.step()
    next(schedule.batches)
    with pytest.raises(RuntimeError, match=r"grad_sample of params\[0\] is still that of the batch before"):
        schedule.step()
    param.grad_sample.add_(1e-3)
    schedule.step()
    assert schedule.steps == 2


def test_micro_batches_without_backward_passes_are_refused():
    (param,) = parameters(6)[:1]
    schedule = schedule_of([param], 4, micro=2, source="per_sample", test_interval=9)
    next(schedule.batches)
    with pytest.raises(RuntimeError, match="no backward pass was seen"):
        schedule.step()


def test_a_size_set_by_hand_within_a_batch_leaves_its_test():
    param = nn.Parameter(torch.ones(3))
    for first, then in ((9000, 4), (4, 9000)):
        schedule = schedule_of([param], 4, micro=1)
        for i, size in enumerate((4, first, then, 4)):
            next(schedule.batches)
            schedule.sampler.batch_size = size
            (schedule.weight * (i + 1) * param.sum()).backward()
        schedule.step()
        assert schedule.tests == 1
        param.grad = None


def test_thresholds_of_any_size():
    assert wanted(noisy(0, 4), "norm", eta=1e160) == 0
    for wrong in (dict(quantile="a"), dict(max_growth=None)):
        with pytest.raises(TypeError, match="must be a number"):
            schedule_of(parameters(6), 4, **wrong)
    with pytest.raises(TypeError, match="schedule must be the AdaptiveBatchSize"):
        SamplesLR(torch.optim.SGD(parameters(6), lr=0.1), 100)


def test_hooks_go_with_the_schedule_and_with_the_parameters():
    params = parameters(6)
    schedule = schedule_of(params[:1], 4)
    schedule.optimizer.add_param_group({"params": params[1:]})
    schedule._watch()
    schedule.optimizer.param_groups.pop()
    schedule._watch()
    assert [len(param._post_accumulate_grad_hooks) for param in params] == [1, 0]
    for copied in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copied(schedule)
    del schedule
    assert not params[0]._post_accumulate_grad_hooks


@pytest.mark.parametrize(
    "entry", [dict(averages=[[1.0, 1.0]]), dict(averages=None), dict(steps=-1), dict(lr_factor=0.0), dict(wanted="a")]
)
def test_a_state_of_another_test_or_out_of_range_changes_nothing(entry):
    schedule = schedule_of(parameters(6), 4, "augmented")
    before = schedule.state_dict()
    with pytest.raises(ValueError, match=f"{next(iter(entry))} must be"):
        schedule.load_state_dict({**before, "samples": 5, **entry})
    assert repr(schedule.state_dict()) == repr(before)

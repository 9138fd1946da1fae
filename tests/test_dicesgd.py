"""DPSGD and DiceSGD: the reference, the rules of what is secret, and what torch.optim promises."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import dicesgd as reference
from steps import bits, normal, snapshot
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import optimzoo
from optimzoo import DPSGD, DiceSGD
from optimzoo.poisson import PoissonSampler
from optimzoo.privacy import Segment

SHAPES = [(3, 2), (), (4,), (0, 2)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Given:
    """A source of noise that gives what it was given."""

    def __init__(self, *values: torch.Tensor) -> None:
        self.values = list(values)

    def normal(self, shape):
        value = self.values.pop(0)
        assert value.shape == tuple(shape)
        return value.clone()


def parameters(dtype=torch.float64, shapes=SHAPES):
    return [normal(i, *shape).to(dtype).requires_grad_() for i, shape in enumerate(shapes)]


def samples(params, n, seed=0, scale=1.0):
    return [(scale * normal(100 * seed + i, n, *p.shape)).to(p.dtype) for i, p in enumerate(params)]


def write(params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad_sample = grad


def make(cls, params, **options):
    error = {"error_norm_sum": 0.7} if cls is DiceSGD else {}
    noise = {} if "noise_std_sum" in options else {"noise_multiplier": 1.0}
    base = dict(lr=0.1, max_grad_norm=1.0, expected_batch_size=4, sample_rate=0.5)
    return cls(params, **{**base, **error, **noise, **options})


both = pytest.mark.parametrize("cls", [DPSGD, DiceSGD])


# The method

SETTINGS = {
    "plain": {},
    "no-error": dict(error_norm_sum=0.0),
    "capped": dict(windup_cap=True),
    "automatic": dict(clipping="automatic"),
    "momentum": dict(momentum=0.9, weight_decay=0.1),
    "wide": dict(error_norm_sum=5.0, max_grad_norm=2.0),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_two_readings_of_the_paper_agree(name):
    settings = {"error_norm_sum": 0.7, "max_grad_norm": 1.0, **SETTINGS[name]}
    shapes = [shape for shape in SHAPES if 0 not in shape]
    params = parameters(shapes=shapes)
    noise = Given()
    optimizer = make(DiceSGD, params, noise_std_sum=0.3, **settings)
    optimizer._noise = noise
    state = reference.new_state([p.detach().numpy() for p in params])
    mean = reference.new_state([p.detach().numpy() for p in params])
    kinds = [[3], [], [2, 0, 4], [0], [1], [5, 5], [8]]
    for t, sizes in enumerate([*kinds, *kinds, *kinds]):
        z = [normal(1000 + 10 * t + i, *shape) for i, shape in enumerate(shapes)]
        noise.values = list(z)
        batches = [samples(params, n, seed=50 * t + k, scale=(0.1, 1.0, 30.0)[t % 3]) for k, n in enumerate(sizes)]
        if t == 4:
            batches[0][0][0, 1, 1] = np.inf
        if t == 5:
            batches[1][1][2], batches[0][2][0, 0] = np.nan, -np.inf
        arrays = [[grad.numpy() for grad in batch] for batch in batches]
        for k, batch in enumerate(batches):
            if t % 2 and k + 1 < len(batches):  # one way to accumulate, or the other
                write(params, batch)
                optimizer.accumulate()
                continue
            for param, grad in zip(params, batch, strict=True):
                previous = getattr(param, "grad_sample", None)
                param.grad_sample = grad if previous is None else [*previous, grad]
                if not isinstance(param.grad_sample, list):
                    param.grad_sample = [param.grad_sample]
        optimizer.step(empty=not batches)
        options = dict(
            C1=settings["max_grad_norm"],
            B=4,
            s=0.3,
            z=[v.numpy() for v in z],
            clipping=settings.get("clipping", "flat"),
            windup_cap=settings.get("windup_cap", False),
            lr=0.1,
            momentum=settings.get("momentum", 0.0),
            weight_decay=settings.get("weight_decay", 0.0),
        )
        released = reference.step(state, arrays, C2=settings["error_norm_sum"], **options)
        reference.mean_step(mean, arrays, c2=settings["error_norm_sum"] / 4, **options)
        for param, u, left, right in zip(params, released, state["params"], mean["params"], strict=True):
            np.testing.assert_allclose(param.grad.numpy(), u, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(param.detach().numpy(), left, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(right, left, rtol=1e-12, atol=1e-12)


def test_the_worked_example():
    (param,) = parameters(shapes=[(2,)])
    optimizer = make(DiceSGD, [param], noise_std_sum=0, error_norm_sum=0.5, expected_batch_size=2)
    released, errors = [], []
    for _ in range(3):
        param.grad_sample = torch.tensor([[3.0, 4.0], [0.0, -1.0]], dtype=torch.float64)
        optimizer.step()
        released.append(param.grad.tolist())
        errors.append(optimizer._error[param].tolist())
    np.testing.assert_allclose(released, [[0.3, -0.1], [0.45, 0.1], [0.45, 0.1]], rtol=1e-12)
    np.testing.assert_allclose(errors, [[2.4, 3.2], [4.5, 6.0], [6.6, 8.8]], rtol=1e-12)


@given(st.integers(0, 2**20), st.floats(0.05, 3), st.floats(0, 3))
def test_what_is_fed_back_in_the_end_is_what_was_cut_off(seed, bound, error):
    """With plain SGD, x - lr e moves along the unclipped gradients."""
    params = parameters(shapes=[(3, 2), (4,)])
    optimizer = make(DiceSGD, params, noise_std_sum=0, error_norm_sum=error, max_grad_norm=bound, lr=0.5)
    expected = [param.detach().clone() for param in params]
    for t in range(6):
        grads = samples(params, 3, seed=seed + t)
        write(params, grads)
        optimizer.step()
        for value, grad in zip(expected, grads, strict=True):
            value -= 0.5 / 4 * grad.sum(0)
    if error == 0:
        assert not optimizer._error
        return
    for param, value in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach() - 0.5 / 4 * optimizer._error[param], value, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("error", "reached"), [(0.0, 1 / 18), (0.2, 5 / 18), (0.5, 1.0)])
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_skewed_least_squares_is_solved_where_the_error_may_be_large_enough(error, reached, rate):
    """90 targets of 0 and 10 of 10: clipping alone finds the wrong mean."""
    targets = torch.tensor([0.0] * 90 + [10.0] * 10, dtype=torch.float64)
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    batch = 100 * rate
    optimizer = make(
        DiceSGD,
        [weight],
        lr=0.05 if rate == 1 else 0.02,
        noise_std_sum=0,
        max_grad_norm=0.5,
        error_norm_sum=error * batch,
        expected_batch_size=batch,
        sample_rate=rate,
    )
    draw = torch.Generator().manual_seed(0)
    values = []
    for _ in range(1500 if rate == 1 else 4000):
        taken = targets[torch.rand(100, generator=draw) < rate]
        weight.grad_sample = weight.detach() - taken[:, None]
        optimizer.step()
        values.append(weight.item())
    late = np.mean(values[len(values) // 2 :])
    assert late == pytest.approx(reached, rel=1e-3 if rate == 1 else 0.12)


@both
def test_gradients_within_the_bound_are_averaged_as_they_are(cls):
    params = parameters()
    optimizer = make(cls, params, noise_std_sum=0, max_grad_norm=1e3)
    grads = samples(params, 5)
    write(params, grads)
    optimizer.step()
    for param, grad in zip(params, grads, strict=True):
        torch.testing.assert_close(param.grad, grad.sum(0) / 4, rtol=1e-15, atol=1e-15)
    assert all(not error.any() for error in optimizer._error.values())


def test_without_an_error_it_is_dpsgd_bit_for_bit():
    runs = []
    for cls, options in ((DPSGD, {}), (DiceSGD, dict(error_norm_sum=0.0))):
        params = parameters(torch.float32)
        optimizer = make(cls, params, generator=torch.Generator().manual_seed(3), momentum=0.9, **options)
        for t in range(4):
            write(params, samples(params, 3, seed=t))
            optimizer.step()
        runs.append([bits(param) for param in params])
        assert not optimizer._error
    assert runs[0] == runs[1]


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_wide_and_rounded_once(cls, dtype):
    params = parameters(dtype, [(50,)])
    optimizer = make(cls, params, noise_std_sum=0.5, max_grad_norm=0.5)
    errors = torch.zeros(50, dtype=torch.float64)
    for t in range(3):
        noise = normal(70 + t, 50)
        optimizer._noise = Given(noise)
        grads = samples(params, 64, seed=t)
        write(params, grads)
        optimizer.step()
        wide = grads[0].double()
        size = wide.norm(dim=1, keepdim=True)
        weights = (0.5 / size).clamp(max=1)
        fed_back = errors * min(1.0, 0.7 / max(errors.norm().item(), 1e-300)) if cls is DiceSGD else 0 * errors
        expected = ((wide * weights).sum(0) + fed_back + 0.5 * noise) / 4
        errors += (wide * (1 - weights)).sum(0) - fed_back
        assert params[0].grad.dtype == dtype
        torch.testing.assert_close(params[0].grad.double(), expected, rtol=torch.finfo(dtype).eps / 2 + 2e-6, atol=3e-6)
        if cls is DiceSGD:
            assert optimizer._error[params[0]].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@both
def test_the_norm_is_that_of_all_parameters(cls):
    params = parameters(shapes=[(1,), (1,)])
    optimizer = make(cls, params, noise_std_sum=0, expected_batch_size=1, max_grad_norm=1.0)
    write(params, [torch.tensor([[3.0]]).double(), torch.tensor([[4.0]]).double()])
    optimizer.step()
    assert [param.grad.item() for param in params] == pytest.approx([0.6, 0.8], rel=1e-12)


@both
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30, 3e38, "inf", "nan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_released_is_finite_whatever_the_samples_are(cls, size, dtype):
    params = parameters(dtype, [(6,), (2,)])
    optimizer = make(cls, params, noise_std_sum=0, error_norm_sum=2.0) if cls is DiceSGD else None
    optimizer = optimizer or make(cls, params, noise_std_sum=0)
    for t in range(8):
        grads = samples(params, 4, seed=t)
        grads[0][1:3] = float(size) * grads[0][1:3].sign()
        write(params, grads)
        optimizer.step()
        released = torch.cat([param.grad for param in params]).double() * 4
        assert released.isfinite().all()
        assert released.norm() <= 4 * 1.0 + (2.0 if cls is DiceSGD else 0.0) + 1e-5


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_rounded_down(clipping, dtype):
    """So that what float32 rounds up stays within the bound."""
    params = parameters(dtype, [(500,)])
    optimizer = make(DPSGD, params, clipping=clipping, max_grad_norm=0.3)
    grads = samples(params, 50, scale=7.0)
    (weights,) = optimizer._weights([grads])
    clipped = weights * grads[0].double().norm(dim=1)
    assert (clipped <= 0.3 * (1 - (2e-14 if dtype == torch.float64 else 9e-7))).all()


def test_another_optimizer_takes_the_private_gradient():
    runs = []
    for private in (True, False):
        params = parameters()
        plain = torch.optim.AdamW(params, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
        base = lambda params, lr: torch.optim.AdamW(params, lr, betas=(0.8, 0.9), weight_decay=0.1)  # noqa: E731
        optimizer = make(DPSGD, params, lr=0.01, noise_std_sum=0, max_grad_norm=1e9, base=base) if private else plain
        for t in range(3):
            grads = samples(params, 4, seed=t)
            for param, grad in zip(params, grads, strict=True):
                param.grad_sample, param.grad = grad, grad.sum(0) / 4
            optimizer.step()
        runs.append([param.detach().clone() for param in params])
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["DiffGrad", "AdaBelief", "AdaGradNorm"])
def test_the_zoos_own_may_take_it(name):
    params = parameters()
    optimizer = make(DiceSGD, params, base=getattr(optimzoo, name), weight_decay=0.1)
    write(params, samples(params, 3))
    optimizer.step()
    assert optimizer.state is optimizer.base.state
    assert optimizer.state[params[0]]
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    other = make(DiceSGD, parameters(), base=getattr(optimzoo, name))
    with pytest.warns(UserWarning, match="the error state is secret"):
        other.load_state_dict(optimizer.state_dict())
    assert other.history == optimizer.history
    assert other.state is other.base.state
    assert other.state[other.param_groups[0]["params"][0]].keys() == optimizer.state[params[0]].keys()


# Noise


@both
def test_the_global_seed_does_not_determine_the_noise(cls):
    released = []
    for _ in range(2):
        torch.manual_seed(0)
        params = parameters()
        optimizer = make(cls, params)
        write(params, samples(params, 2))
        before = torch.get_rng_state()
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), before)
        released.append(params[0].grad.clone())
    assert not torch.equal(*released)


@both
@pytest.mark.parametrize("how", ["declared", "zero samples"])
def test_an_empty_batch_is_a_step_of_noise(cls, how):
    params = parameters(torch.float32)
    optimizer = make(cls, params)
    if how == "zero samples":
        write(params, samples(params, 0))
    optimizer.step(empty=how == "declared")
    assert all(param.grad.any() for param in params if param.numel())
    assert optimizer.history == [Segment(1, 1.0, 1.0, 0.7 if cls is DiceSGD else 0.0, 0.5)]


def test_micro_batches_have_noise_and_feedback_once():
    released = []
    for way in ("whole", "list", "accumulate"):
        params = parameters()
        optimizer = make(DiceSGD, params, generator=torch.Generator().manual_seed(1))
        for t in range(3):
            grads = samples(params, 6, seed=t)
            parts = [[grad[:2] for grad in grads], [grad[2:2] for grad in grads], [grad[2:] for grad in grads]]
            if way == "whole":
                write(params, grads)
            elif way == "list":
                write(params, [list(column) for column in zip(*parts, strict=True)])
            else:
                for part in parts:
                    write(params, part)
                    optimizer.accumulate()
                    assert all(param.grad_sample is None for param in params)
            optimizer.step()
        released.append([param.detach().clone() for param in params])
        assert optimizer.history == [Segment(3, 1.0, 1.0, 0.7, 0.5)]
    torch.testing.assert_close(released[1], released[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(released[2], released[0], rtol=1e-13, atol=1e-13)


# What is secret


def tensors_in(value, seen=None):
    """All tensors that can be reached."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from tensors_in(key, seen)
            yield from tensors_in(entry, seen)
    elif isinstance(value, list | tuple | set):
        for entry in value:
            yield from tensors_in(entry, seen)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value), seen)


@pytest.mark.parametrize("copied", ["pickle", "deepcopy", "save"])
def test_no_copy_has_the_error_state_or_the_noise(copied):
    params = parameters()
    optimizer = make(DiceSGD, params, generator=torch.Generator().manual_seed(1))
    for t in range(2):
        write(params, samples(params, 3, seed=t, scale=9.0))
        optimizer.step()
    assert any(error.any() for error in optimizer._error.values())
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    ways = {
        "pickle": lambda: pickle.loads(pickle.dumps(optimizer)),
        "deepcopy": lambda: copy.deepcopy(optimizer),
        "save": lambda: torch.load(buffer, weights_only=False),
    }
    with pytest.warns(UserWarning, match="the error state is secret"):
        clone = ways[copied]()
    public = {id(param) for group in clone.param_groups for param in group["params"]}
    found = [tensor for tensor in tensors_in(vars(clone)) if id(tensor) not in public]
    secret = [bits(error)[3] for error in optimizer._error.values() if error.numel()]
    assert not any(bits(tensor)[3] in secret for tensor in found if tensor.numel())
    assert clone.history == optimizer.history
    assert clone.param_groups is clone.base.param_groups
    before = [param.detach().clone() for group in clone.param_groups for param in group["params"]]
    for one in (optimizer, clone):
        own = [param for group in one.param_groups for param in group["params"]]
        write(own, samples(own, 3, seed=9))
        one.step()
    after = [param for group in clone.param_groups for param in group["params"]]
    assert not torch.equal(after[0], before[0])
    assert not torch.equal(after[0], params[0])  # the noise is another


def test_a_checkpoint_has_the_error_state_only_by_name():
    params = parameters()
    optimizer = make(DiceSGD, params, momentum=0.9)
    write(params, samples(params, 3, scale=9.0))
    optimizer.step()
    public = optimizer.state_dict()
    assert set(public) == {"state", "param_groups"}
    assert all(set(row) == {"momentum_buffer"} for row in public["state"].values())
    assert "error" not in repr(optimizer.state)
    private = copy.deepcopy(optimizer.state_dict(export_private_state=True))
    other = make(DiceSGD, [param.detach().clone().requires_grad_() for param in params], momentum=0.9)
    other.load_state_dict(private)
    own = other.param_groups[0]["params"]
    for t in range(3):
        for one, of in ((optimizer, params), (other, own)):
            one._noise = Given(*(normal(t, *shape) for shape in SHAPES))
            write(of, samples(of, 3, seed=t))
            one.step()
    assert [bits(param) for param in own] == [bits(param) for param in params]


def test_a_run_resumed_without_its_error_warns_once_and_counts_on():
    params = parameters()
    optimizer = make(DiceSGD, params)
    for _ in range(3):
        write(params, samples(params, 3, scale=9.0))
        optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed = make(DiceSGD, parameters(), noise_multiplier=2.0)
    with pytest.warns(UserWarning, match="the error state is secret") as caught:
        resumed.load_state_dict(torch.load(buffer))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    resumed.step(empty=True)
    assert resumed.history == [Segment(3, 1.0, 1.0, 0.7, 0.5), Segment(1, 2.0, 1.0, 0.7, 0.5)]


def test_steps_that_a_checkpoint_does_not_have_are_said():
    params = parameters()
    optimizer = make(DPSGD, params)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.step(empty=True)
    later = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(later)
    optimizer.step(empty=True)
    with pytest.warns(UserWarning, match="1 steps that were made here are not in the history that is loaded"):
        optimizer.load_state_dict(later)
    with pytest.warns(UserWarning, match="1 steps that were made here are not in the history that is loaded"):
        optimizer.load_state_dict(saved)
    optimizer.load_state_dict(later)


def test_a_state_dict_is_not_changed_by_later_steps():
    params = parameters()
    optimizer = make(DPSGD, params)
    optimizer.step(empty=True)
    saved = optimizer.state_dict()
    optimizer.step(empty=True)
    assert saved["param_groups"][0]["history"] == [(1, 1.0, 1.0, 0.0, 0.5)]


@both
def test_nothing_is_said_that_depends_on_values(cls, recwarn, capsys):
    for values in (0.0, 1.0, float("inf"), float("nan")):
        params = parameters(torch.float32)
        optimizer = make(cls, params)
        write(params, [torch.full((2, *param.shape), values) for param in params])
        optimizer.step()
        text = repr(optimizer)
        assert text == repr(make(cls, parameters(torch.float32))).replace(
            "history: []", f"history: {optimizer.param_groups[0]['history']}"
        )
    assert not recwarn.list
    assert capsys.readouterr() == ("", "")


# Epsilon


def test_epsilon_is_that_of_the_history():
    params = parameters()
    optimizer = make(DiceSGD, params, noise_multiplier=10.0, error_norm_sum=1.0, sample_rate=0.1)
    assert optimizer.epsilon(1e-5) == 0
    for _ in range(20):
        optimizer.step(empty=True)
    literal = reference.epsilon_rdp(20, 10.0, 1.0, 1.0, 0.1, 1e-5)  # at whole orders
    assert literal * 0.99 < optimizer.epsilon(1e-5, accountant="rdp") <= literal == pytest.approx(4.304, abs=1e-3)
    assert optimizer.epsilon(1e-5) == pytest.approx(3.976, rel=5e-3)


def test_without_noise_epsilon_is_infinite():
    optimizer = make(DPSGD, parameters(), noise_std_sum=0)
    optimizer.step(empty=True)
    assert optimizer.epsilon(1e-5) == float("inf")


def test_the_papers_calibration_has_no_epsilon():
    optimizer = make(DiceSGD, parameters(), noise_multiplier=2.0, error_norm_sum=3.0, privacy="paper")
    assert optimizer.noise_std_sum == pytest.approx(2 * (1 + 2 * 9) ** 0.5)
    with pytest.raises(RuntimeError, match='no epsilon is known with privacy="paper"'):
        optimizer.epsilon(1e-5)


# Wrong input


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lr=0), "lr must be finite and > 0, got 0"),
        (dict(lr=float("nan")), "lr must be finite and > 0"),
        (dict(max_grad_norm=0), "max_grad_norm must be finite and > 0, got 0"),
        (dict(max_grad_norm=-1.0), "max_grad_norm must be finite and > 0, got -1.0"),
        (dict(expected_batch_size=float("inf")), "expected_batch_size must be finite and > 0, got inf"),
        (dict(sample_rate=0), r"sample_rate must be in \(0, 1\], got 0"),
        (dict(sample_rate=1.5), r"sample_rate must be in \(0, 1\], got 1.5"),
        (dict(noise_multiplier=-0.1), "noise_multiplier must be finite and >= 0, got -0.1"),
        (dict(noise_std_sum=-0.1), "noise_std_sum must be finite and >= 0, got -0.1"),
        (dict(noise_multiplier=None), "give one of noise_multiplier and noise_std_sum, got None and None"),
        (dict(noise_multiplier=1, noise_std_sum=1), "give one of noise_multiplier and noise_std_sum, got 1 and 1"),
        (dict(clipping="per-layer"), "clipping must be one of flat, automatic, got 'per-layer'"),
        (dict(noise_source="dice"), "noise_source must be .*got 'dice'"),
        (dict(base=lambda params, lr: None), "base must return a torch.optim.Optimizer, got None"),
        (dict(allow_unused=1), "allow_unused must be True or False, got 1"),
        (dict(sampler=[[0, 1]]), "sampler must be a PoissonSampler .*got list: epsilon is that of batches"),
    ],
)
def test_settings_out_of_range_are_refused(cls, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(cls, parameters(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(error_norm_sum=-1), "error_norm_sum must be finite and >= 0, got -1"),
        (dict(error_norm_sum=float("inf")), "error_norm_sum must be finite and >= 0, got inf"),
        (dict(windup_cap=1), "windup_cap must be True or False, got 1"),
        (dict(privacy="trust me"), "privacy must be rigorous or paper, got 'trust me'"),
    ],
)
def test_settings_of_the_error_out_of_range_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(DiceSGD, parameters(), **options)


def test_the_sampler_must_have_the_rate():
    data = TensorDataset(torch.zeros(40, 1))
    sampler = PoissonSampler(data, 0.25, 10)
    make(DPSGD, parameters(), sample_rate=0.25, sampler=sampler)
    make(DPSGD, parameters(), sample_rate=0.25, sampler=DataLoader(data, batch_sampler=sampler))
    with pytest.raises(ValueError, match=r"sample_rate is 0\.5, the sampler's is 0\.25"):
        make(DPSGD, parameters(), sample_rate=0.5, sampler=sampler)
    with pytest.raises(ValueError, match="which shuffled ones do not"):
        make(DPSGD, parameters(), sample_rate=0.25, sampler=DataLoader(data, batch_size=10, shuffle=True))


@both
@pytest.mark.parametrize("bad", [torch.zeros(3, dtype=torch.complex64), torch.zeros(3).to_sparse()], ids=str)
def test_parameters_are_real_and_dense(cls, bad):
    with pytest.raises(ValueError, match="params must be real and dense"):
        make(cls, [bad.requires_grad_()])
    optimizer = make(cls, parameters())
    with pytest.raises(ValueError, match="params must be real and dense"):
        optimizer.add_param_group({"params": bad})
    assert len(optimizer.param_groups) == 1


def missing(params):
    write(params[1:], samples(params, 2)[1:])


def none(params):
    pass


def unequal(params):
    write(params, [*samples(params, 2)[:-1], samples(params, 3)[-1]])


def misshaped(params):
    write(params, [samples(params, 2)[0].mT.contiguous(), *samples(params, 2)[1:]])


def unbatched(params):
    write(params, [param.detach().clone() for param in params])


def integers(params):
    write(params, [grad.long() for grad in samples(params, 2)])


def sparse(params):
    write(params, [samples(params, 2)[0].to_sparse(), *samples(params, 2)[1:]])


def text(params):
    write(params, ["here", *samples(params, 2)[1:]])


def uneven(params):
    first, *rest = samples(params, 2)
    write(params, [[first, first.clone()], *rest])


def on_meta(params):
    write(params, [grad.to("meta") for grad in samples(params, 2)])


@both
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (none, r"no parameter has a grad_sample: attach PerSampleGradients.*step\(empty=True\)"),
        (missing, r"params\[0\] of group 0 has no grad_sample; where it has no part in the loss, set allow_unused"),
        (unequal, r"params\[3\] of group 0 and params\[0\] of group 0 have grad_sample of different numbers"),
        (
            misshaped,
            r"grad_sample of params\[0\] of group 0 must have shape \(samples, 3, 2\), got .*\(samples, 2, 3\)",
        ),
        (unbatched, r"grad_sample of params\[0\] of group 0 must have shape \(samples, 3, 2\)"),
        (integers, "must be dense and real, got .*int64"),
        (sparse, "must be dense and real, got torch.sparse_coo"),
        (text, "must be tensors, got str"),
        (uneven, r"grad_sample of params\[1\] of group 0 is of 1 micro-batches, of params\[0\] of group 0 2"),
        (on_meta, "must be on cpu, got meta"),
    ],
)
def test_samples_that_do_not_fit_change_nothing(cls, spoil, message):
    params = parameters()
    optimizer = make(cls, params, momentum=0.9)
    write(params, samples(params, 3, seed=1, scale=5.0))
    optimizer.step()
    spoil(params)
    before = snapshot(optimizer), bits(list(optimizer._error.values())), copy.copy(optimizer.history)
    for call in (optimizer.step, optimizer.accumulate):
        with pytest.raises(RuntimeError, match=message):
            call()
    assert (snapshot(optimizer), bits(list(optimizer._error.values())), optimizer.history) == before


def test_errors_name_parameters_by_their_names():
    model = nn.Linear(2, 1)
    optimizer = make(DPSGD, model.named_parameters())
    model.weight.grad_sample = torch.zeros(2, 1, 2)
    with pytest.raises(RuntimeError, match="bias has no grad_sample"):
        optimizer.step()


@both
def test_an_empty_batch_with_samples_is_an_error(cls):
    params = parameters()
    optimizer = make(cls, params)
    write(params, samples(params, 2))
    with pytest.raises(RuntimeError, match="the batch is said to be empty"):
        optimizer.step(empty=True)


@both
def test_samples_are_used_once(cls):
    params = parameters()
    optimizer = make(cls, params)
    grads = samples(params, 2)
    write(params, grads)
    optimizer.step()
    write(params, grads)
    with pytest.raises(RuntimeError, match="has been used by a step before"):
        optimizer.step()
    for grad in grads:
        grad.mul_(2)  # an engine that writes to the same memory again
    optimizer.step()
    assert sum(segment.steps for segment in optimizer.history) == 2


@both
def test_samples_are_used_once_in_all_micro_batches(cls):
    params = parameters()
    optimizer = make(cls, params)
    first, second = samples(params, 2), samples(params, 2, seed=1)
    for grads in (first, second):
        write(params, grads)
        optimizer.accumulate()
    write(params, first)
    with pytest.raises(RuntimeError, match="has been used by a step before"):
        optimizer.accumulate()
    write(params, [[grad, grad] for grad in samples(params, 2, seed=2)])
    with pytest.raises(RuntimeError, match="has the same samples twice"):
        optimizer.step()


@both
@pytest.mark.parametrize(
    ("name", "value"),
    [("max_grad_norm", 0.1), ("noise_std_sum", 9.0), ("expected_batch_size", 2.0), ("sample_rate", 0.1)],
)
def test_constants_do_not_change_within_a_batch(cls, name, value):
    """A batch that was clipped at one bound must not be counted as one that was clipped at another."""
    params = parameters()
    optimizer = make(cls, params)
    write(params, samples(params, 2, scale=100.0))
    optimizer.accumulate()
    setattr(optimizer, name, value)
    for go_on in (optimizer.step, optimizer.accumulate):
        with pytest.raises(RuntimeError, match=f"{name} was changed from .* to {value} between micro-batches"):
            go_on()
    optimizer.zero_grad()
    write(params, samples(params, 2))
    optimizer.step()
    assert [segment.steps for segment in optimizer.history] == [1]


@both
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_grad_norm", -1.0),
        ("noise_std_sum", float("nan")),  # which would be no noise
        ("noise_std_sum", -1.0),
        ("expected_batch_size", 0.0),
        ("sample_rate", 2.0),
    ],
)
def test_constants_are_looked_at_in_every_step(cls, name, value):
    params = parameters()
    optimizer = make(cls, params)
    setattr(optimizer, name, value)
    write(params, samples(params, 2))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"{name} must be"):
        optimizer.step()
    assert snapshot(optimizer) == before


@both
def test_samples_may_be_made_in_inference_mode(cls):
    params = parameters()
    optimizer = make(cls, params)
    with torch.inference_mode():
        grads = [grad.clone() for grad in samples(params, 2)]
    write(params, grads)
    optimizer.step()
    assert optimizer.history[0].steps == 1


@both
def test_unused_parameters_have_noise(cls):
    params = parameters()
    optimizer = make(cls, params, allow_unused=True)
    missing(params)
    optimizer.step()
    assert params[0].grad.any()
    optimizer.step()
    assert optimizer.history[0].steps == 2


@both
def test_frozen_parameters_stay_where_they_are(cls):
    params = parameters()
    params[0].requires_grad_(False)
    optimizer = make(cls, params)
    before = params[0].clone()
    write(params[1:], samples(params, 2)[1:])
    optimizer.step()
    assert params[0].grad is None
    assert torch.equal(params[0], before)


@both
def test_a_parameter_that_is_frozen_after_backward_has_no_gradient(cls):
    """Opacus leaves the gradient of the batch in p.grad, which has no noise."""
    params = parameters()
    optimizer = make(cls, params)
    write(params, samples(params, 2))
    params[0].grad = torch.ones_like(params[0])
    params[0].requires_grad_(False)
    before = params[0].clone()
    optimizer.step()
    assert torch.equal(params[0], before)
    assert params[0].grad is None
    assert params[0].grad_sample is None


@both
def test_groups_may_be_added_as_iterators(cls):
    optimizer = make(cls, parameters())
    layer = nn.Linear(2, 2).double()
    optimizer.add_param_group({"params": layer.parameters()})
    assert optimizer.param_groups[1]["params"] == [layer.weight, layer.bias]
    with pytest.raises(ValueError, match="params must be real and dense"):
        optimizer.add_param_group({"params": iter([torch.zeros(2, dtype=torch.complex64)])})


@both
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_the_smallest_numbers_are_clipped_too(cls, clipping):
    params = [torch.zeros(2, dtype=torch.float64, requires_grad=True)]
    bound = 4e-16  # whose weight would be less than a float64 can be, and is rounded up
    optimizer = make(cls, params, noise_std_sum=0, max_grad_norm=bound, expected_batch_size=1, clipping=clipping)
    write(params, [torch.tensor([[1e308, 0.0]]).double()])
    optimizer.step()
    assert params[0].grad.norm() <= bound


@both
def test_a_grad_scaler_is_refused(cls):
    params = parameters(torch.float32)
    optimizer = make(cls, params)
    scaler = torch.amp.GradScaler("cpu")
    write(params, samples(params, 2))
    for param in params:
        param.grad = torch.zeros_like(param)
    scaler.scale(torch.ones(()))
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="takes no GradScaler"):
        scaler.step(optimizer)
    assert snapshot(optimizer) == before
    optimizer.step()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d["param_groups"][0].pop("history"), "history of the first group must be a list of steps"),
        (lambda d: d["param_groups"][0].update(history=[3]), r"history\[0\] must be a Segment, or 5 numbers"),
        (lambda d: d["param_groups"][0].update(history=[(-1, 1.0, 1.0, 0.0, 0.5)]), "steps must be"),
        (lambda d: d["param_groups"][0].update(history=[(1, 1.0, 1.0, 0.0, 7.0)]), "sample_rate must be"),
        (lambda d: d.pop("state"), "state_dict lacks 'state'"),
        (lambda d: d["private_error"].update({9: torch.zeros(2)}), "private_error of parameter 9 does not fit"),
        (lambda d: d["private_error"].update({0: torch.zeros(2)}), "private_error of parameter 0 does not fit"),
        (lambda d: d.update(private_error=[torch.zeros(2)]), "private_error must be a dictionary"),
        (lambda d: d["param_groups"][0].update(history=[]), "private_error is that of steps, and history has none"),
    ],
)
def test_checkpoints_that_do_not_fit_change_nothing(spoil, message):
    params = parameters()
    optimizer = make(DiceSGD, params, momentum=0.9)
    write(params, samples(params, 3))
    optimizer.step()
    state_dict = copy.deepcopy(optimizer.state_dict(export_private_state=True))
    spoil(state_dict)
    before = snapshot(optimizer), bits(list(optimizer._error.values()))
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.load_state_dict(state_dict)
    assert (snapshot(optimizer), bits(list(optimizer._error.values()))) == before


# What torch.optim promises


@both
def test_the_closure_is_called_once_and_its_value_returned(cls):
    params = parameters()
    optimizer = make(cls, params)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(1)
        write(params, samples(params, 2))
        return 5.0

    with torch.no_grad():
        assert optimizer.step(closure) == 5.0
    assert calls == [1]
    assert optimizer.step(empty=True) is None


@both
def test_zero_grad_forgets_all_of_the_batch(cls):
    params = parameters()
    optimizer = make(cls, params, noise_std_sum=0)
    write(params, samples(params, 2))
    optimizer.accumulate()
    write(params, samples(params, 2))
    optimizer.zero_grad()
    assert all(param.grad is None and param.grad_sample is None for param in params)
    optimizer.step(empty=True)
    assert not any(param.grad.any() for param in params)


@both
def test_groups_have_settings_of_their_own(cls):
    params = parameters()
    optimizer = make(cls, [dict(params=params[:2], lr=0.0), dict(params=params[2:], lr=1.0)])
    before = [param.detach().clone() for param in params]
    optimizer.step(empty=True)
    assert torch.equal(params[0], before[0])
    torch.testing.assert_close(params[2].detach(), before[2] - params[2].grad)
    extra = parameters(shapes=[(2,)])[0]
    optimizer.add_param_group(dict(params=[extra], lr=0.5))
    assert optimizer.param_groups is optimizer.base.param_groups
    assert len(optimizer.param_groups) == 3
    start = extra.detach().clone()
    optimizer.step(empty=True)
    torch.testing.assert_close(extra.detach(), start - 0.5 * extra.grad)


@both
def test_schedulers_drive_the_step(cls):
    params = parameters()
    optimizer = make(cls, params, lr=1.0, noise_std_sum=1.0)
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.1)
    for rate in (1.0, 0.1, 0.01):
        before = params[0].detach().clone()
        optimizer.step(empty=True)
        torch.testing.assert_close(params[0].detach(), before - rate * params[0].grad)
        scheduler.step()


@both
def test_hooks_run_around_the_step_and_the_checkpoint(cls):
    optimizer = make(cls, parameters())
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: seen.append(state_dict.pop("extra")))
    optimizer.step(empty=True)
    assert seen == ["pre", "post"]
    state_dict = optimizer.state_dict()
    if cls is DiceSGD:
        with pytest.warns(UserWarning, match="the error state"):
            optimizer.load_state_dict(state_dict)
    else:
        optimizer.load_state_dict(state_dict)
    assert seen == ["pre", "post", 1]


def test_a_step_of_the_base_that_fails_has_been_released():
    params = parameters()

    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            raise ArithmeticError

    optimizer = make(DPSGD, params, base=Fails)
    with pytest.raises(ArithmeticError):
        optimizer.step(empty=True)
    assert params[0].grad is not None
    assert optimizer.history[0].steps == 1

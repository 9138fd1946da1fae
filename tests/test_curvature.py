"""Operators against dense derivatives, Lanczos against dense eigenvalues, and what neither can work with."""

from __future__ import annotations

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from steps import normal
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from optimzoo.curvature import GGN, Hessian, Preconditioned, Spectrum, lanczos, noise, quadrature

LABELS = torch.arange(12) % 3


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def relu() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def batchnorm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 3))


def conv() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(12, 3))


NETS = [mlp, relu, batchnorm, conv]


def prepared(net, dtype=torch.float64):
    model = net().to(dtype)
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.copy_(normal(i, *param.shape, dtype=dtype) / math.sqrt(param.shape[-1]))
    return model, normal(99, 12, 5, dtype=dtype)


def loss_of(model, inputs, labels=LABELS):
    return lambda: F.cross_entropy(model(inputs), labels)


def outputs_and_loss(model, inputs):
    def closure():
        outputs = model(inputs)
        return outputs, F.cross_entropy(outputs, LABELS)

    return closure


def dense(operator):
    eye = torch.eye(operator.shape[0], dtype=operator.dtype)
    return torch.stack([operator @ row for row in eye])


def flat_function(model, function):
    """A function of the flat parameters, for torch.func."""
    params = dict(model.named_parameters())

    def call(flat):
        pieces = flat.split([p.numel() for p in params.values()])
        copies = {name: x.view(p.shape) for (name, p), x in zip(params.items(), pieces, strict=True)}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return function(functional_call(model, {**copies, **buffers}, (call.inputs,)))

    return call, torch.cat([p.detach().reshape(-1) for p in params.values()])


def symmetric(seed: int, values: torch.Tensor) -> torch.Tensor:
    q, _ = torch.linalg.qr(normal(seed, len(values), len(values)))
    return q @ torch.diag(values) @ q.T


@pytest.mark.parametrize("net", NETS)
def test_the_hessian_is_the_dense_one_and_thirty_products_find_its_top(net):
    model, inputs = prepared(net)
    operator = Hessian(loss_of(model, inputs), list(model.parameters()), module=model)
    call, flat = flat_function(model, lambda outputs: F.cross_entropy(outputs, LABELS))
    call.inputs = inputs
    gradient = torch.func.grad(call)(flat)
    expected = torch.func.jacrev(torch.func.grad(call))(flat).detach()
    torch.testing.assert_close(dense(operator), expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(operator.gradient, gradient, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(operator.loss, call(flat), rtol=1e-14, atol=0)
    exact = np.linalg.eigvalsh(expected.numpy())[::-1]
    spectrum = lanczos(operator, 30)
    assert float(spectrum.values[0]) == pytest.approx(exact[0], rel=1e-6)
    assert float(spectrum.values[-1]) == pytest.approx(exact[-1], rel=1e-6)
    for value, error in zip(spectrum.values.tolist(), spectrum.errors.tolist(), strict=True):
        assert np.abs(exact - value).min() <= error + 1e-12 * exact[0]


@pytest.mark.parametrize("net", NETS)
def test_the_gauss_newton_matrix_is_the_dense_one(net):
    model, inputs = prepared(net)
    operator = GGN(outputs_and_loss(model, inputs), list(model.parameters()), module=model)
    call, flat = flat_function(model, lambda outputs: outputs.reshape(-1))
    call.inputs = inputs
    jacobian = torch.func.jacrev(call)(flat)
    slope = torch.func.grad(lambda z: F.cross_entropy(z.view(12, 3), LABELS))
    inner = torch.func.jacrev(slope)(call(flat))
    torch.testing.assert_close(dense(operator), jacobian.T @ inner @ jacobian, rtol=1e-10, atol=1e-12)
    assert lanczos(operator, 50).values[-1] > -1e-12


# One of its own dependencies still calls torch.jit.script when it is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_other_peoples_products_and_eigenvalues_agree():
    import curvlinops  # here, because of the warning
    from scipy.sparse import linalg

    model, inputs = prepared(mlp)
    operator = Hessian(loss_of(model, inputs), list(model.parameters()))
    there = linalg.LinearOperator(
        operator.shape, matvec=lambda v: (operator @ torch.from_numpy(np.ravel(v))).numpy(), dtype=np.float64
    )
    top = linalg.eigsh(there, k=3, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(lanczos(operator, 40).values[:3].numpy(), np.sort(top)[::-1], rtol=1e-9)
    params = list(model.parameters())
    theirs = curvlinops.HessianLinearOperator(model, nn.CrossEntropyLoss(), params, [(inputs, LABELS)])
    v = normal(5, operator.shape[0])
    torch.testing.assert_close(operator @ v, theirs @ v, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_micro_batches_give_the_whole_batch(kind):
    model, inputs = prepared(mlp)
    params = list(model.parameters())

    def closure(rows):
        def call():
            outputs = model(inputs[rows])
            loss = F.cross_entropy(outputs, LABELS[rows])
            return (outputs, loss) if kind is GGN else loss

        return call

    whole = kind(closure(slice(None)), params)
    parts = kind([closure(slice(i, i + 4)) for i in (0, 4, 8)], params)
    v = normal(3, whole.shape[0])
    for left, right in [(whole @ v, parts @ v), (whole.gradient, parts.gradient), (whole.loss, parts.loss)]:
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)


@given(order=st.permutations(range(4)), seed=st.integers(0, 100))
def test_neither_the_order_of_parameters_nor_their_cuts_change_the_spectrum(order, seed):
    weights = [normal(seed + i, 3) for i in range(4)]

    def spectrum(params, parts):
        def loss():
            x = torch.cat(parts(params))
            return (x.sin() * x.roll(1)).sum() + x.pow(4).sum() / 10

        return lanczos(Hessian(loss, params), 12).values

    params = [w.clone().requires_grad_() for w in weights]
    whole = torch.cat(weights).requires_grad_()
    expected = spectrum(params, lambda p: p)
    back = {place: i for i, place in enumerate(order)}
    moved = spectrum([params[i] for i in order], lambda p: [p[back[i]] for i in range(4)])
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(spectrum([whole], lambda p: p), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("several", [False, True])
def test_training_does_not_notice(several):
    model, inputs = prepared(
        lambda: nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Linear(9, 3))
    )
    params = list(model.parameters())
    loss_of(model, inputs)().backward()
    kept = [param.grad for param in params]
    values = [param.grad.clone() for param in params]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    random = torch.get_rng_state()
    closure = loss_of(model, inputs)
    operator = Hessian([closure, closure] if several else closure, params, module=model)
    matrix = dense(operator)
    assert torch.equal(torch.get_rng_state(), random)
    for param, grad, value in zip(params, kept, values, strict=True):
        assert param.grad is grad
        assert torch.equal(grad, value)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-10, atol=1e-12)  # one mask of Dropout for all products


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_the_graph_is_freed_with_the_operator(kind):
    model, inputs = prepared(mlp)
    kept = []

    def closure():
        hidden = model[0](inputs)
        kept.append(weakref.ref(hidden))
        outputs = model[2](hidden.tanh())
        loss = F.cross_entropy(outputs, LABELS)
        return (outputs, loss) if kind is GGN else loss

    gc.collect()
    gc.disable()
    try:
        operator = kind(closure, list(model.parameters()))
        lanczos(operator, 5)
        kept.append(weakref.ref(operator))
        del operator
        assert [reference() for reference in kept] == [None, None]
    finally:
        gc.enable()


def test_a_scale_a_shift_and_a_sign():
    matrix, scale, shift = symmetric(1, normal(2, 6)), normal(3, 6), normal(4, 6)
    got = dense(Preconditioned(matrix, scale, shift, -1.0))
    torch.testing.assert_close(got, scale[:, None] * (torch.diag(shift) - matrix) * scale, rtol=1e-13, atol=1e-13)


# Lanczos


def test_all_products_give_all_eigenvalues():
    values = torch.linspace(-2, 5, 30, dtype=torch.float64)
    spectrum = lanczos(symmetric(1, values), 30)
    torch.testing.assert_close(spectrum.values, values.flip(0), rtol=1e-12, atol=1e-12)
    assert float(spectrum.weights.sum()) == pytest.approx(1, rel=1e-13)


def plain_lanczos(matrix, start, iterations):
    """Without re-orthogonalisation, to show that the next test can fail."""
    q, last, b, diagonal, off = start / start.norm(), torch.zeros_like(start), 0.0, [], []
    for _ in range(iterations):
        w = matrix @ q - b * last
        diagonal.append(w @ q)
        w = w - diagonal[-1] * q
        b = w.norm()
        off.append(b)
        last, q = q, w / b
    t = torch.diag(torch.stack(diagonal)) + torch.diag(torch.stack(off[:-1]), 1) + torch.diag(torch.stack(off[:-1]), -1)
    return torch.linalg.eigvalsh(t.double())


def test_the_top_eigenvalue_has_no_ghost_in_float32():
    values = torch.cat([torch.linspace(0, 1, 199), torch.tensor([50.0])]).double()
    matrix, start = symmetric(2, values).float(), normal(3, 200).float()
    assert (plain_lanczos(matrix, start, 80) > 49).sum() > 1
    spectrum = lanczos(matrix, 80, start=start)
    assert (spectrum.values > 49).sum() == 1
    assert float(spectrum.values[0]) == pytest.approx(50, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", [[0, 0, 0, 0], [3, 3, 3, 3], [2, 0, 0, 0], [-1, -1, -4, -4], [1e-12, 0, 0, 0], [7]])
def test_an_invariant_subspace_ends_the_run_with_exact_values(values, dtype):
    exact = torch.tensor(values, dtype=torch.float64)
    spectrum = lanczos(symmetric(4, exact).to(dtype), 50)
    distinct = torch.tensor(sorted(set(values), reverse=True), dtype=torch.float64)
    scale = float(exact.abs().max())
    torch.testing.assert_close(spectrum.values, distinct, rtol=0, atol=64 * torch.finfo(dtype).eps * scale)
    assert spectrum.errors.max() <= 64 * torch.finfo(dtype).eps * scale


def test_a_run_ends_when_the_top_is_known():
    matrix = symmetric(5, torch.cat([torch.linspace(0, 1, 99), torch.tensor([9.0])]).double())
    spectrum = lanczos(matrix, 60, tol=0.01)
    assert 2 <= len(spectrum.values) < 20
    assert spectrum.errors[0] <= 0.01 * spectrum.values[0]
    assert abs(float(spectrum.values[0]) - 9) <= float(spectrum.errors[0])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("bulk", "spike"), [(1.0, 20.0), (-100.0, 50.0), (0.0, 3.0)])
def test_a_run_does_not_end_at_a_bulk_far_from_zero(bulk, spike, seed):
    values = torch.full((100_000,), bulk)
    values[0] = spike

    class Diagonal:
        shape, dtype, device = (len(values), len(values)), values.dtype, values.device

        def __matmul__(self, vector):
            return values * vector

    assert float(lanczos(Diagonal(), 10, seed=seed, tol=0.1).values[0]) == pytest.approx(spike, rel=0.1)


@pytest.mark.parametrize("damping", [0.0, 0.2, 1.0, 10.0])
def test_damping_does_not_hide_the_top_of_a_network(damping):
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.copy_(normal(i, *param.shape) / math.sqrt(param.shape[-1]))
    inputs, labels = normal(7, 128, 20).float(), torch.arange(128) % 10
    operator = Hessian(loss_of(model, inputs, labels), list(model.parameters()))
    top = float(lanczos(operator, 40).values[0])
    for seed in range(3):  # starts from which ten products suffice
        spectrum = lanczos(Preconditioned(operator, 1.0, damping), 10, seed=seed, tol=0.1)
        assert float(spectrum.values[0]) == pytest.approx(top + damping, abs=0.1 * top)


def test_a_product_that_is_not_finite_gives_nan():
    for bad in (math.inf, math.nan):
        matrix = torch.eye(4) * bad
        assert lanczos(matrix, 3).values.isnan().all()
        assert quadrature(matrix, 3, 2).values.isnan().all()


def test_quadrature_has_the_moments_of_the_matrix_and_a_density_of_mass_one():
    values = torch.cat([torch.linspace(0.1, 1, 298), torch.tensor([5.0, 8.0])]).double()
    spectrum = quadrature(symmetric(6, values), 20, 60)
    # A start's estimate of trace(f) has variance 2 |f - mean f|^2 n / (n + 2).
    for function in (lambda x: x, lambda x: x.square(), torch.log):
        exact = function(values)
        error = math.sqrt(2 * float((exact - exact.mean()).square().sum()) / 60)
        assert abs(spectrum.trace(function) - float(exact.sum())) <= 4 * error
    for sigma in (0.05, 0.5):
        grid = torch.linspace(-8 * sigma, 8 + 8 * sigma, 4000, dtype=torch.float64)
        density = spectrum.density(grid, sigma)
        assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-6)
        mean = float(torch.trapezoid(density * grid, grid))
        assert mean == pytest.approx(spectrum.trace() / 300, rel=1e-6)


def test_equal_seeds_give_equal_runs_and_others_do_not():
    matrix = symmetric(7, torch.linspace(0, 1, 40).double())
    assert torch.equal(lanczos(matrix, 5, seed=3).values, lanczos(matrix, 5, seed=3).values)
    assert not torch.equal(lanczos(matrix, 5, seed=3).values, lanczos(matrix, 5, seed=4).values)
    start = normal(8, 40)
    torch.testing.assert_close(lanczos(matrix, 5, start=start)[0], lanczos(matrix, 5, start=9 * start)[0])


def test_noise_is_the_variance_of_an_element_times_the_number_of_parameters():
    size, samples, deviation = 60, 10, 0.7
    batches = []
    for i in range(40):
        e = normal(100 + i, size, size) * deviation / math.sqrt(samples)
        batches.append(symmetric(1, torch.linspace(0, 3, size).double()) + (e + e.T) / math.sqrt(2))
    # The elements of the diagonal have twice the variance, one in size of the sum.
    assert noise(batches, samples, starts=5) == pytest.approx(size * deviation**2, rel=0.1)


# Wrong input


class Halved(torch.autograd.Function):
    """Twice its input, with a derivative that has none."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad


class Fused(torch.autograd.Function):
    """A sum of cubes that computes its gradient with itself, as fused losses do."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x):
        ctx.save_for_backward(3 * x.square())
        return x.pow(3).sum()

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


class Twice(torch.autograd.Function):
    """A square whose derivative is decorated and has one itself."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def backward_called(w):
    loss = w.square().sum()
    loss.backward(retain_graph=True)
    return loss


def backward_called_on(loss):
    loss.backward(retain_graph=True)
    return loss


def graph_freed(w):
    loss = w.square().sum()
    torch.autograd.grad(loss, w)
    return loss


def attention(w):
    q = w.view(1, 1, 3, 2)
    return F.scaled_dot_product_attention(q, q, q).square().sum()


CLOSURES = {
    "backward": (backward_called, RuntimeError, r"called backward\(\)"),
    "freed": (graph_freed, RuntimeError, "graph is freed"),
    "detached": (lambda w: w.detach().sum(), RuntimeError, "loss has no graph"),
    "number": (lambda w: w.sum().item(), RuntimeError, "loss has no graph"),
    "nothing": (lambda w: None, TypeError, "must return the loss, got None"),
    "vector": (lambda w: 2 * w, ValueError, "must be one number"),
    "once": (lambda w: Halved.apply(w * w).square().sum(), RuntimeError, "^Halved has no second derivative"),
    "fused": (lambda w: Fused.apply(w.sin()), RuntimeError, "^Fused has no second derivative"),
    "attention": (attention, RuntimeError, "flash_attention.*has no second derivative"),
    "raises": (lambda w: 1 / 0, ZeroDivisionError, "division"),
}


@pytest.mark.parametrize("name", CLOSURES)
def test_a_wrong_closure_is_named_and_leaves_gradients_and_generators(name):
    closure, error, match = CLOSURES[name]
    w = normal(1, 6).requires_grad_()
    w.grad = normal(2, 6)
    grad, value, random = w.grad, w.grad.clone(), torch.get_rng_state()
    with pytest.raises(error, match=match):
        lanczos(Hessian(lambda: closure(w), [w]), 3)
    assert w.grad is grad
    assert torch.equal(grad, value)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_wrong_closure_of_the_gauss_newton_matrix_is_named():
    w = normal(1, 6).requires_grad_()
    for closure, error, match in [
        (lambda: w.sum(), TypeError, r"must return \(outputs, loss\)"),
        (lambda: (w.detach(), w.sum()), RuntimeError, "outputs has no graph"),
        (lambda: (lambda z: (z, z.square().sum()))(Halved.apply(w)), RuntimeError, "^Halved has no second derivative"),
        (lambda: (w.sin(), w.sin().sum()), RuntimeError, "loss must be computed from its outputs"),
        (lambda: (lambda z: (z, Fused.apply(z)))(w.sin()), RuntimeError, "^Fused has no second derivative"),
    ]:
        with pytest.raises(error, match=match):
            GGN(closure, [w])


def test_other_decorators_of_a_backward_are_no_obstacle():
    w = normal(1, 6).requires_grad_()
    torch.testing.assert_close(
        Hessian(lambda: Twice.apply(w).sum(), [w]) @ torch.ones(6).double(), 2 * torch.ones(6).double()
    )


def test_a_loss_that_is_linear_in_the_outputs_has_a_gauss_newton_matrix_of_zero():
    w = normal(1, 6).requires_grad_()
    assert not (GGN(lambda: (lambda z: (z, z.sum()))(w.sin()), [w]) @ torch.ones(6).double()).any()


@pytest.mark.parametrize("kind", [Hessian, GGN])
def test_a_sparse_gradient_is_named(kind):
    table = nn.Embedding(5, 3, sparse=True)

    def closure():
        outputs = table(torch.tensor([1, 2]))
        return (outputs, outputs.square().sum()) if kind is GGN else outputs.square().sum()

    with pytest.raises(RuntimeError, match=r"params\[0\] must have a dense gradient.*sparse=False"):
        kind(closure, [table.weight])


def test_gradients_of_the_modules_other_parameters_are_kept():
    model, inputs = prepared(mlp)
    model[2].bias.grad = torch.ones(3).double()
    with pytest.raises(RuntimeError, match=r"called backward\(\)"):
        Hessian(lambda: backward_called_on(loss_of(model, inputs)()), [model[0].weight], module=model)
    assert [param.grad is None for param in model.parameters()] == [True, True, True, False]
    assert torch.equal(model[2].bias.grad, torch.ones(3).double())


def test_a_compiled_model_is_named():
    w = normal(1, 6).requires_grad_()
    compiled = torch.compile(lambda w: (w.sin() * w).sum(), backend="aot_eager")
    with pytest.raises(RuntimeError, match="has no second derivative"):
        Hessian(lambda: compiled(w), [w]) @ torch.ones(6).double()


def test_an_operator_is_for_the_parameters_it_was_made_of():
    w = normal(1, 6).requires_grad_()
    operator = Hessian(lambda: w.pow(3).sum(), [w])
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="parameters have changed since the operator was made"):
        operator @ torch.ones(6).double()


@pytest.mark.parametrize(
    ("params", "error", "match"),
    [
        ([], ValueError, "at least one tensor"),
        ([torch.ones(2, dtype=torch.bfloat16, requires_grad=True)], TypeError, r"params\[0\].*bfloat16"),
        ([torch.ones(2, dtype=torch.complex64, requires_grad=True)], TypeError, r"params\[0\].*complex64"),
        ([torch.ones(2)], ValueError, r"params\[0\] must require grad"),
        ([torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True).double()], ValueError, r"params\[1\]"),
    ],
)
def test_wrong_parameters_are_named(params, error, match):
    params = [p.detach().requires_grad_() if not p.is_leaf else p for p in params]
    with pytest.raises(error, match=match):
        Hessian(lambda: sum(p.sum() for p in params), params)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda a: lanczos(a, 0), "iterations must be a whole number >= 1, got 0"),
        (lambda a: lanczos(a, 2.0), "iterations must be"),
        (lambda a: lanczos(a, 2, tol=-1.0), "tol must be finite and >= 0"),
        (lambda a: lanczos(a, 2, start=torch.zeros(3)), "start must be a finite vector of 3"),
        (lambda a: lanczos(a, 2, start=torch.ones(4)), "start must be a finite vector of 3"),
        (lambda a: quadrature(a, 2, 0), "starts must be"),
        (lambda a: noise([a], 4), "two or more batches"),
        (lambda a: noise([a, a], 0), "samples must be"),
        (lambda a: lanczos(a, 2).density(torch.zeros(2), 0.0), "sigma must be finite and > 0"),
    ],
)
def test_wrong_numbers_are_named(call, match):
    with pytest.raises(ValueError, match=match):
        call(torch.eye(3))


def test_wrong_operands_are_named():
    w = normal(1, 6).requires_grad_()
    with pytest.raises(TypeError, match="closure must be a function"):
        Hessian([], [w])
    with pytest.raises(ValueError, match=r"vector must have shape \(6,\)"):
        Hessian(lambda: w.square().sum(), [w]) @ torch.ones(5)


def test_a_loss_that_is_linear_has_no_curvature():
    w = normal(1, 6).requires_grad_()
    spectrum = lanczos(Hessian(lambda: w.sum(), [w]), 3)
    assert isinstance(spectrum, Spectrum)
    assert spectrum.values.tolist() == [0.0]

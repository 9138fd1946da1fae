"""What a class of someone else's gets from the two bases: everything but a native step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import BACKENDS
from steps import advance, bits, close, copies, gradients, normal, parameters, results, same, saved

from optimzoo.optimizer import Elementwise, Tensorwise

COMPOSED = [name for name in BACKENDS if "fused" not in name]
each_composed = pytest.mark.parametrize("backend", [BACKENDS[name] for name in COMPOSED], ids=COMPOSED)


class Signum(Elementwise):
    """Moves every coordinate by ``lr`` against the sign of its averaged gradient (Bernstein et al., 2018)."""

    def __init__(self, params, lr=1e-2, momentum=0.9, weight_decay=0.0, **impl):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay), **impl)

    @staticmethod
    def update(param, grad, exp_avg, *, lr, momentum, step):
        exp_avg.lerp_(grad, 1 - momentum)
        param -= lr * exp_avg.sign()


class Normalized(Tensorwise):
    """Moves each parameter by ``lr`` along its averaged gradient, whatever the length of that."""

    def __init__(self, params, lr=1e-2, momentum=0.5, weight_decay=0.0, **impl):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay), **impl)

    @staticmethod
    def update(param, grad, exp_avg, *, lr, momentum, step):
        exp_avg.mul_(momentum).add_(grad)
        param -= lr * exp_avg / exp_avg.norm().clamp_min(1e-30)


class Centred(Elementwise):
    """A method whose state begins at the parameter and not at zero."""

    def __init__(self, params, lr=0.1, **impl):
        super().__init__(params, dict(lr=lr), **impl)

    def init(self, name, param):
        return param.detach().clone() if name == "anchor" else super().init(name, param)

    @staticmethod
    def update(param, grad, anchor, *, lr, step):
        param += lr * (anchor - param) - lr * grad


def signum(param, average, grad, lr, momentum, decay):
    average[...] = momentum * average + (1 - momentum) * grad
    param[...] = param * (1 - lr * decay) - lr * np.sign(average)


@each_composed
def test_an_elementwise_class_of_one_function_has_every_composed_back_end(backend):
    params = parameters(requires_grad=not backend.get("differentiable"))
    expected = [(p.detach().numpy().copy(), np.zeros(p.shape)) for p in params]
    optimizer = Signum(params, weight_decay=0.1, **backend)
    for row in gradients(params, 30):
        advance(optimizer, [row])
        for (param, average), grad in zip(expected, row, strict=True):
            signum(param, average, grad.numpy(), 1e-2, 0.9, 0.1)
    for param, (value, average) in zip(params, expected, strict=True):
        np.testing.assert_allclose(param.detach().numpy(), value, rtol=1e-14, atol=1e-14)
        np.testing.assert_allclose(optimizer.state[param]["exp_avg"], average, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("options", [{}, dict(capturable=True), dict(differentiable=True)], ids=str)
def test_a_tensorwise_class_sees_each_parameter_whole(options):
    params = parameters(requires_grad="differentiable" not in options)
    before = [p.detach().clone() for p in params]
    optimizer = advance(Normalized(params, **options), gradients(params, 1))
    for param, start in zip(params, before, strict=True):
        length = (param.detach() - start).norm()
        torch.testing.assert_close(length, torch.full_like(length, 1e-2 if param.numel() else 0.0))
    other = Normalized(copies(params), **options)
    other.load_state_dict(saved(optimizer))
    assert same(advance(optimizer, gradients(params, 3)), advance(other, gradients(params, 3)))


@each_composed
def test_state_may_begin_elsewhere_than_at_zero(backend):
    (param,) = parameters(layouts=["vector"], requires_grad=not backend.get("differentiable"))
    start = param.detach().clone()
    advance(
        Centred([param], **backend), [[torch.zeros(67, dtype=torch.float64)], [torch.ones(67, dtype=torch.float64)]]
    )
    torch.testing.assert_close(param.detach(), start - 0.1, rtol=1e-14, atol=1e-14)


def test_a_class_that_shares_its_name_with_one_of_ours_does_not_get_its_native_step():
    class DiffGrad(Elementwise):
        @staticmethod
        def update(param, grad, *, lr, step):
            param -= lr * grad

    param = torch.zeros(3, requires_grad=True)
    advance(DiffGrad([param], dict(lr=0.5)), [[torch.ones(3)]])
    assert param.tolist() == [-0.5] * 3


# Sparse gradients


def sparse(param, rows, seed, repeat=False):
    index = torch.tensor([[*rows, *(rows[:1] if repeat else [])]])
    values = normal(seed, index.shape[1], *param.shape[1:], dtype=param.dtype)
    return torch.sparse_coo_tensor(index, values, param.shape, check_invariants=True)


SPARSE_BACKENDS = [name for name in COMPOSED if name != "differentiable"]
each_sparse = pytest.mark.parametrize("backend", [BACKENDS[name] for name in SPARSE_BACKENDS], ids=SPARSE_BACKENDS)


@each_sparse
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_that_a_sparse_gradient_does_not_name_keep_their_bits(backend, dtype):
    param = normal(1, 6, 3, dtype=dtype).requires_grad_()
    optimizer = Signum([param], **backend)
    for t in range(3):
        advance(optimizer, [[sparse(param, [0, 1, 2, 3, 4, 5], t)]])
    before = [param.detach().clone(), optimizer.state[param]["exp_avg"].clone()]
    for t in range(3):
        advance(optimizer, [[sparse(param, [4, 1], 10 + t)]])
    after = [param.detach(), optimizer.state[param]["exp_avg"]]
    for old, new in zip(before, after, strict=True):
        assert bits(new[[0, 2, 3, 5]]) == bits(old[[0, 2, 3, 5]])
        assert (new[[1, 4]] != old[[1, 4]]).all()
    assert optimizer.state[param]["step"] == 6


@each_sparse
@pytest.mark.parametrize("maximize", [False, True])
def test_rows_that_a_sparse_gradient_names_move_as_if_it_were_dense(backend, maximize):
    param = normal(1, 6, 3).requires_grad_()
    dense = param.detach().clone().requires_grad_()
    optimizer, twin = Signum([param], maximize=maximize, **backend), Signum([dense], maximize=maximize, **backend)
    for t in range(4):
        grad = sparse(param, [5, 0, 2], t, repeat=True)  # a row named twice has the sum of its gradients
        advance(optimizer, [[grad]])
        advance(twin, [[grad.to_dense()]])
    for left, right in zip(
        [param, *optimizer.state[param].values()], [dense, *twin.state[dense].values()], strict=True
    ):
        left, right = (t.detach()[[0, 2, 5]] if t.dim() else t for t in (left, right))
        torch.testing.assert_close(left, right, rtol=1e-14, atol=1e-14)


@each_sparse
def test_sparse_gradients_are_not_written_to(backend):
    param = normal(1, 6, 3).requires_grad_()
    param.grad = sparse(param, [5, 0], 3, repeat=True)
    before = bits(param.grad), param.grad._nnz()
    Signum([param], maximize=True, **backend).step()
    assert (bits(param.grad), param.grad._nnz()) == before


@each_sparse
def test_an_embedding_trains_on_sparse_gradients_beside_dense_layers(backend):
    outcomes = []
    for is_sparse in (True, False):
        embedding, layer = torch.nn.Embedding(5, 3, sparse=is_sparse).double(), torch.nn.Linear(3, 1).double()
        params = [*embedding.parameters(), *layer.parameters()]
        with torch.no_grad():
            for i, param in enumerate(params):
                param.copy_(normal(i, *param.shape))
        optimizer = Signum(params, **backend)
        for _ in range(3):
            optimizer.zero_grad()
            layer(embedding(torch.arange(5))).square().sum().backward()
            assert (params[0].grad.layout is torch.sparse_coo) == is_sparse
            optimizer.step()
        outcomes.append(optimizer)
    close(*outcomes, 1e-13)


@each_sparse
@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled-first"])
def test_a_loss_scale_is_taken_off_sparse_gradients(backend, unscale):
    outcomes = []
    for enabled in (True, False):
        param = normal(1, 6, 3, dtype=torch.float32).requires_grad_()
        scaler = torch.amp.GradScaler("cpu", 2.0**5, enabled=enabled)
        optimizer = Signum([param], **backend)
        for t in range(3):
            scale = scaler.scale(torch.ones(()))
            param.grad = sparse(param, [1, 4], t) * scale
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        outcomes.append([bits(t) for t in results(optimizer)])
    assert outcomes[0] == outcomes[1]


def test_sparse_gradients_do_not_go_with_weight_decay():
    param = normal(1, 6, 3).requires_grad_()
    param.grad = sparse(param, [1], 0)
    optimizer = Signum([param], weight_decay=0.1)
    with pytest.raises(RuntimeError, match="weight_decay does not go with sparse"):
        optimizer.step()
    assert not optimizer.state


@each_sparse
def test_an_empty_sparse_gradient_counts_a_step_and_moves_nothing(backend):
    param = normal(1, 6, 3).requires_grad_()
    before = bits(param)
    param.grad = torch.sparse_coo_tensor(
        torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, 3).double(), (6, 3), check_invariants=True
    )
    optimizer = Signum([param], **backend)
    optimizer.step()
    assert bits(param) == before
    assert optimizer.state[param]["step"] == 1

"""TPSGD follows the independent numpy reference, layer by layer and net by net."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from reference import tpsgd as reference
from steps import normal
from torch import Tensor, nn
from torch.nn import functional as F

from optimzoo import TPSGD

CLASSES, SAMPLES = 5, 6
ACTIVATIONS = {"identity": nn.Identity, "relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
# Names here, and those of the reference.
LOSSES = {"l2": "l2", "l1": "l1", "smooth_l1": "smooth_l1", "cosine": "cosine", "cross_entropy": "readout"}


def own(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 with weights that depend on the seed alone."""
    model = model.double()
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.copy_(0.5 * normal(seed + i, *param.shape))
    return model


def labels(*shape: int, seed: int = 3) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, CLASSES, shape))


def numpy(*tensors: Tensor | None) -> tuple:
    return tuple(None if t is None else t.detach().numpy().copy() for t in tensors)


def one_hot(y: Tensor) -> np.ndarray:
    return F.one_hot(y, CLASSES).double().numpy()


def projections(optimizer: TPSGD, transpose: bool = True) -> list[np.ndarray]:
    """In the order of the layers; those of vectors in the shape that the reference has for them."""
    found = [p.numpy() for _, p in sorted(optimizer._projections.items())]
    return [p.T if p.ndim == 2 and transpose else p for p in found]


def same(optimizer: TPSGD, expected: list) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    flat = [g for row in expected for g in row]
    assert len(params) == len(flat)
    for param, grad in zip(params, flat, strict=True):
        np.testing.assert_allclose(param.grad.numpy(), grad, rtol=1e-12, atol=1e-12)


def run(model: nn.Module, x: Tensor, y: Tensor, **settings) -> TPSGD:
    settings = {} if "target_dim" in settings else dict(num_classes=CLASSES), settings
    optimizer = TPSGD(model, 0.1, seed=1, **settings[0], **settings[1])
    with optimizer.targets(y):
        model(x)
    return optimizer


def mlp(sigma: str, widths=(4, 7, 3)) -> nn.Sequential:
    sizes = [*widths, CLASSES]
    layers = [m for a, b in pairwise(sizes[:-1]) for m in (nn.Linear(a, b), ACTIVATIONS[sigma]())]
    return own(nn.Sequential(*layers, nn.Linear(sizes[-2], CLASSES)))


def pairs(model: nn.Module) -> list[tuple]:
    return [numpy(m.weight, m.bias) for m in model.modules() if isinstance(m, nn.Linear)]


def repeated(output: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy at each position, against the label of the sample."""
    positions = output[0, ..., 0].numel()
    return F.cross_entropy(output.flatten(0, -2), y.repeat_interleave(positions))


@pytest.mark.parametrize("rows", [(SAMPLES,), (SAMPLES, 3), (SAMPLES, 2, 3)], ids=["vectors", "sequences", "grids"])
@pytest.mark.parametrize("sigma", ACTIVATIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_dense_nets(loss, sigma, rows):
    model, x, y = mlp(sigma), normal(20, *rows, 4), labels(SAMPLES)
    expected_y = one_hot(y)
    optimizer = TPSGD(model, 0.1, num_classes=CLASSES, local_loss=loss, seed=1)
    with optimizer.targets(y, repeated):
        model(x)
    expected = reference.mlp_gradients(
        x.numpy(), expected_y, pairs(model), projections(optimizer), sigma, loss=LOSSES[loss]
    )
    same(optimizer, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_targets_that_are_vectors(loss):
    model, x = mlp("tanh"), normal(20, SAMPLES, 4)
    y = normal(21, SAMPLES, CLASSES).softmax(-1)
    optimizer = run(model, x, y, target_dim=CLASSES, local_loss=loss)
    expected = reference.mlp_gradients(
        x.numpy(), y.numpy(), pairs(model), projections(optimizer), "tanh", loss=LOSSES[loss], last_loss="mse"
    )
    same(optimizer, expected)


def test_a_function_as_the_local_loss():
    model, x, y = mlp("tanh"), normal(20, SAMPLES, 4), labels(SAMPLES)
    optimizer = run(model, x, y, local_loss=lambda y, t: (y - t) ** 4)
    pair = (lambda y, t: ((y - t) ** 4).sum(-1)), (lambda y, t: 4 * (y - t) ** 3)
    same(optimizer, reference.mlp_gradients(x.numpy(), one_hot(y), pairs(model), projections(optimizer), "tanh", pair))


def test_direct_random_target_projection():
    model, x, y = mlp("tanh"), normal(20, SAMPLES, 4), labels(SAMPLES)
    optimizer = run(model, x, y, local_loss="drtp", projection="kaiming")
    B = projections(optimizer, transpose=False)
    assert all(np.abs(b).max() <= (6 / b.shape[1]) ** 0.5 for b in B)
    same(optimizer, reference.mlp_gradients(x.numpy(), one_hot(y), pairs(model), B, "tanh", rule="drtp"))


@pytest.mark.parametrize("in_forward", [False, True])
def test_steps(in_forward):
    rates = (0.1, 0.3, 0.2)
    model = mlp("relu")
    optimizer = TPSGD(
        model, 0.1, num_classes=CLASSES, per_layer_lr={"2": 0.3, "4": 0.2}, update_in_forward=in_forward, seed=1
    )
    layers = pairs(model)
    for step in range(20):
        x, y = normal(30 + step, SAMPLES, 4), labels(SAMPLES, seed=step)
        optimizer.zero_grad()
        with optimizer.targets(y):
            model(x)
        optimizer.step()
        layers = reference.mlp_step(x.numpy(), one_hot(y), layers, projections(optimizer), rates, "relu")
        for param, value in zip(model.parameters(), [v for row in layers for v in row], strict=True):
            np.testing.assert_allclose(param.detach().numpy(), value, rtol=1e-12, atol=1e-12)


GEOMETRIES = {
    "plain": {},
    "strided": dict(stride=2, padding=1),
    "dilated": dict(dilation=2, padding=(1, 2)),
    "grouped": dict(groups=2, padding=1, stride=(2, 1)),
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(
    ("loss", "conv_target"), [*((loss, kind) for loss in LOSSES for kind in ("full", "channel")), ("drtp", "full")]
)
def test_convolutional_nets(loss, geometry, conv_target):
    options = GEOMETRIES[geometry]
    second = nn.Conv2d(4, 6, (3, 2), bias=False, **options)
    model = own(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.Tanh(),
            nn.MaxPool2d(2),
            second,
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(second(torch.zeros(1, 4, 5, 6)).numel(), 7),
            nn.Tanh(),
            nn.Linear(7, CLASSES),
        )
    )
    x, y = normal(20, SAMPLES, 2, 10, 12), labels(SAMPLES)
    optimizer = run(model, x, y, local_loss=loss, conv_target=conv_target)
    (w0, b0), (w1, b1) = numpy(model[0].weight, model[0].bias), numpy(model[3].weight, model[3].bias)
    convs = [
        dict(W=w0, b=b0, geometry=dict(padding=1), pool=("max", 2)),
        dict(W=w1, b=b1, geometry=options),
    ]
    drtp = loss == "drtp"
    P = projections(optimizer, transpose=False)
    P[2] = P[2] if drtp else P[2].T
    expected = reference.conv_net_gradients(
        x.numpy(), one_hot(y), convs, pairs(model), P, "tanh", "l2" if drtp else LOSSES[loss],
        conv_target=conv_target, rule="drtp" if drtp else "tpsgd",
    )  # fmt: skip
    expected[1] = expected[1][:1]
    same(optimizer, expected)


def test_convolutions_in_one_dimension():
    model = own(nn.Sequential(nn.Conv1d(2, 4, 3, stride=2), nn.ReLU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(8, 5)))
    x, y = normal(20, SAMPLES, 2, 9), labels(SAMPLES)
    optimizer = run(model, x, y)
    w, b = numpy(model[0].weight, model[0].bias)
    convs = [dict(W=w, b=b, geometry=dict(stride=2), pool=("mean", 2))]
    same(
        optimizer,
        reference.conv_net_gradients(x.numpy(), one_hot(y), convs, pairs(model), projections(optimizer, False), "relu"),
    )


class Recurrent(nn.Module):
    """Stacked recurrent layers and a head on the last state, or on every one."""

    def __init__(self, cell: type, steps: bool, tokens: bool = False, apart: bool = False, **options) -> None:
        super().__init__()
        if tokens:
            self.embedding = nn.Embedding(9, 3)
        count = options.pop("num_layers", 1)
        stacks = [count] if not apart else [1] * count
        sizes = [3, *[4] * len(stacks)]
        self.stacks = nn.ModuleList(
            cell(a, b, num_layers=n, batch_first=True, **options)
            for a, b, n in zip(sizes[:-1], sizes[1:], stacks, strict=True)
        )
        self.head, self.steps = nn.Linear(4, CLASSES), steps

    def forward(self, x):
        x = self.embedding(x) if hasattr(self, "embedding") else x
        for stack in self.stacks:
            x, _ = stack(x)
        return self.head(x if self.steps else x[:, -1])


CELLS = {
    "rnn": (nn.RNN, {}),
    "rnn_relu": (nn.RNN, dict(nonlinearity="relu")),
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
}


def layers_of(model: Recurrent) -> list[tuple]:
    return [numpy(*row) for stack in model.stacks for row in stack.all_weights]


@pytest.mark.parametrize("apart", [False, True], ids=["one module", "modules"])
@pytest.mark.parametrize("kind", ["last", "last, one step", "each step"])
@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_nets(cell, kind, apart):
    cls, options = CELLS[cell]
    steps, bptt = kind == "each step", kind != "last, one step"
    model = own(Recurrent(cls, steps, num_layers=3, apart=apart, **options))
    x, y = normal(20, SAMPLES, 7, 3), labels(*((SAMPLES, 7) if steps else (SAMPLES,)))
    optimizer = run(model, x, y, bptt=bptt)
    layers, head = layers_of(model), pairs(model)[0]
    expected = reference.recurrent_net_gradients(
        cell, x.numpy(), one_hot(y), layers, head, projections(optimizer), one_step=not bptt
    )
    same(optimizer, expected)


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_cells_in_a_loop_give_what_their_module_gives(cell):
    class Loop(nn.Module):
        def __init__(self, cells, head):
            super().__init__()
            self.cells, self.head = nn.ModuleList(cells), head

        def forward(self, x):
            states = [None] * len(self.cells)
            for t in range(x.shape[1]):
                h = x[:, t]
                for i, one in enumerate(self.cells):
                    states[i] = one(h, states[i])
                    h = states[i][0] if isinstance(states[i], tuple) else states[i]
            return self.head(h)

    cls = {"rnn": nn.RNNCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}[cell]
    model = own(Loop([cls(3, 4), cls(4, 4)], nn.Linear(4, CLASSES)))
    x, y = normal(20, SAMPLES, 7, 3), labels(SAMPLES)
    for bptt in (True, False):
        optimizer = run(model, x, y, bptt=bptt)
        layers = [numpy(*one.parameters()) for one in model.cells]
        expected = reference.recurrent_net_gradients(
            cell, x.numpy(), one_hot(y), layers, pairs(model)[0], projections(optimizer), one_step=not bptt
        )
        same(optimizer, expected)
        optimizer.zero_grad()


def test_an_embedding_is_trained_with_the_layer_that_follows():
    tokens, y = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (SAMPLES, 7))), labels(SAMPLES)
    model = own(Recurrent(nn.GRU, False, tokens=True))
    optimizer = run(model, tokens, y)
    (table,), (P,) = numpy(model.embedding.weight), projections(optimizer)
    grads = reference.embedding_recurrent_gradients("gru", tokens.numpy(), table, layers_of(model)[0], one_hot(y), P)
    h = reference.recurrent_forward("gru", table[tokens.numpy()], layers_of(model)[0])
    last = reference.last_linear_gradients(h[:, -1], *pairs(model)[0], one_hot(y))
    same(optimizer, [[grads[0]], grads[1], last])

    model = own(nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(28, CLASSES)))
    optimizer = run(model, tokens, y)
    (table,), (P,) = numpy(model[0].weight), projections(optimizer)
    grads = reference.embedding_linear_gradients(tokens.numpy(), table, *pairs(model)[0], one_hot(y), P, "tanh")
    same(optimizer, [[grads[0]], grads[1:], numpy(model[4].weight.grad, model[4].bias.grad)])


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_a_normalisation_is_trained_with_the_layer_before(norm):
    model = own(nn.Sequential(nn.Linear(4, 6), norm(6), nn.ReLU(), nn.Linear(6, CLASSES)))
    x, y = normal(20, SAMPLES, 4), labels(SAMPLES)
    optimizer = run(model, x, y)
    gain, shift = numpy(model[1].weight, model[1].bias)
    (P,) = projections(optimizer)
    axis = 0 if norm is nn.BatchNorm1d else -1
    grads = reference.linear_norm_gradients(x.numpy(), *pairs(model)[0], gain, shift, one_hot(y), P, "relu", axis)
    same(optimizer, [grads[:2], grads[2:], numpy(model[3].weight.grad, model[3].bias.grad)])


@pytest.mark.parametrize("conv_target", ["full", "channel"])
def test_batch_normalisation_of_maps(conv_target):
    model = own(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Flatten(), nn.Linear(96, CLASSES))
    )
    x, y = normal(20, SAMPLES, 2, 6, 8), labels(SAMPLES)
    optimizer = run(model, x, y, conv_target=conv_target)
    w, b, gain, shift = numpy(model[0].weight, model[0].bias, model[1].weight, model[1].bias)
    (P,) = projections(optimizer, transpose=False)
    grads = reference.conv_batch_norm_gradients(
        x.numpy(), w, b, gain, shift, one_hot(y), P, "relu", conv_target=conv_target
    )
    same(optimizer, [grads[:2], grads[2:], numpy(model[4].weight.grad, model[4].bias.grad)])


def test_the_output_of_a_residual_block_is_the_sum():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

        def forward(self, x):
            x = torch.tanh(self.first(x))
            return self.head(torch.tanh(self.second(x)) + x)

    model = own(Residual())
    x, y = normal(20, SAMPLES, 4), labels(SAMPLES)
    optimizer = run(model, x, y)
    first, second, last = pairs(model)
    P0, P1 = projections(optimizer)
    hidden = reference.activation("tanh", reference.linear_forward(x.numpy(), *first))
    out = hidden + reference.activation("tanh", reference.linear_forward(hidden, *second))
    same(optimizer, [
        reference.linear_gradients(x.numpy(), *first, one_hot(y), P0, "tanh"),
        reference.residual_linear_gradients(hidden, hidden, *second, one_hot(y), P1, "tanh"),
        reference.last_linear_gradients(out, *last, one_hot(y)),
    ])  # fmt: skip


@pytest.mark.parametrize("kind", ["normal", "sign", "binary"])
def test_projections_are_made_of_normal_numbers_as_the_reference_makes_them(kind):
    x, y = normal(20, SAMPLES, 4), labels(SAMPLES)
    made = {name: projections(run(mlp("relu"), x, y, projection=name)) for name in ("normal", kind)}
    for draws, P in zip(made["normal"], made[kind], strict=True):
        np.testing.assert_array_equal(P, reference.projection(kind, draws))

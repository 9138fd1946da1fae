"""TPSGD: local gradients, laws, the contract of an optimizer, memory, wrong input."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from steps import bits, normal, saved
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence
from torch.optim import lr_scheduler

import optimzoo
from optimzoo import TPSGD
from optimzoo.tpsgd import PROJECTIONS

CLASSES = 5


def weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 with weights that depend on the seed alone."""
    model = model.double()
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.copy_(0.4 * normal(seed + i, *param.shape))
    return model


def mlp(*widths: int, last: int = CLASSES) -> nn.Module:
    layers: list[nn.Module] = []
    for fan_in, width in zip((4, *widths), widths, strict=False):
        layers += [nn.Linear(fan_in, width), nn.ReLU()]
    return weights(nn.Sequential(*layers, nn.Linear(widths[-1] if widths else 4, last)))


def cnn() -> nn.Module:
    return weights(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES),
        )
    )  # fmt: skip


class Reader(nn.Module):
    """Tokens, stacked recurrent layers, the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.gru = nn.Embedding(9, 3), nn.GRU(3, 4, 2, batch_first=True, dropout=0.0)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.gru(self.embedding(tokens))[0][:, -1])


def batch(model: nn.Module, seed: int = 0, count: int = 6) -> tuple[Tensor, Tensor]:
    y = (normal(100 + seed, count).abs() * 1e6).long() % CLASSES
    if isinstance(model, Reader):
        return (normal(seed, count, 7).abs() * 1e6).long() % 9, y
    return normal(seed, count, *((2, 6, 8) if isinstance(model[0], nn.Conv2d) else (4,))), y


def train(model: nn.Module, optimizer: TPSGD, steps: range = range(1), scheduler=None) -> None:
    for seed in steps:
        x, y = batch(model, seed)
        optimizer.zero_grad()
        with optimizer.targets(y):
            model(x)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def make(model: nn.Module, lr: float = 0.1, **settings) -> TPSGD:
    return TPSGD(model, lr, **{"num_classes": CLASSES, "seed": 7, **settings})


def grads(model: nn.Module) -> list[Tensor | None]:
    return [param.grad for param in model.parameters()]


MODELS = {"mlp": lambda: mlp(6, 7), "cnn": cnn, "reader": lambda: weights(Reader())}
each_model = pytest.mark.parametrize("name", MODELS)
BASES = {
    "sgd": dict(),
    "momentum": dict(momentum=0.9, weight_decay=0.1),
    "adamw": dict(base=torch.optim.AdamW),
    "diffgrad": dict(base=optimzoo.DiffGrad),
    "adabelief": dict(base=optimzoo.AdaBelief, weight_decay=0.1),
    "dale": dict(base=optimzoo.DaleSGD, momentum=0.5),
}
each_base = pytest.mark.parametrize("base", BASES)


# Laws


@pytest.mark.parametrize("in_forward", [False, True])
def test_one_layer_is_sgd_on_the_true_loss(in_forward):
    ours, theirs = mlp(), mlp()
    train(ours, make(ours, update_in_forward=in_forward), range(5))
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    for seed in range(5):
        x, y = batch(theirs, seed)
        optimizer.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-14, atol=1e-14)


@each_model
def test_no_gradient_crosses_a_layer(name):
    model, other = MODELS[name](), MODELS[name]()
    with torch.no_grad():
        for param in list(other.parameters())[-2:]:
            param.mul_(3).add_(1)
    for one in (model, other):
        x, y = batch(one)
        with make(one).targets(y):
            one(x)
    first, second = grads(model), grads(other)
    assert all(grad is not None and grad.abs().sum() > 0 for grad in first)
    assert bits(first[:-2]) == bits(second[:-2])
    assert bits(first[-2:]) != bits(second[-2:])


def test_a_linear_layer_has_autograds_gradient_of_its_local_loss():
    model = mlp(6, 7)
    x, y = batch(model)
    optimizer = make(model)
    with optimizer.targets(y):
        model(x)
    for i, place in enumerate((0, 2)):
        P = optimizer._projections[1 + place, 0]
        out = torch.relu(model[place](x))
        loss = (P[y] - out).square().sum() / 2 / len(y)
        expected = torch.autograd.grad(loss, list(model[place].parameters()))
        torch.testing.assert_close(grads(model)[2 * i : 2 * i + 2], list(expected), rtol=1e-12, atol=1e-12)
        x = out.detach()


def test_renaming_the_labels_with_the_rows_of_the_projections_changes_no_hidden_layer():
    order = torch.tensor([3, 1, 4, 0, 2])
    results = []

    def permuted(normal: Tensor) -> Tensor:
        return PROJECTIONS["uniform"](normal)[order.argsort()]

    for permute in (False, True):
        model = mlp(6, 7)
        x, y = batch(model)
        optimizer = make(model, projection=permuted if permute else "uniform")
        with optimizer.targets(order[y] if permute else y):
            model(x)
        results.append(grads(model)[:4])
    torch.testing.assert_close(*results, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("in_forward", [False, True])
def test_a_rate_of_zero_leaves_a_layer_as_it_is(in_forward):
    model = mlp(6, 7)
    before = copy.deepcopy(model)
    train(model, make(model, per_layer_lr={"2": 0.0}, update_in_forward=in_forward), range(3))
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert changed == [True, True, False, False, True, True]


@each_base
@each_model
def test_updates_in_the_forward_pass_are_those_of_step(name, base):
    results = []
    for in_forward in (False, True):
        model = MODELS[name]()
        train(model, make(model, 0.01, update_in_forward=in_forward, **BASES[base]), range(4))
        assert not in_forward or all(param.grad is None for param in model.parameters())
        results.append(list(model.parameters()))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@each_model
def test_gradients_add_up_over_forward_passes(name):
    model = MODELS[name]().eval()  # without statistics of the batch
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    optimizer = make(model)
    rows = []
    for seeds in ((0,), (1,), (0, 1)):
        optimizer.zero_grad()
        for seed in seeds:
            x, y = batch(model, seed)
            with optimizer.targets(y):
                model(x)
        rows.append(grads(model))
    total = [a + b for a, b in zip(*rows[:2], strict=True)]
    torch.testing.assert_close(rows[2], total, rtol=1e-14, atol=1e-14)


@each_model
def test_projections_that_are_not_stored_are_the_same_each_time(name):
    results = []
    for stored in (True, False):
        model = MODELS[name]()
        optimizer = make(model, store_projections=stored)
        train(model, optimizer, range(3))
        assert bool(optimizer._projections) == stored
        results.append(list(model.parameters()))
    assert bits(results[0]) == bits(results[1])


def test_projections_have_the_distribution_that_they_name():
    drawn = {}
    for name in PROJECTIONS:
        model = nn.Sequential(nn.Linear(4, 4000), nn.Linear(4000, CLASSES))
        optimizer = make(model, projection=name)
        with optimizer.targets(torch.tensor([1])):
            model(torch.zeros(1, 4))
        (drawn[name],) = optimizer._projections.values()
    bound = 5 / math.sqrt(20_000)  # five deviations of a mean
    for name, (low, high, square) in {
        "uniform": (-1, 1, 1 / 3),
        "normal": (-6, 6, 1),
        "sign": (-1, 1, 1),
        "binary": (0, 1, 1 / 2),
        "kaiming": (-math.sqrt(6 / 4000), math.sqrt(6 / 4000), 2 / 4000),
    }.items():
        P = drawn[name]
        assert low <= P.min() <= P.max() <= high
        assert abs(P.mean() - (0.5 if name == "binary" else 0)) < bound * P.std()
        assert P.square().mean() == pytest.approx(square, rel=0.05)
    uniform = drawn["uniform"].flatten().sort().values.double()
    assert (uniform - torch.linspace(-1, 1, 20_000, dtype=torch.float64)).abs().max() < 0.03  # Kolmogorov-Smirnov
    rows = drawn["orthogonal"]
    torch.testing.assert_close(rows @ rows.T, torch.eye(CLASSES) * 4000 / 3, rtol=1e-4, atol=1e-2)


def test_layers_have_projections_of_their_own_and_seeds_others():
    made = []
    for seed in (7, 8):
        model = mlp(6, 6)
        optimizer = make(model, seed=seed)
        train(model, optimizer)
        made += list(optimizer._projections.values())
    assert len({bits(P) if isinstance(bits(P), bytes) else str(P) for P in made}) == 4


def test_the_output_of_a_layer_ends_before_pooling_whatever_comes_between():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.head = nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.Linear(24, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.pool(torch.tanh(self.conv(x))).flatten(1))

    parts = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, CLASSES))
    rows = []
    for model in (Functional(), parts):
        weights(model)
        x, y = normal(0, 6, 2, 6, 8), batch(parts)[1]
        made = []
        optimizer = make(model, projection=lambda z, made=made: made.append(z.shape) or torch.ones_like(z))
        with optimizer.targets(y):
            model(x)
        assert made == [(CLASSES, 4, 4, 6)]
        rows.append(grads(model))
    assert bits(rows[0]) == bits(rows[1])


def test_branches_and_skips_reach_every_parameter():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left = nn.Linear(4, 6), nn.Linear(6, 6)
            self.right = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
            self.short, self.norm, self.head = nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            both = torch.cat([self.left(x).relu(), self.right(x)], 1)
            return self.head(self.norm(both + self.short(x)).relu())

    model = weights(Branches())
    optimizer = make(model)
    x, y = normal(0, 6, 4), batch(mlp(6))[1]
    with optimizer.targets(y):
        out = model(x)
    assert not out.requires_grad
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads(model))
    # The block that ends in the sum: both branches and the shortcut, against one target.
    P = optimizer._projections[optimizer._places[model.short], 0]
    stem = model.stem(x).relu().detach()
    inner = model.right[1](model.right[0](stem)).detach()
    both = torch.cat([model.left(stem).relu(), model.right[2](inner)], 1)
    loss = ((model.norm(both + model.short(stem)).relu() - P[y]).square().sum() / 2) / len(y)
    params = [*model.left.parameters(), *model.right[2].parameters(), *model.short.parameters()]
    expected = torch.autograd.grad(loss, params)
    torch.testing.assert_close([param.grad for param in params], list(expected), rtol=1e-12, atol=1e-12)


def test_any_true_loss_is_that_of_the_last_layer():
    model = mlp(6, last=3)
    optimizer = TPSGD(model, 0.1, target_dim=3, seed=7)
    x, y = normal(0, 6, 4), normal(1, 6, 3)
    with optimizer.targets(y, lambda out, y: (out - y).abs().sum()):
        model(x)
    loss = (model[2](torch.relu(model[0](x)).detach()) - y).abs().sum()
    expected = torch.autograd.grad(loss, list(model[2].parameters()))
    torch.testing.assert_close(grads(model)[2:], list(expected), rtol=1e-14, atol=1e-14)
    assert optimizer.loss == loss.detach()
    assert not optimizer.loss.requires_grad


def test_packed_sequences_are_read_to_their_own_ends():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 4, 2, bidirectional=True), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.head(self.lstm(x)[1][0][-1])

    model, x = weights(Packed()), normal(0, 3, 5, 3)
    optimizer = make(model)
    y = torch.tensor([0, 3, 1])
    with optimizer.targets(y):
        model(pack_sequence([x[0], x[1, :3], x[2, :2]]))
    packed = grads(model)
    assert all(grad is not None and grad.abs().sum() > 0 for grad in packed)
    total = [torch.zeros_like(grad) for grad in packed]
    for row, length in enumerate((5, 3, 2)):  # the same, one by one
        optimizer.zero_grad()
        with optimizer.targets(y[row : row + 1]):
            model(x[row : row + 1, :length].transpose(0, 1))
        total = [a + b / 3 for a, b in zip(total, grads(model), strict=True)]
    torch.testing.assert_close(packed, total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("between", [nn.Identity, lambda: nn.Dropout(0.0)], ids=["nothing", "dropout"])
def test_a_layer_below_a_cell_has_a_target_at_each_step(between):
    class Encoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.between, self.cell = nn.Linear(3, 4), between(), nn.GRUCell(4, 4)
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor, cut=lambda tensor: tensor) -> Tensor:
            h = None
            for t in range(x.shape[1]):
                code = torch.tanh(self.encoder(x[:, t]))
                codes.append(code)
                h = self.cell(cut(self.between(code)), h)
            codes.append(h)
            return self.head(h)

    codes: list[Tensor] = []
    model = weights(Encoded())
    optimizer = make(model)
    x, y = normal(0, 6, 5, 3), batch(mlp(6))[1]
    with optimizer.targets(y):
        model(x)
    P, Q = (optimizer._projections[optimizer._places[m], 0] for m in (model.encoder, model.cell))
    made = grads(model)
    optimizer.close()
    codes.clear()
    model(x, cut=Tensor.detach)
    *codes, last = codes
    loss = sum((code - P[y]).square().sum() for code in codes) + (last - Q[y]).square().sum()
    expected = torch.autograd.grad(loss / 2 / len(y), [*model.encoder.parameters(), *model.cell.parameters()])
    torch.testing.assert_close(made[:-2], list(expected), rtol=1e-12, atol=1e-12)


def test_an_embedding_below_a_cell_is_trained_as_below_its_module():
    class Stepwise(nn.Module):
        def __init__(self, reader: Reader) -> None:
            super().__init__()
            self.embedding, self.cell, self.head = reader.embedding, nn.GRUCell(3, 4).double(), reader.head
            self.cell.load_state_dict({k.removesuffix("_l0"): v for k, v in reader.gru.state_dict().items()})

        def forward(self, tokens: Tensor) -> Tensor:
            h = None
            for t in range(tokens.shape[1]):
                h = self.cell(self.embedding(tokens[:, t]), h)
            return self.head(h)

    reader = Reader()
    reader.gru = nn.GRU(3, 4, batch_first=True)
    weights(reader)
    stepwise = Stepwise(copy.deepcopy(reader))
    rows = []
    for model in (reader, stepwise):
        optimizer = make(model)
        x, y = batch(reader)
        with optimizer.targets(y):
            model(x)
        rows.append(grads(model))
    torch.testing.assert_close(*rows, rtol=1e-12, atol=1e-12)


def test_frozen_recurrent_layers_are_passed_through():
    model, whole = weights(Reader()), weights(Reader())
    model.embedding.requires_grad_(False)
    model.gru.requires_grad_(False)
    for one in (model, whole):
        x, y = batch(one)
        with make(one).targets(y):
            one(x)
    assert grads(model)[:-2] == [None] * 9
    torch.testing.assert_close(grads(model)[-2:], grads(whole)[-2:], rtol=1e-12, atol=1e-12)


def test_dropout_between_recurrent_layers_acts():
    gru = nn.GRU(3, 4, 2, dropout=1.0)  # nothing arrives at the second layer
    model, y = nn.Sequential(gru), torch.tensor([0])
    optimizer = TPSGD(model, 0.0, num_classes=4, seed=0)
    with optimizer.targets(y, lambda out, y: F.cross_entropy(out[0][-1], y)):
        model(torch.randn(5, 1, 3))
    assert gru.weight_ih_l0.grad.abs().sum() > 0
    assert gru.weight_ih_l1.grad.abs().sum() == 0
    assert gru.bias_ih_l1.grad.abs().sum() > 0
    assert (gru.num_layers, gru.dropout, gru.input_size) == (2, 1.0, 3)
    assert "forward" not in vars(gru)


# The contract of an optimizer


@each_base
@each_model
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name, base):
    model = MODELS[name]()
    optimizer = make(model, **BASES[base])
    train(model, optimizer, range(3))
    other = MODELS[name]()
    resumed = make(other, lr=0.9, seed=8, **BASES[base])
    train(other, resumed)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved(optimizer))
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert bits(list(model.state_dict().values())) == bits(list(other.state_dict().values()))
    assert bits(saved(optimizer)) == bits(saved(resumed))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@each_model
def test_a_copy_trains_its_own_model(name, way):
    model = MODELS[name]()
    optimizer = make(model, momentum=0.9)
    train(model, optimizer, range(2))
    twin, other = (
        copy.deepcopy((model, optimizer)) if way == "deepcopy" else pickle.loads(pickle.dumps((model, optimizer)))
    )
    assert other.model is twin
    before = bits(list(model.parameters()))
    train(twin, other, range(2, 4))
    assert bits(list(model.parameters())) == before
    train(model, optimizer, range(2, 4))
    assert bits(list(model.parameters())) == bits(list(twin.parameters()))


def test_a_copy_of_the_model_alone_has_no_optimizer():
    model = mlp(6)
    optimizer = make(model)
    twin = copy.deepcopy(model)
    x, y = batch(model)
    F.cross_entropy(twin(x), y).backward()
    with optimizer.targets(y):
        assert twin(x).equal(model(x))
    pickle.loads(pickle.dumps(model))(x).sum().backward()


def test_schedulers_and_groups():
    model = mlp(6, 7)
    optimizer = make(model, 0.1, per_layer_lr={"2": 0.4})
    assert [(g["name"], g["lr"]) for g in optimizer.param_groups] == [("0", 0.1), ("2", 0.4), ("4", 0.1)]
    assert optimizer.param_groups[1]["param_names"] == ["2.weight", "2.bias"]
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(model, optimizer, range(2), scheduler)
    assert [g["lr"] for g in optimizer.param_groups] == [0.025, 0.1, 0.025]
    one = lr_scheduler.OneCycleLR(make(model, momentum=0.9), 0.1, total_steps=5)
    train(model, one.optimizer, range(4), one)
    text = repr(optimizer)
    assert "TPSGD" in text
    assert "name: 2" in text


def test_a_step_with_a_closure_returns_its_loss():
    model = mlp(6)
    optimizer = make(model)
    x, y = batch(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        with optimizer.targets(y):
            model(x)
        return optimizer.loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_hooks_of_steps_run():
    model, seen = mlp(6), []
    optimizer = make(model)
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    optimizer.register_step_post_hook(lambda *args: seen.append("after"))
    train(model, optimizer)
    assert seen == ["before", "after"]


def test_evaluation_is_untouched_and_close_takes_the_hooks_away():
    model = mlp(6)
    x, y = batch(model)
    expected = model(x)
    optimizer = make(model)
    with torch.no_grad():
        assert model(x).equal(expected)
    model.eval()
    out = model(x)
    assert out.equal(expected)
    assert out.requires_grad
    model.train()
    optimizer.close()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="closed"), optimizer.targets(y):
        pass


class Wrapper:
    """Hands on what is read and keeps what is written, as Lightning's wrapper of an optimizer does."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.__class__ = type("Wrapper", (Wrapper, TPSGD), {})

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


def test_what_wraps_the_optimizer_may_open_its_targets():
    model = mlp(6)
    optimizer = make(model)
    wrapped = Wrapper(optimizer)
    x, y = batch(model, 0)
    before = [param.detach().clone() for param in model.parameters()]
    with wrapped.targets(y):
        model(x)
    wrapped.optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    wrapped.close()
    with pytest.raises(RuntimeError, match="closed"), optimizer.targets(y):
        model(x)


def test_the_last_optimizer_of_a_model_trains_it():
    model = mlp(6)
    first = make(model)
    second = make(model)
    with pytest.raises(RuntimeError, match="closed, or a later one"), first.targets(batch(model)[1]):
        pass
    train(model, second)
    reference = weakref.ref(second)
    del second
    gc.collect()
    assert reference() is None
    x, y = batch(model)
    F.cross_entropy(model(x), y).backward()  # as if there had been none


def test_frozen_layers_stay():
    model = mlp(6, 7)
    model[2].requires_grad_(False)
    optimizer = make(model, weight_decay=0.1)
    before = copy.deepcopy(model[2])
    train(model, optimizer, range(2))
    assert bits(list(model[2].parameters())) == bits(list(before.parameters()))
    assert model[2].weight.grad is None
    assert model[0].weight.grad is not None
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_what_is_frozen_later_stays_as_well(frozen, in_forward):
    model = mlp(6, 7)
    optimizer = make(model, update_in_forward=in_forward)
    getattr(model[2], frozen).requires_grad_(False)
    before = copy.deepcopy(model[2])
    train(model, optimizer)
    for name in ("weight", "bias"):
        assert torch.equal(getattr(model[2], name), getattr(before, name)) == (name == frozen)


def test_tied_weights_have_the_sum_of_their_gradients():
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES))
        weights(model)
        model[2].weight = model[0].weight
        return model

    model = tied()
    optimizer = make(model)
    x, y = batch(model)
    with optimizer.targets(y):
        model(x)
    apart = tied()
    apart[2].weight = nn.Parameter(model[0].weight.detach().clone())
    other = make(apart)
    with other.targets(y):
        apart(x)
    torch.testing.assert_close(model[0].weight.grad, apart[0].weight.grad + apart[2].weight.grad, rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match=r"'2\.weight' is also '0\.weight'"):
        make(tied(), update_in_forward=True)


def test_a_module_that_is_used_twice_has_the_sum_of_its_gradients():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.first(x))
            return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))

    model = weights(Twice())
    optimizer = make(model)
    x, y = batch(mlp(6))
    with optimizer.targets(y):
        model(x)
    P = optimizer._projections[2, 0]
    hidden = torch.tanh(model.first(x)).detach()
    total = 0
    for _ in range(2):
        out = torch.tanh(model.shared(hidden))
        total = total + (out - P[y]).square().sum() / 2 / len(y)
        hidden = out.detach()
    expected = torch.autograd.grad(total, model.shared.weight)[0]
    torch.testing.assert_close(model.shared.weight.grad, expected, rtol=1e-12, atol=1e-12)


# Nets that are no chain


class Net(nn.Module):
    """Modules by name, and a forward pass that is a function of them and the input."""

    def __init__(self, run, **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor):
        return self.run(self, x)


def test_a_parameter_and_a_leaf_that_a_layer_reads_stay_what_they_are():
    leaf = torch.ones(9, 3, requires_grad=True)
    model = Net(
        lambda m, i: m.head(m.left(m.table.weight)[i] + m.right(leaf)[i]),
        table=nn.Embedding(9, 3), left=nn.Linear(3, 4), right=nn.Linear(3, 4), head=nn.Linear(4, CLASSES),
    )  # fmt: skip
    with make(model).targets(torch.tensor([0, 1])):
        model(torch.tensor([3, 5]))
    assert model.table.weight.requires_grad
    assert leaf.requires_grad
    assert all(layer.weight.grad.abs().sum() > 0 for layer in (model.left, model.right))


def two_inputs(width: int) -> nn.Module:
    model = Net(
        lambda m, x: m.head(m.left(x).relu(), m.right(x).relu()),
        left=nn.Linear(4, 6), right=nn.Linear(4, width), head=nn.Bilinear(6, width, CLASSES),
    )  # fmt: skip
    return weights(model)


@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("width", [6, 7])
def test_branches_have_targets_of_their_own(width, in_forward):
    model = two_inputs(width)
    before = copy.deepcopy(model)
    optimizer = make(model, update_in_forward=in_forward)
    x, y = batch(mlp(6))
    with optimizer.targets(y):
        model(x)
    optimizer.step()
    for name in ("left", "right"):
        layer = getattr(before, name)
        P = optimizer._projections[optimizer._places[getattr(model, name)], 0]
        loss = (layer(x).relu() - P[y]).square().sum() / 2 / len(y)
        (grad,) = torch.autograd.grad(loss, layer.weight)
        torch.testing.assert_close(getattr(model, name).weight, layer.weight - 0.1 * grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("conv_target", ["full", "channel"])
def test_convolutions_side_by_side_may_be_pooled_one_after_the_other(conv_target):
    def late(m, tokens):
        x = m.table(tokens).transpose(1, 2)
        maps = [m.three(x).relu(), m.four(x).relu()]
        return m.head(torch.cat([m.pool(h).squeeze(-1) for h in maps], 1))

    def early(m, tokens):
        x = m.table(tokens).transpose(1, 2)
        return m.head(torch.cat([m.pool(conv(x).relu()).squeeze(-1) for conv in (m.three, m.four)], 1))

    rows = []
    for run in (late, early):
        model = Net(run, table=nn.Embedding(9, 3), three=nn.Conv1d(3, 4, 3), four=nn.Conv1d(3, 5, 4),
                    pool=nn.AdaptiveMaxPool1d(1), head=nn.Linear(9, CLASSES))  # fmt: skip
        weights(model)
        x, y = batch(Reader())
        with make(model, conv_target=conv_target).targets(y):
            model(x)
        rows.append(grads(model))
        assert all(grad is not None and grad.abs().sum() > 0 for grad in rows[-1])
    torch.testing.assert_close(*rows, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("in_forward", [False, True])
def test_two_layers_that_read_one_embedding_or_norm_train_it_together(in_forward):
    model = Net(
        lambda m, i: m.head(m.left(m.norm(m.table(i))).tanh() * m.right(m.norm.last)),
        table=nn.Embedding(9, 4), norm=nn.LayerNorm(4), left=nn.Linear(4, 6), right=nn.Linear(4, 6),
        head=nn.Linear(6, CLASSES),
    )  # fmt: skip
    model.norm.register_forward_hook(lambda norm, args, out: setattr(norm, "last", out))
    weights(model)
    model.norm.last = None
    before = copy.deepcopy(model)
    optimizer = make(model, update_in_forward=in_forward)
    x, y = batch(Reader())[0][:, 0], batch(Reader())[1]
    with optimizer.targets(y):
        model(x)
    optimizer.step()
    (P,) = (P for (place, _), P in optimizer._projections.items() if place == optimizer._places[model.right])
    e = before.norm(before.table(x))
    loss = (before.left(e).tanh() * before.right(e) - P[y]).square().sum() / 2 / len(y)
    params = list(before.parameters())[:-2]
    for p, new, grad in zip(params, model.parameters(), torch.autograd.grad(loss, params), strict=False):
        torch.testing.assert_close(new, p - 0.1 * grad, rtol=1e-12, atol=1e-12)


FLAT = {
    "flatten": lambda h: h.flatten(1),
    "torch.flatten": lambda h: torch.flatten(h, 1),
    "view": lambda h: h.view(len(h), -1),
    "of other strides": lambda h: h.contiguous(memory_format=torch.channels_last).flatten(1),
    "positions": lambda h: h.flatten(2),
    "transposed": lambda h: h.flatten(2).transpose(1, 2),
    "permuted": lambda h: h.permute(0, 2, 3, 1),
    "scaled": lambda h: h.flatten(2).transpose(1, 2) * 1.0,
}


@pytest.mark.parametrize("conv_target", ["full", "channel"])
@pytest.mark.parametrize("local_loss", ["l2", "cross_entropy"])
@pytest.mark.parametrize("name", FLAT)
def test_flatten_and_transpose_as_functions_change_no_target(name, local_loss, conv_target):
    x, y = normal(0, 6, 2, 5, 6), batch(mlp(6))[1]
    rows = []
    for end in (nn.Dropout(0.0), nn.Identity()):  # the first ends the layer, so that the map itself is its output
        model = Net(
            lambda m, x: m.head(FLAT[name](m.end(m.conv(x).tanh()))).reshape(len(x), -1, CLASSES).mean(1),
            conv=nn.Conv2d(2, 4, 3), end=end, head=nn.Linear(FLAT[name](torch.ones(1, 4, 3, 4)).shape[-1], CLASSES),
        )  # fmt: skip
        weights(model)
        optimizer = make(model, local_loss=local_loss, conv_target=conv_target)
        with optimizer.targets(y):
            model(x)
        rows.append([*grads(model)[:2], optimizer._projections[optimizer._places[model.conv], 0]])
        if conv_target == "channel":
            assert rows[-1][-1].shape == (CLASSES, 4)
        else:
            rows[-1][-1] = rows[-1][-1].flatten(2)
    torch.testing.assert_close(*rows, rtol=1e-12, atol=1e-12)


def residual(depth: int, shared: bool = False) -> nn.Module:
    """A net whose skip connections start before the activation."""

    def run(m, x):
        x = m.stem(x)
        for layer in m.layers:
            x = x + layer(x.tanh())
        return m.head(x)

    layers = [nn.Linear(6, 6)] * depth if shared else [nn.Linear(6, 6) for _ in range(depth)]
    return weights(Net(run, stem=nn.Linear(4, 6), layers=nn.ModuleList(layers), head=nn.Linear(6, CLASSES)))


@pytest.mark.parametrize("in_forward", [False, True])
def test_a_skip_that_starts_before_an_activation_keeps_no_activations(in_forward):
    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            alive.add(self)
            peak.append(len(alive))

    x, y = batch(mlp(6))
    peaks = []
    for depth in (4, 8):
        model, alive, peak = residual(depth), weakref.WeakSet(), []
        optimizer = make(model, update_in_forward=in_forward)
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor), optimizer.targets(y):
            model(x)
        peaks.append(max(peak))
    assert peaks[0] == peaks[1]


def test_a_module_that_is_used_twice_through_such_a_skip():
    x, y = batch(mlp(6))
    model = residual(2, shared=True)
    message = r"'layers\.0' \(Linear\) is used again, and a skip connection that starts before an activation"
    with pytest.raises(RuntimeError, match=message), make(model).targets(y):
        model(x)
    model, before = residual(2, shared=True), residual(2, shared=True)
    optimizer = make(model, update_in_forward=True)  # which asks for the gradient of each use alone
    with optimizer.targets(y):
        model(x)
    P, layer = optimizer._projections[optimizer._places[model.layers[0]], 0], before.layers[0]
    hidden = before.stem(x).detach()
    for following in (torch.tanh, lambda out: out):  # what the next layer gets
        new = hidden + layer(hidden.tanh())
        loss = (following(new) - P[y]).square().sum() / 2 / len(y)
        for param, grad in zip(layer.parameters(), torch.autograd.grad(loss, list(layer.parameters())), strict=True):
            param.data.sub_(0.1 * grad)
        hidden = new.detach()
    torch.testing.assert_close(list(model.layers.parameters()), list(layer.parameters()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        dict(base=optimzoo.DaleLangevin, temperature=1.0),
        dict(base=optimzoo.AdaBelief, rounding="stochastic"),
        dict(base=optimzoo.DiffGrad, rounding="stochastic"),
    ],
    ids=lambda settings: settings["base"].__name__,
)
def test_random_bases_have_the_numbers_of_a_common_step(settings):
    results = []
    for in_forward in (False, True):
        model = mlp(4, 4).to(torch.bfloat16)
        optimizer = make(model, 0.01, update_in_forward=in_forward, **settings)
        for seed in range(3):
            x, y = batch(model, seed)
            optimizer.zero_grad()
            with optimizer.targets(y):
                model(x.bfloat16())
            optimizer.step()
        results.append(bits(list(model.parameters())))
    assert results[0] == results[1]


@pytest.mark.parametrize("base", [torch.optim.AdamW, optimzoo.DiffGrad])
def test_gradients_from_elsewhere_take_no_part_in_updates_in_the_forward_pass(base):
    results = []
    for stale in (False, True):
        model = mlp(6, 7)
        optimizer = make(model, base=base, update_in_forward=True)
        for param in model.parameters():
            param.grad = torch.ones_like(param) if stale else None
        x, y = batch(model)
        with optimizer.targets(y):
            model(x)
        results.append(bits(list(model.parameters())))
    assert results[0] == results[1]


# Memory, precision, compilers


@pytest.mark.parametrize("in_forward", [False, True])
def test_no_layer_gets_an_input_with_a_graph(in_forward):
    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.grad_fn)
            return super().forward(x)

    seen: list = []
    model = nn.Sequential(*[m for _ in range(6) for m in (Watched(4, 4), nn.Tanh())], Watched(4, CLASSES)).double()
    train(model, make(model, update_in_forward=in_forward))
    assert seen == [None] * 7


@pytest.mark.parametrize("in_forward", [False, True])
def test_autocast(in_forward):
    model = mlp(64, 64).float()
    optimizer = make(model, update_in_forward=in_forward, lr=0.05)
    x, y = batch(model, count=32)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), optimizer.targets(y):
            out = model(x.float())
        assert out.dtype is torch.bfloat16
        assert all(grad is None or grad.dtype is torch.float32 for grad in grads(model))
        optimizer.step()
        losses.append(float(optimizer.loss))
    assert losses[-1] < 0.7 * losses[0]


# A graph that breaks at a tensor with a graph of its own makes Dynamo look at its .grad, in torch 2.14.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("in_forward", [False, True])
def test_a_compiled_model_is_trained_as_it_is(in_forward):
    eager, compiled = cnn(), cnn()
    train(eager, make(eager, update_in_forward=in_forward), range(2))
    wrapped = torch.compile(compiled, backend="aot_eager")
    optimizer = make(wrapped, update_in_forward=in_forward)
    for seed in range(2):
        x, y = batch(compiled, seed)
        optimizer.zero_grad()
        with optimizer.targets(y):
            wrapped(x)
        optimizer.step()
    torch.testing.assert_close(list(compiled.parameters()), list(eager.parameters()), rtol=1e-12, atol=1e-12)


# Wrong input


def attention() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))


def complex_layer() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    return layer


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(())), nn.Linear(4, 4)


WRONG = {
    r"model must be a torch.nn.Module": (TypeError, lambda: make([nn.Parameter(torch.ones(2))])),
    r"DataParallel": (TypeError, lambda: make(nn.DataParallel(mlp(6)))),
    r"in_proj_weight.*'1', a MultiheadAttention": (ValueError, lambda: make(attention())),
    r"scale of 'the model', a Scaled": (ValueError, lambda: make(Scaled())),
    r"no parameters that require": (ValueError, lambda: make(nn.ReLU())),
    r"parameter '0\.weight' must be a plain, init": (ValueError, lambda: make(nn.Sequential(nn.LazyLinear(3)))),
    r"parameter 'weight' must be a plain": (ValueError, lambda: make(complex_layer())),
    r"give num_classes or target_dim, got None": (ValueError, lambda: TPSGD(mlp(6), 0.1)),
    r"give num_classes or target_dim, got 5": (ValueError, lambda: make(mlp(6), target_dim=3)),
    r"num_classes must be a whole.*got 0": (ValueError, lambda: make(mlp(6), num_classes=0)),
    r"target_dim must be a whole.*got True": (ValueError, lambda: TPSGD(mlp(6), target_dim=True)),
    r"lr must be finite and >= 0, got -1": (ValueError, lambda: make(mlp(6), -1.0)),
    r"per_layer_lr\['0'\] must be finite": (ValueError, lambda: make(mlp(6), per_layer_lr={"0": math.nan})),
    r"per_layer_lr names '1'": (ValueError, lambda: make(mlp(6), per_layer_lr={"1": 0.1})),
    r"local_loss must be a function or one of 'l2'.*'l3'": (ValueError, lambda: make(mlp(6), local_loss="l3")),
    r"projection must be a function or one of": (ValueError, lambda: make(mlp(6), projection=3)),
    r"conv_target must be 'full' or 'channel'": (ValueError, lambda: make(mlp(6), conv_target="half")),
    r"bptt must be True or False": (TypeError, lambda: make(mlp(6), bptt=1)),
    r"update_in_forward must be True or False": (TypeError, lambda: make(mlp(6), update_in_forward=None)),
    r"seed must be a whole number": (ValueError, lambda: make(mlp(6), seed=-1)),
    r"base must be a class of optimizers.*LBFGS": (TypeError, lambda: make(mlp(6), base=torch.optim.LBFGS)),
    r"base must be a class of optimizers.*got 'sgd'": (TypeError, lambda: make(mlp(6), base="sgd")),
    r"max_grad_norm=1.0 needs the gradients of all layers": (
        ValueError,
        lambda: make(mlp(6), base=optimzoo.DiffGrad, max_grad_norm=1.0, update_in_forward=True),
    ),
    r"AdaGradNorm needs the gradients of all layers": (
        ValueError,
        lambda: make(mlp(6), base=optimzoo.AdaGradNorm, update_in_forward=True),
    ),
    r"Invalid momentum": (ValueError, lambda: make(mlp(6), momentum=-1)),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_settings_are_named(message):
    error, call = WRONG[message]
    with pytest.raises(error, match=message):
        call()


def test_a_constructor_that_raises_leaves_no_hooks():
    model = mlp(6)
    with pytest.raises(ValueError, match="momentum"):
        make(model, momentum=-1)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


LABELS = {
    r"targets must be a tensor, got None": (TypeError, None),
    r"must be class numbers of dtype torch.int64, got torch.float32": (TypeError, torch.ones(6)),
    r"from 0 to 4, got 5": (ValueError, torch.tensor([0, 5])),
    r"from 0 to 4, got -1": (ValueError, torch.tensor([0, -1])),
    r"targets must have a dimension of samples": (ValueError, torch.tensor(1)),
    r"must not be empty": (ValueError, torch.empty(0, dtype=torch.int64)),
    r"targets of shape \(2,\) do not fit the output of '0' \(Linear\), of shape \(6, 6\)": (
        ValueError,
        torch.tensor([0, 1]),
    ),
    r"\(6, 6\) do not fit .* of shape \(6, 6\): the first 2 dimensions must agree, and those of units follow": (
        ValueError,
        torch.zeros(6, 6, dtype=torch.int64),
    ),
}


@pytest.mark.parametrize("message", LABELS)
def test_wrong_labels_are_named(message):
    error, y = LABELS[message]
    model = mlp(6)
    optimizer = make(model, momentum=0.9)
    train(model, optimizer)
    optimizer.zero_grad()
    before = bits([saved(optimizer), *model.parameters()])
    with pytest.raises(error, match=message), optimizer.targets(y):
        model(batch(model)[0])
    assert torch.is_grad_enabled()
    assert bits([saved(optimizer), *model.parameters()]) == before
    assert grads(model) == [None] * 4
    train(model, optimizer)  # goes on


@pytest.mark.parametrize("settings", [dict(num_classes=3), dict(num_classes=6), dict(target_dim=3)])
def test_an_output_of_another_shape_is_named_before_it_changes_the_last_layer(settings):
    model = nn.Sequential(nn.Linear(4, 1 if "target_dim" in settings else 5)).double()
    optimizer = TPSGD(model, 0.1, **settings)
    y = torch.ones(6, 3) if "target_dim" in settings else torch.zeros(6, dtype=torch.int64)
    message = r"the output of the model must be a tensor of shape \(6, \d\) for targets .*; got \(6, [15]\)"
    with pytest.raises(ValueError, match=message), optimizer.targets(y):
        model(batch(mlp(6))[0])
    assert grads(model) == [None, None]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_targets_that_are_not_finite_are_named(bad):
    with (
        pytest.raises(ValueError, match="targets must be finite"),
        TPSGD(mlp(6, last=3), target_dim=3).targets(torch.tensor([[0.0, bad, 1.0]])),
    ):
        pass


def test_a_context_in_which_the_model_was_not_called_is_an_error():
    model = mlp(6)
    optimizer = make(model)
    x, y = batch(model)
    with pytest.raises(RuntimeError, match="the model was not called within targets"), optimizer.targets(y):
        model[2](model[1](model[0](x)))
    assert torch.is_grad_enabled()
    train(model, optimizer)


@pytest.mark.parametrize("in_forward", [False, True])
def test_a_layer_that_is_unfrozen_or_replaced_later_is_named(in_forward):
    model = mlp(6, 7)
    model[2].requires_grad_(False)
    optimizer = make(model, update_in_forward=in_forward)
    train(model, optimizer)
    model[2].requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"'2\.weight' is new or was frozen"):
        train(model, optimizer)


def test_copies_of_copies_have_no_more_hooks_than_their_origin():
    optimizer = make(mlp(6))

    def count() -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in optimizer.model.modules())

    before = count()
    for _ in range(3):
        optimizer = copy.deepcopy(optimizer)
        assert count() == before
    train(optimizer.model, optimizer)


def test_projections_follow_the_dtype_of_the_model():
    model = mlp(6).float()
    optimizer = make(model)
    x, y = batch(model)
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        optimizer.zero_grad()
        with optimizer.targets(y):
            model(x.to(dtype))
        assert {P.dtype for P in optimizer._projections.values()} == {dtype}


@pytest.mark.parametrize("y", [torch.ones(6, 2), torch.ones(6), torch.ones(6, 3, dtype=torch.int64)])
def test_wrong_vectors_are_named(y):
    model = mlp(6, last=3)
    optimizer = TPSGD(model, 0.1, target_dim=3)
    with pytest.raises(ValueError, match=r"floating-point of shape \(samples, 3\)"), optimizer.targets(y):
        pass


def test_training_without_targets_and_evaluation_with_them_are_errors():
    model = mlp(6)
    optimizer = make(model)
    x, y = batch(model)
    with pytest.raises(RuntimeError, match="training mode and has no targets"):
        model(x)
    model.eval()
    with pytest.raises(RuntimeError, match="evaluation mode within"), optimizer.targets(y):
        model(x)
    model.train()
    with pytest.raises(RuntimeError, match="nested"), optimizer.targets(y), optimizer.targets(y):
        pass
    with pytest.raises(ValueError, match="loss must be one number"), optimizer.targets(y, lambda out, y: out):
        model(x)
    with pytest.raises(RuntimeError, match="modules of its model"):
        optimizer.add_param_group(dict(params=[nn.Parameter(torch.ones(2))]))
    train(model, optimizer)
    with pytest.raises(ValueError, match="not one of TPSGD"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), 0.1).state_dict())
    with pytest.raises(ValueError, match="not one of TPSGD"):
        optimizer.load_state_dict({})
    with torch.inference_mode(), pytest.raises(RuntimeError, match="the loss has no graph"):
        train(model, optimizer)


def test_maps_of_other_sizes_need_the_channel_target():
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    y = torch.tensor([0, 1])
    optimizer = make(model)
    with optimizer.targets(y):
        model(torch.randn(2, 2, 9))
    message = r"'0' \(Conv1d\) has units \(4, 6\) and had \(4, 7\).*channel"
    with pytest.raises(ValueError, match=message), optimizer.targets(y):
        model(torch.randn(2, 2, 8))
    optimizer = make(model, conv_target="channel")
    for length in (9, 8):
        with optimizer.targets(y):
            model(torch.randn(2, 2, length))


def test_a_projection_of_a_wrong_shape_is_named():
    model = mlp(6)
    optimizer = make(model, projection=lambda normal: normal.T)
    with pytest.raises(ValueError, match=r"projection must return a tensor of shape \(5, 6\)"):
        train(model, optimizer)


class Loop(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.cell, self.upper = kind, nn.GRUCell(3, 3), nn.GRUCell(3, 3)
        self.embedding, self.head = nn.Embedding(9, 3), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "again":
            one, other = self.head(x), self.head(x)
            return one + other
        h = upper = None
        out = 0
        x = self.embedding(x) if self.kind == "embedding" else x
        for t in range(3):
            h = self.cell(x[:, t], h)
            if self.kind == "embedding":
                upper = self.upper(h, upper)
                out = upper
            else:
                out = out + self.head(h)
        return self.head(out) if self.kind == "embedding" else out


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("again", r"'head' \(Linear\) is called again before"),
        ("heads", r"'(cell|head)' .* is called"),
        ("embedding", r"'upper' \(GRUCell\): embeddings below several cells"),
    ],
)
def test_uses_of_modules_that_have_no_local_loss_are_named(kind, message):
    model = Loop(kind)
    optimizer = make(model)
    x = torch.randn(2, 3) if kind == "again" else torch.randn(2, 3, 3) if kind == "heads" else torch.ones(2, 3).long()
    with pytest.raises(RuntimeError, match=message), optimizer.targets(torch.tensor([0, 1])):
        model(x)


def test_recurrent_layers_say_what_they_cannot_do():
    class FromState(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.gru, self.head = nn.Linear(3, 4), nn.GRU(3, 4), nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.gru(x, self.start(x[:1]))[0][-1])

    model, y = FromState(), torch.tensor([0, 1])
    cell = Net(
        lambda m, x: m.head(m.cell(x[0], m.start(x[0]))),
        start=nn.Linear(3, 4), cell=nn.GRUCell(3, 4), head=nn.Linear(4, CLASSES),
    )  # fmt: skip
    for bptt in (True, False):
        message = r"'cell' \(GRUCell\): no gradient reaches what made its first state"
        with pytest.raises(RuntimeError, match=message), make(cell, bptt=bptt).targets(y):
            cell(torch.randn(5, 2, 3))
    message, optimizer = r"'gru' \(GRU\): no gradient reaches what made its first state", make(model)
    with pytest.raises(RuntimeError, match=message), optimizer.targets(y):
        model(torch.randn(5, 2, 3))
    both = nn.Sequential(nn.GRU(3, 4, bidirectional=True))
    optimizer = make(both, bptt=False)
    with pytest.raises(ValueError, match="bptt=False is for tensors, one direction"), optimizer.targets(y):
        both(torch.randn(5, 2, 3))
    reader = weights(Reader())
    each = torch.zeros(2, 7, dtype=torch.int64)
    with pytest.raises(ValueError, match="one label a sequence"), make(reader, bptt=False).targets(each):
        reader(torch.ones(2, 7, dtype=torch.int64))
    assert both[0].num_layers == 1
    assert "forward" not in vars(both[0])

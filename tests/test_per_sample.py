"""Samples' gradients of every kind of layer are those that torch.func computes, and so are their norms and sums."""

import copy

import pytest
import torch
from torch import nn

from optimzoo import PerSampleGradients
from optimzoo.per_sample import FactoredSamples, norms, square_norms, weighted_sums


class Residual(nn.Module):
    """A sum of two branches, one of them used twice."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return x + self.inner(torch.tanh(self.inner(self.norm(x))))


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self, vocabulary=50, width=12, padding_idx=None):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=padding_idx)
        self.body = Residual(width)
        self.out = nn.Linear(width, vocabulary, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.body(self.embed(x)))


class Scale(nn.Module):
    """Has no rule."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))
        self.inner = nn.Linear(width, width)

    def forward(self, x, factor=1.0):
        return self.inner(x * self.scale) * factor


class CrossAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.memory = nn.Linear(8, self.attention.kdim)
        self.values = nn.Linear(8, self.attention.vdim)

    def forward(self, x):
        mask = torch.zeros(len(x), x.shape[1], dtype=torch.bool)
        mask[:, -1] = True
        return self.attention(x, self.memory(x), self.values(x), key_padding_mask=mask)[0]


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2),
        nn.InstanceNorm2d(16, affine=True),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 4),
    )


def encoder(**options):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def ids(*shape):
    return torch.randint(50, shape)


MODELS = {
    "linear": (lambda: nn.Linear(30, 20), (30,)),
    "linear-positions": (lambda: nn.Linear(30, 20), (3, 30)),
    "linear-many-positions": (lambda: nn.Linear(6, 5), (4, 9, 6)),
    "linear-no-bias": (lambda: nn.Linear(30, 20, bias=False), (2, 3, 30)),
    "linear-changed-in-place": (lambda: nn.Sequential(nn.Linear(9, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)), (3, 9)),
    "mlp": (lambda: nn.Sequential(nn.Linear(20, 30), nn.ReLU(inplace=True), nn.Linear(30, 10)), (20,)),
    "conv1d": (lambda: nn.Conv1d(6, 9, 3, stride=2, padding=2, dilation=2, padding_mode="circular"), (6, 11)),
    "conv1d-few": (lambda: nn.Conv1d(30, 40, 3, padding="same"), (30, 4)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=1), (3, 9, 8)),
    "conv2d-few": (lambda: nn.Conv2d(32, 48, 3, stride=2, padding=1, padding_mode="reflect"), (32, 4, 5)),
    "conv2d-groups-few": (lambda: nn.Conv2d(48, 32, 3, groups=2, dilation=2, padding=2), (48, 3, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, bias=False), (2, 4, 3, 5)),
    "conv3d-few": (lambda: nn.Conv3d(20, 30, 2, stride=2), (20, 4, 3, 2)),
    "embedding": (lambda: nn.Embedding(50, 12, padding_idx=3), ids(9, 7)),
    "embedding-one": (lambda: nn.Embedding(50, 12), ids(9)),
    "embedding-small": (lambda: nn.Embedding(50, 2), ids(9, 5, 40)),
    "layer-norm": (lambda: nn.LayerNorm((4, 5)), (3, 4, 5)),
    "layer-norm-no-bias": (lambda: nn.LayerNorm(5, bias=False), (5,)),
    "rms-norm": (lambda: nn.RMSNorm(5), (3, 5)),
    "group-norm": (lambda: nn.GroupNorm(2, 6), (6, 4, 3)),
    "instance-norm": (lambda: nn.InstanceNorm1d(6, affine=True), (6, 5)),
    "convnet": (convolutional, (3, 8, 8)),
    "residual": (lambda: nn.Sequential(nn.Linear(5, 40), Residual(40)), (3, 5)),
    "tied": (lambda: Tied(), ids(9, 7)),
    "tied-padding": (lambda: Tied(padding_idx=2), ids(9, 7)),
    "tied-small": (lambda: Tied(50, 2), ids(9, 20)),
    "whole": (lambda: nn.Sequential(nn.Linear(5, 6), Scale(6), nn.Tanh(), nn.PReLU()), (2, 5)),
    "attention-separate": (lambda: CrossAttention(kdim=6, vdim=10), (3, 8)),
    "attention-packed": (lambda: CrossAttention(), (3, 8)),
    "attention-no-bias": (lambda: CrossAttention(bias=False), (3, 8)),
    "attention-bias-kv": (lambda: CrossAttention(add_bias_kv=True), (3, 8)),
    "transformer": (encoder, (5, 16)),
    "transformer-norm-first": (lambda: encoder(norm_first=True), (5, 16)),
}
N = 9


def case(name, dtype, n=N):
    """A model, inputs and weights of its outputs, which make the loss of a sample."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().to(dtype)
    inputs = shape[:n] if isinstance(shape, torch.Tensor) else torch.randn(n, *shape, dtype=dtype)
    with torch.no_grad():
        outputs = model(inputs)
    return model, inputs, torch.randn(outputs.shape, dtype=dtype)


def reference(model, inputs, weights):
    """The gradients of the samples' losses, each from a pass of its own."""
    model = copy.deepcopy(model)
    rows = []
    for x, weight in zip(inputs, weights, strict=True):
        rows.append(torch.autograd.grad((model(x[None])[0].sin() * weight).sum(), [*model.parameters()]))
    return {
        name: torch.stack(row) for (name, _), row in zip(model.named_parameters(), zip(*rows, strict=True), strict=True)
    }


def backward(model, inputs, weights, reduction="sum"):
    losses = (model(inputs).sin() * weights).flatten(1).sum(1)
    (losses.sum() if reduction == "sum" else losses.mean()).backward()


def tensor(samples):
    return samples.to_tensor() if isinstance(samples, FactoredSamples) else samples


def quiet_engine(model, name, **options):
    if name in ("whole", "attention-bias-kv"):
        with pytest.warns(UserWarning, match="every sample's gradient is kept and the forward pass computed twice"):
            return PerSampleGradients(model, **options)
    return PerSampleGradients(model, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", MODELS)
def test_samples_norms_and_sums_are_those_of_torch_func(name, dtype):
    model, inputs, weights = case(name, dtype)
    exact = reference(model.double(), inputs.double() if inputs.is_floating_point() else inputs, weights.double())
    model.to(dtype)
    with quiet_engine(model, name):
        pass
    with quiet_engine(model, name, loss_reduction="mean"):
        backward(model, inputs, weights, "mean")
    params = dict(model.named_parameters())
    assert set(exact) == set(params)
    # The rounding of the backward pass before is that of its own order of sums.
    slack = {torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
    scale = max(float(values.abs().max()) for values in exact.values())
    for key, param in params.items():
        assert param.grad is None, key
        assert param.grad_sample.shape == exact[key].shape
        torch.testing.assert_close(tensor(param.grad_sample).double(), exact[key], rtol=0, atol=slack * scale)
    samples = [param.grad_sample for param in params.values()]
    own = [tensor(entry).double() for entry in samples]
    tight = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    squares = sum(entry.reshape(N, -1).square().sum(1) for entry in own)
    # Never less, for clipping rests on them: what rounding may have taken is added.
    for found in (square_norms(samples).sqrt(), norms(samples)):
        torch.testing.assert_close(found, squares.sqrt(), rtol=10 * tight, atol=0)
        assert (found >= squares.sqrt() * (1 - tight / 10)).all()
    rows = torch.rand(2, N, dtype=torch.float64)
    for entry, sums in zip(own, weighted_sums(samples, rows), strict=True):
        wanted = torch.einsum("kn,n...->k...", rows, entry)
        scale = float(torch.einsum("kn,n...->k...", rows, entry.abs()).max())
        torch.testing.assert_close(torch.stack(sums).double(), wanted, rtol=0, atol=tight * scale)


def test_cancelling_factors_are_clipped_and_leave_the_others_alone():
    """What a record makes of its factors must neither hide its norm nor round away the others' sum."""
    layer = nn.Linear(64, 64, bias=False)
    left, right = torch.zeros(9, 3, 64), torch.zeros(9, 3, 64)
    left[0, :2, 0], right[0, :2, 0] = (
        torch.tensor([1.2345678e15, -7.654321e15]),
        torch.tensor([7.654321e15, 1.2345678e15]),
    )
    # A difference of products that is a part in 1e15 of each, and still large.
    left[1, :2, 0] = torch.tensor([2.0**24 - 1, 2 - 2.0**24]) * 2.0**40
    right[1, :2, 0] = torch.tensor([2.0**24 - 1, 2.0**24])
    left[2, 0, 0], right[2, 0, 0] = 1e22, 1e23  # a weight that float32 does not have
    left[3, 0], right[3, 0, 0] = 1e-24, 3e38  # a factor that it does not have with its weight
    left[4, 0, 0], right[4, 0, 0] = 3e-23, 1.8e19  # whose square it does not have
    left[5:, :, 1], right[5:, :, 1] = 0.1, 0.1
    with PerSampleGradients(layer, loss_reduction="sum"):
        (layer(right) * left).sum().backward()
    samples = layer.weight.grad_sample
    assert isinstance(samples, FactoredSamples)
    exact = torch.einsum("ntp,ntd->npd", left.double(), right.double())
    found = norms([samples])
    assert (found >= exact.flatten(1).norm(dim=1) * (1 - 1e-7)).all()
    for bound in (1.0, 1e-4):
        weights = (bound / (found * (1 + 1e-6))).clamp(max=1)
        for i in range(5):
            ((alone,),) = weighted_sums([samples], torch.where(torch.arange(9) == i, weights, 0.0)[None])
            assert alone.double().norm() <= bound
        ((others,),) = weighted_sums([samples], torch.where(torch.arange(9) > 4, weights, 0.0)[None])
        for i in range(5):
            chosen = torch.where((torch.arange(9) > 4) | (torch.arange(9) == i), weights, 0.0)
            ((together,),) = weighted_sums([samples], chosen[None])
            assert (together - others).double().norm() <= bound * (1 + 1e-6)


def test_rows_that_cancel_leave_the_others_alone():
    layer = nn.Embedding(5000, 8)
    grads = torch.zeros(40, 3, 8)
    grads[:, 0, 0] = 1.0
    sums = []
    for record in ([0.0, 0.0, 0.0], [1e10, -1e10, 0.0], [1e10, 1.0, -1e10]):
        grads[20, :, 0] = torch.tensor(record)
        layer.weight.grad_sample = None
        with PerSampleGradients(layer, loss_reduction="sum"):
            (layer(torch.zeros(40, 3, dtype=torch.long)) * grads).sum().backward()
        samples = layer.weight.grad_sample
        assert isinstance(samples, FactoredSamples)
        ((total,),) = weighted_sums([samples], (1 / norms([samples])).clamp(max=1)[None])
        sums.append(total)
    assert all((total - sums[0]).norm() <= 1 + 1e-5 for total in sums)


def test_norms_are_those_of_the_factors_as_they_are():
    layer, inputs = nn.Linear(64, 64, bias=False), torch.ones(2, 1, 64)
    with PerSampleGradients(layer, loss_reduction="sum"):
        layer(inputs).sum().backward()
    samples = layer.weight.grad_sample
    assert isinstance(samples, FactoredSamples)
    before = norms([samples])
    inputs.mul_(1e3)  # a buffer that the next batch is written to
    torch.testing.assert_close(norms([samples]), 1e3 * before)

"""Samples' gradients of every kind of layer are those that torch.func computes, and so are their norms and sums."""

import copy
import itertools
import math
import operator
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from optimzoo import PerSampleGradients, ops, per_sample
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


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.LSTM(5, 4, batch_first=True)

    def forward(self, x):
        return self.inner(x)[0]


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
WHOLE = ("whole", "attention-bias-kv")


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
    if name in WHOLE:
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


@pytest.mark.skipif(bool(ops.missing("cpu")), reason="needs the native library")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_native_passes_are_those_of_torch(dtype, data):
    n = data.draw(st.sampled_from([0, 1, 2, 5, 17]))
    shapes = data.draw(
        st.lists(st.sampled_from([(), (0,), (3,), (3, 5), (1030,), (40, 43, 10)]), min_size=1, max_size=3)
    )
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    samples = [torch.randn(n, *shape, generator=draw).to(dtype) for shape in shapes]
    if data.draw(st.booleans()):
        samples = [
            entry.transpose(1, 2).contiguous().transpose(1, 2) if entry.dim() > 2 else entry for entry in samples
        ]
    rows = torch.rand(data.draw(st.integers(1, 2)), n, generator=draw, dtype=torch.float64)
    dropped = torch.rand(n, generator=draw) < 0.3
    rows[:, dropped] = 0
    for entry in samples:
        entry[dropped] = math.nan
    own = [entry.double().reshape(n, entry.shape[1:].numel()) for entry in samples]

    def check():
        squares = sum(entry.square().sum(1) for entry in own)
        torch.testing.assert_close(square_norms(samples), squares, rtol=1e-13, atol=0, equal_nan=True)
        for entry, sums in zip(own, weighted_sums(samples, rows), strict=True):
            wanted = rows @ torch.where(dropped[:, None], 0.0, entry)
            assert all(total.dtype == torch.float64 for total in sums)
            torch.testing.assert_close(torch.stack(sums).reshape(wanted.shape), wanted, rtol=1e-12, atol=1e-12)

    check()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(per_sample, "_native", lambda name, tensors: None)
        patch.setattr(per_sample, "_CHUNK", 4000)
        check()


@pytest.mark.skipif(bool(ops.missing("cpu")), reason="needs the native library")
def test_native_passes_do_not_depend_on_the_threads():
    samples = [torch.randn(33, 70, 601), torch.randn(33, 9)]
    rows = torch.rand(2, 33, dtype=torch.float64)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append([square_norms(samples), *itertools.chain(*weighted_sums(samples, rows))])
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@pytest.mark.skipif(bool(ops.missing("cpu")), reason="needs the native library")
def test_native_passes_say_what_they_cannot_read():
    products, sums = torch.ops.optimzoo.sample_products, torch.ops.optimzoo.weighted_sums
    samples, out = torch.zeros(4, 3), torch.zeros(4, dtype=torch.float64)
    rows, total = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    for wrong in (samples.T.contiguous().T, torch.zeros(5, 3), samples.int(), torch.zeros(())):
        with pytest.raises(RuntimeError, match=r"left\[0\] and right\[0\] must be contiguous on the CPU"):
            products([wrong], [], out)
        with pytest.raises(RuntimeError, match=r"samples\[0\] must be contiguous on the CPU"):
            sums([wrong], rows, [total])
    with pytest.raises(RuntimeError, match=r"left\[0\] and right\[0\] must be contiguous on the CPU"):
        products([samples], [samples.double()], out)
    with pytest.raises(RuntimeError, match="right holds 1 tensors, left 2"):
        products([samples] * 2, [samples], out)
    with pytest.raises(RuntimeError, match="products must be float64 numbers"):
        products([samples], [], out.float())
    with pytest.raises(RuntimeError, match="sums holds 1 tensors, samples 2"):
        sums([samples] * 2, rows, [total])
    for wrong in (rows.float(), rows.repeat(2, 1), rows[0]):
        with pytest.raises(RuntimeError, match="weights must be a contiguous float64 matrix"):
            sums([samples], wrong, [total])
    torch.library.opcheck(products.default, ([samples], [], out))
    torch.library.opcheck(sums.default, ([samples], rows, [total]))


def factored(n=3, positions=4, dtype=torch.float64, scale=1.0):
    draw = torch.Generator().manual_seed(1)
    left, right = (torch.randn(n, positions, width, generator=draw, dtype=dtype) for width in (30, 20))
    products = per_sample._Products(left, right)
    rows = per_sample._Rows(
        torch.randint(30, (n, 5), generator=draw), torch.randn(n, 5, 20, generator=draw, dtype=dtype)
    )
    shape = torch.Size((30, 20))
    return [FactoredSamples(parts, shape, scale) for parts in ([products], [rows], [rows, products])]


@pytest.mark.parametrize("power", [-300, -160, -80, 80, 160, 300])
def test_norms_are_right_from_one_end_of_float64_to_the_other(power):
    for entry in [*factored(), factored()[0].to_tensor()]:
        usual = norms([entry])
        if isinstance(entry, FactoredSamples):
            half = 10.0 ** (power / 2)
            parts = [
                replace(part, right=part.right * (half * half), left=part.left)
                if isinstance(part, per_sample._Rows)
                else replace(part, left=part.left * half, right=part.right * half)
                for part in entry._parts
            ]
            other = FactoredSamples(parts, entry.shape[1:])
        else:
            other = entry * 10.0**power
        torch.testing.assert_close(norms([other]) / 10.0**power, usual, rtol=1e-12, atol=0)
        # Beside samples of another size, and beside one that is not finite.
        both = norms([other, torch.full((3, 2), 3.0, dtype=torch.float64)])
        torch.testing.assert_close(both, torch.hypot(usual * 10.0**power, torch.tensor(18.0).double().sqrt()))
        wrong = torch.tensor([[1.0], [math.nan], [math.inf]], dtype=torch.float64)
        assert norms([other, wrong]).isfinite().tolist() == [True, False, False]


def test_norms_do_not_understate_what_cancels():
    # Two positions whose products are each other's negative but for a part in a million.
    left = torch.randn(5, 1, 300)
    right = torch.randn(5, 1, 200)
    shift = 1e-4 * torch.randn(5, 1, 300)
    entry = FactoredSamples(
        [per_sample._Products(torch.cat([left, shift - left], 1), torch.cat([right, right], 1))], torch.Size((300, 200))
    )
    exact = (entry._parts[0].left.double().mT @ entry._parts[0].right.double()).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms([entry]), exact, rtol=3e-5, atol=0)  # with what sums in float32 may add to it
    assert (norms([entry]) >= exact).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])
def test_a_sample_without_a_weight_is_left_out_whatever_it_is(bad):
    for dtype in (torch.float32, torch.bfloat16):
        for entry in factored(dtype=dtype):
            rows = torch.tensor([[0.5, 0.0, 2.0], [0.5, 0.0, 0.0]], dtype=torch.float64)
            wanted = entry.weighted_sums(rows)
            for part in entry._parts:
                part.right[1] = bad
                if part.left.is_floating_point():
                    part.left[1] = bad
            assert entry.square_norms()[[0, 2]].isfinite().all()
            if math.isnan(bad) or math.isinf(bad):
                assert not entry.square_norms()[1].isfinite()
            for found, total in zip(entry.weighted_sums(rows), wanted, strict=True):
                assert found.dtype == torch.float32
                assert torch.equal(found, total)


def test_micro_batches_are_lists_and_their_samples_follow_each_other():
    model, inputs, weights = case("tied", torch.float64)
    params = dict(model.named_parameters())
    with PerSampleGradients(model, loss_reduction="sum"):
        backward(model, inputs, weights)
        whole = [param.grad_sample for param in params.values()]
        for param in params.values():
            param.grad_sample = None
        for part in (slice(0, 4), slice(4, 4), slice(4, N)):
            backward(model, inputs[part], weights[part])
        parts = [param.grad_sample for param in params.values()]
    assert all(isinstance(entry, list) and [len(part) for part in entry] == [4, 0, 5] for entry in parts)
    torch.testing.assert_close(norms(parts), norms(whole), rtol=1e-12, atol=0)
    rows = torch.rand(2, N, dtype=torch.float64)
    for found, wanted in zip(weighted_sums(parts, rows), weighted_sums(whole, rows), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"samples\[1\] is of \[4, 0, 5\] samples, samples\[0\] of \[9\]"):
        square_norms([whole[0], parts[1]])


# torch's instance norm takes no batch of no samples.
@pytest.mark.parametrize("name", sorted({*MODELS} - {"instance-norm", "convnet"}))
def test_an_empty_batch_has_gradients_of_no_samples(name):
    model, inputs, weights = case(name, torch.float32, n=3)
    with quiet_engine(model, name):
        (model(inputs[:0]) * weights[:0]).sum().backward()
    for param in model.parameters():
        assert param.grad_sample.shape == (0, *param.shape)
    samples = [param.grad_sample for param in model.parameters()]
    assert norms(samples).shape == (0,)
    for param, (total,) in zip(model.parameters(), weighted_sums(samples, torch.zeros(1, 0)), strict=True):
        assert torch.equal(total, torch.zeros(param.shape, dtype=total.dtype))


def test_the_model_is_as_it_was_after_errors_and_at_the_end():
    model, inputs, weights = case("residual", torch.float32)
    before = {name: (id(module), dict(module.__dict__)) for name, module in model.named_modules()}
    params = [*model.parameters()]
    engine = PerSampleGradients(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(torch.randn(N, 7))
    assert all(map(operator.is_, params, model.parameters()))

    def fail(*_):
        raise KeyboardInterrupt

    handle = model[1].norm.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(inputs)
    handle.remove()
    assert all(map(operator.is_, params, model.parameters()))
    # A backward pass that failed leaves nothing for the next one.
    outputs = model(inputs)
    outputs.register_hook(lambda grad: None)
    first = model[0].forward
    hook = outputs.grad_fn.next_functions[0][0].register_prehook(fail)
    with pytest.raises(KeyboardInterrupt):
        outputs.sum().backward()
    hook.remove()
    assert not any(hasattr(param, "grad_sample") for param in params)
    backward(model, inputs, weights, "mean")
    assert all(isinstance(param.grad_sample, torch.Tensor | FactoredSamples) for param in params)
    assert model[0].forward is first
    engine.remove()
    engine.remove()
    for name, module in model.named_modules():
        assert (id(module), dict(module.__dict__)) == before[name]
    backward(model, inputs, weights)
    assert all(param.grad is not None for param in params)


@pytest.mark.parametrize("how", ["no_grad", "eval"])
def test_nothing_is_recorded_without_gradients_or_in_eval_mode(how):
    model, inputs, weights = case("transformer", torch.float32)
    with torch.no_grad():
        plain = model.eval()(inputs)
    with PerSampleGradients(model.train(how == "no_grad")):
        if how == "no_grad":
            with torch.no_grad():
                torch.testing.assert_close(model(inputs), plain)
        else:
            torch.testing.assert_close(model(inputs), plain)
            with torch.no_grad():
                torch.testing.assert_close(model(inputs), plain)  # by the layers' fast path
            backward(model, inputs, weights)
            assert all(param.grad is not None for param in model.parameters())
        assert not any(hasattr(param, "grad_sample") for param in model.parameters())


def test_frozen_parameters_get_none_and_the_rest_is_as_before():
    model, inputs, weights = case("transformer", torch.float64)
    exact = reference(model, inputs, weights)
    frozen = {name for i, name in enumerate(exact) if i % 3 == 0}
    for name, param in model.named_parameters():
        param.requires_grad_(name not in frozen)
    with PerSampleGradients(model, loss_reduction="sum"):
        backward(model, inputs, weights)
    for name, param in model.named_parameters():
        assert hasattr(param, "grad_sample") == (name not in frozen)
        if name not in frozen:
            torch.testing.assert_close(tensor(param.grad_sample), exact[name], rtol=1e-9, atol=1e-10)


def test_outputs_are_those_of_the_model_alone():
    for name in ("attention-packed", "attention-separate", "transformer", "convnet", "tied"):
        model, inputs, _ = case(name, torch.float64)
        plain = model(inputs)
        with PerSampleGradients(model):
            torch.testing.assert_close(model(inputs), plain)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    heads = torch.randn(6, 5, 5, dtype=torch.float64)
    padding = torch.zeros(3, 5, dtype=torch.float64).index_fill_(1, torch.tensor([4]), -math.inf)
    for options in (
        dict(attn_mask=causal, is_causal=True, need_weights=False),
        dict(attn_mask=heads, key_padding_mask=padding, average_attn_weights=False),
        dict(attn_mask=causal.double().masked_fill(causal, -math.inf), need_weights=True),
    ):
        plain = attention(x, x, x, **options)
        with PerSampleGradients(attention):
            found = attention(x, x, x, **options)
            torch.testing.assert_close(found, plain)
            with pytest.raises(RuntimeError, match=r"what enters the model \(MultiheadAttention\) has no dimension of"):
                attention(x[0], x[0], x[0])


def test_dropout_within_attention_is_followed():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.5, batch_first=True)
    inputs = torch.randn(4, 5, 16)
    state = torch.get_rng_state()
    with PerSampleGradients(model, loss_reduction="sum"):
        model(inputs).sin().sum().backward()
        sums = [weighted_sums([param.grad_sample], torch.ones(1, 4))[0][0] for param in model.parameters()]
        # The same masks, with the parameters as they are used by the same layers.
        torch.set_rng_state(state)
        for param in model.parameters():
            param.grad_sample = None
        model(inputs).sin()[:2].sum().backward()
        half = [tensor(param.grad_sample) for param in model.parameters()]
    for param, total, rows in zip(model.parameters(), sums, half, strict=True):
        assert not rows[2:].any()
        assert total.shape == param.shape
        assert rows[:2].any()


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return torch.dropout(x, 0.5, self.training) * self.scale


class Positions(nn.Module):
    """Adds the same positions to all samples."""

    def __init__(self):
        super().__init__()
        self.place, self.out = nn.Embedding(5, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.out(x + self.place(torch.arange(5)))


class Outside(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return nn.functional.linear(self.layer(x), self.layer.weight)


def test_what_cannot_be_followed_is_said_when_it_is_met():
    def step(model, inputs, mode):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine = PerSampleGradients(model)
        with engine:
            if mode:
                mode()
            model(inputs).sum().backward()

    def message(model, inputs, mode=None):
        with pytest.raises(RuntimeError) as error:
            step(model, inputs, mode)
        assert not any(hasattr(param, "grad_sample") for param in model.parameters())
        return str(error.value)

    x = torch.randn(4, 5, 3)
    assert "the first dimension of place (Embedding) and of out (Linear) differs" in message(Positions(), x)
    assert "layer.weight is used outside of its module's forward pass" in message(Outside(), x)
    assert "the model (Random) draws random numbers" in message(Random(), x)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert "0.bias is used outside of its module's forward pass, or while that is in eval mode" in message(
        model, x, lambda: model[0].eval()
    )
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(5).eval().requires_grad_(False))
    assert "1 (BatchNorm1d) mixes samples" in message(model, x, lambda: model.train())

    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            x = x * 1
            y = self.layer(x)
            x += 1
            return y

    assert "what entered layer (Linear) has been changed in place since" in message(Changes(), x)
    # Its states of zeros are those of one sample, which torch.func cannot write all samples' into.
    recurrent = message(Recurrent().double(), torch.randn(4, 3, 5, dtype=torch.float64))
    assert "torch.func cannot take the samples' gradients of inner (LSTM)" in recurrent


def frozen(module):
    return module.eval().requires_grad_(False)


REFUSED = {
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
        r"1 \(BatchNorm1d\) mixes samples.*GroupNorm",
    ),
    "statistics": (lambda: nn.InstanceNorm1d(2, track_running_stats=True), "track_running_stats=False"),
    "recurrent": (
        lambda: nn.LSTM(2, 2),
        r"the model \(LSTM\) has the samples in the second dimension.*batch_first=True",
    ),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2), r"self_attn \(MultiheadAttention\) .*batch_first=True"),
    "norm of rows": (lambda: nn.Embedding(3, 2, max_norm=1.0), "max_norm must be None"),
    "frequency": (lambda: nn.Embedding(3, 2, scale_grad_by_freq=True), "scale_grad_by_freq must be False"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), r"0 \(LazyLinear\) has parameters without a shape"),
    "parallel": (lambda: nn.DataParallel(nn.Linear(2, 2)), "give the module that it wraps"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature", "ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", REFUSED)
def test_models_whose_samples_gradients_cannot_be_had_are_refused(name):
    make, text = REFUSED[name]
    model = make()
    with pytest.raises(ValueError, match=text):
        PerSampleGradients(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        PerSampleGradients(3)
    with pytest.raises(ValueError, match="loss_reduction must be 'mean' or 'sum', got 'none'"):
        PerSampleGradients(nn.Linear(2, 2), loss_reduction="none")
    model = nn.Linear(2, 2)
    with PerSampleGradients(model), pytest.raises(ValueError, match="has a PerSampleGradients already"):
        PerSampleGradients(model)
    PerSampleGradients(nn.Sequential(nn.Linear(2, 2), frozen(nn.BatchNorm1d(2)))).remove()


def test_a_layer_called_in_both_of_two_passes_adds_up():
    model, inputs, weights = case("tied", torch.float64)
    other = inputs.flip(0)
    params = dict(model.named_parameters())
    first, second = reference(model, inputs, weights), reference(model, other, weights)
    with PerSampleGradients(model, loss_reduction="sum"):
        ((model(inputs).sin() * weights).sum() + (model(other).sin() * weights).sum()).backward()
    for name, param in params.items():
        torch.testing.assert_close(tensor(param.grad_sample), first[name] + second[name], rtol=1e-9, atol=1e-10)
    squares = sum((first[name] + second[name]).reshape(N, -1).square().sum(1) for name in params)
    torch.testing.assert_close(
        norms([param.grad_sample for param in params.values()]), squares.sqrt(), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_factors_are_multiplied_in_float32(dtype):
    model, inputs, weights = case("linear-positions", torch.float32)
    model = model.to(dtype)
    with PerSampleGradients(model, loss_reduction="sum"):
        (model(inputs.to(dtype)) * weights.to(dtype)).sum().backward()
    entry = model.weight.grad_sample
    assert isinstance(entry, FactoredSamples)
    assert entry.dtype == torch.float32
    exact = weights.to(dtype).double().mT @ inputs.to(dtype).double()
    torch.testing.assert_close(entry.to_tensor().double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norms([entry]), exact.flatten(1).norm(dim=1), rtol=1e-6, atol=0)
    assert model.bias.grad_sample.dtype == torch.float32


def test_autocast_and_reduced_precision_have_no_part_in_the_products():
    model, inputs, weights = case("linear-positions", torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with PerSampleGradients(model, loss_reduction="sum"), torch.autocast("cpu", torch.bfloat16):
            (model(inputs).float() * weights).sum().backward()
            entry = model.weight.grad_sample
            (total,) = entry.weighted_sums(torch.ones(1, N, dtype=torch.float64))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    rounded = weights.bfloat16().double()
    assert total.dtype == torch.float32
    torch.testing.assert_close(
        total.double(), torch.einsum("ntp,ntd->pd", rounded, inputs.double()), rtol=1e-5, atol=1e-5
    )


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.untyped_storage().nbytes() // value.element_size())
        return result


def test_samples_gradients_of_large_layers_are_never_there():
    torch.manual_seed(0)
    layers = {
        "linear": (nn.Linear(300, 200), torch.randn(20, 3, 300)),
        "conv": (nn.Conv2d(64, 96, 3, padding=1), torch.randn(20, 64, 3, 3)),
        "embedding": (nn.Embedding(2000, 30), torch.randint(2000, (20, 9))),
    }
    for name, (layer, inputs) in layers.items():
        wanted = layer.weight.numel() * len(inputs)
        with PerSampleGradients(layer), Largest() as seen:
            layer(inputs).sin().sum().backward()
            samples = layer.weight.grad_sample
            norms([samples])
            weighted_sums([samples], torch.rand(2, 20))
            assert 0 < seen.numbers < wanted / 4, name
            samples.to_tensor()
            assert seen.numbers >= wanted, name  # the mode does see what it is to see


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

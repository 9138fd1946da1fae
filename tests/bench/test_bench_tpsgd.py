"""The evidence of TPSGD: the other rules, data, memory and tables."""

import math
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench import tpsgd
from bench.step import memory_changes


@pytest.mark.parametrize("method", tpsgd.METHODS)
def test_every_method_learns_the_digits(method):
    net = "digits, CNN" if "channel" in method else "digits, MLP 1 x 128"
    lr = {"forward-forward": 0.3, "last layer only": 0.1, "the same, by channel": 0.03}.get(method, 0.01)
    record = tpsgd.train(net, method, lr, seed=1, epochs=5)
    assert record["test"] > 50
    assert record == {**tpsgd.train(net, method, lr, seed=1, epochs=5), "seconds": record["seconds"]}


@pytest.mark.parametrize("net", tpsgd.NETS)
def test_direct_feedback_projects_the_error_of_the_output(net):
    torch.manual_seed(0)
    setup = tpsgd.SETUPS[net]
    model, data = setup.net(), setup.load(tpsgd.DATA)
    x, y = data.train[0][:20], data.train[1][:20]
    rule = tpsgd.direct_feedback(model, 0.0, seed=3)
    model.train()
    rule.step(x, y)
    logits = model(x)
    # The gradient of the last layer is back-propagation's.
    expected = torch.autograd.grad(F.cross_entropy(logits, y), list(model[-1].parameters()))
    torch.testing.assert_close([p.grad for p in model[-1].parameters()], list(expected), rtol=1e-4, atol=1e-6)
    # That of the first is what its output, up to pooling, has with the projected error.
    generator = torch.Generator().manual_seed(3)
    place = next(i for i, module in enumerate(model) if isinstance(module, tpsgd.LAYERS))
    end = next(i for i, m in enumerate(model) if i > place and isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d))
    while isinstance(model[end - 1], nn.MaxPool2d | nn.Flatten):
        end -= 1
    out = model[:end](x)
    units = out[0].numel()
    feedback = (2 * torch.rand(10, units, generator=generator) - 1) * math.sqrt(6 / units)
    signal = ((logits.softmax(1) - F.one_hot(y, 10)) / 20).detach() @ feedback
    (first,) = torch.autograd.grad((out.flatten(1) * signal).sum(), [next(model[place].parameters())])
    torch.testing.assert_close(next(model[place].parameters()).grad, first, rtol=1e-3, atol=1e-6)


def test_forward_forward_predicts_the_label_with_the_most_goodness():
    torch.manual_seed(0)
    net = tpsgd.ForwardForward(tpsgd.mlp(64, 2))
    x = torch.randn(3, 1, 8, 8)
    goodness = net(x)
    assert goodness.shape == (3, 10)
    one = list(net.goodness(x, torch.tensor([7, 7, 7])))
    assert len(one) == 2
    torch.testing.assert_close(goodness[:, 7], one[1])  # the first layer sees the label itself


def test_cifar_is_read_from_its_binary_version(tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (60, 3073), dtype=np.uint8)
    rows[:, 0] %= 10
    for i in range(5):
        rows[10 * i : 10 * i + 10].tofile(tmp_path / f"data_batch_{i + 1}.bin")
    rows[50:].tofile(tmp_path / "test_batch.bin")
    train, validation, test = tpsgd.cifar(tmp_path)
    assert [len(part[1]) for part in (train, validation, test)] == [45, 5, 10]
    assert train[1].tolist() == rows[:45, 0].tolist()
    torch.testing.assert_close(train[0].mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    red = rows[50, 1:1025].reshape(32, 32).astype(float)
    scaled = test[0][0, 0].numpy()
    assert np.corrcoef(red.ravel(), scaled.ravel())[0, 1] == pytest.approx(1, abs=1e-5)
    with pytest.raises(FileNotFoundError, match="data_batch"):
        tpsgd.cifar(tmp_path / "nothing")


def test_the_deep_preset_trains(tmp_path, monkeypatch):
    test_cifar_is_read_from_its_binary_version(tmp_path)
    monkeypatch.setattr(tpsgd, "ROOT", [tmp_path])
    (net,) = tpsgd.VGG
    assert set(tpsgd.train(net, "TPSGD, l2", 0.01, seed=0, epochs=1)) == {"validation", "test", "seconds"}


def test_memory_is_flat_in_depth():
    peaks = {}
    for layers in (2, 12):
        for name, build in tpsgd.STEPS.items():
            x, y = torch.randn(256, 64), torch.randint(10, (256,))
            step = build(tpsgd.mlp(64, layers, 64))
            step(x, y)
            peaks[layers, name] = max(accumulate(memory_changes(lambda step=step, x=x, y=y: step(x, y)), initial=0))
    activation = 256 * 64 * 4
    in_forward, gradient = "TPSGD, in forward", 64 * 65 * 4
    assert peaks[12, in_forward] - peaks[2, in_forward] < activation / 4
    assert peaks[12, "TPSGD"] - peaks[2, "TPSGD"] < 10 * gradient * 1.1 + activation / 4
    assert peaks[12, "back-propagation"] - peaks[2, "back-propagation"] > 9 * activation


def test_tables_are_made_of_what_is_there(tmp_path, capsys):
    assert tpsgd.main(["--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "| digits, CNN | not run | not run | not run | not run | - | not run |" in text
    assert "| MLP 16 x 512 | not run |" in text
    with pytest.raises(SystemExit):
        tpsgd.main(["vgg"])
    with pytest.raises(SystemExit):
        tpsgd.main(["nothing"])


def test_the_rate_is_the_smallest_within_a_standard_error(tmp_path, monkeypatch):
    scores = dict(zip(tpsgd.GRID, (50.0, 95.0, 96.0, 96.5, 90.0, 10.0, 10.0), strict=True))
    calls = []

    def train(net, method, lr, seed):
        calls.append((lr, seed))
        return dict(validation=scores[lr], test=scores[lr] + seed / 1000, seconds=0.0)

    monkeypatch.setattr(tpsgd, "train", train)
    results = tpsgd.Results(tmp_path, "tpsgd")
    lr, found = tpsgd.trained(results, "digits, CNN", "DRTP", run=True)
    assert lr == 0.01  # 288 images: the standard error of 96.5 % is 1.1 %
    assert found == [97.0, 97.001, 97.002, 97.003, 97.004]
    assert len(calls) == len(tpsgd.GRID) + 5
    assert tpsgd.trained(tpsgd.Results(tmp_path, "tpsgd"), "digits, CNN", "DRTP", run=False) == (lr, found)
    assert tpsgd.trained(results, "digits, CNN", "DFA", run=False) is None


def test_the_picture_shows_the_memory_of_each_depth(tmp_path, monkeypatch):
    measured = []

    def cost(net):
        measured.append(net)
        return dict(peak=dict.fromkeys(tpsgd.STEPS, 2**20 * int(net.split()[1])), seconds={})

    monkeypatch.setattr(tpsgd, "cost", cost)
    tpsgd.plot(tpsgd.Results(tmp_path, "tpsgd"), tmp_path / "memory.svg")
    assert [int(net.split()[1]) for net in measured] == [2, 4, 8, 16, 32]
    assert "back-propagation" in (tmp_path / "memory.svg").read_text()

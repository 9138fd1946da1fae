"""The data are what they claim to be, and everything drawn depends on the seed alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bench import tasks
from bench.tasks import DATA, TASKS

SIZES = {
    "digits-mlp": (1149, 288, 360),
    "digits-cnn": (1149, 288, 360),
    "mnist1d": (3200, 800, 1000),
    "fm14": (8000, 2000, 2000),
}
PARAMETERS = {
    "digits-mlp": 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10,
    "digits-cnn": (9 + 1) * 16 + (16 * 9 + 1) * 32 + (32 * 9 + 1) * 64 + (64 * 4 + 1) * 10,
    "mnist1d": 5210,
    "fm14": (9 + 3) * 16 + (16 * 9 + 3) * 32 + (32 * 9 + 1) * 64 + 65 * 10,
}
every_task = pytest.mark.parametrize("name", TASKS)


@every_task
def test_sizes_and_scale(name: str) -> None:
    splits = TASKS[name].data()
    assert tuple(len(labels) for _, labels in splits) == SIZES[name]
    assert TASKS[name].spec.n_test == SIZES[name][2]
    inputs, labels = splits.train
    assert inputs.dtype == torch.float32
    assert abs(inputs.mean()) < 1e-4
    assert inputs.std() == pytest.approx(1, abs=1e-4)
    assert labels.unique().tolist() == list(range(10))


@every_task
def test_a_network_depends_on_its_seed_alone(name: str) -> None:
    task = TASKS[name]
    torch.manual_seed(1)
    first = torch.nn.utils.parameters_to_vector(task.model(5).parameters())
    state = torch.get_rng_state()
    again = torch.nn.utils.parameters_to_vector(task.model(5).parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.nn.utils.parameters_to_vector(task.model(6).parameters()))
    assert first.numel() == PARAMETERS[name]


@every_task
def test_evaluation_is_that_of_the_whole_split_and_leaves_the_model_as_it_was(name: str) -> None:
    task = TASKS[name]
    model = task.model(0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = tuple(part[:700] for part in task.data().train)
    found = task.evaluate(model, batch)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.eval()
    assert found["loss"] == pytest.approx(task.loss(model, batch).item(), rel=1e-5)
    assert found["loss"] == pytest.approx(task.loss(model, batch, reduction="sum").item() / 700, rel=1e-5)
    assert found["accuracy"] == pytest.approx((model(batch[0]).argmax(1) == batch[1]).float().mean().item())


def test_mnist1d_is_the_published_sequence() -> None:
    signals, labels = tasks.make_mnist1d(np.loadtxt(DATA / "mnist1d_templates.txt"))
    assert signals.shape == (5000, 40)
    assert np.bincount(labels).tolist() == [500] * 10
    assert signals.mean() == pytest.approx(0, abs=1e-12)
    assert signals.std() == pytest.approx(1)
    # The first labels and values of mnist1d_data.pkl in the published repository.
    assert labels[:10].tolist() == [2, 6, 4, 5, 6, 6, 6, 0, 3, 1]
    assert signals[0, :3] == pytest.approx([-0.33200567, -0.47191037, -0.77869708], abs=1e-7)


def test_mnist1d_classes_differ_in_shape_and_not_in_place() -> None:
    signals, labels = tasks.make_mnist1d(np.loadtxt(DATA / "mnist1d_templates.txt"), samples=1000, seed=0)
    other, _ = tasks.make_mnist1d(np.loadtxt(DATA / "mnist1d_templates.txt"), samples=1000, seed=1)
    assert not np.allclose(signals, other)
    # Every digit is rolled over the whole window, so that its energy is spread over all of it.
    energy = np.stack([(signals[labels == digit] ** 2).mean(0) for digit in range(10)])
    assert energy.min() > 0.02
    assert energy.max() / energy.mean() < 6


def test_fm14_is_the_file_that_was_built() -> None:
    with np.load(DATA / "fm14.npz") as archive:
        assert archive["train_images"].shape == (10_000, 14, 14)
        assert archive["train_images"].dtype == np.uint8
        assert np.bincount(archive["test_labels"]).sum() == 2000
    tasks.fm14(DATA)  # raises if the checksum is another


def test_fm14_refuses_another_file(tmp_path: Path) -> None:
    with np.load(DATA / "fm14.npz") as archive:
        arrays = dict(archive)
    arrays["train_labels"] = arrays["train_labels"].copy()
    arrays["train_labels"][0] ^= 1
    np.savez(tmp_path / "fm14.npz", **arrays)
    with pytest.raises(ValueError, match="build_fm14"):
        tasks.fm14(tmp_path)


def test_streams_do_not_meet() -> None:
    seeds = [tasks.stream(name, seed, index) for name in ("init", "order") for seed in range(20) for index in range(20)]
    assert len(set(seeds)) == len(seeds)

"""The data are what they claim to be, and everything drawn depends on the seed alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bench import tasks
from bench.diagnostic import BEST, DIAGNOSTIC, PLANE
from bench.task import join
from bench.tasks import DATA, SUITES, TASKS

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
OTHERS = {"photo-inr": (4816, 1204, 1506), "modular-addition": (2000, 500, 1500), "softmax": (569, 0, 0)}
PARAMETERS |= {
    "photo-inr": 65 * 64 + 65 * 64 + 65 * 3,
    "modular-addition": 7 * 16 + 3 * 48 * (16 + 48 + 2) + 49 * 7,
    "softmax": 31 * 2,
}
images = pytest.mark.parametrize("name", SIZES)
embedded = pytest.mark.parametrize("name", SUITES["embedded"])
objective = pytest.mark.parametrize("task", [*DIAGNOSTIC, *PLANE, TASKS["softmax"]], ids=lambda task: task.spec.name)


@images
def test_sizes_and_scale(name: str) -> None:
    splits = TASKS[name].data()
    assert tuple(len(labels) for _, labels in splits) == SIZES[name]
    assert TASKS[name].spec.n_test == SIZES[name][2]
    inputs, labels = splits.train
    assert inputs.dtype == torch.float32
    assert abs(inputs.mean()) < 1e-4
    assert inputs.std() == pytest.approx(1, abs=1e-4)
    assert labels.unique().tolist() == list(range(10))


@embedded
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


@images
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


@pytest.mark.parametrize("name", OTHERS)
def test_sizes_of_the_others(name: str) -> None:
    splits = TASKS[name].data()
    assert tuple(len(labels) for _, labels in splits) == OTHERS[name]
    assert TASKS[name].spec.n_test == OTHERS[name][2]


def test_every_suite_names_tasks() -> None:
    assert set().union(*SUITES.values()) <= set(TASKS)
    assert all(name == task.spec.name for name, task in TASKS.items())


def test_a_task_ignores_a_root_that_is_not_for_it(tmp_path: Path) -> None:
    assert len(TASKS["fm14"].data(tmp_path).test[1]) == 2000


def test_the_photograph_splits_into_places_and_colours() -> None:
    splits = TASKS["photo-inr"].data()
    places, colours = join(list(splits))
    assert len(places.unique(dim=0)) == len(places) == 71 * 106
    assert places.abs().max() < 1
    assert 0 <= colours.min() < colours.max() <= 1
    mean = splits.train[1].mean(0)
    psnr = -10 * (splits.test[1] - mean).square().mean().log10()
    assert psnr.item() == pytest.approx(TASKS["photo-inr"].spec.chance, abs=0.05)


def test_psnr_is_that_of_the_whole_part() -> None:
    task = TASKS["photo-inr"]
    model, test = task.model(0), task.data().test
    found = task.evaluate(model, test)
    assert found["loss"] == pytest.approx(task.loss(model, test).item(), rel=1e-5)
    assert found["psnr"] == pytest.approx(-10 * np.log10(found["loss"]))


def test_running_sums() -> None:
    inputs, labels = TASKS["modular-addition"].data().train
    assert inputs.dtype == torch.int64
    assert labels[5].tolist() == [sum(inputs[5, : i + 1].tolist()) % 7 for i in range(6)]
    assert len(torch.cat([part[0] for part in TASKS["modular-addition"].data()]).unique(dim=0)) > 3900  # few repeat


def test_the_accuracy_of_sums_is_that_of_the_last() -> None:
    task = TASKS["modular-addition"]

    class Oracle(torch.nn.Module):
        def forward(self, numbers: torch.Tensor) -> torch.Tensor:
            sums = numbers.cumsum(1)
            sums[:, :-1] += 1
            return torch.nn.functional.one_hot(sums % 7, 7).transpose(1, 2).float()

    assert task.evaluate(Oracle(), task.data().test)["accuracy"] == 1


def test_the_minimum_of_softmax_regression_is_one() -> None:
    task = TASKS["softmax"]
    model = task.model(3).double()
    inputs, labels = task.data().train
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = task.loss(model, (inputs.double(), labels))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert task.evaluate(model, task.data().test)["log_gap"] < -9
    assert task.whole(model) >= tasks.softmax_least()


@objective
def test_an_objective_starts_above_its_minimum_and_its_rows_average_to_it(task: tasks.Objective) -> None:
    spec = task.spec
    batch, model = task.data().train, task.model(0)
    start = task.evaluate(model, task.data().validation)
    assert start["log_gap"] == pytest.approx(0)
    assert start["loss"] > 0
    if spec.dtype == "float32":
        each = task.loss(model, batch, reduction="none")
        assert each.shape == batch[1].shape
        assert each.double().mean().item() - task.least() == pytest.approx(start["loss"], rel=1e-3)
        assert task.loss(model, batch, reduction="sum").item() == pytest.approx(each.sum().item(), rel=1e-4)


@pytest.mark.parametrize("task", [*DIAGNOSTIC, *PLANE], ids=lambda task: task.spec.name)
def test_the_minimum_is_where_it_is_said_to_be(task: tasks.Objective) -> None:
    model = task.model(0).double()
    best = {"rosenbrock": torch.ones(2), "beale": torch.tensor([3.0, 0.5])}.get(task.spec.name, BEST)
    with torch.no_grad():
        model.x.copy_(best)
    inputs, labels = task.data().train
    loss = task.loss(model, (inputs.double(), labels))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-9)
    # The means of the noise are zero to the precision of float32.
    assert model.x.grad.abs().max() < 1e-5
    assert task.evaluate(model, task.data().test)["log_gap"] == -12


@pytest.mark.parametrize("task", DIAGNOSTIC, ids=lambda task: task.spec.name)
def test_a_pathology_is_in_reach_and_standing_still_fails_it(task: tasks.Objective) -> None:
    """Adam at one of four learning rates, or SGD, gets where the target is, but not along rotated axes."""
    inputs, labels = task.data().train
    batch = task.spec.batch
    reached = []
    for name, lr in (("Adam", 0.03), ("Adam", 0.1), ("Adam", 0.3), ("SGD", 0.01), ("SGD", 0.3)):
        torch.manual_seed(0)
        model = task.model(1).to(getattr(torch, task.spec.dtype))
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=lr)
        for step in range(500):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / 500)
            place = step * batch % len(labels)
            if place == 0:
                order = torch.randperm(len(labels))
            rows = order[place : place + batch]
            optimizer.zero_grad()
            task.loss(model, (inputs[rows], labels[rows])).backward()
            optimizer.step()
        reached.append(task.evaluate(model, task.data().test)["log_gap"])
        if reached[-1] <= task.spec.target:
            break
    assert min(reached) <= (-2 if task.spec.name == "rotated" else task.spec.target)
    assert task.evaluate(task.model(1), task.data().test)["log_gap"] > -0.5


def test_the_spectrum_of_the_rotated_bowl_is_the_same() -> None:
    spectra = []
    for task in (TASKS["kappa-1e4"], TASKS["rotated"]):
        batch = task.data().train

        def value(x: torch.Tensor, task: tasks.Objective = task, batch: tasks.Batch = batch) -> torch.Tensor:
            return task.value(lambda inputs: x.expand(len(inputs), -1), batch).mean()

        spectra.append(
            torch.linalg.eigvalsh(torch.autograd.functional.hessian(value, task.model(0).x.detach().double()))
        )
    assert torch.allclose(*spectra, rtol=1e-5)
    assert (spectra[0][-1] / spectra[0][0]).item() == pytest.approx(1e4, rel=1e-3)


def test_sparse_rows_see_one_coordinate_and_the_rarest_seldom() -> None:
    seen = TASKS["sparse"].data().train[0]
    assert (seen > 0).sum(1).unique().tolist() == [1]
    counts = (seen > 0).sum(0)
    assert counts.min() <= 2
    assert counts.max() > 40
    assert seen.sum() == 256


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


def test_the_page_on_the_benchmark_names_every_embedded_and_diagnostic_task() -> None:
    page = (Path(__file__).parents[2] / "docs/benchmark.rst").read_text()
    for name in (*SUITES["embedded"], *SUITES["diagnostic"]):
        assert f"``{name}``" in page

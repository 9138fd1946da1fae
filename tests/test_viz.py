"""Trajectories against loops written by hand, and pictures: what they hold, what they refuse, what they leave alone."""

from __future__ import annotations

import base64
import html.parser
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

import optimzoo
from optimzoo import trajectories
from optimzoo.functions import SCENES, scene
from optimzoo.trajectories import METHODS, Recorder, Tune, paths, trace

pytest.importorskip("matplotlib")

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from optimzoo import viz

QUICK = Tune(trials=5, starts=2)
CHROMIUM = shutil.which("chromium")


@pytest.fixture(autouse=True)
def _nothing_is_global():
    before = dict(matplotlib.rcParams), plt.get_fignums()
    yield
    assert (dict(matplotlib.rcParams), plt.get_fignums()) == before


@pytest.fixture(scope="module")
def beale():
    return trace("beale", ["diffgrad", "adabelief"], steps=40, tune=QUICK)


def by_hand(make, options, it, start, steps):
    """One run, one tensor, as a user writes it."""
    x = start.clone().requires_grad_()
    optimizer = make([x], **options)
    path = [x.detach().clone()]
    for step in range(steps):
        optimizer.zero_grad()
        it.sample(x[None], step).sum().backward()
        optimizer.step()
        path.append(x.detach().clone())
    return torch.stack(path)


# Numbers

GRADIENT = [name for name, entry in METHODS.items() if entry.drive is None and name != "dalelangevin"]


@pytest.mark.parametrize("name", GRADIENT)
def test_runs_that_are_stacked_are_those_of_a_loop(name):
    it, entry = scene("himmelblau"), METHODS[name]
    starts = torch.tensor([[1.0, 2.0], [-2.0, 0.5], [3.0, -3.0]], dtype=torch.float64)
    variants = [dict(lr=1e-3), dict(lr=0.03)]
    found, cost, _ = paths(it, name, variants, starts, 12)
    for v, options in enumerate(variants):
        for i, start in enumerate(starts):
            expected = by_hand(entry.make, {**entry.options, **options}, it, start, 12)
            torch.testing.assert_close(found[v, i], expected, rtol=1e-9, atol=1e-9)
    assert cost.tolist() == [[list(map(float, range(13)))] * 3] * 2


def test_every_start_has_noise_of_its_own_and_every_rate_the_same():
    it = scene("quadratic").noisy(1.0, 0.1)
    starts = it.start.expand(3, 2)
    found = paths(it, "sgd", [dict(lr=0.01), dict(lr=0.02)], starts, 5).points
    assert (found[0, 0, 1] != found[0, 1, 1]).all()
    first = (found[:, :, 1] - found[:, :, 0]) / torch.tensor([0.01, 0.02], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(first[0], first[1])


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].drive is not None])
def test_methods_with_closures_of_their_own_descend_and_count(name):
    it = scene("quadratic").stretched(0.1).shifted(0.5)  # condition 10
    found, cost, _ = paths(
        it, name, [dict(lr=0.15 if name == "sso" else 0.5)], it.start + torch.tensor([[0.0, 0.0], [0.3, 0.1]]), 25
    )
    losses = it.value(found)[0]
    assert losses.shape == (2, 26)
    assert (losses[:, -1] < 0.05 * losses[:, 0]).all()
    assert (cost.diff(dim=-1) > 0).all()
    assert (found[0, 0, 0] == it.start).all()


def test_sso_is_about_gradient_descent_where_the_point_is_the_target():
    it, variants = scene("beale"), [dict(lr=1e-5), dict(lr=1e-4), dict(lr=1e-3)]
    found, plain = (paths(it, name, variants, steps=5).points for name in ("sso", "sgd"))
    moved = (plain - plain[:, :, :1]).norm(dim=-1)[:, 0, -1]
    assert ((found - plain).norm(dim=-1)[:, 0, -1] < 0.05 * moved).all()  # at the small rates as well


def test_a_run_that_diverges_disturbs_no_other():
    it = scene("rosenbrock")
    both = paths(it, "sgd", [dict(lr=10.0), dict(lr=1e-4)], steps=30).points
    alone = paths(it, "sgd", [dict(lr=1e-4)], steps=30).points
    assert not both[0].isfinite().all()
    torch.testing.assert_close(both[1], alone[0], rtol=0, atol=0)


def test_all_methods_have_the_same_rates_and_starts_and_the_rule_chooses(beale):
    assert [run.name for run in beale.runs] == ["momentum", "adamw", "diffgrad", "adabelief"]
    hidden = QUICK.around(beale.scene)
    assert not (hidden == beale.scene.start).all(1).any()
    for run in beale.runs:
        assert run.rates == QUICK.rates == [1e-5, 0.000316, 0.01, 0.316, 10.0]
        torch.testing.assert_close(run.points[:, 1:, 0], hidden.expand(5, 2, 2))
        gaps = (run.losses[:, 1:] - beale.scene.least).numpy()
        box = beale.scene.box.numpy()
        room = 0.1 * (box[:, 1] - box[:, 0])
        expected = []
        for rate in range(5):
            each = []
            for i in range(2):
                path, gap = run.points[rate, 1 + i].numpy(), gaps[rate, i]
                inside = bool(np.all((path >= box[:, 0] - room) & (path <= box[:, 1] + room)))
                each.append(np.log10(np.clip(gap / gap[0], 1e-8, 1e3)).mean() if inside else 3.0)
            expected.append(np.mean(each))
        np.testing.assert_allclose(run.scores, expected, rtol=1e-9)
        assert run.chosen == int(np.argmin(expected))


def test_a_rate_that_is_given_is_kept_and_options_reach_the_optimizer():
    spec = {"mine": (torch.optim.AdamW, dict(lr=0.07, betas=(0.5, 0.9))), "diffgrad": dict(variant=2)}
    tr = trace("beale", spec, steps=5, tune=QUICK)
    assert [run.name for run in tr.runs] == ["momentum", "adamw", "mine", "diffgrad"]
    mine = tr["mine"]
    assert (mine.lr, mine.tuned, len(mine.rates)) == (0.07, False, 6)
    expected = by_hand(
        torch.optim.AdamW, dict(lr=0.07, betas=(0.5, 0.9), weight_decay=0.0), tr.scene, tr.scene.start, 5
    )
    torch.testing.assert_close(tr.path(mine)[0], expected)
    expected = by_hand(optimzoo.DiffGrad, dict(lr=tr["diffgrad"].lr, variant=2), tr.scene, tr.scene.start, 5)
    torch.testing.assert_close(tr.path(tr["diffgrad"])[0], expected)


DENTED = ("griewank", "rastrigin")  # gradients lead to the nearest dent


@pytest.mark.parametrize("name", [name for name in SCENES if name not in DENTED])
def test_some_tuned_method_reaches_the_minimum_of_each_scene(name):
    tr = trace(name, ["diffgrad", "adabelief"], tune=Tune(trials=16, starts=3))
    gaps = {run.name: float(tr.gap(run)[0, -1] / tr.gap(run)[0, 0]) for run in tr.runs}
    assert min(gaps.values()) < 0.02, gaps


@pytest.mark.parametrize("name", DENTED)
def test_tuned_methods_come_to_rest_where_there_are_dents(name):
    tr = trace(name, ["diffgrad", "adabelief"], tune=Tune(trials=16, starts=3))
    for run in tr.runs:
        assert float(run.losses[run.chosen, 0, -1]) < float(run.losses[run.chosen, 0, 0])
    assert min(float(run.slopes[run.chosen, 0, -1]) for run in tr.runs) < 0.01


def test_basins_are_those_of_gradient_descent_on_two_bowls():
    found = trajectories.basins("saddle", "sgd", lr=0.1, grid=11, steps=200)
    rows = found.minimum.tolist()
    assert rows[0] == [1] * 11  # y < 0: the second minimum is that below
    assert rows[-1] == [0] * 11
    assert set(rows[5]) == {-1}  # y = 0: the saddle
    path = by_hand(torch.optim.SGD, dict(lr=0.1), scene("saddle"), torch.tensor([found.x[3], found.y[8]]), 200)
    near = ((path - torch.tensor([0.0, 2**0.5])).abs() < 0.02 * 4.4).all(1)
    assert int(found.step[8, 3]) == int((~near).nonzero().max()) + 1


def test_a_sweep_has_a_score_for_each_pair():
    found = trajectories.sweep("beale", "adamw", ("lr", 1e-3, 1, 3), ("betas.0", 0.0, 0.9, 2), steps=20, tune=QUICK)
    assert found.scores.shape == (2, 3)
    assert found.defaults == (1e-3, 0.9)
    it, starts = scene("beale"), QUICK.around(scene("beale"))
    options = dict(lr=found.x[1], betas=(0.9, 0.999), weight_decay=0.0)
    each = []
    for start in starts:
        gap = it.value(by_hand(torch.optim.AdamW, options, it, start, 20))
        each.append(float((gap / gap[0]).clamp(1e-8, 1e3).log10().mean()))
    assert float(found.scores[1, 1]) == pytest.approx(sum(each) / len(each))


def test_the_anatomy_of_gradient_descent_is_its_learning_rate():
    found = trajectories.anatomy("quadratic", "sgd", lr=0.01, steps=10)
    torch.testing.assert_close(found.cosine, torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close(found.rates, torch.full((10, 2), 0.01, dtype=torch.float64))
    assert trajectories.anatomy("quadratic", "adamw", lr=0.01, steps=10).states.keys() == {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("variant", [0, 1, 2])
def test_the_friction_in_the_anatomy_is_the_one_that_the_step_has(variant):
    spec = (optimzoo.DiffGrad, dict(variant=variant))
    found = trajectories.anatomy("beale", spec, lr=0.1, steps=12)
    step, states = torch.arange(1.0, 13.0, dtype=torch.float64)[:, None], found.states
    adam = states["exp_avg"] / (1 - 0.9**step) / ((states["exp_avg_sq"] / (1 - 0.999**step)).sqrt() + 1e-8)
    name, friction = found.own
    assert name.startswith("Friction")
    torch.testing.assert_close(-0.1 * friction * adam, found.updates, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_denominator_in_the_anatomy_is_the_one_that_the_step_has(amsgrad):
    spec = (optimzoo.AdaBelief, dict(amsgrad=amsgrad, eps=1e-3, betas=(0.8, 0.9)))
    found = trajectories.anatomy("beale", spec, lr=0.1, steps=12)
    mean = found.states["exp_avg"] / (1 - 0.8 ** torch.arange(1.0, 13.0, dtype=torch.float64)[:, None])
    torch.testing.assert_close(-0.1 * mean / found.own[1], found.updates, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["dalesgd", "daleadamw"])
def test_weights_in_the_anatomy_keep_their_signs_where_others_cross(name):
    found = trajectories.anatomy("saddle", name, lr=0.25, steps=40)
    assert (found.own[1] == found.points[1:]).all()
    assert (found.own[1].sign() == torch.tensor([-1.0, 1.0])).all()
    plain = trajectories.anatomy("saddle", "momentum", lr=0.25, steps=40)
    assert plain.own is None
    assert (plain.points[:, 0] > 0).any()
    axes = viz.anatomy(found)
    assert len(axes) == 5
    np.testing.assert_array_equal(axes[4].lines[0].get_ydata(), found.own[1][:, 0].numpy())
    with pytest.raises(ValueError, match="the anatomy has four panels, got 5 axes"):
        viz.anatomy(plain, axes)


def test_muon_equalises_singular_values_and_gradient_descent_keeps_them():
    names = ["sgd", "muon"] if hasattr(torch.optim, "Muon") else ["sgd"]
    found = trajectories.matrix_updates(names, (12, 8), steps=4, condition=5.0, tune=QUICK)
    flat = {each.label: float(each.values[0, -1] / each.values[0, 0]) for each in found}
    assert flat["SGD"] < 0.15
    assert flat.get("Muon", 1.0) > 0.5


def test_shampoo_equalises_the_first_update_and_then_divides_by_all_that_it_has_seen():
    torch.manual_seed(0)
    first, second = torch.randn(2, 5, 3, dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(5, 3, dtype=torch.float64))
    optimizer = trajectories.Shampoo([weight], lr=0.5, eps=1e-12)
    weight.grad = first
    optimizer.step()
    torch.testing.assert_close(torch.linalg.svdvals(weight.detach()), torch.full((3,), 0.5, dtype=torch.float64))
    before, weight.grad = weight.detach().clone(), second
    optimizer.step()
    left, right = (first @ first.mT + second @ second.mT).numpy(), (first.mT @ first + second.mT @ second).numpy()
    right_root = np.linalg.inv(scipy.linalg.sqrtm(scipy.linalg.sqrtm(right)))
    values, vectors = np.linalg.eigh(left + 1e-12 * np.eye(5))
    expected = -0.5 * (vectors * values**-0.25) @ vectors.T @ second.numpy() @ right_root
    np.testing.assert_allclose((weight.detach() - before).numpy(), expected, rtol=1e-6, atol=1e-9)
    (found,) = trajectories.matrix_updates(["shampoo"], (4, 3), steps=3, tune=QUICK)
    assert found.label == "Shampoo"
    assert float(found.losses[-1]) < float(found.losses[0])


# Networks


def network(normalised: bool = False) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 6), *([nn.BatchNorm1d(6)] if normalised else []), nn.Tanh(), nn.Linear(6, 1)]
    inputs = torch.randn(32, 3)
    return nn.Sequential(*layers), inputs, inputs.sum(1, keepdim=True).sin()


def trained(model, inputs, targets, steps=20, **options):
    recorder = Recorder(model)
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})
    recorder()
    for _ in range(steps):
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        optimizer.step()
        recorder()
    return recorder


def test_a_plane_holds_the_paths_and_its_loss_is_the_models():
    model, inputs, targets = network()
    record = trained(model, inputs, targets)
    before = [p.detach().clone() for p in model.parameters()]

    def loss(m):
        return (m(inputs) - targets).square().mean()

    found = trajectories.pca_plane({"sgd": record}, model, loss, n=5)
    assert 0.9 < found.explained <= 1 + 1e-9
    true, projected = found.ends["sgd"]
    assert true == pytest.approx(float(loss(model).detach()), rel=1e-5)
    assert projected == pytest.approx(true, rel=0.1)
    # The middle of the plane is the mean of the records, moved to the middle of the grid.
    for old, now in zip(before, model.parameters(), strict=True):
        assert (old == now).all()
    rows = torch.stack(record.rows).double()
    u, s, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    expected = (u[:, :2] * s[:2]).abs()
    torch.testing.assert_close(found.paths["sgd"].abs(), expected, rtol=1e-6, atol=1e-7)
    assert found.explained == pytest.approx(float((s[:2] ** 2).sum() / (s**2).sum()))


def test_filters_of_a_random_direction_are_as_long_as_the_models():
    model, inputs, targets = network()
    direction = trajectories.filter_normalised(model, 3)
    first = direction[:18].view(6, 3)
    torch.testing.assert_close(first.norm(dim=1), model[0].weight.detach().double().norm(dim=1))
    assert (direction[18:24] == 0).all()
    found = trajectories.plane(model, lambda m: (m(inputs) - targets).square().mean(), n=3)
    assert float(found.losses[1, 1]) == pytest.approx(
        float((model(inputs) - targets).square().mean().detach()), rel=1e-5
    )


def test_batch_norm_is_refused_or_its_statistics_are_collected_and_put_back():
    model, inputs, targets = network(normalised=True)
    record = trained(model, inputs, targets, 6)

    def loss(m):
        return (m(inputs) - targets).square().mean()

    with pytest.raises(ValueError, match="1 BatchNorm layers, whose running statistics are wrong elsewhere: pass stat"):
        trajectories.plane(model, loss, n=3)
    with pytest.raises(ValueError, match="an iterator is empty after one point"):
        trajectories.plane(model, loss, n=3, statistics=iter([inputs]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = trajectories.plane(model, loss, n=3, statistics=[inputs])
    for name, value in model.state_dict().items():
        assert (before[name] == value).all(), name
    assert model.training
    model.train()  # one batch: the collected statistics are the batch's, whose variance eval has unbiased
    expected = float(loss(model).detach())
    assert float(found.losses[1, 1]) == pytest.approx(expected, rel=0.1)
    assert record.calls == 7


def test_a_plane_that_misses_the_paths_is_refused():
    model, inputs, _ = network()
    draw = torch.Generator().manual_seed(0)
    records = [torch.randn(31, generator=draw) for _ in range(12)]
    with pytest.raises(ValueError, match=r"the plane holds \d\d% of the variance of the paths, less than 50%"):
        trajectories.pca_plane({"noise": records}, model, lambda m: m(inputs).sum(), n=3)


def test_a_recorder_thins_what_no_longer_fits():
    model, _, _ = network()
    recorder = Recorder(model, max_mb=10 * 4e-6 * 31)
    for _ in range(33):
        recorder()
    assert recorder.steps == list(range(0, 33, recorder.every))
    assert len(recorder.rows) == len(recorder.steps) < 10
    with pytest.raises(ValueError, match="max_mb must hold four records"):
        Recorder(model, max_mb=1e-5)


def test_curvature_along_training_is_that_of_the_whole_hessian():
    model, inputs, targets = network()
    record = trained(model, inputs, targets, 4)

    def loss(m):
        return (m(inputs) - targets).square().mean()

    found = trajectories.hessian(record, loss, k=2, at_most=3, iterations=31)
    assert found.steps == [0, 2, 4]
    names = [name for name, _ in model.named_parameters()]

    def flat_loss(flat):
        parts = torch.split(flat, [p.numel() for p in model.parameters()])
        values = {n: v.view(p.shape) for n, v, p in zip(names, parts, model.parameters(), strict=True)}
        return (torch.func.functional_call(model, values, inputs) - targets).square().mean()

    whole = torch.autograd.functional.hessian(flat_loss, record.rows[-1])
    expected = torch.linalg.eigvalsh(whole.double()).flip(0)[:2]
    torch.testing.assert_close(found.values[-1], expected, rtol=1e-3, atol=1e-4)


def test_a_line_between_two_points_begins_and_ends_at_them():
    model, inputs, targets = network()
    record = trained(model, inputs, targets, 5)

    def loss(m):
        return (m(inputs) - targets).square().mean()

    shares, losses = trajectories.interpolate(model, record.rows[0], record.rows[-1], loss, n=3, margin=0.0)
    assert shares == [0.0, 0.5, 1.0]
    assert losses[2] == pytest.approx(float(loss(model).detach()), rel=1e-5)


# Pictures


def test_every_picture_takes_axes_and_returns_them(beale):
    model, inputs, targets = network()
    record = trained(model, inputs, targets, 6)

    def loss(m):
        return (m(inputs) - targets).square().mean()

    curvature = trajectories.hessian(record, loss, at_most=2, iterations=5)
    drawn = [
        lambda ax: viz.landscape(scene("f2"), ax),
        lambda ax: viz.contour(beale, ax),
        lambda ax: viz.loss(beale, ax),
        lambda ax: viz.rates(beale, ax),
        lambda ax: viz.fan(beale, "diffgrad", ax),
        lambda ax: viz.basins(trajectories.basins("saddle", "sgd", lr=0.1, grid=5, steps=9), ax),
        lambda ax: viz.heatmap(
            trajectories.sweep("beale", "sgd", ("lr", 1e-3, 1, 2), ("momentum", 0, 0.9, 2), steps=5, tune=QUICK), ax
        ),
        lambda ax: viz.matrix(trajectories.matrix_updates(["sgd"], (4, 3), steps=3, tune=QUICK), ax),
        lambda ax: viz.plane(trajectories.pca_plane({"sgd": record}, model, loss, n=4), ax),
        lambda ax: viz.plane(trajectories.plane(model, loss, n=4), ax),
        lambda ax: viz.interpolation(([0.0, 1.0], [1.0, 2.0]), ax),
        lambda ax: viz.eigenvalues({"sgd": (curvature, 0.1)}, ax),
        lambda ax: viz.density({"sgd": curvature}, ax),
    ]
    for draw in drawn:
        figure = Figure()
        ax = figure.add_subplot()
        assert draw(ax) is ax
        figure.draw_without_rendering()
        assert draw(None).figure is not figure
    axes = list(Figure().subplots(2, 2).flat)
    assert viz.anatomy(trajectories.anatomy("beale", "diffgrad", lr=0.1, steps=9), axes) == axes


def test_lines_of_a_race_are_the_paths_and_told_apart_without_colour(beale):
    ax = viz.contour(beale)
    lines = {line.get_label(): line for line in ax.lines}
    drawn = [line for line in ax.lines if len(line.get_xdata()) == 41]
    for run, line in zip(beale.runs, drawn, strict=True):
        np.testing.assert_array_equal(np.stack(line.get_data(), 1), beale.path(run)[0].numpy())
        assert any(str(label).startswith(run.label) for label in lines)
    looks = [viz.look(i) for i in range(8)]
    assert len({look.mark for look in looks}) == len({look.colour for look in looks}) == 8
    assert len({(look.dashes, look.mark) for look in looks}) == 8
    assert len({viz.look(i) for i in range(64)}) == 64


def test_bands_are_the_quantiles_of_the_seeds():
    tr = trace(scene("quadratic").noisy(0.5), ["sgd"], steps=10, seeds=20, tune=QUICK, baselines=())
    ax = viz.loss(tr)
    (line,) = [line for line in ax.lines if len(line.get_xdata()) == 11]
    assert line.get_xdata().tolist() == list(range(11))  # torch's median of an expanded tensor is not that
    np.testing.assert_allclose(line.get_ydata(), tr.gap(tr.runs[0]).median(0).values.numpy())
    (band,) = ax.collections
    top = band.get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(float(tr.gap(tr.runs[0]).quantile(0.9, 0).max()))


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "svg"])
def test_files_of_a_race_can_be_read(beale, tmp_path, kind):
    file = viz.race(beale, tmp_path / f"race.{kind}", frames=7, dpi=40)
    if kind == "svg":
        assert "<svg" in file.read_text()
        return
    with Image.open(file) as picture:
        frames = getattr(picture, "n_frames", 1)
        assert frames == (7 if kind != "png" else 1)
        if kind != "png":
            first = np.asarray(picture.convert("RGB"), dtype=float)
            picture.seek(6)
            last = np.asarray(picture.convert("RGB"), dtype=float)
            assert np.abs(first - last).max() > 60  # something moved


FAKE_FFMPEG = """#!{python}
import json, os, sys
if os.environ.get("FAIL"):
    sys.exit("no such codec")
frames = sys.stdin.buffer.read()
open(sys.argv[-1].removeprefix("file:"), "w").write(json.dumps([sys.argv[1:], len(frames)]))
"""


@pytest.fixture
def ffmpeg(tmp_path, monkeypatch):
    """A program of that name, alone on PATH, which counts the bytes that it gets."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "ffmpeg"
    program.write_text(FAKE_FFMPEG.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))


@pytest.mark.usefixtures("ffmpeg")
def test_a_film_is_what_ffmpeg_makes_of_the_frames(beale, tmp_path):
    file = viz.race(beale, tmp_path / "race.mp4", frames=7, fps=3, dpi=40)
    options, size = json.loads(file.read_text())
    assert size == (7 + 2 * 3) * 408 * 200 * 3  # the last stays for two seconds
    given = dict(itertools.pairwise(options))
    assert (given["-s"], given["-r"], given["-pix_fmt"], given["-i"]) == ("408x200", "3", "yuv420p", "-")
    assert options[-1] == f"file:{file}"


@pytest.mark.usefixtures("ffmpeg")
def test_a_failure_of_ffmpeg_is_told_in_its_words(beale, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(OSError, match=r"ffmpeg could not write '.*race.mp4', exit status 1: no such codec"):
        viz.race(beale, tmp_path / "race.mp4", frames=7, fps=3, dpi=40)


def test_without_ffmpeg_the_error_says_what_there_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    message = "nothing here writes '.mp4' files.*gif, webp, html; mp4 needs ffmpeg on PATH"
    with pytest.raises(ValueError, match=message):
        viz.check_file(tmp_path / "a.mp4", moving=True)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
def test_a_film_by_ffmpeg_has_all_frames(beale, tmp_path):
    file = viz.race(beale, tmp_path / "race.mp4", frames=7, fps=3, dpi=41)
    told = subprocess.run(["ffmpeg", "-i", file, "-f", "null", "-"], check=True, capture_output=True, text=True).stderr
    assert int(re.findall(r"frame=\s*(\d+)", told)[-1]) == 13


def test_particles_are_those_of_the_chosen_rate_and_contract_to_what_is_shown(tmp_path):
    tr = trace("saddle", ["cbo"], steps=30, tune=QUICK, baselines=())
    (run,) = tr.runs
    assert run.particles.shape == (31, 50, 2)
    assert run.particles.dtype == torch.float32
    optimizer = optimzoo.CBO(
        [start := nn.Parameter(tr.scene.start.clone())], lr=run.lr, n_particles=50, n_runs=3, seed=0
    )
    optimizer.particles[0].add_((torch.cat([start[None], QUICK.around(tr.scene)]).detach() - start.detach())[:, None])
    for step in range(31):
        torch.testing.assert_close(run.particles[step], optimizer.particles[0][0].float(), msg=str(step))
        optimizer.step(lambda stacked: tr.scene.value(stacked[0]), batched=True)
    ax = viz.contour(tr)
    swarms = [line.get_xydata() for line in ax.lines if len(line.get_xdata()) == 50]
    np.testing.assert_array_equal(swarms[0], run.particles[0].numpy())
    spreads = [np.linalg.norm(swarm.std(0)) for swarm in swarms]
    assert len(spreads) > 1
    assert all(later < earlier for earlier, later in itertools.pairwise(spreads))
    assert spreads[1] <= spreads[0] / 2
    text = viz.race(tr, tmp_path / "race.html").read_text()
    (method,) = json.loads(text.split('id="data">')[1].split("</script>")[0])["methods"]
    packed = np.frombuffer(base64.b64decode(method["swarm"]), "<f4").reshape(31, 50, 2)
    np.testing.assert_array_equal(packed, run.particles.numpy())
    plain = viz.race(trace("saddle", ["cbo"], steps=1, tune=QUICK), tmp_path / "race.webp", frames=2, dpi=40)
    assert plain.stat().st_size > 1000


class Page(html.parser.HTMLParser):
    """What a page refers to, and whether its elements close."""

    VOID = frozenset({"meta", "img", "input", "br", "link"})
    OPTIONAL = frozenset({"tr", "th", "td", "option", "thead", "tbody"})

    def __init__(self):
        super().__init__()
        self.open, self.references = [], []

    def handle_starttag(self, tag, attributes):
        self.references += [
            value for name, value in attributes if name in ("src", "href", "srcset", "action") and value
        ]
        if tag not in self.VOID | self.OPTIONAL:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.OPTIONAL:
            assert self.open.pop() == tag


def test_the_player_is_one_page_that_refers_to_nothing_else(beale, tmp_path):
    text = viz.race(beale, tmp_path / "race.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.references == []
    assert "http" not in text.replace("http-equiv", "")
    assert len(text) < 2e6
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert [m["name"] for m in data["methods"]] == [run.label for run in beale.runs]
    assert all(m["rates"] == QUICK.rates for m in data["methods"])
    assert "<th scope=row>diffGrad<td>" in text  # what it shows, as a table


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_player_plays(beale, tmp_path):
    api = pytest.importorskip("playwright.sync_api")
    file = viz.race(beale, tmp_path / "race.html")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport=dict(width=390, height=844))
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        picture = "document.getElementById('map').toDataURL()"
        at_end = page.evaluate(picture)
        slider = page.get_by_label("learning rate of diffGrad")
        slider.fill("1")
        assert page.locator(".method").nth(2).locator("output").inner_text() == "lr 3.2e-4"
        assert page.evaluate(picture) != at_end
        page.get_by_role("button", name="reset").nth(2).click()
        assert page.evaluate(picture) == at_end
        page.get_by_label("step", exact=True).fill("12")
        assert page.locator("#at").inner_text() == "step 12 of 40"
        gap = float(beale.gap(beale["diffgrad"])[0, 12])
        label = page.locator("#map").get_attribute("aria-label")
        shown = label.split("diffGrad, loss above the minimum ")[1].split(";")[0]
        assert float(shown) == pytest.approx(gap, rel=0.06)
        size = page.locator("#map").bounding_box()
        x0, x1, y0, y1 = beale.scene.box.flatten().tolist()
        a, b = beale.scene.start.tolist()
        place = dict(x=(a - x0) / (x1 - x0) * size["width"], y=(y1 - b) / (y1 - y0) * size["height"])
        page.locator("#map").hover(position=place)
        assert "step 0" in page.locator(".tip").inner_text()
        page.get_by_role("button", name="Play").click()
        page.wait_for_function("document.getElementById('at').textContent !== 'step 12 of 40'")
        for width, beside in ((390, False), (1200, True)):
            page.set_viewport_size(dict(width=width, height=844))
            box, strips = page.locator(".map").bounding_box(), page.locator(".strips").bounding_box()
            assert (strips["y"] < box["y"] + box["height"]) is beside
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        ground = "getComputedStyle(document.querySelector('%s')).backgroundColor"
        page.emulate_media(color_scheme="dark")
        assert page.evaluate(ground % "body") != "rgb(255, 255, 255)"
        assert page.evaluate(ground % ".strip") == "rgb(255, 255, 255)"  # black lines are seen on it
        assert errors == []
        browser.close()


def test_a_gallery_is_a_page_with_texts_and_the_files_that_it_names(tmp_path):
    folder = viz.gallery(["diffgrad"], ["saddle", "f1"], tmp_path / "g", tune=Tune(trials=3, starts=1))
    text = (folder / "index.html").read_text()
    page = Page()
    page.feed(text)
    assert {name for name in page.references if (folder / name).is_file()} == set(page.references)
    assert text.count('alt="Paths on') == 2
    record = json.loads((folder / "saddle.json").read_text())
    assert len(record["runs"]["diffgrad"]["points"][0]) == 151


def test_benchmark_files_are_drawn_as_they_are(tmp_path):
    rows = [
        dict(settings=dict(task="t", method=m, hp=dict(lr=lr)), metrics=dict(loss=loss), status="ok")
        for m in ("a", "b")
        for lr, loss in ((0.1, 1.0), (0.1, 3.0), (0.1, 2.0), (0.3, 0.5))
    ]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = trajectories.finished_runs(str(tmp_path))
    ax = viz.runs(found, "t")
    assert ax.lines[0].get_ydata().tolist() == [2.0, 0.5]
    with pytest.raises(ValueError, match="no task 'u' in these runs; tasks: t"):
        viz.runs(found, "u")
    (tmp_path / "runs.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"runs.jsonl:1 is not a run: KeyError\('settings'\)"):
        trajectories.finished_runs(str(tmp_path))


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trace("beal", ["sgd"]), "no scene 'beal'; did you mean beale"),
        (lambda: trace("beale", ["adamv"]), "no optimizer 'adamv'; did you mean adam"),
        (lambda: trace("beale", ["zzz"]), "others as package.module:Class"),
        (lambda: trace("beale", ["torch.optim:Nothing"]), "no optimizer 'torch.optim:Nothing'"),
        (lambda: trace("beale", ["tpsgd"]), "TPSGD needs layers and labels"),
        (lambda: trace("beale", {"sgd": dict(lr=-1.0)}), "lr of sgd must be finite and > 0"),
        (lambda: trace("beale", ["sgd"], steps=0), "steps must be a whole number >= 1, got 0"),
        (lambda: trace("beale", ["sgd"], seeds=0), "seeds must be a whole number >= 1, got 0"),
        (lambda: Tune(trials=1), "trials must be a whole number >= 2, got 1"),
        (lambda: Tune(low=1.0, high=0.5), "high must be finite and > low"),
        (lambda: trajectories.basins("f1", "sgd"), "needs a scene of two dimensions, f1 has 1"),
        (lambda: trajectories.sweep("beale", "sgd", ("lr", 1, 2, 2), ("momentun", 0, 1, 2)), "nearest: momentum"),
        (
            lambda: trajectories.sweep("beale", "adamw", ("lr", 1, 2, 2), ("betas.2", 0, 1, 2)),
            "'betas.2' is no setting",
        ),
        (lambda: viz.contour(trace(scene("levy", 3), ["sgd"], steps=2, tune=QUICK)), "levy has 3; see viz.loss"),
        (lambda: viz.check_file("a.html"), "nothing here writes '.html' files"),
        (lambda: viz.check_file("a"), "a file without an ending"),
        (lambda: viz.check_file("/nowhere/a.png"), "no folder '/nowhere'"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_names_are_a_list_and_no_string():
    with pytest.raises(TypeError, match="methods must be a list or a mapping, got 'sgd'"):
        trace("beale", "sgd")


# Command line


def test_commands_write_their_files(tmp_path, capsys):
    small = ["--trials", "3", "--steps", "10"]
    for command in (
        ["race", "--scene", "f3", *small, "-o", "race.html"],
        ["race", "--scene", "quadratic", "--noise", "0.1", "--seeds", "3", "--lr", "adamw=0.1", *small, "-o", "n.png"],
        ["race", "--scene", "levy", "--dim", "4", *small, "-o", "levy.png"],
        ["fan", *small, "-o", "fan.svg"],
        ["basins", "--grid", "6", *small, "-o", "basins.png"],
        ["heatmap", "--x", "lr:1e-2:1:2", "--y", "betas.0:0:0.9:2", *small, "-o", "heat.png"],
        ["anatomy", "--lr", "0.1", *small, "-o", "anatomy.png"],
    ):
        command[-1] = str(tmp_path / command[-1])
        assert viz.main(command) == 0
        assert capsys.readouterr().out == command[-1] + "\n"
        assert Path(command[-1]).stat().st_size > 4000


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["race", "--scene", "beal"], "no scene 'beal'; did you mean beale"),
        (["race", "--optimizers", "adamv"], "no optimizer 'adamv'"),
        (["race", "-o", "a.avi"], "nothing here writes '.avi' files, got 'a.avi'; there is"),
        (["runs", "/nowhere.jsonl"], "No such file"),
    ],
)
def test_wrong_arguments_exit_with_two(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert viz.main(command) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        viz.main(["heatmap", "--x", "lr"])
    assert list(tmp_path.iterdir()) == []


NO_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = None
import optimzoo.trajectories
optimzoo.trajectories.trace("f1", ["sgd"], steps=2)
try:
    import optimzoo.viz
except ImportError as error:
    print(error)
"""


def test_numbers_need_no_matplotlib_and_pictures_say_that_they_do():
    done = subprocess.run([sys.executable, "-c", NO_MATPLOTLIB], check=True, capture_output=True, text=True)
    assert "optimzoo.viz needs the extra plot, pip install 'optimzoo[plot]'" in done.stdout

"""The bench of SSO: its data, its pendulum and expert, its accounts and its tables."""

import math

import pytest
import torch

from bench import sso


@pytest.mark.parametrize("name", sso.DATA)
def test_data_go_through_a_file_in_libsvm_format_unchanged(name):
    x, y = sso.load(name)
    drawn, labels = sso.DATA[name](sso.np.random.default_rng(0))
    torch.testing.assert_close(x, torch.from_numpy(drawn), rtol=1e-12, atol=1e-15)
    assert y.tolist() == labels.tolist()
    assert 0.05 < (y > 0).double().mean() < 0.95


def test_the_minimum_is_one():
    problem = sso.Convex("generated, like ijcnn", "squared", None, 0)
    design = torch.cat([problem.x, torch.ones(len(problem.x), 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(design, problem.y).solution
    expected = (design @ solution - problem.y).square().mean().item() / 2
    assert sso.Convex.minimum("generated, like ijcnn", "squared") == pytest.approx(expected, rel=1e-9)


def test_the_expert_swings_the_pendulum_up_and_holds_it(monkeypatch):
    problem = sso.Pendulum(0)

    class Expert(torch.nn.Module):
        def forward(self, seen):
            angle = torch.atan2(seen[..., 1], seen[..., 0])
            return problem.expert(torch.stack([angle, 8 * seen[..., 2]], -1)).unsqueeze(-1)

    problem.model = Expert()
    assert problem.value() == pytest.approx(0, abs=1e-10)
    monkeypatch.setattr(sso.Pendulum, "steps", 200)
    last = problem.visited(64, torch.Generator().manual_seed(1))[-64:]
    assert (torch.cos(last[:, 0]) > 0.95).double().mean() > 0.9


def test_a_run_counts_gradients_and_a_table_says_when_the_target_is_met(tmp_path, monkeypatch):
    settings = dict(data="breast cancer", loss="squared", batch=50, calls=12)
    monkeypatch.setattr(sso, "PROBLEMS", {"short": settings})
    monkeypatch.setattr(sso, "SEEDS", range(2))
    methods = {name: (build, grid[3:5]) for name, (build, grid) in sso.METHODS.items() if "m = 20" not in name}
    monkeypatch.setattr(sso, "METHODS", methods)
    results = sso.Results(tmp_path)
    record = results.get(settings=settings, method="SSO, Armijo, m = 5", number=0.3, seed=0)
    assert len(record["losses"]) == len(record["times"]) == 13
    assert record["losses"][-1] < record["losses"][0]
    title, text = sso.tables(results, ["short"])
    assert "12 loss gradients" in title
    assert all(f"| {name} |" in text for name in methods)
    again = sso.Results(tmp_path)
    assert again.known.keys() == results.known.keys()
    assert [title, text] == [*sso.tables(again, ["short"])]  # from what is stored


def test_numbers_are_short_and_what_is_not_met_is_said():
    assert [sso.short(v) for v in (1234.5, 12.34, 0.0123, 7, 44, math.inf)] == [
        "1,234",
        "12.3",
        "0.0123",
        "7",
        "44",
        "never",
    ]
    assert sso.median([1, 2, math.inf]) == "2 [1, never]"
    assert sso.median([1, math.inf, math.inf]) == "-"
    assert sso.reached(dict(losses=[3.0, 2.0, None, 1.0]), 1.5) == 3
    assert sso.ending(dict(losses=[1.0, None])) == math.inf

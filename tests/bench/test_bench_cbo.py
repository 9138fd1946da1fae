"""The evidence of CBO: its cells run, are kept, and become tables."""

import json
import sys

import pytest
import torch

from bench import cbo


def test_a_finished_cell_is_not_run_again(tmp_path):
    calls = []

    def run(**arguments):
        calls.append(arguments)
        return dict(found=3, runs=4)

    cell = ("success", run, dict(d=2))
    for _ in range(2):  # the second folder reads what the first has written
        assert cbo.Results(tmp_path).get(cell) == dict(found=3, runs=4)
    assert calls == [dict(d=2)]
    assert len((tmp_path / "cbo.jsonl").read_text().splitlines()) == 1
    assert cbo.Results(tmp_path).get(("success", run, dict(d=3)), run=False) == {}


def test_tables_are_made_of_what_is_there(tmp_path, capsys):
    cell = next(cell for cell in cbo.cells("success"))
    key = cbo.canonical([cell[0], cell[2]])
    record = dict(found=97, runs=100, seconds=2.0)
    (tmp_path / "cbo.jsonl").write_text(json.dumps(dict(key=key, record=record)) + "\n")
    assert cbo.main(["--out", str(tmp_path), "--md"]) == 0
    text = capsys.readouterr().out
    assert "| Rastrigin | 20 | 40 | 5000 | 0 | 100 | 97 [92, 99] | not run | 2 |" in text


def test_every_cell_has_arguments_that_can_be_written_and_names_no_other_has():
    keys = [cbo.canonical([name, arguments]) for name in cbo.EXPERIMENTS for _, _, arguments in cbo.cells(name)]
    assert len(set(keys)) == len(keys) > 100


@pytest.mark.parametrize(("hits", "low", "high"), [(0, 0.0, 0.037), (100, 0.963, 1.0), (97, 0.915, 0.990)])
def test_the_interval_is_wilsons(hits, low, high):
    assert cbo.wilson(hits, 100) == pytest.approx((low, high), abs=5e-4)


def test_both_libraries_start_at_the_same_points(monkeypatch):
    pytest.importorskip("cbx")
    monkeypatch.setattr(cbo, "RUNS", 3)
    seen = {}
    task = cbo.FUNCTIONS["rastrigin"]
    for name, run in (("ours", cbo.ours), ("theirs", cbo.theirs)):

        def value(x, name=name):
            seen.setdefault(name, x.clone())
            return task.value(x)

        monkeypatch.setitem(cbo.FUNCTIONS, "rastrigin", task._replace(value=value))
        assert run("rastrigin", 2, 5, 2, 0.5, seed=1).shape == (3, 2)
    assert torch.equal(seen["ours"], seen["theirs"])


@pytest.mark.parametrize("method", cbo.CANYON)
def test_paths_begin_at_the_start(method, monkeypatch):
    ends, path = cbo.canyon_paths(method, 2, keep=1)
    assert ends.shape == (2, 2)
    assert path[0].tolist() == [[8.0, 8.0]]
    assert len(path) == (251 if "radient" not in method and method != "Langevin" else 1001)


def test_a_network_learns_without_gradients():
    # A tenth is chance.
    assert cbo.network("digits", 2, 0)["accuracy"] > 0.3
    assert cbo.with_gradients("digits", 5, 0, plain=True)["accuracy"] > 0.5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("noise", ["anisotropic", "isotropic"])
def test_state_and_step_need_little_more_memory_than_the_particles(noise):
    assert cbo.memory(100_000, 50, 1, noise)["factor"] < 1.2


def test_an_unknown_experiment_is_an_error(capsys):
    with pytest.raises(SystemExit):
        cbo.main(["no-such"])
    assert "no experiment called no-such" in capsys.readouterr().err

"""Optuna: a class and its settings as what is tuned; a study and a trial go on from where they were."""

from __future__ import annotations

import pickle

import optuna
import pytest
import torch
from training import GRADIENT, RECIPES, batch, network, step, through_a_file

import optimzoo

optuna.logging.set_verbosity(optuna.logging.WARNING)


def objective(trial, interrupted=False):
    """The loss after twelve steps; the trial is stopped and goes on from its checkpoint half-way."""
    name = trial.suggest_categorical("method", ["DiffGrad", "AdaBelief", "AdaGradNorm"])
    lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    options = {} if name == "AdaGradNorm" else dict(betas=(trial.suggest_float("beta1", 0.0, 0.99), 0.999))
    cls = getattr(optimzoo, name)

    def build():
        model = network()
        return model, cls(model.parameters(), lr=lr, **options)

    model, optimizer = build()
    for t in range(12):
        if interrupted and t == 6:
            saved = through_a_file([model.state_dict(), optimizer.state_dict()])
            model, optimizer = build()
            model.load_state_dict(saved[0]), optimizer.load_state_dict(saved[1])
        loss = float(step(model, optimizer, *batch(t)))
        trial.report(loss, t)
        if trial.should_prune():
            raise optuna.TrialPruned
    return loss


def study(storage=None, sampler=None):
    return optuna.create_study(
        study_name="lr",
        storage=storage,
        load_if_exists=True,
        sampler=sampler or optuna.samplers.TPESampler(seed=0, n_startup_trials=3),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=4),
    )


def told(trials):
    return [(trial.params, trial.state, trial.intermediate_values) for trial in trials]


@pytest.mark.filterwarnings("ignore:betas")
def test_a_study_and_its_trials_resume(tmp_path):
    whole = study()
    whole.optimize(objective, n_trials=10)

    def storage():
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "study")))

    first = study(storage())
    first.optimize(lambda trial: objective(trial, interrupted=True), n_trials=5)
    second = study(storage(), pickle.loads(pickle.dumps(first.sampler)))
    second.optimize(objective, n_trials=5)
    assert told(second.trials) == told(whole.trials)
    states = {trial.state for trial in whole.trials}
    assert states == {optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED}
    assert whole.best_value < objective(optuna.trial.FixedTrial(dict(method="DiffGrad", lr=1e-4, beta1=0.9)))


def test_every_method_can_be_drawn():
    def any_of(trial):
        name = trial.suggest_categorical("method", list(RECIPES))
        model = network()
        optimizer = RECIPES[name](model)
        return min(float(step(model, optimizer, *batch(0))) for _ in range(3))

    grid = optuna.create_study(sampler=optuna.samplers.GridSampler({"method": list(RECIPES)}, seed=0))
    grid.optimize(any_of, n_trials=len(RECIPES))
    assert {trial.params["method"] for trial in grid.trials} == set(RECIPES)
    assert all(torch.isfinite(torch.tensor(trial.value)) for trial in grid.trials)
    assert set(GRADIENT) <= set(RECIPES)

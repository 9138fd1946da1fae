"""The protocol: which runs a comparison needs next, given the runs that exist.

Planning is a function of the records alone, so a resumed sweep, a report and a status see the same plan.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from bench.methods import OptSpec, find, half_decades
from bench.presets import PRESETS, Preset
from bench.run import Settings
from bench.store import Record
from bench.tasks import TASKS, TaskSpec

RULESETS = ("one-shot", "lr-only", "tuned", "self-tuning")
SAMPLERS = ("grid", "sobol", "tpe")
SELECTIONS = ("1se", "best")
RAISED = ("error", "oom", "timeout")  # of runs that did not come to their end; a later call tries them again
TUNING_SEEDS, FINAL_SEEDS = 0, 1000  # where the two kinds begin: no final run has a seed that chose anything
EXTENSIONS = 3  # learning rates that a search may add at an edge of its grid, the same for all methods
DECADES = 3.0  # that learning rates drawn from outside a grid spread over
SELF_TUNING = 1.5  # times the budget, for what others spend on a search

Records = dict[str, Record]
HP = dict[str, Any]


@dataclass(frozen=True)
class Protocol:
    """The rules under which methods are compared.

    Raises:
        ValueError: the sampler is not installed.
    """

    ruleset: str = "tuned"
    trials: int = 14  # hyper-parameter settings tried
    sampler: str = "grid"
    select: str = "1se"
    tune_seeds: int = 2
    seeds: int = 5
    budget: float = 1.0
    schedule: str = "cosine"
    amp: str = "off"
    world: int = 1
    parallel: str = "ddp"

    def __post_init__(self) -> None:
        if self.sampler == "tpe" and not find_spec("optuna"):
            raise ValueError("--sampler tpe needs optuna: pip install 'optimzoo[tune]'")

    def as_record(self) -> Record:
        return asdict(self)


@dataclass
class Trial:
    """One setting of the searched hyper-parameters and its tuning runs; its score once all of them are there."""

    hp: HP
    runs: list[Record]
    score: float | None = None  # mean validation metric, failures at chance

    @property
    def lr(self) -> float:
        return float(self.hp.get("lr", 0.0))


@dataclass
class Plan:
    """What a cell has and what it still wants."""

    wanted: list[Settings] = field(default_factory=list)  # runs that can start now
    later: int = 0  # runs that will be wanted once these are done, at most
    trials: list[Trial] = field(default_factory=list)
    chosen: HP | None = None  # the searched hyper-parameters of the final runs
    edge: bool = False  # the best learning rate is the last of the grid, extensions included
    default: list[Record] = field(default_factory=list)  # final runs at the default hyper-parameters
    final: list[Record] = field(default_factory=list)  # final runs at the chosen ones, or with a self-tuning budget

    @property
    def tuning(self) -> dict[float, list[Record]]:
        """The tuning runs by learning rate."""
        rates = sorted({trial.lr for trial in self.trials})
        return {lr: [run for trial in self.trials if trial.lr == lr for run in trial.runs] for lr in rates}

    @property
    def scores(self) -> dict[float, float]:
        """The best score at each learning rate that has one."""
        return {
            lr: max(found)
            for lr in self.tuning
            if (found := [t.score for t in self.trials if t.lr == lr and t.score is not None])
        }

    @property
    def selected(self) -> float | None:
        """The chosen learning rate."""
        return None if self.chosen is None else self.chosen.get("lr")

    @property
    def hopeless(self) -> bool:
        """Whether every trial raised, so that the search chose nothing."""
        return bool(self.trials) and not self.wanted and self.chosen is None

    @property
    def left(self) -> int:
        return len(self.wanted) + self.later


def score(record: Record, spec: TaskSpec) -> float:
    """The metric of a run; a failed run has learnt nothing, whatever its last number says."""
    return record["metrics"][spec.metric] if record["status"] == "ok" else spec.chance


def grid(space: HP, trials: int) -> tuple[list[HP], list[float]]:
    """About so many settings, all choices at each learning rate; and the ladder of rates, with what may be added."""
    others = {name: values for name, values in space.items() if name != "lr"}
    choices = [dict(zip(others, values, strict=True)) for values in itertools.product(*others.values())]
    if "lr" not in space:
        return choices[:trials], []
    width = max(1, trials // len(choices))
    rates = half_decades(space["lr"], width)
    ladder = half_decades(space["lr"], width + 2 * EXTENSIONS)
    return [{"lr": lr, **choice} for lr in rates for choice in choices], ladder


def sobol(space: HP, trials: int) -> list[HP]:
    """So many settings that fill the space evenly, the same in every run."""
    from torch.quasirandom import SobolEngine

    points = SobolEngine(max(1, len(space)), scramble=True, seed=0).draw(trials).tolist()
    return [{name: _at(values, u) for (name, values), u in zip(space.items(), point, strict=False)} for point in points]


def _at(values: Any, u: float) -> Any:
    """The value at a share of a range or of a tuple of choices; three digits are enough for a learning rate."""
    if isinstance(values, tuple):
        return values[int(u * len(values))]
    return float(f"{values * 10 ** (DECADES * (u - 0.5)):.3g}")


def tpe(space: HP, spec: TaskSpec) -> Iterator[HP]:
    """Settings by Optuna's tree-structured Parzen estimator; it is sent the score of each before the next."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=5)
    study = optuna.create_study(sampler=sampler, direction="maximize" if spec.sign > 0 else "minimize")
    reach = 10 ** (DECADES / 2)
    while True:
        trial = study.ask()
        hp: HP = {}
        for name, values in space.items():
            if isinstance(values, tuple):
                hp[name] = trial.suggest_categorical(name, values)
            else:
                hp[name] = float(f"{trial.suggest_float(name, values / reach, values * reach, log=True):.3g}")
        study.tell(trial, (yield hp))


class Study:
    """What ``tpe`` asks for after given scores.

    The records are all the storage: a study made anew gives the same answers. One that goes on asks only for what is
    new, for a plan is made after every run.
    """

    def __init__(self, space: HP, spec: TaskSpec) -> None:
        self.begin: Callable[[], Any] = lambda: tpe(space, spec)
        self.scores: list[float] = []
        self.asked: list[HP] = []

    def after(self, scores: list[float]) -> HP:
        """The next setting."""
        if not self.asked or scores[: len(self.scores)] != self.scores[: len(scores)]:
            self.study = self.begin()
            self.scores, self.asked = [], [next(self.study)]
        for found in scores[len(self.scores) :]:
            self.scores.append(found)
            self.asked.append(self.study.send(found))
        return self.asked[len(scores)]


def choose(trials: list[Trial], spec: TaskSpec, rule: str) -> HP:
    """The best trial, or by ``1se`` that of the smallest learning rate among those within one standard error of it.

    The best score itself is an unsafe choice: it often sits beside a cliff, and larger learning rates are nearer to it.
    Of trials with one learning rate the better is taken.
    """
    best = max(trials, key=lambda trial: spec.sign * (trial.score or 0.0))
    bar = best.score or 0.0
    if rule == "1se":
        cases = next((run["cases"] for run in best.runs if run["status"] == "ok"), 0)
        error = spec.error(bar, cases) if cases or not spec.rate else 0.0
        values = [score(run, spec) for run in best.runs]
        if not spec.rate and len(values) > 1:  # what seeds differ by, where one measurement has no error of its own
            error = max(error, statistics.stdev(values) / math.sqrt(len(values)))
        bar -= spec.sign * error
    good = [trial for trial in trials if spec.sign * ((trial.score or 0.0) - bar) >= 0]
    if rule == "1se":
        lr = min(trial.lr for trial in good)
        good = [trial for trial in good if trial.lr == lr]
    return max(good, key=lambda trial: spec.sign * (trial.score or 0.0)).hp


@dataclass(frozen=True)
class Cell:
    """One method on one task; a preset is one with a recipe."""

    task: str
    method: str
    protocol: Protocol
    preset: str = ""

    @cached_property
    def spec(self) -> TaskSpec:
        return TASKS[self.task].spec

    @cached_property
    def optimizer(self) -> OptSpec:
        return find(self.method)

    @cached_property
    def recipe(self) -> Preset | None:
        return PRESETS[self.preset] if self.preset else None

    @cached_property
    def space(self) -> HP:
        """What is searched under the ruleset."""
        if self.recipe or self.protocol.ruleset not in ("lr-only", "tuned"):
            return {}
        space = self.optimizer.space
        return {k: v for k, v in space.items() if k == "lr"} if self.protocol.ruleset == "lr-only" else space

    @property
    def searches(self) -> bool:
        return bool(self.space)

    @cached_property
    def defaults(self) -> HP:
        return {**self.optimizer.defaults, **(self.recipe.hp if self.recipe else {})}

    @cached_property
    def _made(self) -> dict[Any, Settings]:
        """A plan asks for the same settings again and again, and their ids are hashes."""
        return {}

    @cached_property
    def _study(self) -> Study:
        return Study(self.space, self.spec)

    def settings(self, seed: int, split: str, budget: float = 1.0, **hp: Any) -> Settings:
        key = seed, split, budget, *sorted(hp.items())
        if key not in self._made:
            self._made[key] = self._make(seed, split, budget, hp)
        return self._made[key]

    def _make(self, seed: int, split: str, budget: float, hp: HP) -> Settings:
        rules, recipe = self.protocol, self.recipe
        own = dict(schedule=recipe.schedule, epochs=recipe.epochs, batch=recipe.batch) if recipe else {}
        return Settings(
            task=self.task,
            task_version=self.spec.version,
            method=self.method,
            package=self.optimizer.package,
            hp={**self.defaults, **hp},
            seed=seed,
            split=split,
            budget=rules.budget * budget,
            dtype=self.spec.dtype,
            amp=recipe.amp if recipe else rules.amp,
            world=rules.world,
            parallel=rules.parallel,
            **{"schedule": rules.schedule, **own},
        )

    def finals(self, budget: float = 1.0, **hp: Any) -> list[Settings]:
        seeds = range(FINAL_SEEDS, FINAL_SEEDS + self.protocol.seeds)
        return [self.settings(seed, "train+validation", budget, **hp) for seed in seeds]

    def trials(self, hp: HP) -> list[Settings]:
        seeds = range(TUNING_SEEDS, TUNING_SEEDS + self.protocol.tune_seeds)
        return [self.settings(seed, "train", **hp) for seed in seeds]

    def plan(self, records: Records) -> Plan:
        plan = Plan()

        def collect(runs: list[Settings]) -> list[Record]:
            known = {settings.id for settings in plan.wanted}
            plan.wanted += [s for s in runs if s.id not in records and s.id not in known]
            return [records[s.id] for s in runs if s.id in records]

        if self.searches:
            self._search(plan, collect)
        plan.default = collect(self.finals())
        if plan.chosen is not None:
            plan.final = collect(self.finals(**plan.chosen))
        elif self.protocol.ruleset == "self-tuning":
            plan.final = collect(self.finals(SELF_TUNING))
        return plan

    def _search(self, plan: Plan, collect: Callable[[list[Settings]], list[Record]]) -> None:
        def add(hp: HP) -> Trial:
            runs = collect(self.trials(hp))
            done = len(runs) == self.protocol.tune_seeds
            trial = Trial(hp, runs, sum(score(run, self.spec) for run in runs) / len(runs) if done else None)
            plan.trials.append(trial)
            return trial

        count, plan.later = self.protocol.trials, self.protocol.seeds
        if self.protocol.sampler == "tpe":
            scores: list[float] = []
            while len(scores) < count:
                if (found := add(self._study.after(scores)).score) is None:
                    plan.later += (count - len(scores) - 1) * self.protocol.tune_seeds
                    return
                scores.append(found)
        elif self.protocol.sampler == "sobol":
            for hp in sobol(self.space, count):
                add(hp)
        else:
            self._search_grid(plan, add)
        if plan.wanted:
            return
        plan.later = 0
        if any(run["status"] not in RAISED for trial in plan.trials for run in trial.runs):
            plan.chosen = choose(plan.trials, self.spec, self.protocol.select)  # else the final runs would raise too

    def _search_grid(self, plan: Plan, add: Callable[[HP], Trial]) -> None:
        """The grid, and where the best is at an edge what lies beyond."""
        settings, ladder = grid(self.space, self.protocol.trials)
        for hp in settings:
            add(hp)
        rates = sorted({hp["lr"] for hp in settings}) if ladder else []
        width = len(rates)
        while not plan.wanted and rates:
            best = choose(plan.trials, self.spec, "best")
            top = next(trial.score for trial in plan.trials if trial.hp == best)
            at = {trial.lr for trial in plan.trials if trial.score == top}
            plan.edge = at in ({rates[0]}, {rates[-1]})
            if not plan.edge or len(rates) == width + EXTENSIONS:
                return
            step = -1 if at == {rates[0]} else 1
            lr = ladder[ladder.index(at.pop()) + step]
            rates = sorted([*rates, lr])
            for choice in [hp for hp in settings if hp["lr"] == settings[0]["lr"]]:
                add({**choice, "lr": lr})

"""The protocol: which runs a comparison needs next, given the runs that exist.

Planning is a function of the records alone, so a resumed sweep, a report and a status see the same plan.
"""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from bench.methods import OptSpec, find, half_decades
from bench.run import Settings
from bench.stats import one_se
from bench.store import Record
from bench.tasks import TASKS, TaskSpec

RULESETS = ("one-shot", "lr-only")
TUNING_SEEDS, FINAL_SEEDS = 0, 1000  # where the two kinds begin: no final run has a seed that chose anything
EXTENSIONS = 3  # grid points that a search may add at an edge, the same for all methods

Records = dict[str, Record]


@dataclass(frozen=True)
class Protocol:
    """The rules under which methods are compared."""

    ruleset: str = "lr-only"
    trials: int = 5  # learning rates in the grid
    tune_seeds: int = 1
    seeds: int = 5
    budget: float = 1.0
    schedule: str = "cosine"

    def as_record(self) -> Record:
        return asdict(self)


@dataclass
class Plan:
    """What a cell has and what it still wants."""

    wanted: list[Settings] = field(default_factory=list)  # runs that can start now
    later: int = 0  # runs that will be wanted once the tuning is done, at most
    tuning: dict[float, list[Record]] = field(default_factory=dict)
    scores: dict[float, float] = field(default_factory=dict)  # mean validation metric, failures at chance
    selected: float | None = None
    edge: bool = False  # the best learning rate is the last of the grid, extensions included
    default: list[Record] = field(default_factory=list)  # final runs at the default hyper-parameters
    final: list[Record] = field(default_factory=list)  # final runs at the selected ones

    @property
    def hopeless(self) -> bool:
        """Whether every trial raised, so that the search selected nothing."""
        return bool(self.scores) and self.selected is None

    @property
    def left(self) -> int:
        return len(self.wanted) + self.later


def score(record: Record, spec: TaskSpec) -> float:
    """The metric of a run; a failed run has learnt nothing, whatever its last number says."""
    return record["metrics"][spec.metric] if record["status"] == "ok" else spec.chance


@dataclass(frozen=True)
class Cell:
    """One method on one task."""

    task: str
    method: str
    protocol: Protocol

    @cached_property
    def spec(self) -> TaskSpec:
        return TASKS[self.task].spec

    @cached_property
    def optimizer(self) -> OptSpec:
        return find(self.method)

    @property
    def searches(self) -> bool:
        return self.protocol.ruleset == "lr-only" and "lr" in self.optimizer.space

    def settings(self, seed: int, split: str, **hp: Any) -> Settings:
        return Settings(
            task=self.task,
            task_version=self.spec.version,
            method=self.method,
            package=self.optimizer.package,
            hp={**self.optimizer.defaults, **hp},
            seed=seed,
            split=split,
            budget=self.protocol.budget,
            schedule=self.protocol.schedule,
        )

    def finals(self, **hp: Any) -> list[Settings]:
        return [self.settings(FINAL_SEEDS + i, "train+validation", **hp) for i in range(self.protocol.seeds)]

    def trials(self, lr: float) -> list[Settings]:
        return [self.settings(TUNING_SEEDS + i, "train", lr=lr) for i in range(self.protocol.tune_seeds)]

    def plan(self, records: Records) -> Plan:
        plan = Plan()

        def collect(runs: list[Settings]) -> list[Record]:
            known = {settings.id for settings in plan.wanted}
            plan.wanted += [s for s in runs if s.id not in records and s.id not in known]
            return [records[s.id] for s in runs if s.id in records]

        if self.searches:
            self._search(plan, records, collect)
        plan.default = collect(self.finals())
        if plan.selected is not None:
            plan.final = collect(self.finals(lr=plan.selected))
        return plan

    def _search(self, plan: Plan, records: Records, collect: Any) -> None:
        middle, width = self.optimizer.space["lr"], self.protocol.trials
        grid = half_decades(middle, width)
        reach = half_decades(middle, width + 2 * EXTENSIONS)
        while True:
            plan.tuning = {lr: collect(self.trials(lr)) for lr in grid}
            if plan.wanted:
                plan.later = self.protocol.seeds
                return
            plan.scores = {
                lr: sum(score(run, self.spec) for run in runs) / len(runs) for lr, runs in plan.tuning.items()
            }
            best = max(plan.scores.values())
            at = [lr for lr in grid if plan.scores[lr] == best]
            plan.edge = at in ([grid[0]], [grid[-1]])
            if not plan.edge or len(grid) == width + EXTENSIONS:
                break
            place = reach.index(at[0])
            grid = sorted({*grid, reach[place - 1 if at[0] == grid[0] else place + 1]})
        cases = [run["cases"] for runs in plan.tuning.values() for run in runs if run["status"] != "error"]
        if cases:  # else every trial raised, and so would the final runs
            plan.selected = one_se(plan.scores, cases[0])

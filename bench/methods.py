"""The methods: how to build each optimizer, which learning rates to search, what it needs of the training loop."""

import difflib
import importlib
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

NEEDS = frozenset({"closure", "hvp", "per_sample", "forward_only", "batch_control", "targets", "two_groups"})


@dataclass(frozen=True)
class Imported:
    """A class by its path ``package.module:Class``, imported when it is first needed."""

    path: str

    def load(self) -> Any:
        module, _, attribute = self.path.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        return self.load()(*args, **kwargs)


def package_version(name: str) -> str:
    """The version that an imported package gives itself, else that of its installation."""
    if version := getattr(sys.modules[name], "__version__", None):
        return str(version)
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "of unknown version"


@dataclass(frozen=True)
class OptSpec:
    """One method of the benchmark.

    Args:
        name: what the user types and the report prints.
        build: ``build(params, **hyper_parameters)`` makes the optimizer.
        space: for each searched hyper-parameter the middle of its grid of half-decades.
        defaults: the hyper-parameters of a run without tuning; a search replaces those in ``space``.
        needs: what the loop must provide beyond a gradient in ``p.grad``, a subset of ``NEEDS``.
    """

    name: str
    build: Callable[..., torch.optim.Optimizer]
    space: dict[str, float] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if unknown := self.needs - NEEDS:
            raise ValueError(f"{self.name} needs {sorted(unknown)}; what a method can need is {sorted(NEEDS)}")

    @property
    def package(self) -> str:
        """Package and version that the optimizer comes from; a run of another version is another run."""
        built = self.build.load() if isinstance(self.build, Imported) else self.build
        name = built.__module__.partition(".")[0].replace(__package__, "torch")  # ours below are torch's, varied
        return f"{name} {package_version(name)}"


def half_decades(middle: float, count: int) -> list[float]:
    """``count`` values of the ladder .. 0.01, 0.03, 0.1, 0.3, 1 .. around the rung nearest to ``middle``."""
    rung = round(2 * math.log10(middle))
    return [rung_value(rung - count // 2 + i) for i in range(count)]


def rung_value(rung: int) -> float:
    """1, 3, 10, 30 .. for 0, 1, 2, 3 .., read from their decimal text so that 0.03 is 0.03."""
    return float(f"{(1, 3)[rung % 2]}e{rung // 2}")


class HalfAdam(torch.optim.Adam):
    """Adam at half of the learning rate it is given: what diffGrad is where gradients are small or steady."""

    def __init__(self, params: Any, lr: float = 1e-3, **settings: Any) -> None:
        super().__init__(params, lr=lr / 2, **settings)


ADAM_LIKE = {"lr": 3e-3}
SGD_LIKE = {"lr": 3e-2}

METHODS: dict[str, OptSpec] = {
    spec.name: spec
    for spec in (
        OptSpec("sgd", Imported("torch.optim:SGD"), SGD_LIKE, {"lr": 0.1, "momentum": 0.9}),
        OptSpec("adam", Imported("torch.optim:Adam"), ADAM_LIKE, {"lr": 1e-3}),
        OptSpec("adam-half", Imported("bench.methods:HalfAdam"), ADAM_LIKE, {"lr": 1e-3}),
        OptSpec("adamw", Imported("torch.optim:AdamW"), ADAM_LIKE, {"lr": 1e-3}),
        OptSpec("diffgrad", Imported("optimzoo:DiffGrad"), ADAM_LIKE, {"lr": 1e-3}),
        OptSpec("adabelief", Imported("optimzoo:AdaBelief"), ADAM_LIKE, {"lr": 1e-3}),
    )
}


def find(name: str) -> OptSpec:
    """The method called ``name``, or the class or ``OptSpec`` at ``package.module:Name``.

    A class is searched around its own default learning rate; it needs a closure if its ``step`` demands one.

    Raises:
        LookupError: if there is no such method; the message names the nearest ones.
    """
    if name in METHODS:
        return METHODS[name]
    if ":" not in name:
        raise LookupError(f"no method called {name!r}{nearest(name, METHODS)}; a class is written package.module:Class")
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise LookupError(f"no method {name!r}: {error}") from error
    except AttributeError as error:
        raise LookupError(f"no {attribute!r} in {module}{nearest(attribute, vars(sys.modules[module]))}") from error
    if isinstance(found, OptSpec):
        return found
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise LookupError(f"{name} is neither a torch.optim.Optimizer class nor an OptSpec")
    lr = inspect.signature(found).parameters.get("lr")
    default = float(lr.default) if lr and isinstance(lr.default, int | float) else ADAM_LIKE["lr"]
    closure = inspect.signature(found.step).parameters.get("closure")
    required = closure is not None and closure.default is inspect.Parameter.empty
    return OptSpec(
        name,
        Imported(name),
        {"lr": default} if lr else {},
        {"lr": default} if lr else {},
        frozenset({"closure"} if required else ()),
    )


def nearest(name: str, known: Any) -> str:
    """A hint for an unknown name, empty where nothing is near."""
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(matches)}?" if matches else f"; known: {', '.join(sorted(known)[:12])}"

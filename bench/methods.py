"""The methods: how to build each optimizer, which learning rates to search, what it needs of the training loop."""

import difflib
import functools
import hashlib
import importlib
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

UNKNOWN = "of unknown version"
NEEDS = {
    "closure": "steps with a closure that takes the gradient",
    "forward_only": "steps with a closure that returns the loss",
    "targets": "steps with a closure that returns outputs and a function of them, and counts what it spends",
    "layers": "is built with the training targets too, and takes its gradients in a forward pass within targets(..)",
    "hvp": "after a step looks at the curvature of the batch's loss, and takes the schedule's factor",
    "batch_control": "draws its own batches",
    "per_sample": "is built with the sizes of batch and data too, and reads the gradient of each sample",
    "two_groups": "is built from two groups: weights of two or more dimensions, and all else",
    "model": "is built from the model in place of its parameters",
}


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
        return UNKNOWN


@functools.cache
def source_version(build: Any) -> str:
    """In place of a version: a hash of the file that a class or function is in, as it was when this was first asked."""
    try:
        return "source " + hashlib.sha256(Path(inspect.getfile(build)).read_bytes()).hexdigest()[:16]
    except (TypeError, OSError):  # it is in no file
        return UNKNOWN


@dataclass(frozen=True)
class OptSpec:
    """One method of the benchmark.

    Args:
        name: what the user types and the report prints.
        build: ``build(params, **hyper_parameters)`` makes the optimizer.
        space: for each searched hyper-parameter the middle of its grid of half-decades, or a tuple of choices.
        defaults: the hyper-parameters of a run without tuning; a search replaces those in ``space``.
        needs: what the loop must provide beyond a gradient in ``p.grad``, a subset of ``NEEDS``.
        origin: the package that the method comes from. Default: that of ``build``.
    """

    name: str
    build: Callable[..., torch.optim.Optimizer]
    space: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    origin: str = ""

    def __post_init__(self) -> None:
        if unknown := self.needs - set(NEEDS):
            raise ValueError(f"{self.name} needs {sorted(unknown)}; what a method can need is {sorted(NEEDS)}")

    @property
    def built(self) -> Any:
        """The class or function that builds it, imported."""
        return self.build.load() if isinstance(self.build, Imported) else self.build

    @property
    def package(self) -> str:
        """Package and version that the optimizer comes from; a run of another version is another run.

        A package without a version, such as a file of yours, has the hash of the source in its place.
        """
        name = self.origin or self.built.__module__.partition(".")[0]
        importlib.import_module(name)
        version = package_version(name)
        return f"{name} {source_version(self.built) if version == UNKNOWN else version}"


def half_decades(middle: float, count: int) -> list[float]:
    """``count`` values of the ladder .. 0.01, 0.03, 0.1, 0.3, 1 .. around the rung nearest to ``middle``."""
    rung = round(2 * math.log10(middle))
    return [rung_value(rung - count // 2 + i) for i in range(count)]


def rung_value(rung: int) -> float:
    """1, 3, 10, 30 .. for 0, 1, 2, 3 .., read from their decimal text so that 0.03 is 0.03."""
    return float(f"{(1, 3)[rung % 2]}e{rung // 2}")


def ours(name: str, build: str, space: dict[str, Any], defaults: dict[str, Any], *needs: str) -> OptSpec:
    """A method of this library, built by what ``bench.zoo`` has or by its class."""
    path = build if ":" in build else f"optimzoo:{build}"
    return OptSpec(name, Imported(path), space, defaults, frozenset(needs), "optimzoo")


def theirs(name: str, build: str, space: dict[str, Any], defaults: dict[str, Any], *needs: str) -> OptSpec:
    """A method of torch."""
    path = build if ":" in build else f"torch.optim:{build}"
    return OptSpec(name, Imported(path), space, defaults, frozenset(needs), "torch")


# The middles of the grids by family, and two values of one more hyper-parameter: 14 trials for every method.
COUPLED, DECOUPLED = (0.0, 5e-4), (0.0, 0.05)  # weight decays that suit gradients and steps
SGD_LIKE = {"lr": 3e-2, "weight_decay": COUPLED}
ADAM_LIKE = {"lr": 3e-3, "weight_decay": COUPLED}
ADAMW_LIKE = {"lr": 3e-3, "weight_decay": DECOUPLED}

METHODS: dict[str, OptSpec] = {
    spec.name: spec
    for spec in (
        theirs("sgd", "SGD", SGD_LIKE, {"lr": 0.1, "momentum": 0.9}),
        theirs("adam", "Adam", ADAM_LIKE, {"lr": 1e-3}),
        theirs("adam-half", "bench.zoo:HalfAdam", ADAM_LIKE, {"lr": 1e-3}),
        theirs("adamw", "AdamW", ADAMW_LIKE, {"lr": 1e-3}),
        theirs("radam", "RAdam", ADAM_LIKE, {"lr": 1e-3}),
        theirs("nadam", "NAdam", ADAM_LIKE, {"lr": 2e-3}),
        theirs("muon", "bench.zoo:MuonAdamW", ADAMW_LIKE, {"lr": 1e-3, "weight_decay": 0.1}, "two_groups"),
        ours("diffgrad", "DiffGrad", ADAM_LIKE, {"lr": 1e-3}),
        ours("adabelief", "AdaBelief", ADAMW_LIKE, {"lr": 1e-3}),
        ours("adagradnorm", "AdaGradNorm", {"lr": 1.0, "weight_decay": COUPLED}, {"lr": 1.0}),
        ours("dalesgd", "bench.zoo:DALE_SGD", {"lr": 0.3, "weight_decay": COUPLED},
             {"lr": 0.1, "momentum": 0.9}, "two_groups"),
        ours("daleadamw", "bench.zoo:DALE_ADAMW", {"lr": 1e-2, "weight_decay": (0.0, 1e-2)},
             {"lr": 1e-3, "weight_decay": 1e-2}, "two_groups"),
        ours("dalelangevin", "bench.zoo:DALE_LANGEVIN", {"lr": 0.1, "s": (0.01, 0.1)},
             {"lr": 1e-3, "s": 1.0}, "two_groups"),
        ours("adadagrad", "bench.zoo:AdAdaGrad", {"lr": 3e-2, "eta": (0.5, 1.0)},
             {"lr": 1e-2, "eta": 0.5}, "batch_control"),
        ours("adadagradnorm", "bench.zoo:AdAdaGradNorm", {"lr": 1.0, "eta": (0.5, 1.0)},
             {"lr": 1.0, "eta": 0.5}, "batch_control"),
        ours("cbo", "bench.zoo:cbo", {"lr": 0.1, "init_std": (0.1, 1.0)}, {"lr": 0.1}, "forward_only", "model"),
        ours("sso", "bench.zoo:sso", {"lr": 1.0, "inner_steps": (3, 10)}, {"lr": 1.0}, "targets", "model"),
        ours("lanczos", "bench.zoo:LanczosSGD", {"lr": 1.0, "learn": ("fixed", "learn")}, {"lr": 1.0}, "hvp", "model"),
        ours("tpsgd", "bench.zoo:tpsgd", {"lr": 1e-2, "local_loss": ("l2", "l1")},
             {"lr": 1e-2, "momentum": 0.9}, "layers", "model"),
        ours("dpsgd", "bench.zoo:Private", {"lr": 0.3, "max_grad_norm": (0.1, 1.0)}, {"lr": 0.1}, "per_sample"),
        ours("dicesgd", "bench.zoo:PrivateDice", {"lr": 0.3, "max_grad_norm": (0.1, 1.0)}, {"lr": 0.1}, "per_sample"),
    )
}  # fmt: skip
# What other packages have of ours, named by their paths.
PEERS: dict[str, OptSpec] = {
    path: OptSpec(path, Imported(path), space, defaults)
    for path, space, defaults in (
        ("torch_optimizer:DiffGrad", ADAM_LIKE, {"lr": 1e-3}),
        ("adabelief_pytorch:AdaBelief", ADAMW_LIKE, {"lr": 1e-3, "rectify": False, "print_change_log": False}),
    )
}


def find(name: str) -> OptSpec:
    """The method called ``name``, or the class or ``OptSpec`` at ``package.module:Name``.

    A class is searched around its own default learning rate, without and with a little weight decay if it has any; it
    needs a closure if its ``step`` demands one.

    Raises:
        LookupError: if there is no such method; the message names the nearest ones.
    """
    if name in METHODS:
        return METHODS[name]
    if ":" not in name:
        raise LookupError(f"no method called {name!r}{nearest(name, METHODS)}; a class is written package.module:Class")
    module, _, attribute = name.partition(":")
    try:
        holder = importlib.import_module(module)
    except Exception as error:  # whatever the user's module raises
        raise LookupError(f"no method {name!r}: {type(error).__name__}: {error}") from error
    if not hasattr(holder, attribute):
        raise LookupError(f"no {attribute!r} in {module}{nearest(attribute, vars(holder))}")
    found = getattr(holder, attribute)
    if name in PEERS:
        return PEERS[name]
    if isinstance(found, OptSpec):
        return found
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise LookupError(f"{name} is neither a torch.optim.Optimizer class nor an OptSpec")
    takes = inspect.signature(found).parameters
    lr = takes.get("lr")
    default = float(lr.default) if lr and isinstance(lr.default, int | float) else ADAM_LIKE["lr"]
    closure = inspect.signature(found.step).parameters.get("closure")
    required = closure is not None and closure.default is inspect.Parameter.empty
    space = {"lr": default} if lr else {}
    if "weight_decay" in takes:
        space["weight_decay"] = COUPLED
    return OptSpec(
        name,
        Imported(name),
        space,
        {"lr": default} if lr else {},
        frozenset({"closure"} if required else ()),
    )


def nearest(name: str, known: Any) -> str:
    """A hint for an unknown name, empty where nothing is near."""
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(matches)}?" if matches else f"; known: {', '.join(sorted(known)[:12])}"

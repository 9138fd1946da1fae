"""The table that drives the suite: a class enters every test of the contract and of the laws by being public.

What cannot be read from the class itself stands in ``SETTINGS`` (options worth a test, by name) and ``REFUSES`` (what a
class declines to do, with the reason). The reference of a class is ``step`` of ``reference/NAME.py``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import optimzoo
from optimzoo.optimizer import Elementwise, Tensorwise

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "DiffGrad": {
        "variant-1": dict(variant=1),
        "variant-2": dict(variant=2, lr=0.01),
        "variant-1-coupled-maximize": dict(variant=1, weight_decay=0.1, maximize=True),
        "decoupled": dict(weight_decay=0.3, decoupled_weight_decay=True, lr=0.01),
        "no-memory": dict(betas=(0.0, 0.0)),
        "eps-0.1": dict(eps=0.1),
        "everything": dict(
            lr=0.03,
            betas=(0.5, 0.7),
            eps=1e-3,
            weight_decay=0.2,
            variant=2,
            decoupled_weight_decay=True,
            maximize=True,
        ),
    },
    "AdaBelief": {
        "plain": dict(rectify=False),
        "cifar": dict(rectify=False, eps=1e-8, weight_decay=5e-4, decoupled_weight_decay=False),
        "coupled-rectified-maximize": dict(weight_decay=0.1, decoupled_weight_decay=False, maximize=True),
        "decoupled": dict(rectify=False, weight_decay=0.3, lr=0.01),
        "fixed": dict(weight_decay=0.003, fixed_decay=True),
        "amsgrad": dict(rectify=False, amsgrad=True, betas=(0.9, 0.5)),
        "amsgrad-coupled-maximize": dict(
            rectify=False, amsgrad=True, weight_decay=0.1, decoupled_weight_decay=False, maximize=True
        ),
        "stands-still": dict(degenerated_to_sgd=False),
        "soon-adaptive": dict(betas=(0.5, 0.8), lr=0.01),
        "eps-0.01": dict(eps=0.01),
    },
}

_BOUNDS = dict(exponent_clip=0.5, min_abs=0.01, max_abs=2.0)
SETTINGS |= {
    "DaleSGD": {
        "nesterov": dict(momentum=0.9, nesterov=True, exponent_clip=1.0),
        "dampened": dict(momentum=0.9, dampening=0.3, weight_decay=0.1),
        "bounded": dict(lr=1.0, momentum=0.5, **_BOUNDS),
        "decoupled": dict(weight_decay=0.3, decoupled_weight_decay=True),
        "plain": dict(dale=False, momentum=0.9, nesterov=True, weight_decay=0.1),
        "plain-sgd": dict(dale=False, weight_decay=0.1),
    },
    "DaleAdamW": {
        "coupled": dict(weight_decay=0.1, decoupled_weight_decay=False),
        "bounded": dict(lr=1.0, eps=0.1, **_BOUNDS),
        "plain": dict(dale=False, weight_decay=0.1),
        "plain-coupled": dict(dale=False, weight_decay=0.1, decoupled_weight_decay=False),
    },
    "DaleLangevin": {
        "mirrored": dict(noise="mirrored", lr=0.01),
        "hessian": dict(noise="hessian", lr=0.01, min_abs=0.1),
        "bounded": dict(lr=1.0, **_BOUNDS),
        "decoupled": dict(weight_decay=0.3, decoupled_weight_decay=True),
        "plain": dict(dale=False, weight_decay=0.1),
    },
}


class QuietLangevin(optimzoo.DaleLangevin):
    """What is random differs between a tensor and its halves; that it is right is shown in test_dale.py."""

    def __init__(
        self, params: Any, lr: Any = 1e-3, temperature: float = 0.0, *, s: float = 0.0, **options: Any
    ) -> None:
        super().__init__(params, lr, temperature, s=s, **options)


QuietLangevin.__name__ = "DaleLangevin"  # for messages
QUIET = {"DaleLangevin": QuietLangevin}

_SIGNS = "its steps multiply real numbers that have a sign"
_DALE = {
    "sparse": _SIGNS,
    "complex": _SIGNS,
    "zeros": _SIGNS,
    "non-finite": "what is not finite is not written",
    "float16 beside others": "the smallest and largest weight are those that float16 holds",
}
REFUSES: dict[str, dict[str, str]] = {
    "DiffGrad": {"sparse": "a row that has no gradient would keep an old one to be compared with"},
    "DaleSGD": _DALE,
    "DaleAdamW": _DALE,
    "DaleLangevin": {**_DALE, "capturable": "the host draws the noise", "compile": "a trace has no generator"},
    "AdaBelief": {"sparse": "the authors' code refuses, and eps would have to enter rows that are not touched"},
}

# Public names that this table does not drive, with the tests that show their contract instead.
ELSEWHERE: dict[str, str] = {
    "AdaptiveBatchSampler": "test_batch_size_sampler.py",
    "AdaptiveBatchSize": "test_batch_size.py",
    "SamplesLR": "test_batch_size.py",
    "DPSGD": "test_dicesgd.py: its gradients come from those of single samples",
    "DiceSGD": "test_dicesgd.py: its gradients come from those of single samples",
    "CBO": "test_cbo.py: its step takes a closure and no gradient",
    "GeometricBrownian": "test_diffusion.py",
    "TPSGD": "test_tpsgd.py: its gradients come from the model's forward pass",
    "SSO": "test_sso.py: its step takes a closure that returns outputs and loss",
    "TargetSurrogate": "test_sso.py",
    "LanczosLR": "test_lanczos.py: a scheduler",
    "max_learning_rate": "test_lanczos.py",
    "PerSampleGradients": "test_per_sample.py",
    "AdaGradNorm": "test_adagrad.py",  # its state is one number that depends on all gradients
    "PoissonSampler": "test_poisson.py",
    "poisson_collate": "test_poisson.py",
    "dale_columns_": "test_dale.py",
    "dale_groups": "test_dale.py",
    "lognormal_": "test_dale.py",
}

BACKENDS: dict[str, dict[str, bool]] = {
    "single": dict(foreach=False, fused=False),
    "foreach": dict(foreach=True),
    "fused": dict(fused=True),
    "capturable": dict(foreach=False, fused=False, capturable=True),
    "capturable-foreach": dict(foreach=True, capturable=True),
    "capturable-fused": dict(fused=True, capturable=True),
    "differentiable": dict(differentiable=True),
    "default": {},
}

# Half the distance between one and the next number.
ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# A step rounds some sixteen times on the way to a coordinate, and each step adds its own.
ROUNDINGS = 16


def tolerance(dtype: torch.dtype, steps: int) -> float:
    """What may be lost, relative to the largest number that entered, by arithmetic in this dtype."""
    return ROUNDINGS * steps * ROUNDOFF[dtype]


@dataclass(frozen=True)
class Case:
    """A public class and what the suite knows of it."""

    name: str
    cls: type[Tensorwise]
    settings: dict[str, dict[str, Any]]
    refuses: dict[str, str]

    def __repr__(self) -> str:
        return f"Case({self.name})"

    @property
    def elementwise(self) -> bool:
        return issubclass(self.cls, Elementwise)

    @property
    def reference(self) -> Callable[..., None]:
        step: Callable[..., None] = importlib.import_module("reference." + self.name.lower()).step
        if "noise" not in inspect.signature(step).parameters:
            return step

        def quiet(state: dict[str, Any], grad: Any, noise: str = "gbm", **rest: Any) -> None:
            step(state, grad, 0 * grad, **{"noise_kind": noise, "temperature": 0.0, "s": 0.0, **rest})

        return quiet

    @property
    def states(self) -> list[str]:
        """What the method keeps of a parameter, under the default options."""
        return [name for name in self.cls._rule.states if name not in self.cls.drawn]

    @property
    def backends(self) -> dict[str, dict[str, bool]]:
        """The options that choose each back-end of the class, which a class without foreach and fused has fewer of."""
        if self.elementwise:
            return {n: o for n, o in BACKENDS.items() if "capturable" not in self.refuses or "capturable" not in o}
        flags = [{n: v for n, v in options.items() if n not in ("foreach", "fused")} for options in BACKENDS.values()]
        return {"-".join(options) or "default": options for options in flags}


def _case(name: str) -> Case:
    cls = QUIET.get(name) or getattr(optimzoo, name)
    known = inspect.signature(getattr(optimzoo, name)).parameters
    common: dict[str, dict[str, Any]] = {"defaults": {}, "maximize": dict(maximize=True)}
    for option, value in dict(lr=0.05, weight_decay=0.1, betas=(0.8, 0.95), momentum=0.5).items():
        if option in known:
            common[option] = {option: value}
    return Case(name, cls, {**common, **SETTINGS.get(name, {})}, REFUSES.get(name, {}))


CASES = [_case(name) for name in optimzoo.__all__ if name not in ELSEWHERE]


def _ids(cases: list[Case]) -> list[Any]:
    return [pytest.param(case, id=case.name) for case in cases]


# Run a test for every class, or every class that has foreach and fused steps: its argument is `case`.
each_case = pytest.mark.parametrize("case", _ids(CASES))
each_elementwise = pytest.mark.parametrize("case", _ids([case for case in CASES if case.elementwise]))

# Run a test for every class and option set: its arguments are `case` and `settings`.
each_setting = pytest.mark.parametrize(
    ("case", "settings"),
    [
        pytest.param(case, settings, id=f"{case.name}-{name}")
        for case in CASES
        for name, settings in case.settings.items()
    ],
)


def each_backend(*without: str) -> pytest.MarkDecorator:
    """Run a test for every class and back-end: its arguments are ``case`` and ``backend``, the options."""
    rows = [
        pytest.param(case, options, id=f"{case.name}-{name}")
        for case in CASES
        for name, options in case.backends.items()
        if name not in without
    ]
    return pytest.mark.parametrize(("case", "backend"), rows)

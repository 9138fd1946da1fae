"""torch's own records of an optimizer, ``OptimizerInfo``, for every public optimizer of ours.

``torch.testing._internal`` holds the machinery of torch's tests of its optimizers: the records, the decorator that runs
a test for each of them, error inputs that all of them share. What a record does not know is how a step is made: most of
ours step from gradients, the others want a closure of their own or labels. ``Info.train`` does what a training loop
would do, for each of them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import hypothesis
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

import optimzoo
from optimzoo.optimizer import Elementwise

hypothesis.settings.load_profile("suite")  # torch.testing has just loaded its own

Settings = dict[str, dict[str, Any]]


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of all that is trained here: the mean squared error."""
    return (outputs - targets).square().mean()


def by_gradient(optimizer: Optimizer, model: nn.Module, inputs: Tensor, targets: Tensor) -> Any:
    """A step as of any optimizer of torch's, through a closure."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = mse(model(inputs), targets)
        loss.backward()
        return loss

    return optimizer.step(closure)


def by_value(optimizer: Optimizer, model: nn.Module, inputs: Tensor, targets: Tensor) -> Any:
    """CBO's: the loss at each of its particles, and no gradient."""
    return optimizer.step(lambda: mse(model(inputs), targets))


def by_outputs(optimizer: Optimizer, model: nn.Module, inputs: Tensor, targets: Tensor) -> Any:
    """SSO's: the outputs, and the loss as a function of them."""
    return optimizer.step(lambda: (model(inputs), lambda outputs: mse(outputs, targets)))


def by_labels(optimizer: Any, model: nn.Module, inputs: Tensor, targets: Tensor) -> Any:
    """TPSGD's: the model's forward pass beside the targets."""
    optimizer.zero_grad()
    with optimizer.targets(targets, mse):
        model(inputs)
    optimizer.step()
    return optimizer.loss


def by_samples(optimizer: Optimizer, model: nn.Module, inputs: Tensor, targets: Tensor) -> Any:
    """That of a private optimizer, from the gradients of single samples."""
    with optimzoo.PerSampleGradients(model):
        return by_gradient(optimizer, model, inputs, targets)


def of_parameters(cls: type[Optimizer], model: nn.Module, named: bool = False, **options: Any) -> Optimizer:
    """The optimizer of a model's parameters."""
    return cls(list(model.named_parameters() if named else model.parameters()), **options)


def of_model(cls: Callable[..., Optimizer], model: nn.Module, named: bool = False, **options: Any) -> Optimizer:
    """TPSGD takes the model itself, whose modules are its groups."""
    return cls(model, **options)


class Info(OptimizerInfo):
    """A record of one class.

    Args:
        cls: the class.
        settings: its options that are worth a test, by name, with those that all of its kind share.
        train: makes one step on a model, inputs and targets, and returns the loss.
        make: makes the optimizer of a model.
        errors: options that it refuses: the words of the message, and the class of the error.
        refuses: what it declines, with the reason, as in ``cases.py``.
        foreach_temporaries: how many copies of the parameters the foreach step may hold beyond what the single one
            does for all of them.
    """

    def __init__(
        self,
        cls: type[Optimizer],
        settings: Settings,
        *,
        train: Callable[..., Any] = by_gradient,
        make: Callable[..., Optimizer] = of_parameters,
        errors: list[tuple[dict[str, Any], type[Exception], str]],
        refuses: dict[str, str] | None = None,
        foreach_temporaries: int = 0,
        supported_impls: tuple[str, ...] = (),
        **record: Any,
    ) -> None:
        self.settings, self.train, self.make = settings, train, functools.partial(make, cls)
        self.errors, self.refuses, self.foreach_temporaries = errors, refuses or {}, foreach_temporaries
        self.takes_gradients = train is by_gradient
        super().__init__(
            cls,
            optim_inputs_func=self._inputs,
            optim_error_inputs_func=self._error_inputs,
            step_requires_closure=not self.takes_gradients,
            not_og_supported_flags=("foreach", "fused", "differentiable", "maximize", "capturable", "max_grad_norm"),
            supported_impls=supported_impls,
            supports_fused_on=("cpu",) if "fused" in supported_impls else (),
            **record,
        )

    def _inputs(self, device: Any = None, dtype: Any = None) -> list[OptimizerInput]:
        return [OptimizerInput(None, copy.deepcopy(kwargs), name) for name, kwargs in self.settings.items()]

    def _error_inputs(self, device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
        shared = get_error_inputs_for_all_optims(device, dtype)
        required = {} if self.train is not by_samples else self.settings["default"]
        for error in shared:
            given = error.optimizer_error_input
            given.kwargs = {**required, **given.kwargs}
            if "Tensor lr" in error.error_regex:  # ours has other words for the same
                error.error_regex = r"lr must be .*shape \(2,\)|lr must be a number .*tensor\("
                error.error_type = (ValueError, TypeError)
        own = [
            ErrorOptimizerInput(
                OptimizerInput(None, kwargs, repr(kwargs)),
                error_on=OptimizerErrorEnum.CONSTRUCTION_ERROR,
                error_type=kind,
                error_regex=message,
            )
            for kwargs, kind, message in self.errors
        ]
        return [*(shared if self.make.func is of_parameters else []), *own]


_NUMBERS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(lr=-1e-3), ValueError, "lr must be finite and >= 0, got -0.001"),
    (dict(lr="fast"), TypeError, "lr must be a number .*'fast'"),
    (dict(weight_decay=-0.1), ValueError, "weight_decay must be finite and >= 0, got -0.1"),
    (dict(maximize=1), TypeError, "maximize must be True or False, got 1"),
    (dict(max_grad_norm=0.0), ValueError, "max_grad_norm must be > 0, or None, got 0.0"),
    (dict(foreach=True, fused=True), RuntimeError, "fused and foreach cannot both be True"),
]
_BETAS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(betas=(1.0, 0.9)), ValueError, r"betas must be in \[0, 1\), got 1.0"),
    (dict(betas=0.9), ValueError, r"betas must be two numbers in \[0, 1\), got 0.9"),
]


def _gradient(cls: type[Elementwise], lr: float, own: Settings, errors: list[Any], **record: Any) -> Info:
    """A class that steps from gradients: what torch calls global flags, and the class's own options."""
    capturable = "capturable" not in record.get("refuses", {})
    quiet: dict[str, Any] = dict(temperature=0.0, s=0.0) if cls is optimzoo.DaleLangevin else {}
    settings: Settings = {
        "default": {},
        "non-default lr": dict(lr=lr),
        "tensor lr": dict(lr=torch.tensor(lr)),
        "weight decay": dict(weight_decay=0.01),
        "maximize": dict(maximize=True),
        "maximize, weight decay": dict(maximize=True, weight_decay=0.01),
        "clipped": dict(max_grad_norm=0.5),
        **own,
    }
    if capturable:
        settings["capturable"] = dict(capturable=True, weight_decay=0.01)
        settings["capturable, tensor lr"] = dict(capturable=True, lr=torch.tensor(lr))
    return Info(
        cls,
        {name: {**quiet, **kwargs} for name, kwargs in settings.items()},
        errors=[*_NUMBERS, *errors],
        supported_impls=("foreach", "fused", "differentiable"),
        has_capturable_arg=capturable,
        supports_sparse=False,
        **record,
    )


_SPARSE = "a row that has no gradient has state to be kept and compared with"
_SIGNS = "its steps multiply real numbers that have a sign"
_DALE: Settings = {
    "bounded": dict(exponent_clip=0.5, min_abs=0.01, max_abs=2.0),
    "plain": dict(dale=False),
    "unchecked": dict(check_signs=False),
}
_DALE_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(dale="rows"), ValueError, "dale must be True, False or 'columns', got 'rows'"),
    (dict(min_abs=2.0, max_abs=1.0), ValueError, "min_abs must be <= max_abs"),
    (dict(zeros="ignore"), ValueError, "zeros must be one of"),
]

_PRIVATE = dict(
    lr=0.1, max_grad_norm=5.0, noise_std_sum=0.0, expected_batch_size=8, sample_rate=1.0, base=optimzoo.AdaBelief
)
_PRIVATE_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({**_PRIVATE, "lr": -0.1}, ValueError, "lr must be finite and > 0, got -0.1"),
    ({**_PRIVATE, "max_grad_norm": 0.0}, ValueError, "max_grad_norm must be finite and > 0, got 0.0"),
    ({**_PRIVATE, "sample_rate": 2.0}, ValueError, r"sample_rate must be in \(0, 1\], got 2.0"),
]

infos: list[Info] = [
    _gradient(
        optimzoo.DiffGrad,
        0.01,
        {
            "variant 1": dict(variant=1),
            "variant 2": dict(variant=2),
            "decoupled": dict(weight_decay=0.1, decoupled_weight_decay=True),
            "no memory": dict(betas=(0.0, 0.0)),
        },
        [*_BETAS, (dict(variant=3), ValueError, "variant must be 0, 1 or 2, got 3")],
        refuses={"sparse": _SPARSE},
        foreach_temporaries=5,
    ),
    _gradient(
        optimzoo.AdaBelief,
        0.01,
        {
            "plain": dict(rectify=False),
            "amsgrad": dict(rectify=False, amsgrad=True),
            "coupled": dict(weight_decay=0.1, decoupled_weight_decay=False),
            "fixed decay": dict(weight_decay=0.001, fixed_decay=True),
        },
        [*_BETAS, (dict(eps=0.0), ValueError, "eps must be > 0"), (dict(amsgrad=True), ValueError, "rectify=False")],
        refuses={"sparse": _SPARSE},
        foreach_temporaries=4,
    ),
    _gradient(
        optimzoo.AdaGradNorm,
        0.1,
        {"b0": dict(b0=1.0), "a sum per group": dict(per_group=True)},
        [
            (dict(b0=0.0), ValueError, "b0 must be finite and > 0, got 0.0"),
            (dict(per_group=2), TypeError, "per_group must be True or False, got 2"),
        ],
        refuses={"sparse": "its sum is that of all gradients"},
        foreach_temporaries=3,
    ),
    _gradient(
        optimzoo.DaleSGD,
        0.05,
        {**_DALE, "momentum": dict(momentum=0.9), "nesterov": dict(momentum=0.9, nesterov=True)},
        [*_DALE_ERRORS, (dict(nesterov=True), ValueError, "nesterov")],
        refuses={"sparse": _SIGNS, "complex": _SIGNS},
        supports_complex=False,
        foreach_temporaries=8,
    ),
    _gradient(
        optimzoo.DaleAdamW,
        0.01,
        {**_DALE, "coupled": dict(weight_decay=0.01, decoupled_weight_decay=False)},
        [*_DALE_ERRORS, *_BETAS],
        refuses={"sparse": _SIGNS, "complex": _SIGNS},
        supports_complex=False,
        foreach_temporaries=11,
    ),
    _gradient(
        optimzoo.DaleLangevin,
        0.05,
        {**_DALE, "noise": dict(temperature=1e-6, s=1e-3, seed=3), "mirrored": dict(noise="mirrored")},
        [*_DALE_ERRORS, (dict(capturable=True), ValueError, "capturable must be False")],
        refuses={
            "sparse": _SIGNS,
            "complex": _SIGNS,
            "capturable": "the host draws the noise",
            "compile": "a trace has no generator",
        },
        supports_complex=False,
        foreach_temporaries=9,
    ),
    Info(
        optimzoo.CBO,
        {
            "default": dict(n_particles=20, init_std=0.3, seed=1),
            "memory": dict(n_particles=20, init_std=0.3, seed=1, memory="fixed"),
            "adam": dict(n_particles=20, init_std=0.3, seed=1, rule="adam", lamda=0.05),
        },
        train=by_value,
        errors=[
            (dict(lr=-0.1), ValueError, "lr must be"),
            (dict(n_particles=1), ValueError, r"n_particles must be a whole number from 2 to 2\*\*63 - 1, got 1"),
            (dict(noise="white"), ValueError, "noise must be one of"),
        ],
        refuses={"sparse": "it takes no gradients", "complex": "its noise is that of real numbers"},
        supports_complex=False,
    ),
    Info(
        optimzoo.SSO,
        {
            "default": dict(inner_steps=3),
            "SGD within": dict(inner=functools.partial(torch.optim.SGD, lr=0.1), inner_steps=3),
            "metric": dict(inner=functools.partial(torch.optim.SGD, lr=0.1), inner_steps=3, target_metric="adagrad"),
        },
        train=by_outputs,
        errors=[
            (dict(lr=0.0), ValueError, "lr must be"),
            (dict(inner_steps=0), ValueError, "inner_steps must be a whole number >= 1, got 0"),
            (dict(inner="newton"), TypeError, 'inner must be "armijo" or a function'),
        ],
        refuses={"sparse": "its gradients are made within a step", "complex": "its outputs are real"},
        supports_complex=False,
    ),
    Info(
        optimzoo.TPSGD,
        {
            "default": dict(target_dim=2, lr=0.1, seed=1),
            "momentum": dict(target_dim=2, lr=0.05, seed=1, momentum=0.9),
            "AdaBelief within": dict(target_dim=2, lr=0.01, seed=1, base=optimzoo.AdaBelief),
        },
        train=by_labels,
        make=of_model,
        errors=[
            (dict(target_dim=2, lr=-0.1), ValueError, "lr must be"),
            ({}, ValueError, "give num_classes or target_dim"),
            (dict(target_dim=2, projection="zero"), ValueError, "projection must be a function or one of"),
        ],
        refuses={"sparse": "its layers make the gradients", "complex": "its targets are real"},
        supports_complex=False,
    ),
    Info(
        optimzoo.DPSGD,
        {
            "default": {**_PRIVATE, "lr": 0.01},
            "automatic": {**_PRIVATE, "lr": 0.01, "clipping": "automatic"},
            "SGD behind": {**_PRIVATE, "base": torch.optim.SGD, "momentum": 0.9},
        },
        train=by_samples,
        errors=_PRIVATE_ERRORS,
        refuses={"sparse": "its sums are dense", "complex": "its noise is that of real numbers"},
        supports_complex=False,
    ),
    Info(
        optimzoo.DiceSGD,
        {
            "default": {**_PRIVATE, "lr": 0.01, "error_norm_sum": 1.0},
            "capped": {**_PRIVATE, "lr": 0.01, "error_norm_sum": 0.5, "windup_cap": True},
            "SGD behind": {**_PRIVATE, "error_norm_sum": 1.0, "base": torch.optim.SGD, "momentum": 0.9},
        },
        train=by_samples,
        errors=[({**_PRIVATE, "error_norm_sum": -1.0}, ValueError, "error_norm_sum must be finite and >= 0, got -1.0")],
        refuses={"sparse": "its sums are dense", "complex": "its noise is that of real numbers"},
        supports_complex=False,
    ),
]

of_gradients = [info for info in infos if info.takes_gradients]
of_closures = [info for info in infos if not info.takes_gradients]


def model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """A small network, the same each time, without weights that are zero."""
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in network.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.5)
    return network.to(dtype)


def batch(dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs and targets for it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 4, generator=generator).to(dtype), torch.randn(8, 2, generator=generator).to(dtype)


@torch.no_grad()
def loss(network: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """The loss of a network, by a pass that trains nothing."""
    return mse(network(inputs), targets).item()

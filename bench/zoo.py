"""Methods that take more than parameters, brought to the forms that the training loop builds and steps."""

from collections import ChainMap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import optimzoo
from optimzoo.curvature import Closure

MATRIX = 2  # dimensions of a weight that maps inputs to outputs; convolutions have more


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The weights with two or more dimensions, and all else; ``optimzoo.dale_groups`` without what is Dale's."""
    return [{"params": group["params"]} for group in optimzoo.dale_groups(model)]


class Dale:
    """A class of multiplicative steps for the weights, with plain steps at a share of the learning rate for the rest.

    Args:
        path: the class's name in optimzoo.
        share: of ``lr`` that the plain group has.
    """

    def __init__(self, path: str, share: float = 1.0) -> None:
        self.path, self.share = path, share

    def __call__(self, groups: list[dict[str, Any]], lr: float, **hp: Any) -> torch.optim.Optimizer:
        weights, *rest = groups
        plain = [{**group, "dale": False, "lr": self.share * lr} for group in rest]
        made: torch.optim.Optimizer = getattr(optimzoo, self.path)([weights, *plain], lr=lr, **hp)
        return made


DALE_SGD, DALE_ADAMW, DALE_LANGEVIN = Dale("DaleSGD", 0.1), Dale("DaleAdamW"), Dale("DaleLangevin")


class MuonAdamW:
    """Muon for matrices, its steps as large as Adam's; AdamW for all else, at the same learning rate."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, weight_decay: float = 0.1) -> None:
        every = [param for group in groups for param in group["params"]]
        matrices = [param for param in groups[0]["params"] if param.dim() == MATRIX]
        rest = [param for param in every if not any(param is matrix for matrix in matrices)]
        hp = dict(lr=lr, weight_decay=weight_decay)
        muon = [torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **hp)] if matrices else []
        self.parts = [*muon, *([torch.optim.AdamW(rest, **hp)] if rest else [])]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> ChainMap[Any, Any]:
        return ChainMap(*(part.state for part in self.parts))

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(own)


def cbo(model: nn.Module, **hp: Any) -> optimzoo.CBO:
    """CBO with the network's buffers under its care, if it has any: they cost an evaluation a step."""
    return optimzoo.CBO(model.parameters(), module=model if [*model.buffers()] else None, **hp)


def sso(model: nn.Module, **hp: Any) -> optimzoo.SSO:
    """SSO with the network's buffers under its care."""
    return optimzoo.SSO(model.parameters(), module=model, **hp)


class LanczosSGD(torch.optim.SGD):
    """SGD at a learning rate that LanczosLR learns; ``lr`` multiplies it.

    Args:
        model: the network.
        lr: multiple of the learnt rate.
        momentum: of SGD.
        learn: ``"learn"`` to have the momentum learnt too, ``"fixed"`` not to.
    """

    factor = 1.0  # of the schedule, which the loop sets

    def __init__(self, model: nn.Module, lr: float = 1.0, momentum: float = 0.9, learn: str = "fixed") -> None:
        super().__init__(model.parameters(), lr=lr, momentum=momentum)
        self.learner = optimzoo.LanczosLR(self, module=model, momentum=learn, schedule=lambda step: self.factor)

    def look(self, closure: Closure) -> int:
        """Counts a step, with a look at the curvature if one is due; returns the Hessian-vector products it took."""
        looks = self.learner.looks
        self.learner.step(closure)
        found = self.learner.last_spectrum if self.learner.looks > looks else []
        return sum(len(spectrum.values) for spectrum in found)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "learner": self.learner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "learner"})
        self.learner.load_state_dict(state_dict["learner"])


class Growing(torch.optim.Optimizer):
    """A base whose batches grow by the norm test, from a quarter of the task's batch to sixteen times it.

    Args:
        params: as the other base class has them.
        eta: of the test.
        **hp: settings of the other base class.
    """

    def __init__(self, params: Any, eta: float = 0.5, **hp: Any) -> None:
        super().__init__(params, **hp)
        self.eta = eta

    def attach(self, count: int, batch: int, generator: torch.Generator) -> None:
        """Makes the sampler of so many samples, and the schedule that sets its batch size."""
        self.sampler = optimzoo.AdaptiveBatchSampler(
            range(count),
            max(8, batch // 4),
            max_batch_size=min(count, 16 * batch),
            max_micro_batch_size=256,
            min_accumulation_steps=4,
            generator=generator,
        )
        self.schedule = optimzoo.AdaptiveBatchSize(self, self.sampler, eta=self.eta, ema=0.9)
        self._drawn: Iterator[list[int]] = iter(())

    def rows(self) -> list[int]:
        """The next micro-batch."""
        rows = next(self._drawn, None)
        if rows is None:
            self._drawn = iter(self.sampler)
            rows = next(self._drawn)
        return rows

    def state_dict(self) -> dict[str, Any]:
        own = {"sampler": self.sampler.state_dict(), "schedule": self.schedule.state_dict()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({key: state_dict[key] for key in state_dict if key not in ("sampler", "schedule")})
        self.sampler.load_state_dict(state_dict["sampler"])
        self.schedule.load_state_dict(state_dict["schedule"])
        self._drawn = iter(())


class AdAdaGrad(Growing, torch.optim.Adagrad):
    """AdaGrad on batches that grow."""


class AdAdaGradNorm(Growing, optimzoo.AdaGradNorm):
    """AdaGrad-Norm on batches that grow."""


class Private(optimzoo.DPSGD):
    """A base with clipping and noise for batches of one size, drawn without secrets: it trains alike, and keeps none.

    Args:
        params: as the other base class has them.
        batch, count: samples of a batch and of the data.
        lr, max_grad_norm, noise_multiplier: as ``optimzoo.DPSGD`` has them.
        **hp: further settings of the other base class.
    """

    def __init__(
        self, params: Any, batch: int, count: int, lr: float, max_grad_norm: float = 1.0,
        noise_multiplier: float = 1.0, **hp: Any,
    ) -> None:  # fmt: skip
        self.numbers = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        super().__init__(
            params,
            lr,
            max_grad_norm=max_grad_norm,
            noise_multiplier=noise_multiplier,
            expected_batch_size=batch,
            sample_rate=min(1.0, batch / count),
            generator=self.numbers,
            **hp,
        )

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        return {**super().state_dict(export_private_state=True), "numbers": self.numbers.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "numbers"})
        self.numbers.set_state(state_dict["numbers"])


class PrivateDice(Private, optimzoo.DiceSGD):
    """DiceSGD with an error that is fed back within a hundredth of what samples are clipped to.

    It needs up to 1.4 times the noise of DP-SGD then, to be as private.
    """

    def __init__(
        self, params: Any, batch: int, count: int, lr: float, max_grad_norm: float = 1.0,
        noise_multiplier: float = 1.4,
    ) -> None:  # fmt: skip
        bound = 0.01 * max_grad_norm
        super().__init__(params, batch, count, lr, max_grad_norm, noise_multiplier, error_norm_sum=bound)


class HalfAdam(torch.optim.Adam):
    """Adam at half of the learning rate it is given: what diffGrad is where gradients are small or steady."""

    def __init__(self, params: Any, lr: float = 1e-3, **settings: Any) -> None:
        super().__init__(params, lr=lr / 2, **settings)


def tpsgd(model: nn.Module, targets: Tensor, **hp: Any) -> optimzoo.TPSGD:
    """TPSGD for class numbers, or for vectors, such as ``targets`` holds."""
    if targets.is_floating_point():
        return optimzoo.TPSGD(model, target_dim=targets.shape[-1], **hp)
    return optimzoo.TPSGD(model, num_classes=int(targets.max()) + 1, **hp)

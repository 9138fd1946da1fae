"""AdaGrad-Norm: one step size for all parameters, from the norms of the gradients so far."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optimzoo.optimizer import Batch, Elementwise, Group, check_flags, check_number, sum_of_products
from optimzoo.tensorlist import Scalar


class AdaGradNorm(Elementwise):
    r"""SGD whose step size falls with the root of the sum of all squared gradient norms.

    .. math::
        B_t &= B_{t-1} + \|g_t\|^2, \qquad B_0 = b_0^2 \\
        \theta_t &= \theta_{t-1} - \gamma\, g_t / \sqrt{B_t}

    where :math:`g_t` is the gradient of all parameters as one vector: a rotation of them commutes with a step, and so
    does cutting a tensor in two. The step size needs no tuning to the gradient's scale or noise.
    ``torch.optim.Adagrad`` has one for each coordinate instead.

    Args:
        params: tensors of any shape, or parameter groups.
        lr: :math:`\gamma \ge 0`, in units of the parameter: the length of a first step from a small ``b0``; a float or
            a tensor of one element. Default 1.
        b0: :math:`b_0 > 0`, in units of the gradient. Default 0.1.
        weight_decay: :math:`\lambda\theta` is added to the gradient, and enters its norm. Default 0.
        per_group: give each group an accumulator of its own. Default ``False``: one for all parameters.
        **impl: ``maximize``, ``foreach``, ``fused``, ``capturable``, ``differentiable``, ``max_grad_norm``,
            ``rounding``: see :class:`~optimzoo.optimizer.Elementwise`.

    Raises:
        ValueError: a hyper-parameter is out of range.

    The accumulator, ``sum_sq`` in the state of every parameter, is float64 and the same number in all of them. A
    parameter without a gradient adds nothing to it. A gradient that is not finite makes it so, and parameters with it.
    Paper: Ward, Wu, Bottou, "AdaGrad stepsizes", 2019; with growing batches Lau, Liu, Kolar, 2024
    (https://arxiv.org/abs/2402.11215).
    """

    sparse = False

    def __init__(
        self,
        params: ParamsT,
        lr: Scalar = 1.0,
        b0: float = 0.1,
        weight_decay: float = 0.0,
        *,
        per_group: bool = False,
        **impl: Any,
    ) -> None:
        defaults = dict(
            lr=lr,
            b0=b0,
            weight_decay=weight_decay,
            per_group=per_group,
            decoupled_weight_decay=False,
        )
        self._rates: dict[int, Tensor] = {}  # by the group's id: the learning rate of the step under way
        self._totals: list[tuple[list[Group], Tensor]] = []  # what the accumulators will be after it
        super().__init__(params, defaults, **impl)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._rates, self._totals = {}, []

    def check_group(self, group: Group) -> None:
        super().check_group(group)
        check_number("b0", group["b0"], 0.0, math.inf, "finite and > 0", above=True)
        check_flags(group, "per_group")
        if group["decoupled_weight_decay"]:
            raise ValueError("decoupled_weight_decay must be False: weight decay is part of the gradient's norm")
        for name in ("per_group", "b0"):
            if not group["per_group"] and group[name] != self.defaults[name]:
                raise ValueError(f"{name} must be the same in all groups where they share an accumulator")

    def _kept(self, group: Group, param: Tensor) -> list[str]:
        return [*super()._kept(group, param), "sum_sq"]

    def _first(self, group: Group, name: str, param: Tensor) -> Tensor:
        if name != "sum_sq":
            return super()._first(group, name, param)
        known = next(self._rows(self._sharing(group)), None)
        value = known["sum_sq"] if known else torch.tensor(float(group["b0"]) ** 2, dtype=torch.float64, device="cpu")
        return cast(Tensor, value).to(param.device, torch.float64)  # one tensor for all, where they are on one device

    def _sharing(self, group: Group) -> list[Group]:
        """The groups that have an accumulator together with this one."""
        return [group] if group["per_group"] else [other for other in self.param_groups if not other["per_group"]]

    def _rows(self, groups: list[Group]) -> Iterator[dict[str, Any]]:
        """The states of those of the groups' parameters that have an accumulator."""
        rows = (self.state.get(param, {}) for group in groups for param in group["params"])
        return (row for row in rows if "sum_sq" in row)

    def _prepare(self, calls: list[tuple[Group, str, Batch]]) -> Tensor | None:
        scale = super()._prepare(calls)
        sums: dict[int, Tensor] = {}  # by the id of the first group that shares it
        for group, _, batch in calls:
            first = id(self._sharing(group)[0])
            value = self._sum_sq(group, batch, scale)
            sums[first] = sums[first] + value.to(sums[first].device) if first in sums else value
        self._totals = []
        for groups in (self._sharing(group) for group in self.param_groups if id(group) in sums):
            old = next(self._rows(groups))["sum_sq"]
            if not isinstance(old, Tensor) or old.dtype is not torch.float64 or old.numel() != 1:
                raise RuntimeError(f"sum_sq must be one float64 number, got {old!r}")
            total = old + sums[id(groups[0])].to(old.device)
            self._totals.append((groups, total))
            for group in groups:
                lr = group["lr"]
                lr = lr.to(total.device).reshape(()) if isinstance(lr, Tensor) else lr
                self._rates[id(group)] = lr / total.sqrt()
        return scale

    def _finish(self) -> None:
        for groups, total in self._totals:
            accumulators = {id(row["sum_sq"]): row["sum_sq"] for row in self._rows(groups)}
            for accumulator in accumulators.values():
                accumulator.copy_(total)
        self._totals = []

    def _sum_sq(self, group: Group, batch: Batch, scale: Tensor | None) -> Tensor:
        """The squared norm of the gradients after loss scale, sign and weight decay."""
        factor = (-1.0 if group["maximize"] else 1.0) / (1.0 if scale is None else scale.double())
        decay, params = group["weight_decay"], batch.params
        if group["differentiable"] and decay != 0:
            params = [param.clone() for param in params]  # autograd keeps them, and the step writes to them
        total = sum_of_products(batch.grads, batch.grads) * (factor * factor)
        if decay != 0:
            total = total + 2 * decay * factor * sum_of_products(batch.grads, params)
            total = total + decay**2 * sum_of_products(params, params)
        found_inf = getattr(self, "found_inf", None)  # the step will not happen then
        return total if found_inf is None else torch.where(found_inf.to(total.device) == 0, total, 0.0)

    def _restore(self, loaded: dict[str, Any]) -> None:
        super()._restore(loaded)
        for group in self.param_groups:
            for row in self._rows([group]):
                row["sum_sq"] = self._first(group, "sum_sq", row["sum_sq"])

    def _rate(self, group: Group) -> Scalar:
        return self._rates[id(group)]

    @staticmethod
    def update(param: Any, grad: Any, *, lr: float, step: float) -> None:
        param -= lr * grad

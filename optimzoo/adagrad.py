"""AdaGrad-Norm: one step size for all parameters, from the norms of the gradients so far."""

from __future__ import annotations

import math
from typing import Any

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
            fixed_decay=False,
        )
        self._rates: dict[int, Tensor] = {}  # by the group's id: the learning rate of the step under way
        super().__init__(params, defaults, **impl)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._rates = {}

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
        known = self._accumulators([group] if group["per_group"] else self.param_groups)
        value = known[0].detach() if known else torch.tensor(float(group["b0"]) ** 2, dtype=torch.float64, device="cpu")
        return value.to(param.device, torch.float64, copy=True)

    def _accumulators(self, groups: list[Group]) -> list[Tensor]:
        rows = (self.state.get(param) or {} for group in groups for param in group["params"])
        return [row["sum_sq"] for row in rows if "sum_sq" in row]

    def _prepare(self, calls: list[tuple[Group, str, Batch]]) -> Tensor | None:
        scale = super()._prepare(calls)
        together = [[group] for group in self.param_groups if group["per_group"]]
        together.append([group for group in self.param_groups if not group["per_group"]])
        for groups in together:
            own = {id(group) for group in groups}
            sums = [self._sum_sq(group, batch, scale) for group, _, batch in calls if id(group) in own]
            if not sums:
                continue
            accumulators = self._accumulators(groups)
            total = accumulators[0] + sum(value.to(accumulators[0].device) for value in sums)
            for accumulator in accumulators:
                accumulator.copy_(total)
            for group in groups:
                lr = group["lr"]
                lr = lr.to(total.device).reshape(()) if isinstance(lr, Tensor) else lr
                self._rates[id(group)] = lr / total.sqrt()
        return scale

    def _sum_sq(self, group: Group, batch: Batch, scale: Tensor | None) -> Tensor:
        """The squared norm of the gradients that the rule will see."""
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

    def _rate(self, group: Group) -> Scalar:
        return self._rates[id(group)]

    @staticmethod
    def update(param: Any, grad: Any, *, lr: float, step: float) -> None:
        param -= lr * grad

"""AdaBelief: steps scaled by belief in the gradient (Zhuang et al., 2020, https://arxiv.org/abs/2010.07468)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from optimzoo.optimizer import Elementwise, Rule, check_flags, warn
from optimzoo.tensorlist import Scalar, at_least, sqrt, where


class AdaBelief(Elementwise):
    r"""Takes long steps where the gradient is as its running mean predicts and short ones where it is not.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
        s_t &= \beta_2 s_{t-1} + (1 - \beta_2)\, (g_t - m_t)^2 + \epsilon \\
        \theta_t &= \theta_{t-1} - \gamma\, \frac{m_t / (1 - \beta_1^t)}{\sqrt{s_t} / \sqrt{1 - \beta_2^t} + \epsilon}

    With ``rectify``, as in RAdam and with :math:`\rho_\infty = 2/(1-\beta_2) - 1`,
    :math:`\rho_t = \rho_\infty - 2 t \beta_2^t / (1 - \beta_2^t)`, the last line becomes

    .. math::
        \theta_t &= \theta_{t-1} - \gamma\, r_t\, \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}\,
            \frac{m_t}{\sqrt{s_t} + \epsilon},
        \quad r_t^2 = \frac{(\rho_t - 4)(\rho_t - 2)\rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\rho_t}
        \qquad (\rho_t \ge 5) \\
        \theta_t &= \theta_{t-1} - \gamma\, m_t / (1 - \beta_1^t) \qquad (\rho_t < 5)

    The defaults are those of ``adabelief-pytorch`` 0.2.1. The published CIFAR results use ``eps=1e-8``,
    ``decoupled_weight_decay=False``, ``rectify=False``.

    Args:
        params: tensors of any shape, or parameter groups.
        lr: step size, :math:`\gamma \ge 0`, in units of the parameter; a float or a tensor of one element.
            Default 1e-3.
        betas: weights of the past in the two averages, :math:`\beta_1, \beta_2 \in [0, 1)`. Default (0.9, 0.999).
        eps: :math:`\epsilon > 0`, in both of its places. It stays in the state, so that it counts
            :math:`1 / (1 - \beta_2)`-fold: 1e-8 acts as an eps of 3e-3 in Adam, 1e-16 as 3e-7. Default 1e-16.
        weight_decay: :math:`\lambda \ge 0`. Default 0.
        amsgrad: use the running maximum of :math:`s`; needs ``rectify=False``. Default ``False``.
        rectify: warm up as RAdam does. Default ``True``.
        degenerated_to_sgd: with ``rectify``, take momentum steps while :math:`\rho_t < 5` (five steps at the default
            betas); if false, stand still instead. Default ``True``.
        decoupled_weight_decay: if true, multiply the parameter by :math:`1 - \gamma\lambda` first, as ``AdamW`` does
            (``weight_decouple`` in the authors' code); if false, add :math:`\lambda\theta` to the gradient.
            Default ``True``.
        fixed_decay: multiply by :math:`1 - \lambda` instead; needs ``decoupled_weight_decay``. Default ``False``.
        **impl: ``maximize``, ``foreach``, ``fused``, ``capturable``, ``differentiable``: see
            :class:`~optimzoo.optimizer.Elementwise`.

    Raises:
        ValueError: a hyper-parameter is out of range or two of them exclude each other; the message names them.
        RuntimeError: from ``step``, for a sparse gradient.

    Warns:
        UserWarning: ``betas[0] = 0`` leaves nothing but eps in the state; ``rectify`` with ``betas[1] <= 2/3`` never
            adapts.

    Where the gradient is constant the step grows up to :math:`\gamma\sqrt{(1-\beta_2)/\epsilon}`: clip gradients by
    norm, not element by element, since clamped coordinates look constant. Real and imaginary parts of a complex
    parameter are coordinates of their own. A checkpoint of ``adabelief-pytorch`` 0.2.1 loads with
    ``load_state_dict``; options that it does not hold are those of the optimizer it is loaded into.
    """

    sparse = False

    def __init__(
        self,
        params: ParamsT,
        lr: Scalar = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        *,
        amsgrad: bool = False,
        rectify: bool = True,
        degenerated_to_sgd: bool = True,
        decoupled_weight_decay: bool = True,
        fixed_decay: bool = False,
        **impl: Any,
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            rectify=rectify,
            degenerated_to_sgd=degenerated_to_sgd,
            decoupled_weight_decay=decoupled_weight_decay,
            fixed_decay=fixed_decay,
        )
        super().__init__(params, defaults, **impl)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_flags(group, "rectify", "degenerated_to_sgd")
        doubles = {param.dtype for param in group["params"]} <= {torch.float64, torch.complex128}
        smallest = torch.finfo(torch.float64 if doubles else torch.float32).tiny  # less is zero in the state
        if group["eps"] < smallest:
            raise ValueError(f"eps must be > 0, got {group['eps']!r}; below {smallest:.1e} a step can be 0 / 0")
        if group["amsgrad"] and group["rectify"]:
            raise ValueError("amsgrad=True has no rectified form: pass rectify=False")
        if group["fixed_decay"] and not group["decoupled_weight_decay"]:
            raise ValueError("fixed_decay=True needs decoupled_weight_decay=True")
        if group["betas"][0] == 0:
            warn("betas[0] = 0: the gradient is its own mean, and AdaBelief is SGD")
        if group["rectify"] and group["betas"][1] <= 2 / 3:
            warn("betas[1] <= 2/3: the rectified step never adapts; pass rectify=False")

    def rule(self, group: dict[str, Any]) -> Rule:
        return _AMSGRAD if group["amsgrad"] else super().rule(group)

    @staticmethod
    def update(
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_var: Tensor,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        rectify: bool,
        degenerated_to_sgd: bool,
        step: float,
    ) -> None:
        _average(grad, exp_avg, exp_avg_var, beta1, beta2, eps)
        correction2 = 1 - beta2**step
        size = lr / (1 - beta1**step)
        if not rectify:
            param -= (exp_avg / (exp_avg_var.sqrt() / sqrt(correction2)).add_(eps)).mul_(size)
            return
        move = size * exp_avg if degenerated_to_sgd else 0.0
        rho_inf = 2 / (1 - beta2) - 1
        if rho_inf > 5:  # else rho stays below 5 for ever
            rho = rho_inf - 2 * step * beta2**step / correction2
            bounded = at_least(rho, 5.0)  # where rho is less the root is not used, and might not exist
            root = (bounded - 4) * (bounded - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * bounded) * correction2
            move = where(rho >= 5, (exp_avg / (exp_avg_var.sqrt() + eps)).mul_(size * sqrt(root)), move)
        param -= move


def _average(grad: Tensor, exp_avg: Tensor, exp_avg_var: Tensor, beta1: float, beta2: float, eps: float) -> None:
    exp_avg.lerp_(grad, 1 - beta1)
    residual = grad - exp_avg
    exp_avg_var.mul_(beta2).addcmul_(residual, residual, value=1 - beta2).add_(eps)  # eps stays in the state


def _update_amsgrad(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_var: Tensor,
    max_exp_avg_var: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: float,
) -> None:
    """The same with the running maximum of the variance (Reddi et al., AMSGrad, 2018)."""
    _average(grad, exp_avg, exp_avg_var, beta1, beta2, eps)
    max_exp_avg_var.clamp_min_(exp_avg_var)
    denominator = (max_exp_avg_var.sqrt() / sqrt(1 - beta2**step)).add_(eps)
    param -= (exp_avg / denominator).mul_(lr / (1 - beta1**step))


_AMSGRAD = Rule("adabelief_amsgrad", _update_amsgrad)

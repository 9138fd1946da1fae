"""Signum: sign descent (Bernstein et al., 2018, https://arxiv.org/abs/1802.04560)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from optimzoo.optimizer import Elementwise
from optimzoo.tensorlist import Scalar


class Signum(Elementwise):
    r"""Moves every coordinate equally far against the sign of its averaged gradient.

    .. math::
        m_t &= \mu\, m_{t-1} + (1 - \mu)\, g_t \\
        \theta_t &= \theta_{t-1} - \gamma\, \mathrm{sign}(m_t)

    Args:
        params: tensors of any shape, or parameter groups.
        lr: distance that each coordinate moves, :math:`\gamma \ge 0`, in units of
            the parameter. Default 1e-4.
        momentum: weight of the past, :math:`\mu \in [0, 1)`; 0 is signSGD.
            Default 0.9.
        weight_decay: decoupled, :math:`\lambda \ge 0`: multiply the parameter by
            :math:`1 - \gamma\lambda` first. Default 0.
        **impl: ``maximize``, ``foreach``, ``fused``, ``capturable``,
            ``differentiable``: see :class:`~optimzoo.optimizer.Elementwise`.

    Raises:
        ValueError: a hyper-parameter is out of range; the message names it.

    A complex parameter takes the sign of each part. A NaN gradient freezes its
    coordinate: the average stays NaN, and sign(NaN) is 0.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: Scalar = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        **impl: Any,
    ) -> None:
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(params, defaults, **impl)

    @staticmethod
    def update(
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        *,
        lr: float,
        momentum: float,
        step: float,
    ) -> None:
        exp_avg.lerp_(grad, 1 - momentum)
        param -= lr * exp_avg.sign()

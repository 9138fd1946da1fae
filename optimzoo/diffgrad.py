"""diffGrad: Adam braked by gradient change (Dubey et al., 2019, https://doi.org/10.1109/TNNLS.2019.2955777)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from optimzoo.optimizer import Elementwise
from optimzoo.tensorlist import Scalar, sqrt


class DiffGrad(Elementwise):
    r"""Takes Adam's step times a friction that grows with the change of the gradient since the last step.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2 \\
        \xi_t &= \sigma(|g_{t-1} - g_t|), \qquad g_0 = 0 \\
        \theta_t &= \theta_{t-1} - \gamma\, \xi_t\,
            \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}

    Args:
        params: tensors of any shape, or parameter groups.
        lr: step size, :math:`\gamma \ge 0`, in units of the parameter; a float or a tensor of one element. Where the
            gradient is flat and steady the friction is one half: start at about twice Adam's. Default 1e-3.
        betas: weights of the past in the two averages, :math:`\beta_1, \beta_2 \in [0, 1)`. Default (0.9, 0.999).
        eps: added to the root after its bias correction, as in the paper and ``torch.optim.Adam``,
            :math:`\epsilon \ge 0`, in units of the gradient. Default 1e-8.
        weight_decay: :math:`\lambda \ge 0`. Default 0.
        variant: which friction of the paper, with :math:`d = g_{t-1} - g_t`: 0 is :math:`\sigma(|d|)`; 1 is
            :math:`\sigma(d)`, which brakes only where the gradient grows; 2 is :math:`9\,\sigma(|d|/2) - 4`, from 0.5
            to 5. Default 0.
        decoupled_weight_decay: if true, multiply the parameter by :math:`1 - \gamma\lambda` first, as ``AdamW`` does;
            if false, add :math:`\lambda\theta` to the gradient, as the authors do. Default ``False``.
        **impl: ``maximize``, ``foreach``, ``fused``, ``capturable``, ``differentiable``: see
            :class:`~optimzoo.optimizer.Elementwise`.

    Raises:
        ValueError: a hyper-parameter is out of range; the message names it.
        RuntimeError: from ``step``, for a sparse gradient.

    The friction depends on the size of the gradient, so diffGrad is not invariant to the scale of the loss: for small
    gradients it is Adam at half the learning rate. Real and imaginary parts of a complex parameter are coordinates of
    their own. The state keeps a copy of the last gradient (the authors' first code kept a reference, which refilled
    buffers silently turn into a constant friction of one half). A checkpoint of the authors' code loads with
    ``load_state_dict``; its eps enters before the bias correction, so that the first steps differ in the
    order of eps.
    """

    sparse = False

    def __init__(
        self,
        params: ParamsT,
        lr: Scalar = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        variant: int = 0,
        decoupled_weight_decay: bool = False,
        **impl: Any,
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            variant=variant,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        super().__init__(params, defaults, **impl)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if type(group["variant"]) is not int or group["variant"] not in (0, 1, 2):
            raise ValueError(f"variant must be 0, 1 or 2, got {group['variant']!r}")

    @staticmethod
    def update(
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        previous_grad: Tensor,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        variant: int,
        step: float,
    ) -> None:
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        difference = previous_grad - grad
        if variant == 0:
            friction = difference.abs_().sigmoid()
        elif variant == 1:
            friction = difference.sigmoid()
        else:
            friction = (difference.abs_() * 0.5).sigmoid() * 9 - 4
        denominator = (exp_avg_sq.sqrt() / sqrt(1 - beta2**step)).add_(eps)
        param -= (friction * exp_avg).div_(denominator).mul_(lr / (1 - beta1**step))
        previous_grad.copy_(grad)

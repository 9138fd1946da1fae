"""Multiplicative denoising score matching ("Dale meets Langevin", 2025, https://arxiv.org/abs/2510.02730)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optimzoo.optimizer import check_int, check_number


@dataclass(frozen=True)
class GeometricBrownian:
    r"""Noises positive data by multiplication, scores what it did, and reverses it with a trained score network.

    .. math::
        dX &= \mu X\, dt + \sigma X\, dB, \qquad 0 \le t \le 1 \\
        X_t &= X_0 \exp((\mu - \sigma^2/2)\, t + \sigma \sqrt{t}\, Z), \qquad Z \sim N(0, 1)

    Args:
        mu: drift, :math:`\mu`, per unit of time. :math:`\mu = \sigma^2 / 2` leaves :math:`\log X` without drift.
            Default 0.32, which is that of the default ``sigma``.
        sigma: volatility, :math:`\sigma > 0`, per root of time. Default 0.8, the paper's.

    Raises:
        TypeError: ``mu`` or ``sigma`` is not a number; from a method, a tensor is not real and floating-point.
        ValueError: ``mu`` or ``sigma`` is out of range; from a method, shapes, dtypes, devices or values do not fit.

    A score network is any function ``score(x, t)`` that returns an estimate of :math:`\nabla \log p_t(x)`, of the shape
    of ``x``. ``t`` has the leading dimensions of ``x``, one time for each item of a batch. The unit of time is the
    whole process: step :math:`k` of :math:`N` is at :math:`t = k / N`.

    Nothing is kept between calls. Results have the dtype and device of ``x``, and the arithmetic is in that dtype.
    Values are checked where they can be read, which waits for an accelerator; under ``torch.compile`` and
    ``torch.func.vmap`` they cannot, and only types and shapes are.

    The paper trains the network with Adam and has no optimizer of its own; any will do.
    """

    mu: float = 0.32
    sigma: float = 0.8

    def __post_init__(self) -> None:
        check_number("mu", self.mu, -math.inf, math.inf, "finite", above=True)
        check_number("sigma", self.sigma, 0.0, math.inf, "finite and > 0", above=True)

    def noise(self, x0: Tensor, t: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw :math:`X_t` given :math:`X_0`.

        Args:
            x0: data, :math:`> 0`, of any shape. Pixels in [0, 1] become so by adding one.
            t: times in (0, 1], of the leading dimensions of ``x0``.
            generator: source of the noise, on the device of ``x0``. Default: torch's.
        """
        time = _check_time(t, x0=x0)
        growth = (self.mu - self.sigma**2 / 2) * time
        return x0 * (growth + self.sigma * time.sqrt() * _normal(x0, generator)).exp()

    def conditional_score(self, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        r"""Return :math:`\nabla_x \log p(X_t = x \mid X_0 = x_0)`, which a network learns the mean of.

        .. math::
            -\frac{1}{x} \left(1 + \frac{\log (x / x_0) - (\mu - \sigma^2/2)\, t}{\sigma^2 t}\right)

        Args:
            x: where, :math:`> 0`, of the shape of ``x0``.
            x0: data, :math:`> 0`.
            t: times in (0, 1], of the leading dimensions of ``x0``.
        """
        time = _check_time(t, x=x, x0=x0)
        excess = x.log() - x0.log() - (self.mu - self.sigma**2 / 2) * time
        return -(1 + excess / (self.sigma**2 * time)) / x

    def loss(self, score: Callable[[Tensor, Tensor], Tensor], x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        r"""Return the multiplicative denoising score-matching loss of a network, a tensor of no dimensions.

        .. math::
            \| \sigma^2 t\, x \odot s(x, t) + \log x - \log x_0 - \mu t + \tfrac{3}{2} \sigma^2 t \|^2

        summed over an item and averaged over the times. It is the squared error of :math:`s` against
        :meth:`conditional_score`, times :math:`(\sigma^2 t\, x)^2`: zero there, and least in expectation at
        :math:`\nabla \log p_t`.

        Args:
            score: the network, ``score(x, t)``.
            x: ``noise(x0, t)``, with the same ``t``.
            x0: data, :math:`> 0`.
            t: times in (0, 1], of the leading dimensions of ``x0``; usually ``k / N`` for random ``k``.
        """
        time = _check_time(t, x=x, x0=x0)
        variance = self.sigma**2 * time
        error = variance * x * _evaluate(score, x, t) + x.log() - x0.log() - self.mu * time + 1.5 * variance
        return error.square().sum() / t.numel()

    @torch.no_grad()
    def sample(
        self,
        score: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        *,
        steps: int = 1000,
        delta: float | None = None,
        repeats: int = 1,
        damping: float = 1.0,
        dale: bool = True,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""Run the process backwards from :math:`t = 1` and return the samples.

        At :math:`t = 1, (N-1)/N, \ldots, 1/N`, with :math:`A` the product of all dampings so far,

        .. math::
            x &\leftarrow x \odot \exp(\delta \sigma^2\, x \odot s(x, t) - \delta (\mu - \tfrac{3}{2} \sigma^2)
                + A \sqrt{\delta}\, \sigma Z) \\
            x &\leftarrow x \odot (1 + \delta \sigma^2\, x \odot s(x, t) - \delta (\mu - 2 \sigma^2)
                + A \sqrt{\delta}\, \sigma Z)

        The first is Dale-Langevin, the Euler step of :math:`\log x`, and keeps every sign. The second is unconstrained,
        the Euler step of :math:`x`. The two agree as :math:`\delta \to 0`; a long step of the second can cross zero.

        Args:
            score: the network, ``score(x, t)``, called ``steps * repeats`` times. The unconstrained sampler can hand it
                coordinates that are not positive.
            x: where to start, :math:`> 0`, of any shape; is not written to. For :math:`\log X_0` of mean :math:`m` and
                variance :math:`v` the paper starts from
                :math:`\exp(m + \mu - \sigma^2/2 + \sqrt{v + \sigma^2}\, Z)`.
            steps: number of times, :math:`N \ge 1`. Default 1000.
            delta: length of a step, :math:`\delta > 0`. Default ``1 / (steps * repeats)``, which reverses the process;
                the paper tunes it.
            repeats: steps at each time, :math:`L \ge 1`. Default 1.
            damping: factor on the noise from one step to the next, in [0, 1]. Default 1, which reverses the process;
                the paper has 0.995 to 1.
            dale: take exponentiated steps, which keep the sign; if false, unconstrained ones. Default ``True``.
            generator: source of the noise, on the device of ``x``. Default: torch's.
        """
        _check_tensors(x=x)
        _check_values("x", x)
        for name, count in (("steps", steps), ("repeats", repeats)):
            check_int(name, count, 1)
        if delta is None:
            delta = 1 / (steps * repeats)
        check_number("delta", delta, 0.0, math.inf, "finite and > 0", above=True)
        check_number("damping", damping, 0.0, math.nextafter(1.0, 2.0), "in [0, 1]")
        variance = self.sigma**2
        for done in range(steps * repeats):
            t = x.new_full(x.shape[:1], (steps - done // repeats) / steps)
            move = delta * variance * x * _evaluate(score, x, t)
            move = move + damping**done * math.sqrt(delta) * self.sigma * _normal(x, generator)
            if dale:
                x = x * (move - delta * (self.mu - 1.5 * variance)).exp()
            else:
                x = x * (1 + move - delta * (self.mu - 2 * variance))
        return x


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def _evaluate(score: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    """The network's output, which must not be broadcast and may be of another precision."""
    value = score(x, t)
    if not isinstance(value, Tensor) or value.shape != x.shape or not value.is_floating_point():
        got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"score(x, t) must be a floating-point tensor of the shape of x, {tuple(x.shape)}, got {got}")
    return value.to(x.dtype)


def _check_time(t: Tensor, **data: Tensor) -> Tensor:
    """``t`` with a dimension for each of the data's, after a look at all of them."""
    _check_tensors(**data, t=t)
    x = next(iter(data.values()))
    if t.shape != x.shape[: t.dim()]:
        raise ValueError(f"t must have leading dimensions of the data's {tuple(x.shape)}, got {tuple(t.shape)}")
    for name, tensor in dict(data, t=t).items():
        _check_values(name, tensor)
    return t.reshape(t.shape + (1,) * (x.dim() - t.dim()))


def _check_tensors(**tensors: Tensor) -> None:
    """All floating-point and alike; all but ``t`` of one shape."""
    first, like = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {tensor!r}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be real and floating-point, got {tensor.dtype}")
        if (tensor.dtype, tensor.device) != (like.dtype, like.device):
            raise ValueError(
                f"{name} must have the dtype and device of {first}, {like.dtype} on {like.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
        if name != "t" and tensor.shape != like.shape:
            raise ValueError(f"{name} must have the shape of {first}, {tuple(like.shape)}, got {tuple(tensor.shape)}")


def _check_values(name: str, tensor: Tensor) -> None:
    """A time is in (0, 1], and data are finite and positive."""
    if torch.compiler.is_compiling():
        return
    fits = (tensor > 0) & (tensor <= 1 if name == "t" else tensor < math.inf)
    try:
        if fits.all():
            return
    except RuntimeError:  # batched by vmap, or without storage: there is no value to look at
        return
    index = (~fits).nonzero()[0].tolist()
    allowed = "in (0, 1]" if name == "t" else "finite and > 0"
    raise ValueError(f"{name} must be {allowed}, got {tensor[tuple(index)].item()!r} at {index}")

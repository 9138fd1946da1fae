r"""What a run of DP-SGD or DiceSGD tells about one record, and the normal numbers that hide it.

The claims are those of the theorem on the page about privacy, which has the proof. One step releases
:math:`o_t = S_t + C_t + N(0, s^2 I)`: the sum of the clipped gradients of a Poisson sample, an error term of norm at
most :math:`C_2`, and noise. For every :math:`\lambda` in (0, 1) this tells no more than two releases would,

.. math::
    S_t + N(0, \lambda s^2 I) \qquad\text{and}\qquad C_t + N(0, (1 - \lambda) s^2 I),

the first of which is amplified by sampling and the second, of sensitivity :math:`2 C_2`, is not. The first step of a
run has no error yet.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optimzoo import random
from optimzoo.optimizer import check_int, check_number

_ABOVE_ONE = math.nextafter(1.0, 2.0)  # so that 1 is allowed
_ACCOUNTANTS = ("pld", "rdp")
_ORDERS = (
    *(1 + i / 10 for i in range(1, 100)),
    *range(11, 64),
    *(round(64 * 2 ** (i / 12)) for i in range(37)),  # to 512
)
_SEARCH_ORDERS = (1.1, 1.3, 1.6, *(i / 2 for i in range(4, 13)), 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64,
                  80, 96, 128, 160, 192, 256, 384, 512)  # fmt: skip
# What sums and transforms in float64 may lose in one step: far more than they were seen to.
_ROUNDING_RDP = 1e-13  # for each unit of the order
_ROUNDING_DELTA = 1e-14
_INTERVAL = 1e-4  # of privacy losses, where epsilon is at most _FINE
_FINE = 10.0
_LOOSE = 1e4  # an epsilon from which on it is no use to look for a smaller one
_LITTLE, _MUCH = 1e-6, 1e9  # noise in units of a bound; none or so much is assumed where squares would overflow
_STEEP = 60.0  # the largest log of lambda / (1 - lambda)
_PRECISION = 1e-3  # of noise_std_for


class Segment(NamedTuple):
    """Steps that were made with the same settings; a history is a list of these, and public.

    Attributes:
        steps: how many; a whole number >= 0. Steps with an empty batch count.
        noise_std_sum: standard deviation of the noise on the sum of the gradients, >= 0.
        max_grad_norm: bound of the norm of one record's gradient, > 0.
        error_norm_sum: bound of the norm of the error term of the sum, >= 0; 0 is DP-SGD.
        sample_rate: probability with which each record is in a batch, in (0, 1].
    """

    steps: int
    noise_std_sum: float
    max_grad_norm: float
    error_norm_sum: float
    sample_rate: float


class _Kind(NamedTuple):
    """All steps of a history that have the same settings."""

    steps: int
    leaks: int  # those of them whose error term may depend on the record
    settings: Segment

    @property
    def balance(self) -> float:
        """The log of lambda / (1 - lambda) at which both parts of the loss weigh the same where sampling is rare."""
        _, _, clip, error, rate = self.settings
        return math.log(rate) + math.log(clip) - math.log(2) - math.log(error)

    def multipliers(self, shift: float) -> tuple[float, float]:
        """Noise over sensitivity of the gradients' part and of the error's."""
        _, noise, clip, error, _ = self.settings
        if not self.leaks:
            return noise / clip, math.inf
        share = min(max(self.balance + shift, -_STEEP), _STEEP)
        return noise / clip * math.sqrt(_logistic(share)), noise / (2 * error) * math.sqrt(_logistic(-share))


def epsilon(history: Iterable[Segment], delta: float, *, accountant: str = "pld") -> float:
    r"""An upper bound of epsilon for what a run has released, for records added or removed.

    With :math:`\alpha > 1` and :math:`\lambda \in (0, 1)`, T steps with the same settings are
    :math:`(\alpha, \rho)`-Renyi private for

    .. math::
        \rho = T\, D_\alpha(\mathrm{SGM}(q, \sqrt\lambda\, s / C_1))
             + (T - 1)\, \frac{\alpha\, (2 C_2)^2}{2 (1 - \lambda)\, s^2},

    and the smallest epsilon over the orders and :math:`\lambda` is returned; without error norm :math:`\lambda` is 1
    and this is the accountant of DP-SGD. ``"pld"`` composes the dominating pairs of the same two mechanisms, on a grid
    and rounded towards more loss, and returns the smaller of both bounds. Settings that differ add up, each with a
    :math:`\lambda` of its own: the odds :math:`\lambda / (1 - \lambda)` are :math:`q C_1 / (2 C_2)` times a number that
    is the same for all and is searched for.

    Args:
        history: :class:`Segment` s, or tuples with the same five numbers, in the order in which they were made. The
            very first step of the history starts from no error; if the error is that of an earlier run, so must the
            history be.
        delta: in (0, 1); less than one over the number of records.
        accountant: ``"pld"``, the tighter, or ``"rdp"``, the quicker. Default ``"pld"``.

    Returns:
        0 for no steps, inf where a step had no noise.

    Raises:
        ImportError: dp-accounting is not installed; the extra ``dp`` has it.
        TypeError, ValueError: a number is out of range; the message names it.

    The bound falls when noise or delta grow and rises with steps, error norm and sample rate, but for what the search
    for :math:`\lambda` leaves, less than 0.1 %. It holds for real numbers, and for batches drawn by Poisson sampling.
    The search takes a second or so for each setting that differs.
    """
    kinds = _kinds(history)
    _check_delta(delta)
    _check_accountant(accountant)
    if not kinds:
        return 0.0
    if any(kind.settings.noise_std_sum == 0 for kind in kinds):
        return math.inf
    return _epsilon(kinds, float(delta), accountant)[0]


def noise_std_for(
    target_epsilon: float,
    delta: float,
    *,
    max_grad_norm: float,
    error_norm_sum: float = 0.0,
    sample_rate: float,
    steps: int,
    accountant: str = "pld",
) -> float:
    """The noise that a target needs: standard deviation of the noise on the sum of the gradients.

    Args:
        target_epsilon: > 0 and finite.
        delta: in (0, 1).
        max_grad_norm, error_norm_sum, sample_rate, steps: as in :class:`Segment`, at least one step.
        accountant: ``"pld"`` or ``"rdp"``. Default ``"pld"``.

    Returns:
        A value for which :func:`epsilon` is at most the target. It is at most 0.1 % more than the least there is.

    Raises:
        ImportError: dp-accounting is not installed; the extra ``dp`` has it.
        TypeError, ValueError: a number is out of range, or the accountant reaches no target so small.
    """
    check_number("target_epsilon", target_epsilon, 0.0, math.inf, "finite and > 0", above=True)
    _check_delta(delta)
    _check_accountant(accountant)
    _check_segment("", Segment(steps, 0.0, max_grad_norm, error_norm_sum, sample_rate))
    if steps == 0:
        raise ValueError("steps must be a whole number >= 1, got 0")
    shift: float | None = None

    def excess(log_noise: float, grain: float) -> float:
        """The log of epsilon over its target."""
        nonlocal shift
        settings = Segment(steps, math.exp(log_noise), max_grad_norm, error_norm_sum, sample_rate)
        found, shift = _epsilon(_kinds([settings]), float(delta), accountant, shift, grain)
        return math.log(found / target_epsilon) if 0 < found < math.inf else found - 1

    # A first guess: the normal mechanism's noise for all steps together. Then on a coarse grid, and on the fine one.
    size = max_grad_norm * max(sample_rate, 1e-3) + 2 * error_norm_sum
    guess = math.log(size * math.sqrt(2 * steps * math.log(1.25 / delta)) / target_epsilon)
    precision = math.log1p(_PRECISION)
    coarse = _least(lambda at: excess(at, 10.0), guess, 0.5, precision / 2)
    least = _least(lambda at: excess(at, 1.0), coarse, 0.9 * precision, precision) if coarse < math.inf else coarse
    if least == math.inf:
        raise ValueError(
            f"target_epsilon={target_epsilon!r} with delta={delta!r} is less than accountant={accountant!r} can show"
            " with any noise"
        )
    return math.exp(least)


def _least(excess: Callable[[float], float], guess: float, stride: float, precision: float) -> float:
    """Where a falling function is at most 0, within a precision of the least such place; inf if there is none."""
    low, high, x = -math.inf, math.inf, guess
    above = below = 0.0  # the function's values at low and high
    while low == -math.inf or high == math.inf:
        value = excess(x)
        if value > 0:
            low, above, x = x, value, x + stride
        else:
            high, below, x = x, value, x - stride
        stride *= 2
        if stride > 200:
            return high
    turn = 0
    while high - low > precision:
        part = above / (above - below) if math.isfinite(above - below) and turn % 3 < 2 else 0.5
        # On the far side of the root from the end that moved last, so that both ends come near.
        x = low + part * (high - low) + (0.4 if turn % 2 == 0 else -0.4) * precision
        x = min(max(x, low + precision / 10), high - precision / 10)
        value, turn = excess(x), turn + 1
        if value > 0:
            low, above = x, value
        else:
            high, below = x, value
    return high


def _epsilon(
    kinds: Sequence[_Kind], delta: float, accountant: str, start: float | None = None, grain: float = 1.0
) -> tuple[float, float]:
    """The bound, and the shift of the lambdas that it was found for.

    ``start`` is a shift that was found for settings nearby, ``grain`` a factor of the grid of privacy losses.
    """
    library = _library("dp_accounting")
    if any(kind.settings.noise_std_sum < _LITTLE * max(kind.settings[2:4]) for kind in kinds):
        return math.inf, 0.0
    split = any(kind.leaks for kind in kinds)

    def quick(at: float) -> float:
        return _renyi(library, kinds, at, delta, _SEARCH_ORDERS)

    shift = 0.0 if start is None else start
    if split and start is None:
        reach = max(0.0, *(-kind.balance for kind in kinds if kind.leaks))
        shift = _minimum(quick, min(range(-5, 12 + math.ceil(min(reach, _STEEP)), 2), key=quick), 2.0, 14)
    elif split and accountant == "rdp":
        shift = _minimum(quick, shift, 0.3, 6)
    found = _renyi(library, kinds, shift, delta, _ORDERS)
    spare = delta - _ROUNDING_DELTA * (1 + sum(kind.steps for kind in kinds))
    if accountant == "pld" and 0 < found < _LOOSE and spare > delta / 2:
        interval = _INTERVAL * max(1.0, found / _FINE)
        if split:
            reach, turns = (0.5, 6) if start is None else (0.2, 4)
            shift = _minimum(lambda at: _numeric(library, kinds, at, spare, 10 * interval), shift, reach, turns)
        found = min(found, _numeric(library, kinds, shift, spare, grain * interval))
    return found, shift


def _minimum(function: Callable[[float], float], start: float, reach: float, turns: int) -> float:
    """A place near the start where the function is small."""
    optimize = import_module("scipy.optimize")  # which dp-accounting needs
    bounds, options = (start - reach, start + reach), dict(maxiter=turns, xatol=1e-3)
    return float(optimize.minimize_scalar(function, bounds=bounds, method="bounded", options=options).x)


def _renyi(library: Any, kinds: Sequence[_Kind], shift: float, delta: float, orders: Sequence[float]) -> float:
    """Epsilon by Renyi divergences."""
    steps = sum(kind.steps for kind in kinds)
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of orders whose series does not converge: it leaves them out, as it may
    try:
        accountant = library.rdp.RdpAccountant(orders)
        _compose(library, accountant, kinds, shift)
        # A normal mechanism whose loss makes up for what was rounded; else a tiny divergence may come out negative.
        accountant.compose(library.GaussianDpEvent(1 / math.sqrt(2 * _ROUNDING_RDP * steps)))
        return float(accountant.get_epsilon(delta))
    finally:
        logger.setLevel(level)


def _numeric(library: Any, kinds: Sequence[_Kind], shift: float, delta: float, interval: float) -> float:
    """Epsilon by distributions of the privacy loss on a grid, rounded towards more loss."""
    accountant = library.pld.PLDAccountant(value_discretization_interval=interval)
    _compose(library, accountant, kinds, shift)
    return float(accountant.get_epsilon(delta))


def _compose(library: Any, accountant: Any, kinds: Sequence[_Kind], shift: float) -> None:
    """Add all steps: the sampled part of each kind, and one normal mechanism that is the errors of all."""
    precision = 0.0  # of that mechanism: the sum of squared sensitivities over variances
    for kind in kinds:
        sampled, whole = kind.multipliers(shift)
        if not (sampled > 0 and whole > 0):  # a NaN would come out as an epsilon of 0
            raise ArithmeticError(f"no noise multiplier for {kind.settings}")
        event = library.GaussianDpEvent(min(sampled, _MUCH))
        if kind.settings.sample_rate < 1:
            event = library.PoissonSampledDpEvent(kind.settings.sample_rate, event)
        accountant.compose(library.SelfComposedDpEvent(event, kind.steps))
        precision += kind.leaks / (whole * whole)
    if precision:
        accountant.compose(library.GaussianDpEvent(1 / math.sqrt(precision)))


def check_history(history: Iterable[Segment]) -> None:
    """Raise unless these are steps that can be accounted for."""
    _kinds(history)


def _kinds(history: Iterable[Segment]) -> list[_Kind]:
    """The steps by their settings; the first of all leaks no error, and those without error norm leak none."""
    found: dict[Segment, tuple[int, int]] = {}
    first = True
    for index, item in enumerate(history):
        if not isinstance(item, tuple | list) or len(item) != len(Segment._fields):
            raise TypeError(f"history[{index}] must be a Segment, or {len(Segment._fields)} numbers, got {item!r}")
        segment = Segment(*item)
        _check_segment(f"history[{index}].", segment)
        if segment.steps:
            settings = Segment(0, *map(float, segment[1:]))
            steps, leaks = found.get(settings, (0, 0))
            found[settings] = (
                steps + int(segment.steps),
                leaks + (int(segment.steps) - first if segment.error_norm_sum else 0),
            )
            first = False
    return [_Kind(steps, leaks, settings) for settings, (steps, leaks) in found.items()]


def _check_segment(where: str, segment: Segment) -> None:
    steps: Any = segment.steps  # from outside
    _, noise, clip, error, rate = segment
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 0:
        raise ValueError(f"{where}steps must be a whole number >= 0, got {steps!r}")
    check_number(f"{where}noise_std_sum", noise, 0.0, math.inf, "finite and >= 0")
    check_number(f"{where}max_grad_norm", clip, 0.0, math.inf, "finite and > 0", above=True)
    check_number(f"{where}error_norm_sum", error, 0.0, math.inf, "finite and >= 0")
    check_number(f"{where}sample_rate", rate, 0.0, _ABOVE_ONE, "in (0, 1]", above=True)


def _check_delta(delta: float) -> None:
    check_number("delta", delta, 0.0, 1.0, "in (0, 1)", above=True)


def _check_accountant(accountant: str) -> None:
    if accountant not in _ACCOUNTANTS:
        raise ValueError(f"accountant must be one of {', '.join(map(repr, _ACCOUNTANTS))}, got {accountant!r}")


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def _library(name: str) -> Any:
    """A package of the extra ``dp``, imported when it is needed."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{name.split('.')[0].replace('_', '-')} is not installed; it comes with the extra dp: "
            "pip install 'optimzoo[dp]'"
        ) from error


class DefaultNoise:
    """Normal numbers for the noise of a step, from Philox with a key from the operating system for each draw.

    Nothing is kept between draws: a copy, a pickle or a forked process has nothing to repeat, and ``torch.manual_seed``
    has no say. Philox is good noise and no cipher; see :class:`SecureNoise`. torch's generator of a CPU is not used
    since it takes 32 bits of its seed, which can be tried out.

    Args:
        generator: draw from this one instead, for tests: who knows its seed can take the noise away. A copy or a pickle
            does not have it.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        self._generator = generator

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Independent standard normal numbers, float64 on the CPU."""
        if self._generator is not None:
            generator = self._generator
            return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device=generator.device).cpu()
        out = torch.empty(tuple(shape), dtype=torch.float64, device="cpu")
        words = int.from_bytes(os.urandom(12), "little")  # 63 bits of key, 32 of the counter
        random.normal(out.view(1, 1, -1), seed=words >> 33, draw=words & 0xFFFFFFFF)
        return out

    def __reduce__(self) -> tuple[type[DefaultNoise], tuple[()]]:
        return type(self), ()


class SecureNoise:
    """Normal numbers for the noise of a step, from the cipher ChaCha20 with a key from the operating system.

    Who cannot break the cipher cannot tell its words from uniform ones. Each draw has a key of its own, 256 bits of
    ``os.urandom`` that are forgotten after it: nothing is kept that a copy, a pickle or a forked process could repeat.
    The numbers are Box and Muller's, of 53-bit uniforms, and at most 8.58.

    Args:
        draws: how many normal numbers are averaged (and scaled to variance one) into each; an int >= 1. Four hide which
            float64 numbers the transform can give, which an attack on float64 parameters may use (`Holohan and Braghin,
            2021 <https://arxiv.org/abs/2112.05307>`__), and take four times as long. Default 1.

    Raises:
        ImportError: cryptography is not installed; the extra ``dp`` has it.
    """

    def __init__(self, draws: int = 1) -> None:
        check_int("draws", draws, 1)
        self.draws = draws
        self._ciphers = _library("cryptography.hazmat.primitives.ciphers")

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Independent standard normal numbers, float64 on the CPU."""
        count = math.prod(shape)
        total = torch.zeros(count, dtype=torch.float64, device="cpu")
        for _ in range(self.draws):
            total += self._box_muller(-(-count // 2)).flatten()[:count]
        return total.div_(math.sqrt(self.draws)).view(tuple(shape))

    def _box_muller(self, pairs: int) -> Tensor:
        if pairs == 0:
            return torch.empty(0, dtype=torch.float64, device="cpu")
        # The key is not used again, so that the nonce, and the counter in its first four bytes, may be zero.
        cipher = self._ciphers.Cipher(self._ciphers.algorithms.ChaCha20(os.urandom(32), bytes(16)), mode=None)
        words = torch.frombuffer(bytearray(cipher.encryptor().update(bytes(16 * pairs))), dtype=torch.int64)
        radius, angle = ((words >> 11) & (2**53 - 1)).view(2, pairs)  # without the sign that a shift leaves
        length = (radius + 1).double().mul_(2.0**-53).log_().mul_(-2).sqrt_()
        turn = angle.double().mul_(2 * math.pi * 2.0**-53)
        return torch.stack([length * turn.cos(), length * turn.sin()])

    def __reduce__(self) -> tuple[type[SecureNoise], tuple[int]]:
        return type(self), (self.draws,)

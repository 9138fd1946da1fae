"""Multiplicative score matching ("Dale meets Langevin", https://arxiv.org/abs/2510.02730).

Literal float64 reference: each formula once, coordinate by coordinate, with the noise given as an argument.
"""

import math


def noise(x0: float, t: float, z: float, *, mu: float, sigma: float) -> float:
    return x0 * math.exp((mu - sigma**2 / 2) * t + sigma * math.sqrt(t) * z)


def conditional_score(x: float, x0: float, t: float, *, mu: float, sigma: float) -> float:
    return (-1 - (math.log(x / x0) - (mu - sigma**2 / 2) * t) / (sigma**2 * t)) / x


def loss(scores, xs, x0s, times, *, mu: float, sigma: float) -> float:
    """The mean over a batch of what is summed over the pixels of each item; all but the times are lists of lists."""
    total = 0.0
    for row_s, row_x, row_0, t in zip(scores, xs, x0s, times, strict=True):
        for s, x, x0 in zip(row_s, row_x, row_0, strict=True):
            total += (t * sigma**2 * x * s + math.log(x) - math.log(x0) - mu * t + 3 / 2 * sigma**2 * t) ** 2
    return total / len(times)


def step(x: float, s: float, z: float, *, mu: float, sigma: float, delta: float, amplitude: float, dale: bool) -> float:
    if dale:
        return x * math.exp(
            delta * sigma**2 * x * s - delta * (mu - 3 / 2 * sigma**2) + amplitude * math.sqrt(delta) * sigma * z
        )
    return x * (
        1 + 2 * delta * sigma**2 - delta * mu + delta * sigma**2 * x * s + amplitude * math.sqrt(delta) * sigma * z
    )


def sample(score, x: float, zs, *, mu: float, sigma: float, steps: int, delta: float, repeats: int, damping: float,
           dale: bool) -> float:  # fmt: skip
    """One coordinate from t = 1 to t = 0, with the noise of every step in order."""
    done = 0
    for k in range(steps - 1, -1, -1):
        for _ in range(repeats):
            s = score(x, (k + 1) / steps)
            amplitude = damping**done
            x = step(x, s, zs[done], mu=mu, sigma=sigma, delta=delta, amplitude=amplitude, dale=dale)
            done += 1
    return x

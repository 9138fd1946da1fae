"""The diagnostic tasks: small functions with one pathology each, and two curved valleys in the plane.

A row of the data is the noise that one sample adds to the gradient, or says which coordinates it sees. Rows average
out, so that the mean over all of them is the function itself, whose minimum is known.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from bench.task import Batch, Objective, TaskSpec

SIZE, ROWS, STEPS = 20, 256, 500
Function = Callable[[Tensor], Tensor]  # of the distance to the minimum, (n, size) to (n,)
BEST = torch.tensor([1.0, -1.0]).repeat(SIZE // 2)  # where the minimum is: not where weight decay pulls to


class Point(nn.Module):
    """The point that is optimised. It starts between the origin and three times the minimum, so on the same side."""

    def __init__(self, best: Tensor = BEST, start: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.x = nn.Parameter(start(best) if start else 3 * best * torch.rand(best.shape))

    def forward(self, inputs: Tensor) -> Tensor:
        """The point, once for each row."""
        return self.x.expand(len(inputs), -1)


def spectrum(kappa: float) -> Tensor:
    """Curvatures from 1 down to 1/kappa, evenly spaced in their logarithm."""
    return torch.logspace(0, -np.log10(kappa), SIZE, dtype=torch.float64)


def quadratic(curvature: Tensor, axes: Tensor | None = None) -> Function:
    """A parabola along the coordinates, or along the rows of ``axes``."""

    def value(distance: Tensor) -> Tensor:
        along = distance if axes is None else distance @ axes.to(distance).T
        return 0.5 * (curvature.to(distance) * along.square()).sum(1)

    return value


def rotation() -> Tensor:
    """One random rotation, the same for all."""
    normal = torch.randn(SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(normal)[0]


def plateau(distance: Tensor) -> Tensor:
    """Wells that are flat four deviations away."""
    return (1 - (-0.5 * distance.square()).exp()).sum(1)


def saddle(distance: Tensor) -> Tensor:
    """Double wells with minima at -2 and 0, and the start on the ridge between, where the gradient vanishes."""
    return ((distance + 1).square() - 1).square().sum(1) / 4


def rows(kind: str) -> Tensor:
    """The noise of each row, (ROWS, SIZE), with mean 0 in every coordinate."""
    rng = np.random.RandomState(0)
    if kind == "none":
        return torch.zeros(ROWS, SIZE)
    noise = rng.standard_t(1.5, (ROWS, SIZE)) if kind == "heavy" else rng.standard_normal((ROWS, SIZE))
    scale = 0.3 if kind == "heavy" else float(kind)
    return torch.from_numpy(scale * (noise - noise.mean(0))).float()


def weights(kind: str) -> Tensor:
    """How much each row sees of each coordinate, (ROWS, SIZE), with means of 1 unless rows are sparse."""
    seen = torch.zeros(ROWS, SIZE)
    if kind == "sparse":  # each row one coordinate, the rarest a hundredth as often as the most frequent
        shares = 100.0 ** -np.linspace(0, 1, SIZE)
        counts = np.maximum(1, np.floor(ROWS * shares / shares.sum())).astype(int)
        counts[0] += ROWS - counts.sum()
        seen[torch.arange(ROWS), torch.from_numpy(np.repeat(np.arange(SIZE), counts))] = 1
        return seen
    seen[:: {"dead": 16}.get(kind, 1)] = 1  # of 16 rows 15 see nothing
    if kind == "spike":
        seen[0] = 1000.0
    return seen / seen.mean(0)


def distances(model: nn.Module, inputs: Tensor, best: Tensor) -> Tensor:
    """For each row how far the point is from the minimum, in float32 at least."""
    x = model(inputs)
    return x.to(torch.promote_types(x.dtype, torch.float32)) - best.to(x.device)


def noisy(function: Function, best: Tensor = BEST, scale: float = 1.0) -> Callable[[nn.Module, Batch], Tensor]:
    """For each row the value and its noise, which vanishes at the minimum."""

    def value(model: nn.Module, batch: Batch) -> Tensor:
        distance = distances(model, batch[0], best)
        return scale * (function(distance) + (batch[0] * distance).sum(1))

    return value


def weighted(model: nn.Module, batch: Batch) -> Tensor:
    """For each row a parabola along the coordinates that it sees."""
    return 0.5 * (batch[0] * distances(model, batch[0], BEST).square()).sum(1)


def _task(
    name: str,
    value: Callable[[nn.Module, Batch], Tensor],
    target: float,
    inputs: Callable[[], Tensor] = lambda: rows("none"),
    net: Callable[[], nn.Module] = Point,
    batch: int = 8,
    tag: str = "diagnostic",
    **spec: object,
) -> Objective:
    @functools.cache
    def load() -> Batch:
        seen = inputs()
        return seen, torch.zeros(len(seen), dtype=torch.long)

    epochs = STEPS * batch / ROWS
    return Objective(
        TaskSpec(name, 1, "log_gap", "min", target, epochs, batch, 0, 0.0, frozenset({tag}), se=0.05, **spec),  # type: ignore[arg-type]
        load,
        net,
        value,
    )


def _near(best: Tensor) -> Tensor:
    return best - best.sign() + 1e-3 * torch.randn(best.shape)


def _far(best: Tensor) -> Tensor:
    return best + 4 * best.sign() * (1 + 0.05 * torch.randn(best.shape))


bowl = quadratic(torch.ones(SIZE, dtype=torch.float64))
DIAGNOSTIC: tuple[Objective, ...] = (
    _task("kappa-1e2", noisy(quadratic(spectrum(1e2))), -4),
    _task("kappa-1e4", noisy(quadratic(spectrum(1e4))), -4),
    _task("kappa-1e6", noisy(quadratic(spectrum(1e6))), -4),
    _task("rotated", noisy(quadratic(spectrum(1e4), rotation())), -4),
    _task("saddle", noisy(saddle), -4, net=lambda: Point(start=_near)),
    _task("plateau", noisy(plateau), -4, net=lambda: Point(start=_far)),
    _task("sparse", weighted, -3, lambda: weights("sparse"), batch=4),
    _task("gradients-1e-6", noisy(bowl, scale=1e-6), -4),
    _task("gradients-1e6", noisy(bowl, scale=1e6), -4),
    _task("noise-0.1", noisy(bowl), -4, lambda: rows("0.1")),
    _task("noise-1", noisy(bowl), -3, lambda: rows("1")),
    _task("noise-10", noisy(bowl), -1, lambda: rows("10")),
    _task("heavy-tails", noisy(bowl), -3, lambda: rows("heavy")),
    _task("loss-spike", weighted, -4, lambda: weights("spike"), batch=4),
    _task("dead-start", weighted, -4, lambda: weights("dead"), batch=1),
    _task("bf16", noisy(quadratic(spectrum(10))), -4, dtype="bfloat16"),
    _task("batch-change", noisy(bowl), -2, lambda: rows("1"), batch=4, late_batch=64),
)


def _plane(name: str, function: Callable[[Tensor, Tensor], Tensor], best: Tensor, start: Tensor) -> Objective:
    def net() -> nn.Module:
        return Point(best, lambda _: start + 0.05 * torch.randn(2))

    def value(model: nn.Module, batch: Batch) -> Tensor:
        return function(*model(batch[0]).unbind(1))

    return _task(name, value, -3, net=net, tag="plane")


PLANE: tuple[Objective, ...] = (
    _plane("rosenbrock", lambda x, y: (1 - x) ** 2 + 100 * (y - x * x) ** 2, torch.ones(2), torch.tensor([-1.2, 1.0])),
    _plane(
        "beale",
        lambda x, y: (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2,
        torch.tensor([3.0, 0.5]),
        torch.tensor([1.0, 1.0]),
    ),
)

"""Trains a multiplicative score network on small pictures and draws samples from it in two ways.

    python docs/examples/dale_meets_langevin.py --optimizer AdaBelief --picture dale-meets-langevin.png

The pictures are the 14 x 14 ones of the benchmark, as pixels + 1. What is measured is printed as Markdown. Needs numpy,
and matplotlib for the picture.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import optimzoo

DATA = Path(__file__).parents[2] / "bench/data/fm14.npz"
TIMES = 1000  # N of the paper: the loss sees t = k / N
PIXELS = 14 * 14


class Block(nn.Module):
    """Two convolutions beside a shortcut; the time scales and shifts what is between them."""

    def __init__(self, inputs: int, outputs: int, embedding: int = 64) -> None:
        super().__init__()
        # No norm has weights of its own: a bias that starts at zero would never train under a multiplicative optimizer.
        self.before, self.between = (nn.GroupNorm(8, width, affine=False) for width in (inputs, outputs))
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Takes (batch, inputs, h, w) to (batch, outputs, h, w)."""
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        hidden = self.first(F.silu(self.before(x)))
        hidden = self.second(F.silu(self.between(hidden) * (1 + scale) + shift))
        return self.shortcut(x) + hidden


class ScoreNetwork(nn.Module):
    """An estimate of the score of noised pictures, from a U-Net of two resolutions.

    The U-Net sees log |x|, which is defined where the unconstrained sampler has crossed zero. It predicts what a normal
    law of the data's mean and spread does not explain, at unit scale for all noise levels.
    """

    def __init__(self, process: optimzoo.GeometricBrownian, mean: float, deviation: float, width: int = 32) -> None:
        super().__init__()
        self.process, self.mean, self.variance = process, mean, deviation**2
        self.embed = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.fine = Block(width, width)
        self.coarse = nn.ModuleList([Block(width, 2 * width), Block(2 * width, 2 * width)])
        self.merge = Block(3 * width, width)
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns grad log p_t(x) for pictures (batch, 1, 14, 14) and times (batch,)."""
        noise = (self.process.sigma**2 * t)[:, None, None, None]
        drift = (self.process.mu - self.process.sigma**2 / 2) * t[:, None, None, None]
        y = x.abs().log() - drift - self.mean
        total = noise + self.variance
        phases = noise.log().flatten(1) * torch.linspace(0.25, 4, 8, dtype=x.dtype, device=x.device)
        embedding = self.embed(torch.cat([phases.sin(), phases.cos()], 1))
        fine = self.fine(self.stem(y / total.sqrt()), embedding)
        coarse = F.avg_pool2d(fine, 2)
        for block in self.coarse:
            coarse = block(coarse, embedding)
        out = self.last(F.silu(self.merge(torch.cat([fine, F.interpolate(coarse, scale_factor=2)], 1), embedding)))
        y_score = -(y + out * (self.variance / noise).sqrt() * total.sqrt()) / total
        return (y_score - 1) / x


class Sampler(NamedTuple):
    """What the table calls a sampler, the start it takes, and its options."""

    name: str
    start: str
    options: dict[str, float | bool]


def samplers(steps: int) -> list[Sampler]:
    """Both samplers as the reverse of the process, and as the paper tuned Dale-Langevin for pictures of this kind."""
    # Of 1000 steps with delta 5.8627e-4 and damping 0.995, brought to another number of steps.
    tuned: dict[str, float | bool] = dict(delta=0.58627 / steps, damping=0.995 ** (1000 / steps))
    return [
        Sampler("Dale-Langevin", "covariance", {}),
        Sampler("unconstrained", "covariance", dict(dale=False)),
        Sampler("Dale-Langevin, damped", "covariance", tuned),
        Sampler("unconstrained, damped", "covariance", dict(tuned, dale=False)),
        Sampler("Dale-Langevin, damped, from the paper's start", "variance", tuned),
    ]


def load() -> tuple[Tensor, Tensor]:
    """Training and held-out pictures plus one, (n, 1, 14, 14) in [1, 2]."""
    with np.load(DATA) as archive:
        train, held_out = (
            torch.from_numpy(archive[name]).float()[:, None] / 255 + 1 for name in ("train_images", "test_images")
        )
    return train, held_out


def start(train: Tensor, process: optimzoo.GeometricBrownian, kind: str, count: int, draw: torch.Generator) -> Tensor:
    """Noise to start from: log x is normal with the moments that the process gives it at t = 1.

    "variance" is the paper's start, one mean and variance for all pixels. With sigma = 0.8 noise does not hide how
    bright a picture is as a whole, and that start knows nothing of it; "covariance" does.
    """
    logs = train.log().flatten(1)
    drift = process.mu - process.sigma**2 / 2
    z = torch.randn(count, PIXELS, generator=draw)
    if kind == "variance":
        logs = logs.mean() + drift + (logs.var() + process.sigma**2).sqrt() * z
    else:
        root = torch.linalg.cholesky(logs.T.cov() + process.sigma**2 * torch.eye(PIXELS))
        logs = logs.mean(0) + drift + z @ root.T
    return logs.exp().reshape(count, *train.shape[1:])


def noised(images: Tensor, process: optimzoo.GeometricBrownian, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noised pictures, the pictures, and the time of each: k / N, the same one for the noise and the loss."""
    t = torch.randint(1, TIMES + 1, images.shape[:1], generator=draw) / TIMES
    return process.noise(images, t, generator=draw), images, t


def train_network(
    network: nn.Module,
    train: Tensor,
    process: optimzoo.GeometricBrownian,
    arguments: argparse.Namespace,
    draw: torch.Generator,
) -> tuple[nn.Module, list[float]]:
    """Returns the network with its weights averaged over the last steps, and the loss of every step."""
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimizer = getattr(optimzoo, arguments.optimizer, None) or getattr(torch.optim, arguments.optimizer)
    optimizer = optimizer(network.parameters(), lr=arguments.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    losses = []
    for step in range(arguments.steps):
        images = train[torch.randint(len(train), (arguments.batch,), generator=draw)]
        optimizer.zero_grad()
        loss = process.loss(network, *noised(images, process, draw))
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"step {step + 1}: loss {sum(losses[-100:]) / 100:.3f}", file=sys.stderr)
    return average.module, losses


@torch.no_grad()
def held_out_loss(network: nn.Module, images: Tensor, process: optimzoo.GeometricBrownian) -> float:
    """The loss, with the same noise for every network."""
    return process.loss(network, *noised(images, process, torch.Generator().manual_seed(1))).item()


def sliced_wasserstein(first: Tensor, second: Tensor, directions: int = 500) -> float:
    """Root mean square, over random directions, of the distance between two samples of one size in one dimension."""
    axes = torch.randn(PIXELS, directions, generator=torch.Generator().manual_seed(2))
    axes /= axes.norm(dim=0)
    first, second = ((images.flatten(1) @ axes).sort(0).values for images in (first, second))
    return (first - second).square().mean().sqrt().item()


def nearest(images: Tensor, others: Tensor) -> float:
    """Median distance from a picture to the nearest of the others."""
    return torch.cdist(images.flatten(1), others.flatten(1)).amin(1).median().item()


def measure(samples: Tensor, train: Tensor, held_out: Tensor) -> list[str]:
    """Sliced Wasserstein distance to as many held-out pictures, and medians of two nearest-neighbour distances."""
    return [
        f"{sliced_wasserstein(samples, held_out[: len(samples)]):.3f}",
        f"{nearest(samples, train):.2f}",
        f"{nearest(held_out, samples):.2f}",
    ]


def draw_picture(file: str, losses: Sequence[float], rows: dict[str, Tensor]) -> None:
    """The loss of training, and below it the first pictures of each row, none of them chosen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from PIL import Image

    count = 24
    figure, axes = plt.subplots(
        len(rows) + 1, figsize=(8, 1.6 + 0.95 * len(rows)), height_ratios=[3] + [2] * len(rows), layout="constrained"
    )
    axes[0].plot(range(1, len(losses) + 1), losses, lw=0.4, color="0.7", label="batch")
    width = max(1, len(losses) // 40)
    means = torch.tensor(losses).unfold(0, width, width).mean(1).numpy()
    axes[0].plot([width * (i + 0.5) for i in range(len(means))], means, color="C0", label=f"mean of {width} steps")
    axes[0].set(xscale="log", yscale="log", ylabel="loss", xlabel="step")
    axes[0].legend(frameon=False)
    for axis, (name, images) in zip(axes[1:], rows.items(), strict=True):
        sheet = images[: 2 * count, 0].reshape(2, count, 14, 14).permute(0, 2, 1, 3).reshape(28, 14 * count).numpy()
        axis.imshow(sheet, cmap="gray", vmin=0, vmax=1)
        axis.set_title(name, fontsize=9, loc="left", pad=2)
        axis.axis("off")
    figure.savefig(file, dpi=100)
    Image.open(file).convert("RGB").quantize(64).save(file, optimize=True)  # half the size


def main(argv: Sequence[str] | None = None) -> None:
    """Train, sample, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--optimizer", default="AdaBelief", help="a class of optimzoo or torch.optim")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=4000, help="of training")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--sampler-steps", type=int, default=500)
    parser.add_argument("--samples", type=int, default=500, help="of each sampler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", help="file to draw to; none if not given")
    arguments = parser.parse_args(argv)

    train, held_out = load()
    process = optimzoo.GeometricBrownian()
    torch.manual_seed(arguments.seed)
    draw = torch.Generator().manual_seed(arguments.seed)
    logs = train.log()
    network = ScoreNetwork(process, logs.mean().item(), logs.std().item()).to(memory_format=torch.channels_last)
    before, began = held_out_loss(network, held_out, process), time.perf_counter()
    network, losses = train_network(network, train, process, arguments, draw)
    trained = time.perf_counter()
    after = held_out_loss(network, held_out, process)

    count, pixels, real = arguments.samples, train - 1, held_out - 1
    table, rows = [], {"held out": real}
    for sampler in samplers(arguments.sampler_steps):
        x = start(train, process, sampler.start, count, draw)
        x = process.sample(network, x, steps=arguments.sampler_steps, generator=draw, **sampler.options)
        images = x.clamp(1, 2) - 1
        table.append([sampler.name, *measure(images, pixels, real), f"{(x <= 0).double().mean():.2%}"])
        rows[sampler.name] = images
    # What the same measures make of pictures that no network has seen, and of real ones.
    root = torch.linalg.cholesky(pixels.flatten(1).T.cov() + 1e-6 * torch.eye(PIXELS))
    normal = (pixels.flatten(1).mean(0) + torch.randn(count, PIXELS, generator=draw) @ root.T).reshape_as(images)
    table.append(["normal, of the data's mean and covariance", *measure(normal.clamp(0, 1), pixels, real), ""])
    noise = start(train, process, "covariance", count, draw).clamp(1, 2) - 1
    table.append(["the start", *measure(noise, pixels, real), ""])
    # Real pictures are looked for among the training pictures that are not they.
    folds = [(pixels[i * count : (i + 1) * count], pixels[5 * count :]) for i in range(5)]
    spread = np.array([[float(value) for value in measure(part, rest, real)] for part, rest in folds])
    table.append(
        ["training pictures, 5 draws"]
        + [f"{np.median(column):.3g} [{column.min():.3g}, {column.max():.3g}]" for column in spread.T]
        + [""]
    )

    print("| pictures | sliced Wasserstein | to nearest real | from real to nearest | not positive |")
    print("| --- | --: | --: | --: | --: |")
    for row in table:
        print("| " + " | ".join(row) + " |")
    print("\n| coordinates that are not positive after | 3 steps | 5 steps | 10 steps | 30 steps |")
    print("| --- | --: | --: | --: | --: |")
    for name, dale in (("Dale-Langevin", True), ("unconstrained", False)):
        shares = []
        for steps in (3, 5, 10, 30):
            x = start(train, process, "covariance", count, draw)
            x = process.sample(network, x, steps=steps, dale=dale, generator=draw)
            shares.append(f"{(x <= 0).double().mean():.2%}")
        print("| " + " | ".join([name, *shares]) + " |")
    print(
        f"\nHeld-out loss {before:.2f} before and {after:.2f} after {arguments.steps} steps of batch {arguments.batch} "
        f"with {arguments.optimizer}, lr {arguments.lr:g}, cosine; one training, seed {arguments.seed}; {count} "
        f"samples of each kind, {arguments.sampler_steps} steps each, against {len(real)} held-out pictures ({count} "
        f"in the first column). Training took {trained - began:.0f} s and the rest "
        f"{time.perf_counter() - trained:.0f} s; {torch.get_num_threads()} thread(s), torch {torch.__version__}, "
        f"optimzoo {optimzoo.__version__}."
    )
    if arguments.picture:
        draw_picture(arguments.picture, losses, rows)


if __name__ == "__main__":
    main()

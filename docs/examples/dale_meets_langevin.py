"""Trains a multiplicative score network on small pictures and samples from it in two ways.

    python docs/examples/dale_meets_langevin.py --optimizer AdaBelief --lr 2e-3

The pictures are the 14 x 14 ones of the benchmark, as pixels + 1. Prints what it measures and draws it.
"""

import argparse
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import optimzoo

DATA = Path(__file__).parents[2] / "bench/data/fm14.npz"
TIMES = 1000  # N: the loss and the samplers see t = k / N
SIZE = 14


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

    The U-Net sees log |x|, which is defined where the unconstrained sampler has crossed zero. It predicts what a Gaussian
    of the data's mean and spread does not explain, at unit scale for all noise levels.
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--optimizer", default="AdaBelief")
    parser.add_argument("--sigma", type=float, default=0.8)
    args = parser.parse_args()
    with np.load(DATA) as a:
        train = torch.from_numpy(a["train_images"]).float()[:, None] / 255 + 1
    process = optimzoo.GeometricBrownian(args.sigma**2 / 2, args.sigma)
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    net = ScoreNetwork(process, train.log().mean().item(), train.log().std().item()).to(
        memory_format=torch.channels_last
    )
    print(sum(p.numel() for p in net.parameters()))
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    opt = getattr(optimzoo, args.optimizer)(net.parameters(), lr=args.lr)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, args.steps)
    losses = []
    start = time.time()
    for i in range(args.steps):
        x0 = train[torch.randint(len(train), (128,), generator=g)]
        t = torch.randint(1, TIMES + 1, (128,), generator=g) / TIMES
        x = process.noise(x0, t, generator=g)
        opt.zero_grad()
        loss = process.loss(net, x, x0, t)
        loss.backward()
        opt.step()
        sched.step()
        ema.update_parameters(net)
        losses.append(loss.item())
        if i % 100 == 99:
            print(i + 1, np.mean(losses[-100:]), time.time() - start, flush=True)
    torch.save(ema.module.state_dict(), f"/tmp/t/ema_{args.sigma}_{args.optimizer}_{args.lr}.pt")


main()

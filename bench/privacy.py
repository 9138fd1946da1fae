"""The noise that error feedback needs for the same claim, and what claims without the theorem are worth.

The lower bound is that of an attack on a run of DiceSGD. Other records have a very large gradient against one direction
in the first step, as good as surely a sample of them is drawn, and zero from then on: without the record that is looked
for the error term is -C2 in all later steps. That record's gradient along the direction is zero in the first step and
much larger than theirs after it, so that the error term is C2 in all steps after the first that samples it. The attack
adds up all releases but the first along the direction, and says that the record is there above a threshold. Both error
rates are known in closed form.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from scipy.special import log_ndtr

from bench.markdown import source, table
from optimzoo.privacy import Segment, epsilon, noise_std_for

RATIOS = (0.0, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
CLIP = 1.0


def attack(noise: float, clip: float, error: float, rate: float, steps: int, delta: float) -> float:
    """An epsilon that no true claim can be below: the best of many thresholds, at this delta.

    Args:
        noise, clip, error, rate, steps: as in :class:`optimzoo.privacy.Segment`.
        delta: of the claim.
    """
    steps -= 1  # the first goes to the others
    deviation = noise * math.sqrt(steps)
    # By the step at which the record is first sampled: its chance, and how much more all releases add up to, at least.
    chances = [rate * (1 - rate) ** first for first in range(steps)]
    sums = [clip + 2 * error * (steps - 1 - first) for first in range(steps)]
    best = 0.0
    for threshold in (deviation * i / 20 for i in range(-40, 20 * 60)):
        log_false = float(log_ndtr(-threshold / deviation))
        pairs = zip(chances, sums, strict=True)
        true = sum(chance * math.exp(log_ndtr((total - threshold) / deviation)) for chance, total in pairs)
        true += (1 - rate) ** steps * math.exp(log_false)
        if true > delta:
            best = max(best, math.log(true - delta) - log_false)
    return best


@dataclass(frozen=True)
class Point:
    """What one ratio of the error's bound and the gradient's costs."""

    ratio: float
    rdp: float  # the noise that is needed, by either accountant
    pld: float
    shown: float  # the attack's epsilon at the latter
    code: float  # the noise that the authors' code has
    broken: float  # the attack's epsilon at that
    claimed: float  # the theorem's epsilon at that


def points(ratios: Sequence[float], target: float, delta: float, rate: float, steps: int) -> list[Point]:
    """One for each ratio."""

    def needed(accountant: str, error: float) -> float:
        return noise_std_for(target, delta, max_grad_norm=CLIP, error_norm_sum=error, sample_rate=rate, steps=steps,
                             accountant=accountant)  # fmt: skip

    plain, found = needed("rdp", 0.0), []
    for ratio in ratios:
        error = ratio * CLIP
        code = plain * math.sqrt(1 + 2 * ratio)  # as the authors' code sets it
        pld = needed("pld", error)
        shown, broken = (attack(noise, CLIP, error, rate, steps, delta) for noise in (pld, code))
        claimed = epsilon([Segment(steps, code, CLIP, error, rate)], delta)
        found.append(Point(ratio, needed("rdp", error), pld, shown, code, broken, claimed))
    return found


def rows(found: Sequence[Point]) -> list[list[str]]:
    """The table, one row for each ratio; the first ratio is 0."""
    return [
        [
            f"{one.ratio:g}", f"{one.rdp:.4g}", f"{one.pld:.4g}", f"{one.pld / found[0].pld:.3g}", f"{one.shown:.2f}",
            f"{one.code:.3g}", f"{one.broken:.3g}", f"{one.claimed:.4g}",
        ]
        for one in found
    ]  # fmt: skip


def plot(found: Sequence[Point], target: float, file: Path) -> None:
    """The noise over the ratio, and what the noise of the authors' code is worth."""
    from matplotlib.figure import Figure

    found = found[1:]  # the axis is logarithmic
    ratios = [one.ratio for one in found]
    figure = Figure((10, 3.8), layout="constrained")
    noise, worth = figure.subplots(1, 2)
    noise.plot(ratios, [one.pld for one in found], "o-", color="#0072B2", markersize=4, label="theorem")
    noise.plot(ratios, [one.code for one in found], "s--", color="#D55E00", markersize=4, label="authors' code")
    noise.set(title=f"Noise for epsilon {target:g}", ylabel="noise on the sum, in C1")
    above, below = [one.claimed for one in found], [one.broken for one in found]
    worth.plot(ratios, above, "o-", color="#0072B2", markersize=4, label="theorem: no more than")
    worth.plot(ratios, below, "^:", color="#009E73", markersize=4, label="attack: no less than")
    worth.fill_between(ratios, below, above, color="#0072B2", alpha=0.12)
    worth.axhline(target, linestyle="--", color="#D55E00", label="claimed")
    worth.set(title="Epsilon at the noise of the code", ylabel="epsilon")
    for axis in (noise, worth):
        axis.set(xscale="log", yscale="log", xlabel="bound of the error, C2 / C1")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    figure.savefig(file, dpi=90)


def main(argv: list[str] | None = None) -> int:
    """Prints the table, and returns the exit code."""
    parser = argparse.ArgumentParser("bench.privacy", description=__doc__)
    add = parser.add_argument
    add("--epsilon", type=float, default=2.0, help="default: 2")
    add("--delta", type=float, default=1e-5, help="default: 1e-5")
    add("--sample-rate", type=float, default=0.02, help="default: 0.02")
    add("--steps", type=int, default=150, help="default: 150")
    add("--quick", action="store_true", help="two rows, to see that all of it runs")
    add("--plot", type=Path, metavar="FILE", help="write a picture there")
    args = parser.parse_args(argv)
    head = ["C2 / C1", "noise, RDP", "noise, PLD", "of DP-SGD's", "attack shows",
            "code's noise", "attack shows", "theorem"]  # fmt: skip
    ratios = (0.0, 1.0) if args.quick else RATIOS
    found = points(ratios, args.epsilon, args.delta, args.sample_rate, args.steps)
    print(table(head, rows(found)))
    if args.plot:
        plot(found, args.epsilon, args.plot)
    arguments = sys.argv[1:] if argv is None else argv
    print(
        f"\nNoise on the sum, in units of C1, for epsilon {args.epsilon:g} at delta {args.delta:g}, sample rate"
        f" {args.sample_rate:g}, {args.steps} steps; found to 0.1 %. Code's noise: DP-SGD's by RDP times"
        " sqrt(1 + 2 C2 / C1), as the authors' code has it. Attack shows: no epsilon below this is true with the noise"
        " on its left (with that of PLD, and of the code). Theorem: the epsilon that it gives the code's noise, by PLD."
        f" Nothing is random. dp-accounting {version('dp-accounting')}. {source('bench.privacy', arguments)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

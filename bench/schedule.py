"""Learning-rate schedules: a factor on the learning rate as a function of the share of the budget that is used."""

import bisect
import functools
import itertools
import math

FORMS = "cosine, constant, wsd, step, step 0.75 .. (a tenth at each share), linear 0:0.2 0.23:1 1:0 (share:factor)"
WSD, STEP = "linear 0:1 0.8:1 1:0", "step 0.5 0.75"  # what the bare words stand for


@functools.cache
def _points(text: str) -> tuple[str, tuple[float, ...], tuple[float, ...]]:
    """The kind of a schedule, the shares of the budget that it names in order, and the factors there."""
    kind, *rest = {"wsd": WSD, "step": STEP}.get(text, text).split()
    pairs = [point.split(":") for point in rest]
    try:
        shares = tuple(float(pair[0]) for pair in pairs)
        factors = tuple(float(pair[1]) for pair in pairs) if kind == "linear" else (0.1,) * len(pairs)
        right = {
            "cosine": not pairs,
            "constant": not pairs,
            "step": bool(pairs) and all(len(pair) == 1 for pair in pairs) and shares[0] > 0 and shares[-1] < 1,
            "linear": len(pairs) > 1 and shares[0] == 0 and shares[-1] == 1 and min(factors) >= 0,
        }[kind] and all(a < b for a, b in itertools.pairwise(shares))
    except (KeyError, ValueError, IndexError):
        right = False
    if not right:
        raise ValueError(f"{text!r} is not a schedule; these are: {FORMS}")
    return kind, shares, factors


def factor(schedule: str, progress: float) -> float:
    """The factor once ``progress`` of the budget, in 0 .. 1, is used.

    Raises:
        ValueError: if ``schedule`` is not of the forms known; the message shows them.
    """
    kind, shares, factors = _points(schedule)
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if kind == "linear":
        place = min(bisect.bisect_right(shares, progress), len(shares) - 1)
        part = (progress - shares[place - 1]) / (shares[place] - shares[place - 1])
        return factors[place - 1] + part * (factors[place] - factors[place - 1])
    return 0.1 ** bisect.bisect_right(shares, progress)  # of a constant there are no shares

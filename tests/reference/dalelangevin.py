"""DaleLangevin: multiplicative Langevin steps (after arXiv 2510.02730), and the additive step, in numpy float64."""

import numpy as np


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def step(
    state: dict,
    grad,
    noise,
    *,
    lr=1e-3,
    temperature=1.0,
    noise_kind="gbm",
    s=1.0,
    ito=True,
    weight_decay=0.0,
    decoupled_weight_decay=False,
    exponent_clip=None,
    min_abs=None,
    max_abs=None,
    dale=True,
    maximize=False,
) -> None:
    old_w = np.array(state["param"], dtype=np.float64)
    g = np.array(grad, dtype=np.float64)
    z = np.array(noise, dtype=np.float64)
    w = old_w
    state["step"] = state.get("step", 0) + 1

    # decay; the decoupled factor comes first, so sign(w), w g and |w| below are those of the decayed w
    g = -g if maximize else g
    if weight_decay != 0 and decoupled_weight_decay:
        w = w * (1 - lr * weight_decay)
    sign = np.sign(w)
    if weight_decay != 0 and not decoupled_weight_decay:
        g = g + weight_decay * (sign if dale else w)
    written = np.isfinite(g)

    if not dale:
        state["param"] = np.array(w - lr * g + np.sqrt(2 * lr * temperature) * z)
        return

    if noise_kind == "gbm":
        exponent = -lr * sign * g - ito * s**2 * lr / 2 + s * np.sqrt(lr) * z
    elif noise_kind == "mirrored":
        # signed w: with u = |w| and dU/du = sign(w) g, the drift u dU/du is w g for both signs
        exponent = -lr * (w * g - temperature) + np.sqrt(2 * lr * temperature) * z
    elif noise_kind == "hessian":
        # the floor holds inside the root only; sign(w) and the factor w stay as they are
        magnitude = np.abs(w) if min_abs is None else np.maximum(np.abs(w), min_abs)
        exponent = -lr * sign * g + np.sqrt(2 * lr * temperature / magnitude) * z
    else:
        raise ValueError(f"unknown noise_kind: {noise_kind!r}")

    # the whole exponent is clamped; it is tested before, so that an infinite one is left out and not clamped
    written = written & np.isfinite(exponent)
    if exponent_clip is not None:
        exponent = np.clip(exponent, -exponent_clip, exponent_clip)

    # an exact 0 is absorbing: it stays 0 (and not 0 * inf) where the noise alone overflows exp
    w = np.where(sign == 0, w, w * np.exp(exponent))
    # the clamp keeps the sign from before the update: an underflow returns to min_abs, an exact 0 stays 0
    if min_abs is not None or max_abs is not None:
        w = sign * np.clip(np.abs(w), min_abs, max_abs)

    # elements left out keep the old value: no decay, no clamp
    state["param"] = np.where(written, w, old_w)

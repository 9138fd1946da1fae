"""AdamWEG: exponentiated gradient with Adam moments (Cornford et al. 2024), and plain AdamW/Adam, in numpy float64."""

import numpy as np


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def step(
    state: dict,
    grad,
    *,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=1e-2,
    decoupled_weight_decay=True,
    exponent_clip=None,
    min_abs=None,
    max_abs=None,
    dale=True,
    maximize=False,
) -> None:
    beta1, beta2 = betas
    old_w = np.array(state["param"], dtype=np.float64)
    old_m = state.get("exp_avg", np.zeros_like(old_w))
    old_v = state.get("exp_avg_sq", np.zeros_like(old_w))
    g = np.array(grad, dtype=np.float64)
    w = old_w
    # one count for the whole tensor: it also advances for elements left out
    state["step"] = state.get("step", 0) + 1
    t = state["step"]

    # decay; the decoupled factor comes first, so sign(w) is that of the decayed w
    d = -g if maximize else g
    if weight_decay != 0 and decoupled_weight_decay:
        w = w * (1 - lr * weight_decay)
    sign = np.sign(w)
    if weight_decay != 0 and not decoupled_weight_decay:
        d = d + weight_decay * (sign if dale else w)
    written = np.isfinite(d)

    # moments as in Adam, of d in gradient units
    m = beta1 * old_m + (1 - beta1) * d
    v = beta2 * old_v + (1 - beta2) * d * d
    denom = np.sqrt(v) / np.sqrt(1 - beta2**t) + eps

    if not dale:
        state["param"] = np.array(w - (lr / (1 - beta1**t)) * m / denom)
        state["exp_avg"] = np.array(m)
        state["exp_avg_sq"] = np.array(v)
        return

    # exponent; it is tested before the clamp, so that an infinite one is left out and not clamped
    z = -(lr / (1 - beta1**t)) * sign * m / denom
    written = written & np.isfinite(z)
    if exponent_clip is not None:
        z = np.clip(z, -exponent_clip, exponent_clip)

    # update; the clamp keeps the sign from before the update: an underflow returns to min_abs, an exact 0 stays 0
    w = w * np.exp(z)
    if min_abs is not None or max_abs is not None:
        w = sign * np.clip(np.abs(w), min_abs, max_abs)

    # elements left out keep the old values: no decay, no clamp
    state["param"] = np.where(written, w, old_w)
    state["exp_avg"] = np.where(written, m, old_m)
    state["exp_avg_sq"] = np.where(written, v, old_v)

"""EGSGD: exponentiated gradient with momentum (Cornford et al. 2024), and its plain SGD twin, in numpy float64."""

import numpy as np


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def step(
    state: dict,
    grad,
    *,
    lr=0.1,
    momentum=0.0,
    dampening=0.0,
    nesterov=False,
    weight_decay=0.0,
    decoupled_weight_decay=False,
    exponent_clip=None,
    min_abs=None,
    max_abs=None,
    dale=True,
    maximize=False,
) -> None:
    old_w = np.array(state["param"], dtype=np.float64)
    old_buf = state.get("momentum_buffer")
    g = np.array(grad, dtype=np.float64)
    w = old_w
    state["step"] = state.get("step", 0) + 1

    # 1. direction and decay; the decoupled factor comes first, so sign(w) is that of the decayed w
    d = -g if maximize else g
    if weight_decay != 0 and decoupled_weight_decay:
        w = w * (1 - lr * weight_decay)
    sign = np.sign(w)
    if weight_decay != 0 and not decoupled_weight_decay:
        d = d + weight_decay * (sign if dale else w)
    written = np.isfinite(d)

    # 2. momentum
    buf = None
    if momentum != 0:
        buf = d if old_buf is None else momentum * old_buf + (1 - dampening) * d
        d = d + momentum * buf if nesterov else buf

    if not dale:
        state["param"] = np.array(w - lr * d)
        if momentum != 0:
            state["momentum_buffer"] = np.array(buf)
        return

    # 3. exponent; it is tested before the clamp, so that an infinite one is left out and not clamped
    z = -lr * sign * d
    written = written & np.isfinite(z)
    if exponent_clip is not None:
        z = np.clip(z, -exponent_clip, exponent_clip)

    # 4. update; the clamp keeps the sign from before the update: an underflow returns to min_abs, an exact 0 stays 0
    w = w * np.exp(z)
    if min_abs is not None or max_abs is not None:
        w = sign * np.clip(np.abs(w), min_abs, max_abs)

    # elements left out keep the old values: no decay, no clamp, and a buffer of 0 where there was none
    state["param"] = np.where(written, w, old_w)
    if momentum != 0:
        state["momentum_buffer"] = np.where(written, buf, 0.0 if old_buf is None else old_buf)

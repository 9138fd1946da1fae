"""diffGrad (Dubey et al., IEEE TNNLS 2019, https://doi.org/10.1109/TNNLS.2019.2955777).

Literal float64 reference. Adam whose step is multiplied, per coordinate, by a friction computed from
the change of the gradient. Slow and plain on purpose: one line per equation, so that it can be checked
against the method by eye.
"""

import numpy as np


def _sigmoid(z):
    # Only exp of a non-positive number is taken, so neither tail can overflow.
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0 / (1.0 + e), e / (1.0 + e))


def step(
    state: dict,
    grad,
    *,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    variant=0,
    decoupled_weight_decay=False,
    maximize=False,
) -> None:
    """Advance `state` by one step; its arrays are replaced, so arrays kept from earlier steps stay valid."""
    b1, b2 = betas
    if "step" not in state:
        state["step"] = 0
        for name in ("exp_avg", "exp_avg_sq", "previous_grad"):
            state[name] = np.zeros_like(state["param"], dtype=np.float64)

    theta = state["param"]
    t = state["step"] + 1
    g = np.array(grad, dtype=np.float64)
    if maximize:
        g = -g
    if decoupled_weight_decay:
        theta = theta * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * theta
    m = b1 * state["exp_avg"] + (1 - b1) * g
    v = b2 * state["exp_avg_sq"] + (1 - b2) * g**2
    # Old minus new: the sign decides where variant 1 brakes.
    d = state["previous_grad"] - g
    if variant == 0:
        xi = _sigmoid(np.abs(d))
    elif variant == 1:
        xi = _sigmoid(d)
    elif variant == 2:
        xi = 9 * _sigmoid(0.5 * np.abs(d)) - 4
    else:
        raise ValueError(f"variant must be 0, 1 or 2, got {variant!r}")
    mhat = m / (1 - b1**t)
    # eps comes after the bias correction, as in the paper; the authors' code adds it before.
    denom = np.sqrt(v) / np.sqrt(1 - b2**t) + eps
    theta = theta - lr * xi * mhat / denom

    # The friction damps the step only: the stored m is the undamped one.
    # The stored gradient is the one that entered m, after the sign flip and the coupled decay,
    # and it is a copy, because an alias would follow later writes and make d vanish.
    state.update(param=theta, step=t, exp_avg=m, exp_avg_sq=v, previous_grad=g.copy())

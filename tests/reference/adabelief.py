"""AdaBelief: Adapting Stepsizes by the Belief in Observed Gradients (Zhuang et al., NeurIPS 2020).

A literal float64 reference for tests: one equation per line, in the order of the specification, no speed.
"""

import numpy as np


def step(
    state: dict,
    grad,
    *,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-16,
    weight_decay=0.0,
    amsgrad=False,
    rectify=True,
    degenerated_to_sgd=True,
    decoupled_weight_decay=True,
    fixed_decay=False,
    maximize=False,
) -> None:
    """Advance `state` by one step; its entries are replaced by new arrays, and `grad` is left alone."""
    # Neither combination has an equation, so an answer here would be an invented one.
    if amsgrad and rectify:
        raise ValueError("amsgrad=True has no rectified form: pass rectify=False")
    if fixed_decay and not decoupled_weight_decay:
        raise ValueError("fixed_decay=True needs decoupled_weight_decay=True")

    if "step" not in state:
        state["step"] = 0
        for name in ("exp_avg", "exp_avg_var") + (("max_exp_avg_var",) if amsgrad else ()):
            state[name] = np.zeros(np.shape(state["param"]), dtype=np.float64)

    b1, b2 = betas
    theta, m, s = state["param"], state["exp_avg"], state["exp_avg_var"]
    g = np.asarray(grad, dtype=np.float64)
    if maximize:
        g = -g

    if decoupled_weight_decay and fixed_decay:
        theta = theta * (1 - weight_decay)
    elif decoupled_weight_decay:
        theta = theta * (1 - lr * weight_decay)
    else:
        # Before the moments, so that the decay term enters both m and s.
        g = g + weight_decay * theta

    t = state["step"] + 1
    m = b1 * m + (1 - b1) * g
    # The deviation is from the new m, and eps stays in s: it accumulates to eps*(1-b2^t)/(1-b2).
    s = b2 * s + (1 - b2) * (g - m) ** 2 + eps
    state["step"], state["exp_avg"], state["exp_avg_var"] = t, m, s

    # The maximum is over s without bias correction; the denominator corrects it afterwards.
    if amsgrad:
        s = state["max_exp_avg_var"] = np.maximum(state["max_exp_avg_var"], s)

    bc1 = 1 - b1**t
    bc2 = 1 - b2**t

    if not rectify:
        # The same eps a second time, outside the root.
        theta = theta - lr * (m / bc1) / (np.sqrt(s) / np.sqrt(bc2) + eps)
    else:
        rho_inf = 2 / (1 - b2) - 1
        rho = rho_inf - 2 * t * b2**t / bc2
        if rho >= 5:
            # k holds both bias corrections, so here eps is added to the uncorrected root.
            k = np.sqrt(bc2 * (rho - 4) / (rho_inf - 4) * (rho - 2) / rho * rho_inf / (rho_inf - 2)) / bc1
            theta = theta - lr * k * m / (np.sqrt(s) + eps)
        elif degenerated_to_sgd:
            theta = theta - lr * m / bc1

    state["param"] = theta

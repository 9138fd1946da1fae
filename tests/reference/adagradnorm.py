"""AdaGradNorm as used by AdAdaGrad (Lau, Liu, Kolar, arXiv:2402.11215): one scalar accumulator for all parameters."""

import numpy as np


def step(states: list[dict], grads: list, *, lr=1.0, b0=0.1, weight_decay=0.0, maximize=False) -> None:
    """One step over all parameters together; `states` is updated in place, arrays in it are replaced."""
    # B_0 = b0^2, or the common B of the steps before
    B = float(b0) ** 2
    for state in states:
        if "sum_sq" in state:
            B = state["sum_sq"]
            break

    # the gradient of the step: sign first, then the coupled decay, so that the decay enters B
    directions = []
    for state, grad in zip(states, grads, strict=True):
        if grad is None:
            directions.append(None)
            continue
        g = np.array(grad, dtype=np.float64)
        if maximize:
            g = -g
        g = g + weight_decay * state["param"]
        directions.append(g)

    # B <- B + sum over all parameters of |g|^2
    for g in directions:
        if g is not None:
            B = B + float(np.sum(g**2))

    # theta <- theta - lr * g / sqrt(B)
    for state, g in zip(states, directions, strict=True):
        if g is not None:
            state["step"] = state.get("step", 0) + 1
            state["sum_sq"] = B
            # B >= b0^2 > 0: no epsilon; asarray keeps a 0-d parameter an array
            state["param"] = np.asarray(state["param"] - lr * g / np.sqrt(B))
        elif "sum_sq" in state:
            state["sum_sq"] = B

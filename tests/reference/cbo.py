"""Consensus-based optimization (Pinnau et al., 2017; Riedl et al., https://arxiv.org/abs/2306.09778).

Literal float64 reference of one run. Random numbers and mini-batches are passed in, so that it can follow another
implementation exactly. Slow and plain on purpose: one particle after the other, one line per formula.
"""

import math

import numpy as np


def _finite(value):
    return value if math.isfinite(value) else math.inf


def _weights(energies, alpha):
    if not np.isfinite(energies).any():
        return np.zeros(len(energies))
    lowest = energies.min()
    # The shift comes first: at alpha * |e| of 1e4 the digits of e would be gone.
    w = np.array([0.0 if math.isinf(e) else math.exp(-alpha * (e - lowest)) for e in energies])
    return w / w.sum()


def _mean(weights, points):
    # A particle without weight may be anywhere, infinity included.
    return sum(w * x for w, x in zip(weights, points, strict=True) if w > 0)


def _ess_alpha(energies, share, alpha, alpha_max):
    e = energies[np.isfinite(energies)]
    spread = e.max() - e.min() if len(e) else 0.0
    if spread == 0:
        return alpha
    low, high = min(math.log(1e-9 / spread), math.log(alpha_max)), math.log(alpha_max)
    for _ in range(80):
        middle = (low + high) / 2
        w = np.exp(-math.exp(middle) * (e - e.min()))
        if w.sum() ** 2 / (w**2).sum() > share * len(e):
            low = middle
        else:
            high = middle
    return min(math.exp((low + high) / 2), alpha_max)


def _neg_log_kernel(r, kernel, kappa):
    if kernel == "gaussian":
        return r**2 / (2 * kappa**2)
    if kernel == "laplace":
        return r / kappa
    if kernel == "inverse_quadratic":
        return math.log(1 + r**2 / kappa**2)
    if kernel == "bounded":
        return 0.0 if r <= kappa else math.inf
    raise ValueError(kernel)


def _polarised(x, energies, alpha, kernel, kappa, kernel_alpha):
    means = []
    for i in range(len(x)):
        k = alpha if kernel_alpha else 1.0
        n = [_neg_log_kernel(float(np.sqrt(((x[i] - x[j]) ** 2).sum())), kernel, kappa) for j in range(len(x))]
        exponent = np.array([-k * n[j] - alpha * (energies[j] - energies.min()) for j in range(len(x))])
        if np.isneginf(exponent).all():
            means.append(x[i].copy())  # nobody within reach: it stays
            continue
        w = np.exp(exponent - exponent.max())
        means.append(_mean(w / w.sum(), x))
    return np.array(means)


def _noise(difference, z, kind, clip):
    if kind == "anisotropic":
        size = difference if clip is None else np.sign(difference) * np.minimum(np.abs(difference), clip)
    else:
        norm = np.sqrt((difference**2).sum())
        size = norm if clip is None else min(norm, clip)
    return size * z


def _gate(energies, at_consensus, correction, eps):
    gates = []
    for e in energies:
        if correction is None or math.isinf(e) or math.isinf(at_consensus):
            gates.append(1.0)  # there is nothing to compare
        elif correction == "heaviside":
            gates.append(1.0 if e > at_consensus else 0.0)
        else:
            gates.append((1 + math.tanh((e - at_consensus) / eps)) / 2)
    return np.array(gates)


def projected(x, bounds):
    """The nearest point of a box, or of a ball about the origin."""
    if bounds is None:
        return x
    if isinstance(bounds, tuple):
        return np.clip(x, *bounds)
    norm = np.sqrt((x**2).sum())
    return x * min(1.0, bounds / norm)


def start(x, *, alpha, sigma):
    """The state of a run before its first step."""
    x = np.array(x, dtype=np.float64)
    return dict(
        x=x,
        alpha=alpha,
        sigma=sigma,
        step=0,
        epoch=0,
        energies=np.full(len(x), math.inf),
        memory=x.copy(),
        memory_energies=np.full(len(x), math.inf),
        exp_avg=np.zeros_like(x),
        exp_avg_sq=np.zeros_like(x),
        consensus=None,
        best=x[0].copy(),
        best_loss=math.inf,
        waited=0,
    )


def step(
    state,
    f,
    z,
    *,
    lr=0.1,
    lamda=1.0,
    noise="anisotropic",
    rule="drift",
    correction=None,
    evaluate_consensus=False,
    correction_on="both",
    correction_eps=1e-3,
    noise_clip=None,
    memory=None,
    lamda_memory=0.4,
    sigma_memory=None,
    memory_order="sequential",
    memory_kappa=10.0,
    memory_beta=30.0,
    grad_drift=0.0,
    gradient=None,
    betas=(0.9, 0.99),
    kernel=None,
    kappa=1.0,
    kernel_alpha=True,
    ess=None,
    alpha_growth=1.0,
    alpha_max=1e5,
    sigma_decay=1.0,
    sigma_decay_every=1,
    kick_below=None,
    patience=None,
    bounds=None,
    batch=None,
    update="full",
):
    """Advance `state` by one step; returns f(c) if it was needed, else the lowest energy.

    `z` holds standard normal arrays of the shape of x under "noise", "memory" and "kick"; `lr`, `lamda` and
    `state["sigma"]` may be arrays over the coordinates.
    """
    x, count = np.array([projected(point, bounds) for point in state["x"]]), len(state["x"])
    batch = list(range(count)) if batch is None else sorted(set(batch))
    sigma, best_before = state["sigma"], state["best_loss"]

    def evaluate(point):
        return _finite(f(point))

    def compare(point, energy):
        if energy < state["best_loss"]:
            state["best"], state["best_loss"] = point.copy(), energy

    seen = np.full(count, math.inf)
    for i in batch:
        seen[i] = evaluate(x[i])
        compare(x[i], seen[i])
    state["energies"] = np.where(np.isin(np.arange(count), batch), seen, state["energies"])

    points, energies = x, seen
    if memory is not None:
        y, fy = state["memory"].copy(), state["memory_energies"].copy()
        if state["step"] == 0:
            y, fy = x.copy(), seen.copy()
        elif memory == "smooth":
            for i in batch:
                fy[i] = evaluate(y[i])
                compare(y[i], fy[i])
                share = (1 + math.tanh(memory_beta * (fy[i] - seen[i]))) / 2
                y[i] = y[i] + memory_kappa * lr * (x[i] - y[i]) * share
        if memory in ("reevaluated", "smooth") and state["step"] > 0:
            for i in batch:
                fy[i] = evaluate(y[i])
                compare(y[i], fy[i])
        if memory != "smooth":
            for i in batch:
                if seen[i] < fy[i]:
                    y[i], fy[i] = x[i], seen[i]
        state["memory"], state["memory_energies"] = y, fy
        points = y
        energies = np.where(np.isin(np.arange(count), batch), fy, math.inf)

    if not np.isfinite(energies).any():
        state["step"] += 1
        state["waited"] += 1
        return math.inf

    if ess is not None:
        state["alpha"] = _ess_alpha(energies, ess, state["alpha"], alpha_max)
    alpha = state["alpha"]

    if kernel is None:
        c = _mean(_weights(energies, alpha), points)
        towards = np.tile(c, (count, 1))
    else:
        active = [i for i in range(count) if math.isfinite(energies[i])]
        towards = np.zeros_like(x)
        for i in range(count):
            others = [points[i], *(points[j] for j in active)]
            costs = np.array([math.inf, *(energies[j] for j in active)])
            towards[i] = _polarised(np.array(others), costs, alpha, kernel, kappa, kernel_alpha)[0]
        c = towards[energies.argmin()].copy()
    if kernel is None:
        c = projected(c, bounds)
        towards = np.tile(c, (count, 1))

    loss = seen.min()
    gate = np.ones(count)
    if correction is not None or evaluate_consensus:
        loss = evaluate(c)
        compare(c, loss)
    if correction is not None:
        gate = _gate(state["energies"], loss, correction, correction_eps)
    noise_gate = gate if correction_on == "both" else np.ones(count)

    movers = range(count) if update == "full" else batch
    new = x.copy()
    for i in movers:
        d = x[i] - towards[i]
        if rule == "hopping":
            new[i] = towards[i] + sigma * z["noise"][i]
        elif rule == "adam":
            b1, b2 = betas
            t = state["step"] + 1
            state["exp_avg"][i] = b1 * state["exp_avg"][i] + (1 - b1) * d
            state["exp_avg_sq"][i] = b2 * state["exp_avg_sq"][i] + (1 - b2) * d**2
            mhat, vhat = state["exp_avg"][i] / (1 - b1**t), state["exp_avg_sq"][i] / (1 - b2**t)
            # No lr on the drift.
            new[i] = x[i] - lamda * mhat / (np.sqrt(vhat) + 1e-8)
            new[i] += sigma * np.sqrt(lr) * _noise(d, z["noise"][i], noise, noise_clip)
        else:
            new[i] = x[i] - lamda * lr * gate[i] * d
            new[i] += sigma * np.sqrt(lr) * noise_gate[i] * _noise(d, z["noise"][i], noise, noise_clip)
        if memory is not None:
            sm = lamda_memory * sigma if sigma_memory is None else sigma_memory
            dm = (new[i] if memory_order == "sequential" else x[i]) - state["memory"][i]
            new[i] = new[i] - lamda_memory * lr * dm
            new[i] += sm * np.sqrt(lr) * _noise(dm, z["memory"][i], noise, noise_clip)
        if grad_drift:
            compare(new[i], evaluate(new[i]))
            new[i] = new[i] - grad_drift * lr * gradient(new[i])

    state["waited"] = 0 if state["best_loss"] < best_before else state["waited"] + 1
    way = math.inf if state["consensus"] is None else np.abs(c - state["consensus"]).max()
    if kick_below is not None and way < kick_below:
        new += sigma * np.sqrt(lr) * z["kick"]
    if patience is not None and state["waited"] >= patience:
        new += 0.1 * np.sqrt(lr) * z["kick"]
        state["waited"] = 0
    state["x"], state["consensus"] = np.array([projected(point, bounds) for point in new]), c
    if alpha_growth != 1 and state["alpha"] < alpha_max:
        state["alpha"] = min(state["alpha"] * alpha_growth, alpha_max)
    state["step"] += 1
    state["sigma"] = sigma * sigma_decay if state["step"] % sigma_decay_every == 0 else sigma
    return loss


def cool(state, alpha_max=1e5):
    """The cooling at the end of epoch 1, 2, ... in the code of Riedl et al."""
    state["epoch"] += 1
    e = state["epoch"]
    state["sigma"] = state["sigma"] * math.log2(e + 1) / math.log2(e + 2)
    state["alpha"] = min(2 * state["alpha"], alpha_max)


def reduced(count, before, after, mu=0.2, batch=1):
    """How many particles stay, from the spread before and after an epoch."""
    factor = ((1 - mu) * before + mu * after) / before
    factor = min(max(factor, 1 - mu), 1.0)
    return math.ceil(factor * count / batch) * batch


def spread(x):
    """The norm of the particles' variances."""
    return float(np.sqrt((x.var(axis=0) ** 2).sum()))

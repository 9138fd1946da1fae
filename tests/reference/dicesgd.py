"""DiceSGD and DP-SGD (Zhang, Bu, Wu, Hong, arXiv:2311.14632) and the assumption-free RDP accountant, in float64.

A logical batch is a list of micro-batches; a micro-batch is a list with one array (n, *shape) of per-example gradients
for each parameter, or None for a parameter without any. An empty list, or n = 0, is an empty batch. `z` is one array
of standard normals for each parameter, or None (no noise). States are dicts, and arrays in them are replaced.
"""

import functools
import math

import numpy as np

TINY = float(np.finfo(np.float64).tiny)
ORDERS = range(2, 513)


def norm(parts) -> float:
    """One L2 norm over all arrays of `parts`, scaled by the largest entry."""
    largest = max((float(np.max(np.abs(p), initial=0.0)) for p in parts), default=0.0)
    if largest == 0.0:
        return 0.0
    return largest * math.sqrt(sum(float(np.sum((p / largest) ** 2)) for p in parts))


def factor(n, C, rule="flat", gamma=0.01, round_down=0.0) -> float:
    """Section 1: the factor of a gradient of norm n: min(1, C/max(n, tiny)), or the automatic C/(n + gamma).

    Ambiguous: `round_down` (section 3, "e.g." 1e-6; 0 is the literal rule) multiplies n by 1 + round_down in both.
    """
    n = n * (1 + round_down)
    return {"flat": min(1.0, C / max(n, TINY)), "automatic": C / max(n + gamma, TINY)}[rule]


def examples(micro_batch, params):
    """Each example as a list with one float64 array a parameter; a non-finite one is zero as a whole."""
    sizes = {len(g) for g in micro_batch if g is not None}
    assert len(micro_batch) == len(params)
    assert len(sizes) <= 1
    for i in range(max(sizes, default=0)):
        g = []
        for x, samples in zip(params, micro_batch, strict=True):
            g.append(np.zeros(x.shape) if samples is None else np.array(samples[i], dtype=np.float64))
            assert g[-1].shape == x.shape
        if not all(np.isfinite(part).all() for part in g):
            g = [np.zeros(x.shape) for x in params]
        yield g


def new_state(params) -> dict:
    """State before the first step; E (sum units) or e (mean units) and the momentum buffers come with the steps."""
    return {"params": [np.array(x, dtype=np.float64) for x in params], "steps": 0}


def base_update(state, u, *, lr=1.0, momentum=0.0, weight_decay=0.0, dampening=0.0, nesterov=False) -> None:
    """torch.optim.SGD on the released u: d = u + wd x; buf = d at first, then momentum buf + (1 - dampening) d."""
    d = [ui + weight_decay * x for ui, x in zip(u, state["params"], strict=True)]
    if momentum != 0:
        if "buf" in state:
            state["buf"] = [momentum * b + (1 - dampening) * di for b, di in zip(state["buf"], d, strict=True)]
        else:
            state["buf"] = [di.copy() for di in d]
        d = [di + momentum * b if nesterov else b for di, b in zip(d, state["buf"], strict=True)]
    state["params"] = [x - lr * di for x, di in zip(state["params"], d, strict=True)]


def accumulate(micro_batches, params, *, C1, clipping="flat", gamma=0.01, round_down=0.0):
    """Section 1, 1-3: S = sum c_i g_i and D = sum (1 - c_i) g_i over all micro-batches of one logical batch."""
    S = [np.zeros(x.shape) for x in params]
    D = [np.zeros(x.shape) for x in params]
    for micro_batch in micro_batches:
        for g in examples(micro_batch, params):
            c = factor(norm(g), C1, clipping, gamma, round_down)
            S = [total + c * part for total, part in zip(S, g, strict=True)]
            D = [total + (1 - c) * part for total, part in zip(D, g, strict=True)]
    return S, D


def step(
    state,
    micro_batches,
    *,
    C1,
    C2,
    B,
    s=0.0,
    z=None,
    clipping="flat",
    gamma=0.01,
    windup_cap=False,
    error_clipping="flat",
    round_down=0.0,
    **base,
):
    """Section 1 in sum units: one logical step; returns the released u (what `p.grad` holds). C2 = 0 is DP-SGD.

    `base` goes to base_update. Ambiguous:
    - windup_cap clips the rest E - Ec to C2 before D is added, and always by the flat rule.
    - error_clipping="automatic" is C2 E/(|E| + gamma), gamma not multiplied by B (so that the 2-cycle is C2/2 - gamma).
    - round_down is for the samples only, not for E.
    """
    S, D = accumulate(micro_batches, state["params"], C1=C1, clipping=clipping, gamma=gamma, round_down=round_down)
    if C2 > 0:
        E = state.get("E") or [np.zeros(x.shape) for x in state["params"]]
        c = factor(norm(E), C2, error_clipping, gamma)
        Ec = [c * part for part in E]
    else:
        Ec = [np.zeros(x.shape) for x in state["params"]]
    z = [np.zeros(x.shape) for x in state["params"]] if z is None else z
    u = [(Si + Eci + s * np.asarray(zi)) / B for Si, Eci, zi in zip(S, Ec, z, strict=True)]
    if C2 > 0:
        rest = [part - clipped for part, clipped in zip(E, Ec, strict=True)]
        if windup_cap:
            c = factor(norm(rest), C2)
            rest = [c * part for part in rest]
        state["E"] = [part + Di for part, Di in zip(rest, D, strict=True)]
    base_update(state, u, **base)
    state["steps"] += 1
    return u


def dpsgd_step(state, micro_batches, *, C1, B, s=0.0, z=None, **options):
    """DP-SGD: u = (S + s z)/B, no error feedback."""
    return step(state, micro_batches, C1=C1, C2=0.0, B=B, s=s, z=z, **options)


def mean_step(
    state,
    micro_batches,
    *,
    C1,
    c2,
    B,
    s=0.0,
    z=None,
    clipping="flat",
    gamma=0.01,
    windup_cap=False,
    error_clipping="flat",
    round_down=0.0,
    **base,
):
    """Section 1 in mean units, as in the paper, on vectors over all parameters; agrees with step at C2 = B c2, E = B e.

    v = (1/B) sum clip(g_i, C1) + clip(e, c2); x <- x - eta (v + w), w = (s/B) z; e <- e + (1/B) sum g_i - v. Returns
    v + w. The cap takes from e what clip(e - clip(e, c2), c2) leaves out; the automatic rule on e has gamma/B.
    """
    params = state["params"]
    flatten = lambda parts: np.concatenate([np.asarray(p, dtype=np.float64).ravel() for p in parts])  # noqa: E731
    P = sum(x.size for x in params)
    G = [flatten(g) for micro_batch in micro_batches for g in examples(micro_batch, params)]
    e = state.get("e", np.zeros(P))
    e_clipped = e * factor(norm([e]), c2, error_clipping, gamma / B)
    g_clipped = [g * factor(norm([g]), C1, clipping, gamma, round_down) for g in G]
    v = sum(g_clipped, np.zeros(P)) / B + e_clipped
    w = np.zeros(P) if z is None else s / B * flatten(z)
    if windup_cap:
        rest = e - e_clipped
        e = e - (rest - rest * factor(norm([rest]), c2))
    state["e"] = e + sum(G, np.zeros(P)) / B - v
    ends = np.cumsum([x.size for x in params])
    u = [part.reshape(x.shape) for part, x in zip(np.split(v + w, ends[:-1]), params, strict=True)]
    base_update(state, u, **base)
    state["steps"] += 1
    return u


@functools.cache
def log_binomials(alpha):
    """ln C(alpha, k) for k = 0..alpha, from exact integers."""
    return np.array([math.log(math.comb(alpha, k)) for k in range(alpha + 1)])


def rdp_sgm(alpha, q, nm) -> float:
    """Section 4: ln A/(alpha - 1), A = sum_k C(alpha,k) (1-q)^(alpha-k) q^k exp(k(k-1)/(2 nm^2)); alpha = 2, 3, ...

    One step of the Poisson-subsampled Gaussian, nm = std/sensitivity; q = 1 leaves alpha/(2 nm^2), nm = 0 infinity.
    """
    assert int(alpha) == alpha >= 2
    assert 0 <= q <= 1
    if q == 0:
        return 0.0
    if nm == 0:
        return math.inf
    if q == 1:
        return alpha / (2 * nm**2)
    k = np.arange(alpha + 1)
    logs = log_binomials(alpha) + (alpha - k) * math.log1p(-q) + k * math.log(q) + k * (k - 1) / (2 * nm**2)
    top = float(np.max(logs))
    return max(0.0, (top + math.log(float(np.sum(np.exp(logs - top))))) / (alpha - 1))


def rho_theorem(alpha, steps, s, C1, C2, q, lam) -> float:
    """Section 4, theorem: T RDP_SGM(alpha; q, a/C1) + (T-1) alpha (2 C2)^2/(2 b^2), a^2 = lam s^2, b^2 = (1-lam) s^2.

    lam = 1 needs C2 = 0 or T = 1 (nothing of E is released at t = 0).
    """
    if steps == 0:
        return 0.0
    rho = steps * rdp_sgm(alpha, q, math.sqrt(lam) * s / C1)
    if C2 == 0 or steps == 1:
        return rho
    b2 = (1 - lam) * s**2
    return rho + (steps - 1) * alpha * (2 * C2) ** 2 / (2 * b2) if b2 > 0 else math.inf


def epsilon_of_rho(rho, delta, orders=ORDERS) -> float:
    """Section 4: min over alpha of rho + ln(1 - 1/alpha) - (ln delta + ln alpha)/(alpha - 1), at least 0."""
    candidates = (
        r + math.log1p(-1 / alpha) - (math.log(delta) + math.log(alpha)) / (alpha - 1)
        for alpha, r in zip(orders, rho, strict=True)
    )
    return max(0.0, min(candidates))


def epsilon_at(steps, s, C1, C2, q, delta, lam, orders=ORDERS) -> float:
    """Section 4: eps of the theorem at one lambda."""
    return epsilon_of_rho([rho_theorem(alpha, steps, s, C1, C2, q, lam) for alpha in orders], delta, orders)


def epsilon_rdp(steps, s, C1, C2, q, delta, orders=ORDERS, *, with_lambda=False):
    """Section 4: eps of the theorem, minimised over lambda: a grid in logit(lambda), then finer ones around the best.

    C2 = 0 or one step: lambda = 1. s = 0: infinite; no steps: 0. Every lambda is valid, so the search only costs eps.
    """
    if steps == 0 or s == 0:
        best = (0.0 if steps == 0 else math.inf, 1.0)
    elif C2 == 0 or steps == 1:
        best = (epsilon_at(steps, s, C1, C2, q, delta, 1.0, orders), 1.0)
    else:
        best, centre, width = (math.inf, 0.5), 0.0, 16.0
        while width > 1e-2:
            for logit in np.linspace(centre - width, centre + width, 33):
                lam = 1 / (1 + math.exp(-logit))
                best = min(best, (epsilon_at(steps, s, C1, C2, q, delta, lam, orders), lam))
            centre, width = math.log(best[1] / (1 - best[1])), width / 8
    return best if with_lambda else best[0]


def noise_rdp(eps, steps, C1, C2, q, delta, orders=ORDERS) -> float:
    """Section 4: the smallest s with epsilon_rdp <= eps, by bisection in ln s (the upper end is returned)."""
    low, high = math.log(1e-2 * C1), math.log(1e6 * (C1 + C2))
    while high - low > 1e-5:
        middle = (low + high) / 2
        enough = epsilon_rdp(steps, math.exp(middle), C1, C2, q, delta, orders) <= eps
        low, high = (low, middle) if enough else (middle, high)
    return math.exp(high)

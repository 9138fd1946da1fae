"""Learning rate and momentum from the spectrum of the batch Hessian (after arXiv:2006.09092) in literal form.

Matrices are explicit, everything is float64, and all randomness (start vectors, data) comes in as arguments.
c stands for P s^2, the noise of the additive model; theta for Ritz values, largest first.
"""

import math

import numpy as np

EPS = float(np.finfo(np.float64).eps)
TINY = float(np.finfo(np.float64).tiny)

# section 5, options of learner_sequence: all guards on (the default), and the raw formula with the EMA of 5.1
GUARDS = dict(safety=0.5, rho_max=0.9, growth=1.5, smoothing="up_at_once", factor=0.5, initial_lr=0.01)
GUARDS |= dict(min_lr=0.0, max_lr=math.inf, quantile=0.1)
RAW = dict(safety=1.0, rho_max=1.0, growth=math.inf, smoothing="ema", factor=0.9)


def effective_batch(B, N=math.inf) -> float:
    """Section 2: b = B/(1 - B/N); B = N (a full batch, no noise) gives infinity."""
    return math.inf if B == N else B / (1 - B / N)


def additive_outlier(lam, c, b) -> float:
    """Section 2: lambda + (c/b)/lambda if lambda > sqrt(c/b), else the bulk edge 2 sqrt(c/b)."""
    return lam + (c / b) / lam if lam > math.sqrt(c / b) else 2 * math.sqrt(c / b)


def additive_overlap(lam, c, b) -> float:
    """Section 2: overlap of the eigenvectors, 1 - (c/b)/lambda^2 above the threshold, 0 below (and at it)."""
    return 1 - (c / b) / lam**2 if lam > math.sqrt(c / b) else 0.0


def multiplicative_top(outlier, q) -> float:
    """Section 2: l (1 + q/(l-1)) if l > 1 + sqrt(q), else (1 + sqrt q)^2, with q = P/b."""
    return outlier * (1 + q / (outlier - 1)) if outlier > 1 + math.sqrt(q) else (1 + math.sqrt(q)) ** 2


def fit_noise(b1, top1, b2, top2) -> tuple[float, float]:
    """Section 2: (lambda, c) from lambda' at two batch sizes.

    The law has two unknowns and a threshold; read literally as two equations above it: lambda' is linear in 1/b.
    """
    slope = (top1 - top2) / (1 / b1 - 1 / b2)
    lam = top1 - slope / b1
    return lam, slope * lam


def noise_from_products(products, product, micro=1) -> float:
    """Section 2: E|H_i v - Hv|^2 for a unit v, one row H_i v per micro-batch.

    Ambiguous: `product` is any Hv; if it is the mean of the rows, the literal plain mean is low by (n-1)/n. The text
    is for single samples; a micro-batch of m samples has 1/m of that variance, so the result is multiplied by m.
    """
    return float(micro * np.mean(np.sum((np.asarray(products) - product) ** 2, axis=1)))


def max_learning_rate(batch, *, kind="sgd", reference_batch, reference_lr, law=None, lam=None, c=None, N=math.inf):
    """Section 2: the largest stable learning rate at `batch`, scaled from a reference.

    Ambiguous: law None is linear for sgd and sqrt for adaptive; all laws use the effective batch; "saturating" is
    lr proportional to 1/lambda' of the additive model (threshold and bulk edge included), for adaptive its root.
    """
    b, b0 = effective_batch(batch, N), effective_batch(reference_batch, N)
    law = law or {"sgd": "linear", "adaptive": "sqrt"}[kind]
    if law == "saturating":
        ratio = additive_outlier(lam, c, b0) / additive_outlier(lam, c, b)
        return reference_lr * (ratio if kind == "sgd" else math.sqrt(ratio))
    return reference_lr * {"linear": b / b0, "sqrt": math.sqrt(b / b0)}[law]


def lanczos(A, start, k, tol=None):
    """Section 3: a_1..a_m, b_1..b_m and Q (P x m) with m <= k; b_m is the norm of the last residual.

    a_j is q_j.w before re-orthogonalisation and is not corrected. Ambiguous: the tolerance "eps_mach-scaled" is read
    as eps * P * (largest |a|, |b| so far), or the absolute `tol`; a b_j at or below it is kept as computed.
    """
    A = np.asarray(A, dtype=np.float64)
    q = np.asarray(start, dtype=np.float64)
    q = q / np.sqrt(q @ q)
    a, b, Q = [], [], []
    for j in range(min(k, len(A))):
        Q.append(q)
        w = A @ q
        a.append(q @ w)
        w = w - a[j] * q
        if j > 0:
            w = w - b[j - 1] * Q[j - 1]
        for _ in range(2):
            w = w - np.array(Q).T @ (np.array(Q) @ w)
        b.append(np.sqrt(w @ w))
        if b[j] <= (EPS * len(A) * np.max(np.abs(a + b)) if tol is None else tol):
            break
        q = w / b[j]
    return np.array(a), np.array(b), np.array(Q).T


def ritz(a, b):
    """Section 3: theta (descending), error bounds b_k |last components|, SLQ weights (squared first components)."""
    theta, S = np.linalg.eigh(np.diag(a) + np.diag(b[:-1], 1) + np.diag(b[:-1], -1))
    theta, S = theta[::-1], S[:, ::-1]
    return theta, b[-1] * np.abs(S[-1]), S[0] ** 2


def ritz_until(A, start, tol, k_max, which=(0,)):
    """Section 3: iterate until the error bound is below tol or k reaches the maximum; ritz and the number of steps.

    Ambiguous: tol is absolute, and the top value decides; which=(0, -1) asks the lowest as well.
    """
    for k in range(1, k_max + 1):
        a, b, _ = lanczos(A, start, k)
        theta, bounds, weights = ritz(a, b)
        if len(a) < k or np.all(bounds[list(which)] < tol):
            break
    return theta, bounds, weights, len(a)


def slq(A, starts, k):
    """Section 3: nodes and weights of all starts side by side, each start's weights divided by their number."""
    runs = [ritz(*lanczos(A, start, k)[:2]) for start in starts]
    return np.concatenate([r[0] for r in runs]), np.concatenate([r[2] for r in runs]) / len(runs)


def density(grid, nodes, weights, sigma):
    """Section 3: Gaussians of width (standard deviation) sigma around the nodes."""
    z = (np.asarray(grid, dtype=np.float64)[:, None] - nodes) / sigma
    return np.exp(-(z**2) / 2) @ weights / (sigma * math.sqrt(2 * math.pi))


def slq_moment(nodes, weights, power) -> float:
    """Section 7: moment of the SLQ density without smoothing; estimates trace(A^power)/P."""
    return float(np.sum(weights * nodes**power))


def slq_trace(nodes, weights, P) -> float:
    """Section 3: trace estimate."""
    return float(P * np.sum(weights * nodes))


def slq_logdet(nodes, weights, P) -> float:
    """Section 3: log-det estimate; ambiguous for indefinite A, where the literal logarithm does not exist: nan."""
    return float(P * np.sum(weights * np.log(nodes))) if np.all(nodes > 0) else math.nan


def mlp_curvature(params, X, y, hidden, loss="mse"):
    """Section 4: (gradient, Hessian, GGN) of the mean loss of f = w2.tanh(W1 x + b1) + b2.

    params = (W1 by rows, b1, w2, b2). Losses: "mse" (f - y)^2; "logistic" log(1 + e^f) - y f.
    GGN = mean l'' J J^T, Hessian = GGN + mean l' S with J and S the gradient and the Hessian of f.
    """
    params, X = np.asarray(params, dtype=np.float64), np.asarray(X, dtype=np.float64)
    (n, d), h, P = X.shape, hidden, len(params)
    W1, b1 = params[: h * d].reshape(h, d), params[h * d : h * d + h]
    w2, b2 = params[h * d + h : -1], params[-1]
    g, H, G = np.zeros(P), np.zeros((P, P)), np.zeros((P, P))
    for x, target in zip(X, y, strict=True):
        t = np.tanh(W1 @ x + b1)
        dt, ddt = 1 - t**2, -2 * t * (1 - t**2)
        f, x1 = w2 @ t + b2, np.append(x, 1.0)
        J, S = np.zeros(P), np.zeros((P, P))
        J[-1] = 1.0
        for i in range(h):
            incoming, outgoing = [*range(i * d, i * d + d), h * d + i], h * d + h + i  # row i of W1 and b1_i; w2_i
            J[incoming], J[outgoing] = w2[i] * dt[i] * x1, t[i]
            S[np.ix_(incoming, incoming)] = w2[i] * ddt[i] * np.outer(x1, x1)
            S[incoming, outgoing] = S[outgoing, incoming] = dt[i] * x1
        p = 1 / (1 + np.exp(-f))
        d1, d2 = (2 * (f - target), 2.0) if loss == "mse" else (p - target, p * (1 - p))
        g += d1 * J / n
        G += d2 * np.outer(J, J) / n
        H += (d2 * np.outer(J, J) + d1 * S) / n
    return g, H, G


def softmax_hessian(W, bias, X):
    """Section 4: Hessian (= GGN) of the mean cross-entropy of W x + bias, parameters (W by rows, bias)."""
    C, d = np.shape(W)
    H = np.zeros((C * d + C, C * d + C))
    for x in np.asarray(X, dtype=np.float64):
        z = W @ x + bias
        p = np.exp(z - z.max()) / np.sum(np.exp(z - z.max()))
        J = np.hstack([np.kron(np.eye(C), x), np.eye(C)])
        H += J.T @ (np.diag(p) - np.outer(p, p)) @ J / len(X)
    return H


def shifted(A, weight_decay=0.0, damping=0.0):
    """Section 5: coupled weight decay adds wd to every eigenvalue (decoupled: nothing).

    Ambiguous: `damping` of section 6 is nowhere defined; read as the same shift of the operator.
    """
    return A + (weight_decay + damping) * np.eye(len(A))


def preconditioned(H, exp_avg_sq, t, beta2, eps):
    """Section 5.4: D^{-1/2} H D^{-1/2}, D = sqrt(v_hat) + eps, v_hat = exp_avg_sq/(1 - beta2^t) after t steps."""
    D = np.sqrt(np.asarray(exp_avg_sq) / (1 - beta2**t)) + eps
    return H / np.sqrt(D)[:, None] / np.sqrt(D)


def ema(values, factor=0.9):
    """Section 5.1: bias-corrected EMA after each value."""
    m, out = 0.0, []
    for t, value in enumerate(values, 1):
        m = factor * m + (1 - factor) * value
        out.append(m / (1 - factor**t))
    return out


def up_at_once(values, factor=0.5):
    """Section 5.2: upward at once, downward by an EMA in the logarithm (factor is the weight of the old value)."""
    out = []
    for value in values:
        if not out or value >= out[-1]:
            out.append(value)
        else:
            out.append(math.exp(factor * math.log(out[-1]) + (1 - factor) * math.log(value)))
    return out


def smallest_curvature(theta, weights, rule, quantile=0.1) -> float:
    """Section 5.2: mu, before it is limited to [0, L]; a rule that is a number is returned.

    Ambiguous: "abs_min" is |lowest Ritz value| even if that is positive (as on a convex quadratic); no positive value
    gives 0; the quantile is of the unsmoothed measure: the lowest node whose cumulative weight reaches the level.
    """
    if rule == "abs_min":
        return float(abs(np.min(theta)))
    if rule == "smallest_positive":
        return float(np.min(theta[theta > 0], initial=math.inf)) if np.any(theta > 0) else 0.0
    if rule == "quantile":
        order = np.argsort(theta)
        reached = np.cumsum(weights[order]) >= quantile * np.sum(weights)
        return float(theta[order][np.argmax(reached)])
    return float(rule)


def heavy_ball(L, mu) -> tuple[float, float]:
    """Section 5.3: lr = (2/(sqrt L + sqrt mu))^2, rho = ((sqrt L - sqrt mu)/(sqrt L + sqrt mu))^2."""
    root = math.sqrt(L) + math.sqrt(mu)
    return (2 / root) ** 2, ((math.sqrt(L) - math.sqrt(mu)) / root) ** 2


def capped_heavy_ball(L, mu, rho_max=0.9) -> tuple[float, float]:
    """Section 5.2: rho <= rho_max with lr = (1 + sqrt rho)^2 / L for the capped rho (no safety factor here)."""
    rho = min(heavy_ball(L, mu)[1], rho_max)
    return (1 + math.sqrt(rho)) ** 2 / L, rho


def nesterov(L, mu) -> tuple[float, float]:
    """Section 5.3: lr = 1/L, rho = (sqrt L - sqrt mu)/(sqrt L + sqrt mu)."""
    return 1 / L, (math.sqrt(L) - math.sqrt(mu)) / (math.sqrt(L) + math.sqrt(mu))


def fixed_momentum(L, rho, safety=1.0) -> float:
    """Section 5.3: safety * 2 (1 + rho)/L; with safety = 1 the stability edge."""
    return safety * 2 * (1 + rho) / L


def no_momentum(L, mu) -> float:
    """Section 5.3: 2/(L + mu)."""
    return 2 / (L + mu)


def with_dampening(lr, rho) -> float:
    """Section 5.3: the learning rate for dampening = rho."""
    return lr / (1 - rho)


def adam_learning_rate(L_pre, beta1, safety=1.0) -> float:
    """Section 5.4: safety * 2 (1 + beta1)/((1 - beta1) L_pre)."""
    return safety * 2 * (1 + beta1) / ((1 - beta1) * L_pre)


def line_learning_rate(g, H) -> float:
    """Header, rule="line": g.g / g.Hg."""
    return float((g @ g) / (g @ (H @ g)))


def outer_schedule(t, warmup=0, total=None) -> float:
    """Section 5.5: factor of the learnt value at step t; ambiguous: warm-up is linear, (t + 1)/warmup, and both act."""
    ramp = min(1.0, (t + 1) / warmup) if warmup else 1.0
    return ramp * ((1 + math.cos(math.pi * min(t, total) / total)) / 2 if total else 1.0)


def heavy_ball_rate(eigenvalues, lr, rho) -> float:
    """Section 5.3: the largest root modulus of z^2 - (1 + rho - lr lambda) z + rho; below 1 is stable."""
    return float(max(np.max(np.abs(np.roots([1, -(1 + rho - lr * lam), rho]))) for lam in eigenvalues))


def sgd_on_quadratic(A, x, pairs, use_nesterov=False, dampened=False):
    """Section 5.3: iterates on x.Ax/2, v = rho v + g, x -= lr v, one (lr, rho) a step; the first v is g (torch)."""
    x, v, out = np.asarray(x, dtype=np.float64), None, []
    for lr, rho in pairs:
        g = A @ x
        v = g if v is None else rho * v + ((1 - rho) if dampened else 1.0) * g
        x = x - lr * (g + rho * v if use_nesterov else v)
        out.append(x)
    return np.array(out)


def learner_sequence(matrices, starts, *, k=20, mu="abs_min", method="heavy_ball", momentum=0.0, **options):
    """Section 5: the (lr, momentum) after each update; one matrix (None: zero loss) and one list of starts each.

    method: heavy_ball, nesterov, fixed, none, or adam (matrices preconditioned by the caller, momentum = beta1).
    options: of GUARDS, the default; **RAW is the raw formula with 5.1's EMA. Ambiguous, read literally:
    - 5.1 and 5.2 smooth L differently: the guard is on by default and replaces the EMA. mu is not smoothed.
    - with several starts theta_1 is the largest of all, with its own bound, and mu sees all of them.
    - initial_lr is the rate before the first update, which may grow by `growth` too (initial_lr / growth: it may not);
      `momentum` is likewise the momentum before it.
    - order: formula, safety, growth from the last learnt value, min_lr and max_lr; the group's lr and the outer
      schedule multiply afterwards and do not feed back. nesterov keeps lr = 1/L for a capped rho; none sets rho = 0.
    - all Ritz values <= 0, anything non-finite or a zero loss keep the last pair and leave the smoothing alone.
    """
    assert options.keys() <= GUARDS.keys()
    o = GUARDS | options
    lr, rho = o["initial_lr"], momentum
    seen, out = [], []
    for A, vectors in zip(matrices, starts, strict=True):
        usable = A is not None and np.isfinite(A).all()
        if usable:
            runs = [ritz(*lanczos(A, v, k)[:2]) for v in vectors]
            theta, bounds, weights = (np.concatenate(parts) for parts in zip(*runs, strict=True))
            usable = np.max(theta) > 0
        if usable:
            seen.append(max(np.max(theta) + bounds[np.argmax(theta)], TINY))
            L = {"up_at_once": up_at_once, "ema": ema}[o["smoothing"]](seen, o["factor"])[-1]
            m = min(max(smallest_curvature(theta, weights, mu, o["quantile"]), 0.0), L)
            target, rho = {
                "heavy_ball": capped_heavy_ball(L, m, o["rho_max"]),
                "nesterov": (1 / L, min(nesterov(L, m)[1], o["rho_max"])),
                "fixed": (fixed_momentum(L, momentum), momentum),
                "none": (no_momentum(L, m), 0.0),
                "adam": (adam_learning_rate(L, momentum), momentum),
            }[method]
            lr = min(max(min(o["safety"] * target, o["growth"] * lr), o["min_lr"]), o["max_lr"])
        out.append((float(lr), float(rho)))
    return out

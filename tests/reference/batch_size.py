"""Variance tests and batch-size schedule of AdAdaGrad (Lau, Liu, Kolar, arXiv:2402.11215) in literal form."""

import math

import numpy as np

# A test that must be skipped (b < 2, G2 = 0, anything non-finite) returns T = nan, and nan never makes b grow.


def _skip(g) -> bool:
    if g.shape[0] < 2 or not np.isfinite(g).all():
        return True
    gbar = g.mean(axis=0)
    G2 = np.sum(gbar**2)
    return not (np.isfinite(G2) and G2 > 0.0)


def _quotient(numerator, denominator) -> float:
    # a denominator that underflows to 0 is treated as G2 = 0
    if not (np.isfinite(numerator) and np.isfinite(denominator) and denominator > 0.0):
        return math.nan
    return float(numerator / denominator)


def norm_test(g, eta) -> float:
    """T of: V/b <= eta^2 * G2."""
    g = np.asarray(g, dtype=np.float64)
    if _skip(g):
        return math.nan
    b = g.shape[0]
    gbar = g.mean(axis=0)
    G2 = np.sum(gbar**2)
    V = np.sum((g - gbar) ** 2) / (b - 1)
    return _quotient(V, eta**2 * G2)


def inner_product_test(g, theta) -> float:
    """T of: Var(a)/b <= theta^2 * G2^2."""
    g = np.asarray(g, dtype=np.float64)
    if _skip(g):
        return math.nan
    b = g.shape[0]
    gbar = g.mean(axis=0)
    G2 = np.sum(gbar**2)
    a = np.sum(g * gbar, axis=1)
    var_a = np.sum((a - G2) ** 2) / (b - 1)
    return _quotient(var_a, theta**2 * G2**2)


def orthogonality_test(g, nu) -> float:
    """T of: Vo/b <= nu^2 * G2, with Vo from the explicit projection."""
    g = np.asarray(g, dtype=np.float64)
    if _skip(g):
        return math.nan
    b = g.shape[0]
    gbar = g.mean(axis=0)
    G2 = np.sum(gbar**2)
    a = np.sum(g * gbar, axis=1)
    # the part of g_i orthogonal to gbar; its mean over i is 0
    orthogonal = g - (a / G2)[:, None] * gbar
    Vo = np.sum(orthogonal**2) / (b - 1)
    return _quotient(Vo, nu**2 * G2)


def augmented_test(g, theta, nu) -> float:
    """T of: inner product and orthogonality test both pass."""
    T_ip = inner_product_test(g, theta)
    T_orth = orthogonality_test(g, nu)
    if math.isnan(T_ip) or math.isnan(T_orth):
        return math.nan
    return max(T_ip, T_orth)


def coordinate_test(g, eta, quantile=1.0) -> float:
    """T of: each j: Var_j/b <= eta^2 * gbar_j^2; a quantile below 1 replaces the max over j."""
    g = np.asarray(g, dtype=np.float64)
    if _skip(g):
        return math.nan
    b = g.shape[0]
    gbar = g.mean(axis=0)
    var = np.sum((g - gbar) ** 2, axis=0) / (b - 1)
    T = []
    for var_j, gbar_j in zip(var, gbar, strict=True):
        # coordinates without variance pass at any b, and do not count in the quantile either
        if var_j == 0.0:
            continue
        denominator = eta**2 * gbar_j**2
        # a coordinate with variance and mean 0 fails at any b: it asks for an infinite batch
        T.append(float(var_j / denominator) if denominator > 0.0 else math.inf)
    if not T:
        return 0.0
    # linear interpolation between the order statistics, written out because some of them may be infinite
    T.sort()
    position = quantile * (len(T) - 1)
    low = math.floor(position)
    fraction = position - low
    if fraction == 0.0 or math.isinf(T[low]):
        return T[low]
    return T[low] + fraction * (T[low + 1] - T[low])


def noise_scale(g) -> float:
    """Naive gradient noise scale V/G2, the trace of the per-sample covariance over the squared mean gradient."""
    return norm_test(g, 1.0)


def pooled_variance(groups) -> float:
    """Exact pooling over workers: [sum_w (n_w - 1) * s_w + sum_w n_w * |g_w - gbar|^2] / (N - 1)."""
    groups = [np.asarray(group, dtype=np.float64) for group in groups]
    n = [group.shape[0] for group in groups]
    N = sum(n)
    if N < 2:
        return math.nan
    means = [group.mean(axis=0) for group in groups]
    gbar = sum(n_w * g_w for n_w, g_w in zip(n, means, strict=True)) / N
    within = 0.0
    between = 0.0
    for group, n_w, g_w in zip(groups, n, means, strict=True):
        # s_w does not exist for one sample; its weight n_w - 1 is 0
        s_w = np.sum((group - g_w) ** 2) / (n_w - 1) if n_w > 1 else 0.0
        within = within + (n_w - 1) * s_w
        between = between + n_w * np.sum((g_w - gbar) ** 2)
    return float((within + between) / (N - 1))


def group_variance(means, sizes) -> float:
    """Group estimator of the per-sample V: sum_w n_w * |g_w - gbar|^2 / (M - 1)."""
    means = np.asarray(means, dtype=np.float64)
    n = np.asarray(sizes, dtype=np.float64)
    M = means.shape[0]
    if M < 2:
        return math.nan
    N = np.sum(n)
    gbar = np.sum(n[:, None] * means, axis=0) / N
    return float(np.sum(n * np.sum((means - gbar) ** 2, axis=1)) / (M - 1))


def next_batch_size(b, T, b_max, max_growth=None) -> int:
    """b' = min(max(b, ceil(T)), b_max) if T > b, else b; nan counts as a skipped test."""
    wanted = b
    if b < T:
        # an infinite T has no ceiling: it asks for b_max
        wanted = b_max if math.isinf(T) else math.ceil(T)
    if max_growth is not None:
        # the factor is an upper limit: b' <= max_growth * b
        wanted = min(wanted, math.floor(max_growth * b))
    return min(max(b, wanted), b_max)


def split(b_next, world, micro_max, first_accum, b_max) -> tuple[int, int, int]:
    """(micro, accum, b) for b' over `world` ranks; keeping the old split unless b grew is up to the caller."""
    accum = first_accum
    # micro_max None: off, no limit
    if micro_max is not None:
        accum = max(first_accum, -(-b_next // (world * micro_max)))
    micro = -(-b_next // (world * accum))
    b = world * accum * micro
    if b > b_max:
        micro = b_max // (world * accum)
        b = world * accum * micro
    if micro < 1:
        raise ValueError(f"no valid split: b_max={b_max} with world={world} and accum={accum}")
    return micro, accum, b


def learning_rate(samples, base, minimum, warmup, end) -> float:
    """Linear warm-up, then cosine, as a function of samples."""
    if samples < warmup:
        return base * samples / warmup
    # at samples = end the cosine gives minimum too; >= avoids 0/0 for warmup = end
    if samples >= end:
        return minimum
    return minimum + (base - minimum) * (1 + math.cos(math.pi * (samples - warmup) / (end - warmup))) / 2

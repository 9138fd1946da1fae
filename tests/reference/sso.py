"""Target-based surrogates (SSO; Lavington et al., arXiv:2302.02607) in literal form, one function per quantity.

Conventions (section 2): axis 0 of the outputs is the sample axis, every other axis is a target dimension; l is the mean
of the per-sample losses l_i, G is the gradient of that mean (so G_i = grad l_i / n), norms are means over samples and
sums over target dimensions. Parameters are lists of arrays. A model is a pair (forward(params, X), vjp(params, X, v)),
a loss a pair (l(z, y), G(z, y)), a divergence a pair (D(z_new, z_old) per sample, dD/dz_new). In the inner solvers
h(params) is the surrogate and grad(params) its gradient. No function draws random numbers.
"""

import numpy as np

# section 2 (d): the smoothness L of the loss of one sample
SMOOTHNESS = {"half_squared": 1.0, "logistic": 0.25, "softmax": 0.5}


def per_sample_sum(a):
    """Section 2: sum over target dimensions, one value per sample."""
    return np.asarray(a, dtype=np.float64).reshape(len(a), -1).sum(axis=1)


def half_squared(z, y):
    """Section 2 (d): l = mean_i |z_i - y_i|^2 / 2."""
    return np.mean(per_sample_sum((z - y) ** 2)) / 2


def half_squared_grad(z, y):
    """Section 3.1: G = (z - y) / n."""
    return (z - y) / len(z)


def logistic(z, y):
    """Section 2 (d): l = mean_i log(1 + exp(-y_i z_i)), y in {-1, 1}; several target dimensions are summed."""
    return np.mean(per_sample_sum(np.logaddexp(0.0, -y * z)))


def logistic_grad(z, y):
    """Section 3.1: G = -y sigmoid(-y z) / n."""
    return -y * np.exp(-np.logaddexp(0.0, y * z)) / len(z)


def log_softmax(z):
    """Section 1: log-probabilities of logits, over the last axis."""
    shifted = z - z.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softmax_loss(z, y):
    """Section 2 (d): softmax cross-entropy, y one-hot (or rows of probabilities)."""
    return np.mean(per_sample_sum(-y * log_softmax(z)))


def softmax_loss_grad(z, y):
    """Section 3.1: G = (softmax(z) * sum(y) - y) / n."""
    return (np.exp(log_softmax(z)) * y.sum(axis=-1, keepdims=True) - y) / len(z)


HALF_SQUARED = (half_squared, half_squared_grad)
LOGISTIC = (logistic, logistic_grad)
SOFTMAX = (softmax_loss, softmax_loss_grad)


def hessians(kind, z):
    """Section 2 (c): per-sample Hessians of l_i in z_i, shape (n, d, d) for outputs (n, d) or (n,); y in {-1, 1}."""
    z = z.reshape(len(z), -1)
    eye = np.eye(z.shape[1])
    if kind == "half_squared":
        return np.repeat(eye[None], len(z), axis=0)
    if kind == "logistic":
        return eye * np.exp(-np.logaddexp(0.0, z) - np.logaddexp(0.0, -z))[:, :, None]
    if kind == "softmax":
        p = np.exp(log_softmax(z))
        return eye * p[:, :, None] - p[:, :, None] * p[:, None, :]
    raise ValueError(f"expected half_squared, logistic or softmax, got {kind!r}")


def bregman(phi, grad_phi, a, b):
    """Section 2, Bregman form: D_phi(a, b) = phi(a) - phi(b) - <grad phi(b), a - b>, one value per sample."""
    return phi(a) - phi(b) - per_sample_sum(grad_phi(b) * (a - b))


# section 2: D / eta replaces |.|^2 / (2 eta), so D is half the square
EUCLIDEAN = (lambda new, old: per_sample_sum((new - old) ** 2) / 2, lambda new, old: new - old)


def kl_value(new, old):
    """Section 2: KL(softmax(z_new) || softmax(z_old)), D_phi(f, z_t) of the negative entropy in probability space.

    Ambiguous: the specification names no direction. The literal order D_phi(f(theta), z_t) on probabilities, which is
    also MDPO's, is taken; the linear term stays <G, f - z> in logits. KL_REVERSED is phi = logsumexp on the logits.
    """
    log_p, log_q = log_softmax(new), log_softmax(old)
    return per_sample_sum(np.exp(log_p) * (log_p - log_q))


def kl_grad(new, old):
    """Section 2: gradient of kl_value in the new logits, p (log p - log q - KL)."""
    log_p, log_q = log_softmax(new), log_softmax(old)
    p = np.exp(log_p)
    return p * (log_p - log_q - np.sum(p * (log_p - log_q), axis=-1, keepdims=True))


KL = (kl_value, kl_grad)
KL_REVERSED = (lambda a, b: kl_value(b, a), lambda a, b: np.exp(log_softmax(a)) - np.exp(log_softmax(b)))


def diagonal(w):
    """Section 4, target_metric: D = sum_j w_j (f_j - z_j)^2 / 2, one weight per output dimension."""
    return lambda new, old: per_sample_sum(w * (new - old) ** 2) / 2, lambda new, old: w * (new - old)


def quadratic(H):
    """Section 2 (c): D_i = (f_i - z_i)^T H_i (f_i - z_i) / 2 with per-sample matrices H of shape (n, d, d)."""

    def gradient(new, old):
        return np.einsum("nij,nj->ni", H, (new - old).reshape(len(new), -1)).reshape(new.shape)

    return lambda new, old: per_sample_sum((new - old) * gradient(new, old)) / 2, gradient


def adagrad_accumulator(A, G):
    """Section 4, target_metric "adagrad": A_j + mean_i (n G_ij)^2, the current G included.

    Ambiguous: "an accumulated matrix of G". The gradients of one sample, n G, and the mean over samples are taken, as
    everywhere in section 2, so that A does not depend on the batch size.
    """
    return A + np.mean((len(G) * G) ** 2, axis=0)


def adagrad_weights(A, eps=0.0):
    """Section 4: w_j = sqrt(A_j) + eps; neither the root nor eps is in the specification (AdaGrad's own form)."""
    return np.sqrt(A) + eps


def surrogate(f, z, l_z, G, eta, divergence=EUCLIDEAN):
    """Section 2, per-sample reduction: g = l(z) + <G, f - z> + mean_i D_i(f, z) / eta."""
    return l_z + np.sum(G * (f - z)) + np.mean(divergence[0](f, z)) / eta


def surrogate_grad(f, z, G, eta, divergence=EUCLIDEAN):
    """Section 2: gradient in the outputs, G + dD/df / (n eta)."""
    return G + divergence[1](f, z) / (len(z) * eta)


def surrogate_tuple(f, z, l_z, G, eta, divergence=EUCLIDEAN):
    """Section 3, outputs as a tuple: both terms are summed over the members, with l(z) once."""
    return l_z + sum(surrogate(*member, eta, divergence) for member in zip(f, z, [0.0] * len(z), G, strict=True))


def target_minimiser(z, G, eta):
    """Section 2: the minimiser without constraint, z - eta n G: n G, the gradient of one sample, stands for its G_t."""
    return z - eta * len(z) * G


def linear_minimiser(theta, X, G, eta):
    """Section 2 (b): theta - eta (X^T X)^+ X^T (n G); n G again, because of the mean over samples in the square."""
    return theta - eta * np.linalg.pinv(X.T @ X) @ (X.T @ (len(X) * G))


# sections 1 and 2 (b): z = X theta, theta of shape (p,) or (p, d), and J^T v = X^T v
LINEAR = (lambda params, X: X @ params[0], lambda params, X, v: [X.T @ v])


def two_layer(mask=1.0):
    """Section 1: z = (mask * tanh(X W1^T + b1)) W2^T + b2; the dropout mask is fixed for the whole step (section 5)."""

    def forward(params, X):
        W1, b1, W2, b2 = params
        return (mask * np.tanh(X @ W1.T + b1)) @ W2.T + b2

    def vjp(params, X, v):
        W1, b1, W2, _ = params
        h = np.tanh(X @ W1.T + b1)
        u = (v @ W2) * mask * (1 - h**2)
        return [u.T @ X, u.sum(axis=0), v.T @ (mask * h), v.sum(axis=0)]

    return forward, vjp


def flatten(params):
    """All parameters in one vector, in order."""
    return np.concatenate([np.ravel(p) for p in params])


def unflatten(vector, params):
    """The inverse of flatten, with the shapes of params."""
    pieces = np.split(vector, np.cumsum([p.size for p in params])[:-1])
    return [piece.reshape(p.shape) for piece, p in zip(pieces, params, strict=True)]


def ggn_step(model, params, X, G, H):
    """Section 2 (c), eta = 1: theta - (mean_i J_i^T H_i J_i)^+ J^T G, f linearised at theta (exact for linear z)."""
    z = model[0](params, X)
    units = np.eye(z.size).reshape(z.size, *z.shape)
    J = np.stack([flatten(model[1](params, X, unit)) for unit in units]).reshape(len(z), -1, flatten(params).size)
    B = np.einsum("nip,nij,njq->pq", J, H, J) / len(z)
    return unflatten(flatten(params) - np.linalg.pinv(B) @ flatten(model[1](params, X, G)), params)


def eta_sqrt(eta, t):
    """Section 4: eta / sqrt(t), steps counted from t = 1."""
    return eta / np.sqrt(t)


def eta_exponential(eta, t, T):
    """Section 4: eta (1/T)^(t/T); t as the caller counts it (from 0 with torch's scheduler, section 5)."""
    return eta * (1 / T) ** (t / T)


def target_line_search(loss, z, l_z, G, start, per_sample=True, c=0.5, factor=0.9, low=1e-4, high=1e4):
    """Section 4, SLS form: (eta, loss evaluations, accepted); eta shrinks until l(z - eta s) <= l(z) - c eta |s|^2.

    Ambiguous: the text has s = G. Read with G the gradient of the mean (per_sample=False), eta would depend on the
    batch size, which section 2 excludes; so s = n G and |s|^2 is the mean over samples, i.e. n |G|^2. The clamp is
    applied to every trial; `low` is still tried, and is used without acceptance if it fails. A nan or inf loss fails.
    """
    n = len(z) if per_sample else 1
    eta = min(max(start, low), high)
    evaluations = 0
    while True:
        evaluations += 1
        value = loss(z - eta * n * G)
        if np.isfinite(value) and value <= l_z - c * eta * n * np.sum(G**2):
            return eta, evaluations, True
        if eta == low:
            return eta, evaluations, False
        eta = max(factor * eta, low)


def inner_gd(h, grad, params, m, lr, momentum=0.0, buffers=None, tol=1e-6):
    """Section 3.3: (params, {steps, buffers}); buffers passed back in are a state that persists (section 4).

    Ambiguous: where the early stop is tested. Here: after the backward, before the step, at k = 1 too.
    """
    steps = 0
    for _ in range(m):
        g = grad(params)
        if np.linalg.norm(flatten(g)) <= tol:
            break
        if momentum == 0.0 or buffers is None:
            buffers = g
        else:
            buffers = [momentum * b + g_j for b, g_j in zip(buffers, g, strict=True)]
        params = [p - lr * b for p, b in zip(params, buffers, strict=True)]
        steps += 1
    return params, dict(steps=steps, buffers=buffers)


def armijo(h, params, g, start, c=0.5, factor=0.9, max_trials=100, smallest=1e-6):
    """Section 4: (params, a, trials, accepted) of x - a g until h(x_new) <= h(x) - c a |g|^2.

    An a below `smallest` is not tried; on failure the parameters come back unchanged.
    """
    h_x, a, trials = h(params), start, 0
    while trials < max_trials and a >= smallest:
        trials += 1
        new = [p - a * g_j for p, g_j in zip(params, g, strict=True)]
        value = h(new)
        if np.isfinite(value) and value <= h_x - c * a * np.sum(flatten(g) ** 2):
            return new, a, trials, True
        a = factor * a
    return params, a, trials, False


def inner_armijo(h, grad, params, m, previous=None, reset=10.0, batches_per_epoch=1, tol=1e-6):
    """Section 4: (params, {steps, a, trials, accepted}); a search starts at previous * 1.8^(1 / batches per epoch).

    previous=None: the reset at the beginning of an outer step; the first search starts at `reset` itself, ungrown.
    Ambiguous: what follows a failure. Here: the loop ends, since theta did not move, and the last accepted a is kept.
    """
    steps, trials, accepted, a = 0, [], True, previous
    for _ in range(m):
        g = grad(params)
        if np.linalg.norm(flatten(g)) <= tol:
            break
        start = reset if a is None else a * 1.8 ** (1 / batches_per_epoch)
        params, tried, count, accepted = armijo(h, params, g, start)
        trials.append(count)
        if not accepted:
            break
        steps, a = steps + 1, tried
    return params, dict(steps=steps, a=a, trials=trials, accepted=accepted)


def sso_step(model, loss, params, X, y, eta, inner, m, divergence=EUCLIDEAN, search=False, **inner_options):
    """Section 3: (params, loss at theta_t, info); search=True takes eta as the first trial of target_line_search."""
    if not eta > 0 or m < 1:
        raise ValueError(f"expected eta > 0 and m >= 1, got eta={eta}, m={m}")
    z = model[0](params, X)
    l_z, G = loss[0](z, y), loss[1](z, y)
    # section 5: no inner step from a non-finite G or outputs
    if not (np.isfinite(z).all() and np.isfinite(G).all()):
        return params, l_z, dict(skipped=True, eta=eta)
    evaluations, accepted = 0, True
    if search:
        eta, evaluations, accepted = target_line_search(lambda t: loss[0](t, y), z, l_z, G, eta)

    def h(p):
        return surrogate(model[0](p, X), z, l_z, G, eta, divergence)

    def grad(p):
        return model[1](p, X, surrogate_grad(model[0](p, X), z, G, eta, divergence))

    params, info = inner(h, grad, params, m, **inner_options)
    return params, l_z, dict(skipped=False, eta=eta, loss_evaluations=evaluations, eta_accepted=accepted, inner=info)


def sso_run(model, loss, params, batches, eta, inner, m, **options):
    """Sections 3 and 4: (params, losses at theta_1, theta_2, ..., infos); each step resets the inner solver.

    eta(t), t from 1, is the schedule. A number is the first trial of the target line search; the next trial starts at
    1.8 x the last accepted eta.
    """
    losses, infos = [], []
    for t, (X, y) in enumerate(batches, start=1):
        eta_t = eta(t) if callable(eta) else eta
        search = not callable(eta)
        params, l_t, info = sso_step(model, loss, params, X, y, eta_t, inner, m, search=search, **options)
        losses.append(l_t)
        infos.append(info)
        if search and not info["skipped"]:
            eta = 1.8 * info["eta"]
    return params, losses, infos

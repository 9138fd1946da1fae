"""Target projection SGD (TPSGD; Lomnitz, Daniels, Zhang, Piacentino, arXiv:2208.08503) and DRTP in literal form.

The sections named below are those of the method's specification: 2 the rule for one layer, 3 the layers, 4 the
mechanism, 6 the laws. All randomness (projections, draws) and all labels are arguments.

Conventions of all functions: batch first; labels are given as y_star of shape (n, c), one-hot or regression targets;
units are the last axis of Linear and recurrent outputs and axis 1 of convolution maps. A linear or recurrent P has the
shape (o, c) of section 2, a convolution's P the shape (c, out_ch, *space) or (c, out_ch) of section 3, and DRTP's B is
(c, out) or (c, out_ch, *space).
"""

import math

import numpy as np

# ---------------------------------------------------------------- activations


def _sigmoid(z):
    return 1.0 / (1.0 + np.exp(-z))


def activation(name, z):
    """Section 2: y = sigma(z)."""
    z = np.asarray(z, dtype=np.float64)
    if name == "identity":
        return z
    if name == "relu":
        return np.where(z > 0.0, z, 0.0)
    if name == "tanh":
        return np.tanh(z)
    if name == "sigmoid":
        return _sigmoid(z)
    raise ValueError(f"unknown activation {name!r}")


def activation_derivative(name, z):
    """Section 2: sigma'(z).

    Ambiguous at ReLU's kink, where no derivative exists: sigma'(0) = 0.
    """
    z = np.asarray(z, dtype=np.float64)
    if name == "identity":
        return np.ones_like(z)
    if name == "relu":
        return np.where(z > 0.0, 1.0, 0.0)
    if name == "tanh":
        return 1.0 - np.tanh(z) ** 2
    if name == "sigmoid":
        return _sigmoid(z) * (1.0 - _sigmoid(z))
    raise ValueError(f"unknown activation {name!r}")


# ---------------------------------------------------------------- labels, projections, targets


def one_hot(labels, c):
    """Section 2: the one-hot label y* (c classes); section 7: a label out of range is an error."""
    labels = np.asarray(labels)
    if labels.min() < 0 or labels.max() >= c:
        raise ValueError(f"label out of range for {c} classes")
    return np.eye(c)[labels]


def projection(kind, draws, out=None):
    """Sections 2 and 3, "Projection": P (or B) from given raw draws.

    "uniform" and "kaiming" take draws of U(0, 1) and give U(-1, 1) and U(-sqrt(6/out), sqrt(6/out)); the others take
    standard normal draws. Ambiguous: what sign, binary and orthogonal are. Here sign is -1 or 1 (the sign of the draw),
    binary is 0 or 1 (whether the draw is positive), orthogonal has orthonormal columns (rows if wider than high),
    the Q of the QR factors with R's diagonal positive; none is scaled. Ambiguous for a convolution: which number `out`
    is (channels, or channels times positions), so it is an argument.
    """
    draws = np.asarray(draws, dtype=np.float64)
    if kind == "uniform":
        return 2.0 * draws - 1.0
    if kind == "kaiming":
        return math.sqrt(6.0 / out) * (2.0 * draws - 1.0)
    if kind == "normal":
        return draws
    if kind == "sign":
        return np.where(draws >= 0.0, 1.0, -1.0)
    if kind == "binary":
        return np.where(draws > 0.0, 1.0, 0.0)
    if kind == "orthogonal":
        wide = draws.shape[0] < draws.shape[1]
        Q, R = np.linalg.qr(draws.T if wide else draws)
        Q = Q * np.sign(np.diag(R))
        return Q.T if wide else Q
    raise ValueError(f"unknown projection {kind!r}")


def target(P, y_star, transform="none", sigma=None):
    """Section 2: t = P y*; section 2, "target_transform": "activation" makes it sigma(P y*).

    P of shape (..., o, c) and y_star of shape (..., c) broadcast over their leading axes. Ambiguous: what the
    transform "activation" applies; here the layer's own activation, to the whole target.
    """
    t = np.einsum("...oc,...c->...o", np.asarray(P, dtype=np.float64), np.asarray(y_star, dtype=np.float64))
    if transform == "none":
        return t
    if transform == "activation":
        return activation(sigma, t)
    raise ValueError(f"unknown target transform {transform!r}")


# ---------------------------------------------------------------- local losses of one sample


def _softmax(a):
    e = np.exp(a - a.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _log_softmax(a):
    a = a - a.max(axis=-1, keepdims=True)
    return a - np.log(np.exp(a).sum(axis=-1, keepdims=True))


def _norm(v):
    return np.sqrt(np.sum(v**2, axis=-1, keepdims=True))


def sample_loss(kind, y, t, P=None, y_star=None):
    """Section 2, "Local loss" and "Arbitrary loss": l(y, t) of every sample, summed over units (the last axis).

    l2: |t - y|^2 (with its factor 1, so sample_error is the gradient of half of it); l1: |t - y|_1;
    smooth_l1: d^2/2 for |d| < 1, else |d| - 1/2 (ambiguous: the threshold; here 1);
    cosine: 1 - <y, t>/(|y| |t|) (ambiguous where y or t is 0; here 1);
    readout: -sum_k y*_k log softmax(P^T y)_k, which uses P and y* in place of t;
    a pair of callables (l, dl/dy), each of (y, t), is used as it is.
    """
    y = np.asarray(y, dtype=np.float64)
    if not isinstance(kind, str):
        return kind[0](y, t)
    if kind == "l2":
        return np.sum((t - y) ** 2, axis=-1)
    if kind == "l1":
        return np.sum(np.abs(t - y), axis=-1)
    if kind == "smooth_l1":
        d = np.abs(y - t)
        return np.sum(np.where(d < 1.0, d**2 / 2.0, d - 0.5), axis=-1)
    if kind == "cosine":
        norms = (_norm(y) * _norm(t))[..., 0]
        return 1.0 - np.where(norms > 0.0, np.sum(y * t, axis=-1) / np.where(norms > 0.0, norms, 1.0), 0.0)
    if kind == "readout":
        return -np.sum(y_star * _log_softmax(np.einsum("...oc,...o->...c", P, y)), axis=-1)
    raise ValueError(f"unknown local loss {kind!r}")


def sample_error(kind, y, t, P=None, y_star=None):
    """Section 2: dl/dy of every sample, before the factor sigma'(z) and before any mean.

    l2: y - t ("the update drops the factor 2"); l1: sign(y - t), which is 0 at y = t; smooth_l1: y - t clipped to
    [-1, 1]; cosine: -(t/|t| - cos * y/|y|)/|y|, and 0 where y or t is 0; readout: P (softmax(P^T y) sum(y*) - y*).
    Ambiguous in section 6: "autograd's gradient of the local loss" for l2 is that of |t - y|^2/2, by the rule here.
    """
    y = np.asarray(y, dtype=np.float64)
    if not isinstance(kind, str):
        return kind[1](y, t)
    if kind == "l2":
        return y - t
    if kind == "l1":
        return np.sign(y - t)
    if kind == "smooth_l1":
        return np.clip(y - t, -1.0, 1.0)
    if kind == "cosine":
        norm_y, norm_t = _norm(y), _norm(t)
        defined = norm_y * norm_t > 0.0
        unit_y = y / np.where(defined, norm_y, 1.0)
        unit_t = t / np.where(defined, norm_t, 1.0)
        cos = np.sum(unit_y * unit_t, axis=-1, keepdims=True)
        return np.where(defined, -(unit_t - cos * unit_y) / np.where(defined, norm_y, 1.0), 0.0)
    if kind == "readout":
        p = _softmax(np.einsum("...oc,...o->...c", P, y))
        return np.einsum("...oc,...c->...o", P, p * np.sum(y_star, axis=-1, keepdims=True) - y_star)
    raise ValueError(f"unknown local loss {kind!r}")


# ---------------------------------------------------------------- Linear


def _bias(b):
    return 0.0 if b is None else b


def _rows(x, y_star):
    """Section 3, Linear: (n, ..., k) flattened to (rows, k), the label repeated unless each step has its own."""
    x = np.asarray(x, dtype=np.float64)
    y_star = np.asarray(y_star, dtype=np.float64)
    if y_star.ndim < x.ndim:
        extra = x.ndim - y_star.ndim
        y_star = y_star.reshape(*y_star.shape[:-1], *(1,) * extra, y_star.shape[-1])
        y_star = np.broadcast_to(y_star, (*x.shape[:-1], y_star.shape[-1]))
    return x.reshape(-1, x.shape[-1]), y_star.reshape(-1, y_star.shape[-1])


def linear_forward(x, W, b=None):
    """Section 2: z = W x + b, for every row of x."""
    return np.asarray(x, dtype=np.float64) @ W.T + _bias(b)


def linear_local_loss(x, W, b, y_star, P, sigma, loss="l2", transform="none"):
    """Sections 2 and 3: the local loss of a Linear block, mean over samples and sum over units."""
    x, y_star = _rows(x, y_star)
    y = activation(sigma, linear_forward(x, W, b))
    return float(np.mean(sample_loss(loss, y, target(P, y_star, transform, sigma), P, y_star)))


def linear_delta(z, y_star, P, sigma, loss="l2", transform="none"):
    """Section 2: delta = dl/dy * sigma'(z) of every sample, not divided by the number of samples."""
    t = target(P, y_star, transform, sigma)
    return sample_error(loss, activation(sigma, z), t, P, y_star) * activation_derivative(sigma, z)


def linear_weight_gradients(delta, x, b=None):
    """Sections 2 and 3: dW = delta^T x / n, db = mean of delta (None for a layer without bias)."""
    n = x.shape[0]
    return delta.T @ x / n, None if b is None else delta.mean(axis=0)


def linear_gradients(x, W, b, y_star, P, sigma, loss="l2", transform="none"):
    """Sections 2 and 3: (dW, db) of the local loss of a hidden Linear block.

    Ambiguous: with extra leading dimensions n is the number of rows after flattening (samples times steps), as
    "flattened into the batch" says.
    """
    x, y_star = _rows(x, y_star)
    delta = linear_delta(linear_forward(x, W, b), y_star, P, sigma, loss, transform)
    return linear_weight_gradients(delta, x, b)


# ---------------------------------------------------------------- last layer


def true_loss(kind, output, y_star):
    """Section 2, "Last layer": the true loss on the true labels, mean over samples.

    Ambiguous, as the criterion is the user's: cross_entropy is -sum_k y*_k log softmax(output)_k, mean over samples;
    mse is the mean over samples and outputs, as frameworks define it. A pair of callables (per-sample loss, its
    derivative) of (output, y_star) is used as it is.
    """
    output, y_star = _rows(output, y_star)
    if not isinstance(kind, str):
        return float(np.mean(kind[0](output, y_star)))
    if kind == "cross_entropy":
        return float(np.mean(-np.sum(y_star * _log_softmax(output), axis=-1)))
    if kind == "mse":
        return float(np.mean((output - y_star) ** 2))
    raise ValueError(f"unknown loss {kind!r}")


def true_error(kind, output, y_star):
    """Section 2, "Last layer": derivative of every sample's true loss by the output, not divided by n."""
    output, y_star = _rows(output, y_star)
    if not isinstance(kind, str):
        return kind[1](output, y_star)
    if kind == "cross_entropy":
        return _softmax(output) * np.sum(y_star, axis=-1, keepdims=True) - y_star
    if kind == "mse":
        return 2.0 * (output - y_star) / output.shape[-1]
    raise ValueError(f"unknown loss {kind!r}")


def last_linear_gradients(x, W, b, y_star, loss="cross_entropy", sigma="identity"):
    """Section 2, "Last layer": (dW, db) of the true loss, of the last layer only; x is detached."""
    x, y_star = _rows(x, y_star)
    z = linear_forward(x, W, b)
    delta = true_error(loss, activation(sigma, z), y_star) * activation_derivative(sigma, z)
    return linear_weight_gradients(delta, x, b)


# ---------------------------------------------------------------- Conv1d, Conv2d


def _tuple(value, d):
    return (value,) * d if isinstance(value, int) else tuple(value)


def patches(x, kernel, stride=1, padding=0, dilation=1):
    """Section 3, Conv: the unfolded input, of shape (n, in_ch, *kernel, *out), zero-padded; 1d or 2d."""
    x = np.asarray(x, dtype=np.float64)
    d = len(kernel)
    stride, padding, dilation = _tuple(stride, d), _tuple(padding, d), _tuple(dilation, d)
    x = np.pad(x, ((0, 0), (0, 0), *((p, p) for p in padding)))
    out = tuple((x.shape[2 + a] - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1 for a in range(d))
    unfolded = np.zeros((*x.shape[:2], *kernel, *out))
    for offset in np.ndindex(*kernel):
        start = [offset[a] * dilation[a] for a in range(d)]
        window = tuple(slice(start[a], start[a] + stride[a] * (out[a] - 1) + 1, stride[a]) for a in range(d))
        unfolded[(slice(None), slice(None), *offset)] = x[(slice(None), slice(None), *window)]
    return unfolded


def _grouped_patches(x, kernel, stride, padding, dilation, groups):
    # (n, group, in_ch of the group, kernel entry, position), and the shape of the output's space
    unfolded = patches(x, kernel, stride, padding, dilation)
    n, channels = unfolded.shape[:2]
    space = unfolded.shape[2 + len(kernel) :]
    return unfolded.reshape(n, groups, channels // groups, math.prod(kernel), math.prod(space)), space


def conv_forward(x, W, b=None, stride=1, padding=0, dilation=1, groups=1):
    """Section 3, Conv: z = W * x + b (cross-correlation), W of shape (out_ch, in_ch / groups, *kernel)."""
    unfolded, space = _grouped_patches(x, W.shape[2:], stride, padding, dilation, groups)
    weight = W.reshape(groups, W.shape[0] // groups, W.shape[1], -1)
    z = np.einsum("ngckp,gock->ngop", unfolded, weight).reshape(unfolded.shape[0], W.shape[0], *space)
    return z if b is None else z + b.reshape(-1, *(1,) * len(space))


def conv_weight_gradients(delta, x, W, b=None, stride=1, padding=0, dilation=1, groups=1):
    """Section 3, Conv: (dW, db) from delta, mean over the batch, sum over positions."""
    n = delta.shape[0]
    unfolded, space = _grouped_patches(x, W.shape[2:], stride, padding, dilation, groups)
    grouped = delta.reshape(n, groups, W.shape[0] // groups, -1)
    dW = np.einsum("ngop,ngckp->gock", grouped, unfolded).reshape(W.shape) / n
    return dW, None if b is None else delta.sum(axis=(0, *range(2, 2 + len(space)))) / n


def _conv_rows(y, y_star, P, conv_target):
    # the map as rows of units (last axis) with a P of shape (..., out_ch, c) and labels that broadcast to them
    y_star = np.asarray(y_star, dtype=np.float64)
    space = y.shape[2:]
    if conv_target == "full":
        P_rows = np.moveaxis(np.moveaxis(P, 0, -1), 0, -2)
        return np.moveaxis(y, 1, -1), y_star.reshape(y_star.shape[0], *(1,) * len(space), -1), P_rows
    if conv_target == "channel":
        return y.mean(axis=tuple(range(2, y.ndim))), y_star, np.asarray(P).T
    raise ValueError(f"unknown conv_target {conv_target!r}")


def conv_map_loss(y, y_star, P, sigma, loss="l2", transform="none", conv_target="full"):
    """Section 3, Conv: the local loss of the activated map y, taken before any pooling.

    "full": the sum over channels of every position against its own target, mean over positions and samples;
    "channel": the map averaged over space against P of shape (c, out_ch). Ambiguous for the losses that are no sum
    over units (cosine, readout): in "full" each position's channel vector is one term of the mean over positions.
    """
    rows, labels, P_rows = _conv_rows(y, y_star, P, conv_target)
    labels = np.broadcast_to(labels, (*rows.shape[:-1], labels.shape[-1]))
    return float(np.mean(sample_loss(loss, rows, target(P_rows, labels, transform, sigma), P_rows, labels)))


def conv_delta(z, y_star, P, sigma, loss="l2", transform="none", conv_target="full"):
    """Sections 2 and 3, Conv: delta = dl/dy * sigma'(z) of every sample, of z's shape.

    Both targets divide by the number of positions: "full" by the mean of the loss, "channel" by the mean of the map.
    """
    y = activation(sigma, z)
    positions = math.prod(y.shape[2:])
    rows, labels, P_rows = _conv_rows(y, y_star, P, conv_target)
    labels = np.broadcast_to(labels, (*rows.shape[:-1], labels.shape[-1]))
    error = sample_error(loss, rows, target(P_rows, labels, transform, sigma), P_rows, labels) / positions
    if conv_target == "full":
        return np.moveaxis(error, -1, 1) * activation_derivative(sigma, z)
    return error.reshape(*error.shape, *(1,) * (y.ndim - 2)) * activation_derivative(sigma, z)


def conv_local_loss(x, W, b, y_star, P, sigma, loss="l2", transform="none", conv_target="full", **geometry):
    """Section 3, Conv: the local loss of a Conv1d or Conv2d block; geometry as in conv_forward."""
    y = activation(sigma, conv_forward(x, W, b, **geometry))
    return conv_map_loss(y, y_star, P, sigma, loss, transform, conv_target)


def conv_gradients(x, W, b, y_star, P, sigma, loss="l2", transform="none", conv_target="full", **geometry):
    """Sections 2 and 3, Conv: (dW, db) of the local loss of a hidden Conv1d or Conv2d block."""
    delta = conv_delta(conv_forward(x, W, b, **geometry), y_star, P, sigma, loss, transform, conv_target)
    return conv_weight_gradients(delta, x, W, b, **geometry)


def pool(y, kind, size):
    """Section 2: pooling comes after the layer's activation and after its local loss; windows do not overlap."""
    d = y.ndim - 2
    out = tuple(length // size for length in y.shape[2:])
    windows = []
    for offset in np.ndindex(*(size,) * d):
        cut = tuple(slice(offset[a], offset[a] + size * (out[a] - 1) + 1, size) for a in range(d))
        windows.append(y[(slice(None), slice(None), *cut)])
    if kind == "max":
        return np.max(windows, axis=0)
    if kind == "mean":
        return np.mean(windows, axis=0)
    raise ValueError(f"unknown pooling {kind!r}")


# ---------------------------------------------------------------- DRTP, DFA


def drtp_signal(y_star, B):
    """Section 2, DRTP: onehot @ B, of shape (n, out) or (n, out_ch, *space)."""
    return np.tensordot(np.asarray(y_star, dtype=np.float64), np.asarray(B, dtype=np.float64), axes=(1, 0))


def drtp_delta(z, y_star, B, sigma):
    """Section 2, DRTP: delta = (onehot @ B) * sigma'(z), with a plus sign, without the residual term.

    It is TPSGD's l2 delta with P = -B^T, less the term y * sigma'(z).
    """
    return drtp_signal(y_star, B) * activation_derivative(sigma, z)


def drtp_linear_gradients(x, W, b, y_star, B, sigma):
    """Section 2, DRTP: (dW, db) of a hidden Linear layer.

    Ambiguous: whether the hidden gradients are averaged or summed over the batch; here averaged, as for every dW.
    """
    x, y_star = _rows(x, y_star)
    return linear_weight_gradients(drtp_delta(linear_forward(x, W, b), y_star, B, sigma), x, b)


def drtp_conv_gradients(x, W, b, y_star, B, sigma, **geometry):
    """Section 2, DRTP: (dW, db) of a hidden convolution, hooked after the activation and before the pooling.

    Ambiguous: delta is not divided by the number of positions, as DRTP's formula has no such mean (unlike section 3).
    """
    delta = drtp_delta(conv_forward(x, W, b, **geometry), y_star, B, sigma)
    return conv_weight_gradients(delta, x, W, b, **geometry)


def dfa_signal(y_out, y_star, B):
    """Section 2: DFA, (y_out - onehot) @ B."""
    return drtp_signal(np.asarray(y_out, dtype=np.float64) - y_star, B)


def sdfa_signal(y_out, y_star, B, sign_of="product"):
    """Section 2: sDFA, "its sign".

    Ambiguous: the sign of the whole DFA signal ("product", the literal reading, the default) or that of the output
    error before it is projected ("error").
    """
    if sign_of == "product":
        return np.sign(dfa_signal(y_out, y_star, B))
    return drtp_signal(np.sign(np.asarray(y_out, dtype=np.float64) - y_star), B)


# ---------------------------------------------------------------- RNN, LSTM, GRU

# params = (W_ih, W_hh, b_ih, b_hh), gates stacked along the first axis: LSTM i, f, g, o; GRU r, z, n


def _split(a, k):
    return np.split(a, k, axis=1)


def rnn_cell(x, state, params, sigma="tanh"):
    """Section 3, RNN: h' = sigma(W_ih x + b_ih + W_hh h + b_hh)."""
    W_ih, W_hh, b_ih, b_hh = params
    (h,) = state
    return (activation(sigma, x @ W_ih.T + b_ih + h @ W_hh.T + b_hh),)


def rnn_cell_delta(x, state, params, grad, sigma="tanh"):
    """Section 3, RNN: derivatives by W_ih x + b_ih, by W_hh h + b_hh, and by the old state besides the latter."""
    W_ih, W_hh, b_ih, b_hh = params
    (h,) = state
    (dh,) = grad
    delta = dh * activation_derivative(sigma, x @ W_ih.T + b_ih + h @ W_hh.T + b_hh)
    return delta, delta, (np.zeros_like(h),)


def _lstm_gates(x, h, params):
    W_ih, W_hh, b_ih, b_hh = params
    i, f, g, o = _split(x @ W_ih.T + b_ih + h @ W_hh.T + b_hh, 4)
    return _sigmoid(i), _sigmoid(f), np.tanh(g), _sigmoid(o)


def lstm_cell(x, state, params):
    """Section 3, LSTM: c' = f c + i g, h' = o tanh(c')."""
    h, c = state
    i, f, g, o = _lstm_gates(x, h, params)
    c_new = f * c + i * g
    return o * np.tanh(c_new), c_new


def lstm_cell_delta(x, state, params, grad):
    """Section 3, LSTM: as rnn_cell_delta; the state is (h, c)."""
    h, c = state
    dh, dc = grad
    i, f, g, o = _lstm_gates(x, h, params)
    tanh_c = np.tanh(f * c + i * g)
    dc = dc + dh * o * (1.0 - tanh_c**2)
    gates = (dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g**2), dh * tanh_c * o * (1 - o))
    delta = np.concatenate(gates, axis=1)
    return delta, delta, (np.zeros_like(h), dc * f)


def _gru_gates(x, h, params):
    W_ih, W_hh, b_ih, b_hh = params
    x_r, x_z, x_n = _split(x @ W_ih.T + b_ih, 3)
    h_r, h_z, h_n = _split(h @ W_hh.T + b_hh, 3)
    r = _sigmoid(x_r + h_r)
    return r, _sigmoid(x_z + h_z), np.tanh(x_n + r * h_n), h_n


def gru_cell(x, state, params):
    """Section 3, GRU: n = tanh(W_in x + b_in + r (W_hn h + b_hn)), h' = (1 - z) n + z h.

    Ambiguous: where the reset gate acts; here on the hidden term with its bias, as the framework of section 4 does.
    """
    (h,) = state
    _, z, n, _ = _gru_gates(x, h, params)
    return ((1.0 - z) * n + z * h,)


def gru_cell_delta(x, state, params, grad):
    """Section 3, GRU: as rnn_cell_delta; the two derivatives differ in the block of n by the factor r."""
    (h,) = state
    (dh,) = grad
    r, z, n, h_n = _gru_gates(x, h, params)
    delta_n = dh * (1.0 - z) * (1.0 - n**2)
    delta_z = dh * (h - n) * z * (1.0 - z)
    delta_r = delta_n * h_n * r * (1.0 - r)
    by_input = np.concatenate((delta_r, delta_z, delta_n), axis=1)
    by_hidden = np.concatenate((delta_r, delta_z, delta_n * r), axis=1)
    return by_input, by_hidden, (dh * z,)


def _relu_cell(x, state, params):
    return rnn_cell(x, state, params, "relu")


def _relu_cell_delta(x, state, params, grad):
    return rnn_cell_delta(x, state, params, grad, "relu")


# cell: (step, its derivative, number of states, sigma of target_transform="activation")
CELLS = {
    "rnn": (rnn_cell, rnn_cell_delta, 1, "tanh"),
    "rnn_relu": (_relu_cell, _relu_cell_delta, 1, "relu"),
    "lstm": (lstm_cell, lstm_cell_delta, 2, "tanh"),
    "gru": (gru_cell, gru_cell_delta, 1, "tanh"),
}


def recurrent_states(cell, x, params):
    """Section 3: the states before step 0, 1, ..., T of one layer; the first is 0 (the specification names none)."""
    x = np.asarray(x, dtype=np.float64)
    step, _, parts, _ = CELLS[cell]
    states = [tuple(np.zeros((x.shape[0], params[1].shape[1])) for _ in range(parts))]
    for time in range(x.shape[1]):
        states.append(step(x[:, time], states[-1], params))
    return states


def recurrent_forward(cell, x, params):
    """Section 3: the hidden states of every step, (n, T, hidden), of x of shape (n, T, in)."""
    return np.stack([state[0] for state in recurrent_states(cell, x, params)[1:]], axis=1)


def recurrent_local_loss(cell, h, y_star, P, loss="l2", transform="none"):
    """Section 3, RNN/LSTM/GRU: the local loss, on the last hidden state for y_star of shape (n, c).

    Sequence labelling, y_star of shape (n, T, c): every step's hidden state against its own label. Ambiguous: sum or
    mean over steps; here the mean over samples and steps, as for flattened sequences. Ambiguous: the activation of
    target_transform="activation" in LSTM and GRU; here tanh.
    """
    y = h[:, -1] if np.ndim(y_star) == 2 else h
    return float(np.mean(sample_loss(loss, y, target(P, y_star, transform, CELLS[cell][3]), P, y_star)))


def recurrent_error(cell, h, y_star, P, loss="l2", transform="none"):
    """Section 3, RNN/LSTM/GRU: derivative of the mean local loss by every step's hidden state, of h's shape.

    The mean's divisor is included: n for the last step, n T for sequence labelling. There is no factor sigma'(z)
    here: the hidden state is the layer's y, and its nonlinearities lie inside the cell.
    """
    t = target(P, y_star, transform, CELLS[cell][3])
    if np.ndim(y_star) == 3:
        return sample_error(loss, h, t, P, y_star) / (h.shape[0] * h.shape[1])
    error = np.zeros_like(h)
    error[:, -1] = sample_error(loss, h[:, -1], t, P, y_star) / h.shape[0]
    return error


def recurrent_backward(cell, x, params, error, one_step=False):
    """Section 3: ((dW_ih, dW_hh, db_ih, db_hh), dx) from the derivative by every step's hidden state.

    Back-propagation through this layer's own steps. one_step: "truncated to one step", the state that enters a step
    is a constant, so only steps with an error of their own count, each by itself. dx is only for an embedding in the
    same block; it never reaches a lower block.
    """
    x = np.asarray(x, dtype=np.float64)
    W_ih, W_hh = params[:2]
    states = recurrent_states(cell, x, params)
    dW_ih, dW_hh, db_ih, db_hh = (np.zeros_like(p) for p in params)
    dx = np.zeros_like(x)
    zero = tuple(np.zeros_like(part) for part in states[0])
    carry = zero
    for time in reversed(range(x.shape[1])):
        grad = (carry[0] + error[:, time], *carry[1:])
        by_input, by_hidden, direct = CELLS[cell][1](x[:, time], states[time], params, grad)
        dW_ih += by_input.T @ x[:, time]
        dW_hh += by_hidden.T @ states[time][0]
        db_ih += by_input.sum(axis=0)
        db_hh += by_hidden.sum(axis=0)
        dx[:, time] = by_input @ W_ih
        carry = zero if one_step else (direct[0] + by_hidden @ W_hh, *direct[1:])
    return (dW_ih, dW_hh, db_ih, db_hh), dx


def recurrent_gradients(cell, x, params, y_star, P, loss="l2", transform="none", one_step=False):
    """Section 3: (dW_ih, dW_hh, db_ih, db_hh) of the local loss of one recurrent layer, x detached."""
    error = recurrent_error(cell, recurrent_forward(cell, x, params), y_star, P, loss, transform)
    return recurrent_backward(cell, x, params, error, one_step)[0]


# ---------------------------------------------------------------- blocks with more than one parametrised part


def normalise(z, axes, eps=1e-5):
    """Section 3, "Norm layers": (z - mean) / sqrt(var + eps) over axes, biased variance; also the divisor.

    Axis 0 (and the space axes) is batch norm in training mode, the last axis is layer norm. The specification gives
    no formula: this is the usual one.
    """
    std = np.sqrt(z.var(axis=axes, keepdims=True) + eps)
    return (z - z.mean(axis=axes, keepdims=True)) / std, std


def normalise_backward(grad, z_hat, std, axes):
    """Section 3, "Norm layers": "ordinary autograd inside the block", written out for normalise."""
    mean = grad.mean(axis=axes, keepdims=True)
    return (grad - mean - z_hat * np.mean(grad * z_hat, axis=axes, keepdims=True)) / std


def linear_norm_gradients(x, W, b, gain, shift, y_star, P, sigma, axis, loss="l2", transform="none", eps=1e-5):
    """Section 3, "Norm layers": (dW, db, dgain, dshift) of Linear, norm over `axis` of (n, o), activation.

    The activation is "applied directly after it (through normalisation)": y = sigma(gain z_hat + shift).
    """
    n = x.shape[0]
    z_hat, std = normalise(linear_forward(x, W, b), axis, eps)
    delta = linear_delta(gain * z_hat + shift, y_star, P, sigma, loss, transform)
    dz = normalise_backward(delta * gain, z_hat, std, axis)
    dW, db = linear_weight_gradients(dz, x, b)
    return dW, db, np.sum(delta * z_hat, axis=0) / n, np.sum(delta, axis=0) / n


def conv_batch_norm_gradients(
    x, W, b, gain, shift, y_star, P, sigma, loss="l2", transform="none", conv_target="full", eps=1e-5, **geometry
):
    """Section 3, "Norm layers": (dW, db, dgain, dshift) of convolution, batch norm in training mode, activation."""
    n = x.shape[0]
    z = conv_forward(x, W, b, **geometry)
    axes = (0, *range(2, z.ndim))
    per_channel = (-1, *(1,) * (z.ndim - 2))
    z_hat, std = normalise(z, axes, eps)
    u = gain.reshape(per_channel) * z_hat + shift.reshape(per_channel)
    delta = conv_delta(u, y_star, P, sigma, loss, transform, conv_target)
    dz = normalise_backward(delta * gain.reshape(per_channel), z_hat, std, axes)
    dW, db = conv_weight_gradients(dz, x, W, b, **geometry)
    return dW, db, np.sum(delta * z_hat, axis=axes) / n, np.sum(delta, axis=axes) / n


def _embedding_gradient(tokens, table, dx):
    gradient = np.zeros_like(table)
    np.add.at(gradient, tokens, dx)
    return gradient


def embedding_linear_gradients(tokens, table, W, b, y_star, P, sigma, loss="l2", transform="none"):
    """Section 3, "embeddings": (dtable, dW, db) of an embedding and the Linear block that it belongs to."""
    x, labels = _rows(table[tokens], y_star)
    delta = linear_delta(linear_forward(x, W, b), labels, P, sigma, loss, transform)
    dtable = _embedding_gradient(np.ravel(tokens), table, delta @ W / x.shape[0])
    return dtable, *linear_weight_gradients(delta, x, b)


def embedding_recurrent_gradients(cell, tokens, table, params, y_star, P, loss="l2", transform="none", one_step=False):
    """Section 3, "embeddings": (dtable, (dW_ih, dW_hh, db_ih, db_hh)) of an embedding and its recurrent block."""
    x = table[tokens]
    error = recurrent_error(cell, recurrent_forward(cell, x, params), y_star, P, loss, transform)
    grads, dx = recurrent_backward(cell, x, params, error, one_step)
    return _embedding_gradient(tokens, table, dx), grads


def residual_linear_gradients(x, skip, W, b, y_star, P, sigma, loss="l2", transform="none"):
    """Section 3, "Residual additions": (dW, db) of y = sigma(W x + b) + skip, skip detached.

    Ambiguous: whether an activation follows the addition; here none, "the block's output is the sum".
    """
    z = linear_forward(x, W, b)
    y = activation(sigma, z) + skip
    error = sample_error(loss, y, target(P, y_star, transform, sigma), P, y_star)
    return linear_weight_gradients(error * activation_derivative(sigma, z), x, b)


# ---------------------------------------------------------------- updates


def sgd_update(params, grads, lr):
    """Section 2: W <- W - lr dW, for every parameter that has a gradient."""
    return tuple(p if g is None else p - lr * g for p, g in zip(params, grads, strict=True))


def nesterov_update(param, grad, velocity, lr, momentum=0.9):
    """Section 2, DRTP's default: SGD with Nesterov momentum; (new parameter, new velocity).

    Ambiguous: the formula is not given; here v <- momentum v + g, W <- W - lr (g + momentum v), with v = 0 at first.
    """
    velocity = momentum * velocity + grad
    return param - lr * (grad + momentum * velocity), velocity


def _rates(lr, blocks):
    # section 4, per_layer_lr: one rate, or one per block in order
    return np.broadcast_to(np.asarray(lr, dtype=np.float64), (blocks,))


# ---------------------------------------------------------------- whole nets

# rule: "tpsgd", "drtp" (the projections are B then) or "head_only" (section 2's control: hidden layers not trained)


def _hidden_linear(rule, x, W, b, y_star, P, sigma, loss, transform):
    if rule == "tpsgd":
        return linear_gradients(x, W, b, y_star, P, sigma, loss, transform)
    if rule == "drtp":
        return drtp_linear_gradients(x, W, b, y_star, P, sigma)
    if rule == "head_only":
        return None, None
    raise ValueError(f"unknown rule {rule!r}")


def mlp_gradients(
    x, y_star, layers, projections, sigma, loss="l2", last_loss="cross_entropy", transform="none", rule="tpsgd"
):
    """Sections 2 and 4: [(dW, db), ...] of an MLP of Linear layers [(W, b), ...], one projection per hidden layer.

    One forward pass; every input is detached. With a single layer it is the gradient of the true loss (section 6).
    """
    grads = []
    for (W, b), P in zip(layers[:-1], projections, strict=True):
        grads.append(_hidden_linear(rule, x, W, b, y_star, P, sigma, loss, transform))
        x = activation(sigma, linear_forward(x, W, b))
    grads.append(last_linear_gradients(x, *layers[-1], y_star, last_loss))
    return grads


def mlp_step(x, y_star, layers, projections, lr, sigma, **options):
    """Sections 2 and 4: the MLP's layers after one step of SGD; lr is one rate or one per layer.

    Later blocks see the outputs of the old weights, so update_in_forward gives the same (section 6).
    """
    grads = mlp_gradients(x, y_star, layers, projections, sigma, **options)
    return [sgd_update(p, g, r) for p, g, r in zip(layers, grads, _rates(lr, len(layers)), strict=True)]


def conv_net_gradients(
    x,
    y_star,
    convs,
    linears,
    projections,
    sigma,
    loss="l2",
    last_loss="cross_entropy",
    transform="none",
    conv_target="full",
    rule="tpsgd",
):
    """Sections 2 to 4: gradients of convolutions, then flattening, then Linear layers, in order: [(dW, db), ...].

    convs: dicts with "W", "b", optionally "geometry" (arguments of conv_forward) and "pool" (kind, size), the pooling
    after the activation and after the local loss. linears: [(W, b), ...], the last one is the output layer.
    projections: one per convolution and per hidden Linear layer.
    """
    grads = []
    for conv, P in zip(convs, projections[: len(convs)], strict=True):
        W, b, geometry = conv["W"], conv["b"], conv.get("geometry", {})
        if rule == "tpsgd":
            grads.append(conv_gradients(x, W, b, y_star, P, sigma, loss, transform, conv_target, **geometry))
        elif rule == "drtp":
            grads.append(drtp_conv_gradients(x, W, b, y_star, P, sigma, **geometry))
        else:
            grads.append((None, None))
        x = activation(sigma, conv_forward(x, W, b, **geometry))
        if conv.get("pool") is not None:
            x = pool(x, *conv["pool"])
    x = x.reshape(x.shape[0], -1)
    return grads + mlp_gradients(x, y_star, linears, projections[len(convs) :], sigma, loss, last_loss, transform, rule)


def conv_net_step(x, y_star, convs, linears, projections, lr, sigma, **options):
    """Sections 2 to 4: (convs, linears) after one step of SGD; lr is one rate or one per layer."""
    grads = conv_net_gradients(x, y_star, convs, linears, projections, sigma, **options)
    params = [(conv["W"], conv["b"]) for conv in convs] + list(linears)
    new = [sgd_update(p, g, r) for p, g, r in zip(params, grads, _rates(lr, len(params)), strict=True)]
    new_convs = [{**conv, "W": W, "b": b} for conv, (W, b) in zip(convs, new[: len(convs)], strict=True)]
    return new_convs, new[len(convs) :]


def recurrent_net_gradients(
    cell,
    x,
    y_star,
    layers,
    head,
    projections,
    loss="l2",
    last_loss="cross_entropy",
    transform="none",
    one_step=False,
    rule="tpsgd",
):
    """Sections 2 to 4: gradients of stacked recurrent layers and a Linear output layer, in order.

    layers: [(W_ih, W_hh, b_ih, b_hh), ...], each with its own projection; the lower layer's output sequence, detached,
    is the next one's input. head: (W, b), on the last hidden state for y_star of shape (n, c), on every step's for
    sequence labels of shape (n, T, c). DRTP is not defined here: rule is "tpsgd" or "head_only".
    """
    grads = []
    for params, P in zip(layers, projections, strict=True):
        if rule == "tpsgd":
            grads.append(recurrent_gradients(cell, x, params, y_star, P, loss, transform, one_step))
        elif rule == "head_only":
            grads.append((None,) * 4)
        else:
            raise ValueError(f"unknown rule {rule!r}")
        x = recurrent_forward(cell, x, params)
    features = x[:, -1] if np.ndim(y_star) == 2 else x
    grads.append(last_linear_gradients(features, *head, y_star, last_loss))
    return grads


def recurrent_net_step(cell, x, y_star, layers, head, projections, lr, **options):
    """Sections 2 to 4: (layers, head) after one step of SGD; lr is one rate or one per layer, the head's last."""
    grads = recurrent_net_gradients(cell, x, y_star, layers, head, projections, **options)
    params = [*layers, head]
    new = [sgd_update(p, g, r) for p, g, r in zip(params, grads, _rates(lr, len(params)), strict=True)]
    return new[:-1], new[-1]

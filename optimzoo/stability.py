"""Learning rates from eigenvalues: of a quadratic, and of batches of any size; functions of numbers.

The laws of batch size are those of Granziol, Zohren and Roberts, JMLR 2022, https://arxiv.org/abs/2006.09092.
"""

from __future__ import annotations

import math

from optimzoo.optimizer import check_number

# Batch laws


def max_learning_rate(
    batch_size: float,
    *,
    kind: str = "sgd",
    reference_batch: float,
    reference_lr: float,
    law: str | None = None,
    dataset_size: float = math.inf,
    eigenvalue: float | None = None,
    noise: float | None = None,
) -> float:
    r"""The learning rate that is to another batch size what ``reference_lr`` is to ``reference_batch``.

    Args:
        batch_size: samples in a batch, > 0.
        kind: ``"sgd"``, or ``"adaptive"`` for methods that divide by the root of their curvature estimate, as Adam.
        reference_batch, reference_lr: a batch size and the learning rate that is right for it, > 0.
        law: ``"linear"``, the default of ``"sgd"``; ``"sqrt"``, the default of ``"adaptive"``; or ``"saturating"``:
            in inverse proportion to :func:`batch_eigenvalue`. With :math:`c` the noise that goes with the root of the
            batch up to :math:`c / \lambda^2`, where the eigenvalue drowns, then ever more slowly to a constant; with
            ``"adaptive"`` with the root of all that.
        dataset_size: samples that batches are drawn from without replacement. Default: infinite.
        eigenvalue, noise: for ``"saturating"``, the largest eigenvalue of the whole Hessian and the noise
            :math:`P s^2`, from :func:`fit_noise` or :func:`optimzoo.curvature.noise`.
    """
    if kind not in ("sgd", "adaptive"):
        raise ValueError(f"kind must be 'sgd' or 'adaptive', got {kind!r}")
    law = {"sgd": "linear", "adaptive": "sqrt"}[kind] if law is None else law
    if law not in ("linear", "sqrt", "saturating"):
        raise ValueError(f"law must be 'linear', 'sqrt' or 'saturating', got {law!r}")
    check_number("reference_lr", reference_lr, 0.0, math.inf, "finite and > 0", above=True)
    b = effective_batch(batch_size, dataset_size)
    reference = effective_batch(reference_batch, dataset_size, "reference_batch")
    if law != "saturating":
        if math.inf in (b, reference):
            raise ValueError(f"law must be 'saturating' for a batch of the whole dataset, got {law!r}")
        ratio = b / reference
        return reference_lr * (ratio if law == "linear" else math.sqrt(ratio))
    if eigenvalue is None or noise is None:
        raise ValueError(f"law='saturating' needs eigenvalue and noise, got {eigenvalue!r} and {noise!r}")
    ratio = batch_eigenvalue(eigenvalue, noise, reference) / batch_eigenvalue(eigenvalue, noise, b)
    return reference_lr * (ratio if kind == "sgd" else math.sqrt(ratio))


def effective_batch(batch_size: float, dataset_size: float = math.inf, name: str = "batch_size") -> float:
    """B / (1 - B/N), the batch with replacement that is as noisy as B of N samples without; infinite for all."""
    if dataset_size != math.inf:
        check_number("dataset_size", dataset_size, 0.0, math.inf, "> 0", above=True)
    check_number(name, batch_size, 0.0, math.inf, "finite, > 0 and at most dataset_size", above=True)
    if batch_size > dataset_size:
        raise ValueError(f"{name} must be finite, > 0 and at most dataset_size, {dataset_size!r}, got {batch_size!r}")
    return math.inf if batch_size == dataset_size else batch_size / (1 - batch_size / dataset_size)


def batch_eigenvalue(eigenvalue: float, noise: float, batch: float) -> float:
    r"""Where an eigenvalue of the whole Hessian is found in the Hessian of a batch, if the noise is additive.

    :math:`\lambda + c / (b\lambda)` if that is above the bulk of the noise, else the bulk's edge :math:`2\sqrt{c/b}`,
    with :math:`c = P s^2`. The eigenvectors overlap by :math:`1 - c / (b\lambda^2)`, or not at all.
    """
    check_number("eigenvalue", eigenvalue, 0.0, math.inf, "finite and > 0", above=True)
    check_number("noise", noise, 0.0, math.inf, "finite and >= 0")
    if batch != math.inf:
        check_number("batch", batch, 0.0, math.inf, "> 0", above=True)
    variance = noise / batch
    return eigenvalue + variance / eigenvalue if eigenvalue**2 > variance else 2 * math.sqrt(variance)


def spiked_eigenvalue(eigenvalue: float, ratio: float) -> float:
    r"""The same if the noise is multiplicative (Gauss-Newton), with a bulk of one and ``ratio`` = P / b = q.

    :math:`l (1 + q / (l - 1))` if :math:`l > 1 + \sqrt q`, else the edge :math:`(1 + \sqrt q)^2`.
    """
    check_number("eigenvalue", eigenvalue, 0.0, math.inf, "finite and > 0", above=True)
    check_number("ratio", ratio, 0.0, math.inf, "finite and >= 0")
    root = math.sqrt(ratio)
    return eigenvalue * (1 + ratio / (eigenvalue - 1)) if eigenvalue > 1 + root else (1 + root) ** 2


def fit_noise(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """Eigenvalue of the whole Hessian and noise from two pairs of effective batch size and largest eigenvalue.

    The inverse of :func:`batch_eigenvalue`, whether the eigenvalue drowns in the noise of the smaller batch or not.
    Where it drowns in both, the largest values go with the root of the batch and do not tell it: an error.
    """
    for which, pair in (("first", first), ("second", second)):
        for what, number in zip(("batch", "eigenvalue"), pair, strict=True):
            check_number(f"{which} {what}", number, 0.0, math.inf, "finite and > 0", above=True)
    (b1, top1), (b2, top2) = sorted((first, second))
    if not (b1 < b2 and top2 <= top1 and b2 * top2**2 > (1 + 1e-9) * b1 * top1**2):
        raise ValueError(
            "the larger batch must have the smaller eigenvalue, by less than the root of the batches' ratio, "
            f"got {first}, {second}"
        )
    eigenvalue = (b2 * top2 - b1 * top1) / (b2 - b1)
    noise = eigenvalue * (top1 - top2) / (1 / b1 - 1 / b2)
    if b1 * eigenvalue**2 < noise:  # top1 is the bulk's edge
        noise = b1 * top1**2 / 4
        eigenvalue = (top2 + math.sqrt(top2**2 - 4 * noise / b2)) / 2
    return eigenvalue, noise


# A quadratic


def heavy_ball(
    largest: float, smallest: float, *, nesterov: bool = False, max_momentum: float = 1.0
) -> tuple[float, float]:
    r"""Learning rate and momentum that are best for a quadratic with eigenvalues from ``smallest`` to ``largest``.

    .. math::
        \sqrt\rho = \frac{\sqrt L - \sqrt\mu}{\sqrt L + \sqrt\mu}, \qquad
        \gamma = \frac{(1 + \sqrt\rho)^2}{L} = \left(\frac{2}{\sqrt L + \sqrt\mu}\right)^2

    in the convention of ``torch.optim.SGD``, and :math:`\rho = \frac{\sqrt L - \sqrt\mu}{\sqrt L + \sqrt\mu},
    \gamma = 1 / L` for ``nesterov``. Where ``max_momentum`` cuts the momentum, the rate is that for the momentum cut.
    """
    check_number("largest", largest, 0.0, math.inf, "finite and > 0", above=True)
    check_number("smallest", smallest, 0.0, math.nextafter(largest, math.inf), f"in [0, {largest!r}], the largest")
    check_number("max_momentum", max_momentum, 0.0, math.nextafter(1.0, 2.0), "in [0, 1]")
    root = (math.sqrt(largest) - math.sqrt(smallest)) / (math.sqrt(largest) + math.sqrt(smallest))
    if nesterov:
        return 1 / largest, min(root, max_momentum)
    momentum = min(root**2, max_momentum)
    return (1 + math.sqrt(momentum)) ** 2 / largest, momentum


def stability_bound(largest: float, momentum: float, *, nesterov: bool = False) -> float:
    r"""The learning rate at which heavy ball diverges, :math:`2 (1 + \rho) / L`; over :math:`1 + 2\rho`, Nesterov's."""
    check_number("largest", largest, 0.0, math.inf, "finite and > 0", above=True)
    check_number("momentum", momentum, 0.0, 1.0, "in [0, 1)")
    return 2 * (1 + momentum) / (largest * (1 + 2 * momentum if nesterov else 1))

"""Curvature of a loss: operators that multiply vectors, and algorithms that learn a spectrum from products alone.

An operator has ``shape``, ``dtype``, ``device`` and ``@``. A symmetric matrix has them too, so that the algorithms take
either. Vectors are flat: the parameters one after another.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from optimzoo.closure import check_loss
from optimzoo.optimizer import check_int, check_number, local

Closure: TypeAlias = Callable[[], Any]

_ONCE = once_differentiable(lambda ctx: None).__code__


class Operator(Protocol):
    """What the algorithms need of a symmetric matrix."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def __matmul__(self, vector: Tensor, /) -> Tensor: ...


# Operators


class Hessian:
    r"""The Hessian of a loss as an operator, :math:`v \mapsto \nabla (g^\top v)`.

    Args:
        closure: returns the loss with its graph and does not call ``backward``; or a list of closures, one for each
            micro-batch, of whose losses the mean is meant. The graph of one closure is kept and a product costs about
            two backward passes. Of several, one graph at a time is made again for each product.
        params: the tensors to differentiate by, float32 or float64, which must not change while the operator is used.
        module: its buffers are put back after each call of a closure, so that BatchNorm's running statistics are those
            of training alone.
        process_group: average losses, gradients and products over the micro-batches of its processes. A
            ``DistributedDataParallel`` model must be called through ``model.module``.

    Raises:
        TypeError, ValueError: parameters that are not dense float32 or float64 tensors of one device, or a loss that is
            not one real number.
        RuntimeError: a closure that called ``backward`` or returned no graph, a sparse gradient, or an operation in it
            that cannot be differentiated twice, which is named. ``grad``, of the module's other parameters as well,
            and the random state are then as they were.

    All calls of the closures see the same random numbers, and torch's generators continue as if there had been none.
    ``loss`` and ``gradient`` hold the loss and the flat gradient.
    """

    def __init__(
        self,
        closure: Closure | Sequence[Closure],
        params: Sequence[Tensor],
        *,
        module: torch.nn.Module | None = None,
        process_group: Any = None,
    ) -> None:
        self.params = check_params(params)
        closures: list[Any] = list(closure) if isinstance(closure, list | tuple) else [closure]
        if not closures or not all(map(callable, closures)):
            raise TypeError(f"closure must be a function or a list of functions, got {closure!r}")
        self._module, self._group, self._closures = module, process_group, closures
        self._product: Callable[[Tensor], Tensor] | None = None
        losses, gradients = [], []
        for each in closures:
            loss, gradient, product = self._linearise(each)
            losses.append(loss.detach())
            gradients.append(gradient)
        if len(closures) == 1:
            self._product = product
        count = torch.tensor(float(len(closures)), dtype=torch.float64, device=self.params[0].device)
        if process_group is not None:
            torch.distributed.all_reduce(count, group=process_group)
        self._count = int(count)  # of micro-batches, over all processes: they need not have equally many
        self.loss = self._mean(losses)
        self.gradient = self._mean(gradients)
        size = self.gradient.numel()
        self.shape, self.dtype, self.device = (size, size), self.gradient.dtype, self.gradient.device

    def __matmul__(self, vector: Tensor) -> Tensor:
        if vector.shape != self.shape[:1]:
            raise ValueError(f"vector must have shape ({self.shape[0]},), got {tuple(vector.shape)}")
        if self._product is not None:
            return self._mean([self._product(vector)])
        return self._mean([self._linearise(each)[2](vector) for each in self._closures])

    def _mean(self, values: list[Tensor]) -> Tensor:
        total = values[0].clone()
        for value in values[1:]:
            total += value
        if self._group is not None:
            torch.distributed.all_reduce(total, group=self._group)
        return total / self._count

    def _linearise(self, closure: Closure) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """The loss, the flat gradient, and the product at this graph."""
        loss = _with_graph(check_loss(self._call(closure)))
        grads = _dense(_grad(loss, self.params, create_graph=True))
        _check_twice(loss, grads)
        curved = [i for i, grad in enumerate(grads) if grad.requires_grad]
        params = self.params  # and not self: a cycle would keep the graph until the garbage collector runs

        def product(vector: Tensor) -> Tensor:
            if not curved:  # the gradient depends on no parameter
                return torch.zeros_like(vector)
            pieces = _split(vector, params)
            return _flat(_grad([grads[i] for i in curved], params, [pieces[i] for i in curved], retain_graph=True))

        return loss, _flat(grads).detach(), product

    def _call(self, closure: Closure) -> Any:
        """What a closure returns; gradients, buffers and generators do not notice."""
        buffers = [] if self._module is None else [(buffer, buffer.clone()) for buffer in self._module.buffers()]
        devices = {param.device for param in self.params if param.device.type == "cuda"}
        others = [] if self._module is None else list(self._module.parameters())
        try:
            with (
                gradients_kept([*self.params, *others]),
                torch.enable_grad(),
                torch.random.fork_rng(devices=list(devices)),
            ):
                value = closure()
                if any(param.grad is not None for param in self.params):
                    raise RuntimeError(
                        "the closure called backward(): remove the call and return the loss with its graph"
                    )
        finally:
            for buffer, before in buffers:
                buffer.data.copy_(before)  # through data: the graph holds the buffer, and does not read it
        return value


class GGN(Hessian):
    r"""The generalised Gauss-Newton matrix :math:`J^\top \nabla^2_z \ell\, J` of a loss of a network's outputs z.

    It is the Hessian of the loss with the network made linear in its parameters: positive semi-definite where the loss
    is convex in the outputs. The arguments are those of :class:`Hessian`, but that a closure returns
    ``(outputs, loss)``, the loss computed from the outputs.
    """

    def _linearise(self, closure: Closure) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        value = self._call(closure)
        if not isinstance(value, tuple) or len(value) != 2 or not isinstance(value[0], Tensor):
            raise TypeError(f"the closure must return (outputs, loss) for the Gauss-Newton matrix, got {value!r}")
        outputs, loss = _with_graph(value[0], "outputs"), _with_graph(check_loss(value[1]))
        grads = _dense(_grad(loss, self.params, retain_graph=True))
        (slope,) = _grad(loss, [outputs], create_graph=True, materialize_grads=False)
        if slope is None:
            raise RuntimeError("the closure's loss must be computed from its outputs: it does not depend on them")
        # J v is the derivative by w of v . (J^T w): two reverse passes, for models that have no forward derivatives.
        dummy = torch.zeros_like(outputs, requires_grad=True)
        pulled = _grad(outputs, self.params, dummy, create_graph=True)
        _check_twice(loss, [slope, *pulled])
        moved = [i for i, pull in enumerate(pulled) if pull.requires_grad]
        params = self.params

        def product(vector: Tensor) -> Tensor:
            if not slope.requires_grad or not moved:
                return torch.zeros_like(vector)
            pieces = _split(vector, params)
            (push,) = _grad([pulled[i] for i in moved], [dummy], [pieces[i] for i in moved], retain_graph=True)
            (curved,) = _grad(slope, [outputs], push, retain_graph=True)
            return _flat(_grad(outputs, params, curved, retain_graph=True))

        return loss, _flat(grads).detach(), product


class Preconditioned:
    """``scale * (sign * operator + shift) * scale``: the curvature that a method with step sizes of its own sees.

    Args:
        operator: symmetric.
        scale, shift: diagonals as flat vectors, or numbers.
        sign: -1 for a loss that is maximised.
    """

    def __init__(
        self, operator: Operator, scale: Tensor | float = 1.0, shift: Tensor | float = 0.0, sign: float = 1.0
    ) -> None:
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        self._operator, self._scale, self._shift, self._sign = operator, scale, shift, sign

    def __matmul__(self, vector: Tensor) -> Tensor:
        scaled = self._scale * vector
        return self._scale * (self._sign * (self._operator @ scaled) + self._shift * scaled)


@contextlib.contextmanager
def gradients_kept(params: Sequence[Tensor]) -> Iterator[None]:
    """Within it these tensors have no ``grad``; afterwards each has its own again."""
    kept = {param: param.grad for param in params}
    for param in kept:
        param.grad = None
    try:
        yield
    finally:
        for param, grad in kept.items():
            param.grad = grad


def check_params(params: Sequence[Tensor]) -> list[Tensor]:
    """Raise unless curvature can be taken by these tensors."""
    params = list(params)
    if not params:
        raise ValueError("params must name at least one tensor that requires grad, got none")
    for index, param in enumerate(params):
        if param.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"params[{index}] must be float32 or float64 for second derivatives, got {param.dtype}; "
                "keep the parameters in float32 and use autocast in the forward pass"
            )
        if not param.requires_grad:
            raise ValueError(f"params[{index}] must require grad")
        if local(param) is not param:
            raise ValueError(f"params[{index}] must be whole: sharded parameters have no second derivatives here")
        if (param.dtype, param.device) != (params[0].dtype, params[0].device):
            raise ValueError(
                f"params[{index}] must have the dtype and device of the first, {params[0].dtype} on "
                f"{params[0].device}, got {param.dtype} on {param.device}"
            )
    return params


def _with_graph(value: Tensor, what: str = "loss") -> Tensor:
    if not value.requires_grad:
        raise RuntimeError(
            f"the closure's {what} has no graph: return the tensor itself, without detach(), item() or no_grad()"
        )
    return value


def _split(vector: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    pieces = torch.split(vector, [param.numel() for param in params])
    return [piece.view(param.shape) for piece, param in zip(pieces, params, strict=True)]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _dense(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    for index, grad in enumerate(grads):
        if grad.layout != torch.strided:
            raise RuntimeError(f"params[{index}] must have a dense gradient: make nn.Embedding with sparse=False")
    return grads


def _grad(outputs: Any, inputs: Sequence[Tensor], grad_outputs: Any = None, **options: Any) -> tuple[Tensor, ...]:
    """``torch.autograd.grad`` that says what is wrong with the closure."""
    options = {"materialize_grads": True, **options}
    try:
        return torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True, **options)
    except RuntimeError as error:
        text = str(error)
        if "second time" in text:
            raise RuntimeError("the closure's graph is freed: it must not call backward() or autograd.grad") from error
        if "modified by an inplace operation" in text and "create_graph" not in options:
            raise RuntimeError(f"parameters have changed since the operator was made: {text}") from error
        named = re.search(r"derivative for '?(?:aten::)?(\w+)", text)
        if named or "double backward" in text.lower():
            heads = outputs if isinstance(outputs, list | tuple) else [outputs]
            what = named[1] if named else _custom(heads)
            raise RuntimeError(
                f"{what} has no second derivative: {text}\nUse an implementation that has one in the closure: for "
                "attention torch.nn.attention.sdpa_kernel(SDPBackend.MATH), for cuDNN RNNs "
                "torch.backends.cudnn.flags(enabled=False), for a compiled model the module that was compiled"
            ) from error
        raise


def _nodes(heads: Sequence[Tensor]) -> set[Any]:
    seen: set[Any] = set()
    todo: list[Any] = [head.grad_fn for head in heads]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return seen


def _check_twice(loss: Tensor, grads: Sequence[Tensor]) -> None:
    """Raise if a function marked once_differentiable is part of the loss.

    What it returns as a gradient is a constant to autograd: without this look the product would be wrong and nothing
    would say so. One that ends the loss leaves no mark in the graph of the gradient, so the loss's own is searched.
    """
    once = [node for node in _nodes([loss]) if _is_once(getattr(getattr(node, "_forward_cls", None), "backward", None))]
    if once or any(node.name().endswith("Error") for node in _nodes(grads)):
        names = ", ".join(sorted({node._forward_cls.__name__ for node in once})) or _custom([loss])
        raise RuntimeError(f"{names} has no second derivative: it is marked once_differentiable")


def _is_once(function: Any) -> bool:
    """Whether the decorator is among those of a function: all that it returns share one code."""
    while function is not None:
        if getattr(function, "__code__", None) is _ONCE:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def _custom(heads: Sequence[Tensor]) -> str:
    """The autograd functions written in Python that a graph holds."""
    names = {node._forward_cls.__name__ for node in _nodes(heads) if hasattr(node, "_forward_cls")}
    return ", ".join(sorted(names)) or "an operation of the model"


# Algorithms


class Spectrum(NamedTuple):
    """Ritz values of one or more Lanczos runs.

    Args:
        values: descending, float64 on the CPU; NaN if a product was not finite.
        weights: squared first components of the eigenvectors of T, divided by the number of runs; they add up to 1.
        errors: bounds on the distance of each value to an eigenvalue.
        size: order of the operator.
    """

    values: Tensor
    weights: Tensor
    errors: Tensor
    size: int

    def trace(self, function: Callable[[Tensor], Tensor] = lambda values: values) -> float:
        """Estimates the trace of a function of the operator; ``torch.log`` gives its log-determinant."""
        return self.size * float(self.weights @ function(self.values))

    def density(self, grid: Tensor, sigma: float) -> Tensor:
        """The spectral density at the points of ``grid``, smoothed by a Gaussian of deviation ``sigma``."""
        check_number("sigma", sigma, 0.0, math.inf, "finite and > 0", above=True)
        z = (grid.double().cpu()[:, None] - self.values) / sigma
        return (self.weights * (-0.5 * z.square()).exp()).sum(1) / (sigma * math.sqrt(2 * math.pi))


def lanczos(
    operator: Operator,
    iterations: int = 20,
    *,
    start: Tensor | None = None,
    seed: int = 0,
    tol: float = 0.0,
) -> Spectrum:
    """Ritz values of a symmetric operator by Lanczos with full re-orthogonalisation.

    Args:
        operator: symmetric; its products are in its dtype, and so are the vectors.
        iterations: products at most, each with a vector kept. Default 20: the top of a network's spectrum is then
            exact; its bottom wants 40 or more.
        start: the first vector, of any length. Default: Gaussian, from ``seed``.
        seed: of the start. Equal seeds give equal starts in all processes.
        tol: stop, after three products or more, when both the error bound of the largest value and what the last
            product added to it are below this share of it, and of its distance to the lowest value. The bound says that
            *an* eigenvalue is near, not that it is the largest: a start that hardly meets that one's eigenvector can
            still miss it. Default 0: never.

    The run ends early where the products so far span an invariant subspace: the values are then exact.
    """
    check_int("iterations", iterations, 1)
    check_number("tol", tol, 0.0, math.inf, "finite and >= 0")
    size = operator.shape[0]
    if start is None:
        draw = torch.Generator("cpu").manual_seed(seed)
        start = torch.randn(size, generator=draw, dtype=torch.float64, device="cpu").to(operator.device, operator.dtype)
    length = float(start.norm())
    if start.shape != (size,) or not 0 < length < math.inf:
        raise ValueError(f"start must be a finite vector of {size} numbers that are not all zero, got {start!r}")
    q = start / length
    basis = q.new_empty(min(iterations, size), size)
    diagonal: list[float] = []
    off: list[float] = []
    last = math.inf
    for j in range(len(basis)):
        basis[j] = q
        w = operator @ q
        diagonal.append(float(q.dot(w)))
        w = w - diagonal[-1] * q
        seen = basis[: j + 1]
        # Once loses what rounding adds along the earlier vectors; twice is enough. Autocast is for the closure.
        with torch.autocast(w.device.type, enabled=False):
            for _ in range(2):
                w.addmv_(seen.T, seen @ w, alpha=-1)
        off.append(float(w.norm()))
        if not math.isfinite(diagonal[-1] + off[-1]):
            nothing = torch.full((1,), math.nan, dtype=torch.float64)
            return Spectrum(nothing, torch.ones_like(nothing), nothing, size)
        # What is left of w is rounding: sixteen times that of a vector of this length.
        if off[-1] <= 16 * torch.finfo(w.dtype).eps * max(map(abs, diagonal + off)):
            break
        if tol:
            spectrum = _ritz(diagonal, off, size)
            top, low = float(spectrum.values[0]), float(spectrum.values[-1])
            # The distance, since a multiple of the identity, as damping is, makes a value large and no better known.
            scale = tol * min(abs(top), top - low)
            if j >= 2 and max(float(spectrum.errors[0]), top - last) <= scale:
                return spectrum
            last = top
        q = w / off[-1]
    return _ritz(diagonal, off, size)


def _ritz(diagonal: list[float], off: list[float], size: int) -> Spectrum:
    between = torch.tensor(off[:-1], dtype=torch.float64, device="cpu")
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
    matrix += torch.diag(between, 1) + torch.diag(between, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return Spectrum(values.flip(0), vectors[0].square().flip(0), off[-1] * vectors[-1].abs().flip(0), size)


def quadrature(
    operator: Operator, iterations: int = 20, starts: int = 1, *, seed: int = 0, tol: float = 0.0
) -> Spectrum:
    """Stochastic Lanczos quadrature: the nodes and weights of ``starts`` runs from random vectors, as one spectrum."""
    check_int("starts", starts, 1)
    runs = [lanczos(operator, iterations, seed=seed + i, tol=tol) for i in range(starts)]
    values, weights, errors = (torch.cat(column) for column in list(zip(*runs, strict=True))[:3])
    order = values.argsort(descending=True, stable=True)
    return Spectrum(values[order], weights[order] / starts, errors[order], operator.shape[0])


def noise(operators: Sequence[Operator], samples: int, *, starts: int = 1, seed: int = 0) -> float:
    r"""The variance of curvature between batches, :math:`P s^2`, for :func:`optimzoo.stability.batch_eigenvalue`.

    Args:
        operators: of two or more batches that were drawn independently.
        samples: in each batch.
        starts: random vectors to average over.
        seed: of the vectors.
    """
    check_int("samples", samples, 1)
    check_int("starts", starts, 1)
    if len(operators) < 2:
        raise ValueError(f"operators must be of two or more batches, got {len(operators)}")
    total = 0.0
    for start in range(starts):
        draw = torch.Generator("cpu").manual_seed(seed + start)
        v = torch.randn(operators[0].shape[0], generator=draw, dtype=torch.float64, device="cpu")
        v = (v / v.norm()).to(operators[0].device, operators[0].dtype)
        total += float(torch.stack([operator @ v for operator in operators]).var(0).sum())
    return samples * total / starts

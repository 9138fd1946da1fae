"""Gradients of single samples: their norms and weighted sums, without keeping those of large layers.

The gradient of a linear layer's weight is, sample by sample, a sum over positions of outer products: of what enters the
layer and of the loss's gradient in what leaves it. Where those factors are smaller than the gradient they are kept in
its place. The gradient's norm follows from inner products of factors (Li et al., `Large Language Models Can Be Strong
Differentially Private Learners <https://arxiv.org/abs/2110.05679>`__, 2021), and a weighted sum over all samples is one
matrix product, as the ordinary gradient is (Bu et al., `Differentially Private Optimization on Large Model at Small
Cost <https://arxiv.org/abs/2210.00038>`__, 2022).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from optimzoo import ops
from optimzoo.optimizer import is_native, warn

_CHUNK = 2**20
"""Numbers of a tensor that are worked on at once, where that makes copies of them."""
_CANCELLED = 2.0**-10
"""Where less than this is left of what was added up in float32, it is done again in float64."""
_RANGE = 1e24
"""Squared norms of factors up to which their products, and those with a weight, stay in the range of float32."""
_ROUNDING = {torch.float32: 2.0**-21, torch.float64: 2.0**-44}
"""What rounding may take from a squared norm, over the square of what was added up."""


@dataclass(frozen=True)
class _Factors:
    """Of the gradients of a batch; both have a row for each sample."""

    left: Tensor
    right: Tensor

    @property
    def positions(self) -> int:
        """How many products are added up in a gradient, if pairs of them have to be looked at for its norm."""
        return 1

    @property
    def size(self) -> int:
        """How many numbers are kept of a sample."""
        return self.left.shape[1:].numel() + self.right.shape[1:].numel()

    def square_norms(self) -> tuple[Tensor, Tensor]:
        """The squared norm of each gradient, and the square of what the norms of its products add up to.

        The second is infinite where the numbers are too large for float32.
        """
        raise NotImplementedError

    def add_to(self, total: Tensor, weights: Tensor) -> None:
        """Add the weighted sum of the gradients."""
        raise NotImplementedError

    def to_tensor(self, shape: torch.Size) -> Tensor:
        """All of them."""
        raise NotImplementedError

    def divided(self, left: Tensor, right: Tensor) -> _Factors:
        """With the factors of each sample divided by powers of two."""
        return replace(self, left=_times(self.left, 1 / left), right=_times(self.right, 1 / right))


@dataclass(frozen=True)
class _Products(_Factors):
    """Sums of outer products: ``left`` is (n, positions, rows), ``right`` (n, positions, columns)."""

    @property
    def positions(self) -> int:
        return self.left.shape[1]

    def square_norms(self) -> tuple[Tensor, Tensor]:
        if self.positions != 1:
            return _pair_up(self.left @ self.left.mT, self.right @ self.right.mT)
        left, right = _square_norms([self.left]), _square_norms([self.right])
        return left * right, _in_range(left * right, torch.maximum(left, right), self.right.dtype)

    def add_to(self, total: Tensor, weights: Tensor) -> None:
        total.addmm_(_times(self.left, weights).flatten(0, 1).T, self.right.flatten(0, 1))

    def to_tensor(self, shape: torch.Size) -> Tensor:
        return (self.left.mT @ self.right).view(len(self.left), *shape)


@dataclass(frozen=True)
class _Rows(_Factors):
    """Matrices of few rows: ``left``, (n, positions), says which row each of ``right`` is added to."""

    def square_norms(self) -> tuple[Tensor, Tensor]:
        rows = int(self.left.max()) + 1 if self.left.numel() else 1
        keys, place = torch.unique(self.left + rows * _counted(self.left), return_inverse=True)
        sums = _square_norms([_add_rows(place, self.right, len(keys))])
        lengths = _square_norms([self.right.flatten(0, 1)])
        added = sums.new_zeros(len(keys)).index_add_(0, place.flatten(), lengths.sqrt()).square()
        squares, most, largest = (
            sums.new_zeros(len(self.left)).index_add_(0, keys // rows, sums),
            sums.new_zeros(len(self.left)).index_add_(0, keys // rows, added),
            lengths.view(self.left.shape).sum(1),
        )
        return squares, _in_range(most, largest, self.right.dtype)

    def inner_products(self, other: _Products) -> Tensor:
        """With the same samples' other gradients."""
        left = other.left.gather(2, self.left[:, None, :].expand(-1, other.positions, -1))
        return _inner_products([left], [other.right @ self.right.mT])

    def add_to(self, total: Tensor, weights: Tensor) -> None:
        total += _add_rows(self.left, _times(self.right, weights), len(total))

    def to_tensor(self, shape: torch.Size) -> Tensor:
        n = len(self.left)
        return _add_rows(self.left + shape[0] * _counted(self.left), self.right, n * shape[0]).view(n, *shape)

    def divided(self, left: Tensor, right: Tensor) -> _Rows:
        return _Rows(self.left, _times(_times(self.right, 1 / right), 1 / left))


@dataclass(frozen=True)
class _Patches(_Factors):
    """A convolution's: ``left`` is (n, channels out, ...), ``right`` (n, channels in, ...), padded."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def positions(self) -> int:
        return self.left.shape[2:].numel()

    def square_norms(self) -> tuple[Tensor, Tensor]:
        size_out, size_in = self.left.shape[2:], self.right.shape[2:]
        left, right = (
            x.reshape(len(x), self.groups, x.shape[1] // self.groups, x.shape[2:].numel())
            for x in (self.left, self.right)
        )
        # The inner product of two patches is the sum of those of their pixels. A pixel is in many patches; its products
        # are taken once.
        pixels = (right.mT @ right).view(*right.shape[:2], *size_in, *size_in)
        patches = pixels.new_zeros(*pixels.shape[:2], *size_out, *size_out)
        for offset in itertools.product(*map(range, self.kernel)):
            window = tuple(
                slice(place * gap, place * gap + (count - 1) * step + 1, step)
                for place, gap, step, count in zip(offset, self.dilation, self.stride, size_out, strict=True)
            )
            patches += pixels[(slice(None), slice(None), *window, *window)]
        return _pair_up(left.mT @ left, patches.view(*pixels.shape[:2], self.positions, self.positions))

    def add_to(self, total: Tensor, weights: Tensor) -> None:
        total += self._gradient(_times(self.left, weights), self.right, total.shape, self.groups)

    def to_tensor(self, shape: torch.Size) -> Tensor:
        n = len(self.left)
        if n == 0:
            return self.left.new_zeros(0, *shape)
        # Every sample in channels of its own, which groups keep apart.
        left, right = (x.reshape(1, n * x.shape[1], *x.shape[2:]) for x in (self.left, self.right))
        wide = torch.Size((n * shape[0], *shape[1:]))
        return self._gradient(left, right, wide, n * self.groups).view(n, *shape)

    def _gradient(self, left: Tensor, right: Tensor, shape: torch.Size, groups: int) -> Tensor:
        weight, zeros = left.new_empty(1).expand(shape), [0] * len(self.kernel)
        fixed = (None, self.stride, zeros, self.dilation, False, zeros, groups, (False, True, False))
        return cast(Tensor, torch.ops.aten.convolution_backward(left, right, weight, *fixed)[1])


class FactoredSamples:
    """Gradients of single samples of a parameter, kept as factors.

    :class:`PerSampleGradients` writes it to ``p.grad_sample`` where that takes less memory than a tensor. Norms and
    sums are those of the tensor to rounding, which is float32 or wider.
    """

    def __init__(self, parts: Sequence[_Factors], shape: torch.Size, scale: float = 1.0) -> None:
        self._parts, self._scale, self._param_shape = list(parts), scale, shape
        self.shape = torch.Size((len(parts[0].left), *shape))
        self.device = parts[0].right.device
        self.dtype = _product_dtype(parts[0].right)
        self._known: tuple[list[int], tuple[Tensor, Tensor]] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def n(self) -> int:
        """The number of samples."""
        return self.shape[0]

    def __repr__(self) -> str:
        return f"FactoredSamples(shape={tuple(self.shape)}, dtype={self.dtype})"

    def square_norms(self) -> Tensor:
        """The squared norm of each sample's gradient, ``(n,)``, float64; never less, but for what float64 rounds."""
        return self._measured()[0] * self._scale**2

    def _measured(self) -> tuple[Tensor, Tensor]:
        """The squared norms, and for which samples float32 does not do; kept as long as the factors are the same."""
        versions = [side._version for part in self._parts for side in (part.left, part.right)]
        if self._known is None or self._known[0] != versions:
            with _exact(self.device):
                self._known = versions, self._square_norms(self._parts, self.dtype)
        return self._known[1]

    def _square_norms(self, parts: Sequence[_Factors], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Squared norms of products, and for which samples float32 does not do.

        What rounding may have taken is added. Where products cancel it is all that is seen of the gradient: without it
        a large one could pass for none, and its sum with others for clipped.
        """
        squares = torch.zeros(len(parts[0].left), dtype=_wide(parts[0].right), device=self.device)
        delicate = torch.zeros(len(squares), dtype=torch.bool, device=self.device)
        for of in _slices(len(squares), max(max(part.size, part.positions**2) for part in parts)):
            own = [_pick(part, of, dtype) for part in parts]
            each, added = (torch.stack(column) for column in zip(*(part.square_norms() for part in own), strict=True))
            found, most = each.sum(0), added.sqrt().sum(0).square()
            if len(own) == 2:
                found += 2 * cast(_Rows, own[0]).inner_products(cast(_Products, own[1]))
            squares[of] = found.clamp(min=0) + _ROUNDING[dtype] * most
            if dtype != squares.dtype:
                delicate[of] = ~(found >= _CANCELLED * most)  # what is not a number, too
                if len(again := of.start + delicate[of].nonzero().flatten()):
                    wide = [_pick(part, again, squares.dtype) for part in parts]
                    squares[again] = self._square_norms(wide, squares.dtype)[0]
        return squares, delicate

    def _scaled_norms(self, of: Tensor) -> Tensor:
        """The norms of some samples, for which squares of float64 numbers are too large or too small."""
        with _exact(self.device):
            parts = [_pick(part, of, torch.float64) for part in self._parts]
            lefts = [_largest(p.left) if p.left.is_floating_point() else torch.ones_like(of) for p in parts]
            left = _divisor(torch.stack(lefts).amax(0).double())
            right = _divisor(torch.stack([_largest(part.right) for part in parts]).amax(0))
            found = self._square_norms([part.divided(left, right) for part in parts], torch.float64)[0]
            return found.sqrt() * left * right * abs(self._scale)

    def weighted_sums(self, weights: Tensor) -> list[Tensor]:
        """For each row of ``weights``, ``(k, n)``, the sum of the gradients times their weights.

        A sample whose weights are all zero is left out, whatever its gradient is.
        """
        with _exact(self.device):
            delicate = self._measured()[1]
            weights = weights.to(self.device, _wide(self._parts[0].right)) * self._scale
            wanted = (weights != 0).any(0)
            sums = self._sums(weights, wanted & ~delicate, self.dtype)
            if bool((rest := wanted & delicate).any()):
                # In one sum with the others they would also round those away.
                sums = [a + b.to(a.dtype) for a, b in zip(sums, self._sums(weights, rest, weights.dtype), strict=True)]
            return sums

    def _sums(self, weights: Tensor, wanted: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Those over the samples that are wanted."""
        of = slice(None) if bool(wanted.all()) else wanted.nonzero().flatten()
        parts = [_pick(part, of, None) for part in self._parts]
        weights = _flushed(weights[:, of].to(dtype))
        sums = [weights.new_zeros(self._param_shape) for _ in weights]
        for part in parts:
            for chunk in _slices(weights.shape[1], part.size):
                own = _pick(part, chunk, dtype)
                for total, row in zip(sums, weights[:, chunk], strict=True):
                    own.add_to(total, row)
        return sums

    def to_tensor(self) -> Tensor:
        """All gradients, ``(n, *p.shape)``."""
        with _exact(self.device):
            parts = [_pick(part, slice(None), self.dtype) for part in self._parts]
            total: Tensor = functools.reduce(torch.add, (part.to_tensor(self._param_shape) for part in parts))
            return total * self._scale if self._scale != 1 else total


_Found: TypeAlias = dict[str, _Factors | Tensor]
Samples: TypeAlias = Tensor | FactoredSamples
"""What ``p.grad_sample`` holds of one batch."""


def square_norms(samples: Sequence[Samples | list[Samples]]) -> Tensor:
    """The squared norm of each sample's gradient over all parameters: ``(n,)``, float64.

    Args:
        samples: what ``p.grad_sample`` holds, parameter by parameter. In a list are micro-batches, one after the other.

    That of a sample with a gradient that is not finite is infinite or NaN. Of float64 gradients beyond 1e±150 the
    square is infinite or zero: :func:`norms` tells those apart.
    """
    return torch.cat([_square_norms(batch) for batch in _batches(samples)])


def norms(samples: Sequence[Samples | list[Samples]]) -> Tensor:
    """The norm of each sample's gradient over all parameters, ``(n,)``, float64, at any scale of the numbers.

    Infinite or NaN where a gradient, or its norm, is not finite.
    """
    return torch.cat([_norms(batch) for batch in _batches(samples)])


def weighted_sums(samples: Sequence[Samples | list[Samples]], weights: Tensor) -> list[list[Tensor]]:
    """For each parameter and each row of ``weights`` the sum of the samples' gradients times their weights.

    Args:
        samples: what ``p.grad_sample`` holds, parameter by parameter. In a list are micro-batches, one after the other.
        weights: one or two rows of a weight for each sample, ``(k, n)``. A sample whose weights are all zero is left
            out, whatever its gradient is.

    The sums of tensors are float64; those of factors have the factors' dtype, but float32 at least.
    """
    batches = _batches(samples)
    parts = torch.split(weights.double(), [len(batch[0]) for batch in batches], 1)
    sums = [_weighted_sums(batch, part) for batch, part in zip(batches, parts, strict=True)]
    return [[sum(rows[1:], rows[0]) for rows in zip(*column, strict=True)] for column in zip(*sums, strict=True)]


def micro_batches(param: Any) -> list[Any]:
    """What lies in ``p.grad_sample``, one micro-batch after the other."""
    value = getattr(param, "grad_sample", None)
    return [] if value is None else [*value] if isinstance(value, list | tuple) else [value]


def writes(samples: Any) -> int:
    """How often what lies in ``p.grad_sample`` has been written to, where torch counts that."""
    return samples._version if isinstance(samples, Tensor) and not samples.is_inference() else -1


def _batches(samples: Sequence[Samples | list[Samples]]) -> list[list[Samples]]:
    """Micro-batch by micro-batch, those of all parameters."""
    columns = [entry if isinstance(entry, list) else [entry] for entry in samples]
    sizes = [[len(part) for part in column] for column in columns]
    for index, size in enumerate(sizes):
        if size != sizes[0]:
            raise ValueError(f"samples[{index}] is of {size} samples, samples[0] of {sizes[0]}")
    return [list(batch) for batch in zip(*columns, strict=True)]


class PerSampleGradients:
    r"""Gives the trained parameters of a model ``p.grad_sample``, the gradient of each sample's own loss, in backward.

    .. math::
        \mathrm{grad\_sample}_i = \nabla_p\, \ell_i \qquad\text{where}\qquad
        \mathrm{loss} = \frac1n \sum_{i=1}^n \ell_i \;\text{ or }\; \sum_{i=1}^n \ell_i

    It is a tensor ``(n, *p.shape)`` where that is small, and :class:`FactoredSamples` elsewhere. The gradient of the
    batch is not computed, and ``p.grad`` stays as it is. Where ``p.grad_sample`` has not been cleared since the last
    backward it becomes a list of both.

    It acts on modules in training mode while gradients are enabled. Linear, convolution and embedding layers, layer,
    group, instance and RMS normalisation and attention have rules of their own. Any other module with parameters of its
    own goes through ``torch.func`` with all that is in it: its samples' gradients are tensors, its forward pass is
    computed twice, and a warning names it.

    Args:
        model: a module; the first dimension of what its layers get and return is that of the samples.
        loss_reduction: ``"mean"`` if the loss that ``backward`` is called on is the mean over samples, ``"sum"`` if it
            is the sum. Default ``"mean"``.

    Raises:
        ValueError: the model has a layer that mixes samples or has them in another dimension, or is wrapped by
            something that needs the gradient of the batch, or has such hooks already.
        RuntimeError: in forward or in backward, where a layer cannot be followed; the message names it.

    The forward passes of the layers are replaced until :meth:`remove`, or the end of a ``with`` block. ``grad_sample``
    is written to the parameters that the model had when this was made.
    """

    def __init__(self, model: nn.Module, *, loss_reduction: str = "mean") -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}")
        for name, module in model.named_modules():
            if problem := _problem(module):
                raise ValueError(f"{_title(name, module)} {problem}")
        self.model, self.loss_reduction = model, loss_reduction
        self._paused = False
        self._anchor = torch.zeros((), requires_grad=True)
        self._forget()
        self._layers = list(_find_layers(self, model))
        if whole := [layer.title for layer in self._layers if layer.rule is _whole]:
            warn(
                f"{', '.join(whole)}: every sample's gradient is kept and the forward pass computed twice, as there "
                "is no rule for what has parameters there"
            )
        for layer in self._layers:
            layer.module.forward = layer
        self._handles: list[Any] = [
            param.register_hook(functools.partial(self._refuse, name))  # type: ignore[no-untyped-call]  # in torch 2.14
            for name, param in model.named_parameters()
            if param.requires_grad
        ]

    def remove(self) -> None:
        """Give the layers their own forward passes back."""
        for layer in self._layers:
            if layer.module.__dict__.get("forward") is layer:
                del layer.module.forward
        for handle in self._handles:
            handle.remove()
        self._layers, self._handles = [], []
        self._forget()

    def __enter__(self) -> PerSampleGradients:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _refuse(self, name: str, grad: Tensor) -> None:
        if self.model.training and not self._paused:
            raise RuntimeError(
                f"{name} is used outside of its module's forward pass, or while that is in eval mode, and the samples' "
                "gradients of that use are not known. Call the module; to tie two layers, let both have one parameter"
            )

    def _forget(self) -> None:
        self._task = -1  # the backward pass under way
        self._found: dict[nn.Parameter, list[tuple[str, _Factors | Tensor]]] = {}
        self._calls: list[_Call] = []

    def _begin(self) -> None:
        """What is found in one backward belongs together; one that failed leaves nothing to the next."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._forget()
            self._task = task
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._end)

    def _add(self, layer: _Layer, found: _Found) -> None:
        for name, samples in found.items():
            param = layer.params[name][2]
            if not isinstance(samples, Tensor) and _is_small(param.shape, [samples]):
                samples = FactoredSamples([samples], param.shape).to_tensor()
            self._found.setdefault(param, []).append((layer.title, samples))

    def _end(self) -> None:
        try:
            self._paused = True
            for call in self._calls:
                with _exact(next(iter(call.grads.values())).device):
                    self._add(call.layer, call.samples())
            first: tuple[str, int] | None = None
            for uses in self._found.values():
                for title, samples in uses:
                    n = len(samples if isinstance(samples, Tensor) else samples.right)
                    first = first or (title, n)
                    if n != first[1]:
                        raise RuntimeError(
                            f"the first dimension of {title} and of {first[0]} differs, so that it is not that of the "
                            "samples in one of them. What is the same for all samples, as the positions of a sequence, "
                            "has to be expanded before it enters a layer with parameters"
                        )
            scale = first[1] if first and self.loss_reduction == "mean" else 1
            for param, uses in self._found.items():
                own = _together([use for _, use in uses], param.shape, float(scale))
                owner: Any = param
                before = getattr(param, "grad_sample", None)
                earlier = [] if before is None else before if isinstance(before, list) else [before]
                owner.grad_sample = [*earlier, own] if earlier else own
        finally:
            self._paused = False
            self._forget()


def _is_small(shape: torch.Size, parts: Sequence[_Factors]) -> bool:
    """Whether gradients are better kept as they are.

    They are smaller than their factors, or than what their norms take. Where they are larger than the factors of a
    linear layer, those norms are cheap: with t positions and d x p weights, d p > t (d + p) makes 2 t^2 < d p / 2.
    """
    positions = sum(part.positions for part in parts)
    return shape.numel() <= max(sum(part.size for part in parts), 2 * positions**2)


def _together(uses: list[_Factors | Tensor], shape: torch.Size, scale: float) -> Samples:
    """The samples of a parameter from all its uses in one backward."""
    parts = [use for use in uses if isinstance(use, _Factors)]
    rows = [part for part in parts if isinstance(part, _Rows)]
    products = [part for part in parts if isinstance(part, _Products)]
    if len(uses) == len(parts) == 1:
        return FactoredSamples(parts, shape, scale)
    if len(uses) == len(rows) + len(products) and not _is_small(shape, parts):
        kinds: list[list[Any]] = [rows, products]
        merged = [
            type(kind[0])(*(torch.cat([getattr(part, side) for part in kind], 1) for side in ("left", "right")))
            for kind in kinds
            if kind
        ]
        return FactoredSamples(merged, shape, scale)
    tensors = (use if isinstance(use, Tensor) else FactoredSamples([use], shape).to_tensor() for use in uses)
    total: Tensor = functools.reduce(Tensor.add_, tensors)
    return total.mul_(scale) if scale != 1 else total


class _Layer:
    """A module's forward pass, as long as it is replaced."""

    def __init__(self, engine: PerSampleGradients, module: nn.Module, title: str, rule: _Rule) -> None:
        self.engine, self.module, self.title, self.rule = engine, module, title, rule
        self.forward = module.forward
        self.params: dict[str, tuple[nn.Module, str, nn.Parameter]] = {}
        self.trained: frozenset[str] = frozenset()  # in the call under way

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.engine._paused or not (self.module.training and torch.is_grad_enabled()):
            return self.forward(*args, **kwargs)
        # Not the parameters that are known: a sharded module has others while it runs.
        held = {name: (part, key, part._parameters[key]) for name, (part, key, _) in self.params.items()}
        self.trained = frozenset(
            name for name, (_, _, param) in held.items() if param is not None and param.requires_grad
        )
        if not self.trained and self.rule is not _mix:
            return self.forward(*args, **kwargs)
        try:
            for name in self.trained:  # autograd computes no gradients of what does not ask for any
                part, key, param = held[name]
                part._parameters[key] = cast(Any, param).detach()
            return self.rule(self, args, kwargs)
        finally:
            for name in self.trained:
                part, key, param = held[name]
                part._parameters[key] = param

    def record(self, output: Tensor, inputs: Tensor, samples: Callable[[Tensor, Tensor], _Found]) -> Tensor:
        """The output; in backward, ``samples`` makes gradients of parameters from the inputs and its gradient."""
        inputs, version = inputs.detach(), inputs._version

        def take(grad: Tensor) -> None:
            if inputs._version != version:
                raise RuntimeError(f"what entered {self.title} has been changed in place since")
            with _exact(grad.device):
                self.engine._begin()
                self.engine._add(self, samples(inputs, grad))

        return cast(Tensor, _Watched.apply(output, self.engine._anchor, take))


class _Watched(torch.autograd.Function):
    """A layer's output, whose gradient is shown to somebody in backward; ``anchor`` makes it ask for one.

    A hook on the output does not do: it is lost where the output is a view, as that of a linear layer with many
    positions is, and is changed in place. What is returned here is no view for autograd. That it may be changed in
    place unnoticed is no matter: the layers save no outputs for backward.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, take: Callable[[Tensor], None]) -> Tensor:
        ctx.take = take
        return output.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        ctx.take(grad)
        return grad if ctx.needs_input_grad[0] else None, None, None


def _find_layers(engine: PerSampleGradients, model: nn.Module) -> Iterator[_Layer]:
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        rule = _rule(module)
        own = any(param is not None for param in module._parameters.values()) or hasattr(module, "parametrizations")
        if rule is None and not own:
            continue
        layer = _Layer(engine, module, _title(name, module), rule or _whole)
        for prefix, part in module.named_modules() if rule in (None, _attention) else [("", module)]:
            inside.add(part)
            for key, param in part._parameters.items():
                if param is not None:
                    layer.params[f"{prefix}.{key}".lstrip(".")] = (part, key, param)
        yield layer


def _title(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


_Rule: TypeAlias = Callable[[_Layer, tuple[Any, ...], dict[str, Any]], Any]


def _rule(module: nn.Module) -> _Rule | None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _mix
    if hasattr(module, "parametrizations") or not {*module._parameters} <= {"weight", "bias", *_ATTENTION}:
        return None
    if _runs(module, nn.MultiheadAttention) and cast(nn.MultiheadAttention, module).bias_k is None:
        return None if cast(nn.MultiheadAttention, module).add_zero_attn else _attention
    return next((rule for kind, rule in _RULES.items() if _runs(module, kind)), None)


def _runs(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is of this kind, and a subclass changes nothing of its forward pass."""
    return isinstance(module, kind) and type(module).forward is kind.forward


_MIXES = (
    "mixes samples, so that a gradient is of no single one: use torch.nn.GroupNorm, or freeze it (eval() and "
    "requires_grad_(False))"
)


def _problem(module: nn.Module) -> str:
    """Why samples' gradients of a model with this module in it are not to be had, or nothing."""
    kind = type(module)
    if (
        isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel)
        or kind.__name__ == "FullyShardedDataParallel"
    ):
        return "reduces the gradient of the batch, which is not computed: give the module that it wraps"
    if kind.__module__.startswith("opacus.grad_sample.") or hasattr(module, "autograd_grad_sample_hooks"):
        return "computes samples' gradients already; give the model that it wraps, without its hooks"
    if isinstance(module.__dict__.get("forward"), _Layer):
        return "has a PerSampleGradients already: call its remove() first"
    if any(param is not None and nn.parameter.is_lazy(param) for param in module._parameters.values()):
        return "has parameters without a shape: run a batch through the model first"
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or _trains(module)):
        return _MIXES
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
        return "keeps statistics of the data without noise: set track_running_stats=False"
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention) and not module.batch_first and _trains(module):
        return "has the samples in the second dimension: make it with batch_first=True"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and _trains(module):
        if module.max_norm is not None:
            return "changes its weight in the forward pass, which tells about the data: max_norm must be None"
        if module.scale_grad_by_freq:
            return "scales gradients by what other samples hold: scale_grad_by_freq must be False"
    return ""


def _trains(module: nn.Module) -> bool:
    return any(param.requires_grad for param in module.parameters())


# Rules of layers: the samples' gradients from what enters and the gradient of what leaves.


def _single(samples: Callable[[Any, Tensor, Tensor, frozenset[str]], _Found]) -> _Rule:
    """The rule of a layer with one input and one output."""

    def run(layer: _Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs, trained = args[0] if args else kwargs["input"], layer.trained
        output = layer.forward(*args, **kwargs)
        return layer.record(output, inputs, lambda x, grad: samples(layer.module, x, grad, trained))

    return run


def _positions(grad: Tensor) -> Tensor:
    """(n, positions, features)"""
    return grad.reshape(len(grad), grad.shape[1:-1].numel(), grad.shape[-1])


def _sum_to(grad: Tensor, dims: int, start: int = 1) -> Tensor:
    """The sum over the dimensions from ``start`` on, but for the last ``dims``."""
    over = tuple(range(start, grad.dim() - dims))
    dtype = _product_dtype(grad)
    return grad.sum(over, dtype=dtype) if over else grad.to(dtype, copy=True)


def _linear(module: nn.Linear, x: Tensor, grad: Tensor, trained: frozenset[str]) -> _Found:
    return _affine(x, grad, *(name if name in trained else None for name in ("weight", "bias")))


def _affine(x: Tensor, grad: Tensor, weight: str | None, bias: str | None) -> _Found:
    found: _Found = {}
    if grad.dim() < 2:
        raise RuntimeError("a linear layer's input has no dimension of samples")
    if weight is not None:
        found[weight] = _Products(_positions(grad), _positions(x))
    if bias is not None:
        found[bias] = _sum_to(grad, 1)
    return found


def _embedding(module: nn.Embedding, x: Tensor, grad: Tensor, trained: frozenset[str]) -> _Found:
    if module.padding_idx is not None:
        grad = grad.masked_fill((x == module.padding_idx)[..., None], 0)
    return {"weight": _Rows(_matrix(x), _positions(grad))}


def _convolution(module: nn.Conv2d, x: Tensor, grad: Tensor, trained: frozenset[str]) -> _Found:
    found: _Found = {}
    if grad.dim() != len(module.kernel_size) + 2:
        raise RuntimeError("a convolution's input has no dimension of samples")
    if "weight" in trained:
        padding = list(module._reversed_padding_repeated_twice)
        if any(padding):
            x = F.pad(x, padding, "constant" if module.padding_mode == "zeros" else module.padding_mode)
        found["weight"] = _Patches(grad, x, module.kernel_size, module.stride, module.dilation, module.groups)
    if "bias" in trained:
        found["bias"] = _sum_to(grad, 0, start=2)
    return found


def _layer_norm(module: Any, x: Tensor, grad: Tensor, trained: frozenset[str]) -> _Found:
    dims = len(module.normalized_shape)
    found: _Found = {}
    if "weight" in trained:
        normalize = F.rms_norm if isinstance(module, nn.RMSNorm) else F.layer_norm
        normal = normalize(x.to(_product_dtype(x)), module.normalized_shape, eps=module.eps)
        found["weight"] = _sum_to(normal * grad, dims)
    if "bias" in trained:
        found["bias"] = _sum_to(grad, dims)
    return found


def _group_norm(module: Any, x: Tensor, grad: Tensor, trained: frozenset[str]) -> _Found:
    found: _Found = {}
    if "weight" in trained:
        groups = module.num_groups if isinstance(module, nn.GroupNorm) else module.num_features
        found["weight"] = _sum_to(F.group_norm(x.to(_product_dtype(x)), groups, eps=module.eps) * grad, 0, start=2)
    if "bias" in trained:
        found["bias"] = _sum_to(grad, 0, start=2)
    return found


def _mix(layer: _Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise RuntimeError(f"{layer.title} {_MIXES}")


_ATTENTION = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v")


def _attention(layer: _Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _attend(layer, cast(nn.MultiheadAttention, layer.module), *args, **kwargs)


def _attend(
    layer: _Layer,
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What the module computes, by linear layers that can be followed: its own forward pass is one function."""
    if query.dim() != 3:
        raise RuntimeError(f"what enters {layer.title} has no dimension of samples")
    if is_causal and attn_mask is None:
        raise RuntimeError(f"{layer.title} needs attn_mask with is_causal")
    width, heads, trained = module.embed_dim, module.num_heads, layer.trained

    def project(x: Tensor, weight: str, bias: str, begin: int = 0, end: int | None = None) -> Tensor:
        part, key, _ = layer.params[weight]
        matrix, vector = part._parameters[key], None
        if bias in layer.params:
            part, key, _ = layer.params[bias]
            vector = part._parameters[key]
        names = [name if name in trained else None for name in (weight, bias)]
        rows = cast(Tensor, matrix)[begin:end] if weight == "in_proj_weight" else cast(Tensor, matrix)
        output = F.linear(x, rows, None if vector is None else vector[begin:end])

        def samples(x: Tensor, grad: Tensor) -> _Found:
            found: dict[str, Any] = dict(_affine(x, grad, *names))
            whole = 3 * width
            for name, value in found.items():  # one parameter holds what three layers use
                if name == "in_proj_bias" and value.shape[1] != whole:
                    found[name] = F.pad(value, (begin, whole - begin - value.shape[1]))
                elif name == "in_proj_weight" and value.left.shape[2] != whole:
                    left = F.pad(value.left, (begin, whole - begin - value.left.shape[2]))
                    found[name] = _Products(left, value.right)
            return found

        return layer.record(output, x, samples)

    if module.in_proj_weight is not None and query is key and key is value:
        projected = project(query, "in_proj_weight", "in_proj_bias").chunk(3, -1)
    else:
        weights = ["in_proj_weight"] * 3 if module.in_proj_weight is not None else [f"{x}_proj_weight" for x in "qkv"]
        projected = tuple(
            project(x, weight, "in_proj_bias", i * width, (i + 1) * width)
            for i, (x, weight) in enumerate(zip((query, key, value), weights, strict=True))
        )
    q, k, v = (x.view(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2) for x in projected)
    mask = None
    if attn_mask is not None:
        mask = _as_bias(attn_mask, q)
        mask = mask.view(len(mask) // heads, heads, *mask.shape[1:]) if mask.dim() == 3 else mask
    if key_padding_mask is not None:
        padding = _as_bias(key_padding_mask, q)[:, None, None]
        mask = padding if mask is None else mask + padding
    shares: Tensor | None = None
    if need_weights:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        shares = F.dropout((scores if mask is None else scores + mask).softmax(-1), module.dropout)
        mixed = shares @ v
        shares = shares.mean(1) if average_attn_weights else shares
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, mask, module.dropout)
    return project(mixed.transpose(1, 2).flatten(2), "out_proj.weight", "out_proj.bias"), shares


def _as_bias(mask: Tensor, like: Tensor) -> Tensor:
    """What is added to the scores; true means that a position is left out."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return like.new_zeros(mask.shape).masked_fill(mask, -torch.inf)


def _whole(layer: _Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any module, with all that is in it."""
    before = torch.get_rng_state()
    layer.engine._paused = True
    try:
        output = layer.forward(*args, **kwargs)
    finally:
        layer.engine._paused = False
    if not torch.equal(before, torch.get_rng_state()):
        raise RuntimeError(
            f"{layer.title} draws random numbers, and its forward pass has to be repeated: put what it has parameters "
            "for into layers that have a rule, or its dropout behind it"
        )
    inputs, structure = pytree.tree_flatten((args, kwargs))
    inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    outputs, form = pytree.tree_flatten(output)
    call = _Call(layer, layer.trained, inputs, structure, {})
    for index, value in enumerate(outputs):
        if isinstance(value, Tensor) and value.is_floating_point():
            take = functools.partial(call.take, index)
            outputs[index] = _Watched.apply(value.clone(), layer.engine._anchor, take)
    return pytree.tree_unflatten(outputs, form)


@dataclass(eq=False)
class _Call:
    """A forward pass of a module without a rule, and the gradients of what it returned."""

    layer: _Layer
    trained: frozenset[str]
    inputs: list[Any]
    structure: Any
    grads: dict[int, Tensor]

    def take(self, index: int, grad: Tensor) -> None:
        engine = self.layer.engine
        engine._begin()
        if self not in engine._calls:
            self.grads.clear()
            engine._calls.append(self)
        self.grads[index] = grad.detach()

    def samples(self) -> _Found:
        """Each sample's gradients of the parameters."""
        layer = self.layer
        params = {name: cast(Tensor, part._parameters[key]) for name, (part, key, _) in layer.params.items()}
        trained = {name: params.pop(name).detach() for name in self.trained}
        n = len(next(iter(self.grads.values())))
        if n == 0:
            return {name: param.new_zeros(0, *param.shape) for name, param in trained.items()}
        index = list(self.grads)
        of_samples = [isinstance(x, Tensor) and x.dim() > 0 and len(x) == n for x in self.inputs]

        def loss(trained: dict[str, Tensor], inputs: list[Any], grads: list[Tensor]) -> Tensor:
            every = [x[None] if own else x for x, own in zip(inputs, of_samples, strict=True)]
            args, kwargs = pytree.tree_unflatten(every, self.structure)
            result = torch.func.functional_call(layer.module, {**params, **trained}, args, kwargs)
            outputs = pytree.tree_leaves(result)
            return cast(Tensor, sum((outputs[i][0] * grad).sum() for i, grad in zip(index, grads, strict=True)))

        over = [0 if own else None for own in of_samples]
        try:
            with torch.enable_grad():
                found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, over, 0))(
                    trained, self.inputs, [self.grads[i] for i in index]
                )
        except Exception as error:
            raise RuntimeError(f"torch.func cannot take the samples' gradients of {layer.title}: {error}") from error
        return cast(_Found, found)


_RULES: dict[type[nn.Module], _Rule] = {
    nn.Linear: _single(_linear),
    nn.Embedding: _single(_embedding),
    nn.Conv1d: _single(_convolution),
    nn.Conv2d: _single(_convolution),
    nn.Conv3d: _single(_convolution),
    nn.LayerNorm: _single(_layer_norm),
    nn.RMSNorm: _single(_layer_norm),
    nn.GroupNorm: _single(_group_norm),
    nn.modules.instancenorm._InstanceNorm: _single(_group_norm),
}


def _square_norms(batch: Sequence[Samples]) -> Tensor:
    squares = [part.square_norms() for part in batch if isinstance(part, FactoredSamples)]
    tensors = [_as_rows(part)[0] for part in batch if isinstance(part, Tensor)]
    if tensors:
        squares.append(_inner_products(tensors, tensors))
    return functools.reduce(torch.add, squares)


def _inner_products(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Of each sample's numbers in two lists, in float64."""
    found = torch.zeros(len(left[0]), dtype=_wide(left[0]), device=left[0].device)
    if op := _native("sample_products", left if left is right else left + right):
        op(left, [] if left is right else right, found)
        return found
    for x, y in zip(left, right, strict=True):
        for of in _slices(len(x), x.shape[1:].numel()):
            found[of] += (_matrix(x[of]).to(found.dtype) * _matrix(y[of])).sum(1)
    return found


def _norms(batch: Sequence[Samples]) -> Tensor:
    squares = _square_norms(batch)
    found = squares.sqrt()
    if any(part.dtype == torch.float64 for part in batch):
        # Far from one the squares of float64 numbers leave its range, or that in which it has all its digits.
        again = (~((squares > 1e-280) & squares.isfinite())).nonzero().flatten()
        if len(again):
            each = torch.stack([_scaled_norms(part, again) for part in batch])
            scale = _divisor(each.amax(0))
            found[again] = scale * (each / scale).square().sum(0).sqrt()
    return found


def _scaled_norms(samples: Samples, of: Tensor) -> Tensor:
    if isinstance(samples, FactoredSamples):
        return samples._scaled_norms(of)
    rows = samples.detach()[of].double()
    scale = _divisor(_largest(rows))
    return scale * _matrix(_times(rows, 1 / scale)).square().sum(1).sqrt()


def _largest(rows: Tensor) -> Tensor:
    """The largest magnitude of each row."""
    return _matrix(rows).abs().amax(1) if rows.shape[1:].numel() else rows.new_zeros(len(rows))


def _divisor(scale: Tensor) -> Tensor:
    """A power of two near it, by which to divide is exact, or one."""
    usable = (scale > 0) & scale.isfinite()
    # 1 / scale has to be a number, too.
    return torch.where(usable, scale, 1.0).log2().clamp(-1020, 1020).floor().exp2()


def _weighted_sums(batch: Sequence[Samples], weights: Tensor) -> list[list[Tensor]]:
    tensors = [part for part in batch if isinstance(part, Tensor)]
    found = iter(_weighted_tensors(tensors, weights) if tensors else [])
    return [part.weighted_sums(weights) if isinstance(part, FactoredSamples) else next(found) for part in batch]


def _weighted_tensors(tensors: Sequence[Tensor], weights: Tensor) -> list[list[Tensor]]:
    samples, undo = zip(*map(_as_rows, tensors), strict=True)
    weights = _flushed(weights.to(samples[0].device, _wide(samples[0]))).contiguous()
    sums = [weights.new_zeros(len(weights), *rows.shape[1:]) for rows in samples]
    if op := _native("weighted_sums", list(samples)):
        op(list(samples), weights, sums)
    else:
        wanted = (weights != 0).any(0)
        for rows, total in zip(samples, sums, strict=True):
            for of in _slices(len(rows), rows.shape[1:].numel()):
                values = torch.where(wanted[of, None], _matrix(rows[of]).to(weights.dtype), 0.0)
                _matrix(total).add_(weights[:, of] @ values)
    return [[row.permute(order) for row in total] for total, order in zip(sums, undo, strict=True)]


def _as_rows(samples: Tensor) -> tuple[Tensor, list[int]]:
    """The samples with each one's numbers in the order of memory, and how to permute a row's dimensions back."""
    order = sorted(range(1, samples.dim()), key=lambda i: samples.stride(i), reverse=True)
    rows = samples.detach().permute(0, *order)
    if not rows.is_contiguous():
        rows, order = samples.detach().contiguous(), list(range(1, samples.dim()))
    return rows, [order.index(i + 1) for i in range(len(order))]


def _matrix(rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), rows.shape[1:].numel())


def _times(rows: Tensor, factors: Tensor) -> Tensor:
    """Each row times its factor."""
    return rows * factors.view(-1, *[1] * (rows.dim() - 1))


def _flushed(weights: Tensor) -> Tensor:
    """Zero where rounding could make a weight larger by a part of itself."""
    return torch.where(weights.abs() < torch.finfo(weights.dtype).tiny, 0.0, weights)


def _slices(n: int, size: int) -> Iterator[slice]:
    """Some samples at a time, of so many numbers each."""
    step = max(1, _CHUNK // max(1, size))
    return (slice(begin, min(begin + step, n)) for begin in range(0, n, step))


def _pick(part: Any, of: slice | Tensor, dtype: torch.dtype | None) -> Any:
    """Some samples of factors."""
    left, right = part.left[of], part.right[of].to(dtype)
    return replace(part, left=left.to(dtype) if left.is_floating_point() else left, right=right)


def _pair_up(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms of sums of products, from the inner products of all pairs of factors."""
    sizes = [x.diagonal(dim1=-2, dim2=-1).to(_wide(x)).clamp(min=0).flatten(1) for x in (left, right)]
    added = (sizes[0] * sizes[1]).sqrt().sum(1).square()
    largest = torch.maximum(sizes[0].sum(1), sizes[1].sum(1))
    return _inner_products([left], [right]), _in_range(added, largest, right.dtype)


def _in_range(added: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Infinite where the factors are too large for products in float32."""
    return added if dtype == torch.float64 else added.masked_fill(largest > _RANGE, torch.inf)


def _counted(rows: Tensor) -> Tensor:
    """The number of each row, beside it."""
    return torch.arange(len(rows), device=rows.device)[:, None]


def _add_rows(index: Tensor, rows: Tensor, count: int) -> Tensor:
    """A matrix of so many rows, to which these have been added. Unlike index_add_ it is quick on the CPU."""
    return cast(Tensor, torch.ops.aten.embedding_dense_backward(rows, index, count, -1, False))


def _wide(tensor: Tensor) -> torch.dtype:
    """Float64 where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _product_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@contextlib.contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Products as float32 makes them: a norm that is a little too small is a broken promise."""
    precision = torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.set_float32_matmul_precision, precision)
        if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
            torch.backends.cudnn.allow_tf32 = False
            stack.callback(setattr, torch.backends.cudnn, "allow_tf32", True)
        yield


def _native(name: str, tensors: list[Tensor]) -> Callable[..., None] | None:
    """The native pass, where it takes these."""
    return ops.native(name, tensors[0].device) if is_native(tensors) else None

"""A list of tensors with the arithmetic of one: what ``torch._foreach_*`` can do, written as for a single tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Scalar: TypeAlias = float | Tensor
"""A number, or a tensor of no dimensions that holds one."""


class TensorList:
    """Tensors that share an operation: ``a.lerp_(b, 0.1)`` is ``torch._foreach_lerp_``, ``a * b`` is elementwise.

    Every tensor method that has a foreach twin can be called; the other operand is a ``TensorList`` of the same length,
    a number, or a tensor of no dimensions. A method that works in place returns the list itself.

    Args:
        tensors: the tensors, of any shapes; the list is not copied.
    """

    __slots__ = ("tensors",)

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def __getattr__(self, name: str) -> Callable[..., TensorList]:
        if name.startswith("__"):  # copy and pickle ask for hooks that are not there
            raise AttributeError(name)
        return lambda *args, **kwargs: self._call(name, *args, **kwargs)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> TensorList:
        foreach = getattr(torch, "_foreach_" + name)
        operands = [arg.tensors if isinstance(arg, TensorList) else arg for arg in args]
        result = foreach(self.tensors, *operands, **kwargs)
        return self if name.endswith("_") else TensorList(list(result))

    def __add__(self, other: TensorList | Scalar) -> TensorList:
        return self._call("add", other)

    def __sub__(self, other: TensorList | Scalar) -> TensorList:
        return self._call("sub", other) if isinstance(other, TensorList | float | int) else self + -other

    def __mul__(self, other: TensorList | Scalar) -> TensorList:
        return self._call("mul", other)

    def __truediv__(self, other: TensorList | Scalar) -> TensorList:
        return self._call("div", other)

    def __pow__(self, other: TensorList | Scalar) -> TensorList:
        return self._call("pow", other)

    def __neg__(self) -> TensorList:
        return self._call("neg")

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: Scalar) -> TensorList:
        return -self + other

    def __rtruediv__(self, other: Scalar) -> TensorList:
        return self._call("reciprocal") * other

    def __rpow__(self, other: float) -> TensorList:
        return TensorList(list(torch._foreach_pow(other, self.tensors)))

    def __iadd__(self, other: TensorList | Scalar) -> TensorList:
        return self._call("add_", other)

    def __isub__(self, other: TensorList | Scalar) -> TensorList:
        return self._call("sub_", other) if isinstance(other, TensorList | float | int) else self._call("add_", -other)

    def __imul__(self, other: TensorList | Scalar) -> TensorList:
        return self._call("mul_", other)

    def __itruediv__(self, other: TensorList | Scalar) -> TensorList:
        return self._call("div_", other)

    def __ge__(self, other: float) -> TensorList:
        return TensorList([tensor >= other for tensor in self.tensors])


def sqrt(x: Any) -> Any:
    """The square root of a number, a tensor or a list of tensors."""
    return math.sqrt(x) if isinstance(x, float | int) else x.sqrt()


def at_least(x: Any, bound: float) -> Any:
    """The larger of ``x`` and ``bound``, for a number, a tensor or a list of tensors."""
    return max(x, bound) if isinstance(x, float | int) else x.clamp_min(bound)


def finite(x: Any) -> Any:
    """Which numbers of a tensor, or of a list of tensors, are neither infinite nor NaN."""
    return TensorList([tensor.isfinite() for tensor in x.tensors]) if isinstance(x, TensorList) else x.isfinite()


def where(condition: Any, x: Any, y: Any) -> Any:
    """``x`` where ``condition`` holds and ``y`` elsewhere; a condition of one element decides for a whole tensor."""
    if isinstance(condition, bool):
        return x if condition else y
    if isinstance(condition, Tensor):
        return torch.where(condition, x, y)
    columns = [v.tensors if isinstance(v, TensorList) else [v] * len(condition.tensors) for v in (x, y)]
    return TensorList([torch.where(*row) for row in zip(condition.tensors, *columns, strict=True)])

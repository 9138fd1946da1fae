"""The native libraries: loads them, tells torch.compile about their ops, and says what is fused where."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_MISSING: dict[str, str] = {}
"""For each type of device, why its library is not loaded; empty where it is."""


def _load(library: str) -> str:
    """Load a library of this package; the answer is why that could not be, or nothing."""
    path = Path(__file__).with_name(library + ".so")
    if not path.exists():
        tool = "nvcc, or torch had no CUDA" if library == "_C_cuda" else "C++ compiler"
        return f"optimzoo was installed without {path.name}: when it was built there was no torch, or no {tool}"
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]  # untyped in torch 2.14
    except OSError as error:  # a torch older than the library's target, or another platform
        return f"{path.name} does not load: {error}"
    return ""


_MISSING["cpu"] = _load("_C")
if torch.version.cuda is None:
    _MISSING["cuda"] = "this build of torch has no CUDA"
else:
    _MISSING["cuda"] = _MISSING["cpu"] or _load("_C_cuda")  # the schemas are in _C


def missing(device_type: str) -> str:
    """Why nothing is fused on this type of device (``"cpu"``, ``"cuda"``, ...), or an empty string where it is."""
    return _MISSING.get(device_type, f"there are no fused steps for {device_type}")


def fused(name: str) -> Callable[..., None] | None:
    """The native op of the rule called ``name``, known to torch.compile, or ``None`` where there is none.

    The op is ``optimzoo::fused_NAME_``; its arguments are the rule's own, in the same order (``csrc/fused.h``), each
    tensor a list over parameters, and ``master``, ``weight_decay``, ``decoupled_weight_decay``, ``fixed_decay``,
    ``maximize``, ``stochastic``, ``seed``, ``grad_scale``, ``found_inf`` and ``held`` (:class:`Held`).
    """
    packet = getattr(torch.ops.optimzoo, f"fused_{name}_", None)
    return None if packet is None else _known(packet.default)


def native(name: str, device: torch.device) -> Callable[..., None] | None:
    """The op ``optimzoo::NAME``, or ``None`` where the library of a type of device is not loaded."""
    return None if missing(device.type) else _OPS[name]


_with_fake: set[str] = set()


def _known(op: Any) -> Callable[..., None]:
    """Tell torch.compile of an op; nothing is returned and only arguments are written, which its schema says."""
    if op.name() not in _with_fake:
        torch.library.register_fake(op, _fake)
        _with_fake.add(op.name())
    return op  # type: ignore[no-any-return]  # torch.ops is untyped


def _fake(*args: Any, **kwargs: Any) -> None:
    """Does to fake tensors what the ops do: nothing that could be seen. Real ones on meta come here, and are wrong."""
    for arg in (*args, *kwargs.values()):
        for tensor in arg if isinstance(arg, list) else [arg]:
            if type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_meta:
                raise RuntimeError("a native step cannot work on meta tensors, which hold no numbers")


# Those that belong to no rule; found here, not where they are called, for torch.compile cannot follow that.
_OPS: dict[str, Callable[..., None]] = {}
if not _MISSING["cpu"]:
    for _name in (
        *("dot", "compare_gradients", "sample_sums", "sample_dots", "sample_products", "weighted_sums"),
        *("normal_", "cbo_"),
    ):
        _OPS[_name] = _known(getattr(torch.ops.optimzoo, _name).default)


class Held:
    """Lists of CPU tensors, kept unpacked on the native side to be passed again and again.

    To bring a thousand small tensors over from Python takes longer than their step. References are kept, not addresses:
    a tensor whose ``data`` is replaced is seen as it is.

    Args:
        columns: lists of one length: the states, in an op's order, and the steps. Parameters are not among them: torch
            swaps those for others (``torch.utils.swap_tensors``) only while nobody else holds them.
    """

    def __init__(self, columns: tuple[list[Tensor], ...]) -> None:
        self.columns = columns
        self.number: int = torch.ops.optimzoo.hold([tensor for column in columns for tensor in column])
        weakref.finalize(self, torch.ops.optimzoo.release, self.number).atexit = False

    def holds(self, columns: tuple[list[Tensor], ...]) -> bool:
        """Whether these are the very same tensors."""
        return len(columns) == len(self.columns) and all(
            len(own) == len(other) and all(map(operator.is_, own, other))
            for own, other in zip(self.columns, columns, strict=True)
        )

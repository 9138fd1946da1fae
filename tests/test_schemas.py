"""Every native op with arguments that are wrong in a drawn way: it raises and has written nothing, or they were right.

``make test-sanitize`` runs this against a library that watches every access of memory.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native import RULES, arguments
from torch import Tensor

from optimzoo import ops

OPS = {
    name.removeprefix("optimzoo::"): getattr(torch.ops.optimzoo, name.removeprefix("optimzoo::")).default
    for name in sorted(torch._C._dispatch_get_all_op_names())
    if name.startswith("optimzoo::")
}


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, dtype=torch.float64).add_(0.5).to(dtype)


def of_rule(name: str) -> Callable[[], list[Any]]:
    def make() -> list[Any]:
        lists, kwargs = arguments(RULES[name], shapes=((3, 4), (0,), (17,)))
        schema = OPS[f"fused_{name}_"]._schema.arguments
        return [*lists, *(kwargs.get(a.name, a.default_value) for a in schema[len(lists) :])]

    return make


def swarm() -> list[Any]:
    """Arguments of ``cbo_``: two runs of four particles of five coordinates, in two groups."""
    rows = (2, 4)
    return [draw(2, 4, 5), draw(2, 5), draw(*rows), torch.tensor([2, 5]), draw(2), draw(2), draw(*rows), draw(*rows),
            draw(*rows), 0.5, 1, 2, 0]  # fmt: skip


RIGHT: dict[str, Callable[[], list[Any]]] = {f"fused_{name}_": of_rule(name) for name in RULES}
RIGHT |= {
    "dot": lambda: [[draw(3, 4), draw(17)], [draw(3, 4), draw(17)], draw()],
    "compare_gradients": lambda: [[draw(3, 4), draw(17)], [draw(3, 4), draw(17)], True, draw(2)],
    "sample_sums": lambda: [[draw(3, 4), draw(3, 17)], [draw(4), draw(17)], [draw(4), draw(17)], draw()],
    "sample_dots": lambda: [[draw(3, 4), draw(3, 17)], [draw(4), draw(17)], draw(3)],
    "sample_products": lambda: [[draw(3, 4), draw(3, 17)], [draw(3, 4), draw(3, 17)], draw(3)],
    "weighted_sums": lambda: [[draw(3, 4), draw(3, 17)], draw(2, 3), [draw(2, 4), draw(2, 17)]],
    "normal_": lambda: [draw(2, 3, 5), 1, 2, 3],
    "cbo_": swarm,
    "hold": lambda: [[draw(3), draw(2)]],
    "release": lambda: [-1],
}
TAKE_ANYTHING = {"hold", "release"}  # any list may be kept, and what is not kept can be let go

# Each makes a tensor that is wrong wherever it is put.
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "another size": lambda t: torch.ones(t.numel() + 7, dtype=t.dtype),
    "an integer": lambda t: t.to(torch.int32),
    "complex": lambda t: t.to(torch.complex64),
    "on meta": lambda t: t.to("meta"),
    "no memory": lambda t: _emptied(t.clone()),
    "sparse": lambda t: t.to_sparse(),
}
# These may be right: for a tensor that is read in any layout or precision, or of one element.
ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "another dtype": lambda t: t.to(torch.float64 if t.dtype is not torch.float64 else torch.float32),
    "bfloat16": lambda t: t.to(torch.bfloat16),
    "with gaps": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: torch.ones((), dtype=t.dtype).expand(t.shape),
    "overlapping": lambda t: torch.ones(t.numel() + 1, dtype=t.dtype).as_strided(t.shape, [1] * t.dim()),
    "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    "an offset of one byte": lambda t: _shifted(t),
    "one dimension more": lambda t: t[None],
    "a view of the base": lambda t: torch.cat([t.reshape(-1), t.reshape(-1)])[t.numel() :].view(t.shape),
}
NUMBERS = [0, 1, -1, 2**31, 2**63 - 1, -(2**63)]
FLOATS = [0.0, -1.0, math.nan, math.inf, -math.inf, 1e308, 5e-324]


def _emptied(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def _shifted(tensor: Tensor) -> Tensor:
    if tensor.numel() == 0:
        return tensor
    size = tensor.element_size()
    room = torch.zeros((tensor.numel() + 1) * size, dtype=torch.uint8)
    return room[size : size + tensor.numel() * size].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [tensor for each in tree for tensor in tensors(each)] if isinstance(tree, list) else []


def readable(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and tensor.untyped_storage().nbytes() > 0


def content(tensor: Tensor) -> bytes:
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).numpy().tobytes()


def outcome(op: Any, args: list[Any]) -> bool:
    """Whether a call went through. If it raised, nothing was written; else nothing but what the schema says."""
    positional = [v for a, v in zip(op._schema.arguments, args, strict=True) if not a.kwarg_only]
    named = {a.name: v for a, v in zip(op._schema.arguments, args, strict=True) if a.kwarg_only}
    written = [a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments]
    kept = [t for arg in args for t in tensors(arg) if readable(t)]
    mutable = [t for arg, w in zip(args, written, strict=True) if w for t in tensors(arg) if readable(t)]
    mutable = {t.untyped_storage().data_ptr() for t in mutable}
    before = [content(t) for t in kept]
    try:
        op(*positional, **named)
    except (RuntimeError, NotImplementedError):
        assert [content(t) for t in kept] == before, "a call that raised has written"
        return False
    changed = [t for t, old in zip(kept, before, strict=True) if content(t) != old]
    assert all(t.untyped_storage().data_ptr() in mutable for t in changed), "the schema does not say this is written"
    return True


def test_every_op_is_here():
    assert RIGHT.keys() == OPS.keys()


@pytest.mark.parametrize("name", OPS)
def test_right_arguments_go_through(name):
    assert outcome(OPS[name], RIGHT[name]())


@pytest.mark.parametrize("name", [name for name in OPS if name not in TAKE_ANYTHING])
@settings(max_examples=60)
@given(data=st.data())
def test_wrong_arguments_raise_and_write_nothing(name, data):
    with torch.sparse.check_sparse_tensor_invariants(enable=True):
        args = RIGHT[name]()
        places = [(i, j) for i, arg in enumerate(args) if isinstance(arg, list) for j in range(len(arg))]
        places += [(i, None) for i, arg in enumerate(args) if isinstance(arg, Tensor)]
        i, j = data.draw(st.sampled_from(places))
        victim = args[i] if j is None else args[i][j]
        if j is not None and data.draw(st.booleans()):
            if data.draw(st.booleans()):
                args[i].append(victim.clone())
            else:
                del args[i][j]
        else:
            how = data.draw(st.sampled_from([h for h in WRONG if victim.numel() or h != "no memory"]))
            wrong = WRONG[how](victim)
            if j is None:
                args[i] = wrong
            else:
                args[i][j] = wrong
        assert not outcome(OPS[name], args)


@pytest.mark.parametrize("name", [name for name in OPS if name not in TAKE_ANYTHING])
def test_memory_that_was_given_back_is_found_wherever_it_is(name):
    for number in range(len(tensors(RIGHT[name]()))):
        args = RIGHT[name]()
        victim = tensors(args)[number]
        if victim.numel() > 0:
            _emptied(victim)
            assert not outcome(OPS[name], args)


@pytest.mark.parametrize("name", [name for name in OPS if name not in TAKE_ANYTHING])
@settings(max_examples=60)
@given(data=st.data())
def test_odd_arguments_are_right_or_raise(name, data):
    # Two oddities at once, numbers out of all range, and one tensor in the place of another.
    args = copy.deepcopy(RIGHT[name]())
    for _ in range(2):
        i = data.draw(st.integers(0, len(args) - 1))
        arg = args[i]
        if isinstance(arg, list) and arg:
            j = data.draw(st.integers(0, len(arg) - 1))
            if data.draw(st.booleans()):
                arg[j] = ODD[data.draw(st.sampled_from(list(ODD)))](arg[j])
            else:
                arg[j] = data.draw(st.sampled_from([t for t in tensors(args) if readable(t)]))
        elif isinstance(arg, Tensor):
            args[i] = data.draw(st.sampled_from([ODD[data.draw(st.sampled_from(list(ODD)))](arg), *tensors(args)]))
        elif isinstance(arg, bool):
            args[i] = not arg
        elif isinstance(arg, int) and OPS[name]._schema.arguments[i].name != "held":
            args[i] = data.draw(st.sampled_from(NUMBERS))
        elif isinstance(arg, float):
            args[i] = data.draw(st.sampled_from(FLOATS))
    outcome(OPS[name], args)


@pytest.mark.parametrize("number", [0, -1, 2**62])
def test_a_list_that_is_not_held_can_be_let_go(number):
    torch.ops.optimzoo.release(number)
    held = ops.Held(([torch.ones(2)],))
    torch.ops.optimzoo.release(held.number)
    torch.ops.optimzoo.release(held.number)

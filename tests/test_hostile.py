"""What nobody means to give an optimizer: a clear error and nothing changed, or what torch.optim does; never a crash.

``test_errors.py`` has wrong settings, parameters, gradients and state of the classes that ``cases.py`` drives. Here are
odd numbers, odd memory and damaged checkpoints, for every public class.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_infos import Info, batch, infos, model, of_gradients
from steps import bits
from test_errors import THINGS, inside, places
from torch import Tensor

import optimzoo

IMPLEMENTATIONS = {"single": dict(foreach=False, fused=False), "foreach": dict(foreach=True), "fused": dict(fused=True)}
DENORMAL = 1e-310
ODD_NUMBERS = [math.nan, math.inf, -math.inf, DENORMAL, -DENORMAL]

each_info = pytest.mark.parametrize("info", infos, ids=lambda info: info.name)
each_gradient = pytest.mark.parametrize("info", of_gradients, ids=lambda info: info.name)
each_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS.values(), ids=list(IMPLEMENTATIONS))


def info_of(name: str) -> Info:
    return next(info for info in infos if info.name == name)


def quiet(info: Info) -> dict[str, Any]:
    return info.settings["default"]


def ramp(*shape: int) -> Tensor:
    return torch.linspace(0.5, 1.5, math.prod(shape), dtype=torch.float64).view(shape)


def stepped(info: Info, start: Tensor, grad: Tensor, steps: int = 3, **options: Any) -> Tensor:
    param = start.clone().requires_grad_()
    optimizer = info.optim_cls([param], **quiet(info), **options)
    for _ in range(steps):
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("number", ODD_NUMBERS, ids=str)
@pytest.mark.parametrize("where", ["gradient", "parameter"])
@each_implementation
@each_gradient
def test_an_odd_number_stays_in_its_place(info, impl, where, number):
    start, grad = ramp(7), ramp(7).flip(0)
    usual = stepped(info, start, grad, **impl)
    (grad if where == "gradient" else start)[2] = number
    odd = stepped(info, start, grad, **impl)
    elsewhere = torch.arange(7) != 2
    if info.optim_cls is optimzoo.AdaGradNorm and where == "gradient":  # its step size is one for all
        assert odd.isfinite().all() == (abs(number) == DENORMAL)
        return
    torch.testing.assert_close(odd[elsewhere], usual[elsewhere], rtol=1e-12, atol=0)
    if abs(number) == DENORMAL:
        assert odd.isfinite().all()


@each_implementation
@each_gradient
def test_ten_thousand_parameters_are_one(info, impl):
    if impl == IMPLEMENTATIONS["single"]:
        return  # it takes them one by one
    count = 10_000 if "fused" in impl else 1_000
    start, grad = ramp(count), ramp(count).sin()
    whole = stepped(info, start, grad, 2, **impl)
    params = [piece.clone().requires_grad_() for piece in start.split(1)]
    optimizer = info.optim_cls(params, **quiet(info), **impl)
    for _ in range(2):
        for param, piece in zip(params, grad.split(1), strict=True):
            param.grad = piece.clone()
        optimizer.step()
    torch.testing.assert_close(torch.cat([p.detach() for p in params]), whole, rtol=1e-12, atol=1e-14)


@each_implementation
@each_gradient
def test_empty_tensors_and_scalars_take_part(info, impl):
    params = [
        ramp(0, 3).requires_grad_(),
        torch.tensor(0.7, dtype=torch.float64).requires_grad_(),
        ramp(2).requires_grad_(),
    ]
    optimizer = info.optim_cls(params, **quiet(info), **impl)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert all(optimizer.state[p]["step"] == 2 for p in params)
    alone = info.optim_cls([torch.empty(0, requires_grad=True)], **quiet(info), **impl)
    alone.param_groups[0]["params"][0].grad = torch.empty(0)
    alone.step()


OVERLAPS: dict[str, Callable[[], Tensor]] = {
    "expanded": lambda: torch.ones(3, 1).expand(3, 4),
    "overlapping": lambda: torch.ones(5).as_strided((3, 3), (1, 1)),
    "unfolded": lambda: torch.ones(6).unfold(0, 3, 1),
}


@pytest.mark.parametrize("name", OVERLAPS)
@each_gradient
def test_elements_that_share_memory_are_an_error_and_nothing_changes(info, name):
    for impl in ({}, IMPLEMENTATIONS["foreach"], IMPLEMENTATIONS["single"]):
        good, bad = torch.ones(2, requires_grad=True), OVERLAPS[name]().requires_grad_()
        optimizer = info.optim_cls([good, bad], **quiet(info), **impl)
        good.grad, bad.grad = torch.ones(2), torch.ones(bad.shape)
        with pytest.raises(RuntimeError, match="share memory"):
            optimizer.step()
        assert not optimizer.state
        assert (good == 1).all()
        assert (bad == 1).all()


def test_elements_that_lie_between_each_other_do_not_share_memory():
    param = torch.ones(8).as_strided((3, 2), (2, 3)).requires_grad_()
    param.grad = torch.ones(3, 2)
    optimzoo.DiffGrad([param]).step()
    assert (param != 1).all()


@each_implementation
@each_gradient
def test_gradients_that_require_gradients_are_numbers(info, impl):
    usual = stepped(info, ramp(5), ramp(5).cos(), 2, **impl)
    param, weight = ramp(5).requires_grad_(), ramp(5).cos().requires_grad_()
    optimizer = info.optim_cls([param], **quiet(info), **impl)
    for _ in range(2):
        (param.grad,) = torch.autograd.grad((weight * param).sum(), param, create_graph=True)
        optimizer.step()
    torch.testing.assert_close(param.detach(), usual, rtol=0, atol=0)
    assert not any(value.requires_grad for value in optimizer.state[param].values())


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "shape": lambda t: torch.ones(7, dtype=t.dtype),
    "dtype": lambda t: t.to(torch.float32),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("with_gradient", [False, True], ids=["parameter", "parameter-and-gradient"])
@each_implementation
@each_gradient
def test_a_parameter_that_changes_between_steps_is_named(info, impl, with_gradient, what):
    params = [ramp(3).requires_grad_(), ramp(4).requires_grad_()]
    optimizer = info.optim_cls(params, **quiet(info), **impl)
    if with_gradient and not set(optimizer._rule.states) - {"noise"}:
        return  # it keeps no averages of a parameter's shape and dtype
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    if with_gradient:
        params[1].grad = None
    params[1].data = CHANGES[what](params[1].data)
    if with_gradient:
        params[1].grad = torch.ones_like(params[1])
    before = bits([*params, *(dict(row) for row in optimizer.state.values())])
    with pytest.raises(RuntimeError, match=r"shape|dtype|float32|sign"):
        optimizer.step()
    assert bits([*params, *(dict(row) for row in optimizer.state.values())]) == before


def test_a_swarm_whose_parameter_changes_its_shape_says_so():
    network = model()
    optimizer = optimzoo.CBO(network.parameters(), n_particles=4, seed=1)
    data = batch()
    info_of("CBO").train(optimizer, network, *data)
    before = bits(optimizer.state_dict()["state"])
    network[0].weight.data = torch.ones(5, 6)
    with pytest.raises((RuntimeError, ValueError)):
        info_of("CBO").train(optimizer, network, *data)
    assert bits(optimizer.state_dict()["state"]) == before


def test_state_of_a_checkpoint_that_shares_memory_is_given_its_own():
    params = [ramp(3).requires_grad_(), ramp(3).requires_grad_()]

    def step(optimizer):
        for param in params:
            param.grad = param.detach().clone()
        optimizer.step()

    step(first := optimzoo.AdaBelief(params))
    shared = first.state_dict()
    count, average = torch.tensor(1.0), torch.full((3,), 0.1, dtype=torch.float64)
    for row in shared["state"].values():
        row |= dict(step=count, exp_avg=average, exp_avg_var=average)
    whole = copy.deepcopy(shared)
    for row in whole["state"].values():
        row |= {name: value.clone() for name, value in row.items()}
    outcomes = []
    for state_dict in (shared, whole):
        optimizer = optimzoo.AdaBelief(params)
        optimizer.load_state_dict(state_dict)
        with torch.no_grad():
            for param in params:
                param.copy_(ramp(3))
        step(optimizer)
        outcomes.append(bits([*params, *(dict(row) for row in optimizer.state.values())]))
    assert outcomes[0] == outcomes[1]
    assert count == 1


def test_a_flag_of_a_checkpoint_that_is_none_is_named():
    param = ramp(3).requires_grad_()
    optimizer = optimzoo.AdaBelief([param], fused=True)
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0]["amsgrad"] = torch.ones(3)
    with pytest.raises(TypeError, match="amsgrad must be True or False"):
        optimizer.load_state_dict(state_dict)


# Checkpoints damaged at every key


# Where torch's own optimizers step, they load whatever they are given.
SETTINGS = {
    "TPSGD": dict(info_of("TPSGD").settings["AdaBelief within"]),
    "DPSGD": {**info_of("DPSGD").settings["default"], "base": optimzoo.AdaBelief},
    "DiceSGD": {**info_of("DiceSGD").settings["default"], "base": optimzoo.AdaBelief},
}


def trained(info: Info) -> tuple[Any, Any]:
    network = model()
    optimizer = info.make(network, **SETTINGS.get(info.name, quiet(info)))
    for _ in range(2):
        info.train(optimizer, network, *batch())
    return network, optimizer


def damages(state_dict: Any) -> Any:
    """Every way to damage one place, as a function of a copy."""
    for *path, key in places(state_dict):
        if any(isinstance(step, int) and step > 0 for step in [*path, key]):
            continue  # the second of a list is as the first
        old = inside(state_dict, [*path, key])
        yield (path, key, "gone"), lambda tree, path=path, key=key: inside(tree, path).__delitem__(key)
        things = [*THINGS, "1", 1.5, True, b"", object(), {"a": 1}, [None], torch.ones(0), torch.ones(3, device="meta")]
        if isinstance(old, Tensor):
            things += [old.flatten()[:-1], old.to(torch.int64), old.to(torch.complex64), old.to_sparse(), old[None]]
        for thing in things:
            yield (
                (path, key, thing),
                lambda tree, path=path, key=key, thing=thing: inside(tree, path).__setitem__(key, thing),
            )


def everything(network: Any, optimizer: Any) -> Any:
    return bits([list(network.parameters()), copy.deepcopy(optimizer.state_dict())])


@each_info
def test_a_checkpoint_damaged_at_any_key_loads_and_steps_or_is_refused_without_a_trace(info):
    whole = trained(info)[1].state_dict()
    network, optimizer = trained(info)
    data, refused = batch(), 0
    before, start = everything(network, optimizer), copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(network.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a step size of 2**62 has its own, and so has a history that is lost
        for what, damage in damages(whole):
            state_dict = copy.deepcopy(whole)
            damage(state_dict)
            try:
                optimizer.load_state_dict(state_dict)
            except (ValueError, TypeError, KeyError):
                refused += 1
                assert everything(network, optimizer) == before, what
                continue
            try:
                info.train(optimizer, network, *data)
            except (ValueError, FloatingPointError) as error:
                raise AssertionError(f"{what} was loaded, and then: {error}") from error
            network.load_state_dict(weights)
            optimizer.load_state_dict(copy.deepcopy(start))
    assert refused > 100

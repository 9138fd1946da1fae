"""What torch.optim promises of an optimizer holds for every public class."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from cases import CASES, ELSEWHERE, Case, each_backend, each_case, each_setting, tolerance
from steps import advance, averages, bits, close, copies, gradients, normal, parameters, results, same, saved, snapshot
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR

import optimzoo
from optimzoo.optimizer import Tensorwise

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def linear_model(seed: int = 0) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.copy_(normal(seed + i, *param.shape))
    return model


def test_every_public_name_is_in_the_table():
    assert {case.name for case in CASES} | set(ELSEWHERE) == set(optimzoo.__all__)
    assert all(issubclass(case.cls, Tensorwise) and case.cls.__doc__ for case in CASES)


# Groups


@each_backend()
def test_groups_have_settings_of_their_own(case, backend):
    params = parameters(requires_grad=not backend.get("differentiable"))
    grads = gradients(params, 4)
    together = case.cls([dict(params=params[:2], lr=0.1), dict(params=params[2:], weight_decay=0.2)], **backend)
    advance(together, grads)
    alone = copies(parameters(requires_grad=not backend.get("differentiable")))
    first = advance(case.cls(alone[:2], lr=0.1, **backend), [row[:2] for row in grads])
    second = advance(case.cls(alone[2:], weight_decay=0.2, **backend), [row[2:] for row in grads])
    assert [bits(t) for t in results(together)[:5]] == [bits(t) for t in [*results(first)[:2], *results(second)[:3]]]


@each_case
def test_a_group_added_later_takes_part_from_then_on(case):
    first, second = parameters(layouts=["vector", "transposed"])
    optimizer = case.cls([first])
    advance(optimizer, [[g[0]] for g in gradients([first], 2)])
    optimizer.add_param_group(dict(params=[second], lr=0.5))
    assert optimizer.param_groups[1].keys() == optimizer.param_groups[0].keys()
    advance(optimizer, gradients([first, second], 3, seed=2))
    assert optimizer.state[first]["step"] == 5
    assert optimizer.state[second]["step"] == 3


@each_case
def test_named_parameters_keep_their_names_in_the_checkpoint(case):
    model = linear_model()
    optimizer = case.cls(model.named_parameters())
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    other = case.cls(model.named_parameters())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["param_names"] == names


@each_case
def test_the_signature_begins_as_in_torch_optim(case):
    params = parameters()
    group = case.cls(params, 0.25).param_groups[0]
    assert group["lr"] == 0.25
    assert {"maximize", "capturable", "differentiable", "weight_decay"} <= group.keys()


@each_case
def test_the_representation_shows_the_hyper_parameters(case):
    text = repr(case.cls(parameters(), lr=0.125))
    assert case.name in text
    assert "lr: 0.125" in text


# Copies and checkpoints


@each_setting
def test_a_state_dict_is_indices_and_plain_values_and_round_trips(case, settings):
    params = parameters()
    optimizer = advance(case.cls(params, **settings), gradients(params, 3))
    state_dict = saved(optimizer)
    assert set(state_dict) == {"state", "param_groups"}
    assert sorted(state_dict["state"]) == list(range(len(params)))
    names = [n for n in optimizer.rule(optimizer.param_groups[0]).states if n not in case.cls.drawn]
    signs = ["sign"] if "zeros" in case.refuses and settings.get("dale", True) else []
    assert all(list(row) == ["step", *names, *signs] for row in state_dict["state"].values())
    other = case.cls(copies(params), **settings)
    other.load_state_dict(state_dict)
    assert same(optimizer, other)
    assert bits(saved(other)) == bits(state_dict)


@each_backend("differentiable")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(case, backend, dtype):
    for settings in case.settings.values():
        params = parameters(dtype)
        grads = gradients(params, 6)
        grads[1][0] = grads[0][2] = None  # uneven step counts go through the checkpoint too
        optimizer = advance(case.cls(params, **settings, **backend), grads[:3])
        resumed = case.cls(copies(params), **{**backend, "lr": 0.9})
        if resumed.rule(resumed.param_groups[0]) is not optimizer.rule(optimizer.param_groups[0]):
            resumed = case.cls(copies(params), **{**settings, **backend, "lr": 0.9})
        resumed.load_state_dict(saved(optimizer))
        assert same(advance(optimizer, grads[3:]), advance(resumed, grads[3:])), settings


@each_backend("differentiable")
def test_a_pickled_optimizer_goes_on_as_if_nothing_had_happened(case, backend):
    params = parameters(torch.bfloat16)
    grads = gradients(params, 5)
    optimizer = advance(case.cls(params, **backend), grads[:2])
    clone = pickle.loads(pickle.dumps(optimizer))
    assert snapshot(clone)[2:] == snapshot(optimizer)[2:]
    assert same(advance(optimizer, grads[2:]), advance(clone, grads[2:]))


@each_case
def test_a_pickle_that_lacks_an_option_gets_its_default(case):
    optimizer = case.cls(parameters())
    del optimizer.param_groups[0]["maximize"]
    assert pickle.loads(pickle.dumps(optimizer)).param_groups[0]["maximize"] is False


@each_backend("differentiable")
def test_a_deep_copy_is_independent(case, backend):
    params = parameters()
    grads = gradients(params, 5)
    optimizer = advance(case.cls(params, **backend), grads[:2])
    clone = copy.deepcopy(optimizer)
    before = snapshot(optimizer)
    advance(clone, grads[2:])
    assert snapshot(optimizer) == before
    assert same(advance(optimizer, grads[2:]), clone)


EXCHANGES = [
    pytest.param(case, first, second, id=f"{case.name}-{first}-to-{second}")
    for case in CASES
    for first in case.backends
    for second in case.backends
    if first != second and "differentiable" not in (first, second)
]


@pytest.mark.parametrize(("case", "first", "second"), EXCHANGES)
def test_back_ends_exchange_checkpoints_in_the_middle_of_a_run(case, first, second):
    params = parameters()
    grads = gradients(params, 8)
    optimizer = advance(case.cls(params, **case.backends[first]), grads[:4])
    other = case.cls(copies(params), **case.backends[second])
    own = {k: v for k, v in other.param_groups[0].items() if k in ("foreach", "fused", "capturable")}
    other.load_state_dict(saved(optimizer))
    assert own.items() <= other.param_groups[0].items(), "the checkpoint changed how steps are made"
    close(advance(optimizer, grads[4:]), advance(other, grads[4:]), tolerance(torch.float64, 4))


# Hooks and closures


@each_case
def test_step_hooks_run_around_the_step(case):
    params = parameters(layouts=["vector"])
    optimizer = case.cls(params)
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(int(opt.state[params[0]].get("step", 0))))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(int(opt.state[params[0]].get("step", 0))))
    try:
        advance(optimizer, gradients(params, 2))
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["global pre", 0, 1, "global post", "global pre", 1, 2, "global post"]


@each_case
def test_a_pre_hook_may_replace_the_closure(case):
    optimizer = case.cls(parameters())
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: (args, {"closure": lambda: 5.0}))
    assert optimizer.step() == 5.0


@each_case
def test_state_dict_hooks_see_and_replace_the_dictionary(case):
    params = parameters()
    optimizer = advance(case.cls(params), gradients(params, 2))
    calls = []
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda opt, state_dict: {**state_dict, "extra": 3})
    state_dict = optimizer.state_dict()
    assert state_dict["extra"] == 3

    other = case.cls(copies(params))
    other.register_load_state_dict_pre_hook(lambda opt, loaded: calls.append(loaded.pop("extra")))
    other.register_load_state_dict_post_hook(
        lambda opt: calls.append(opt.state[opt.param_groups[0]["params"][0]]["step"].item())
    )
    other.load_state_dict(state_dict)
    assert calls == ["save", 3, 2.0]
    assert same(optimizer, other)
    assert "extra" in state_dict


@each_backend("differentiable")
def test_the_closure_is_called_once_with_gradients_on_and_its_value_returned(case, backend):
    (param,) = parameters(layouts=["vector"])
    optimizer = case.cls([param], **backend)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(1)
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    before = (param.detach() ** 2).sum()
    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert loss == before
    assert calls == [1]
    assert (param.detach() ** 2).sum() < before
    assert optimizer.step() is None


@each_case
def test_a_failing_closure_changes_nothing(case):
    params = parameters()
    optimizer = advance(case.cls(params), gradients(params, 2))
    before = snapshot(optimizer)

    def closure():
        raise ArithmeticError("the model")

    with pytest.raises(ArithmeticError, match="the model"):
        optimizer.step(closure)
    assert snapshot(optimizer) == before


@each_case
def test_the_profiler_shows_the_step_under_torchs_name(case):
    params = parameters()
    optimizer = advance(case.cls(params), gradients(params, 1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert f"Optimizer.step#{case.name}.step" in {event.key for event in profile.key_averages()}


# Learning rates and schedules

SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda epoch: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2, 0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 3], 0.5),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.5, 3),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.25, total_iters=4),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.7),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 4, 2.0),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 4),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, 2, cycle_momentum=_has_momentum(opt)),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=7, cycle_momentum=_has_momentum(opt)),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.9)], milestones=[2]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.9)], optimizer=opt
    ),
    "SWALR": lambda opt: SWALR(opt, swa_lr=0.02, anneal_epochs=3),
}


def _has_momentum(optimizer: torch.optim.Optimizer) -> bool:
    return bool({"betas", "momentum"} & optimizer.defaults.keys())


@pytest.mark.parametrize("name", SCHEDULERS)
@each_case
def test_every_scheduler_drives_the_step(case, name):
    params = parameters()
    grads = gradients(params, 6)
    optimizer, twin = case.cls(params, lr=0.1), torch.optim.Adam(copies(params), lr=0.1)
    schedules = [SCHEDULERS[name](opt) for opt in (optimizer, twin)]
    states = [dict(param=p.detach().numpy().copy()) for p in params]
    rates = set()
    for row in grads:
        advance(optimizer, [row])
        advance(twin, [row])
        group = optimizer.param_groups[0]
        scheduled = {key: group[key] for key in ("lr", "betas", "momentum") if key in group}
        assert scheduled["lr"] == twin.param_groups[0]["lr"]
        if "betas" in scheduled:
            assert scheduled["betas"] == twin.param_groups[0]["betas"]
        rates.add(scheduled["lr"])
        for state, grad in zip(states, row, strict=True):
            case.reference(state, grad.numpy(), **scheduled)
        for schedule in schedules:
            schedule.step(*[1.0] if name == "ReduceLROnPlateau" else [])
    assert len(rates) > 1
    for param, state in zip(params, states, strict=True):
        np.testing.assert_allclose(param.detach().numpy(), state["param"], rtol=1e-13, atol=1e-13)


@each_backend("differentiable")
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_learning_rate_equals_the_number_and_may_change_in_place(case, backend, shape):
    params = parameters()
    grads = gradients(params, 6)
    lr = torch.full(shape, 0.125)
    with_tensor = advance(case.cls(params, lr=lr, **backend), grads[:3])
    lr.fill_(0.5)
    advance(with_tensor, grads[3:])
    with_number = advance(case.cls(copies(parameters()), lr=0.125, **backend), grads[:3])
    with_number.param_groups[0]["lr"] = 0.5
    advance(with_number, grads[3:])
    assert with_tensor.param_groups[0]["lr"] is lr
    close(with_tensor, with_number, tolerance(torch.float64, 6))


@each_case
def test_a_scheduler_may_hold_a_tensor_learning_rate(case):
    params = parameters()
    lr = torch.tensor(0.5)
    optimizer = case.cls(params, lr=lr)
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.5)
    advance(optimizer, gradients(params, 1))
    schedule.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == 0.25


@each_backend()
def test_a_zero_learning_rate_moves_no_parameter_but_the_state(case, backend):
    params = parameters(requires_grad=not backend.get("differentiable"))
    before = [bits(p) for p in params]
    optimizer = advance(case.cls(params, lr=0.0, **backend), gradients(params, 3))
    assert [bits(p) for p in params] == before
    assert all(optimizer.state[p]["step"] == 3 for p in params)
    assert all(value.any() for name, value in optimizer.state[params[0]].items())


# Gradients


@each_backend()
def test_a_step_never_writes_to_a_gradient(case, backend):
    for settings in case.settings.values():
        params = parameters(requires_grad=not backend.get("differentiable"))
        optimizer = case.cls(params, **settings, **backend)
        for row in gradients(params, 3):
            for param, grad in zip(params, row, strict=True):
                param.grad = grad
            before = [(id(g), bits(g), g._version) for g in row]
            optimizer.step()
            assert [(id(p.grad), bits(p.grad), p.grad._version) for p in params] == before, settings


@each_backend()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients_that_are_refilled_in_place_give_the_same_bits_as_fresh_ones(case, backend, dtype):
    # An optimizer that keeps a reference to the gradient sees no change of it in a buffer that is refilled.
    outcomes = []
    for way in ("fresh", "zeroed", "overwritten"):
        params = parameters(dtype, requires_grad=not backend.get("differentiable"))
        optimizer = case.cls(params, **backend)
        for row in gradients(params, 5):
            for param, grad in zip(params, row, strict=True):
                if way == "fresh" or param.grad is None:
                    param.grad = grad.clone()
                elif way == "zeroed":
                    param.grad.add_(grad)
                else:
                    param.grad.copy_(grad)
            optimizer.step()
            if way != "overwritten":
                optimizer.zero_grad(set_to_none=way == "fresh")
        outcomes.append([bits(t) for t in results(optimizer)])
    assert outcomes[0] == outcomes[1] == outcomes[2]


@each_case
def test_no_state_shares_memory_with_a_parameter_or_gradient(case):
    params = parameters(torch.float32)
    optimizer = advance(case.cls(params), gradients(params, 2))
    taken = {t.untyped_storage().data_ptr() for p in params for t in (p, p.grad) if p.numel()}
    for p in params:
        assert not taken & {t.untyped_storage().data_ptr() for t in optimizer.state[p].values() if t.numel()}


@each_backend()
def test_a_late_parameter_starts_at_step_one(case, backend):
    kwargs = dict(requires_grad=not backend.get("differentiable"))
    first, second = parameters(layouts=["vector", "transposed"], **kwargs)
    grads = gradients([first, second], 7)
    optimizer = advance(case.cls([first, second], **backend), [[row[0], None] for row in grads[:4]])
    assert second not in optimizer.state
    advance(optimizer, grads[4:])
    assert optimizer.state[second]["step"] == 3
    (alone,) = parameters(layouts=["vector", "transposed"], **kwargs)[1:]
    advance(case.cls([alone], **backend), [[row[1]] for row in grads[4:]])
    torch.testing.assert_close(second, alone, rtol=1e-14, atol=1e-14)


@each_backend()
def test_parameters_without_gradients_are_left_alone(case, backend):
    params = parameters(requires_grad=not backend.get("differentiable"))
    optimizer = advance(case.cls(params, weight_decay=0.5, **backend), gradients(params, 2))
    before = snapshot(optimizer)
    for param in params:
        param.grad = None
    optimizer.step()
    after = snapshot(optimizer)
    assert [row[:2] for row in after[0]] == [row[:2] for row in before[0]]
    assert after[1:] == before[1:]


@each_backend("differentiable")
def test_autograd_notices_that_a_saved_parameter_was_stepped(case, backend):
    (param,) = parameters(layouts=["vector"])
    optimizer = case.cls([param], **backend)
    for saved_for_backward in ((param**2).sum(), (param**2).sum()):
        param.grad = torch.ones_like(param)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved_for_backward.backward()


@each_backend("differentiable")
def test_parameters_stay_the_same_leaves(case, backend):
    params = parameters(torch.bfloat16)
    before = [(id(p), p.data_ptr(), p.dtype, p.stride()) for p in params]
    advance(case.cls(params, **backend), gradients(params, 3))
    assert [(id(p), p.data_ptr(), p.dtype, p.stride()) for p in params] == before
    assert all(p.is_leaf and p.requires_grad for p in params)


# Loss scales


@each_backend("differentiable")
@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled-first"])
def test_a_scaled_loss_gives_the_bits_of_an_unscaled_one(case, backend, unscale):
    for settings in case.settings.values():
        outcomes = []
        for enabled in (True, False):
            # Powers of two scale without rounding; the scale doubles after every step.
            scaler = torch.amp.GradScaler("cpu", 2.0**6, growth_factor=2.0, growth_interval=1, enabled=enabled)
            params = parameters(torch.float32)
            optimizer = case.cls(params, **settings, **backend)
            for row in gradients(params, 4):
                optimizer.zero_grad()
                loss = sum((p * g).sum() for p, g in zip(params, row, strict=True))
                scaler.scale(loss).backward()
                if unscale:
                    scaler.unscale_(optimizer)
                before = [bits(p.grad) for p in params]
                scaler.step(optimizer)
                # Elsewhere it is the scaler that unscales them, as with torch.optim's classes.
                kept = unscale or not enabled or backend.get("fused", False)
                assert ([bits(p.grad) for p in params] == before) == bool(kept)
                scaler.update()
            outcomes.append([bits(t) for t in results(optimizer)])
        assert outcomes[0] == outcomes[1], settings


@each_backend("differentiable")
@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled-first"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=str)
def test_an_infinite_scaled_gradient_skips_the_step_and_its_count(case, backend, unscale, bad):
    params = parameters(torch.float32)
    scaler = torch.amp.GradScaler("cpu", 4.0)
    optimizer = advance(case.cls(params, weight_decay=0.1, **backend), gradients(params, 2))
    scaler.scale(torch.ones(()))
    before = [bits(t) for t in results(optimizer)]
    for param, grad in zip(params, gradients(params, 1, seed=3)[0], strict=True):
        param.grad = grad
    params[3].grad[1, 2] = bad
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert [bits(t) for t in results(optimizer)] == before
    advance(optimizer, gradients(params, 1, seed=4))
    assert all(optimizer.state[p]["step"] == 3 for p in params)


# Dtypes


@each_backend()
def test_dtypes_may_be_mixed_in_a_group(case, backend):
    kwargs = dict(layouts=["vector", "transposed"], requires_grad=not backend.get("differentiable"))
    dtypes = [dtype for dtype in DTYPES if dtype is not torch.float16 or "float16 beside others" not in case.refuses]
    params = [p for dtype in dtypes for p in parameters(dtype, **kwargs)]
    grads = gradients(params, 4)
    mixed = advance(case.cls(params, weight_decay=0.1, **backend), grads)
    for i, dtype in enumerate(dtypes):
        own = parameters(dtype, **kwargs)
        alone = advance(case.cls(own, weight_decay=0.1, **backend), [row[2 * i : 2 * i + 2] for row in grads])
        for left, right in zip(params[2 * i : 2 * i + 2], own, strict=True):
            assert bits(left) == bits(right)
            assert bits(dict(mixed.state[left])) == bits(dict(alone.state[right]))


@each_backend()
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_a_complex_parameter_is_its_real_and_imaginary_parts(case, backend, dtype):
    if "complex" in case.refuses:
        with pytest.raises(ValueError, match="complex"):
            case.cls([torch.ones(3, dtype=dtype)], **backend)
        return
    for settings in case.settings.values():
        real = torch.stack([normal(1, 4, 3), normal(2, 4, 3)], dim=-1).to(dtype.to_real())
        requires = not backend.get("differentiable")
        param, parts = torch.view_as_complex(real.clone()), real.clone()
        one = case.cls([param.requires_grad_(requires)], **settings, **backend)
        two = case.cls([parts.requires_grad_(requires)], **settings, **backend)
        for (grad,) in gradients([parts], 4):
            param.grad, parts.grad = torch.view_as_complex(grad.clone()), grad
            one.step()
            two.step()
        for left, right in zip(results(one), results(two), strict=True):
            left = torch.view_as_real(left) if left.is_complex() else left
            assert bits(left) == bits(right), settings


@each_backend("differentiable")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_parameters_have_float32_averages_that_do_not_stall(case, backend, dtype):
    # In bfloat16 an average of ones with a weight of 0.999 stops growing at one half.
    param = torch.ones(3, dtype=dtype, requires_grad=True)
    twin = torch.ones(3, requires_grad=True)
    optimizers = [case.cls([p], lr=0.0, **backend) for p in (param, twin)]
    for _ in range(400):
        param.grad, twin.grad = torch.ones_like(param), torch.ones_like(twin)
        for optimizer in optimizers:
            optimizer.step()
    for name, value in averages(optimizers[0], param).items():
        assert value.dtype is torch.float32
        torch.testing.assert_close(value, optimizers[1].state[twin][name], rtol=tolerance(torch.float32, 400), atol=0)


# Memory


def peak_growth(step: object) -> int:
    """How many bytes the most memory ever held by this process grows by, starting from a full house."""
    resource = pytest.importorskip("resource")

    def held() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    ballast = []
    while held() < peak() - 2**19:  # below the peak, an allocation would not be seen
        ballast.append(torch.ones(2**18))
    before = peak()
    step()
    return peak() - before


@pytest.mark.parametrize("case", [case for case in CASES if case.elementwise and not case.cls.drawn], ids=repr)
def test_the_fused_step_makes_no_temporaries(case):
    size = 9_000_000  # above 32 MiB malloc always maps fresh pages
    largest = {}
    for name, backend in (("fused", dict(fused=True)), ("single", dict(foreach=False, fused=False))):
        param = torch.ones(size, requires_grad=True)
        param.grad = torch.ones(size)
        optimizer = case.cls([param], weight_decay=0.1, **backend)
        optimizer.step()
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            optimizer.step()
        largest[name] = max(event.cpu_memory_usage for event in profile.events())
        if name == "fused":  # what the native side takes by itself, torch's profiler does not see
            assert peak_growth(optimizer.step) < size // 4
    assert largest["single"] >= 4 * size, "this test does not see temporaries"
    assert largest["fused"] < size // 4


def test_what_a_class_refuses_is_what_it_declares():
    for case in CASES:
        assert isinstance(case, Case)
        assert case.cls.sparse == ("sparse" not in case.refuses)
        assert all(case.refuses.values()), "a refusal needs a reason"

"""How parameters and state are kept and gradients are scaled: bfloat16 state, rounding, masters, clipping."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import BACKENDS, CASES, ROUNDOFF, each_elementwise
from steps import advance, averages, bits, copies, gradients, normal, parameters, same, saved

from optimzoo import AdaBelief, AdaGradNorm, DaleSGD, DiffGrad, ops
from optimzoo.optimizer import sum_of_products
from optimzoo.rounding import random_key, round_randomly_

BF16 = torch.bfloat16
STEPPING = [BACKENDS[name] for name in ("single", "foreach", "fused")]
each_stepping = pytest.mark.parametrize("backend", STEPPING, ids=["single", "foreach", "fused"])
STATEFUL = [case for case in CASES if case.elementwise and case.states]
each_stateful = pytest.mark.parametrize("case", STATEFUL, ids=repr)


# Rounding


PLACES = range(4)  # of arrays that share a key


def rounded(value: torch.Tensor, seed: int, step: int = 1, place: int = 0) -> torch.Tensor:
    target = torch.empty_like(value, dtype=BF16)
    round_randomly_(target, value, random_key(seed, torch.tensor(float(step)), 0), place)
    return target


@pytest.mark.parametrize("place", PLACES)
def test_stochastic_rounding_gives_a_neighbour_and_the_right_mean(place):
    value = torch.cat([normal(1, 400, dtype=torch.float32), torch.logspace(-30, 30, 100), -torch.logspace(-3, 3, 100)])
    draws = torch.stack([rounded(value, seed, place=place) for seed in range(2000)]).double()
    exact = value.double()
    distance = 2.0**-7 * 2.0 ** exact.abs().log2().floor()  # between neighbours
    assert ((draws - exact).abs() < distance).all()
    # The standard deviation of a draw is at most half the distance; five of the mean's, for each of 600 numbers.
    assert ((draws.mean(0) - exact).abs() <= 5 * distance / (2 * math.sqrt(2000))).all()


@pytest.mark.parametrize("place", PLACES)
def test_the_mean_is_right_over_steps_and_over_places_too(place):
    value = torch.full((100_000,), 1.0 + 2.0**-7 * 0.3)  # three tenths of the way to the next number
    over_places = (rounded(value, 3, place=place) > 1.001).double().mean()
    over_steps = torch.stack([rounded(value[:1], 3, step, place) > 1.001 for step in range(20_000)]).double().mean()
    assert abs(over_places - 0.3) < 5 * math.sqrt(0.21 / 100_000)
    assert abs(over_steps - 0.3) < 5 * math.sqrt(0.21 / 20_000)


def test_what_bfloat16_holds_is_not_changed_and_what_is_not_finite_stays_so():
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-130, math.inf, -math.inf])
    for seed in range(50):
        assert bits(rounded(exact, seed).float())[3] == bits(exact)[3]
    payloads = torch.tensor([0x7FC00000, -0x400000, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert payloads.isnan().all()
    for seed in range(50):
        assert rounded(payloads, seed).isnan().all()


def test_neighbours_steps_and_arrays_are_rounded_independently():
    half = torch.full((200_000,), 1.0 + 2.0**-8)  # halfway: each number is a fair coin

    def coins(step: int, place: int) -> torch.Tensor:
        return (rounded(half, 7, step, place) > 1.001).double() * 2 - 1

    drawn = {(step, place): coins(step, place) for step in (1, 2) for place in PLACES}
    bound = 5 / math.sqrt(len(half))
    for place in PLACES:
        flips = drawn[1, place]
        for lag in range(1, 70):
            assert abs((flips[lag:] * flips[:-lag]).mean()) < bound
    for (one, first), (other, second) in itertools.combinations(drawn.items(), 2):
        assert abs((first * second).mean()) < bound, (one, other)


@pytest.mark.skipif(bool(ops.missing("cpu")), reason="no native library")
def test_the_native_bits_are_those_of_the_python_twin():
    # A parameter that no step moves (lr 0) is rounded all the same where it is not exact: here its float32 sum is.
    param = normal(1, 1000, dtype=torch.float32).to(BF16)
    results = []
    for backend in STEPPING:
        p = param.clone().requires_grad_()
        advance(DaleSGD([dict(params=[p], dale=False)], lr=1.0, rounding="stochastic", seed=11, **backend),
                [[normal(2, 1000, dtype=torch.float32).mul(1e-3).to(BF16)]])  # fmt: skip
        results.append(p.detach())
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])


# State in bfloat16


@each_stepping
@each_stateful
def test_compressed_state_is_bfloat16_and_near_the_whole_one(case, backend):
    for settings in case.settings.values():
        params = parameters(torch.float32)
        grads = gradients(params, 20)
        whole = advance(case.cls(copies(params), **settings, **backend), grads)
        small = advance(case.cls(params, state_dtype=BF16, **settings, **backend), grads)
        for param, twin in zip(params, whole.param_groups[0]["params"], strict=True):
            for name, value in averages(small, param).items():
                assert value.dtype is BF16
                expected = whole.state[twin][name]
                scale = expected.abs().amax() if expected.numel() else 0
                assert ((value.float() - expected).abs() <= 20 * 2.0**-7 * scale).all()


@each_stepping
def test_an_average_that_moves_by_less_than_bfloat16_can_hold_arrives(backend):
    # Rounded to nearest, an average of ones with weight 0.999 stands still at one half.
    param = torch.zeros(20_000, requires_grad=True)
    optimizer = DiffGrad([param], lr=0.0, betas=(0.9, 0.999), state_dtype=BF16, **backend)
    advance(optimizer, [[torch.ones(20_000)]] * 2000)
    mean = optimizer.state[param]["exp_avg_sq"].double().mean()
    assert mean == pytest.approx(1 - 0.999**2000, abs=0.002)


@each_stateful
def test_seeds_make_runs_that_differ_and_can_be_repeated(case):
    def run(seed: int, backend: dict) -> list:
        params = parameters(torch.float32)
        optimizer = case.cls(params, state_dtype=BF16, seed=seed, **backend)
        return [bits(t) for p in params for t in averages(advance(optimizer, gradients(params, 5)), p).values()]

    for backend in STEPPING:
        assert run(1, backend) == run(1, backend)
        assert run(1, backend) != run(2, backend)


@each_stepping
@each_stateful
def test_a_resumed_run_with_compressed_state_is_bitwise_the_whole(case, backend):
    options = dict(state_dtype=BF16, rounding="stochastic", seed=3, **backend)
    params = parameters(BF16)
    rows = gradients(params, 6)
    whole = advance(case.cls(copies(params), **options), rows)
    half = advance(case.cls(params, **options), rows[:3])
    resumed = case.cls(copies(params), **options)
    resumed.load_state_dict(saved(half))
    assert same(advance(resumed, rows[3:]), whole)


@each_stateful
def test_a_checkpoint_changes_neither_how_state_is_kept_nor_its_values(case):
    params = parameters(torch.float32)
    whole = advance(case.cls(copies(params)), gradients(params, 3))
    small = case.cls(params, state_dtype=BF16)
    small.load_state_dict(saved(whole))
    for param, twin in zip(params, whole.param_groups[0]["params"], strict=True):
        for name, value in averages(small, param).items():
            assert value.dtype is BF16
            torch.testing.assert_close(value.float(), whole.state[twin][name], rtol=ROUNDOFF[BF16], atol=1e-30)
    advance(small, gradients(params, 2))


@pytest.mark.parametrize("threads", [1, 2])
def test_rounding_does_not_depend_on_threads(threads):
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            param = torch.ones(100_003, requires_grad=True)
            optimizer = AdaBelief([param], state_dtype=BF16, fused=True)
            advance(optimizer, [[normal(1, 100_003, dtype=torch.float32)]] * 3)
            results.append([bits(t) for t in averages(optimizer, param).values()])
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1]


# 16-bit parameters


@pytest.mark.parametrize("rounding", ["stochastic", "master"])
@each_stepping
@each_elementwise
def test_steps_that_bfloat16_cannot_hold_arrive(case, backend, rounding):
    # A thousand steps of about a twentieth of the distance between neighbours.
    param = torch.ones(4000, dtype=BF16, requires_grad=True)
    twin = torch.ones(4000, requires_grad=True)
    grads = [[torch.full((4000,), -0.5, dtype=BF16)]] * 300
    advance(case.cls([param], lr=4e-4, rounding=rounding, **backend), grads)
    advance(case.cls([twin], lr=4e-4, **backend), [[g[0].float()] for g in grads])
    moved = (twin.detach() - 1).mean().item()
    assert moved != 0
    tolerance = 0.03 * abs(moved) + (2.0**-8 if rounding == "master" else 5 * 2.0**-7 / math.sqrt(4000))
    assert (param.detach().double() - 1).mean().item() == pytest.approx(moved, abs=tolerance)


def test_rounded_to_nearest_they_do_not():
    param = torch.ones(10, dtype=BF16, requires_grad=True)
    advance(AdaBelief([param], lr=1e-4, rectify=False), [[normal(1, 10, dtype=torch.float32).to(BF16)]] * 50)
    assert (param == 1).all()


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@each_stepping
@each_elementwise
def test_with_a_master_a_parameter_is_the_rounding_of_a_float32_run(case, backend, dtype):
    for settings in case.settings.values():
        params = parameters(dtype)
        twins = [p.detach().float().requires_grad_() for p in params]
        grads = gradients(params, 10)
        options = {**settings, **backend}
        if not settings.get("min_abs"):
            options.pop("min_abs", None)
        optimizer = advance(case.cls(params, rounding="master", **options), grads)
        advance(case.cls(twins, **options), [[g.float() for g in row] for row in grads])
        for param, twin in zip(params, twins, strict=True):
            master = optimizer.state[param]["master"]  # a compiler may contract the two loops differently
            torch.testing.assert_close(master, twin.detach(), rtol=2e-6, atol=2e-6)
            assert torch.equal(param, master.to(dtype))


@each_stepping
def test_a_parameter_that_is_changed_from_outside_wins_over_its_master(backend):
    param = torch.ones(5, dtype=BF16, requires_grad=True)
    optimizer = AdaBelief([param], lr=1e-3, rectify=False, rounding="master", **backend)
    advance(optimizer, [[torch.ones(5, dtype=BF16)]] * 3)
    kept = optimizer.state[param]["master"].clone()
    with torch.no_grad():
        param[2] = 7.0
    optimizer.param_groups[0]["lr"] = 0.0
    advance(optimizer, [[torch.ones(5, dtype=BF16)]])
    master = optimizer.state[param]["master"]
    assert master[2] == 7
    assert torch.equal(master[[0, 1, 3, 4]], kept[[0, 1, 3, 4]])


@each_stepping
def test_groups_of_16_and_32_bits_may_have_masters(backend):
    params = [*parameters(BF16), *parameters(torch.float32)]
    rows = [[*a, *b] for a, b in zip(gradients(params[:5], 4), gradients(params[5:], 4), strict=True)]
    optimizer = advance(AdaBelief(params, rounding="master", **backend), rows)
    assert all(("master" in optimizer.state[p]) == (p.dtype is BF16) for p in params)
    other = AdaBelief(copies(params), rounding="master", **backend)
    other.load_state_dict(saved(optimizer))
    assert same(advance(other, rows), advance(optimizer, rows))


# Clipping


@pytest.mark.parametrize("bound", [0.1, 3.0, 1e6])
@each_stepping
@pytest.mark.parametrize("cls", [AdaBelief, DiffGrad, AdaGradNorm, DaleSGD], ids=lambda c: c.__name__)
def test_clipping_within_the_step_is_clipping_before_it(cls, backend, bound):
    layouts = ["scalar", "vector", "transposed", "channels-last"]
    params, twins = parameters(layouts=layouts), parameters(layouts=layouts)
    groups = [[dict(params=ps[:2], lr=0.1), dict(params=ps[2:])] for ps in (params, twins)]
    inside, before = cls(groups[0], max_grad_norm=bound, **backend), cls(groups[1], **backend)
    for row in gradients(params, 5):
        for param, twin, grad in zip(params, twins, row, strict=True):
            param.grad, twin.grad = grad.clone(), grad.clone()
        inside.step()
        torch.nn.utils.clip_grad_norm_(twins, bound)
        before.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, row, strict=True))
    torch.testing.assert_close(params, twins, rtol=1e-12, atol=1e-12)


@each_stepping
def test_clipping_goes_by_the_unscaled_gradients(backend):
    params, twins = parameters(torch.float32, ["vector"]), parameters(torch.float32, ["vector"])
    optimizer = AdaBelief(params, lr=0.1, max_grad_norm=0.5, **backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    plain = AdaBelief(twins, lr=0.1, max_grad_norm=0.5, **backend)
    for row in gradients(params, 4):
        params[0].grad, twins[0].grad = row[0] * scaler.get_scale(), row[0]
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
        plain.step()
    torch.testing.assert_close(params, twins, rtol=1e-5, atol=1e-6)


def test_the_inner_product_is_that_of_one_long_vector():
    shapes = [(3, 4), (0,), (), (50_000,), (7,)]
    for dtype in (torch.float64, torch.float32, BF16, torch.float16):
        left, right = ([normal(seed + i, *s).to(dtype) for i, s in enumerate(shapes)] for seed in (1, 50))
        whole = sum((a.double() * b.double()).sum() for a, b in zip(left, right, strict=True))
        assert sum_of_products(left, right).item() == pytest.approx(whole.item(), rel=1e-12, abs=1e-9)
    turned = normal(1, 5, 3).t()
    assert sum_of_products([turned], [normal(2, 3, 5)]).item() == pytest.approx((turned * normal(2, 3, 5)).sum().item())
    z = torch.view_as_complex(normal(1, 4, 2))
    assert sum_of_products([z], [z]).item() == pytest.approx(z.abs().square().sum().item())


def test_the_inner_product_does_not_depend_on_threads():
    tensors = [normal(i, 30_001, dtype=torch.float32) for i in range(5)]
    before = torch.get_num_threads()
    try:
        sums = []
        for count in (1, 2):
            torch.set_num_threads(count)
            sums.append(sum_of_products(tensors, tensors).item())
    finally:
        torch.set_num_threads(before)
    assert sums[0] == sums[1]


# Steps inside backward


def test_steps_taken_inside_backward_are_the_usual_ones_and_free_the_gradients():
    def model() -> torch.nn.Sequential:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()

    usual, inside = model(), model()
    optimizer = AdaBelief(usual.parameters(), lr=0.01)
    own = {p: AdaBelief([p], lr=0.01) for p in inside.parameters()}

    def step(param: torch.Tensor) -> None:
        own[param].step()
        param.grad = None

    for param in inside.parameters():
        param.register_post_accumulate_grad_hook(step)
    for t in range(5):
        inputs = normal(t, 10, 6)
        usual(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        inside(inputs).square().sum().backward()
        assert all(p.grad is None for p in inside.parameters())
    assert [bits(p) for p in usual.parameters()] == [bits(p) for p in inside.parameters()]


# Wrong input


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        (dict(state_dtype=torch.float16), torch.float32, "state_dtype must be torch.bfloat16 or None.*square"),
        (dict(state_dtype=torch.int8), torch.float32, "state_dtype must be torch.bfloat16 or None, got torch.int8"),
        (dict(state_dtype="bfloat16"), torch.float32, "state_dtype must be"),
        (dict(state_dtype=BF16), torch.float64, r"cannot hold the state of params\[0\], a torch.float64"),
        (dict(state_dtype=BF16), torch.complex64, r"cannot hold the state of params\[0\], a torch.complex64"),
        (dict(rounding="up"), torch.float32, "rounding must be one of"),
        (dict(rounding="stochastic"), torch.float16, r"for bfloat16, and params\[0\] is torch.float16"),
        (dict(state_dtype=BF16, differentiable=True), torch.float32, "differentiable=True goes with neither"),
        (dict(max_grad_norm=0.0), torch.float32, "max_grad_norm must be > 0, or None, got 0.0"),
        (dict(max_grad_norm=-1.0), torch.float32, "max_grad_norm must be"),
        (dict(max_grad_norm=math.nan), torch.float32, "max_grad_norm must be"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(options, dtype, message):
    with pytest.raises(ValueError, match=message):
        DiffGrad([torch.ones(3, dtype=dtype, requires_grad=not options.get("differentiable"))], **options)


def test_a_seed_must_be_a_whole_number_and_a_bound_the_same_for_all():
    for seed in (0.5, True, -1, 2**63):
        with pytest.raises(ValueError, match=rf"seed must be a whole number from 0 to 2\*\*63 - 1, got {seed}"):
            DiffGrad(parameters(), seed=seed)
    with pytest.raises(ValueError, match="max_grad_norm bounds the gradients of all groups together"):
        DiffGrad([dict(params=parameters(), max_grad_norm=1.0)])


@each_stateful
def test_state_of_another_dtype_than_it_is_kept_in_is_an_error_before_anything_changes(case):
    params = parameters(torch.float32)
    optimizer = advance(case.cls(params, state_dtype=BF16), gradients(params, 2))
    name = case.states[-1]
    optimizer.state[params[1]][name] = optimizer.state[params[1]][name].float()
    before = [bits(p) for p in params]
    for backend in STEPPING:
        optimizer.param_groups[0].update(backend)
        with pytest.raises(RuntimeError, match=r"dtype|float32|bfloat16"):
            optimizer.step()
        assert [bits(p) for p in params] == before


@pytest.mark.parametrize("layout", ["vector", "transposed", "channels-last"])
def test_back_ends_round_alike_for_any_number_of_tensors_in_any_layout(layout):
    results = []
    for backend in STEPPING:
        params = [p.detach().requires_grad_() for _ in range(3) for p in parameters(BF16, [layout])]
        grads = [p.detach() * 1e-3 for p in params]
        advance(DaleSGD([dict(params=params, dale=False)], lr=1.0, rounding="stochastic", **backend), [grads])
        results.append([bits(p)[3] for p in params])
    assert results[0] == results[1]
    assert results[0] == results[2]
    assert len(set(results[0])) == 3  # equal parameters do not round alike


def test_groups_do_not_round_alike():
    params = [normal(1, 100, dtype=torch.float32).to(BF16).requires_grad_() for _ in range(2)]
    grads = [p.detach() * 1e-3 for p in params]
    groups = [dict(params=[p], dale=False) for p in params]
    advance(DaleSGD(groups, lr=1.0, rounding="stochastic"), [grads])
    assert bits(params[0]) != bits(params[1])


@each_stepping
@pytest.mark.parametrize(
    "wrong", [lambda m: m[:2], lambda m: m.to(BF16), lambda m: m.double()], ids=["shape", "16", "64"]
)
def test_a_master_that_does_not_fit_is_an_error_before_anything_changes(backend, wrong):
    params = parameters(BF16, ["vector", "transposed"])
    optimizer = advance(AdaBelief(params, rounding="master", **backend), gradients(params, 2))
    optimizer.state[params[1]]["master"] = wrong(optimizer.state[params[1]]["master"])
    before = [bits(p) for p in params], [int(optimizer.state[p]["step"]) for p in params]
    with pytest.raises(RuntimeError, match="master"):
        optimizer.step()
    assert ([bits(p) for p in params], [int(optimizer.state[p]["step"]) for p in params]) == before


@each_stepping
def test_a_model_may_change_its_dtype_between_steps(backend):
    model = torch.nn.Linear(3, 2).bfloat16()
    optimizer = AdaBelief(model.parameters(), rounding="master", **backend)
    for convert in (model.bfloat16, model.float, model.bfloat16):
        convert()
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@each_stepping
def test_a_complex_and_a_16_bit_parameter_may_share_a_group_with_masters(backend):
    params = [torch.ones(3, dtype=torch.complex64, requires_grad=True), torch.ones(3, dtype=BF16, requires_grad=True)]
    optimizer = advance(AdaBelief(params, rounding="master", **backend), [[torch.ones_like(p) for p in params]] * 2)
    assert "master" in optimizer.state[params[1]]


def test_one_bound_for_all_groups_is_said_so_when_a_group_is_changed():
    optimizer = AdaBelief(parameters())
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    with pytest.raises(ValueError, match="max_grad_norm bounds the gradients of all groups together"):
        optimizer.step()


def test_a_clipped_step_of_lists_is_one_graph():
    torch._dynamo.reset()
    params = parameters(torch.float32, ["vector", "scalar"])
    optimizer = AdaBelief(params, max_grad_norm=0.5, foreach=True)
    eager = AdaBelief(copies(params), max_grad_norm=0.5, foreach=True)
    compiled = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    for row in gradients(params, 3):
        advance(eager, [row])
        for param, grad in zip(params, row, strict=True):
            param.grad = grad
        compiled()
    torch.testing.assert_close(params, eager.param_groups[0]["params"], rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()

"""The native ops by themselves: schemas, what torch.library demands, precision, and wrong arguments.

`make test-abi` runs this file, and test_reference.py, under another version of torch than the library was built with.
"""

import itertools
import sys

import pytest
import torch

import optimzoo
from optimzoo import ops
from optimzoo.optimizer import Elementwise, Rule

CLASSES = [cls for cls in vars(optimzoo).values() if isinstance(cls, type) and issubclass(cls, Elementwise)]
_found = [cls._rule for cls in CLASSES]
_found += [rule for cls in CLASSES for rule in vars(sys.modules[cls.__module__]).values() if isinstance(rule, Rule)]
RULES = {rule.name: rule for rule in _found if rule.fused}
SETTINGS = dict(weight_decay=0.0, decoupled_weight_decay=True, fixed_decay=False, maximize=False)
STATE_DTYPE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


def hyper(rule: Rule) -> dict[str, float]:
    """The defaults of the class that a rule belongs to."""
    for cls in CLASSES:
        optimizer = cls([torch.nn.Parameter(torch.ones(1))])
        settings = optimizer.settings(optimizer.param_groups[0])
        if rule is cls._rule or (
            rule in vars(sys.modules[cls.__module__]).values() and settings.keys() >= {*rule.hyper}
        ):
            return rule.hyper_values(settings)
        if rule.hyper and "beta1" in rule.hyper and rule in vars(sys.modules[cls.__module__]).values():
            return rule.hyper_values(settings)
    raise AssertionError(f"no class follows {rule.name}")


def arguments(
    rule: Rule,
    shapes=((3, 4), (0,), (17,), ()),
    dtype=torch.float32,
    step=1.0,
    lr=1e-2,
    compressed=False,
    master=False,
    **settings,
):
    """Positional and keyword arguments of a rule's op: random parameters, gradients and states."""
    draw = torch.Generator().manual_seed(0)
    columns = [[torch.randn(s, generator=draw).to(dtype) for s in shapes] for _ in range(2)]
    wide = STATE_DTYPE.get(dtype, dtype)
    masters = [p.to(torch.float32) * 1.001 for p in columns[0]] if master and wide != dtype else []
    if compressed and wide is torch.float32:
        wide = torch.bfloat16
    columns += [[torch.rand(s, generator=draw).to(wide) for s in shapes] for _ in rule.states]
    steps = [torch.tensor(step) for _ in shapes]
    lr = torch.tensor(lr, dtype=torch.float64)
    return columns, dict(lr=lr, step=steps, master=masters, **hyper(rule), **{**SETTINGS, **settings})


def test_the_library_of_this_environment_is_loaded_and_others_say_why_not():
    assert ops.missing("cpu") == ""
    assert ops.missing("meta") == "there are no fused steps for meta"
    assert (torch.version.cuda is None) == (ops.missing("cuda") == "this build of torch has no CUDA")


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if "beta2" in rule.hyper])
@pytest.mark.parametrize("beta2", [0.999, 0.99999])
def test_averages_in_float32_are_exact_to_rounding_for_betas_near_one(name, beta2):
    results = []
    for dtype in (torch.float32, torch.float64):
        args, kwargs = arguments(RULES[name], shapes=[(1000,)], dtype=dtype, step=0.0)
        args[0] = [args[0][0].float().to(dtype)]
        args[1] = [args[1][0].float().to(dtype)]
        for state in args[2:]:
            state[0].zero_()
        kwargs.update(beta2=beta2, eps=1e-30)
        for _ in range(3):
            RULES[name].fused(*args, **kwargs)
        results.append([state[0].double() for state in args[2:]])
    for narrow, wide in zip(*results, strict=True):
        torch.testing.assert_close(narrow, wide, rtol=2e-6, atol=0)


def test_memory_that_was_given_back_is_an_error():
    args, kwargs = arguments(RULES["diffgrad"])
    args[1][0].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"grad\[0\] has no memory"):
        RULES["diffgrad"].fused(*args, **kwargs)


@pytest.mark.parametrize("name", RULES)
def test_the_schema_is_the_signature_of_update(name):
    rule = RULES[name]
    names = [argument.name for argument in rule.fused._schema.arguments]
    written = [a.name for a in rule.fused._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert names[: len(rule.states) + 2] == ["param", "grad", *rule.states]
    assert names[len(rule.states) + 2 :][: len(rule.hyper) + 2] == ["lr", *rule.hyper, "step"]
    assert written == ["param", *rule.states, "step", "master"]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_opcheck_passes(name, dtype):
    args, kwargs = arguments(RULES[name], dtype=dtype)
    torch.library.opcheck(RULES[name].fused, tuple(args), kwargs)


def test_the_exponential_is_exact_to_two_ulp():
    # From zero, with beta1 = 0 and eps = 0, diffGrad's first step at lr 1 is sigmoid(|g|).
    for dtype in (torch.float32, torch.float64):
        info = torch.finfo(dtype)
        top = torch.tensor(info.max, dtype=torch.float64).sqrt().log10().item() * 0.999
        grad = torch.cat([torch.logspace(-5, top, 20_001, dtype=torch.float64), torch.linspace(0.01, 100, 100_001)])
        param = torch.nn.Parameter(torch.zeros(len(grad), dtype=dtype))
        param.grad = grad.to(dtype)
        optimzoo.DiffGrad([param], lr=1.0, betas=(0.0, 0.5), eps=0.0, fused=True).step()
        expected = torch.special.expit(param.grad.double() if dtype == torch.float32 else param.grad)
        assert ((param.detach().abs().double() - expected).abs() / expected).max() <= 4 * info.eps


@pytest.mark.parametrize("threads", [1, 2])
def test_results_do_not_depend_on_threads_or_on_how_tensors_lie(threads):
    rule = RULES["diffgrad"]
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            args, kwargs = arguments(rule, shapes=[(50_001,), (3,), (70_000,), (1,)])
            rule.fused(*args, **kwargs)
            results.append(args)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(itertools.chain(*results[0]), itertools.chain(*results[1]), strict=True):
        assert torch.equal(one, other)


def test_a_thousand_shapes_of_memory_give_the_same_coordinates():
    rule = RULES["adabelief"]
    args, kwargs = arguments(rule, shapes=[(4, 3, 5, 2)])
    permuted = [[tensor.clone().to(memory_format=torch.channels_last) for tensor in column] for column in args]
    rule.fused(*args, **kwargs)
    rule.fused(*permuted, **{**kwargs, "step": [torch.tensor(1.0)]})
    for one, other in zip(itertools.chain(*args), itertools.chain(*permuted), strict=True):
        assert torch.equal(one, other)


def test_held_lists_are_the_lists_and_follow_a_replaced_data():
    rule = RULES["diffgrad"]
    args, kwargs = arguments(rule)
    plain, plain_kwargs = arguments(rule)
    held = ops.Held((*args[2:], kwargs["step"]))
    rest = {**kwargs, "step": [], "held": held.number}
    for round_ in range(3):
        if round_ == 1:
            args[3][2].data = args[3][2].data.clone()  # another address
        rule.fused(args[0], args[1], *([] for _ in rule.states), **rest)
        rule.fused(*plain, **plain_kwargs)
    for one, other in zip(itertools.chain(*args), itertools.chain(*plain), strict=True):
        assert torch.equal(one, other)
    number = held.number
    del held
    with pytest.raises(RuntimeError, match="nothing is held"):
        rule.fused(args[0], args[1], *([] for _ in rule.states), **{**rest, "held": number})


def _replace(column, index, value):
    def change(args, kwargs):
        target = kwargs["step"] if column == "step" else args[column]
        target[index] = value(target[index])

    return change


WRONG = {
    "a list too short": (lambda args, kwargs: args[1].pop(), "grad holds 3 tensors, param 4"),
    "a state of another shape": (_replace(2, 0, lambda t: t[:2]), r"exp_avg\[0\] has another shape"),
    "a gradient of another dtype": (_replace(1, 2, lambda t: t.double()), r"grad\[2\] is float64, must be float32"),
    "an integer parameter": (_replace(0, 2, lambda t: t.int()), r"param\[2\] must be a strided float32"),
    "a sparse gradient": (_replace(1, 0, lambda t: t.to_sparse()), "'SparseCPU' backend"),
    "other strides": (_replace(3, 0, lambda t: t.t().contiguous().t()), r"exp_avg_sq\[0\] has other strides"),
    "an expanded parameter": (_replace(0, 2, lambda t: torch.ones(1).expand(17)), r"param\[2\] must fill its memory"),
    "overlapping memory": (
        _replace(0, 0, lambda t: torch.zeros(9).as_strided((3, 4), (2, 1))),
        r"param\[0\] must fill its memory",
    ),
    "a step that is no number": (_replace("step", 1, lambda t: torch.zeros(2)), r"step\[1\] has another shape"),
    "a float64 step": (_replace("step", 1, lambda t: t.double()), r"step\[1\] is float64, must be float32"),
    "a vector for lr": (lambda args, kwargs: kwargs.update(lr=torch.ones(2)), "lr must be one floating-point number"),
    "held and not there": (lambda args, kwargs: kwargs.update(held=-1), "nothing is held under -1"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_are_named_and_nothing_is_written(what):
    change, message = WRONG[what]
    args, kwargs = arguments(RULES["diffgrad"])
    with torch.sparse.check_sparse_tensor_invariants(enable=True):
        change(args, kwargs)
        tensors = [t for t in itertools.chain(*args, kwargs["step"]) if t.layout is torch.strided]
        before = [t.clone() for t in tensors]
        with pytest.raises(RuntimeError, match=message):
            RULES["diffgrad"].fused(*args, **kwargs)
    assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))


def test_found_inf_leaves_everything_as_it_is():
    args, kwargs = arguments(RULES["diffgrad"])
    before = [t.clone() for t in itertools.chain(*args, kwargs["step"])]
    RULES["diffgrad"].fused(*args, **kwargs, found_inf=torch.ones(()), grad_scale=torch.full((), 4.0))
    assert all(torch.equal(a, b) for a, b in zip(itertools.chain(*args, kwargs["step"]), before, strict=True))


def test_an_empty_call_does_nothing():
    args, kwargs = arguments(RULES["diffgrad"], shapes=[])
    RULES["diffgrad"].fused(*args, **kwargs)


@pytest.mark.parametrize("start", [-2.0, -1.0, 0.0])
def test_a_step_count_below_zero_is_harmless(start):
    args, kwargs = arguments(RULES["diffgrad"], step=start)
    RULES["diffgrad"].fused(*args, **kwargs)
    assert all(step == start + 1 for step in kwargs["step"])

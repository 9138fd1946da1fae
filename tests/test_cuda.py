"""The CUDA kernels without a GPU: their source run on the host by an emulation of the launch, and what nvcc made of it.

Emulated means: the arithmetic, the tables, the packing and the tails are right. That they run on a GPU is not shown.
"""

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_native import RULES, arguments

from optimzoo import _build

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
INCLUDE = ["-isystem", str(Path(torch.__file__).parent / "include")]


@pytest.fixture(scope="module")
def emulated(emulated_ops):
    """The fused steps of cuda.cu, compiled for the host."""
    return lambda name: getattr(emulated_ops, f"fused_{name}_").default


CASES = {
    "plain": {},
    "coupled decay": dict(weight_decay=0.1, decoupled_weight_decay=False),
    "decoupled decay, maximize": dict(weight_decay=0.1, maximize=True),
    "fixed decay": dict(weight_decay=0.1, fixed_decay=True),
    "scaled": dict(grad_scale=torch.tensor(8.0)),
    "seventh step": dict(step=6.0),
    "bfloat16 state": dict(compressed=True, seed=5),
    "stochastic parameters": dict(stochastic=True, seed=6),
    "masters": dict(master=True, compressed=True, seed=7),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_the_cpu_step(emulated, name, dtype, case):
    # One block and several, whole packs and tails, an empty tensor, a scalar.
    shapes = [(5, 7), (0,), (16 * 1024 + 3,), (), (40_000,), (8,)]
    ours, kwargs = arguments(RULES[name], shapes=shapes, dtype=dtype, **CASES[case])
    theirs, other = arguments(RULES[name], shapes=shapes, dtype=dtype, **CASES[case])
    RULES[name].fused(*ours, **kwargs)
    emulated(name)(*theirs, **other)
    assert [int(step) for step in kwargs["step"]] == [int(step) for step in other["step"]]
    # The host's compiler may fuse a multiplication and an addition where the other does not.
    mine, other_ones = (
        itertools.chain(*lists, options["master"]) for lists, options in ((ours, kwargs), (theirs, other))
    )
    for one, two in zip(mine, other_ones, strict=True):
        close = 16 * torch.finfo(one.dtype).eps
        if one.dtype is torch.bfloat16:  # nearly all round alike: the random bits are the same
            assert (one != two).sum() <= 1 + 0.01 * one.numel()
        torch.testing.assert_close(one, two, rtol=close, atol=close)


def test_tensors_that_are_not_aligned_are_updated_one_by_one(emulated):
    def shifted(column):
        return [torch.cat([t.new_zeros(1), t.flatten()])[1:] for t in column]

    ours, kwargs = arguments(RULES["diffgrad"], shapes=[(101,), (17,)])
    theirs, other = arguments(RULES["diffgrad"], shapes=[(101,), (17,)])
    theirs = [shifted(column) for column in theirs]
    assert theirs[0][0].data_ptr() % 16 != 0
    RULES["diffgrad"].fused(*ours, **kwargs)
    emulated("diffgrad")(*theirs, **other)
    for one, two in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        torch.testing.assert_close(one, two, rtol=2e-6, atol=2e-6)


def test_more_tensors_than_one_table_holds(emulated):
    shapes = [(i % 7,) for i in range(200)]
    ours, kwargs = arguments(RULES["adabelief"], shapes=shapes)
    theirs, other = arguments(RULES["adabelief"], shapes=shapes)
    RULES["adabelief"].fused(*ours, **kwargs)
    emulated("adabelief")(*theirs, **other)
    assert all(step == 2 for step in other["step"])
    for one, two in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        torch.testing.assert_close(one, two, rtol=2e-6, atol=2e-6)


def test_a_step_with_found_inf_changes_and_counts_nothing(emulated):
    args, kwargs = arguments(RULES["diffgrad"])
    before = [t.clone() for t in itertools.chain(*args, kwargs["step"])]
    emulated("diffgrad")(*args, **kwargs, found_inf=torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(itertools.chain(*args, kwargs["step"]), before, strict=True))


def test_a_nan_stays_in_its_coordinate(emulated):
    args, kwargs = arguments(RULES["diffgrad"], shapes=[(1000,)])
    args[1][0][3] = float("nan")
    emulated("diffgrad")(*args, **kwargs)
    assert args[0][0].isnan().nonzero().flatten().tolist() == [3]


@pytest.fixture(scope="module")
def nvcc_report(tmp_path_factory):
    """What ptxas says of every kernel of every device, and the PTX."""
    if NVCC is None or torch.version.cuda is None:
        pytest.skip("needs nvcc and a CUDA build of torch")
    folder = tmp_path_factory.mktemp("nvcc")
    source = str(ROOT / "csrc/cuda.cu")
    flags = [*_build.cuda_flags(), *INCLUDE]
    cubin = [NVCC, *flags, "-Xptxas=-v", "-c", source, "-o", str(folder / "cuda.o")]
    report = subprocess.run(cubin, check=True, capture_output=True, text=True).stderr
    ptx = [NVCC, *_build.FLAGS, "-O3", "-DUSE_CUDA", "-arch=compute_90", *INCLUDE, "-ptx", source]
    subprocess.run([*ptx, "-o", str(folder / "cuda.ptx")], check=True)
    return report, (folder / "cuda.ptx").read_text()


def variants(rule):
    """How many pairs of a parameter's and a state's dtype a rule is compiled for."""
    return 7 if rule.states else 4


def test_kernels_use_no_local_memory(nvcc_report):
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", nvcc_report[0])
    assert len(frames) >= 2 * sum(map(variants, RULES.values()))  # devices
    assert set(frames) == {("0", "0", "0")}


def test_the_kernels_of_cbo_use_no_local_memory(tmp_path):
    if NVCC is None or torch.version.cuda is None:
        pytest.skip("needs nvcc and a CUDA build of torch")
    flags = [*_build.FLAGS, "-O3", "-DUSE_CUDA", "-arch=sm_90", "-Xptxas=-v", *INCLUDE]
    command = [NVCC, *flags, "-c", str(ROOT / "csrc/cbo.cu"), "-o", str(tmp_path / "cbo.o")]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(frames) == 2 * 3  # dtypes x kernels
    assert set(frames) == {("0", "0", "0")}


def test_kernels_are_made_for_both_devices_and_later_ones(nvcc_report):
    assert set(re.findall(r"for '(sm_\d+)'", nvcc_report[0])) == {"sm_80", "sm_90"}
    assert "code=compute_90" in " ".join(_build.cuda_flags())


def test_every_array_is_moved_by_accesses_of_16_bytes(nvcc_report):
    bodies = re.findall(r"\.entry (\S*step_kernel\S*)\((.*?)\n}", nvcc_report[1], re.S)
    assert len(bodies) == sum(map(variants, RULES.values()))
    for name, body in bodies:
        length, rest = re.search(r"NS_(\d+)(\w+)", name).groups()  # the mangled name of the rule's struct
        rule = next(r for key, r in RULES.items() if key.replace("_", "") == rest[: int(length)].lower())
        param, state = types(name[name.index(rest) + int(length) :])
        pack = 16 // min(param, state)  # elements
        written = pack * param // 16 + len(rule.states) * (pack * state // 16)
        if param == 2:
            written += pack * 4 // 16  # the master
        assert len(re.findall(r"ld\.global\.v(?:4\.[a-z]32|2\.[a-z]64)", body)) >= written + pack * param // 16, name
        assert len(re.findall(r"st\.global\.wb\.v4", body)) >= written, name


def types(mangled):
    """Bytes of a parameter and of a state, from the end of a kernel's mangled name: f, d, a class, or one again."""
    sizes = {"f": 4, "d": 8}
    tokens = re.findall(r"N\w*?(?:BFloat16|Half)E|S\w*?_|[fd]", mangled[mangled.index("E") + 1 :])
    param = sizes.get(tokens[0], 2)
    return param, sizes.get(tokens[1], 2)

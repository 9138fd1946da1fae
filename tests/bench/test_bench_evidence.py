"""The small benchmarks run, and what they compute from what they see is right."""

import shutil
from pathlib import Path

import pytest
import torch

from bench import dale, gap, kernels, lanczos, memory, rounding


def tables(out: str) -> list[list[str]]:
    """The cells of all rows, with those of the heads."""
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    return [row for row in rows if set(row[0]) != {"-"}]


def test_rounding_runs_every_method_in_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    image = tmp_path / "curves.png"
    assert rounding.main(["--quick", "--plot", str(image)]) == 0
    _, *rows = tables(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [[name, way.name] for name in rounding.LRS for way in rounding.WAYS]
    sizes = [float(row[-1]) for row in rows[: len(rounding.WAYS)]]
    assert sizes == [12, 8, 10, 10, 6, 12, 14]  # AdaBelief's: two states
    assert image.stat().st_size > 10_000


def test_what_kahan_adds_is_not_lost() -> None:
    # Steps of a thousandth of the parameter, which rounding to bfloat16 would drop.
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = rounding.Kahan([param], name="AdaGradNorm", lr=0.0)
    optimizer.param_groups[0]["lr"] = 1e-3 * 3**0.5
    for step in range(1, 101):
        param.grad = torch.full((3,), float(step), dtype=torch.bfloat16)
        optimizer.inner.state.clear()
        optimizer.step()
    assert param.tolist() == pytest.approx([0.9] * 3, abs=0.005)


def test_worse_needs_more_than_two_standard_errors() -> None:
    base = [{"loss": value} for value in (1.0, 2.0, 3.0)]
    assert rounding.worse([{"loss": value + 1.7} for value in (1.0, 2.0, 3.0)], base, "loss", 1)
    assert not rounding.worse([{"loss": value + 1.5} for value in (1.0, 2.0, 3.0)], base, "loss", 1)
    assert not rounding.worse([{"loss": value - 9} for value in (1.0, 2.0, 3.0)], base, "loss", 1)


def test_dale_keeps_signs_and_sgd_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert dale.main(["--quick"]) == 0
    _, *rows = tables(capsys.readouterr().out)
    flipped = {row[0]: float(row[4]) for row in rows}
    assert flipped.pop("SGD .1, momentum .9") > 0
    assert set(flipped.values()) == {0.0}


def test_memory_sees_that_gradients_are_freed_in_the_backward_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory.main(["--quick"]) == 0
    rows = {row[0]: row for row in tables(capsys.readouterr().out)}
    after, within = (float(rows[f"step {when} backward"][1]) for when in ("after", "in"))
    layer = 128 * 128 * 4 / 2**20
    assert after > 4 * layer > 2 * within  # all gradients, or one or two


PTXAS = """ptxas : Compiling entry function 'void optimzoo::step_kernel<optimzoo::DiffGrad, c10::BFloat16, float>\
(optimzoo::Table<3>, optimzoo::Scalars<4>)' for 'sm_90'
ptxas info    : Function properties for void optimzoo::step_kernel<optimzoo::DiffGrad, c10::BFloat16, float>(...)
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 94 registers, used 1 barriers, 64 bytes smem, 4 bytes cmem[0]
"""


def test_occupancy_of_a_kernel() -> None:
    (kernel,) = kernels.parse(PTXAS)
    assert (kernel.rule, kernel.param, kernel.state) == ("DiffGrad", "BFloat16", "float")
    assert (kernel.registers, kernel.shared, kernel.spilled, kernel.states) == (94, 64, 12, 3)
    # 94 x 32 rounds up to 3072; 65536 / 3072 is 21 warps, 20 in fours, two blocks of 8.
    assert kernel.blocks == 2
    assert kernel.occupancy == 0.25
    assert kernel.traffic == 3 * 2 + 2 * 3 * 4


@pytest.mark.parametrize(("registers", "shared", "blocks"), [(32, 0, 8), (33, 0, 6), (32, 100_000, 2), (255, 0, 1)])
def test_what_bounds_the_blocks_of_an_sm(registers: int, shared: int, blocks: int) -> None:
    assert kernels.Kernel("", "float", "float", 0, registers, shared, 0).blocks == blocks


def test_kernels_are_compiled_or_skipped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if not (shutil.which("nvcc") and torch.version.cuda):
        monkeypatch.setattr(shutil, "which", lambda name: None)
        assert kernels.main([]) == 0
        assert "skipped" in capsys.readouterr().err
        return
    assert kernels.main(["--quick"]) == 0
    _, *rows = tables(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [["AdaGradNorm", t] for t in ("double", "float", "bfloat16", "half")]


LOOP = [
    (0x10, "vmovups (%rdi),%zmm0"),
    (0x18, "vfmadd231ps (%rsi),%zmm1,%zmm0"),
    (0x20, "vdivps %zmm2,%zmm0,%zmm0"),
    (0x28, "vmovups %zmm0,(%rdi)"),
    (0x30, "vmovups -0x40(%rsp),%zmm3"),
    (0x38, "jne    10 <loop>"),
    (0x40, "ret"),
]


def test_a_loop_is_found_and_counted() -> None:
    (body,) = gap.loops([(0x08, "push   %rbx"), *LOOP])
    loop = gap.Loop.of(body)
    assert loop.kinds == {"multiply, add, fma": 1, "divide, root": 1}
    assert (loop.loads, loop.stores, loop.spills, loop.stored) == (2, 1, 1, 64)
    assert loop.widths[512] == 5


def test_only_innermost_loops_are_found() -> None:
    outer = [(0x08, "xor    %eax,%eax"), *LOOP[:-1], (0x40, "jne    8 <outer>")]
    assert len(gap.loops(outer)) == 1


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_gap_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert gap.main(["--quick"]) == 0
    rows = tables(capsys.readouterr().out)
    assert sum(row[0] == "AdaBelief" for row in rows) == 2  # a table of instructions and one of times


def test_lanczos_runs_on_a_task_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    options = ["--quick", "--tasks", "digits-mlp", "--out", str(tmp_path / "runs"), "--plots", str(tmp_path)]
    assert lanczos.main(options) == 0
    first = capsys.readouterr().out
    rows = tables(first)
    assert [row[0] for row in rows] == [
        "task",
        "digits-mlp",
        "task",
        "digits-mlp",
        "batch",
        *map(str, (8, 16, 32, 64, 128, 256, 512)),
        "all",
    ]
    steps, looks = map(float, rows[3][1:3])
    assert (steps, looks) == (18, 1)
    for name in ("density", "rate"):
        assert (tmp_path / f"lanczos-{name}.png").stat().st_size > 10_000
    assert lanczos.main(options) == 0  # from what is kept
    assert capsys.readouterr().out == first


def test_a_constant_rate_trains_as_the_sweep_does(tmp_path: Path) -> None:
    mine = lanczos.Run("digits-mlp", 3, "train", 0.05, 0.03)
    losses = [mine.advance() for _ in range(20)]
    settings = lanczos.Settings("digits-mlp", 1, "sgd", "torch", {"lr": 0.03, "momentum": 0.9}, 3, "train", 1e9)
    theirs = lanczos.Training(settings)  # so early in its budget that the cosine is 1
    assert losses == [theirs.advance() for _ in range(20)]

"""What nvcc makes of the CUDA kernels for sm_90: registers, spills, occupancy; and the time that memory allows them.

Nothing runs on a device. The floor is the bytes that a step must move over the bandwidth of an H100 SXM, 3.35 TB/s.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import optimzoo
from bench.markdown import table
from optimzoo import _build
from optimzoo.optimizer import Elementwise, Rule

ROOT = Path(__file__).parents[1]
BANDWIDTH = 3.35  # TB/s, NVIDIA's data sheet
THREADS = 256  # of a block of ours
# An SM of compute capability 9.0 (CUDA C++ Programming Guide, compute capabilities).
REGISTERS, WARPS, BLOCKS, SHARED = 65536, 64, 32, 228 * 1024
REGISTER_UNIT, WARP_UNIT, SHARED_UNIT, RESERVED = 256, 4, 128, 1024  # the last: bytes of a block that the system takes
SIZES = {"float": 4, "double": 8, "BFloat16": 2, "Half": 2}


@dataclass
class Kernel:
    """What ptxas reports of one."""

    rule: str
    param: str
    state: str
    states: int
    registers: int
    shared: int
    spilled: int  # bytes stored and loaded

    @property
    def blocks(self) -> int:
        """How many live on an SM together."""
        per_warp = _up(32 * self.registers, REGISTER_UNIT)
        by_registers = REGISTERS // per_warp // WARP_UNIT * WARP_UNIT // (THREADS // 32)
        by_shared = SHARED // _up(self.shared + RESERVED, SHARED_UNIT)
        return min(by_registers, WARPS // (THREADS // 32), BLOCKS, by_shared)

    @property
    def occupancy(self) -> float:
        """The share of an SM's warps."""
        return self.blocks * (THREADS // 32) / WARPS

    @property
    def traffic(self) -> int:
        """Bytes a parameter, without master weights."""
        return 3 * SIZES[self.param] + 2 * SIZES[self.state] * self.states


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def states_of_rules() -> dict[str, int]:
    """How many states each rule has, by the name of its struct in lower case."""
    classes = [cls for cls in vars(optimzoo).values() if isinstance(cls, type) and issubclass(cls, Elementwise)]
    found = [value for cls in classes for value in [cls._rule, *vars(sys.modules[cls.__module__]).values()]]
    return {rule.name.replace("_", ""): len(rule.states) for rule in found if isinstance(rule, Rule)}


def compile_kernels(nvcc: str, quick: bool) -> str:
    """The report of ptxas, with the flags of the library."""
    flags = [flag for flag in _build.cuda_flags() if not flag.startswith("-gencode")]
    include = ["-isystem", str(Path(torch.__file__).parent / "include")]
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(shutil.copytree(ROOT / "csrc", Path(folder, "csrc")))
        if quick:
            (sources / "rules.h").write_text('#include "rules/adagradnorm.h"\n')
        command = [nvcc, *flags, "-arch=sm_90", *include, "-Xptxas=-v", "-cubin", "cuda.cu", "-o", "cuda.cubin"]
        report = subprocess.run(command, cwd=sources, check=True, capture_output=True, text=True).stderr
    return subprocess.run(["c++filt"], input=report, check=True, capture_output=True, text=True).stdout


def parse(report: str) -> list[Kernel]:
    """The step kernels of a report, its names demangled."""
    kernels, states = [], states_of_rules()
    pattern = (
        r"entry function '[^']*step_kernel<optimzoo::(\w+), (?:c10::|\w+::)*(\w+), (?:c10::|\w+::)*(\w+)>"
        r"\([^']*'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
        r"([^\n]*)"
    )
    for rule, param, state, stores, loads, registers, rest in re.findall(pattern, report, re.S):
        shared = re.search(r"(\d+) bytes smem", rest)
        number, spilled = states[rule.lower()], int(stores) + int(loads)
        kernels.append(Kernel(rule, param, state, number, int(registers), int(shared[1]) if shared else 0, spilled))
    return kernels


def to_markdown(kernels: list[Kernel]) -> str:
    """A row a kernel."""
    rows = [
        [
            kernel.rule,
            f"{kernel.param.lower()}, {kernel.state.lower()}" if kernel.states else kernel.param.lower(),
            str(kernel.registers),
            str(kernel.shared),
            str(kernel.spilled),
            str(kernel.blocks),
            f"{100 * kernel.occupancy:.0f}",
            str(kernel.traffic),
            f"{kernel.traffic / BANDWIDTH:.1f}",
        ]
        for kernel in sorted(kernels, key=lambda k: (k.rule, -SIZES[k.param], k.param, -SIZES[k.state]))
    ]
    head = ["rule", "parameter, state", "registers", "shared B", "spilled B", "blocks/SM", "occupancy %",
            "bytes/param", "floor ps/param"]  # fmt: skip
    return table(head, rows)


def main(argv: list[str] | None = None) -> int:
    """Compiles, prints, and returns the exit code."""
    parser = argparse.ArgumentParser("bench.kernels", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one rule only, to see that all of it runs")
    args = parser.parse_args(argv)
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not (nvcc and torch.version.cuda and shutil.which("c++filt")):
        print("bench.kernels: skipped, it needs nvcc, c++filt and a torch with CUDA's headers", file=sys.stderr)
        return 0
    print(to_markdown(parse(compile_kernels(nvcc, args.quick))))
    release = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    version = re.search(r"V([\d.]+)", release)
    print(
        f"\nBlocks of {THREADS} threads, 8 warps. An SM holds min(⌊⌊65536 / r⌋₄ / 8⌋, 64 / 8, 32, ⌊228 KB / s⌋)"
        " of them, where r is 32 x registers rounded up to 256, ⌊ ⌋₄ rounds down to a multiple of 4 warps, and s is"
        " the shared memory and 1 KB of the system's, rounded up to 128 bytes; occupancy is 8 blocks / 64."
        f" Floor: bytes a parameter over {BANDWIDTH} TB/s, of all data in device memory and none in caches."
        f" nvcc {version[1] if version else 'of unknown version'}, sm_90; compiled, not run."
        " Command: `python -m bench.kernels`."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

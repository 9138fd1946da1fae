"""Why a fused CPU step is not as fast as the in-place stream: the instructions of its loop, and its time in caches.

The loop is that of x86-64-v4, from the disassembled library. GCC makes several for the settings that it tests outside;
counted is the one with the most divisions and roots, with an exponential if any has one, and then the fewest
instructions: the step that moves, in the form that multiplies, without coupled weight decay. Cycles an element come
from differences between two sizes at each level of the memory, on one thread, so that the cost of a call drops out.
"""

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import optimzoo
from bench.markdown import source, table
from optimzoo.optimizer import Batch, Elementwise

LANES = 16  # float32 in 512 bits
WIDTHS = {"%zmm": 512, "%ymm": 256, "%xmm": 128}  # bits; the widest that an instruction names


@dataclass(frozen=True)
class Case:
    """A rule with one dtype of its state."""

    struct: str  # in C++
    build: type[Elementwise]
    states: int
    compressed: bool = False
    momentum: float | None = None

    @property
    def title(self) -> str:
        return self.struct + (", bfloat16 state" if self.compressed else "")

    @property
    def traffic(self) -> int:
        """Bytes a parameter."""
        return 12 + 2 * (2 if self.compressed else 4) * self.states

    def optimizer(self, param: Tensor) -> Elementwise:
        settings = {} if self.momentum is None else {"momentum": self.momentum}
        return self.build(
            [param], lr=1e-6, fused=True, state_dtype=torch.bfloat16 if self.compressed else None, **settings
        )


CASES = [
    Case("AdaGradNorm", optimzoo.AdaGradNorm, 0),
    Case("AdaBelief", optimzoo.AdaBelief, 2),
    Case("AdaBelief", optimzoo.AdaBelief, 2, compressed=True),
    Case("DiffGrad", optimzoo.DiffGrad, 3),
    Case("DiffGrad", optimzoo.DiffGrad, 3, compressed=True),
    Case("DaleSGDMomentum", optimzoo.DaleSGD, 1, momentum=0.9),
    Case("DaleAdamW", optimzoo.DaleAdamW, 2),
]

KINDS = {  # of vector instructions, by their names
    "multiply, add, fma": r"v(f(n?m(add|sub)\d*)|mul|add|sub)p[sd]",
    "divide, root": r"v(div|sqrt)p[sd]",
    "integer": r"vp(add|sub|mul|sll|srl|sra|and|or|xor|tern|max|min)\w*",
    "compare, choose": r"v(cmp|fpclass|blendm|max|min|range|and|or|xor|andn)\w*p[sd]|vp(cmp|blendm|test)\w*|k\w+",
    "convert, shuffle": r"v(cvt|pmov|perm|pack|p?unpck|p?extr|p?ins|shuf|p?broadcast|valign)\w*",
}


def disassemble(library: Path) -> dict[str, list[tuple[int, str]]]:
    """Address and text of the instructions of every function."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(library)]
    functions: dict[str, list[tuple[int, str]]] = {}
    name = ""
    for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            functions[name := head[1]] = []
        elif instruction := re.match(r"\s+([0-9a-f]+):\s+(.*)", line):
            functions[name].append((int(instruction[1], 16), instruction[2]))
    return functions


def loops(instructions: Sequence[tuple[int, str]]) -> list[list[str]]:
    """The bodies of the innermost loops: what a jump backwards encloses, if there is no such jump in it."""
    place = {address: index for index, (address, _) in enumerate(instructions)}
    found = []
    for index, (_, text) in enumerate(instructions):
        jump = re.match(r"j\w+\s+([0-9a-f]+) ", text)
        start = place.get(int(jump[1], 16)) if jump else None
        if start is not None and start <= index and (not found or found[-1][0] < start):
            found.append((start, index))
    return [[text for _, text in instructions[start : end + 1]] for start, end in found]


@dataclass
class Loop:
    """One vectorised loop, counted."""

    widths: Counter[int]  # bits of the vectors
    kinds: Counter[str]
    loads: int
    stores: int
    spills: int  # loads and stores of the stack
    instructions: int
    stored: int  # bytes

    @classmethod
    def of(cls, body: Sequence[str]) -> "Loop":
        """Sorts the instructions of a body."""
        loop = cls(Counter(), Counter(), 0, 0, 0, len(body), 0)
        for text in body:
            name, _, operands = text.partition(" ")
            operands = operands.split("#")[0].strip()
            width = next((bits for register, bits in WIDTHS.items() if register in operands), 0)
            loop.widths[width] += width > 0
            memory = re.search(r"\([^)]*\)", operands)
            if memory and width:
                written = re.search(r"\)(\{%k\d\})?$", operands) and not name.startswith(("vcmp", "vpcmp"))
                if "%rsp" in memory[0] or "%rbp" in memory[0]:
                    loop.spills += 1
                elif "%rip" in memory[0]:
                    pass  # a constant
                elif written:
                    loop.stores += 1
                    loop.stored += _bytes(name, width)
                else:
                    loop.loads += 1
            for kind, pattern in KINDS.items():
                if re.fullmatch(pattern, name):
                    loop.kinds[kind] += 1
                    break
        return loop


def _bytes(name: str, width: int) -> int:
    narrowing = {"vpmovdw": 2, "vpmovusdw": 2, "vpmovwb": 2, "vpmovdb": 4}
    return width // 8 // narrowing.get(name, 1)


def hot_loop(functions: dict[str, list[tuple[int, str]]], case: Case) -> tuple[Loop, int] | None:
    """The loop of a case and how many elements it takes a turn, or None if there is none for 512 bits."""
    state = "unsigned short" if case.compressed else "float"
    states = f", {state}" * case.states
    pattern = (
        rf"void optimzoo::run<\(optimzoo::Rest\)0, optimzoo::{case.struct}<float>, float, float,"
        rf" std::integer_sequence<[^>]*>{states}>\(.*\[clone \.arch_x86_64_v4\]"
    )
    bodies = [body for name, code in functions.items() if re.fullmatch(pattern, name) for body in loops(code)]
    counted = [loop for loop in map(Loop.of, bodies) if loop.widths[512] and loop.stored]
    if not counted:
        return None
    held = 4 + (2 if case.compressed else 4) * case.states  # bytes that are written an element
    turns = [(loop, loop.stored / held) for loop in counted]
    best, elements = min(
        turns,
        key=lambda turn: (
            -turn[0].kinds["divide, root"] / turn[1],
            turn[0].kinds["integer"] == 0,
            turn[0].instructions / turn[1],
        ),
    )
    return best, int(elements)


def clock(case: Case, size: int, repeats: int) -> float:
    """Seconds of a native call that takes one tensor of a size again and again."""
    param = torch.randn(size).abs_().add_(0.1).requires_grad_()
    param.grad = torch.randn(size)
    optimizer = case.optimizer(param)
    optimizer.step()
    ((group, _, batch),) = optimizer._all_calls()
    again = Batch(*([column[0]] * repeats for column in batch[:3]), [state * repeats for state in batch.states], [])
    start = time.thread_time()  # without what other programs take
    optimizer._fused(group, again, None)
    return time.thread_time() - start


def per_element(case: Case, small: int, large: int, total: int, rounds: int) -> float:
    """Nanoseconds an element of the difference between two sizes, the median over the rounds."""
    repeats = max(1, total // large)
    samples = []
    for _ in range(rounds):
        less, more = (clock(case, size, repeats) for size in (small, large))
        samples.append(1e9 * (more - less) / repeats / (large - small))
    return statistics.median(samples)


def counts(case: Case, functions: dict[str, list[tuple[int, str]]]) -> list[str]:
    """A row of the table of instructions, of 16 elements."""
    found = hot_loop(functions, case)
    if found is None:
        return [case.title, *["none of 512 bits: not vectorised"], *["-"] * (len(KINDS) + 4)]
    loop, elements = found
    share = LANES / elements
    per_turn = [*(loop.kinds[kind] for kind in KINDS), loop.loads, loop.stores, loop.spills, loop.instructions]
    widths = "/".join(
        f"{width}: {count * share:g}" for width, count in sorted(loop.widths.items(), reverse=True) if width
    )
    return [case.title, widths, *(f"{count * share:g}" for count in per_turn)]


def in_cache(case: Case, quick: bool) -> list[float]:
    """Nanoseconds an element in L1 (of 32 KB or more) and in L2 (of 1 MB or more)."""
    held = case.traffic // 2 + 2  # bytes an element: everything is read once and all but the gradient written
    unit = 1024
    levels = [(4 * unit, 28 * unit), (96 * unit, 448 * unit)]
    total, rounds = (200_000, 1) if quick else (4_000_000, 15)
    return [per_element(case, low // held // 16 * 16, high // held // 16 * 16, total, rounds) for low, high in levels]


def in_memory(case: Case, quick: bool) -> tuple[float, float]:
    """Nanoseconds an element in memory, and of the same bytes in ``a += s * b``; in turns."""
    size, rounds = (200_000, 1) if quick else (20_000_000, 5)
    a, b = (torch.ones(size) for _ in range(2))
    steps, streams = [], []
    for _ in range(rounds):
        steps.append(clock(case, size, 1))
        start = time.thread_time()
        a.add_(b, alpha=1e-6)
        streams.append((time.thread_time() - start) * case.traffic / 12)
    return 1e9 * statistics.median(steps) / size, 1e9 * statistics.median(streams) / size


def main(argv: list[str] | None = None) -> int:
    """Counts, times, prints, and returns the exit code."""
    parser = argparse.ArgumentParser("bench.gap", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small and once, to see that all of it runs")
    args = parser.parse_args(argv)
    library = Path(optimzoo.__file__).with_name("_C.so")
    if not (library.exists() and shutil.which("objdump")):
        print("bench.gap: skipped, it needs objdump and optimzoo's native library", file=sys.stderr)
        return 0
    torch.set_num_threads(1)
    functions = disassemble(library)
    head = ["rule", "vector instructions by width", *KINDS, "loads", "stores", "on the stack", "all instructions"]
    print(table(head, [counts(case, functions) for case in CASES]))
    print("\nInstructions for 16 elements in the x86-64-v4 loop, float32 parameters; a load that is an operand of an"
          " arithmetic instruction counts as both.\n")  # fmt: skip
    rows = []
    for case in CASES:
        (l1, l2), (memory, roof) = in_cache(case, args.quick), in_memory(case, args.quick)
        rows.append([case.title, str(case.traffic), f"{l1:.3f}", f"{l2:.3f}", f"{memory:.3f}", f"{roof:.3f}",
                     f"{100 * roof / memory:.0f}", f"{100 * l2 / roof:.0f}"])  # fmt: skip
    head = ["rule", "bytes", "L1", "L2", "memory", "stream", "% of stream reached", "L2 in % of stream"]
    print(table(head, rows))
    arguments = sys.argv[1:] if argv is None else argv
    print(
        "\nNanoseconds of processor time an element, one thread, the native call alone, medians; stream: the same bytes"
        " at the rate of `a += s * b`. Where L2 takes more than 100 % of the stream, arithmetic is the bound and not"
        f" memory. {source('bench.gap', arguments)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

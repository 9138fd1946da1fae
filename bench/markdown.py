"""What the small benchmarks print: a table, and under it where its numbers come from."""

import shlex
import statistics
from collections.abc import Sequence

from bench.run import environment


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns after the first are set to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation, of one value the value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def source(module: str, arguments: Sequence[str]) -> str:
    """The machine, the versions and the command."""
    where = environment()
    return (
        f"{where['cpu']}, {where['cores']} cores of a shared machine; torch {where['torch']},"
        f" Python {where['python']}. Command: `{shlex.join(['python', '-m', module, *arguments])}`."
    )

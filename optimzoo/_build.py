"""Builds csrc/ into the native libraries; setup.cfg's cmdclass names the two commands.

The libraries use LibTorch's stable ABI and are built against the torch of the environment that is installed into, found
without importing it: a build-time requirement would make pip fetch a second torch into its isolated environment. Where
torch, or a compiler, is not there, what is installed is pure Python.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

_CSRC = Path("csrc")
_TARGET = (2, 10)  # the oldest torch that the libraries load into
FLAGS = ["-std=c++17", f"-DTORCH_TARGET_VERSION=0x{_TARGET[0]:02x}{_TARGET[1]:02x}000000000000ULL"]
_CXX_FLAGS = ["-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
# sm_80 and sm_90 natively; later devices compile the PTX of sm_90 when it is loaded.
_CUDA_TARGETS = [("80", "sm_80"), ("90", "sm_90"), ("90", "compute_90")]


def _find_torch() -> tuple[Path, bool] | str:
    """The folder of the torch to build against and whether it has CUDA, or why there is none."""
    for folder in (*sys.path, sysconfig.get_path("platlib")):
        torch = Path(folder, "torch")
        if torch.joinpath("version.py").exists():
            version = torch.joinpath("version.py").read_text()
            found = re.search(r"__version__ = '(\d+)\.(\d+)", version)
            if not found or (int(found[1]), int(found[2])) < _TARGET:
                return f"the torch in {folder} is older than {_TARGET[0]}.{_TARGET[1]}"
            return torch, re.search(r"^cuda.*= '", version, re.M) is not None
    return "torch is not installed; install it first to get the native library"


def _commands(folder: Path) -> list[list[str]]:
    """The compiler calls that make the native libraries in ``folder``; says what is left out and why."""
    torch = _find_torch()
    if isinstance(torch, str):
        print(f"optimzoo: no native libraries: {torch}")
        return []
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or "g++"]  # CXX may be "ccache g++"
    if not shutil.which(compiler[0]) or os.name == "nt":
        print(f"optimzoo: no native libraries: no C++ compiler that takes GCC's options ({compiler[0]})")
        return []
    path, has_cuda = torch
    include = ["-isystem", str(path / "include")]
    link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [f"-L{path / 'lib'}", "-ltorch_cpu"]
    sources = [str(_CSRC / name) for name in ("library.cpp", "cpu.cpp", "cbo.cpp", "samples.cpp")]
    cuda_sources = [str(_CSRC / name) for name in ("cuda.cu", "cbo.cu")]
    options = [*FLAGS, *_CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    commands = [[*compiler, *options, "-shared", *include, *sources, "-o", str(folder / "_C.so"), *link]]
    nvcc = shutil.which(os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")) or shutil.which(
        "nvcc"
    )
    if has_cuda and nvcc:
        commands.append([nvcc, *cuda_flags(), *include, "-shared", *cuda_sources, "-o", str(folder / "_C_cuda.so")])
        commands[-1] += [*link, "-ltorch_cuda"]
    else:
        print(f"optimzoo: no CUDA library: {'nvcc was not found' if has_cuda else 'this torch has no CUDA'}")
    return commands


def cuda_flags() -> list[str]:
    """What nvcc is told; the tests compile the kernels with the same flags to see what became of them."""
    targets = [f"-gencode=arch=compute_{arch},code={code}" for arch, code in _CUDA_TARGETS]
    return [*FLAGS, *targets, "-O3", "-DUSE_CUDA", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def build(folder: Path) -> None:
    """Compile what is older in ``folder`` than its sources; a failure is reported and leaves that library out."""
    newest = max(path.stat().st_mtime for path in [*_CSRC.rglob("*.*"), Path(__file__)])
    commands = [command for command in _commands(folder) if not _is_newer(_output(command), newest)]
    with ThreadPoolExecutor() as pool:
        for command, done in zip(commands, pool.map(_run, commands), strict=True):
            if done.returncode != 0:
                print(f"optimzoo: {_output(command).name} could not be built:\n{' '.join(command)}\n{done.stderr}")
                _output(command).unlink(missing_ok=True)


def _output(command: list[str]) -> Path:
    return Path(command[command.index("-o") + 1])


def _is_newer(path: Path, time: float) -> bool:
    return path.exists() and path.stat().st_mtime > time


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


class BuildPy(build_py):
    """Copies the package and puts the native libraries beside it."""

    def run(self) -> None:
        """Build into the wheel's folder, or in place for an editable install."""
        super().run()
        folder = Path("optimzoo") if self.editable_mode else Path(self.build_lib, "optimzoo")
        folder.mkdir(parents=True, exist_ok=True)
        build(folder)


class BdistWheel(bdist_wheel):
    """Tags a wheel with native libraries for its platform and for every Python 3."""

    def finalize_options(self) -> None:
        """Say that the wheel is not pure where something will be compiled."""
        compiles = bool(_commands(Path()))
        vars(self.distribution)["has_ext_modules"] = lambda: compiles
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none-PLATFORM``: the libraries know neither Python's ABI nor one torch's."""
        return "py3", "none", super().get_tag()[2]

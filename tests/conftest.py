"""What holds for the whole suite: drawn examples repeat and may take their time. Emulated kernels."""

import os

# Here tensors are small: threads would wait for each other for longer than they work, on a busy machine ten times as
# long. It holds for started processes too; tests of threads set their number. Before torch, which reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from optimzoo import _build

settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=40)
settings.register_profile("quick", parent=settings.get_profile("suite"), max_examples=8)  # make test-sanitize
settings.load_profile("suite")


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="let the audit of privacy take minutes")


@pytest.fixture
def thorough(request) -> bool:
    return bool(request.config.getoption("--thorough"))


@pytest.fixture(scope="session")
def emulated_ops(tmp_path_factory):
    """The ops of the CUDA sources, compiled for the host by an emulation of the launch."""
    compiler, root = shutil.which("g++"), Path(__file__).parents[1]
    if compiler is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("emulated") / "emulated.so"
    sources = ["-x", "c++", *map(str, sorted((root / "csrc").glob("*.cu"))), str(root / "csrc/library.cpp")]
    flags = [*_build.FLAGS, "-O2", "-fPIC", "-fvisibility=hidden", "-DOZ_EMULATED", "-pthread", "-shared"]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    folder = Path(torch.__file__).parent
    include = ["-I", str(root / "tests/emulation"), "-isystem", str(folder / "include")]
    link = [f"-L{folder / 'lib'}", "-ltorch_cpu"]
    subprocess.run([compiler, *flags, *include, *sources, "-o", str(library), *link], check=True)
    torch.ops.load_library(library)
    return torch.ops.optimzoo_emulated

"""What is installed: wheels with and without a compiler, and what it takes to add a method."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from optimzoo import _build

ROOT = Path(__file__).parents[1]

EXAMPLES = ROOT / "docs/examples"  # what the page on adding a method shows

USE_SIGNUM = """
import torch, optimzoo
from optimzoo import Signum
rule = Signum._rule
assert rule.states == ["exp_avg"] and rule.hyper == ["momentum"]
results = []
for impl in (dict(fused=True), dict(foreach=True), dict(foreach=False, fused=False)):
    draw = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n, generator=draw, dtype=torch.float64)) for n in (3, 1000)]
    optimizer = Signum(params, lr=0.1, weight_decay=0.1, **impl)
    for _ in range(20):
        for param in params:
            param.grad = torch.randn(param.shape, generator=draw, dtype=torch.float64)
        optimizer.step()
    results.append(torch.cat([param.detach() for param in params]))
for result in results[1:]:
    torch.testing.assert_close(result, results[0], rtol=0, atol=1e-14)
"""


def copy_of_the_project(folder: Path) -> Path:
    for name in ("optimzoo", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    return folder


def python(code: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs code against the package in a folder, and not the one that is installed."""
    start = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    return subprocess.run([sys.executable, *options, "-c", start + code], capture_output=True, text=True, cwd=folder)


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_method_is_added_in_four_places(tmp_path, monkeypatch):
    project = copy_of_the_project(tmp_path)
    shutil.copy(EXAMPLES / "signum.py", project / "optimzoo")
    shutil.copy(EXAMPLES / "signum.h", project / "csrc/rules")
    with (project / "csrc/rules.h").open("a") as file:
        file.write('#include "rules/signum.h"\n')
    with (project / "optimzoo/__init__.py").open("a") as file:
        file.write("from optimzoo.signum import Signum\n")
    monkeypatch.chdir(project)
    monkeypatch.setattr(
        _build.shutil, "which", lambda name, which=shutil.which: None if "nvcc" in name else which(name)
    )
    monkeypatch.setenv("CXXFLAGS", "-O1")  # a third of the time to compile, and the same numbers
    _build.build(project / "optimzoo")
    done = python(USE_SIGNUM, project, "-W", "error")
    assert done.returncode == 0, done.stderr


def test_without_a_compiler_the_wheel_is_pure_and_says_once_that_it_is(tmp_path):
    project = copy_of_the_project(tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", "dist", "."]
    subprocess.run(command, check=True, cwd=project, env={**os.environ, "CXX": "no-such-compiler"})
    (wheel,) = (project / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(project / "site")
    done = python(
        "import torch, optimzoo\n"
        "param = torch.nn.Parameter(torch.ones(3)); param.grad = torch.ones(3)\n"
        "optimzoo.DiffGrad([param], lr=1.0).step(); optimzoo.AdaBelief([param])\n"
        "print([round(x, 6) for x in param.tolist()])\n"
        "try: optimzoo.DiffGrad([param], fused=True)\n"
        "except RuntimeError as error: print(error)\n",
        project / "site",
    )
    assert done.stdout.splitlines()[0] == "[0.268941, 0.268941, 0.268941]"
    assert "fused=True cannot be met for params[0]: optimzoo was installed without _C.so" in done.stdout
    assert done.stderr.count("no fused steps, they go through foreach") == 1

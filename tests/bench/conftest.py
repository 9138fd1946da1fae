from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.store import Store

OPTIONS = [
    "--ruleset",
    "lr-only",
    "--trials",
    "3",
    "--tune-seeds",
    "1",
    "--seeds",
    "5",
    "--workers",
    "1",
    "--progress",
    "none",
]
SWEEP = ["--tasks", "digits-mlp", "--methods", "sgd,adamw,broken:Raises", "--budget", "0.05x"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums depend on the number of threads; the benchmark trains with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    store.create()
    return store


@pytest.fixture(scope="session")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder of a small sweep in which one method fails, and the command's exit code."""
    out = tmp_path_factory.mktemp("sweep")
    return out, main(["run", *SWEEP, *OPTIONS, "--out", str(out)])

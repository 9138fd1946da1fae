"""The evidence of growing batches runs, and so do the presets, on small files of the real formats."""

import gzip
import hashlib
import os
import pickle
import struct
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import batch_size

ROOT = Path(__file__).parents[2]


def tables(out: str) -> list[list[str]]:
    """The cells of all rows, with those of the heads."""
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    return [row for row in rows if set(row[0]) != {"-"}]


def test_all_of_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    image = tmp_path / "path.png"
    assert batch_size.main(["--quick", "--plot", str(image), "--out", str(tmp_path / "runs")]) == 0
    rows = {(row[0], row[1]): row for row in tables(capsys.readouterr().out)}
    steps = {name: int(rows["fm14, Adagrad, 0.005x", name][5]) for name in ("constant, small", "constant, large")}
    assert steps == {"constant, small": 13, "constant, large": 1}
    # One gradient beyond the step's own memory; all but the last for tests that need the mean first.
    added = {key: float(row[3]) for key, row in rows.items() if key[0].startswith(("micro_batch, 8", "ddp"))}
    assert added == pytest.approx({
        ("micro_batch, 8 micro-batches", "norm"): 1,
        ("micro_batch, 8 micro-batches", "augmented"): 7,
        ("ddp, two ranks", "norm"): 0,
        ("ddp, two ranks", "augmented"): 1,
    }, abs=0.2)  # fmt: skip
    assert image.stat().st_size > 10_000


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST's four files, with 96 and 20 images."""
    root, draw = tmp_path_factory.mktemp("mnist"), np.random.default_rng(0)
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 96), ("t10k", 20)):
        images = draw.integers(0, 256, (count, 28, 28), np.uint8)
        labels = draw.integers(0, 10, count, np.uint8)
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (raw / name).write_bytes(head + array.tobytes())
            with gzip.open(raw / f"{name}.gz", "wb") as file:
                file.write(head + array.tobytes())
    return root


def test_a_preset_runs_in_one_process(mnist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    command = ["--preset", "mnist-logistic", "--data-root", str(mnist), "--samples", "300", "--micro", "16"]
    assert batch_size.main(command) == 0
    out = capsys.readouterr().out
    assert "mnist-logistic: 3" in out
    assert "batch 2 to 96" in out


def test_a_preset_runs_under_torchrun(mnist: Path) -> None:
    pytest.importorskip("torchvision")
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "bench.batch_size"]
    command += ["--preset", "mnist-logistic", "--data-root", str(mnist), "--samples", "300", "--micro", "16"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "ranks 2" in line]
    assert "batch 2 to 96" in line


def test_the_cifar_preset_reads_its_format_and_trains(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    draw = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    sums = {}
    for name, count in (("data_batch_1", 24), ("test_batch", 4)):
        batch = {"data": draw.integers(0, 256, (count, 3072), np.uint8), "labels": [i % 10 for i in range(count)]}
        (folder / name).write_bytes(pickle.dumps(batch))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))

    class Small(datasets.CIFAR10):
        train_list = (("data_batch_1", sums["data_batch_1"]),)
        test_list = (("test_batch", sums["test_batch"]),)

    md5 = hashlib.md5((folder / "batches.meta").read_bytes()).hexdigest()
    Small.meta = {"filename": "batches.meta", "key": "label_names", "md5": md5}

    args = Namespace(
        preset="cifar10-resnet18", data_root=tmp_path, download=False, samples=24, micro=4, workers=0, seed=0
    )
    outcome = batch_size.run_preset(args, Small)
    assert outcome.path[0] == (0, 8)
    assert 2 <= outcome.steps <= 3


def test_the_imagenet_preset_reads_folders(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    from PIL import Image

    for part in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            Image.new("RGB", (300, 260)).save(tmp_path / part / label / "0.png")
    train, test, classes = batch_size.read(batch_size.PRESETS["imagenet-resnet101"], tmp_path, False)
    assert (len(train), len(test), classes) == (2, 2, 2)
    assert train[0][0].shape == test[0][0].shape == torch.Size([3, 224, 224])


def test_data_that_is_missing_is_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    for preset in ("cifar10-resnet50", "imagenet-resnet101"):
        assert batch_size.main(["--preset", preset, "--data-root", str(tmp_path)]) == 3
        assert f"no data for {preset}" in capsys.readouterr().err

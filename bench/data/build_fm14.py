"""Builds fm14.npz: a 14 x 14 subset of Fashion-MNIST (Xiao et al., 2017, https://arxiv.org/abs/1708.07747).

    apt-get install dataset-fashion-mnist
    python bench/data/build_fm14.py /usr/share/datasets/fashion-mnist

The first 10,000 training and 2,000 test images, each the mean over 2 x 2 blocks, rounded to uint8.
"""

import gzip
import sys
from pathlib import Path

import numpy as np

IDX_HEADER = {"images": 16, "labels": 8}  # bytes before the data in the two kinds of IDX file


def read(folder: Path, part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``count`` images, (count, 14, 14), and labels of one part of the dataset."""

    def content(kind: str, rank: int) -> np.ndarray:
        file = folder / f"{part}-{kind}-idx{rank}-ubyte.gz"
        return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=IDX_HEADER[kind])

    blocks = content("images", 3).reshape(-1, 14, 2, 14, 2)[:count]
    return np.rint(blocks.mean((2, 4))).astype(np.uint8), content("labels", 1)[:count]


def main(folder: Path) -> None:
    """Writes fm14.npz beside this file."""
    train_images, train_labels = read(folder, "train", 10_000)
    test_images, test_labels = read(folder, "t10k", 2_000)
    np.savez_compressed(
        Path(__file__).with_name("fm14.npz"),
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

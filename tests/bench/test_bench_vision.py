"""Tasks whose data the user has, on tiny files in the real formats; presets name tasks and methods that exist."""

import dataclasses
import functools
import gzip
import hashlib
import itertools
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets
from torchvision.transforms.v2.functional import to_pil_image

from bench import vision
from bench.__main__ import NO_DATA, main
from bench.airbench import Muon, Whitening, airbench, orthogonal
from bench.methods import find
from bench.presets import PRESETS
from bench.run import Machine, Settings, Stopped, train
from bench.schedule import factor
from bench.store import Store
from bench.task import join
from bench.tasks import SUITES, TASKS
from bench.vision import Jpegs, Keyed, Pixels, Scale

COUNT = 20  # pictures in each of CIFAR's files


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with CIFAR-10's Python version in small, and a class that knows its checksums."""
    root = tmp_path_factory.mktemp("cifar")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name: str, content: object) -> list[str]:
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return [name, hashlib.md5(raw).hexdigest()]

    def batch() -> dict[str, Any]:
        return {
            "data": rng.integers(0, 256, (COUNT, 3072), np.uint8),
            "labels": rng.integers(0, 10, COUNT).tolist(),
        }

    names = [f"data_batch_{i}" for i in range(1, 6)]
    train = [write(name, batch()) for name in names]
    test = [write("test_batch", batch())]
    meta = write("batches.meta", {"label_names": list("abcdefghij")})

    class Small(datasets.CIFAR10):
        train_list, test_list = train, test

    Small.meta = {"filename": meta[0], "key": "label_names", "md5": meta[1]}
    return root, Small


@pytest.fixture
def small(cifar10: tuple[Path, Any]) -> Pixels:
    """The task of airbench on the small files."""
    _, reader = cifar10
    return dataclasses.replace(
        TASKS["cifar10-airbench94"], load=functools.partial(vision.cifar, "CIFAR10", reader=reader)
    )


def test_cifar_is_read_as_bytes_and_split_once_for_all(cifar10: tuple[Path, Any], small: Pixels) -> None:
    root, reader = cifar10
    splits = small.data(root)
    assert [tuple(inputs.shape) for inputs, _ in splits] == [(90, 3, 32, 32), (10, 3, 32, 32), (20, 3, 32, 32)]
    assert {inputs.dtype for inputs, _ in splits} == {torch.uint8}
    whole = reader(root, train=True)
    images, labels = join([splits.train, splits.validation])
    assert sorted(images.flatten(1).sum(1).tolist()) == sorted(whole.data.reshape(100, -1).sum(1).tolist())
    picture = whole.data[7]
    place = (images.permute(0, 2, 3, 1) == torch.from_numpy(picture)).flatten(1).all(1).nonzero().item()
    assert labels[place] == whole.targets[7]


@pytest.mark.parametrize("name", ["fashion", "cifar10-resnet18", "cifar100-vgg11", "imagenet-resnet18"])
def test_missing_data_show_the_layout(name: str, tmp_path: Path) -> None:
    layout = {"fashion": "t10k-images-idx3-ubyte", "cifar10": "data_batch_1", "cifar100": "cifar-100-python/"}
    word = layout.get(name.partition("-")[0], "train/ and val/")
    for root, where in ((None, "--data-root was not given"), (tmp_path, f"{tmp_path} does not hold it")):
        with pytest.raises(FileNotFoundError, match=where) as caught:
            TASKS[name].data(root)
        assert word in str(caught.value)


def test_a_wrong_checksum_is_said_so(cifar10: tuple[Path, Any]) -> None:
    root, _ = cifar10
    with pytest.raises(FileNotFoundError, match="is missing or has a wrong checksum"):
        vision.cifar("CIFAR10", root)  # torchvision's own class knows the checksums of the real files


def test_fashion_is_read_from_either_place_and_packed_or_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    written = {}
    for part, count in (("train", 30), ("t10k", 7)):
        for kind, shape in (("images", (count, 28, 28)), ("labels", (count,))):
            array = rng.integers(0, 10, shape, np.uint8)
            raw = struct.pack(f">{1 + len(shape)}i", 0x800 + len(shape), *shape) + array.tobytes()
            place = tmp_path / "FashionMNIST/raw" if part == "t10k" else tmp_path
            place.mkdir(parents=True, exist_ok=True)
            name = f"{part}-{kind}-idx{len(shape)}-ubyte"
            if kind == "images":
                (place / f"{name}.gz").write_bytes(gzip.compress(raw))
            else:
                (place / name).write_bytes(raw)
            written[part, kind] = array
    splits = TASKS["fashion"].data(tmp_path)
    assert [len(labels) for _, labels in splits] == [27, 3, 7]
    assert torch.equal(splits.test[0][:, 0], torch.from_numpy(written["t10k", "images"]))
    assert splits.test[1].tolist() == written["t10k", "labels"].tolist()
    assert TASKS["fashion"].loss(TASKS["fashion"].model(0), splits.train).isfinite()
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"no idx file at all, but long enough")
    vision.fashion.cache_clear()
    with pytest.raises(FileNotFoundError, match="is not an IDX file of rank 1"):
        TASKS["fashion"].data(tmp_path)


def numbered(count: int, size: int = 32) -> torch.Tensor:
    """Pictures whose pixels say their place, from 1 on."""
    return (torch.arange(size * size, dtype=torch.int64).view(1, 1, size, size) + 1).expand(count, 3, size, size)


def test_a_crop_is_a_window_of_the_padded_picture() -> None:
    images = numbered(4)
    top, left = torch.tensor([0, 8, 4, 1]), torch.tensor([0, 8, 4, 6])
    padded = torch.nn.functional.pad(images, (4,) * 4)
    found = vision.crop(padded, top, left, 32, 32)
    for i in range(4):
        assert torch.equal(found[i], padded[i, :, top[i] : top[i] + 32, left[i] : left[i] + 32])
    assert torch.equal(found[2], images[2])
    assert found.is_contiguous(memory_format=torch.channels_last)


def moved(task: Pixels, images: torch.Tensor, seed: int, epoch: int = 0) -> torch.Tensor:
    labels = torch.zeros(len(images), dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    state = torch.get_rng_state()
    found, _ = task.augment((images, labels), generator, epoch, torch.arange(len(images)))
    assert torch.equal(torch.get_rng_state(), state)
    return found


def test_augmentation_is_its_generators_alone_and_keeps_bytes() -> None:
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    for name in ("cifar10-resnet18", "cifar10-airbench94", "cifar10-airbench96"):
        task = TASKS[name]
        first = moved(task, images, 1)
        assert first.dtype == torch.uint8
        assert first.shape == images.shape
        assert torch.equal(first, moved(task, images, 1))
        assert not torch.equal(first, moved(task, images, 2))


def test_alternating_flips_turn_every_picture_every_other_epoch() -> None:
    task = dataclasses.replace(TASKS["cifar10-airbench94"], pad=0)
    images = numbered(256)
    even, odd, again = (moved(task, images, 0, epoch) for epoch in (0, 1, 2))
    assert torch.equal(even, again)
    assert torch.equal(even.flip(-1), odd)
    turned = (even != images).flatten(1).any(1)
    assert 96 < turned.sum() < 160


def test_random_flips_are_about_half() -> None:
    task = dataclasses.replace(TASKS["cifar10-resnet18"], pad=0)
    images = numbered(256)
    turned = (moved(task, images, 0) != images).flatten(1).any(1)
    assert 96 < turned.sum() < 160
    assert torch.equal(moved(task, images, 0)[turned], images[turned].flip(-1))


def test_a_cutout_is_one_grey_square() -> None:
    task = dataclasses.replace(TASKS["cifar10-airbench96"], pad=0, flip="")
    images = torch.zeros(50, 3, 32, 32, dtype=torch.uint8)
    found = moved(task, images, 0)
    assert (found[:, 0] > 0).sum((1, 2)).tolist() == [144] * 50
    for picture in found[:, 0] > 0:
        rows, columns = picture.any(1).nonzero(), picture.any(0).nonzero()
        assert rows[-1] - rows[0] == columns[-1] - columns[0] == 11
    assert found[0].flatten(1).amax(1).tolist() == [125, 123, 114]
    assert len({tuple(p.any(1).nonzero()[0].tolist()) for p in found[:, 0] > 0}) > 10


def test_scale_is_that_of_float_pictures() -> None:
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    means, deviations = (torch.tensor(part).view(3, 1, 1) for part in vision.CIFAR_SCALE)
    assert torch.allclose(Scale(*vision.CIFAR_SCALE)(images), (images / 255 - means) / deviations, atol=1e-5)
    assert Scale(*vision.CIFAR_SCALE).bfloat16()(images).dtype == torch.bfloat16


def test_views_are_means_over_mirrored_and_moved_pictures(small: Pixels) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(10, 3 * 32 * 32))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().flatten(1) @ self.weight.T

    model, images = Net(), torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (6,))
    padded = torch.nn.functional.pad(images.float(), (1,) * 4, "reflect")
    both = lambda pictures: (model(pictures) + model(pictures.flip(-1))) / 2  # noqa: E731
    corners = (both(padded[..., :32, :32]) + both(padded[..., 2:, 2:])) / 2
    wanted = (both(images) + corners) / 2
    found = small.evaluate(model, (images, labels))
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(wanted, labels).item(), rel=1e-5)
    assert found["accuracy"] == (wanted.argmax(1) == labels).double().mean().item()


def test_whitened_patches_are_white() -> None:
    mixed = torch.randn(16, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.avg_pool2d(mixed, 3, 1) + mixed[:, :1, 1:-1, 1:-1]
    layer = Whitening(floor=0.0)
    layer.eval()
    before = layer.filters.clone()
    layer(images)
    assert torch.equal(layer.filters, before)
    layer.train()
    found = layer(images) - layer.bias.view(-1, 1, 1)
    parts = found[:, :12].transpose(0, 1).flatten(1)
    assert torch.allclose(parts @ parts.T / parts.shape[1], torch.eye(12), atol=1e-3)
    assert torch.allclose(found[:, :12], -found[:, 12:], atol=1e-5)
    once = layer.filters.clone()
    layer(2 * images)
    assert torch.equal(layer.filters, once)


def test_groups_hold_every_trained_parameter_once() -> None:
    for task in (*vision.CIFAR[-4:], *vision.IMAGENET[-1:]):
        model = task.model(0)
        grouped = [id(param) for params, _ in task.groups(model) for param in params]
        assert sorted(grouped) == sorted(id(param) for param in model.parameters() if param.requires_grad)
    task = TASKS["cifar10-airbench94-muon"]
    filters, *_, (head, _) = task.groups(task.model(0))
    assert {param.dim() for param in filters[0]} == {4}
    assert head[0].shape == (10, 256)


def test_muon_steps_are_orthogonal_and_its_filters_keep_their_norm() -> None:
    matrix = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix, steps=5))
    assert 0.6 < values.min() < values.max() < 1.3
    assert torch.allclose(orthogonal(matrix.T), orthogonal(matrix).T, atol=0.02)
    weight = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
    other = torch.nn.Parameter(torch.ones(5))
    optimizer = Muon([weight, other], lr=0.0, weight_decay=0.1)
    weight.grad, other.grad = torch.randn_like(weight), torch.ones(5)
    optimizer.step()
    assert weight.norm().item() == pytest.approx(8**0.5, rel=1e-5)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    # Nesterov: gradient 1.1, velocity 1.85 * 1.1, step 0.1 * (1.1 + 0.85 * 1.85 * 1.1).
    assert other[0].item() == pytest.approx(1 - 0.1 * 1.1 * (1 + 0.85 * 1.85))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of JPEGs of different sizes in two classes."""
    root = tmp_path_factory.mktemp("imagenet")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 6), ("val", 3)):
        for label in ("n01440764", "n01443537"):
            (root / part / label).mkdir(parents=True)
            for i in range(count):
                image = torch.randint(0, 256, (3, 60 + 7 * i, 80), dtype=torch.uint8, generator=generator)
                to_pil_image(image).save(root / part / label / f"{i}.JPEG")
    return root


@pytest.fixture
def tiny() -> vision.ImageNet:
    def net() -> torch.nn.Module:
        layers = torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2)
        return torch.nn.Sequential(*layers)

    whole = TASKS["imagenet-ffcv-resnet50"]
    spec = dataclasses.replace(whole.spec, batch=4)
    return dataclasses.replace(whole, spec=spec, net=net, size=32, sizes=((0.0, 32), (1.0, 64)), workers=0)


def test_imagenet_streams_the_rows_that_are_asked_for(photographs: Path, tiny: vision.ImageNet) -> None:
    splits = tiny.data(photographs)
    assert [len(part) for part in splits] == [10, 2, 6]
    whole = join([splits.train, splits.validation])
    assert len(whole) == 12
    rows = torch.tensor([3, 11, 0, 7, 10]).split(2)
    found = list(tiny.batches(whole, rows, 1, 0.0))
    assert [len(labels) for _, labels in found] == [2, 2, 1]
    labels = [label for part in (splits.train, splits.validation) for _, label in part.samples]
    assert torch.cat([part for _, part in found]).tolist() == [labels[row] for row in (3, 11, 0, 7, 10)]
    assert found[0][0].shape == (2, 3, 32, 32)
    assert found[0][0].dtype == torch.uint8
    assert next(tiny.batches(whole, rows, 1, 1.0))[0].shape == (2, 3, 64, 64)


def test_a_crop_depends_on_its_seed_and_row_and_not_on_its_batch(photographs: Path, tiny: vision.ImageNet) -> None:
    train = tiny.data(photographs).train
    state = torch.get_rng_state()
    one = next(tiny.batches(train, [torch.tensor([5, 2])], 1, 0.0))[0]
    assert torch.equal(torch.get_rng_state(), state)
    other = next(tiny.batches(train, [torch.tensor([2, 5, 7])], 1, 0.0))[0]
    assert torch.equal(one[0], other[1])
    assert torch.equal(one[1], other[0])
    assert not torch.equal(one, next(tiny.batches(train, [torch.tensor([5, 2])], 2, 0.0))[0])
    centre = [next(tiny.batches(train, [torch.tensor([5])], None, place))[0] for place in (0.0, 1.0)]
    assert torch.equal(*centre)


def test_workers_read_the_same(photographs: Path, tiny: vision.ImageNet) -> None:
    train = tiny.data(photographs).train
    rows = torch.arange(10).split(4)
    here = list(tiny.batches(train, rows, 3, 0.0))
    there = list(dataclasses.replace(tiny, workers=1).batches(train, rows, 3, 0.0))
    assert all(torch.equal(a, b) for one, two in zip(here, there, strict=True) for a, b in zip(one, two, strict=True))


def test_imagenet_is_evaluated_by_pictures_and_their_mirror_images(photographs: Path, tiny: vision.ImageNet) -> None:
    model, test = tiny.model(0), tiny.data(photographs).test
    found = tiny.evaluate(model, test)
    pictures = torch.stack([test[row, None, 32][0] for row in range(6)])
    labels = torch.tensor([label for _, label in test.samples])
    logits = (model(pictures) + model(pictures.flip(-1))) / 2
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert model.training


def test_classes_must_agree(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "train/a").mkdir(parents=True)
    (tmp_path / "val/b").mkdir(parents=True)
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    for folder in ("train/a", "val/b"):
        to_pil_image(image).save(tmp_path / folder / "x.jpg")
    with pytest.raises(FileNotFoundError, match=r"1 classes in train/, 1 others in val/"):
        vision.imagenet(tmp_path)
    assert isinstance(Keyed(Jpegs([])), Keyed)


def test_blurred_networks_halve_behind_a_filter() -> None:
    net = vision.imagenet_resnet(18, blurred=True)
    blurs = [module for module in net.modules() if isinstance(module, vision.Blur)]
    assert len(blurs) == 6  # three strides in blocks and three in their shortcuts
    ones = torch.ones(1, 8, 6, 6)
    assert torch.allclose(vision.Blur(8)(ones)[..., 1:-1, 1:-1], torch.ones(1, 8, 4, 4))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_of_tasks_methods_and_settings_that_exist(name: str) -> None:
    preset = PRESETS[name]
    spec = TASKS[preset.task].spec
    assert preset.task.startswith(name.partition("/")[0])
    assert factor(preset.schedule, 0.5) > 0
    assert preset.published is None or spec.chance < preset.published < 1
    assert preset.amp in ("off", "bf16")
    method = find(preset.method)
    model = torch.nn.Linear(2, 2)
    sizes = {"batch": preset.batch, "count": 50_000} if "per_sample" in method.needs else {}
    assert method.build(model.parameters(), **sizes, **preset.hp).param_groups[0]["lr"] == preset.hp["lr"]


def test_vision_suites_are_of_vision_tasks() -> None:
    names = [name for suite in ("fashion", "cifar", "imagenet") for name in SUITES[suite]]
    assert all("vision" in TASKS[name].spec.tags for name in names)


def trained(settings: Settings, folder: Path, root: Path, stop_at: int = 0) -> dict[str, Any]:
    """The record of a run, or a checkpoint at every step and an end after so many."""
    store = Store(folder)
    store.create()
    steps = itertools.count(1)
    machine = Machine(data_root=root, checkpoint_every=0.0 if stop_at else 1e9)
    return train(settings, store, machine=machine, stopping=lambda: next(steps) == stop_at)


def test_a_preset_on_small_files_is_trained_and_cut_off_and_ends_with_the_same_bits(
    cifar10: tuple[Path, Any], small: Pixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = cifar10
    task = dataclasses.replace(
        TASKS["cifar10-airbench94-muon"], load=small.load, net=lambda: airbench((8, 8, 16), spread=True)
    )
    monkeypatch.setitem(TASKS, "cifar10-airbench94-muon", task)
    recipe = PRESETS["cifar10/airbench94-muon"]
    hp = {**recipe.hp, "lr": 0.05}
    package = find(recipe.method).package
    settings = Settings(
        recipe.task, 1, recipe.method, package, hp, 1000, "train+validation", schedule=recipe.schedule, epochs=3,
        batch=30, amp="bf16",
    )  # fmt: skip
    whole = trained(settings, tmp_path / "whole", root)
    assert whole["error"] is None
    assert whole["counts"]["samples"] == 300
    with pytest.raises(Stopped):
        trained(settings, tmp_path / "cut", root, stop_at=9)
    assert trained(settings, tmp_path / "cut", root)["weights"] == whole["weights"]
    other = dataclasses.replace(settings, seed=1001)
    assert trained(other, tmp_path / "other", root)["weights"] != whole["weights"]


def test_a_stream_is_trained_and_cut_off_in_an_epoch_and_ends_with_the_same_bits(
    photographs: Path, tiny: vision.ImageNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing = dataclasses.replace(tiny, sizes=((0.0, 32), (1.0, 96)))  # with another size in the middle of an epoch
    monkeypatch.setitem(TASKS, "imagenet-ffcv-resnet50", growing)
    settings = Settings(
        "imagenet-ffcv-resnet50", 1, "sgd", find("sgd").package, {"lr": 0.1, "weight_decay": 1e-4}, 1000,
        "train+validation", epochs=2, batch=5,
    )  # fmt: skip
    whole = trained(settings, tmp_path / "whole", photographs)
    assert whole["counts"] == {"steps": 6, "grads": 24, "forwards": 0, "hvps": 0, "samples": 24}
    with pytest.raises(Stopped):
        trained(settings, tmp_path / "cut", photographs, stop_at=4)
    assert trained(settings, tmp_path / "cut", photographs)["weights"] == whole["weights"]


def test_the_command_line_asks_for_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "runs"), "--data-root", str(tmp_path), "--progress", "none"]
    assert main(["run", "--preset", "cifar10/airbench94", *out]) == NO_DATA
    assert "data_batch_1" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()

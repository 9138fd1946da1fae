"""The tasks whose data the user has: Fashion-MNIST, CIFAR-10 and -100 in memory, ImageNet as a stream of JPEGs.

Nothing is fetched unless ``--download`` says so. Pixels are uint8 until the model makes numbers of them.
"""

import functools
import gzip
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.airbench import airbench
from bench.task import Batch, Classification, Splits, TaskSpec, accuracy, seeded, stream

Groups = list[tuple[list[nn.Parameter], dict[str, float]]]

CIFAR_SCALE = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # means and deviations of the channels
IMAGENET_SCALE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

LAYOUTS = {
    "CIFAR10": "cifar-10-batches-py/ with data_batch_1 .. data_batch_5, test_batch and batches.meta, the Python version"
    " of https://www.cs.toronto.edu/~kriz/cifar.html",
    "CIFAR100": "cifar-100-python/ with train, test and meta, the Python version of"
    " https://www.cs.toronto.edu/~kriz/cifar.html",
    "FashionMNIST": "FashionMNIST/raw/ with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte"
    " and t10k-labels-idx1-ubyte, each as it is or with .gz; the files may also lie in the folder itself",
    "ImageNet": "train/ and val/, each with a folder of JPEGs for every class, such as train/n01440764/x.JPEG",
}


def missing(name: str, root: Path | None, why: str = "") -> FileNotFoundError:
    """The error of a task whose data are not there; it shows the layout that is expected."""
    where = "--data-root was not given" if root is None else f"{root} does not hold it"
    return FileNotFoundError(f"{name}: {where}{why}. Expected in --data-root: {LAYOUTS[name]}")


class Scale(nn.Module):
    """Pixels of 0 .. 255 to numbers with mean 0 and deviation 1 in each channel, in the dtype of the model."""

    def __init__(self, means: Iterable[float], deviations: Iterable[float]) -> None:
        super().__init__()
        self.register_buffer("shift", 255 * torch.tensor(tuple(means)).view(-1, 1, 1))
        self.register_buffer("scale", 255 * torch.tensor(tuple(deviations)).view(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """(n, channels, height, width) of uint8 to the same of floats, channels last."""
        return pixels.to(self.scale.dtype, memory_format=torch.channels_last).sub(self.shift).div(self.scale)


# Reading


def _split(images: Tensor, labels: Tensor, held_out: int) -> tuple[Batch, Batch]:
    """The training part without, and the validation part with, so many examples drawn once for all."""
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(labels)))
    train, validation = order[held_out:].sort().values, order[:held_out].sort().values
    return (images[train], labels[train]), (images[validation], labels[validation])


@functools.lru_cache(maxsize=2)
def cifar(name: str, root: Path | None, reader: Any = None) -> Splits:
    """CIFAR by torchvision's class of this name, or by ``reader`` in its place; a tenth of the training part validates.

    Raises:
        FileNotFoundError: the files are not there, or are not those that were published.
    """
    from torchvision import datasets

    reader = reader or getattr(datasets, name)
    if root is None:
        raise missing(name, root)
    try:
        sets = [reader(root, train=train) for train in (True, False)]
    except RuntimeError as error:  # torchvision's word for a missing file and for a wrong checksum
        folder = root / reader.base_folder
        raise missing(
            name, root, f" ({folder} exists, but a file is missing or has a wrong checksum)" * folder.exists()
        ) from error
    (images, labels), test = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)) for part in sets
    )
    return Splits(*_split(images, labels, len(labels) // 10), test)


@functools.lru_cache(maxsize=1)
def fashion(root: Path | None) -> Splits:
    """Fashion-MNIST from its IDX files; a tenth of the training part validates."""

    def content(part: str, kind: str, rank: int) -> Tensor:
        name = f"{part}-{kind}-idx{rank}-ubyte"
        places = (
            [] if root is None else [f / (name + end) for f in (root, root / "FashionMNIST/raw") for end in ("", ".gz")]
        )
        file = next((place for place in places if place.exists()), None)
        if file is None:
            raise missing("FashionMNIST", root, f" (no {name})")
        raw = file.read_bytes()
        raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
        shape = np.frombuffer(raw, ">i4", 1 + rank)
        if len(raw) != 4 * len(shape) + math.prod(shape[1:]) or shape[0] != 0x800 + rank:
            raise missing("FashionMNIST", root, f" ({file} is not an IDX file of rank {rank})")
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 * len(shape)).reshape(shape[1:]).copy())

    parts = [(content(part, "images", 3)[:, None], content(part, "labels", 1).long()) for part in ("train", "t10k")]
    return Splits(*_split(*parts[0], len(parts[0][1]) // 10), parts[1])


# Augmentation


def _draw(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=generator, device=generator.device)


def crop(images: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """Of each image the window whose corner is given for it; the result is in channels-last memory."""
    rows = top[:, None, None] + torch.arange(height, device=images.device)[:, None]
    columns = left[:, None, None] + torch.arange(width, device=images.device)
    each = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[each, rows, columns].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Pixels(Classification):
    """Pictures in memory, moved about at random as they are trained on.

    Args:
        spec: what a report has to know.
        load: reads the parts from a root.
        net: makes the network.
        pad: pixels that a picture moves in each direction at most.
        border: what comes in: ``"zeros"`` or ``"reflect"``.
        flip: ``"random"``, ``"alternating"`` (each picture in every other epoch: Jordan, 2024,
            https://arxiv.org/abs/2404.00498), or none.
        cutout: side of a grey square laid over each picture.
        smoothing: of the labels.
        views: whether predictions are means over mirrored and moved copies.
        factors: of the hyper-parameters of groups of parameters, by a word in their names.
        source: torchvision's class, for ``download``.
    """

    load: Callable[[Path | None], Splits]  # type: ignore[assignment]
    pad: int = 0
    border: str = "zeros"
    flip: str = ""
    cutout: int = 0
    smoothing: float = 0.0
    views: bool = False
    factors: tuple[tuple[str, dict[str, float]], ...] = ()
    source: str = ""

    def data(self, root: Path | None = None) -> Splits:
        return self.load(root)

    def download(self, root: Path) -> None:
        """Fetches the files from where torchvision says."""
        from torchvision import datasets

        getattr(datasets, self.source)(root, download=True)

    def augment(self, batch: Batch, generator: torch.Generator, epoch: int, rows: Tensor) -> Batch:
        """Moves, mirrors and cuts out; what is drawn comes from ``generator``."""
        images, labels = batch
        count, _, height, width = images.shape
        if self.pad:
            if self.border == "reflect":
                padded = F.pad(images.float(), (self.pad,) * 4, "reflect").to(images.dtype)
            else:
                padded = F.pad(images, (self.pad,) * 4)
            top, left = _draw(0, 2 * self.pad, (2, count), generator).to(images.device)
            images = crop(padded, top, left, height, width)
        if self.flip:
            if self.flip == "alternating":  # by a hash of its row, and then the other way round
                turned = ((rows.to(images.device) * 2654435761 >> 15) + epoch) % 2 == 1
            else:
                turned = (_draw(0, 1, (count,), generator) == 1).to(images.device)
            images = torch.where(turned.view(-1, 1, 1, 1), images.flip(-1), images)
        if self.cutout:
            corners = _draw(0, height - self.cutout, (2, count, 1), generator).to(images.device)
            down, across = torch.arange(height, device=images.device) - corners
            down, across = (down >= 0) & (down < self.cutout), (across >= 0) & (across < self.cutout)
            grey = torch.tensor(CIFAR_SCALE[0], device=images.device).mul(255).round().to(images.dtype)
            images = torch.where((down[:, :, None] & across[:, None])[:, None], grey.view(-1, 1, 1), images)
        return images, labels

    def groups(self, model: nn.Module) -> Groups:
        """The trained parameters by the first word of ``factors`` that their name has, the others first."""
        words = [word for word, _ in self.factors]
        parts: list[list[nn.Parameter]] = [[] for _ in range(len(words) + 1)]
        for name, param in model.named_parameters():
            if param.requires_grad:
                parts[next((i for i, word in enumerate(words, 1) if word in name), 0)].append(param)
        shares: list[dict[str, float]] = [{}, *(share for _, share in self.factors)]
        return [(part, share) for part, share in zip(parts, shares, strict=True) if part]

    def model(self, seed: int) -> nn.Module:
        return seeded(self.net, seed).to(memory_format=torch.channels_last)

    def loss(self, model: nn.Module, batch: Batch, *, reduction: str = "mean") -> Tensor:
        inputs, labels = batch
        logits = model(inputs).float()
        return F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=self.smoothing)

    def evaluate(self, model: nn.Module, split: Batch) -> dict[str, float]:
        batches = zip(split[0].split(1000), split[1].split(1000), strict=True)
        return evaluate(model, batches, diagonal_views if self.views else Tensor.unsqueeze)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], views: Callable[[Tensor, int], Tensor]) -> dict[str, float]:
    """Accuracy and cross-entropy of the mean output over some views, (views, n, ..), of each picture."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    right, loss, count = 0.0, 0.0, 0
    for images, labels in batches:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        logits = torch.stack([model(view).float() for view in views(images, 0)]).mean(0)
        right += accuracy(logits, labels) * len(labels)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        count += len(labels)
    model.train(training)
    return {"accuracy": right / count, "loss": loss / count}


def mirrored_views(images: Tensor, _: int) -> Tensor:
    """Every picture and its mirror image."""
    return torch.stack([images, images.flip(-1)])


def diagonal_views(images: Tensor, _: int) -> Tensor:
    """Every picture twice, and moved by a pixel along the diagonal to either side, all of them mirrored as well."""
    padded = F.pad(images.float(), (1,) * 4, "reflect").to(images.dtype)
    views = torch.stack([images, images, padded[..., :-2, :-2], padded[..., 2:, 2:]])
    return torch.cat([views, views.flip(-1)])


# Networks


def _scaled(net: nn.Module) -> nn.Module:
    return nn.Sequential(Scale(*CIFAR_SCALE), net)


def resnet(depth: int, classes: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """torchvision's, without stride and pooling before the first block, as is usual for 32 x 32 pixels."""
    from torchvision import models

    net = getattr(models, f"resnet{depth}")(num_classes=classes, norm_layer=norm)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return _scaled(net)


def vgg11(classes: int) -> nn.Module:
    """torchvision's convolutions with batch normalisation, and one linear layer."""
    from torchvision import models

    features = models.vgg.make_layers(models.vgg.cfgs["A"], batch_norm=True)
    return _scaled(nn.Sequential(features, nn.Flatten(), nn.Linear(512, classes)))


def densenet121(classes: int) -> nn.Module:
    """torchvision's, without stride and pooling before the first block."""
    from torchvision import models

    net = models.densenet121(num_classes=classes)
    net.features.conv0, net.features.pool0 = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return _scaled(net)


def fashion_cnn() -> nn.Module:
    """Two convolutions with batch normalisation, one hidden layer: fm14's at 28 x 28."""
    return nn.Sequential(
        Scale((0.2860,), (0.3530,)),
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


# ImageNet


class Jpegs(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Files and classes. A key is a row and the seed of its crop, or None for the centre, and a size in pixels."""

    def __init__(self, samples: list[tuple[str, int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int | None, int]) -> tuple[Tensor, int]:
        from torchvision.datasets.folder import pil_loader
        from torchvision.transforms import v2

        row, seed, size = key
        file, label = self.samples[row]
        image = pil_loader(file)
        if seed is None:
            image = v2.functional.center_crop(v2.functional.resize(image, [round(size * 256 / 224)]), [size, size])
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(stream("crop", seed, row))
                image = v2.RandomHorizontalFlip()(v2.RandomResizedCrop(size)(image))
        return v2.functional.pil_to_tensor(image), label


@functools.lru_cache(maxsize=1)
def imagenet(root: Path | None) -> Splits:
    """The files of ``train/`` and ``val/``; a hundredth of the training part, at least one a class, validates."""
    from torchvision.datasets import ImageFolder

    if root is None:
        raise missing("ImageNet", root)
    try:
        train, test = ImageFolder(root / "train"), ImageFolder(root / "val")
    except FileNotFoundError as error:
        raise missing("ImageNet", root, f" ({error})") from error
    if train.classes != test.classes:
        raise missing(
            "ImageNet", root, f" ({len(train.classes)} classes in train/, {len(test.classes)} others in val/)"
        )
    order = np.random.RandomState(0).permutation(len(train.samples))
    held_out = max(len(train.samples) // 100, len(train.classes))
    parts = [[train.samples[i] for i in sorted(rows)] for rows in (order[held_out:], order[:held_out])]
    return Splits(*(Jpegs(samples) for samples in (*parts, test.samples)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class ImageNet:
    """JPEGs, decoded and cropped by workers as they are needed.

    Args:
        spec: what a report has to know.
        net: makes the network for a number of classes.
        sizes: of a training crop in pixels at a share of the budget, with straight lines between, to multiples of 32.
        size: of a test crop.
        smoothing: of the labels.
        mirrored: whether predictions are means over an image and its mirror image.
        decayed: False if batch normalisation has no weight decay.
        workers: processes that read. Default: one for each core, 12 at most.
    """

    spec: TaskSpec
    net: Callable[[], nn.Module]
    sizes: tuple[tuple[float, int], ...] = ((0.0, 224),)
    size: int = 224
    smoothing: float = 0.0
    mirrored: bool = False
    decayed: bool = True
    workers: int = min(12, os.cpu_count() or 1)

    def data(self, root: Path | None = None) -> Splits:
        return imagenet(root)

    def model(self, seed: int) -> nn.Module:
        net = seeded(self.net, seed)
        return nn.Sequential(Scale(*IMAGENET_SCALE), net).to(memory_format=torch.channels_last)

    def groups(self, model: nn.Module) -> Groups:
        """All parameters; those of batch normalisation apart where they have no weight decay."""
        norms = {
            id(param)
            for module in model.modules()
            if isinstance(module, nn.BatchNorm2d)
            for param in module.parameters()
        }
        free = [param for param in model.parameters() if id(param) in norms]
        rest = [param for param in model.parameters() if id(param) not in norms]
        return [([*rest, *free], {})] if self.decayed else [(rest, {}), (free, {"weight_decay": 0.0})]

    def crop_size(self, progress: float) -> int:
        shares, sizes = zip(*self.sizes, strict=True)
        return 32 * round(float(np.interp(progress, shares, sizes)) / 32)

    def batches(self, part: Any, rows: Iterable[Tensor], seed: int | None, progress: float) -> Iterator[Batch]:
        """The rows of each batch in turn, cropped for ``seed``, or in the middle if there is none."""
        size = self.size if seed is None else self.crop_size(progress)
        keys = [[(row, seed, size) for row in batch.tolist()] for batch in rows]
        daemon = multiprocessing.current_process().daemon  # such a process may not have children
        workers = 0 if daemon else min(self.workers, len(keys))
        loader = torch.utils.data.DataLoader(
            Keyed(part),
            batch_sampler=keys,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else the workers' seed is drawn from the global one
        )
        return iter(loader)

    def loss(self, model: nn.Module, batch: Batch, *, reduction: str = "mean") -> Tensor:
        inputs, labels = batch
        logits = model(inputs).float()
        return F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=self.smoothing)

    def evaluate(self, model: nn.Module, split: Any) -> dict[str, float]:
        found = self.batches(split, torch.arange(len(split)).split(self.spec.batch), None, 1.0)
        return evaluate(model, found, mirrored_views if self.mirrored else Tensor.unsqueeze)


class Keyed(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """One dataset or several, one after the other, by keys that begin with a row."""

    def __init__(self, part: Any) -> None:
        self.part = part

    def __getitem__(self, key: tuple[int, int | None, int]) -> tuple[Tensor, int]:
        row, *rest = key
        for part in getattr(self.part, "datasets", [self.part]):
            if row < len(part):
                found: tuple[Tensor, int] = part[(row, *rest)]
                return found
            row -= len(part)
        raise IndexError(key[0])


def imagenet_resnet(depth: int, blurred: bool = False) -> nn.Module:
    """torchvision's; blurred: a binomial filter goes before every convolution with a stride, but the first."""
    from torchvision import models

    net = getattr(models, f"resnet{depth}")()
    if blurred:
        for module in list(net.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Conv2d) and child.stride[0] > 1 and child.in_channels >= 16:
                    setattr(module, name, nn.Sequential(Blur(child.in_channels), child))
    return net


class Blur(nn.Module):
    """The binomial filter (1, 2, 1) in both directions (Zhang, 2019, https://arxiv.org/abs/1904.11486)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        line = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("filter", (line[:, None] * line).expand(channels, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) to the same."""
        return F.conv2d(x, self.filter.to(x.dtype), padding=1, groups=x.shape[1])


# The tasks


def _pixels(source: str, name: str, net: Callable[[int], nn.Module], target: float, **options: Any) -> Pixels:
    classes = 100 if source == "CIFAR100" else 10
    spec = TaskSpec(
        f"{source.lower()}-{name}", 1, "accuracy", "max", target, 200, 128, 10_000, 1 / classes, frozenset({"vision"})
    )
    options = {"pad": 4, "flip": "random", **options}
    return Pixels(spec, functools.partial(cifar, source), functools.partial(net, classes), source=source, **options)


def _airbench(name: str, target: float, net: Callable[[], nn.Module], **options: Any) -> Pixels:
    recipe = dict(pad=2, border="reflect", flip="alternating", smoothing=0.2, views=True)
    return _pixels("CIFAR10", name, lambda classes: net(), target, **{**recipe, **options})


def _imagenet(name: str, target: float, net: Callable[[], nn.Module], **options: Any) -> ImageNet:
    spec = TaskSpec(f"imagenet-{name}", 1, "accuracy", "max", target, 90, 256, 50_000, 0.001, frozenset({"vision"}))
    return ImageNet(spec, net, **options)


_RESNETS = {f"resnet{depth}": functools.partial(resnet, depth) for depth in (18, 34, 50)}
_GROUPS = functools.partial(resnet, 18, norm=functools.partial(nn.GroupNorm, 32))  # samples are kept apart
_NETS = {"vgg11": vgg11, **_RESNETS, "densenet121": densenet121, "resnet18-groups": _GROUPS}
_BIASES = {"lr": 106 / 0.24, "weight_decay": 1 / 106}
_NORM = ("norm", {"lr": 64.0, "weight_decay": 1 / 64})
CIFAR: tuple[Pixels, ...] = (
    *(_pixels("CIFAR10", name, net, 0.90) for name, net in _NETS.items()),
    *(_pixels("CIFAR100", name, net, 0.65) for name, net in _NETS.items()),
    _airbench("airbench94", 0.93, lambda: airbench((64, 256, 256)), factors=(_NORM,)),
    _airbench(
        "airbench94-muon",
        0.93,
        lambda: airbench((64, 256, 256), spread=True),
        # As multiples of the filters' rate: SGD has 106 for biases and 1340 for the head on the mean loss of a batch.
        factors=(("norm", _BIASES), ("bias", _BIASES), ("head", {"lr": 1340 / 0.24, "weight_decay": 1 / 1340})),
    ),
    _airbench("airbench95", 0.94, lambda: airbench((128, 384, 384)), factors=(_NORM,)),
    _airbench("airbench96", 0.95, lambda: airbench((128, 512, 512), deep=True), factors=(_NORM,), pad=4, cutout=12),
)
FASHION = Pixels(
    TaskSpec("fashion", 1, "accuracy", "max", 0.90, 10, 128, 10_000, 0.1, frozenset({"vision"})),
    fashion, fashion_cnn, source="FashionMNIST",
)  # fmt: skip
# Training crops grow from 160 to 192 pixels between 11 and 13 of 16 epochs, as libffcv/ffcv-imagenet has it.
_GROWING = ((0.0, 160), (0.6875, 160), (0.8125, 192), (1.0, 192))
IMAGENET: tuple[ImageNet, ...] = (
    _imagenet("resnet18", 0.65, functools.partial(imagenet_resnet, 18)),
    _imagenet("resnet50", 0.70, functools.partial(imagenet_resnet, 50)),
    _imagenet(
        "ffcv-resnet50", 0.70, functools.partial(imagenet_resnet, 50, True),
        sizes=_GROWING, size=256, smoothing=0.1, mirrored=True, decayed=False,
    ),
)  # fmt: skip

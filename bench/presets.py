"""Training runs that somebody published, with their recipe and the number they reached."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A recipe. Batch, epochs and schedule take the place of the task's and the protocol's."""

    task: str
    method: str
    hp: dict[str, Any]
    schedule: str  # as bench/schedule.py reads it
    epochs: float
    batch: int
    published: float | None  # the task's metric on its test split; None: no number was published
    source: str
    seeds: int = 1  # of the published number
    amp: str = "off"  # or "bf16"
    note: str = ""


AIRBENCH = "https://github.com/KellerJordan/cifar10-airbench"
FFCV = "https://github.com/libffcv/ffcv-imagenet"
ADABELIEF = "https://github.com/juntang-zhuang/Adabelief-Optimizer"
DICESGD = "https://arxiv.org/abs/2311.14632"
DIFFGRAD = "https://arxiv.org/abs/1909.11015"

_HALF = "bfloat16 in place of float16; the bias of the whitening layer learns to the end"
_AVERAGED = f"without the averaging of weights (Lookahead) of the source; {_HALF}"
_FLATTENED = 1 + 1 / (1 - 0.85)  # what Nesterov momentum multiplies a steady gradient by


def _airbench(name: str, lr: float, decay: float, epochs: float, schedule: str, published: float, n: int) -> Preset:
    """The source gives ``lr`` and ``decay`` for 1024 examples and before momentum multiplies them."""
    hp = dict(lr=lr / _FLATTENED, momentum=0.85, nesterov=True, weight_decay=decay / lr)
    return Preset(f"cifar10-{name}", "sgd", hp, schedule, epochs, 1024, published, AIRBENCH, n, "bf16", _AVERAGED)


# The settings of the paper's code for CIFAR; those of SGD and AdamW are its baselines.
_ADABELIEF = dict(lr=1e-3, eps=1e-8, weight_decay=5e-4, decoupled_weight_decay=False, rectify=False)
_PAPER = {
    "adabelief": _ADABELIEF,
    "sgd": dict(lr=0.1, momentum=0.9, weight_decay=5e-4),
    "adamw": dict(lr=1e-3, weight_decay=1e-2),
}
_REACHED = {  # by net, the mean of the last 5 epochs of one run
    "vgg11": dict(adabelief=0.9125, sgd=0.8934, adamw=0.8911),
    "resnet34": dict(adabelief=0.9524, sgd=0.9304, adamw=0.9436),
    "densenet121": dict(adabelief=0.9529, sgd=0.9279, adamw=0.9425),
}
_HUNDRED = {"vgg11": 0.674, "resnet34": 0.773, "densenet121": 0.783}  # read off a figure


# The noise for epsilon 2 at delta 1e-5: `python -m bench.privacy` has it for 150 steps at a rate of 0.02.
_PRIVATE = {"dpsgd": 0.927, "dicesgd": 1.255}


def _private(classes: int, method: str) -> Preset:
    """The paper's batch, steps and epsilon."""
    hp = dict(lr=1.0, max_grad_norm=1.0, noise_multiplier=_PRIVATE[method])
    note = (
        "the source fine-tunes a ViT-S, whose weights are not here, and calibrates the noise in another way; batches "
        "of one size, drawn without secrets, train alike and keep no promise"
    )
    return Preset(f"cifar{classes}-resnet18-groups", method, hp, "constant", 3, 1000, None, DICESGD, note=note)


def _adabelief(classes: int, net: str, method: str, published: float, note: str) -> Preset:
    hp = _PAPER[method]
    return Preset(f"cifar{classes}-{net}", method, hp, "step 0.75", 200, 128, published, ADABELIEF, note=note)


PRESETS: dict[str, Preset] = {
    "cifar10/airbench94-muon": Preset(
        "cifar10-airbench94-muon", "bench.airbench:Muon",
        dict(lr=0.24, momentum=0.6, sgd_momentum=0.85, weight_decay=0.004),
        "linear 0:1 1:0", 8, 2000, 0.9401, AIRBENCH, 200, "bf16", _HALF,
    ),
    "cifar10/airbench94": _airbench("airbench94", 11.5, 0.0153, 9.9, "linear 0:0.2 0.23:1 1:0.07", 0.9401, 1000),
    "cifar10/airbench95": _airbench("airbench95", 10.0, 0.0153, 15, "linear 0:0.2 0.23:1 1:0.07", 0.9501, 200),
    "cifar10/airbench96": _airbench("airbench96", 9.0, 0.012, 31, "linear 0:0.2 0.1:1 1:0", 0.9601, 400),
    "cifar10/resnet18": Preset(
        "cifar10-resnet18", "sgd", dict(lr=0.1, momentum=0.9, weight_decay=5e-4), "cosine", 200, 128,
        0.960, AIRBENCH, note="the usual recipe; the source names the number and not all of the settings",
    ),
    **{
        f"cifar10/{method}-paper-{net}": _adabelief(10, net, method, reached[method], "mean of the last 5 epochs")
        for net, reached in _REACHED.items()
        for method in reached
    },
    **{
        f"cifar100/adabelief-paper-{net}": _adabelief(100, net, "adabelief", reached, "read off a figure")
        for net, reached in _HUNDRED.items()
    },
    **{
        f"cifar{classes}/diffgrad-paper-{batch}": Preset(
            f"cifar{classes}-resnet50", "diffgrad", dict(lr=1e-3), "step 0.8", 100, batch, reached, DIFFGRAD,
            note="the authors' code had a bug that made it Adam at half of the learning rate",
        )
        for classes, row in ((10, (0.9390, 0.9405, 0.9408)), (100, (0.7540, 0.7527, 0.7505)))
        for batch, reached in zip((32, 64, 128), row, strict=True)
    },
    **{f"cifar{n}/{method}-paper": _private(n, method) for n in (10, 100) for method in _PRIVATE},
    "imagenet/adabelief-paper": Preset(
        "imagenet-resnet18", "adabelief", dict(lr=1e-3, eps=1e-8, weight_decay=1e-2, rectify=False),
        f"step {70 / 90:.4f} {80 / 90:.4f}", 90, 256, 0.7008, ADABELIEF,
        note="AdamW with the same weight decay reaches 69.73 (issues 6 and 11 of the source)",
    ),
    **{
        f"imagenet/ffcv-rn50-{epochs}": Preset(
            "imagenet-ffcv-resnet50", "sgd", dict(lr=1.7, momentum=0.9, weight_decay=1e-4),
            f"linear 0:0.0001 {2 / epochs:g}:1 1:0", epochs, 4096, reached, FFCV, 1, "bf16",
            "JPEGs are decoded as they are, where the source reads ones that were made smaller",
        )
        for epochs, reached in {16: 0.738, 24: 0.756, 32: 0.766, 40: 0.772, 56: 0.780, 88: 0.784}.items()
    },
    "imagenet/torchvision-v1": Preset(
        "imagenet-resnet50", "sgd", dict(lr=0.1, momentum=0.9, weight_decay=1e-4), "step 0.3333 0.6667", 90, 256,
        0.761, "https://github.com/pytorch/vision", note="from memory, unverified",
    ),
}  # fmt: skip

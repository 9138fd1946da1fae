"""What the airbench recipes need (Jordan, 2024, https://arxiv.org/abs/2404.00498): their network, and Muon with SGD."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Whitening(nn.Module):
    """A fixed convolution that takes 2 x 2 patches to their principal components at unit variance, and the negatives.

    It learns the components from the first batch that it is trained on; of its bias it learns as others do.
    """

    def __init__(self, floor: float = 5e-4) -> None:
        super().__init__()
        self.floor = floor
        self.register_buffer("filters", torch.empty(24, 3, 2, 2).normal_(std=12**-0.5))
        self.register_buffer("learnt", torch.tensor(False))
        self.bias = nn.Parameter(torch.empty(24).uniform_(-(12**-0.5), 12**-0.5))

    @torch.no_grad()
    def learn(self, images: Tensor) -> None:
        """Sets the filters by the covariance of all patches."""
        patches = F.unfold(images.float(), 2).transpose(1, 2).reshape(-1, 12)
        variances, axes = torch.linalg.eigh(patches.T @ patches / len(patches))
        components = (axes / (variances + self.floor).sqrt()).T.view(12, 3, 2, 2)
        self.filters.copy_(torch.cat([components, -components]))
        self.learnt.fill_(True)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) to (n, 24, h - 1, w - 1)."""
        if self.training and not self.learnt:
            self.learn(images)
        return F.conv2d(images, self.filters.to(images.dtype), self.bias.to(images.dtype))


class Norm(nn.BatchNorm2d):
    """Batch normalisation that learns a shift and no scale.

    Args:
        channels: of the input.
        keep: of the running statistics at each step.
    """

    def __init__(self, channels: int, keep: float) -> None:
        super().__init__(channels, eps=1e-12, momentum=1 - keep)
        self.weight.requires_grad_(False)


def convolution(inputs: int, outputs: int) -> nn.Conv2d:
    """3 x 3 filters, of which the first hand their input on."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.data[:inputs])
    return conv


class Group(nn.Module):
    """Convolution, pooling and one convolution more; if deep two more, with a connection around them."""

    def __init__(self, inputs: int, outputs: int, keep: float, deep: bool) -> None:
        super().__init__()
        self.conv1, self.norm1 = convolution(inputs, outputs), Norm(outputs, keep)
        self.conv2, self.norm2 = convolution(outputs, outputs), Norm(outputs, keep)
        self.deep = deep
        if deep:
            self.conv3, self.norm3 = convolution(outputs, outputs), Norm(outputs, keep)

    def forward(self, x: Tensor) -> Tensor:
        """Halves height and width."""
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        y = F.gelu(self.norm2(self.conv2(x)))
        return F.gelu(self.norm3(self.conv3(y)) + x) if self.deep else y


class Head(nn.Linear):
    """A linear layer without bias at a fixed scale."""

    def __init__(self, inputs: int, classes: int, scale: float) -> None:
        super().__init__(inputs, classes, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs) to (n, classes)."""
        return self.scale * super().forward(x)


def airbench(widths: tuple[int, int, int], deep: bool = False, spread: bool = False) -> nn.Module:
    """The network for 32 x 32 pictures.

    Args:
        widths: channels of the three groups.
        deep: three convolutions a group, in place of two, and ordinary running statistics.
        spread: the head starts with unit deviation, and is scaled by its width: for Muon.
    """
    from bench.vision import CIFAR_SCALE, Scale

    keep = 0.9 if deep else 0.6
    sizes = (24, *widths)
    groups = [Group(inputs, outputs, keep, deep) for inputs, outputs in zip(sizes, widths, strict=False)]
    head = Head(widths[-1], 10, 1 / widths[-1] if spread else 1 / 9)
    if spread:
        with torch.no_grad():
            head.weight /= head.weight.std()
    body = nn.Sequential(Whitening(), nn.GELU(), *groups, nn.MaxPool2d(3), nn.Flatten())
    return nn.Sequential(OrderedDict(scale=Scale(*CIFAR_SCALE), body=body, head=head))


def orthogonal(matrix: Tensor, steps: int = 3) -> Tensor:
    """About U V' of a matrix U S V': the quintic Newton-Schulz iteration, with singular values between 0.5 and 1.5."""
    x = matrix.bfloat16() / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon on filters of fixed norm, as airbench94 has it, and SGD with Nesterov momentum on all else.

    Args:
        params: parameters, or groups of them.
        lr: of both; groups have their own.
        momentum: of the filters.
        sgd_momentum: of all else.
        weight_decay: of all else, added to the gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.24,
        momentum: float = 0.6,
        sgd_momentum: float = 0.85,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, sgd_momentum=sgd_momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                filters = param.dim() == 4
                grad = param.grad if filters else param.grad.add(param, alpha=group["weight_decay"])
                momentum = group["momentum" if filters else "sgd_momentum"]
                state = self.state[param]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(param)
                buffer = state["momentum_buffer"].mul_(momentum).add_(grad)
                update = grad.add(buffer, alpha=momentum)
                if filters:
                    param.mul_(len(param) ** 0.5 / param.norm())
                    update = orthogonal(update.reshape(len(update), -1)).view_as(update)
                param.add_(update, alpha=-group["lr"])

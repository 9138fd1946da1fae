"""Optimizers that misbehave, each in its own way."""

import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import SGD

from bench.methods import OptSpec


class Raises(SGD):
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        raise ArithmeticError("no step today")


class Dies(SGD):
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        os._exit(7)


class Explodes(SGD):
    """Multiplies every parameter by the learning rate."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.mul_(1 + 10 * group["lr"])


class Hungry(SGD):
    """Asks for more memory than any machine has."""

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        torch.empty(2**60)


class Sleeps(SGD):
    """Takes its time."""

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        time.sleep(30)


class Warns(SGD):
    """Has something to say at every step."""

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        warnings.warn("mind the step", stacklevel=1)
        print("and more")
        super().step()


class Forgets(SGD):
    """Sets every parameter to zero: a collapse to chance with a finite loss."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.zero_()


class Draws(SGD):
    """SGD with noise from the global generator."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        super().step()
        for group in self.param_groups:
            for param in group["params"]:
                param.add_(torch.randn_like(param), alpha=1e-4)


class Interrupted(Exception):
    pass


FUSE = {"steps": None}  # how many more steps until the lights go out


class Fused(SGD):
    """SGD that is cut off in the middle of a step once the fuse has burnt down."""

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        if FUSE["steps"] is not None:
            if FUSE["steps"] == 0:
                raise Interrupted
            FUSE["steps"] -= 1
        super().step()


HUNGRY = OptSpec("hungry", SGD, {}, {"lr": 0.1}, frozenset({"hvp"}))

"""Optimizers from recent papers as drop-in ``torch.optim`` classes."""

from optimzoo.adabelief import AdaBelief
from optimzoo.cbo import CBO
from optimzoo.diffgrad import DiffGrad

__all__ = ["CBO", "AdaBelief", "DiffGrad"]
__version__ = "0.1.0"

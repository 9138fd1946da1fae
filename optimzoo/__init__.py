"""Optimizers from recent papers as drop-in ``torch.optim`` classes."""

from optimzoo.adabelief import AdaBelief
from optimzoo.diffgrad import DiffGrad
from optimzoo.diffusion import GeometricBrownian

__all__ = ["AdaBelief", "DiffGrad", "GeometricBrownian"]
__version__ = "0.1.0"

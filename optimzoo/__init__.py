"""Optimizers from recent papers as drop-in ``torch.optim`` classes."""

from optimzoo.adabelief import AdaBelief
from optimzoo.adagrad import AdaGradNorm
from optimzoo.batch_sampler import AdaptiveBatchSampler
from optimzoo.batch_size import AdaptiveBatchSize, SamplesLR
from optimzoo.cbo import CBO
from optimzoo.dale import DaleAdamW, DaleLangevin, DaleSGD, dale_columns_, dale_groups, lognormal_
from optimzoo.dicesgd import DPSGD, DiceSGD
from optimzoo.diffgrad import DiffGrad
from optimzoo.diffusion import GeometricBrownian
from optimzoo.lanczos import LanczosLR
from optimzoo.per_sample import PerSampleGradients
from optimzoo.poisson import PoissonSampler, poisson_collate
from optimzoo.sso import SSO, TargetSurrogate
from optimzoo.stability import max_learning_rate
from optimzoo.tpsgd import TPSGD

__all__ = [
    "CBO",
    "DPSGD",
    "SSO",
    "TPSGD",
    "AdaBelief",
    "AdaGradNorm",
    "AdaptiveBatchSampler",
    "AdaptiveBatchSize",
    "DaleAdamW",
    "DaleLangevin",
    "DaleSGD",
    "DiceSGD",
    "DiffGrad",
    "GeometricBrownian",
    "LanczosLR",
    "PerSampleGradients",
    "PoissonSampler",
    "SamplesLR",
    "TargetSurrogate",
    "dale_columns_",
    "dale_groups",
    "lognormal_",
    "max_learning_rate",
    "poisson_collate",
]
__version__ = "0.1.0"

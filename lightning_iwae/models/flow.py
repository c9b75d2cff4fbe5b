"""A normalising flow as q(z | x). Imports zuko."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from zuko.distributions import NormalizingFlow
from zuko.flows import NICE

from .base import full_precision
from .normal import DiagonalNormal


class Flow(nn.Module):
    """N(m, diag s^2) bent by affine couplings that see z and x: width 3 Z, for m, log s and the couplings' context.

    Couplings (Dinh et al., arXiv 1605.08803; zuko's NICE) cost the same in both directions, so that samples and the
    exact density of any z take one pass each. They start as the identity: q is at first the diagonal one. It knows no
    mean and no standard deviation.

    Raises:
        ValueError: for a single latent dimension, which leaves a coupling nothing to couple.
    """

    def __init__(self, latent: int, couplings: int = 4, hidden: int = 64) -> None:
        super().__init__()
        if latent < 2:
            raise ValueError(f"network.latent must be at least 2 for a flow, which couples dimensions. Got {latent}.")
        self.width = 3 * latent
        self.couplings = NICE(latent, latent, transforms=couplings, hidden_features=(hidden,)).transform
        for coupling in self.couplings.transforms:
            for parameter in coupling.hyper[-1].parameters():
                nn.init.zeros_(parameter)

    def forward(self, output: Tensor) -> Distribution:
        """Batch shape (B,), event shape (Z,)."""
        mean, log_scale, context = full_precision(output).chunk(3, -1)
        base = DiagonalNormal(mean, log_scale.exp())
        return CouplingFlow(self.couplings(context), base)


class CouplingFlow(NormalizingFlow):
    """zuko's flow, in full precision under autocast too."""

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(z | x) of z (..., B, Z), shape (..., B). Nats."""
        with torch.autocast(value.device.type, enabled=False):
            return super().log_prob(value)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """z of shape (*sample_shape, B, Z)."""
        with torch.autocast(self.base.base_dist.loc.device.type, enabled=False):
            return super().rsample(torch.Size(sample_shape))

"""A normal distribution per latent number or pixel, with a log-density in few operations."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, Normal


class DiagonalNormal(Independent):
    """N(loc, diag scale^2) from loc and scale (..., Z), all Z one event."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__(Normal(loc, scale, validate_args=False), 1, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """-|e|^2 / 2 - sum log scale - Z / 2 log 2 pi with e = (value - loc) / scale, shape (...,). Nats."""
        loc, scale = self.base_dist.loc, self.base_dist.scale
        e = (value - loc) * (1 / scale)
        return e.square().sum(-1) * -0.5 - (scale.log().sum(-1) + 0.5 * math.log(2 * math.pi) * loc.shape[-1])

    def expand(self, batch_shape: Any, _instance: Any = None) -> "DiagonalNormal":
        """The same for a larger batch."""
        shape = torch.Size(batch_shape) + self.event_shape
        return DiagonalNormal(self.base_dist.loc.expand(shape), self.base_dist.scale.expand(shape))

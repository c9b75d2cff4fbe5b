"""q(z | x) from what an encoder puts out, by name in a network's `posterior`."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, MultivariateNormal

from .base import full_precision
from .normal import DiagonalNormal

Name = Literal["diagonal", "full", "flow"]


def make(name: Name, latent: int) -> Any:
    """The module that makes the distribution of that name from an encoder's output (B, .width)."""
    if name not in get_args(Name):
        raise ValueError(f"network.posterior must be one of {', '.join(get_args(Name))}. Got {name}.")
    if name == "flow":
        from .flow import Flow  # zuko takes a second

        return Flow(latent)
    return Diagonal(latent) if name == "diagonal" else FullCovariance(latent)


class Diagonal(nn.Module):
    """N(m, diag s^2), log s linear in the encoder's last layer."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.width = 2 * latent

    def forward(self, output: Tensor) -> Distribution:
        """Of outputs (B, 2 Z)."""
        mean, log_scale = full_precision(output).chunk(2, -1)
        return DiagonalNormal(mean, log_scale.exp())


class FullCovariance(nn.Module):
    """N(m, L L'), L lower triangular with a positive diagonal, linear but for its diagonal's logarithm."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.latent, self.width = latent, 2 * latent + latent * (latent - 1) // 2

    def forward(self, output: Tensor) -> Distribution:
        """Of outputs (B, Z (Z + 3) / 2): mean, log diagonal, the rest row by row."""
        Z = self.latent
        mean, log_diagonal, rest = full_precision(output).split([Z, Z, self.width - 2 * Z], -1)
        L = torch.diag_embed(log_diagonal.exp())
        row, column = torch.tril_indices(Z, Z, -1, device=rest.device)
        L[..., row, column] = rest
        return MultivariateNormal(mean, scale_tril=L, validate_args=False)

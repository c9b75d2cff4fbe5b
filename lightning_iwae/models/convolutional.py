"""A small convolutional network for square images."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from . import likelihoods, posteriors, priors
from .layers import Layers, check_widths
from .one_layer import OneLayer


class Convolutional(OneLayer):
    """Two strided convolutions and a linear layer each way, ReLU between; no normalisation over the batch.

    Args:
        pixels: X, the length of a datum: a square image row by row, its side a multiple of 4.
        latent: Z, the length of z.
        channels: of the outer and of the inner convolution.
        likelihood: p(x | z), see `likelihoods`.
        posterior: q(z | x), see `posteriors`.
        prior: p(z), see `priors`; vamp needs a diagonal or full posterior.
        components: of a mixture or vamp prior.
    """

    def __init__(
        self,
        pixels: int = 784,
        latent: int = 50,
        channels: Sequence[int] = (32, 64),
        likelihood: likelihoods.Name = "bernoulli",
        posterior: posteriors.Name = "diagonal",
        prior: priors.Name = "standard",
        components: int = 10,
    ) -> None:
        super().__init__()
        check_widths(pixels=pixels, latent=latent, channels=channels)
        side = math.isqrt(pixels)
        if side**2 != pixels or side % 4:
            raise ValueError(f"network.pixels must be the square of a multiple of 4. Got {pixels}.")
        if len(channels) != 2:
            raise ValueError(f"network.channels must be 2 numbers. Got {', '.join(map(str, channels))}.")
        outer, inner = channels
        head, quarter = posteriors.make(posterior, latent), side // 4
        self.inference = Layers(
            nn.Unflatten(-1, (1, side, side)),
            nn.Conv2d(1, outer, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(outer, inner, 4, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(inner * quarter**2, head.width),
        )
        self.generative = Layers(
            nn.Linear(latent, inner * quarter**2),
            nn.ReLU(),
            nn.Unflatten(-1, (inner, quarter, quarter)),
            nn.ConvTranspose2d(inner, outer, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(outer, 1, 4, 2, 1, bias=False),
            nn.Flatten(),
            Bias(pixels),
        )
        of_z = priors.make(prior, latent, pixels, components, posterior)
        self.put_together(head, likelihoods.make(likelihood, pixels), of_z)

    def likelihood(self, z: Tensor) -> Distribution:
        """p(x | z), for z (S, B, Z); convolutions take the samples as rows."""
        output = self.generative(z.reshape(-1, z.shape[-1]))
        return self.parts[1](output.view(*z.shape[:-1], -1))

    def output_bias(self) -> Tensor:
        """The decoder's last bias, (X,)."""
        return self.generative.get_parameter("7.bias")


class Bias(nn.Module):
    """A number added to each pixel."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(pixels))

    def forward(self, h: Tensor) -> Tensor:
        """h + bias."""
        return h + self.bias

"""A small convolutional network for square images."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from . import likelihoods, posteriors, priors
from .layers import Layers, attach, check_widths, set_output


class Convolutional(nn.Module):
    """Two strided convolutions and a linear layer each way, ReLU between; no normalisation over the batch.

    Args:
        side: of the images, a multiple of 4; x is (B, side^2), row by row.
        latent: Z, the length of z.
        channels: of the outer and of the inner convolution.
        likelihood: p(x | z), see `likelihoods`.
        posterior: q(z | x), see `posteriors`.
        prior: p(z), see `priors`; vamp needs a diagonal or full posterior.
        components: of a mixture or vamp prior.
    """

    def __init__(
        self,
        side: int = 28,
        latent: int = 50,
        channels: Sequence[int] = (32, 64),
        likelihood: likelihoods.Name = "bernoulli",
        posterior: posteriors.Name = "diagonal",
        prior: priors.Name = "standard",
        components: int = 10,
    ) -> None:
        super().__init__()
        check_widths(side=side, latent=latent, channels=channels)
        if side % 4 or len(channels) != 2:
            raise ValueError(f"network.side must be a multiple of 4, with 2 channels. Got {side} and {channels}.")
        if prior == "vamp" and posterior == "flow":
            raise ValueError("network.prior must not be vamp with network.posterior flow, of which it can mix none.")
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
            Bias(side**2),
        )
        attach(self, self.inference, "posterior", head)
        attach(self, self.generative, "likelihood", output := likelihoods.make(likelihood, side**2))
        attach(self, self.generative, "prior", prior_of_z := priors.make(prior, latent, side**2, components))
        self.parts = head, output, prior_of_z  # not registered a second time, in a tuple

    def prior(self) -> Distribution:
        """p(z)."""
        return self.parts[2]((self.inference, self.parts[0]))

    def posterior(self, x: Tensor) -> Distribution:
        """q(z | x)."""
        return self.parts[0](self.inference(x))

    def likelihood(self, z: Tensor) -> Distribution:
        """p(x | z), for z (S, B, Z); convolutions take the samples as rows."""
        output = self.generative(z.reshape(-1, z.shape[-1]))
        return self.parts[1](output.view(*z.shape[:-1], -1))

    def set_data_mean(self, mean: Tensor) -> None:
        """Set the output bias such that p(x | z) starts at the training data's mean (X,)."""
        set_output(self.generative.get_parameter("7.bias"), mean, self.parts[1])


class Bias(nn.Module):
    """A number added to each pixel."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(pixels))

    def forward(self, h: Tensor) -> Tensor:
        """h + bias."""
        return h + self.bias

"""A network with a layer of binary latent variables: no path through z, so score-type estimators only."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent

from . import likelihoods
from .base import full_precision
from .layers import attach, check_widths, set_output, tanh_layers


class Discrete(nn.Module):
    """z in {0, 1}^Z: q(z | x) Bernoullis, p(z) Bernoullis of learnt odds, p(x | z) from tanh layers on 2 z - 1.

    The sigmoid belief network of VIMCO's paper (Mnih & Rezende, arXiv 1602.06725) with one stochastic layer. Train phi
    by vimco, rloo, ovis, wake, tvo, score or sleep.

    Args:
        pixels: X, the length of a datum.
        latent: Z, the number of binary variables.
        hidden: widths of the encoder's tanh layers; the decoder's are the same in reverse.
        likelihood: p(x | z), see `likelihoods`.
    """

    def __init__(
        self,
        pixels: int = 784,
        latent: int = 200,
        hidden: Sequence[int] = (200,),
        likelihood: likelihoods.Name = "bernoulli",
    ) -> None:
        super().__init__()
        check_widths(pixels=pixels, latent=latent, hidden=hidden)
        self.inference = tanh_layers([pixels, *hidden, latent])
        self.generative = tanh_layers([latent, *reversed(hidden), pixels])
        self.parts = (likelihoods.make(likelihood, pixels),)  # not registered a second time, in a tuple
        attach(self, self.generative, "likelihood", self.parts[0])
        self.generative.register_parameter("prior_logits", nn.Parameter(torch.zeros(latent)))

    def prior(self) -> Distribution:
        """Independent Bernoullis."""
        logits = self.generative.get_parameter("prior_logits")
        return Independent(Bernoulli(logits=full_precision(logits), validate_args=False), 1)

    def posterior(self, x: Tensor) -> Distribution:
        """Independent Bernoullis, batch shape (B,); has no rsample."""
        return Independent(Bernoulli(logits=full_precision(self.inference(x)), validate_args=False), 1)

    def likelihood(self, z: Tensor) -> Distribution:
        """p(x | z)."""
        return self.parts[0](self.generative(2 * z - 1))

    def set_data_mean(self, mean: Tensor) -> None:
        """Set the output bias such that p(x | z) starts at the training data's mean (X,)."""
        set_output(self.generative.last.bias, mean, self.parts[0])

"""The one-layer network of Burda et al. (arXiv 1509.00519) and Rainforth et al. (arXiv 1802.04537, section 6)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributions import Bernoulli, Distribution, Independent, Normal

from .base import full_precision


class MLP(nn.Module):
    """Gaussian q(z | x) and Bernoulli p(x | z), both out of tanh layers, under a standard normal prior.

    With pixels=784, latent=50, hidden=[200, 200] it is the papers' network, of 425,284 parameters. Weights are
    Glorot-uniform and biases 0, but for the output's: see `set_data_mean`.

    Args:
        pixels: X, the length of a datum.
        latent: Z, the length of z.
        hidden: widths of the encoder's tanh layers; the decoder's are the same in reverse.
    """

    origin: Tensor  # prior mean, (Z,)

    def __init__(self, pixels: int = 784, latent: int = 50, hidden: Sequence[int] = (200, 200)) -> None:
        super().__init__()
        for name, width in (("pixels", pixels), ("latent", latent), *(("hidden", width) for width in hidden)):
            if width < 1:
                raise ValueError(f"network.{name} must be at least 1. Got {width}.")
        self.pixels = pixels
        self.inference = tanh_layers([pixels, *hidden, 2 * latent])
        self.generative = tanh_layers([latent, *reversed(hidden), pixels])
        self.register_buffer("origin", torch.zeros(latent), persistent=False)

    def prior(self) -> Distribution:
        """N(0, I)."""
        return Independent(Normal(self.origin, torch.ones_like(self.origin), validate_args=False), 1)

    def posterior(self, x: Tensor) -> Distribution:
        """N(m(x), diag s(x)^2), log s linear in the last hidden layer."""
        mean, log_scale = full_precision(self.inference(x)).chunk(2, -1)
        return Independent(Normal(mean, log_scale.exp(), validate_args=False), 1)

    def likelihood(self, z: Tensor) -> Distribution:
        """A Bernoulli per pixel."""
        return BernoulliPixels(full_precision(self.generative(z)))

    @torch.no_grad()
    def set_data_mean(self, mean: Tensor) -> None:
        """Set the output bias to the log-odds of the training pixels' mean (X,), clipped to [0.001, 0.999]."""
        if mean.shape != (self.pixels,):
            raise ValueError(f"network.pixels is {self.pixels}, but data have shape {tuple(mean.shape)}.")
        self.generative[-1].get_parameter("bias").copy_(torch.logit(mean.clamp(0.001, 0.999)))


def tanh_layers(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of these widths with tanh between them, Glorot-uniform weights and zero biases."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        linear = nn.Linear(width_in, width_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class BernoulliPixels(Independent):
    """A Bernoulli per pixel from logits (..., X), with a faster log_prob than torch's, for x anywhere in [0, 1]."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(Bernoulli(logits=logits, validate_args=False), 1, validate_args=False)
        self.logits = logits

    def log_prob(self, value: Tensor) -> Tensor:
        """sum x * logit + log(1 - p) over pixels, shape (...,). Nats."""
        shape = torch.broadcast_shapes(self.logits.shape, value.shape)
        return _BernoulliLogProb.apply(self.logits.expand(shape), value)


class _BernoulliLogProb(torch.autograd.Function):
    """sum x * l - log(1 + exp l) over the last axis, whose gradient x - sigmoid(l) takes one array less each way."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(logits, x)
        softplus = F.softplus(logits, threshold=40.0)  # above it softplus(l) = l to the last bit
        return softplus.neg_().addcmul_(logits, x).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, seed: Tensor) -> tuple[Tensor, Tensor | None]:
        logits, x = ctx.saved_tensors
        seed = seed.unsqueeze(-1)
        p = torch.sigmoid(logits)
        x_gradient = (seed * logits).sum_to_size(x.shape) if ctx.needs_input_grad[1] else None
        return torch.sub(x, p, out=p).mul_(seed), x_gradient

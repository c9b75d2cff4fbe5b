"""p(z), fixed or learnt, by name in a network's `prior`."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, MixtureSameFamily
from torch.func import functional_call

from .normal import DiagonalNormal, standard_normal

Name = Literal["standard", "normal", "mixture", "vamp"]


def make(name: Name, latent: int, pixels: int, components: int, posterior: str) -> nn.Module:
    """The module that makes the prior of that name, beside a posterior of that kind."""
    if name not in get_args(Name):
        raise ValueError(f"network.prior must be one of {', '.join(get_args(Name))}. Got {name}.")
    if name == "vamp" and posterior == "flow":
        raise ValueError("network.prior must not be vamp with network.posterior flow, of which it can mix none.")
    if components < 1:
        raise ValueError(f"network.components must be at least 1. Got {components}.")
    if name in ("standard", "normal"):
        return Standard(latent) if name == "standard" else LearntNormal(latent)
    return Mixture(latent, components) if name == "mixture" else Vamp(pixels, components)


class Standard(nn.Module):
    """N(0, I), where the encoder is, and of its type."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.latent = latent

    def forward(self, encoder: tuple[nn.Module, Any] | None = None) -> Distribution:
        """The prior."""
        like = None if encoder is None else next(encoder[0].parameters(), None)
        return standard_normal(self.latent, torch.empty(0) if like is None else like)


class LearntNormal(nn.Module):
    """N(m, diag s^2), both learnt: the simplest prior for GDReG (Bauer & Mnih, arXiv 2101.11046). Starts at N(0, I)."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(latent))
        self.log_scale = nn.Parameter(torch.zeros(latent))

    def forward(self, encoder: Any = None) -> Distribution:
        """The prior."""
        return DiagonalNormal(self.mean, self.log_scale.exp())


class Mixture(nn.Module):
    """A mixture of diagonal normals, weights, means and scales learnt."""

    def __init__(self, latent: int, components: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(torch.randn(components, latent))
        self.log_scales = nn.Parameter(torch.zeros(components, latent))

    def forward(self, encoder: Any = None) -> Distribution:
        """The prior."""
        parts = DiagonalNormal(self.means, self.log_scales.exp())
        return MixtureSameFamily(Categorical(logits=self.logits), parts, validate_args=False)


class Vamp(nn.Module):
    """The mixture of q(z | u_k) at learnt pseudo-inputs u_k in [0, 1] (Tomczak & Welling, arXiv 1705.07120).

    theta learns the u_k. The encoder that stands in the prior is held: its own gradient through the prior would belong
    to neither side. So phi is not trained to move the prior, as it is in the paper.
    """

    def __init__(self, pixels: int, components: int) -> None:
        super().__init__()
        self.pseudo_inputs = nn.Parameter(torch.randn(components, pixels))  # log-odds

    def forward(self, encoder: tuple[nn.Module, Callable[[Tensor], Distribution]]) -> Distribution:
        """The prior, by the layers of an encoder and what makes q of their output."""
        layers, head = encoder
        held = {name: p.detach() for name, p in layers.named_parameters()}
        output = functional_call(layers, held, (torch.sigmoid(self.pseudo_inputs),))
        even = Categorical(logits=torch.zeros(len(output), device=output.device), validate_args=False)
        return MixtureSameFamily(even, head(output), validate_args=False)

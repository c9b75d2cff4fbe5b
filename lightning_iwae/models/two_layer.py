"""The two-layer network of Burda et al. (arXiv 1509.00519): q(z1 | x) q(z2 | z1), p(z2) p(z1 | z2) p(x | z1)."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent

from . import likelihoods
from .base import full_precision
from .layers import check_widths, set_output, tanh_layers
from .normal import DiagonalNormal, standard_normal

Conditional = Callable[[Tensor], Distribution]


class TwoLayer(nn.Module):
    """Two stochastic layers, z = (z1, z2) side by side, (S, B, Z1 + Z2); the prior of z1 is learnt.

    With pixels=784, latents=[100, 50], hidden=[[200, 200], [100, 100]] it is the paper's: tanh layers of 200 between x
    and z1, of 100 between z1 and z2, all conditionals diagonal normals, p(z2) = N(0, I).

    Args:
        pixels: X, the length of a datum.
        latents: Z1 and Z2.
        hidden: widths of the tanh layers between x and z1, and between z1 and z2; the decoder's in reverse.
        likelihood: p(x | z1), see `likelihoods`.
    """

    def __init__(
        self,
        pixels: int = 784,
        latents: Sequence[int] = (100, 50),
        hidden: Sequence[Sequence[int]] = ((200, 200), (100, 100)),
        likelihood: likelihoods.Name = "bernoulli",
    ) -> None:
        super().__init__()
        if len(latents) != 2 or len(hidden) != 2:
            raise ValueError(f"network.latents and network.hidden must have 2 parts. Got {latents} and {hidden}.")
        check_widths(pixels=pixels, latents=latents, hidden=[width for widths in hidden for width in widths])
        (Z1, Z2), (outer, inner) = latents, hidden
        self.latents = tuple(latents)
        self.inference = nn.ModuleDict(
            {"first": tanh_layers([pixels, *outer, 2 * Z1]), "second": tanh_layers([Z1, *inner, 2 * Z2])}
        )
        self.generative = nn.ModuleDict(
            {
                "second": tanh_layers([Z2, *reversed(inner), 2 * Z1]),
                "first": tanh_layers([Z1, *reversed(outer), pixels]),
                "likelihood": likelihoods.make(likelihood, pixels),
            }
        )

    def prior(self) -> Distribution:
        """p(z2) p(z1 | z2)."""
        top = standard_normal(self.latents[1], next(self.inference.parameters()))
        return Downwards(top, lambda z2: _normal(self.generative["second"], z2), self.latents[0])

    def posterior(self, x: Tensor) -> Distribution:
        """q(z1 | x) q(z2 | z1)."""
        first = _normal(self.inference["first"], x)
        return Upwards(first, lambda z1: _normal(self.inference["second"], z1), self.latents[1])

    def likelihood(self, z: Tensor) -> Distribution:
        """p(x | z1)."""
        return self.generative["likelihood"](self.generative["first"](z[..., : self.latents[0]]))

    def set_data_mean(self, mean: Tensor) -> None:
        """Set the output bias such that p(x | z) starts at the training data's mean (X,)."""
        set_output(self.generative["first"].last.bias, mean, self.generative["likelihood"])  # type: ignore[union-attr,arg-type]


def _normal(layers: nn.Module, h: Tensor) -> Independent:
    mean, log_scale = full_precision(layers(h)).chunk(2, -1)
    return DiagonalNormal(mean, log_scale.exp())


class Upwards(Distribution):
    """q(z1) q(z2 | z1) of z = (z1, z2). In its density at z, z1 is live in q(z2 | z1)."""

    arg_constraints: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    has_rsample = True

    def __init__(self, first: Independent, second: Conditional, width: int) -> None:
        self.first, self.second, self.Z1 = first, second, first.event_shape[0]
        super().__init__(first.batch_shape, torch.Size([self.Z1 + width]), validate_args=False)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """(*sample_shape, B, Z1 + Z2)."""
        z1 = self.first.rsample(sample_shape)
        return torch.cat([z1, self.second(z1).rsample()], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(z1) + log q(z2 | z1). Nats."""
        z1, z2 = value[..., : self.Z1], value[..., self.Z1 :]
        return self.first.log_prob(z1) + self.second(z1).log_prob(z2)

    @property
    def mean(self) -> Tensor:
        """z1's mean, and z2's given that z1 is at its mean."""
        return self._at_the_mean("mean")

    @property
    def stddev(self) -> Tensor:
        """z1's standard deviation, and z2's given that z1 is at its mean."""
        return self._at_the_mean("stddev")

    def _at_the_mean(self, name: str) -> Tensor:
        return torch.cat([getattr(self.first, name), getattr(self.second(self.first.mean), name)], -1)


class Downwards(Distribution):
    """p(z2) p(z1 | z2) of z = (z1, z2)."""

    arg_constraints: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    has_rsample = True

    def __init__(self, top: Independent, second: Callable[[Tensor], Independent], Z1: int) -> None:
        self.top, self.second, self.Z1 = top, second, Z1
        super().__init__(torch.Size(), torch.Size([Z1 + top.event_shape[0]]), validate_args=False)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """(*sample_shape, Z1 + Z2)."""
        z2 = self.top.rsample(sample_shape)
        return torch.cat([self.second(z2).rsample(), z2], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(z2) + log p(z1 | z2). Nats."""
        z1, z2 = value[..., : self.Z1], value[..., self.Z1 :]
        return self.top.log_prob(z2) + self.second(z2).log_prob(z1)

    def reparameterise(self, z: Tensor) -> Tensor:
        """z as a function of the parameters of p(z1 | z2), at the noise that gives it: for GDReG (arXiv 2101.11046)."""
        z1, z2 = z[..., : self.Z1].detach(), z[..., self.Z1 :].detach()
        p: Any = self.second(z2).base_dist
        return torch.cat([p.loc + p.scale * ((z1 - p.loc) / p.scale).detach(), z2], -1)

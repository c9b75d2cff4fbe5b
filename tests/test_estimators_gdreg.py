"""GDReG of a hierarchical prior p(z2) p(z1 | z2): its exact expectation, by quadrature through the whole of `routing`.

Two particles of two numbers each lie at the nodes of a Gauss-Hermite rule in four dimensions, a node a datum; each
datum has parameters of its own, whose gradients are then weighed by the rule.
"""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from lightning_iwae import Side, routing

NODES, K = 16, 2


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)


class Layers(Distribution):
    """Of z = (z1, z2) in one dimension each."""

    arg_constraints, has_rsample = {}, True

    def __init__(self, size: int) -> None:
        super().__init__((size,), (2,), validate_args=False)


class Upwards(Layers):
    """q(z1) q(z2 | z1), with nodes e (K, size, 2) for samples. `live`: whether z1 is, in the density q(z2 | z1)."""

    def __init__(self, e: Tensor, live: bool) -> None:
        super().__init__(e.shape[1])
        self.e, self.live, self.first = e, live, Normal(0.4, 0.8)

    def second(self, z1: Tensor) -> Normal:
        return Normal(0.7 * z1 - 0.2, 0.9)

    def rsample(self, shape: tuple[int, ...] = ()) -> Tensor:
        z1 = 0.4 + 0.8 * self.e[..., 0]
        return torch.stack([z1, 0.7 * z1 - 0.2 + 0.9 * self.e[..., 1]], -1)

    def log_prob(self, z: Tensor) -> Tensor:
        z1 = z[..., 0]
        return self.first.log_prob(z1) + self.second(z1 if self.live else z1.detach()).log_prob(z[..., 1])


class Downwards(Layers):
    """p(z2) = N(0, 1), p(z1 | z2) = N(slope z2 + shift, exp(log_scale)^2), with parameters (size, 3)."""

    def __init__(self, parameters: Tensor) -> None:
        super().__init__(len(parameters))
        self.slope, self.shift, self.log_scale = parameters.unbind(-1)

    def second(self, z2: Tensor) -> Normal:
        return Normal(self.slope * z2 + self.shift, self.log_scale.exp())

    def log_prob(self, z: Tensor) -> Tensor:
        return Normal(0.0, 1.0).log_prob(z[..., 1]) + self.second(z[..., 1]).log_prob(z[..., 0])

    def reparameterise(self, z: Tensor) -> Tensor:
        p = self.second(z[..., 1])
        return torch.stack([p.loc + p.scale * ((z[..., 0] - p.loc) / p.scale).detach(), z[..., 1]], -1)


class TwoLayers(nn.Module):
    """x | z1 ~ N(z1, 1), for as many copies of one datum as the rule has nodes."""

    def __init__(self, e: Tensor, live: bool) -> None:
        super().__init__()
        self.q, size = Upwards(e, live), e.shape[1]
        self.inference = nn.Module()
        self.generative = nn.Module()
        self.generative.register_parameter("all", nn.Parameter(torch.tensor([0.5, 0.3, -0.2]).repeat(size, 1)))

    def prior(self) -> Downwards:
        return Downwards(self.generative.get_parameter("all"))

    def posterior(self, x: Tensor) -> Upwards:
        return self.q

    def likelihood(self, z: Tensor) -> Independent:
        return Independent(Normal(z[..., :1], 1.0), 1)


def expectations(live: bool) -> tuple[Tensor, Tensor, Tensor]:
    """E of theta's ascent by iwae and by gdreg, (3,) each, and the largest of each's distance between single draws."""
    e, weight = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(NODES))
    grid = torch.cartesian_prod(*[torch.arange(NODES)] * (2 * K))
    probability = (weight / weight.sum())[grid].prod(1)
    model = TwoLayers(e[grid].reshape(-1, K, 2).transpose(0, 1), live)
    drawn = routing.draw(model, torch.full((len(grid), 1), 1.3), K, "separate")
    (plain,), (generalised,) = routing.theta_gradients(drawn, [Side("iwae", K), Side("gdreg", K)])
    apart = (plain - generalised).abs().amax(0) * len(grid)
    return probability @ plain * len(grid), probability @ generalised * len(grid), apart


def test_gdreg_has_plain_iwae_s_expectation_on_two_layers():
    """To 6 digits, for slope, shift and log scale of p(z1 | z2); no draw's gradients agree."""
    plain, generalised, apart = expectations(live=True)
    torch.testing.assert_close(generalised, plain, rtol=1e-6, atol=1e-8)
    assert (plain.abs() > 0.02).all() and (apart > 0.5).all()


def test_gdreg_has_not_where_z1_is_held_in_log_q_of_z2():
    """d log w / dz1 without d log q(z2 | z1) / dz1: the mistake that a two-layer q invites."""
    plain, generalised, _ = expectations(live=False)
    assert ((generalised - plain).abs() > 0.01 * plain.abs()).all()

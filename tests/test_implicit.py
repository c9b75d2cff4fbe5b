"""Draws from q_EW against its density, by quadrature in one dimension."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from lightning_iwae import bounds
from lightning_iwae.implicit import draw_implicit
from lightning_iwae.models import LinearGaussian

GRID = np.linspace(-9, 9, 1_201)
STEP = GRID[1] - GRID[0]
X = 1.3
N = 20_000


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def integral(values):
    """Over the last axis of a smooth function that is 0 at both ends: to rounding, by the trapezium rule."""
    return values.sum(-1) * STEP


class Toy:
    """z ~ N(0.4, 1), x | z ~ N(z, 1) at x = 1.3, and a q far from the posterior."""

    def __init__(self, variance=0.9):
        self.model = LinearGaussian(1, variance).double()
        with torch.no_grad():
            self.model.mu.fill_(0.4)
            self.model.inference.weight.fill_(0.5)
            self.model.inference.bias.fill_(-0.9)
        self.q = scipy.stats.norm(0.5 * X - 0.9, math.sqrt(variance))
        self.log_px = scipy.stats.norm.logpdf(X, 0.4, math.sqrt(2))
        self.posterior = scipy.stats.norm((X + 0.4) / 2, math.sqrt(0.5))
        self.x = torch.full((1, 1), X, dtype=torch.float64)

    def log_joint(self, z):
        return scipy.stats.norm.logpdf(z, 0.4) + scipy.stats.norm.logpdf(X, z)

    def w(self, z):
        return np.exp(self.log_joint(z) - self.q.logpdf(z))

    def q_ew(self, z):
        """At K = 2."""
        others = self.q.pdf(GRID) / (0.5 * (self.w(z)[:, None] + self.w(GRID)))
        return np.exp(self.log_joint(z)) * integral(others)


def p_value(sample, density):
    cdf = np.concatenate([[0], np.cumsum(density) * STEP])[:-1] + density * STEP / 2
    return scipy.stats.kstest(np.interp(sample, GRID, cdf), "uniform").pvalue


def draws(toy, particles, n=N, chunk=None):
    return draw_implicit(toy.model, toy.x, particles, n, chunk)[:, 0, 0].numpy()


def test_draws_have_the_density_of_q_ew():
    toy = Toy()
    density, z = toy.q_ew(GRID), draws(toy, 2)
    assert integral(density) == pytest.approx(1, abs=1e-9)
    mean = integral(density * GRID)
    variance = integral(density * (GRID - mean) ** 2)
    assert abs(z.mean() - mean) / math.sqrt(variance / N) < 4
    squares = (z - mean) ** 2
    assert abs(squares.mean() - variance) / (squares.std() / math.sqrt(N)) < 4
    assert p_value(z, density) > 1e-3
    assert p_value(z, toy.q.pdf(GRID)) < 1e-20 and p_value(z, toy.posterior.pdf(GRID)) < 1e-20
    assert p_value(draws(toy, 3), density) < 1e-10


def test_from_q_at_one_particle_to_the_posterior_at_many():
    toy = Toy()
    assert p_value(draws(toy, 1), toy.q.pdf(GRID)) > 1e-3
    assert p_value(draws(toy, 1_000, 2_000), toy.posterior.pdf(GRID)) > 1e-3


def test_the_bound_lies_between_the_elbos_of_q_and_of_what_it_stands_for():
    toy = Toy()
    q, density, log_joint = toy.q.pdf(GRID), toy.q_ew(GRID), toy.log_joint(GRID)
    elbo = integral(q * (log_joint - toy.q.logpdf(GRID)))
    log_w = torch.from_numpy(log_joint - toy.q.logpdf(GRID))
    pairs = torch.stack([log_w.repeat_interleave(len(GRID)), log_w.repeat(len(GRID))])[None]  # (1, 2, B)
    both = np.outer(q, q)
    l_2 = integral(integral(both * bounds.miwae(pairs).view(len(GRID), -1).numpy()))
    z = draws(toy, 2)
    gain = toy.log_joint(z) - np.log(np.interp(z, GRID, density))
    elbo_of_draws, se = gain.mean(), gain.std() / math.sqrt(N)
    assert elbo < l_2 - 0.01 < elbo_of_draws - 0.01 - 4 * se
    assert elbo_of_draws + 4 * se < toy.log_px
    # and by what: log p(x) - L_2 is the divergence of the extended distributions
    p = toy.posterior.pdf(GRID)
    p_is = (np.outer(p, q) + np.outer(q, p)) / 2
    inside = both > 1e-290
    divergence = np.where(inside, both * (np.log(np.where(inside, both, 1)) - np.log(np.where(inside, p_is, 1))), 0)
    assert integral(integral(p_is)) == pytest.approx(1, abs=1e-9)
    assert integral(integral(divergence)) == pytest.approx(toy.log_px - l_2, abs=1e-9)


def test_axes():
    """Samples, data and z of several dimensions stay apart; whatever the chunk."""
    model, mu = LinearGaussian(3).double(), torch.tensor([0.0, 100.0, -100.0], dtype=torch.float64)
    with torch.no_grad():
        model.mu.copy_(mu)
        model.inference.weight.copy_(torch.eye(3) / 2)
        model.inference.bias.copy_(mu / 2)
    x = mu + torch.tensor([[0.0], [20.0]])
    for chunk in (1, 3, 7, None):
        z = draw_implicit(model, x, 5, 7, chunk)
        assert z.shape == (7, 2, 3) and z.dtype == torch.float64
        assert ((z - (x + mu) / 2).abs() < 6).all()


def test_a_particle_of_no_weight_is_never_taken():
    toy = Toy()
    prior = toy.model.prior()
    toy.model.prior = lambda: Halved(prior)
    assert (draws(toy, 20) > 0).mean() > 1 - 1e-3  # all 20 below 0 have no weight: none is preferred


class Halved:
    """A density that is 0 below 0."""

    def __init__(self, p):
        self.p = p

    def log_prob(self, z):
        return self.p.log_prob(z).masked_fill(z[..., 0] < 0, -math.inf)


@pytest.mark.parametrize("name", ["particles", "samples", "chunk"])
def test_counts_below_one_are_refused(name):
    toy = Toy()
    with pytest.raises(ValueError, match=f"{name} must be at least 1. Got 0."):
        draw_implicit(toy.model, toy.x, **({"particles": 2, "chunk": 1} | {name: 0}))

"""What the linear-Gaussian model says of its gradients' signal-to-noise, against quadrature and autograd.

Moments over q(z|x) are sums over a Gauss-Hermite grid in two dimensions, exact for these integrands to far more digits
than are asked for; gradients are autograd's, one for each node and datum. Neither shares a formula with the model.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_iwae.estimators import PHI, THETA
from lightning_iwae.models import LinearGaussian

D, N, NODES = 2, 3, 60
TOTAL = ["elbo", "iwae", "ciwae", "vr-iwae", "jvi"]
PATH = ["stl", "dreg", "ciwae-dreg", "vr-iwae-dreg", "jvi-dreg"]


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)


def anywhere(variance=2 / 3, seed=0):
    """A model with all parameters at random, and data (N, D)."""
    generator = torch.Generator().manual_seed(seed)
    model = LinearGaussian(D, variance)
    for p in model.parameters():
        nn.init.normal_(p, std=0.25, generator=generator)
    return model, torch.randn(N, D, generator=generator)


def grid():
    """Nodes (I, D) of a standard normal, and their probabilities (I,)."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(NODES))
    weights = weights / weights.sum()
    return torch.cartesian_prod(nodes, nodes), torch.outer(weights, weights).flatten()


class Quadrature:
    """Log-weights of a datum on the grid, and their derivatives in a copy of the parameters for each node."""

    def __init__(self, model, x):
        self.e, self.probability = grid()
        copies = (p.detach().expand(len(self.e), *p.shape).clone().requires_grad_() for p in model.parameters())
        named = dict(zip([name for name, _ in model.named_parameters()], copies, strict=True))
        self.A, self.b = named["inference.weight"], named["inference.bias"]
        self.mu = named["generative.mu"]
        self.std, self.x = math.sqrt(model.variance), x
        self.m = (self.A @ x) + self.b
        self.z = self.m + self.std * self.e

    def log_normal(self, value, mean, std=1.0):
        return (-0.5 * ((value - mean) / std).square() - math.log(std * math.sqrt(2 * math.pi))).sum(-1)

    def log_w(self, z, m):
        return self.log_normal(z, self.mu) + self.log_normal(self.x, z) - self.log_normal(z, m, self.std)

    def phi(self, of):
        """Derivative of `of` (I,) in phi = (A, b), flat: (I, P)."""
        grads = torch.autograd.grad(of.sum(), (self.A, self.b), retain_graph=True)
        return torch.cat([g.flatten(1) for g in grads], 1)

    def theta(self, of):
        """Likewise in mu: (I, D)."""
        return torch.autograd.grad(of.sum(), self.mu, retain_graph=True)[0]

    def mean(self, values):
        return (self.probability[:, None] * values).sum(0)

    def moments(self, values):
        mean = self.mean(values)
        return mean, self.mean((values - mean).square())


def snr_of(per_datum, M):
    """SNR of the mean over data, from each datum's mean and variance of one group's gradient."""
    means, variances = (torch.stack(v) for v in zip(*per_datum, strict=True))
    return math.sqrt(M) * means.mean(0).abs() / (variances.sum(0) / N**2).sqrt()


# ------------------------------------------------------------------------------------------------ K = 1
def single_sample(model, x, side, kind):
    """Mean and variance of a datum's single-sample gradient."""
    q = Quadrature(model, x)
    if side == "theta":
        return q.moments(q.theta(q.log_w(q.z.detach(), q.m.detach())))
    value = {
        "total": lambda: q.log_w(q.z, q.m),
        "path": lambda: q.log_w(q.z, q.m.detach()),
        "wake": lambda: q.log_normal(q.z.detach(), q.m, q.std),
    }
    return q.moments(q.phi(value[kind]()))


@pytest.mark.parametrize("M", [1, 5])
@pytest.mark.parametrize("variance", [2 / 3, 0.5, 0.3])
def test_one_particle(variance, M):
    model, x = anywhere(variance)
    for kind, names in (("total", TOTAL), ("path", PATH), ("wake", ["wake"])):
        found = snr_of([single_sample(model, row, "phi", kind) for row in x], M)
        for name in names:
            exact = model.exact_snr(x, "phi", name, M, 1)
            if kind == "path" and variance == 0.5:  # no noise at all
                assert (exact > 1e6).all() and (found > 1e6).all()
            else:
                torch.testing.assert_close(exact, found, rtol=1e-9, atol=1e-9)
            assert kind == "wake" or not torch.allclose(exact, model.exact_snr(x, "phi", name, M + 1, 1))
    found = snr_of([single_sample(model, row, "theta", "") for row in x], M)
    for name in THETA:
        torch.testing.assert_close(model.exact_snr(x, "theta", name, M, 1), found, rtol=1e-9, atol=1e-9)


def test_means_of_one_particle_are_the_gradient_of_the_exact_elbo():
    model, x = anywhere()
    elbo = (model.exact_log_px(x) - model.exact_kl(x)).mean()
    A, b, mu = torch.autograd.grad(elbo, (model.inference.weight, model.inference.bias, model.mu))
    for side, exact in (("phi", torch.cat([A.flatten(), b])), ("theta", mu)):
        of_std = torch.stack([single_sample(model, row, side, "total")[1] for row in x]).sum(0).sqrt() / N
        torch.testing.assert_close(model.exact_snr(x, side, "elbo", 1, 1) * of_std, exact.abs())


def test_elbo_of_K_particles_is_that_of_K_groups():
    model, x = anywhere()
    for side in ("phi", "theta"):
        groups = model.exact_snr(x, side, "elbo", 6, 1)
        torch.testing.assert_close(model.exact_snr(x, side, "elbo", 2, 3), groups)


# ------------------------------------------------------------------------------------------------ Theorem 1
def theorem_1(model, x, side, M, K):
    """Theorem 1 in its general form (arXiv 1802.04537): moments of one weight and of its derivative, by quadrature."""
    per_datum = []
    for row in x:
        q = Quadrature(model, row)
        log_w = q.log_w(q.z, q.m)
        w, probability = log_w.exp(), q.probability
        Z = (probability * w).sum().detach()
        derivative = q.phi if side == "phi" else q.theta
        slope = q.phi(w) if side == "phi" else q.theta(q.log_w(q.z.detach(), q.m.detach()).exp())
        # grad Var[w] / Z^2 from E[w^2] and Z, both functions of the parameters
        second, first = q.mean(derivative(w.square())), q.mean(derivative(w))
        relative = second / Z**2 - 2 * (probability * w.detach().square()).sum() / Z**3 * first
        mean = first / Z - relative / (2 * K)
        spread = slope / Z - w.detach()[:, None] * first / Z**2  # of w / Z
        per_datum.append((mean, q.mean(spread.square()) / K))
    return snr_of(per_datum, M)


@pytest.mark.parametrize("side", ["phi", "theta"])
@pytest.mark.parametrize("variance", [2 / 3, 0.5, 0.9])
def test_constants_of_theorem_1(variance, side):
    model, x = anywhere(variance)
    for M, K in ((1, 16), (3, 100)):
        exact = model.exact_snr(x, side, "iwae", M, K)
        torch.testing.assert_close(exact, theorem_1(model, x, side, M, K), rtol=1e-8, atol=1e-10)
        assert not torch.allclose(exact, theorem_1(model, x, side, M, 2 * K), rtol=0.05)


@pytest.mark.parametrize("variance", [2 / 3, 0.5, 0.9])
def test_relative_variance_of_a_weight(variance):
    model, x = anywhere(variance)
    for row, exact in zip(x, model.relative_variance(x), strict=True):
        q = Quadrature(model, row)
        w = q.log_w(q.z, q.m).exp().detach()
        Z = (q.probability * w).sum()
        assert math.log(Z) == pytest.approx(model.exact_log_px(row).item(), rel=1e-12)
        assert exact.item() == pytest.approx(((q.probability * w.square()).sum() / Z**2 - 1).item(), rel=1e-9)


def test_weights_without_a_second_moment():
    model, x = anywhere(0.25)
    assert model.relative_variance(x).isinf().all()
    assert model.exact_snr(x, "phi", "iwae", 1, 16) is None  # Theorem 1 needs four moments, K = 1 none
    assert model.exact_snr(x, "phi", "iwae", 1, 1) is not None
    model, x = anywhere(0.37)
    assert model.relative_variance(x).isfinite().all()
    assert model.exact_snr(x, "theta", "iwae", 1, 16) is None


def test_what_is_not_known_is_none():
    model, x = anywhere()
    known = {1: {*TOTAL, *PATH, "wake"}, 16: {"elbo", "iwae"}}
    for K, names in known.items():
        assert {name for name in PHI if model.exact_snr(x, "phi", name, 1, K) is not None} == names
    assert {name for name in THETA if model.exact_snr(x, "theta", name, 1, 16) is not None} == {"elbo", "iwae"}


# ------------------------------------------------------------------------------------------------ the paper's point
def test_near_the_optimum():
    x = torch.randn(500, 20, generator=torch.Generator().manual_seed(0)) * math.sqrt(2) + 0.5
    model = LinearGaussian(20)
    torch.manual_seed(3)
    model.near_optimum(x, spread=0.01)
    off = [model.mu - x.mean(0), model.inference.weight - torch.eye(20) / 2, model.inference.bias - x.mean(0) / 2]
    off = torch.cat([part.detach().flatten() for part in off]) / 0.01
    assert off.square().sum().item() == pytest.approx(440, abs=4.5 * math.sqrt(880))  # chi^2 of 440
    assert abs(off.mean()) < 4.5 / math.sqrt(440)
    model.near_optimum(x, spread=0.0)
    gradients = torch.autograd.grad(
        (model.exact_log_px(x) - model.exact_kl(x)).mean(), tuple(model.inference.parameters())
    )
    assert all(g.abs().max() < 1e-12 for g in gradients)
    (of_mu,) = torch.autograd.grad(model.exact_log_px(x).mean(), model.mu)
    assert of_mu.abs().max() < 1e-12

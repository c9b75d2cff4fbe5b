"""The package against closed forms of the linear-Gaussian model, per draw and in expectation by quadrature.

c = (x + mu) / 2 is the posterior's mean, m = A x + b q's, delta = m - c, s2 its variance.
"""

import itertools
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import nn
from torch.distributions import Distribution, Independent, Normal, kl_divergence

from lightning_iwae import Side, bounds, routing
from lightning_iwae.estimators import phi_weights, theta_weights
from lightning_iwae.models import LinearGaussian
from lightning_iwae.weights import ess

SETTINGS = [(1, 2 / 3), (3, 0.5), (4, 0.9), (20, 2 / 3)]
every_setting = pytest.mark.parametrize(("dim", "variance"), SETTINGS)


@pytest.fixture(autouse=True)
def double_precision_one_thread_and_a_seed():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)


def anywhere(dim, variance, size=3):
    """A model with all parameters at random, and data."""
    model = LinearGaussian(dim, variance)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5 / math.sqrt(dim))
    return model, torch.randn(size, dim)


def at_the_optimum(dim, variance, size=5):
    """mu = mean x, A = I / 2, b = mu / 2: with variance 1/2, q is the posterior."""
    model, x = LinearGaussian(dim, variance), torch.randn(size, dim)
    with torch.no_grad():
        model.mu.copy_(x.mean(0))
        model.inference.weight.copy_(torch.eye(dim) / 2)
        model.inference.bias.copy_(model.mu / 2)
    return model, x


def means(model, x):
    """(m, c), each (B, D)."""
    return model.inference(x).detach(), ((x + model.mu) / 2).detach()


def gradients(model, drawn, theta, phi):
    """Ascent directions, of the sum over data."""
    model.zero_grad()
    routing.loss(drawn, theta, phi).backward(retain_graph=True)
    return {name: -p.grad * drawn.z.shape[1] for name, p in model.named_parameters() if p.grad is not None}


class At(Distribution):
    """N(mean, scale^2) whose samples are mean + scale * eps for given eps (S, D), the nodes of a quadrature."""

    def __init__(self, q, eps):
        super().__init__(q.batch_shape, q.event_shape, validate_args=False)
        self.q, self.eps = q, eps

    def rsample(self, shape):
        return self.q.base_dist.loc + self.q.base_dist.scale * self.eps[:, None]

    def log_prob(self, z):
        return self.q.log_prob(z)


def draw_at(model, x, eps):
    return routing.draw(model, x, len(eps), q=At(model.posterior(x), eps))


# --- the model's own closed forms -------------------------------------------------------------------------------


@every_setting
def test_log_px_is_scipy_s(dim, variance):
    model, x = anywhere(dim, variance)
    exact = scipy.stats.multivariate_normal(model.mu.detach(), 2 * np.eye(dim)).logpdf(x)
    np.testing.assert_allclose(model.exact_log_px(x).detach(), exact, rtol=1e-13)


@every_setting
def test_posterior_is_bayes_rule(dim, variance):
    model, x = anywhere(dim, variance)
    z = torch.randn(6, len(x), dim)
    bayes = model.prior().log_prob(z) + model.likelihood(z).log_prob(x) - model.exact_log_px(x)
    torch.testing.assert_close(model.exact_posterior(x).log_prob(z), bayes, rtol=1e-12, atol=1e-12)


@every_setting
def test_kl_is_torch_s(dim, variance):
    model, x = anywhere(dim, variance)
    exact = kl_divergence(model.posterior(x), model.exact_posterior(x))
    torch.testing.assert_close(model.exact_kl(x), exact, rtol=1e-12, atol=1e-13)


def test_kl_at_the_paper_s_optimum():
    model, x = at_the_optimum(20, 2 / 3)
    torch.testing.assert_close(model.exact_kl(x), torch.full((5,), 0.4565), rtol=0, atol=5e-5)


@pytest.mark.parametrize("variance", [0.0, -1.0])
def test_variance_must_be_positive(variance):
    with pytest.raises(ValueError, match=f"network.variance must be positive. Got {variance}"):
        LinearGaussian(2, variance)


# --- every draw -------------------------------------------------------------------------------------------------


@every_setting
def test_log_weights(dim, variance):
    model, x = anywhere(dim, variance)
    drawn = routing.draw(model, x, 6)
    (m, c), z = means(model, x), drawn.z.detach()
    exact = model.exact_log_px(x) + dim / 2 * math.log(2 * variance)
    exact = exact - (z - c).square().sum(-1) + (z - m).square().sum(-1) / (2 * variance)
    torch.testing.assert_close(drawn.log_w, exact.detach(), rtol=1e-12, atol=1e-12)


M, K = 3, 4
PHI = {  # name: (c, s) from the normalised weights w (M, K, B), by the formulas of reference 4
    "elbo": lambda w: (np.full_like(w, 1 / K), np.full_like(w, -1 / K)),
    "iwae": lambda w: (w, -w),
    "ciwae": lambda w: (0.3 / K + 0.7 * w, -0.3 / K - 0.7 * w),
    "stl": lambda w: (w, 0 * w),
    "dreg": lambda w: (w**2, 0 * w),
}


@every_setting
@pytest.mark.parametrize("method", ["auto", "separate"])
@pytest.mark.parametrize("name", PHI)
def test_gradients_of_one_draw_by_hand(dim, variance, method, name):
    """Path g = -2 (z - c) + (z - m) / s2, score h = (z - m) / s2, theta's gradient z - mu; all in NumPy."""
    model, x = anywhere(dim, variance)
    drawn = routing.draw(model, x, M * K, method)
    (m, c), z = means(model, x), drawn.z.detach()
    beta = 0.3 if name == "ciwae" else None
    theta = name if name in ("elbo", "iwae", "ciwae") else "iwae"
    found = gradients(model, drawn, Side(theta, K, beta if theta == name else None), Side(name, K, beta))

    w = scipy.special.softmax(drawn.log_w.numpy().reshape(M, K, -1), axis=1)
    path, score = (weights.reshape(M * K, -1, 1) / M for weights in PHI[name](w))
    h = ((z - m) / variance).numpy()
    g = -2 * (z - c).numpy() + h
    of_b = (path * g + score * h).sum(0)
    a = PHI[theta](w)[0].reshape(M * K, -1, 1) / M
    np.testing.assert_allclose(found["inference.bias"], of_b.sum(0), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(found["inference.weight"], of_b.T @ x.numpy(), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(found["generative.mu"], (a * (z - model.mu.detach()).numpy()).sum((0, 1)), rtol=1e-11)


@pytest.mark.parametrize("particles", [1, 4, 12])
def test_at_the_posterior_every_weight_is_p_of_x_and_path_estimators_are_silent(particles):
    model, x = at_the_optimum(5, 0.5)
    drawn = routing.draw(model, x, 12)
    exact = model.exact_log_px(x).detach()
    torch.testing.assert_close(drawn.log_w, exact.expand(12, -1), rtol=1e-14, atol=1e-13)
    torch.testing.assert_close(ess(drawn.log_w, 0), torch.full((5,), 12.0), rtol=1e-13, atol=0)
    view = drawn.log_w.unflatten(0, (-1, particles))
    for bound in (bounds.elbo(view), bounds.miwae(view), bounds.iwae(view), bounds.ciwae(view, beta=0.4)):
        torch.testing.assert_close(bound, exact, rtol=1e-14, atol=1e-13)
    for name in ("stl", "dreg"):
        found = gradients(model, drawn, Side("iwae", 12), Side(name, particles))
        assert found["inference.bias"].abs().max() < 1e-13 and found["inference.weight"].abs().max() < 1e-13
    found = gradients(model, drawn, Side("iwae", 12), Side("iwae", particles))
    eps = (drawn.z.detach() - means(model, x)[0]) / math.sqrt(0.5)
    torch.testing.assert_close(
        found["inference.bias"], -2 * math.sqrt(0.5) * eps.mean(0).sum(0), rtol=1e-11, atol=1e-12
    )
    assert found["inference.bias"].abs().max() > 0.1, "zero in the mean, not for each draw"


# --- expectations, by quadrature --------------------------------------------------------------------------------


class LearntScale(LinearGaussian):
    """q(z | x) = N(A x + b, exp(2 log_scale) I)."""

    def __init__(self, dim, variance):
        super().__init__(dim, variance)
        self.inference = nn.Linear(dim, dim)
        self.inference.log_scale = nn.Parameter(torch.tensor(0.5 * math.log(variance)))

    def posterior(self, x):
        mean = self.inference(x)
        return Independent(Normal(mean, self.inference.log_scale.exp() * torch.ones_like(mean)), 1)


@every_setting
@pytest.mark.parametrize("name", PHI)
def test_expected_gradients_of_the_elbo(name, dim, variance):
    """At +-sqrt(D) e_i with equal weights polynomials in eps up to the third degree are integrated exactly.

    At K = 1 every estimator's gradient is one of the second degree, and its mean the ELBO's.
    """
    model = LearntScale(dim, variance)
    model.load_state_dict(anywhere(dim, variance)[0].state_dict(), strict=False)
    x = torch.randn(3, dim)
    eps = math.sqrt(dim) * torch.cat([torch.eye(dim), -torch.eye(dim)])
    m, c = means(model, x)
    drawn = draw_at(model, x, eps)
    elbo = model.exact_log_px(x) - model.exact_kl(x)
    torch.testing.assert_close(bounds.elbo(drawn.log_w[:, None]), elbo.detach(), rtol=1e-13, atol=1e-13)

    found = gradients(model, drawn, Side("elbo", 1), Side(name, 1, 0.3 if name == "ciwae" else None))
    expected = {
        "inference.bias": -2 * (m - c).sum(0),
        "inference.weight": -2 * (m - c).T @ x,
        "inference.log_scale": torch.tensor(-3 * dim * (2 * variance - 1)),
        "generative.mu": (m - model.mu.detach()).sum(0),
    }
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-11, atol=1e-11)


def test_the_elbo_s_gradient_is_zero_in_expectation_at_the_optimum():
    model, x = at_the_optimum(6, 2 / 3)
    eps = math.sqrt(6) * torch.cat([torch.eye(6), -torch.eye(6)])
    for gradient in gradients(model, draw_at(model, x, eps), Side("elbo", 1), Side("elbo", 1)).values():
        assert gradient.abs().max() < 1e-12


NODES = 48


@pytest.fixture(scope="module", params=[2, 3], ids=["K=2", "K=3"])
def quadrature(request):
    """K particles at all nodes of a tensor Gauss-Hermite rule, D = 1: log-weights, derivatives and their weights."""
    K = request.param
    model = LinearGaussian(1, 2 / 3).double()
    with torch.no_grad():
        model.mu.fill_(0.3), model.inference.weight.fill_(0.2), model.inference.bias.fill_(-0.4)
    x = torch.tensor([[1.1], [-0.6]], dtype=torch.float64)
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(NODES))
    grid = torch.tensor(list(itertools.product(range(NODES), repeat=K)))
    probability = (weights / weights.sum())[grid].prod(1)

    def tensor_rule(per_node):
        return per_node[grid]  # (NODES, B) -> (NODES^K, K, B)

    def mean(per_particle):
        return (probability[:, None, None] * per_particle).sum((0, 1))

    return model, x, nodes[:, None], tensor_rule, mean


def expected_gradient(quadrature, side, name, **options):
    """E of the estimator, (B,): of b for phi, of mu for theta. The package's weights, derivatives by hand."""
    model, x, nodes, tensor_rule, mean = quadrature
    drawn = draw_at(model, x, nodes)
    (m, c), z = means(model, x), drawn.z.detach()
    log_w = tensor_rule(drawn.log_w)
    if side == "theta":
        a = theta_weights(name, log_w, **options) * len(log_w)
        return mean(a * tensor_rule((z - model.mu.detach()).squeeze(-1)))
    path, score = phi_weights(name, log_w, **options)
    h = tensor_rule(((z - m) / model.variance).squeeze(-1))
    g = tensor_rule((-2 * (z - c)).squeeze(-1)) + h
    return mean((path * g + score * h) * len(log_w))


def expected_bound(quadrature, **shifts):
    """E[L_K], (B,), by NumPy and SciPy, with a parameter shifted."""
    model, x, nodes, tensor_rule, mean = quadrature
    parameters = {"mu": model.mu, "b": model.inference.bias}
    for name, shift in shifts.items():
        parameters[name].data += shift
    log_w = tensor_rule(draw_at(model, x, nodes).log_w)
    for name, shift in shifts.items():
        parameters[name].data -= shift
    value = scipy.special.logsumexp(log_w.numpy(), axis=1) - math.log(log_w.shape[1])
    return mean(torch.from_numpy(value)[:, None])


def slope(quadrature, parameter, h=1e-3):
    """Central difference of the fourth order."""
    near = expected_bound(quadrature, **{parameter: h}) - expected_bound(quadrature, **{parameter: -h})
    far = expected_bound(quadrature, **{parameter: 2 * h}) - expected_bound(quadrature, **{parameter: -2 * h})
    return (8 * near - far) / (12 * h)


def test_quadrature_is_good_to_six_digits(quadrature):
    """Its own test: the ELBO, and the order log p > L_K > L_1."""
    model, x, nodes, tensor_rule, mean = quadrature
    log_w = tensor_rule(draw_at(model, x, nodes).log_w)
    log_px, kl = model.exact_log_px(x).detach(), model.exact_kl(x).detach()
    torch.testing.assert_close(mean(log_w / log_w.shape[1]), log_px - kl, rtol=1e-12, atol=0)
    assert (log_px > expected_bound(quadrature)).all() and (expected_bound(quadrature) > log_px - kl).all()


def test_expectation_of_dreg_is_that_of_iwae_and_the_slope_of_the_bound(quadrature):
    iwae = expected_gradient(quadrature, "phi", "iwae")
    torch.testing.assert_close(expected_gradient(quadrature, "phi", "dreg"), iwae, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(iwae, slope(quadrature, "b"), rtol=1e-6, atol=1e-7)


def test_expectation_of_stl_is_not(quadrature):
    """The twin that must fail: off by more than a third, for both data."""
    iwae = expected_gradient(quadrature, "phi", "iwae")
    off = (expected_gradient(quadrature, "phi", "stl") - iwae).abs() / iwae.abs()
    assert (off > 1 / 3).all()


def test_expectation_of_ciwae_is_the_mixture(quadrature):
    iwae, elbo = (expected_gradient(quadrature, "phi", name) for name in ("iwae", "elbo"))
    model, x, *_ = quadrature
    m, c = means(model, x)
    torch.testing.assert_close(elbo, -2 * (m - c).squeeze(-1), rtol=1e-12, atol=0)
    mixture = expected_gradient(quadrature, "phi", "ciwae", beta=0.3)
    torch.testing.assert_close(mixture, 0.3 * elbo + 0.7 * iwae, rtol=1e-12, atol=0)


def test_expectation_of_theta_s_iwae_is_the_slope_of_the_bound(quadrature):
    found = expected_gradient(quadrature, "theta", "iwae")
    torch.testing.assert_close(found, slope(quadrature, "mu"), rtol=1e-6, atol=1e-7)
    elbo = expected_gradient(quadrature, "theta", "elbo")
    assert ((found - elbo).abs() > 0.05).all()


# --- expectations, by sampling ----------------------------------------------------------------------------------


def z_score(sample, expected):
    return float((sample.mean() - expected) / (sample.std() / math.sqrt(sample.numel())))


def second_moment(s2, squared_delta, dim):
    """E[w^2] / p(x)^2, closed form (reference 6.5)."""
    return (2 * s2) ** dim * (4 * s2 - 1) ** (-dim / 2) * math.exp(2 * squared_delta / (4 * s2 - 1))


def test_moments_of_the_weights_and_the_limit_of_ess():
    """100 replicates of 4000 particles. Twins, all refuted: 2/3 as a scale, no distance, 5 % more."""
    dim, s2, replicates, particles = 2, 2 / 3, 100, 4000
    model, _ = anywhere(dim, s2)
    x = torch.tensor([[0.9, -0.7]])
    log_w = routing.draw(model, x, replicates * particles).log_w
    w = (log_w - model.exact_log_px(x).detach()).exp()
    m, c = means(model, x)
    squared_delta = float((m - c).square().sum())
    exact = second_moment(s2, squared_delta, dim)
    fraction = ess(log_w.reshape(replicates, particles), 1) / particles

    assert abs(z_score(w, 1.0)) < 4
    assert abs(z_score(w.square(), exact)) < 4
    assert abs(z_score(fraction, 1 / exact)) < 4
    for wrong in (second_moment(s2**2, squared_delta, dim), second_moment(s2, 0.0, dim), 1.05 * exact):
        assert abs(z_score(w.square(), wrong)) > 8
        assert abs(z_score(fraction, 1 / wrong)) > 8

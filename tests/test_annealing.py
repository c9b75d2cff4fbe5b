"""Annealed importance sampling against closed forms, quadrature and what its weights must average to."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import nn
from torch.distributions import Bernoulli, Independent, LogNormal, MixtureSameFamily, Normal, Uniform

from lightning_iwae import annealing, hmc
from lightning_iwae.annealing import Annealing, ais, anneal, bdmc, steps_for
from lightning_iwae.evaluation import importance_sample
from lightning_iwae.hmc import Bridge, Point, move
from lightning_iwae.models import MLP, Discrete, LinearGaussian, TwoLayer
from lightning_iwae.models.labels import given


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def z_score(sample, expected):
    """Of the mean of independent values, by their own standard error."""
    sample = np.asarray(sample)
    return (sample.mean() - expected) / (sample.std(ddof=1) / math.sqrt(sample.size))


def linear_gaussian(dim=2, variance=2 / 3, distance=0.1):
    model = LinearGaussian(dim, variance).double()
    with torch.no_grad():
        model.mu.copy_(torch.linspace(-1, 1, dim))
        model.inference.weight.copy_(torch.eye(dim) / 2)
        model.inference.bias.copy_(model.mu / 2 + distance)
    return model


def same_data(n, dim=2):
    return torch.linspace(1.5, -0.5, dim, dtype=torch.float64).expand(n, -1)


class Scaled:
    """z ~ N(0, 1), x | z ~ N(z, s), with an s for each datum: p(x) = N(0, 1 + s^2)."""

    def __init__(self, scales, prior=None):
        self.scales = torch.tensor(scales, dtype=torch.float64)
        self.p = prior or Independent(Normal(torch.zeros(1, dtype=torch.float64), 1.0), 1)
        self.decoded = 0

    def prior(self):
        return self.p

    def posterior(self, x):
        return Independent(Normal(x, 1.0), 1)

    def likelihood(self, z):
        self.decoded += z.shape[:2].numel()
        return Independent(Normal(z, self.scales[:, None]), 1)


# --- moves ----------------------------------------------------------------------------------------------------
def tempered(model, x, start, beta):
    """f_beta of a linear-Gaussian model, by hand: a product of Gaussians in z."""
    mu, one = model.mu.detach(), torch.ones(model.dim, dtype=torch.float64)
    mean, precision = (mu, one) if start == "prior" else (model.inference(x[0]).detach(), one / model.variance)
    end, its_precision = (x[0] + mu) / 2, 2 * one
    total = (1 - beta) * precision + beta * its_precision
    return Normal(((1 - beta) * precision * mean + beta * its_precision * end) / total, total**-0.5)


@pytest.mark.parametrize("start", ["prior", "posterior"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_move_leaves_its_density_as_it_is(start, beta, monkeypatch):
    model, x = linear_gaussian(), same_data(3)
    bridge, target = Bridge(model, x, start), tempered(model, x, start, beta)

    def p_value():
        point = bridge.at(target.sample((20_000, 3)))
        after, _ = move(bridge, point, beta, torch.full((3,), 1.1, dtype=torch.float64), 3)
        assert (after.z != point.z).any(-1).double().mean() > 0.3
        u = scipy.stats.norm.cdf((after.z - target.mean) / target.stddev)
        return min(scipy.stats.kstest(column, "uniform").pvalue for column in u.reshape(-1, 2).T)

    assert p_value() > 1e-5
    monkeypatch.setattr(hmc, "kinetic", lambda momentum: 0.0)  # an acceptance that forgets the momentum
    assert p_value() < 1e-10


def test_moves_find_the_density_from_afar():
    model, x = linear_gaussian(), same_data(4)
    bridge, target = Bridge(model, x, "prior"), tempered(model, x, "prior", 0.7)
    point = bridge.at(torch.full((2_000, 4, 2), 5.0, dtype=torch.float64))
    for _ in range(20):
        point, _ = move(bridge, point, 0.7, torch.full((4,), 0.5, dtype=torch.float64), 3)
    for d in range(2):
        u = scipy.stats.norm.cdf((point.z[..., d].flatten() - target.mean[d]) / target.stddev[d])
        assert scipy.stats.kstest(u, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("start", ["prior", "posterior"])
def test_a_point_holds_both_ends_and_their_gradients(start):
    model, x = linear_gaussian(dim=3), torch.randn(4, 3, dtype=torch.float64)
    z = torch.randn(5, 4, 3, dtype=torch.float64)
    point = Point(*(t.numpy() for t in Bridge(model, x, start).at(z)))
    mean, variance = (model.mu, 1) if start == "prior" else (model.inference(x), model.variance)
    mean, mu, x, z = mean.detach().numpy(), model.mu.detach().numpy(), x.numpy(), z.numpy()
    log_joint = scipy.stats.norm.logpdf(z, mu).sum(-1) + scipy.stats.norm.logpdf(x, z).sum(-1)
    np.testing.assert_allclose(point.log_r, scipy.stats.norm.logpdf(z, mean, math.sqrt(variance)).sum(-1))
    np.testing.assert_allclose(point.log_r + point.log_w, log_joint)
    np.testing.assert_allclose(point.grad_log_r, (mean - z) / variance, atol=1e-12)
    np.testing.assert_allclose(point.gradient(1.0), (mu - z) + (x - z), atol=1e-12)
    np.testing.assert_allclose(point.gradient(0.25), 0.75 * (mean - z) / variance + 0.25 * (mu + x - 2 * z), atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_a_trajectory_that_diverges_is_rejected():
    model, x = linear_gaussian(), same_data(3)  # whose distributions would refuse a nan
    bridge = Bridge(model, x, "prior")
    bridge.prior = Independent(Normal(model.mu.detach(), 1.0, validate_args=True), 1)
    point = bridge.at(bridge.draw(7))
    after, acceptance = move(bridge, point, 1.0, torch.tensor([0.1, 1e9, 1e300], dtype=torch.float64), 10)
    assert (acceptance[:, 1:] == 0).all() and torch.equal(after.z[:, 1:], point.z[:, 1:])
    assert (acceptance[:, 0] > 0.9).all() and after.z.isfinite().all()


# --- the schedule and the cost ----------------------------------------------------------------------------------
def test_betas():
    np.testing.assert_allclose(Annealing(temperatures=4, schedule="linear").betas(), [0, 0.25, 0.5, 0.75, 1])
    s = scipy.special.expit(4 * np.linspace(-1, 1, 101))
    np.testing.assert_allclose(Annealing(temperatures=100).betas(), (s - s[0]) / (s[-1] - s[0]), atol=1e-12)
    for schedule in ("linear", "sigmoid"):
        betas = Annealing(temperatures=1, schedule=schedule).betas()
        assert betas == [0, 1]


@pytest.mark.parametrize("settings", [Annealing(3, 1), Annealing(3, 2, 4, pilot=5), Annealing(2, 9, 1, "linear")])
@pytest.mark.parametrize("ways", [1, 2])
def test_the_cost_is_what_is_stated(settings, ways):
    model, calls = Scaled([1.0, 2.0]), []
    if ways == 1:
        ais(model, torch.zeros(2, 1, dtype=torch.float64), settings, lambda: calls.append(1))
    else:
        bdmc(model, 2, settings, lambda: calls.append(1))
        model.decoded -= 2  # the simulation
    assert model.decoded == 2 * settings.passes(ways)
    assert len(calls) == settings.moves(ways)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chains": 0}, r"annealing.chains must be at least 1. Got 0."),
        ({"temperatures": 0}, r"annealing.temperatures must be at least 1"),
        ({"leapfrog": -1}, r"annealing.leapfrog must be at least 1. Got -1."),
        ({"pilot": 0}, r"annealing.pilot"),
        ({"schedule": "cosine"}, r"annealing.schedule must be sigmoid or linear. Got cosine."),
        ({"start": "q"}, r"annealing.start must be prior or posterior. Got q."),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ais(linear_gaussian(), same_data(2), Annealing(**options))
    with pytest.raises(ValueError, match=message):
        bdmc(linear_gaussian(), 2, Annealing(**options))


# --- weights ----------------------------------------------------------------------------------------------------
def ratios(settings):
    """w / p(x) of the chains of one datum."""
    model, x = linear_gaussian(), same_data(1)
    exact = scipy.stats.multivariate_normal(model.mu.detach(), 2 * np.eye(2)).logpdf(x[0])
    return torch.exp(ais(model, x, settings).log_w[:, 0] - exact)


@pytest.mark.parametrize("start", ["prior", "posterior"])
@pytest.mark.parametrize("schedule", ["sigmoid", "linear"])
def test_weights_average_to_px(start, schedule, monkeypatch):
    settings = Annealing(40_000, 5, 3, schedule, start)
    assert abs(z_score(ratios(settings), 1)) < 4.5
    monkeypatch.setattr(hmc, "kinetic", lambda momentum: 0.0)  # an acceptance that forgets the momentum
    assert abs(z_score(ratios(settings), 1)) > 8


def test_steps_that_follow_their_own_chains_would_not_do(monkeypatch):
    """Why the steps come from a preliminary run: with others log p(x) would be no lower bound."""
    settings, own = Annealing(20_000, 20, 1, "linear"), [torch.tensor([[0.9]], dtype=torch.float64)]

    def following(bridge, point, beta, step, leapfrog):
        point, acceptance = move(bridge, point, beta, own[0], leapfrog)
        own[0] = torch.where(acceptance < 0.9, 1e-9, own[0])  # a chain rests once it was hard to go on
        return point, acceptance

    monkeypatch.setattr(annealing, "steps_for", lambda *_: own * 19)
    assert abs(z_score(ratios(settings), 1)) < 4.5
    monkeypatch.setattr(annealing, "move", following)
    assert z_score(ratios(settings), 1) > 8


def test_one_temperature_is_importance_sampling():
    model, x = linear_gaussian(), torch.randn(6, 2, dtype=torch.float64)
    torch.manual_seed(3)
    annealed = ais(model, x, Annealing(50, 1, start="posterior"))
    torch.manual_seed(3)
    sampled = importance_sample(model, x, 50)
    torch.testing.assert_close(annealed.log_px, sampled.log_px)
    torch.testing.assert_close(annealed.ess, sampled.ess)
    assert annealed.acceptance.isnan().all()


@pytest.mark.parametrize("temperatures", [1, 7])
def test_everything_is_exact_where_q_is_the_posterior(temperatures):
    model = linear_gaussian(variance=0.5, distance=0.0)
    settings = Annealing(3, temperatures, 2, start="posterior")
    x = torch.randn(5, 2, dtype=torch.float64)
    expected = model.exact_log_px(x).detach().expand(3, 5)
    torch.testing.assert_close(ais(model, x, settings).log_w, expected, rtol=0, atol=1e-12)
    found = bdmc(model, 5, settings)
    for bound in (found.lower, found.upper):
        torch.testing.assert_close(bound, model.exact_log_px(found.x).detach(), rtol=0, atol=1e-12)


def test_steps_fit_each_datum_and_chains_agree_with_the_closed_form():
    scales = [0.01, 0.3, 100.0]
    model, x = Scaled(scales), torch.tensor([[0.5], [-1.0], [30.0]], dtype=torch.float64)
    found = ais(model, x, Annealing(200, 80, 3))
    assert found.log_w.shape == (200, 3) and found.log_w.dtype == torch.float64
    assert ((found.acceptance > 0.5) & (found.acceptance < 0.85)).all()
    steps = steps_for(Bridge(model, x, "prior"), Annealing(1, 80, 3))
    assert len(steps) == 79 and steps[-1][0] < 0.1 * steps[-1][1] < steps[-1][2]
    exact = scipy.stats.norm.logpdf(x[:, 0], scale=np.hypot(1, scales))
    for b in range(3):
        assert abs(z_score(torch.exp(found.log_w[:, b] - exact[b]), 1)) < 4.5
    np.testing.assert_allclose(found.log_px, exact, atol=0.2)


def test_px_of_a_decoder_network_by_quadrature():
    torch.set_default_dtype(torch.float64)
    model = MLP(pixels=9, latent=1, hidden=[16])
    with torch.no_grad():
        for layer in (0, 2):
            model.generative[layer].weight.mul_(2)  # far from linear
            model.generative[layer].bias.normal_()
        nodes, weights = np.polynomial.hermite_e.hermegauss(200)
        x = torch.bernoulli(torch.full((3, 9), 0.5))
        log_lik = model.likelihood(torch.from_numpy(nodes).view(200, 1, 1)).log_prob(x)
    exact = scipy.special.logsumexp(log_lik, axis=0, b=(weights / weights.sum())[:, None])
    for start in ("prior", "posterior"):
        log_w = ais(model, x, Annealing(1_000, 25, 3, start=start)).log_w
        for b in range(3):
            assert abs(z_score(torch.exp(log_w[:, b] - exact[b]), 1)) < 4.5
            assert abs(z_score(torch.exp(log_w[:, b] - exact[b] - 0.3), 1)) > 4.5


# --- from both sides --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("start", ["prior", "posterior"])
def test_weights_on_the_way_back_average_to_one_over_px(start):
    model, settings = linear_gaussian(distance=0.4), Annealing(40_000, 5, 3, start=start)
    x = same_data(1)
    bridge = Bridge(model, x, start)
    steps = steps_for(bridge, settings)
    exact = model.exact_log_px(x).detach()
    back = anneal(bridge, model.exact_posterior(x).sample((40_000,)), settings, steps, reverse=True)
    assert abs(z_score(torch.exp(exact - back.log_w[:, 0]), 1)) < 4.5
    mean = model.exact_posterior(x).mean.detach().expand(40_000, 1, 2)  # no draw
    other = anneal(bridge, mean, settings, steps, reverse=True)
    assert abs(z_score(torch.exp(exact - other.log_w[:, 0]), 1)) > 8


def test_both_bounds_enclose_log_px_and_the_gap_shrinks():
    model, gaps = linear_gaussian(dim=4), []
    for temperatures in (2, 16, 64):
        found = bdmc(model, 500, Annealing(2, temperatures, 3))
        exact = model.exact_log_px(found.x).detach()
        assert z_score(found.lower - exact, 0) < 4.5 and z_score(found.upper - exact, 0) > -4.5
        gaps.append((found.upper - found.lower).mean())
    assert z_score(found.lower - exact, 0) < 0 < z_score(found.upper - exact, 0)
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0


def test_simulated_data_are_the_models_own():
    model = linear_gaussian()
    x = bdmc(model, 5_000, Annealing(1, 1)).x
    for d in range(2):
        assert scipy.stats.kstest(x[:, d], scipy.stats.norm(model.mu[d].item(), math.sqrt(2)).cdf).pvalue > 1e-4


class Conditional(nn.Module):
    """z ~ N(y, 1), x | z ~ N(z, 1): p(x | y) = N(y, 2)."""

    inference = generative = None

    def prior(self, y):
        return Independent(Normal(y[:, None].double(), 1.0), 1)

    def posterior(self, x, y):
        return Independent(Normal((x + y[:, None]) / 2, 1.0), 1)

    def likelihood(self, z, y):
        return Independent(Normal(z, 1.0), 1)


@pytest.mark.parametrize("start", ["prior", "posterior"])
def test_a_conditional_network_at_its_labels(start):
    y = torch.tensor([0, 5, -3])
    model, settings = given(Conditional(), y), Annealing(400, 6, 3, start=start)
    x = torch.tensor([[0.5], [4.0], [-3.0]], dtype=torch.float64)
    exact = scipy.stats.norm.logpdf(x[:, 0], y, math.sqrt(2))
    log_w = ais(model, x, settings).log_w
    for b in range(3):
        assert abs(z_score(torch.exp(log_w[:, b] - exact[b]), 1)) < 4.5
    found = bdmc(model, 3, settings)
    np.testing.assert_allclose(found.lower, scipy.stats.norm.logpdf(found.x[:, 0], y, math.sqrt(2)), atol=0.5)
    np.testing.assert_allclose(found.upper, found.lower, atol=0.5)


# --- where it can be had ----------------------------------------------------------------------------------------
def test_it_works_in_inference_mode_and_leaves_the_model_alone():
    model = linear_gaussian()
    with torch.inference_mode():
        x = torch.zeros(3, 2, dtype=torch.float64)
        found = ais(model, x, Annealing(2, 3, 2))
        both = bdmc(model, 3, Annealing(2, 3, 2))
        assert torch.is_inference_mode_enabled()
    assert not found.log_w.is_inference() and both.upper.isfinite().all()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def mixture():
    two = Independent(Normal(torch.tensor([[-1.0], [1.0]], dtype=torch.float64), 1.0), 1)
    return MixtureSameFamily(torch.distributions.Categorical(torch.ones(2)), two)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (Independent(Bernoulli(torch.full((1,), 0.5)), 1), "Got a discrete one: the prior's support is Boolean"),
        (Independent(LogNormal(torch.zeros(1), 1.0), 1), "Got a bounded one: the prior's support is GreaterThan"),
        (Independent(Uniform(torch.zeros(1), 1.0), 1), "continuous and unbounded. Got a bounded one"),
    ],
)
def test_z_that_cannot_follow_a_gradient_is_refused(prior, message):
    with pytest.raises(ValueError, match=message):
        ais(Scaled([1.0], prior), torch.zeros(1, 1), Annealing(2, 3))
    with pytest.raises(ValueError, match=message):
        bdmc(Scaled([1.0], prior), 1, Annealing(2, 3))


def test_a_mixture_is_unbounded():
    found = ais(Scaled([1.0], mixture()), torch.zeros(1, 1, dtype=torch.float64), Annealing(4000, 4, 3))
    exact = scipy.stats.norm.logpdf(1, scale=math.sqrt(2))  # either component, as far from 0
    assert abs(z_score(torch.exp(found.log_w[:, 0] - exact), 1)) < 4.5


def test_a_likelihood_without_gradient_is_refused():
    model = Scaled([1.0])
    model.likelihood = lambda z: Independent(Normal(z.detach().round(), 1.0), 1)
    with pytest.raises(ValueError, match=r"gradient of log p\(x \| z\), which has none"):
        ais(model, torch.zeros(1, 1, dtype=torch.float64), Annealing(2, 3))


def test_weights_that_are_nan_are_not_hidden():
    model = Scaled([1.0, 1.0])
    model.likelihood = lambda z: Independent(Normal(z * torch.tensor([[1.0], [math.nan]]), 1.0, validate_args=False), 1)
    found = ais(model, torch.zeros(2, 1, dtype=torch.float64), Annealing(2, 3))
    assert found.log_px.isnan().tolist() == [False, True]


# --- the networks -----------------------------------------------------------------------------------------------
NETWORKS = {
    "two layers": lambda: TwoLayer(9, [3, 2], [[8], [6]]),
    "mixture prior, flow": lambda: MLP(9, 2, [8], prior="mixture", posterior="flow"),
    "Vamp prior, full covariance": lambda: MLP(9, 2, [8], prior="vamp", posterior="full"),
    "learnt scale": lambda: MLP(9, 2, [8], likelihood="gaussian"),
}


@pytest.mark.parametrize("start", ["prior", "posterior"])
@pytest.mark.parametrize("name", NETWORKS)
def test_px_of_every_kind_of_network_is_the_mean_likelihood(name, start):
    torch.set_default_dtype(torch.float64)
    model, x = NETWORKS[name](), torch.bernoulli(torch.full((3, 9), 0.5))
    with torch.no_grad():
        log_lik = model.likelihood(model.prior().sample((50_000, 1))).log_prob(x)
    log_w = ais(model, x, Annealing(300, 40, 3, start=start)).log_w
    for b in range(3):
        shift = log_lik[:, b].logsumexp(0) - math.log(50_000)
        a, p = torch.exp(log_w[:, b] - shift), torch.exp(log_lik[:, b] - shift)
        se = math.hypot(a.std() / math.sqrt(300), p.std() / math.sqrt(50_000))
        assert abs(a.mean() - 1) < 4.5 * se and se < 0.15


def test_the_discrete_network_is_refused():
    with pytest.raises(ValueError, match="Got a discrete one: the prior's support is Boolean"):
        ais(Discrete(9, 4, [8]), torch.zeros(2, 9), Annealing(2, 3))

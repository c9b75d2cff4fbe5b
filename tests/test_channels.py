"""Beyond the path of a reparameterised q: discrete z, several estimators on one draw, sleep's dreams, GDReG's prior."""

import inspect
import math

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from lightning_iwae import Side, iw_loss, routing
from lightning_iwae.estimators import PHI, THETA
from lightning_iwae.models import MLP, LinearGaussian
from lightning_iwae.sides import without_path

S, B, Z, X = 12, 4, 3, 5
OPTIONS = {"beta": 0.3, "alpha": 0.4, "partition": 3, "gamma": 0.5}


@pytest.fixture(autouse=True)
def double_precision_one_thread_and_a_seed():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)


def side(table, name, particles=4):
    options = {p: OPTIONS[p] for p in inspect.signature(table[name]).parameters if p in OPTIONS}
    return Side(name, particles, **options)


class Discrete(MLP):
    """z is binary, uniform in advance."""

    def prior(self):
        return Independent(Bernoulli(probs=torch.full((Z,), 0.5)), 1)

    def posterior(self, x):
        return Independent(Bernoulli(logits=self.inference(x)[..., :Z]), 1)


class LearntPrior(MLP):
    """p(z) = N(mean, diag scale^2), both learnt."""

    def __init__(self):
        super().__init__(X, Z, [6])
        decoder = self.generative
        self.generative = nn.ModuleDict(
            {"net": decoder, "prior": nn.ParameterDict({"mean": torch.randn(Z), "log_scale": 0.3 * torch.randn(Z)})}
        )

    def prior(self):
        p = self.generative["prior"]
        return Independent(Normal(p["mean"], p["log_scale"].exp()), 1)

    def likelihood(self, z):
        return Independent(Bernoulli(logits=self.generative["net"](z)), 1)


def batch():
    return torch.bernoulli(torch.full((B, X), 0.4))


def ascent(loss, parameters):
    return [-g for g in torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)]


# --- discrete z -------------------------------------------------------------------------------------------------

WITHOUT_PATH = {"tvo", "wake", "score", "rloo", "vimco", "vimco-arithmetic", "ovis", "sleep"}


def test_which_estimators_do_without_a_path():
    assert set(without_path()) == WITHOUT_PATH


@pytest.mark.parametrize("name", sorted(set(PHI) - WITHOUT_PATH))
def test_path_estimators_are_refused_for_discrete_z(name):
    message = rf"phi: estimator '{name}' needs a reparameterised posterior.*Got Independent\(Bernoulli\).*vimco"
    with pytest.raises(ValueError, match=message):
        iw_loss(Discrete(X, Z, [6]), batch(), samples=S, theta=Side("iwae", S), phi=side(PHI, name))


@pytest.mark.parametrize("method", ["auto", "separate"])
@pytest.mark.parametrize("name", sorted(WITHOUT_PATH - {"sleep"}))
def test_score_estimators_on_discrete_z_are_autograd_s_of_their_surrogate(name, method):
    model, x = Discrete(X, Z, [6]), batch()
    for _ in range(3):
        drawn = routing.draw(model, x, S, method)
        assert set(drawn.z.unique().tolist()) == {0.0, 1.0}
        phi, theta = side(PHI, name), Side("iwae", S)
        loss = routing.loss(drawn, theta, phi)
        _, s = phi.phi(drawn.log_w)
        z = drawn.z_held.detach()
        score = (s * model.posterior(x).log_prob(z)).sum() / B
        (a,) = (theta.theta(drawn.log_w),)
        joint = (a * (model.prior().log_prob(z) + model.likelihood(z).log_prob(x))).sum() / B
        for network, surrogate in ((model.inference, score), (model.generative, joint)):
            parameters = list(network.parameters())
            for g, h in zip(ascent(loss, parameters), torch.autograd.grad(surrogate, parameters), strict=True):
                torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-13)


# --- several estimators on one draw -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "separate"])
def test_gradients_of_one_draw_are_those_of_each_loss(method):
    model, x = LearntPrior(), batch()
    phi, theta = list(model.inference.parameters()), list(model.generative.parameters())
    phi_sides = [side(PHI, name, k) for name in PHI if name != "sleep" for k in (2, 4)]
    theta_sides = [side(THETA, name, k) for name in THETA for k in (4, 12)]
    drawn = routing.draw(model, x, S, method)
    for one, found in zip(phi_sides, routing.phi_gradients(drawn, phi_sides, phi), strict=True):
        for g, h in zip(found, ascent(routing.loss(drawn, Side("iwae", S), one), phi), strict=True):
            torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-14)
    for one, found in zip(theta_sides, routing.theta_gradients(drawn, theta_sides), strict=True):
        for g, h in zip(found, ascent(routing.loss(drawn, one, Side("vimco", 4)), theta), strict=True):
            torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-14)


# --- sleep ------------------------------------------------------------------------------------------------------


def sleep_gradients(model, x, samples, particles):
    loss = iw_loss(model, x, samples=samples, theta=Side("iwae", samples), phi=Side("sleep", particles))
    return ascent(loss, [model.inference.bias, model.inference.weight, *model.generative.parameters()])


def test_sleep_s_expectation_is_the_closed_form_and_not_wake_s():
    """E over x, z ~ p of (z - A x - b) / s2 and of its product with x; z-scores over 400 batches of 100 dreams."""
    dim, replicates = 2, 400
    model = LinearGaussian(dim, 2 / 3)
    with torch.no_grad():
        model.mu.copy_(torch.tensor([0.6, -0.3])), model.inference.weight.copy_(torch.tensor([[0.2, 0.1], [0.0, 0.7]]))
        model.inference.bias.copy_(torch.tensor([0.4, 0.1]))
    mu, A, b = model.mu.detach(), model.inference.weight.detach(), model.inference.bias.detach()
    second = 2 * torch.eye(dim) + torch.outer(mu, mu)  # E[x x'], and E[z x'] = I + mu mu'
    of_b = (mu - A @ mu - b) / model.variance
    of_A = (torch.eye(dim) + torch.outer(mu, mu) - A @ second - torch.outer(b, mu)) / model.variance
    x = torch.full((50, dim), 7.0)  # has no part in it
    draws = [sleep_gradients(model, x, 4, 2)[:2] for _ in range(replicates)]
    sample = torch.stack([torch.cat([g.flatten() for g in d]) for d in draws])
    exact, se = torch.cat([of_b, of_A.flatten()]), sample.std(0) / math.sqrt(replicates)
    assert ((sample.mean(0) - exact) / se).abs().max() < 4.5
    assert ((sample.mean(0) - 1.05 * exact) / se).abs().max() > 4.5


def test_sleep_leaves_theta_and_the_logged_bound_alone():
    model, x = LearntPrior(), batch()
    theta = list(model.generative.parameters())
    torch.manual_seed(3)
    awake = iw_loss(model, x, samples=S, theta=Side("iwae", S), phi=Side("wake", 4))
    torch.manual_seed(3)
    asleep = iw_loss(model, x, samples=S, theta=Side("iwae", S), phi=Side("sleep", 4))
    torch.testing.assert_close(asleep, awake, rtol=1e-14, atol=0)
    for g, h in zip(ascent(awake, theta), ascent(asleep, theta), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-13, atol=1e-15)


def test_dreams_are_m_a_datum_of_the_model():
    model, x = LearntPrior(), batch()
    seen = []
    posterior = model.posterior
    model.posterior = lambda value: seen.append(value) or posterior(value)
    iw_loss(model, x, samples=S, theta=Side("iwae", S), phi=Side("sleep", 4))
    assert [v.shape for v in seen] == [x.shape] * (1 + 3) and torch.equal(seen[0], x)
    assert all(set(v.unique().tolist()) <= {0.0, 1.0} for v in seen[1:])


# --- GDReG ------------------------------------------------------------------------------------------------------


def test_gdreg_of_one_draw_by_hand():
    """theta's net as plain IWAE; the prior's mean gets sum v and its log scale sum v (z - mean).

    v = w~ d log p(x|z) / dz - w~^2 d log w / dz.
    """
    model, x = LearntPrior(), batch()
    prior = model.generative["prior"]
    drawn = routing.draw(model, x, S)
    loss = routing.loss(drawn, Side("gdreg", S), Side("dreg", S))
    found = ascent(loss, [prior["mean"], prior["log_scale"], *model.generative["net"].parameters()])

    z = drawn.z.detach().requires_grad_()
    log_likelihood = model.likelihood(z).log_prob(x)
    log_w = log_likelihood + model.prior().log_prob(z) - model.posterior(x).log_prob(z)
    w = log_w.detach().softmax(0)
    (of_likelihood,) = torch.autograd.grad(log_likelihood.sum(), z, retain_graph=True)
    (of_w,) = torch.autograd.grad(log_w.sum(), z, retain_graph=True)
    v = (w[..., None] * of_likelihood - w[..., None] ** 2 * of_w) / B
    torch.testing.assert_close(found[0], v.sum((0, 1)), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(
        found[1], (v * (z.detach() - prior["mean"].detach())).sum((0, 1)), rtol=1e-10, atol=1e-14
    )
    plain = torch.autograd.grad((w * log_likelihood).sum() / B, list(model.generative["net"].parameters()))
    for g, h in zip(found[2:], plain, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-14)
    assert (found[0] - torch.autograd.grad((w * log_w).sum() / B, prior["mean"])[0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_a_reparameterised_prior_is_z_and_moves_with_its_parameters(kind):
    mean, root, z = (
        torch.randn(Z, requires_grad=True),
        torch.randn(Z, Z).tril() + 3 * torch.eye(Z),
        torch.randn(S, B, Z),
    )
    if kind == "diagonal":
        p, L = Independent(Normal(mean, root.diagonal()), 1), root.diagonal().diag()
    else:
        p, L = MultivariateNormal(mean, scale_tril=root), root
    moved, seed = routing.reparameterised(p, z), torch.randn(S, B, Z)
    torch.testing.assert_close(moved, z, rtol=1e-13, atol=1e-13)
    (of_mean,) = torch.autograd.grad(moved, mean, seed)
    torch.testing.assert_close(of_mean, seed.sum((0, 1)))
    e = torch.randn(Z)  # at T(e) the path is e itself
    torch.testing.assert_close(routing.reparameterised(p, mean.detach() + L @ e), mean.detach() + L @ e)


def mixture():
    means = torch.zeros(2, Z, requires_grad=True)
    return MixtureSameFamily(Categorical(logits=torch.zeros(2)), Independent(Normal(means, 1.0), 1))


@pytest.mark.parametrize(("prior", "message"), [
    (lambda: Independent(Normal(torch.zeros(Z), 1.0), 1), r"needs a learnt prior\. prior\(\) is Independent\(Normal\)"),
    (mixture, r"needs a prior\(\) that is normal, or has a method reparameterise\(z\)\. Got MixtureSameFamily"),
])  # fmt: skip
def test_a_prior_that_gdreg_can_t_take_is_refused(prior, message):
    model = MLP(X, Z, [6])
    model.prior = prior
    with pytest.raises(ValueError, match=message):
        iw_loss(model, batch(), samples=S, theta=Side("gdreg", S), phi=Side("dreg", S))


def test_gdreg_is_refused_below_kl_weight_1():
    with pytest.raises(ValueError, match="theta: estimator 'gdreg' can't be used with a KL weight below 1"):
        iw_loss(LearntPrior(), batch(), samples=S, theta=Side("gdreg", S), phi=Side("iwae", S), kl_weight=0.5)


@pytest.mark.parametrize("name", ["tvo", "rloo", "vimco", "vimco-arithmetic", "ovis"])
def test_estimators_that_compare_particles_need_two_and_name_the_key(name):
    message = rf"model.phi.particles: estimator '{name}' needs at least 2 particles.*Got 1"
    with pytest.raises(ValueError, match=message):
        side(PHI, name, 1).check("model.phi", 8)

"""Every network, likelihood, posterior and prior: densities against SciPy, gradients both ways, whole runs."""

import itertools
import json
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch.distributions import Independent

import lightning_iwae
from lightning_iwae import Side, cli, iw_loss, routing
from lightning_iwae.evaluation import importance_sample
from lightning_iwae.models import MLP, Convolutional, Discrete, TwoLayer
from lightning_iwae.models.likelihoods import LogisticLevels
from lightning_iwae.models.posteriors import FullCovariance

S, B, X = 6, 4, 64
LIKELIHOODS = ("bernoulli", "gaussian", "discretised-logistic")
POSTERIORS = ("diagonal", "full", "flow")
PRIORS = ("standard", "normal", "mixture", "vamp")


@pytest.fixture(autouse=True)
def double_precision_one_thread_and_a_seed():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)


def small(kind, **settings):
    """A network of 64 pixels."""
    return {
        "mlp": lambda: MLP(X, 3, [8], components=4, **settings),
        "conv": lambda: Convolutional(X, 3, [3, 5], components=4, **settings),
        "two": lambda: TwoLayer(X, [4, 3], [[8], [6]], **settings),
        "discrete": lambda: Discrete(X, 5, [8], **settings),
    }[kind]()


def networks():
    for likelihood in LIKELIHOODS:
        for kind in ("two", "discrete"):
            yield pytest.param(kind, {"likelihood": likelihood}, id=f"{kind}-{likelihood}")
    for posterior, prior in itertools.product(POSTERIORS, PRIORS):
        if (posterior, prior) != ("flow", "vamp"):
            for kind in ("mlp", "conv"):
                settings = {"posterior": posterior, "prior": prior}
                yield pytest.param(kind, settings, id=f"{kind}-{posterior}-{prior}")
    for likelihood in LIKELIHOODS[1:]:
        yield pytest.param("mlp", {"likelihood": likelihood}, id=f"mlp-{likelihood}")


every_network = pytest.mark.parametrize(("kind", "settings"), list(networks()))


def data(binary=False):
    x = (torch.rand(B, X) * 255).round() / 255
    return (x > 0.5).to(x) if binary else x


def moved(model):
    """The network away from where it starts, where some gradients are zero."""
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


# --- all of them ------------------------------------------------------------------------------------------------


@every_network
def test_densities_have_the_shape_of_samples_and_gradients_are_the_same_both_ways(kind, settings):
    model, x = moved(small(kind, **settings)), data()
    phi = Side("vimco" if kind == "discrete" else "dreg", 3)
    found = []
    for method in ("auto", "separate"):
        for _ in range(3):  # the third relies on the proof
            torch.manual_seed(1)
            model.zero_grad()
            drawn = routing.draw(model, x, S, method)
            routing.loss(drawn, Side("iwae", S), phi).backward()
        assert drawn.log_w.shape == (S, B) and drawn.log_w.isfinite().all()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-9, atol=1e-12)
        assert gradient.any(), name


@every_network
def test_gradients_are_autograd_s_of_the_bound(kind, settings):
    model, x = moved(small(kind, **settings)), data()
    drawn = routing.draw(model, x, S)
    loss = routing.loss(drawn, Side("iwae", S), Side("vimco" if kind == "discrete" else "iwae", S))
    z = drawn.z
    log_w = model.likelihood(z).log_prob(x) + model.prior().log_prob(z) - model.posterior(x).log_prob(z)
    plain = -(torch.logsumexp(log_w, 0) - math.log(S)).mean()
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
    theta = list(model.generative.parameters())
    phi = [] if kind == "discrete" else list(model.inference.parameters())  # no total derivative through discrete z
    ours = torch.autograd.grad(loss, theta + phi, retain_graph=True)
    for g, h in zip(ours, torch.autograd.grad(plain, theta + phi), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "conv", "two", "discrete"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_network_starts_at_the_mean_of_its_data(kind, likelihood):
    model, mean = small(kind, likelihood=likelihood), torch.linspace(0.1, 0.9, X)
    model.set_data_mean(mean)
    if likelihood == "discretised-logistic":  # near an end of [0, 1] levels pile up
        model.generative.get_parameter("likelihood.log_scale").data.fill_(-5.0)
    model.generative.apply(lambda m: m.weight.data.zero_() if hasattr(m, "weight") else None)
    z = model.prior().sample((1, 2))
    torch.testing.assert_close(model.likelihood(z).mean[0, 0], mean, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"network.pixels is 64, but data have shape \(3,\)"):
        model.set_data_mean(torch.zeros(3))


# --- likelihoods ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [-3.0, -0.5, -0.123, 0.0, 0.4, 7.0])
@pytest.mark.parametrize("log_scale", [-6.0, -3.0, 0.0, 2.0])
def test_the_probabilities_of_256_levels_sum_to_one_and_are_the_logistic_s(mean, log_scale):
    p = LogisticLevels(torch.tensor(mean), torch.tensor(log_scale))
    levels = torch.arange(256) / 255
    log_p = p.log_prob(levels).numpy()
    assert abs(np.exp(log_p).sum() - 1) < 1e-12
    edges = scipy.stats.logistic(mean + 0.5, math.exp(log_scale) + 1e-3).cdf((np.arange(255) + 0.5) / 255)
    expected = np.diff(np.concatenate([[0.0], edges, [1.0]]))
    np.testing.assert_allclose(np.exp(log_p), expected, rtol=1e-6, atol=1e-14)
    np.testing.assert_allclose(p.mean.item(), (expected * np.arange(256) / 255).sum(), rtol=1e-9, atol=1e-12)
    single = LogisticLevels(torch.tensor(mean).float(), torch.tensor(log_scale).float()).log_prob(levels.float())
    assert single.isfinite().all()
    np.testing.assert_allclose(single.numpy(), log_p, rtol=2e-3, atol=2e-3)


def test_levels_are_drawn_with_their_probabilities():
    p = LogisticLevels(torch.tensor(-0.48), torch.tensor(-2.0))
    n = 200_000
    counts = torch.bincount((p.sample((n,)) * 255).round().long(), minlength=256)
    expected = p.log_prob(torch.arange(256) / 255).exp() * n
    kept = expected > 20
    z = ((counts - expected) / expected.sqrt())[kept]
    assert z.abs().max() < 4.5 and kept.sum() > 50
    twin = ((counts - expected.roll(1)) / expected.roll(1).sqrt())[kept]
    assert twin.abs().max() > 4.5


def test_the_gaussian_likelihood_is_scipy_s():
    model, x, z = small("mlp", likelihood="gaussian"), data(), torch.randn(S, B, 3)
    mean, scale = model.generative(z).detach().numpy(), math.exp(-1.0) + 1e-3
    expected = scipy.stats.norm(mean, scale).logpdf(x.numpy()).sum(-1)
    np.testing.assert_allclose(model.likelihood(z).log_prob(x).detach().numpy(), expected, rtol=1e-12)


# --- posteriors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent", [1, 3])
def test_a_full_covariance_is_scipy_s(latent):
    head = FullCovariance(latent)
    output = torch.randn(2, head.width)
    q, z = head(output), torch.randn(5, 2, latent)
    for b in range(2):
        L = np.zeros((latent, latent))
        row = 2 * latent
        for i in range(latent):
            L[i, i] = math.exp(output[b, latent + i])
            for j in range(i):
                L[i, j], row = output[b, row], row + 1
        exact = scipy.stats.multivariate_normal(output[b, :latent].numpy(), L @ L.T)
        np.testing.assert_allclose(q.log_prob(z)[:, b].numpy(), exact.logpdf(z[:, b].numpy()), rtol=1e-10)


def test_a_flow_s_density_is_that_of_its_samples():
    """Integrates to one in two dimensions, by a grid, and is no normal's."""
    model = MLP(X, 2, [8], posterior="flow")
    for p in model.inference.posterior.parameters():  # from couplings that do nothing
        p.data += 0.05 * torch.randn_like(p)
    q = model.posterior(data()[:1])
    side = torch.linspace(-16, 16, 641)
    grid = torch.cartesian_prod(side, side)[:, None]
    with torch.no_grad():
        p = q.log_prob(grid)[:, 0].exp() * (32 / 640) ** 2
        z = q.sample((20_000,))[:, 0]
    assert abs(p.sum() - 1) < 1e-3
    mean = p @ grid[:, 0]
    error = (z.mean(0) - mean) / (z.std(0) / math.sqrt(len(z)))
    assert error.abs().max() < 4.5


# --- priors -----------------------------------------------------------------------------------------------------


def test_a_mixture_is_scipy_s():
    model = moved(small("mlp", prior="mixture"))
    prior, z = model.generative.prior, torch.randn(S, B, 3)
    weights = scipy.special.softmax(prior.logits.detach().numpy())
    parts = [
        scipy.stats.norm(m, np.exp(s)).logpdf(z.numpy()).sum(-1)
        for m, s in zip(prior.means.detach().numpy(), prior.log_scales.detach().numpy(), strict=True)
    ]
    expected = scipy.special.logsumexp(np.stack(parts, -1), b=weights, axis=-1)
    np.testing.assert_allclose(model.prior().log_prob(z).detach().numpy(), expected, rtol=1e-11)


@pytest.mark.parametrize("posterior", ["diagonal", "full"])
def test_a_vamp_prior_is_the_mean_of_q_at_its_pseudo_inputs(posterior):
    model = moved(small("mlp", prior="vamp", posterior=posterior))
    u, z = torch.sigmoid(model.generative.prior.pseudo_inputs), torch.randn(S, B, 3)
    each = torch.stack([model.posterior(u_k[None]).log_prob(z) for u_k in u])
    torch.testing.assert_close(model.prior().log_prob(z), each.logsumexp(0) - math.log(4), rtol=1e-10, atol=1e-10)


def test_a_vamp_prior_s_encoder_is_held():
    model, z = small("mlp", prior="vamp"), torch.randn(S, B, 3)
    log_p = model.prior().log_prob(z).sum()
    found = torch.autograd.grad(log_p, list(model.inference.parameters()), allow_unused=True)
    assert all(g is None for g in found)


# --- two layers -------------------------------------------------------------------------------------------------


def test_two_layers_are_the_paper_s_size():
    model = TwoLayer()
    widths = [784, 200, 200, 200], [100, 100, 100, 100], [50, 100, 100, 200], [100, 200, 200, 784]
    expected = sum((a + 1) * b for w in widths for a, b in itertools.pairwise(w))
    assert sum(p.numel() for p in model.parameters()) == expected


def test_two_layers_densities_are_scipy_s():
    model, x = moved(small("two")), data(binary=True)
    z = torch.randn(S, B, 7)
    z1, z2 = z[..., :4], z[..., 4:]

    def normal(output, value):
        mean, log_scale = np.split(output.detach().numpy(), 2, -1)
        return scipy.stats.norm(mean, np.exp(log_scale)).logpdf(value.numpy()).sum(-1)

    q = normal(model.inference["first"](x), z1) + normal(model.inference["second"](z1), z2)
    np.testing.assert_allclose(model.posterior(x).log_prob(z).detach().numpy(), q, rtol=1e-11)
    p = scipy.stats.norm().logpdf(z2.numpy()).sum(-1) + normal(model.generative["second"](z2), z1)
    np.testing.assert_allclose(model.prior().log_prob(z).detach().numpy(), p, rtol=1e-11)
    torch.testing.assert_close(model.likelihood(z).log_prob(x), model.likelihood(z1).log_prob(x))


@pytest.mark.parametrize("stretch", [1.0, 1.05])
def test_two_layers_sample_what_they_say(stretch):
    """E[grad log p(z)] = 0 for z ~ p, of both layers' output biases; and not for z a little stretched."""
    model, x = small("two"), data(binary=True)
    for distribution, layers in (
        (model.posterior(x[:1]), [*model.inference.values()]),
        (model.prior(), [model.generative["second"]]),
    ):
        biases, scores = [layer.last.bias for layer in layers], []
        for _ in range(400):
            z = stretch * distribution.sample((40, 1) if not distribution.batch_shape else (40,))
            log_p = distribution.log_prob(z).mean()
            scores.append(torch.cat(torch.autograd.grad(log_p, biases, retain_graph=True)))
        scores = torch.stack(scores)
        z = scores.mean(0) / (scores.std(0) / math.sqrt(len(scores)))
        assert (z.abs().max() < 4.5) == (stretch == 1.0)


def test_a_two_layer_prior_reparameterised_is_z_and_moves_with_theta_by_hand():
    model = moved(small("two"))
    z, seed = torch.randn(S, B, 7), torch.randn(S, B, 7)
    again = model.prior().reparameterise(z)
    torch.testing.assert_close(again, z, rtol=1e-12, atol=1e-12)
    parameters = list(model.generative["second"].parameters())
    found = torch.autograd.grad(again, parameters, seed)
    mean, log_scale = model.generative["second"](z[..., 4:]).chunk(2, -1)
    noise = ((z[..., :4] - mean) / log_scale.exp()).detach()
    by_hand = (seed[..., :4] * mean).sum() + (seed[..., :4] * noise * log_scale.exp().detach() * log_scale).sum()
    for g, h in zip(found, torch.autograd.grad(by_hand, parameters), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-12)


def test_gdreg_s_expectation_on_two_layers_is_plain_iwae_s():
    """Paired z-scores of eight projections of p(z1 | z2)'s gradient, over 300 draws of ten copies of a datum."""
    model, x = small("two"), data(binary=True)[:1]
    K, rounds = 3, 300
    plain, generalised = [], []
    directions = None
    for _ in range(rounds):
        drawn = routing.draw(model, x.expand(10, -1), K)
        for kept, g in zip(
            (plain, generalised), routing.theta_gradients(drawn, [Side("iwae", K), Side("gdreg", K)]), strict=True
        ):
            flat = torch.cat([v.flatten() for v, p in zip(g, drawn.theta, strict=True)])
            if directions is None:
                directions = torch.randn(len(flat), 8) / math.sqrt(len(flat))
                second = torch.cat(
                    [
                        torch.full((p.numel(),), float(any(p is q for q in model.generative["second"].parameters())))
                        for p in drawn.theta
                    ]
                )
                directions = directions * second[:, None]
            kept.append(flat @ directions)
    a, b = torch.stack(plain), torch.stack(generalised)
    z = (a - b).mean(0) / ((a - b).std(0) / math.sqrt(rounds))
    assert z.abs().max() < 4.5
    twin = a - 1.5 * b
    assert (twin.mean(0) / (twin.std(0) / math.sqrt(rounds))).abs().max() > 4.5


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "message"), [
    (lambda: MLP(X, 1, [4], posterior="flow"), "network.latent must be at least 2 for a flow"),
    (lambda: MLP(X, 3, [4], posterior="flow", prior="vamp"), "network.prior must not be vamp with"),
    (lambda: MLP(X, 3, [4], likelihood="poisson"), "network.likelihood must be one of bernoulli, gaussian"),
    (lambda: MLP(X, 3, [4], posterior="cauchy"), "network.posterior must be one of diagonal, full, flow"),
    (lambda: MLP(X, 3, [4], prior="flat"), "network.prior must be one of standard, normal, mixture, vamp"),
    (lambda: MLP(X, 3, [4], prior="mixture", components=0), "network.components must be at least 1. Got 0"),
    (lambda: Convolutional(100, 3), "network.pixels must be the square of a multiple of 4. Got 100"),
    (lambda: TwoLayer(X, [4]), "network.latents and network.hidden must have 2 parts"),
    (lambda: Discrete(X, 0), "network.latent must be at least 1. Got 0"),
])  # fmt: skip
def test_bad_settings_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_path_estimator_on_the_discrete_network_is_refused():
    with pytest.raises(ValueError, match=r"needs a reparameterised posterior.*Independent"):
        iw_loss(small("discrete"), data(), samples=4, theta=Side("iwae", 4), phi=Side("dreg", 4))


# --- whole runs -------------------------------------------------------------------------------------------------

RUNS = {
    "two": ["TwoLayer", "--model.network.init_args.pixels", "64", "--model.network.init_args.latents", "[4, 2]",
            "--model.network.init_args.hidden", "[[8], [8]]", "--model.theta.estimator", "gdreg"],
    "discrete": ["Discrete", "--model.network.init_args.pixels", "64", "--model.network.init_args.latent", "5",
                 "--model.phi.estimator", "vimco"],
    "conv": ["Convolutional", "--model.network.init_args.pixels", "64", "--model.network.init_args.latent", "2",
             "--model.network.init_args.channels", "[3, 4]"],
    "flow": ["MLP", "--model.network.init_args.pixels", "64", "--model.network.init_args.posterior", "flow",
             "--model.network.init_args.prior", "mixture"],
    "levels": ["MLP", "--model.network.init_args.pixels", "64", "--model.network.init_args.prior", "vamp",
               "--model.network.init_args.likelihood", "discretised-logistic", "--data.init_args.binarization", "none"],
}  # fmt: skip


FEW = ["{class_path: lightning_iwae.callbacks.Evaluation, init_args: {particles: 30, size: 20}}",
       "{class_path: lightning_iwae.callbacks.Checkpoints, init_args: {monitor: val/log_px}}"]  # fmt: skip
MORE = ["{class_path: lightning_iwae.callbacks.Figures}",
        "{class_path: lightning_iwae.callbacks.GradientSNR, init_args: {draws: 4}}"]  # fmt: skip
CALLBACKS = [f"[{', '.join(FEW)}]", f"[{', '.join(FEW + MORE)}]"]


@pytest.mark.parametrize("name", RUNS)
def test_a_network_is_trained_tested_used_for_prediction_and_loaded(name, tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    network, *settings = RUNS[name]
    run = str(tmp_path / "run")
    args = ["fit", "-c", "conf/digits.yaml", "--model.network", f"lightning_iwae.models.{network}", *settings]
    args += ["--trainer.default_root_dir", run, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
    args += [
        "--trainer.limit_val_batches",
        "1",
        "--trainer.check_val_every_n_epoch",
        "1",
        "--trainer.enable_progress_bar",
        "false",
    ]
    args += ["--trainer.log_every_n_steps", "1", "--trainer.callbacks", CALLBACKS[name == "discrete"]]
    cli.main(args)
    cli.main(["test", run, "--model.test_particles", "50", "--trainer.limit_test_batches", "1"])
    cli.main(["predict", run, "--model.test_particles", "50"])
    result = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert math.isfinite(result["log_px"]["mean"])
    loaded = lightning_iwae.load(run)
    x = loaded.sample(3)
    assert x.shape == (3, 64) and loaded.log_px(x, 30).isfinite().all()
    assert importance_sample(loaded.network, x, 10).log_px.shape == (3,)


def test_independent_bernoulli_has_no_rsample():
    assert isinstance(small("discrete").posterior(data()), Independent)

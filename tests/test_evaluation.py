"""log p(x) by importance sampling against closed forms, whatever the chunks; means and errors against NumPy's."""

import math
from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch.distributions import (
    Bernoulli,
    Independent,
    MultivariateNormal,
    Normal,
    SigmoidTransform,
    TransformedDistribution,
    kl_divergence,
)

from lightning_iwae.diagnostics import Tail, pareto_k
from lightning_iwae.evaluation import (
    Totals,
    cached,
    evaluate,
    evaluate_for_means,
    importance_sample,
    mean_variances,
    moment,
    table,
)
from lightning_iwae.models import LinearGaussian
from lightning_iwae.weights import ess


def z_score(sample, expected):
    """Of the mean of independent values, by their own standard error."""
    sample = np.asarray(sample)
    return (sample.mean() - expected) / (sample.std(ddof=1) / math.sqrt(sample.size))


class Script:
    """A model whose log-weights are the rows of `log_w` (K, B) in turn, and which counts what is asked of it."""

    def __init__(self, log_w):
        self.log_w, self.drawn, self.encoded = log_w, [], 0

    def posterior(self, x):
        self.encoded += 1
        return SimpleNamespace(rsample=self.rsample, log_prob=lambda z: torch.full_like(z, 3.0))

    def prior(self):
        return SimpleNamespace(log_prob=lambda z: z + 1)

    def likelihood(self, z):
        return SimpleNamespace(log_prob=lambda x: torch.full_like(z, 2.0))

    def rsample(self, shape):
        start, (n,) = sum(self.drawn), shape
        self.drawn.append(n)
        return self.log_w[start : start + n]


def script(K, B, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Script(scale * torch.randn(K, B, dtype=torch.float64, generator=generator))


# --- streaming ----------------------------------------------------------------------------------------------


def with_huge_values():
    model = script(50, 6)
    model.log_w[:, 1] += 1e4
    model.log_w[:, 2] -= 1e4
    model.log_w[7, 3] = -math.inf
    model.log_w[:, 4] = torch.linspace(-1e4, 1e4, 50)
    model.log_w[0, 5] = -math.inf  # a first chunk of one holds nothing else
    return model


@pytest.mark.parametrize("chunk", [1, 2, 7, 49, 50, 51, 1000, None])
def test_streaming_equals_one_shot(chunk):
    model = with_huge_values()
    log_w = model.log_w.numpy()
    log_px, elbo, fraction, *_ = importance_sample(model, torch.zeros(6, 2), 50, chunk)
    expected = scipy.special.logsumexp(log_w, axis=0) - math.log(50)
    np.testing.assert_allclose(log_px, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(elbo, log_w.mean(0), rtol=1e-12, atol=1e-12)
    w = scipy.special.softmax(log_w, axis=0)
    np.testing.assert_allclose(fraction, 1 / (w**2).sum(0) / 50, rtol=1e-10)
    assert elbo[3] == elbo[5] == -math.inf
    assert torch.isfinite(log_px).all() and torch.isfinite(fraction).all()


@pytest.mark.parametrize("chunk", [1, 7, 49, 50, 51, 1000])
def test_draws_exactly_k_particles_in_chunks_and_encodes_once(chunk):
    model = script(60, 2)
    importance_sample(model, torch.zeros(2, 3), 50, chunk)
    assert sum(model.drawn) == 50
    assert max(model.drawn) == min(chunk, 50)
    assert model.encoded == 1


@pytest.mark.parametrize(("shape", "largest"), [((100, 784), 53), ((2, 2**20), 2), ((4, 2**20), 1), ((9, 2**20), 1)])
def test_default_chunk_holds_four_million_numbers_of_data(shape, largest):
    model = script(60, shape[0])
    importance_sample(model, torch.zeros(1).expand(shape), 60)
    assert max(model.drawn) == largest


@pytest.mark.parametrize("numbers", [1, 12, 7 * 12, 10**9])
def test_what_the_cache_holds_is_decoded_at_once_and_changes_nothing(monkeypatch, numbers):
    model, x = LinearGaussian(4).double(), torch.randn(3, 4, dtype=torch.float64)
    likelihood, decoded = model.likelihood, []
    torch.manual_seed(0)
    expected = importance_sample(model, x, 50)
    monkeypatch.setattr("lightning_iwae.evaluation.cached", lambda device: numbers)
    monkeypatch.setattr(model, "likelihood", lambda z: decoded.append(len(z)) or likelihood(z))
    torch.manual_seed(0)
    for ours, theirs in zip(importance_sample(model, x, 50), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert max(decoded) == min(50, max(1, numbers // 12)) and sum(decoded) == 50
    assert max(decoded) - min(decoded) <= 1


def test_the_caches_size_is_a_number_of_floats():
    torch.set_num_threads(1)
    one = cached(torch.device("cpu"))
    torch.set_num_threads(2)
    assert cached(torch.device("cpu")) == 2 * one and 2**14 <= one <= 2**26
    assert cached(torch.device("meta")) > 2**60


def test_empty_batch():
    for chunk in (3, None):
        for values in importance_sample(script(10, 0), torch.zeros(0, 4), 10, chunk):
            assert values.shape == (0,) and values.dtype == torch.float64
    figures = evaluate(LinearGaussian(3), torch.zeros(0, 3), 70, k_hat=True)
    assert all(values.shape == (0,) for values in figures.values())


def test_one_particle_is_the_elbo():
    log_px, elbo, fraction, *_ = importance_sample(script(1, 5), torch.zeros(5, 4), 1)
    assert torch.equal(log_px, elbo)
    assert torch.equal(fraction, torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("K", [1, 5])
def test_weights_that_are_all_zero(K):
    log_w = torch.full((K, 2), -math.inf, dtype=torch.float64)
    log_px, elbo, fraction, *_ = importance_sample(Script(log_w), torch.zeros(2, 4), K, 2)
    assert (log_px == -math.inf).all() and (elbo == -math.inf).all()
    torch.testing.assert_close(fraction, ess(log_w, 0) / K)


def test_a_weight_that_is_nan_is_not_hidden():
    model = script(5, 2)
    model.log_w[3, 1] = math.nan
    for values in importance_sample(model, torch.zeros(2, 4), 5, 2)[:4]:
        assert values.isnan().tolist() == [False, True]


@pytest.mark.parametrize("chunk", [1, 3000])
def test_sums_are_in_float64_whatever_the_model(chunk):
    log_w = torch.full((3000, 1), -90.3)  # float32
    log_px, elbo, *_ = importance_sample(Script(log_w), torch.zeros(1, 4), 3000, chunk)
    assert log_px.dtype == elbo.dtype == torch.float64
    one = log_w[0, 0].double().item()
    assert log_px.item() == pytest.approx(one, abs=1e-10) and elbo.item() == pytest.approx(one, abs=1e-10)


def test_no_graph_is_kept():
    model = LinearGaussian(3)
    assert not any(values.requires_grad for values in importance_sample(model, torch.zeros(2, 3), 5))
    assert not any(values.requires_grad for values in evaluate(model, torch.zeros(2, 3), 5).values())


@pytest.mark.parametrize(("particles", "chunk", "message"), [(0, None, "particles.*Got 0"), (5, 0, "chunk.*Got 0")])
def test_arguments_below_one_are_refused(particles, chunk, message):
    model = script(5, 2)
    with pytest.raises(ValueError, match=message):
        importance_sample(model, torch.zeros(2, 4), particles, chunk)
    assert not model.encoded


# --- closed forms -------------------------------------------------------------------------------------------


class Oracle:
    """A linear-Gaussian model near its optimum, one datum x (D,) and what reference formulas say of them."""

    def __init__(self, dim=3, variance=2 / 3, distance=0.1, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.model = model = LinearGaussian(dim, variance).double()
        with torch.no_grad():
            model.mu.copy_(torch.randn(dim, generator=generator))
            model.inference.weight.copy_(torch.eye(dim) / 2 + distance * torch.randn(dim, dim, generator=generator))
            model.inference.bias.copy_(model.mu / 2 + distance * torch.randn(dim, generator=generator))
        self.x = torch.randn(dim, dtype=torch.float64, generator=generator) * math.sqrt(2) + model.mu.detach()
        eye, mean = torch.eye(dim, dtype=torch.float64), model.inference(self.x).detach()
        self.q = MultivariateNormal(mean, variance * eye)
        self.posterior = MultivariateNormal((self.x + model.mu.detach()) / 2, eye / 2)
        self.log_px = scipy.stats.multivariate_normal(model.mu.detach(), 2 * eye).logpdf(self.x)
        self.kl = kl_divergence(self.q, self.posterior).item()
        distance = (mean - self.posterior.mean).square().sum().item()
        self.relvar = relative_variance(dim, variance, distance)

    def batch(self, n):
        return self.x.expand(n, -1)


def relative_variance(dim, s2, distance):
    """Var[w] / p(x)^2 of one weight, from the Gaussian integral of p(x, z)^2 / q(z | x)."""
    return (2 * s2) ** dim * (4 * s2 - 1) ** (-dim / 2) * math.exp(2 * distance / (4 * s2 - 1)) - 1


def test_estimate_of_px_is_unbiased():
    torch.manual_seed(0)
    oracle = Oracle()
    ratio = torch.exp(importance_sample(oracle.model, oracle.batch(20_000), 10, 4).log_px - oracle.log_px)
    assert abs(z_score(ratio, 1)) < 4
    # as in scvi-tools: in chunks of 4 it draws 12 and divides by 10
    twelve = torch.exp(importance_sample(oracle.model, oracle.batch(20_000), 12, 4).log_px - oracle.log_px) * 12 / 10
    assert abs(z_score(twelve, 1)) > 8


def test_gap_of_log_px_is_half_the_relative_variance_over_k():
    torch.manual_seed(0)
    oracle = Oracle()
    gap = oracle.log_px - importance_sample(oracle.model, oracle.batch(120_000), 32).log_px
    assert abs(z_score(gap, oracle.relvar / (2 * 32))) < 4
    assert abs(z_score(gap, oracle.relvar / (2 * 64))) > 8


def test_elbo_is_log_px_minus_kl():
    torch.manual_seed(0)
    oracle = Oracle()
    elbo = importance_sample(oracle.model, oracle.batch(2_000), 100).elbo
    assert abs(z_score(elbo, oracle.log_px - oracle.kl)) < 4
    assert abs(z_score(elbo, oracle.log_px - kl_divergence(oracle.posterior, oracle.q).item())) > 8


def test_rate_and_distortion_are_the_two_parts_of_the_elbo():
    torch.manual_seed(0)
    oracle = Oracle()
    found = importance_sample(oracle.model, oracle.batch(2_000), 100, 7)
    torch.testing.assert_close(-(found.rate + found.distortion), found.elbo, rtol=0, atol=1e-12)
    eye, mu = torch.eye(3, dtype=torch.float64), oracle.model.mu.detach()
    rate = kl_divergence(oracle.q, MultivariateNormal(mu, eye)).item()
    residual = (oracle.x - oracle.q.mean).square().sum() + 3 * oracle.model.variance  # E |x - z|^2
    distortion = 1.5 * math.log(2 * math.pi) + residual.item() / 2
    assert rate + distortion == pytest.approx(oracle.kl - oracle.log_px)
    assert abs(z_score(found.rate, rate)) < 4 and abs(z_score(found.distortion, distortion)) < 4
    other = kl_divergence(MultivariateNormal(mu, eye), oracle.q).item()  # the other way round
    assert abs(z_score(found.rate, other)) > 8 and abs(z_score(found.distortion, distortion - 0.1)) > 8


def test_rate_and_distortion_are_sums_of_what_the_distributions_say():
    model = with_huge_values()
    z = model.log_w.numpy()
    found = importance_sample(model, torch.zeros(6, 2), 50, 7)
    np.testing.assert_allclose(found.rate, (3 - (z + 1)).mean(0))
    np.testing.assert_allclose(found.distortion, -2.0)


def test_a_q_that_is_not_reparameterised_will_do():
    class Discrete(LinearGaussian):
        def posterior(self, x):
            return Independent(Bernoulli(torch.full((len(x), 3), 0.25)), 1)

        def prior(self):
            return Independent(Bernoulli(torch.full((3,), 0.5)), 1)

    torch.manual_seed(0)
    model, x = Discrete(3), torch.zeros(3_000, 3)
    z = torch.tensor(list(product((0.0, 1.0), repeat=3)))
    log_px = scipy.stats.norm.logpdf(0, z).sum(1)
    exact = scipy.special.logsumexp(log_px) - 3 * math.log(2)
    found = importance_sample(model, x, 10, 4)
    assert abs(z_score(torch.exp(found.log_px - exact), 1)) < 4
    assert abs(z_score(found.rate, 3 * (0.25 * math.log(0.5) + 0.75 * math.log(1.5)))) < 4


def test_ess_tends_to_one_over_the_second_moment():
    torch.manual_seed(0)
    oracle = Oracle(dim=5)
    fraction = importance_sample(oracle.model, oracle.batch(20), 25_000).ess
    assert abs(z_score(fraction, 1 / (1 + oracle.relvar))) < 4
    assert abs(z_score(fraction, math.exp(-oracle.kl))) > 8


def test_everything_is_exact_at_the_posterior():
    oracle = Oracle(variance=0.5, distance=0.0)
    x = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = scipy.stats.multivariate_normal(oracle.model.mu.detach(), 2 * np.eye(3)).logpdf(x)
    figures = evaluate(oracle.model, x, 70)
    for name in ("log_px", "elbo", "iwae_64"):
        np.testing.assert_allclose(figures[name], exact, atol=1e-12)
    for name in ("kl_q_posterior", "kl_is_64"):
        np.testing.assert_allclose(figures[name], 0, atol=1e-12)
    np.testing.assert_allclose(figures["ess"], 1, atol=1e-12)


def test_the_models_own_closed_forms():
    oracle = Oracle()
    x = oracle.batch(2)
    np.testing.assert_allclose(oracle.model.exact_log_px(x).detach(), oracle.log_px, atol=1e-12)
    np.testing.assert_allclose(oracle.model.exact_kl(x).detach(), oracle.kl, atol=1e-12)


# --- evaluate -----------------------------------------------------------------------------------------------


def test_evaluate_names_its_figures():
    model = script(64 + 100, 2)
    figures = evaluate(model, torch.zeros(2, 3), 100)
    assert list(figures) == ["iwae_64", "log_px", "elbo", "kl_q_posterior", "kl_is_64", "ess", "rate", "distortion"]
    assert sum(model.drawn) == 64 + 100  # L_64 has draws of its own
    log_w = model.log_w.numpy()
    at_64, log_px = (scipy.special.logsumexp(part, axis=0) - math.log(len(part)) for part in np.split(log_w, [64]))
    elbo = log_w[64:].mean(0)
    np.testing.assert_allclose(figures["iwae_64"], at_64, atol=1e-12)
    np.testing.assert_allclose(figures["log_px"], log_px, atol=1e-12)
    np.testing.assert_allclose(figures["elbo"], elbo, atol=1e-12)
    np.testing.assert_allclose(figures["kl_q_posterior"], log_px - elbo, atol=1e-12)
    np.testing.assert_allclose(figures["kl_is_64"], log_px - at_64, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 45, 46, 99, 100, None])
def test_k_hat_in_chunks_is_that_of_all_weights_at_once(chunk):
    model = script(100, 7)
    model.log_w[:, 1] += 1e4
    model.log_w[::2, 2] = -math.inf
    model.log_w[:, 3] = model.log_w[:, 3].round()  # ties
    model.log_w[:, 4] = -90.0
    tail = Tail(100)
    importance_sample(model, torch.zeros(7, 2), 100, chunk, tail.add)
    # with assert_close, as (z + 1 + 2) - 3 rounds
    torch.testing.assert_close(tail.k_hat(), pareto_k(model.log_w, 0), rtol=1e-9, atol=1e-9)
    assert torch.equal(pareto_k(model.log_w.T, 1), pareto_k(model.log_w, 0))
    assert tail.k_hat()[4] == -math.inf


def test_k_hat_comes_where_it_is_asked_for():
    torch.manual_seed(0)
    plain = evaluate(LinearGaussian(3), torch.zeros(5, 3), 70)
    torch.manual_seed(0)
    figures = evaluate(LinearGaussian(3), torch.zeros(5, 3), 70, k_hat=True)
    torch.manual_seed(0)
    means = evaluate_for_means(LinearGaussian(3), torch.zeros(5, 3), 70)
    assert list(figures) == [*plain, "k_hat"] and list(means) == [*plain, "k_hat_above_0.7"]
    assert all(torch.equal(values, figures[k]) and torch.equal(values, means[k]) for k, values in plain.items())
    assert torch.equal(means["k_hat_above_0.7"], (figures["k_hat"] > 0.7).double())
    assert list(evaluate_for_means(LinearGaussian(3), torch.zeros(5, 3), 24)) == list(plain)  # too few to tell
    with pytest.raises(ValueError, match=r"at least 25 particles. Got 24"):
        evaluate(LinearGaussian(3), torch.zeros(5, 3), 24, k_hat=True)


def test_both_kls_are_what_they_are_named():
    torch.manual_seed(0)
    oracle = Oracle()
    figures = evaluate(oracle.model, oracle.batch(5_000), 400)
    gap = oracle.relvar / (2 * 400)
    assert abs(z_score(figures["kl_q_posterior"], oracle.kl - gap)) < 4
    assert abs(z_score(figures["kl_is_64"], oracle.relvar / (2 * 64) - gap)) < 4
    assert abs(z_score(figures["kl_is_64"], oracle.kl - gap)) > 8


# --- totals -------------------------------------------------------------------------------------------------


def random_figures(n, seed=0, offset=0.0):
    generator = np.random.default_rng(seed)
    scales = np.array([1.0, 0.1, 0.05, 2.0])  # of the posterior means: their variances are 1, 0.01, 0.0025 and 4
    means = generator.standard_normal((n, 4)) * scales + offset
    figures = {name: generator.standard_normal(n) * 7 + offset for name in ("log_px", "elbo", "ess")}
    return figures, means


def totals_of(figures, means, rows):
    totals = Totals()
    totals.add({k: torch.from_numpy(v[rows]) for k, v in figures.items()}, torch.from_numpy(means[rows]))
    return totals


def check(result, figures, means):
    for name, values in figures.items():
        assert result[name]["mean"] == pytest.approx(values.mean(), rel=1e-12, abs=1e-12)
        assert result[name]["se"] == pytest.approx(scipy.stats.sem(values), rel=1e-6)
    assert result["active_units"] == (means.var(0, ddof=1) > 0.01).sum()
    assert list(result) == [*figures, "active_units"]


@pytest.mark.parametrize("offset", [0.0, -90.0, 1e4])
def test_totals_equal_numpys(offset):
    figures, means = random_figures(500, offset=offset)
    totals = totals_of(figures, means, slice(0, 130))
    for rows in (slice(130, 131), slice(131, 131), slice(131, 500)):
        totals.add({k: torch.from_numpy(v[rows]) for k, v in figures.items()}, torch.from_numpy(means[rows]))
    check(totals.result(), figures, means)


@pytest.mark.parametrize("cuts", [(1,), (7, 7), (3, 300), (0, 499)], ids=str)
def test_uneven_shards_add_up_to_the_whole(cuts):
    figures, means = random_figures(500)
    edges = [0, *cuts, 500]
    shards = [totals_of(figures, means, slice(*edge)) for edge in pairwise(edges)]
    for shard in shards:
        check(shard.result(lambda sums: sum(s.sums for s in shards)), figures, means)


def test_mean_of_shards_means_would_be_found_wrong():
    figures, means = random_figures(500)
    shards = [totals_of(figures, means, rows) for rows in (slice(0, 3), slice(3, 500))]
    with pytest.raises(AssertionError):
        check(shards[1].result(lambda sums: sum(s.sums / s.sums[0] for s in shards) / 2), figures, means)


def test_active_units_of_a_linear_encoder():
    # x ~ N(0, 2 I): Var(A x)_i = 2 |A_i|^2
    lengths = torch.tensor([0.5, 0.08, 0.06, 0.0])  # 0.5, 0.0128 | 0.0072, 0
    x = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0)) * math.sqrt(2)
    totals = Totals()
    for part in x.split(300):
        totals.add({"ess": torch.zeros(len(part))}, part * lengths)
    assert totals.result()["active_units"] == 2


class FromDraws(LinearGaussian):
    """Whose q says nothing of its mean."""

    def posterior(self, x):
        q = super().posterior(x)
        return SimpleNamespace(rsample=q.rsample)


@pytest.mark.parametrize("network", [LinearGaussian, FromDraws])
def test_variances_of_posterior_means_of_a_linear_encoder(network):
    torch.manual_seed(0)
    lengths = torch.tensor([0.5, 0.08, 0.06, 0.0])
    model = network(4)
    with torch.no_grad():
        model.inference.weight.copy_(torch.diag(lengths))
    x = torch.randn(20_000, 4) * math.sqrt(2)
    found = mean_variances(model, x, 4)
    expected = 2 * lengths.double() ** 2  # x ~ N(0, 2 I)
    noise = 0.0 if network is LinearGaussian else 2 / 3 / 4  # of means of 4 draws
    se = math.sqrt(2 / 20_000) * (expected + noise + 1e-9)
    assert found.shape == (4,) and ((found - expected).abs() < 4 * se).all()
    if noise:
        assert ((found + noise - expected).abs() > 8 * se).all()  # as it would be were it left in


def test_posterior_means_of_any_shape_count_each_unit():
    _, means = random_figures(40)
    totals = Totals()
    totals.add({"ess": torch.zeros(40)}, torch.from_numpy(means).view(40, 2, 2))
    assert totals.result()["active_units"] == (means.var(0, ddof=1) > 0.01).sum()


def test_figures_alone_have_no_active_units():
    figures, _ = random_figures(40)
    totals = Totals()
    for rows in (slice(0, 9), slice(9, 40)):
        totals.add({k: torch.from_numpy(v[rows]) for k, v in figures.items()})
    result = totals.result()
    assert list(result) == list(figures)
    assert result["elbo"]["mean"] == pytest.approx(figures["elbo"].mean(), rel=1e-12)


def test_moments_are_those_that_a_distribution_knows():
    normal = Normal(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    assert moment(normal, "mean").tolist() == [1, 2] and moment(normal, "stddev").tolist() == [3, 4]
    flow = TransformedDistribution(normal, [SigmoidTransform()])  # raises NotImplementedError
    assert moment(flow, "mean") is None and moment(flow, "stddev") is None
    assert moment(SimpleNamespace(mean=normal.mean), "stddev") is None  # not of torch


def test_one_datum_has_a_mean_but_no_error():
    figures, means = random_figures(1)
    result = totals_of(figures, means, slice(None)).result()
    assert result["elbo"]["mean"] == figures["elbo"][0]
    assert math.isnan(result["elbo"]["se"]) and result["active_units"] == 0


def test_no_data_is_an_error():
    with pytest.raises(ValueError, match="nothing was evaluated"):
        Totals().result()


def test_table_prints_every_figure():
    names = list(evaluate_for_means(LinearGaussian(2), torch.zeros(1, 2), 30))
    result = {name: {"mean": -10.5 - i, "se": 0.125 + i} for i, name in enumerate(names)}
    text = table(result | {"active_units": 23, "active_units_train": 24, "particles": 4321})
    for i in range(len(names)):
        assert f"{-10.5 - i:.4f} +- {0.125 + i:.4f}" in text
    assert "active units" in text and " 23" in text and " 24" in text
    assert table(result | {"particles": 4321}).splitlines() == text.splitlines()[:-2]  # without the active units
    assert text.count("4321") == 2  # log p(x) and ESS say of how many
    assert len(text.splitlines()) == len(names) + 2
    assert len({line.index("-1") for line in text.splitlines()[:-2]}) == 1  # in one column

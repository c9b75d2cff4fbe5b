"""The jackknife and the Russian roulette: values without the bias of L_K, against loops and enumeration.

Where weights take two values, K particles have K + 1 outcomes, of binomial probability, and expectations are sums.
"""

import itertools
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from lightning_iwae import bounds

M, K, B = 3, 5, 4


def random_log_w(*shape, scale=1.5, seed=0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 90


def log_mean(log_w):
    return scipy.special.logsumexp(log_w) - np.log(len(log_w))


# --- the jackknife ----------------------------------------------------------------------------------------------


def sharpened(group, order):
    """Nowozin's eq. for one group, a loop over subsets."""
    K, total = len(group), 0.0
    for j in range(order + 1):
        subsets = [log_mean(np.array(kept)) for kept in itertools.combinations(group, K - j)]
        c = (-1) ** j * (K - j) ** order / (math.factorial(order - j) * math.factorial(j))
        total += c * np.mean(subsets)
    return total


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_jackknife_is_a_loop_over_subsets(order, offset):
    log_w = random_log_w(M, K, B)
    found = bounds.jvi(log_w + offset, order=order)
    exact = [np.mean([sharpened(log_w[m, :, b].numpy(), order) for m in range(M)]) for b in range(B)]
    np.testing.assert_allclose(found.numpy() - offset, exact, rtol=1e-11)


def test_jackknife_of_order_1_is_k_wholes_less_k_minus_1_leave_one_outs():
    log_w = random_log_w(M, K, B)
    without = [bounds.miwae(log_w[:, torch.arange(K) != i]) for i in range(K)]
    expected = K * bounds.miwae(log_w) - (K - 1) * torch.stack(without).mean(0)
    torch.testing.assert_close(bounds.jvi(log_w), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(bounds.jvi(log_w, order=0), bounds.miwae(log_w), rtol=1e-14, atol=0)


@pytest.mark.parametrize("order", [1, 2])
def test_jackknife_of_equal_weights_is_that_weight_and_no_order_of_particles_matters(order):
    equal = torch.full((M, K, B), -87.5, dtype=torch.float64)
    torch.testing.assert_close(bounds.jvi(equal, order=order), equal[0, 0], rtol=1e-14, atol=0)
    log_w = random_log_w(M, K, B)
    shuffled = log_w[torch.tensor([2, 0, 1])][:, torch.tensor([4, 1, 0, 3, 2])]
    torch.testing.assert_close(bounds.jvi(shuffled, order=order), bounds.jvi(log_w, order=order), rtol=1e-12, atol=0)
    alone = torch.cat([bounds.jvi(log_w[..., b : b + 1], order=order) for b in range(B)])
    torch.testing.assert_close(bounds.jvi(log_w, order=order), alone, rtol=1e-14, atol=0)


def bias(K, order, p=0.5, weights=(1.3, 0.8)):
    """E[JVI] - log E[w] for weights of two values, by the K + 1 outcomes."""
    high, low = np.log(weights)
    n = np.arange(K + 1)
    log_w = np.where(np.arange(K)[:, None] < n, high, low)
    value = bounds.jvi(torch.from_numpy(log_w)[None], order=order).numpy()
    return scipy.stats.binom.pmf(n, K, p) @ value - math.log(p * weights[0] + (1 - p) * weights[1])


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_jackknife_of_order_m_has_a_bias_of_k_to_the_minus_m_plus_1(order):
    """L_K itself among them. Slopes from K = 8 to 16 and from 16 to 32, whose own error falls as 1/K."""
    at_8, at_16, at_32 = (math.log2(abs(bias(K, order))) for K in (8, 16, 32))
    early, late = at_16 - at_8, at_32 - at_16
    assert abs(2 * late - early + order + 1) < 0.1
    assert order == 0 or abs(bias(16, order)) < abs(bias(16, order - 1)) / 4


def test_jackknife_of_a_group_without_any_weight_is_minus_infinity():
    log_w = random_log_w(M, K, B)
    log_w[1, :, 3] = -math.inf
    log_w[0, 2, 0] = -math.inf
    for order in (1, 2, 3):
        found = bounds.jvi(log_w, order=order)
        assert found[:3].isfinite().all() and found[3] == -math.inf


@pytest.mark.parametrize("order", [-1, 5, 6])
def test_an_order_without_subsets_is_named(order):
    with pytest.raises(ValueError, match=rf"order must be at least 0 and below .* particles, 5\. Got {order}"):
        bounds.jvi(random_log_w(M, K, B), order=order)


# --- the roulette -----------------------------------------------------------------------------------------------


def survival(k):
    """P(N >= k), as published."""
    return 1 / k if k <= 80 else 0.9 ** (k - 80) / 80


@pytest.mark.parametrize("particles", [2, 3, 7, 80, 81, 82, 100])
def test_sumo_is_a_loop_over_nested_sets(particles):
    log_w = random_log_w(M, particles, B)
    exact = np.zeros((M, B))
    for m, b in itertools.product(range(M), range(B)):
        nested = [log_mean(log_w[m, :k, b].numpy()) for k in range(1, particles + 1)]
        exact[m, b] = nested[0] + sum((nested[k] - nested[k - 1]) / survival(k) for k in range(1, particles))
    np.testing.assert_allclose(bounds.sumo(log_w).numpy(), exact.mean(0), rtol=1e-11)


def test_sumo_averaged_over_n_telescopes_to_iwae_for_every_draw():
    """sum_(n < T) P(N = n) SUMO_n + P(N >= T) SUMO_T = L_(T+1), whatever the weights."""
    log_w = random_log_w(1, 131, B)
    total = torch.zeros(B, dtype=torch.float64)
    for n in range(1, 131):
        probability = survival(n) - (survival(n + 1) if n < 130 else 0.0)
        total += probability * bounds.sumo(log_w[:, : n + 1])
    torch.testing.assert_close(total, bounds.iwae(log_w), rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [1, 2, 3, 49, 79, 80, 81, 82, 150])
def test_particles_are_drawn_with_the_published_survival_function(k):
    """N >= k if and only if u <= P(N >= k)."""
    assert bounds.sumo_particles(survival(k) * (1 - 1e-9)) - 1 >= k
    if k > 1:
        assert bounds.sumo_particles(survival(k) * (1 + 1e-9)) - 1 < k


def test_particles_are_6_in_the_mean():
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    mean = 1 + sum(survival(k) for k in range(1, 1000))
    assert abs(mean - 6.08) < 0.01
    assert abs(np.mean([bounds.sumo_particles(v) for v in u[::10]]) - mean) < 0.01


def z_of(values, exact):
    return (values.mean() - exact) / (values.std() / math.sqrt(len(values)))


VARIANCE, DELTA, LOG_PX, MOST = 0.7, 0.4, -3.0, 41


def linear_gaussian(e):
    """log w of the linear-Gaussian model in one dimension, at z = m + sqrt(VARIANCE) e."""
    z = math.sqrt(VARIANCE) * e
    return LOG_PX + math.log(2 * VARIANCE) / 2 - (z + DELTA) ** 2 + z**2 / (2 * VARIANCE)


def expected_iwae(K):
    """E[L_K] without sampling: E log S = int_0^inf (exp(-t) - E[exp(-t w)]^K) dt / t, S the sum of K weights."""
    e, weight = np.polynomial.hermite_e.hermegauss(96)
    w = np.exp(linear_gaussian(e) - LOG_PX)
    t = np.exp(np.linspace(-40, 12, 4001))
    transform = np.exp(-t[:, None] * w) @ weight / weight.sum()
    integrand = np.exp(-t) - transform**K
    return LOG_PX + np.trapezoid(integrand, np.log(t)) - math.log(K)


def test_sumo_s_mean_is_that_of_all_its_particles_and_not_of_those_drawn():
    """z-scores of 40,000 draws, N > 40 taken as 40: without an end its variance is infinite, and z says nothing.

    The end is iwae of 41 particles, in expectation 0.01 nats below log p. Without the division by P(N >= k), a
    value is iwae of those drawn.
    """
    source, found, drawn = np.random.default_rng(0), [], []
    particles = np.array([min(MOST, bounds.sumo_particles(1 - u)) for u in source.random(40_000)])
    for count in np.unique(particles):
        e = source.standard_normal((count, int((particles == count).sum())))
        log_w = torch.from_numpy(linear_gaussian(e))[None]
        found.append(bounds.sumo(log_w).numpy())
        drawn.append(bounds.iwae(log_w).numpy())
    exact, found = expected_iwae(MOST), np.concatenate(found)
    assert LOG_PX - 0.02 < exact < LOG_PX
    assert abs(z_of(found, exact)) < 4.5
    assert abs(z_of(1.05 * found, exact)) > 4.5
    assert z_of(np.concatenate(drawn), exact) < -4.5


def test_the_expectation_of_the_one_above_is_the_elbo_s_closed_form_for_one_particle():
    """log p - KL, KL = s2 - 1/2 - log(2 s2) / 2 + delta^2."""
    kl = VARIANCE - 0.5 - math.log(2 * VARIANCE) / 2 + DELTA**2
    assert abs(expected_iwae(1) - (LOG_PX - kl)) < 1e-9


def test_sumo_of_data_and_constants():
    log_w = random_log_w(M, K, B)
    torch.testing.assert_close(bounds.sumo(log_w + 1e4), bounds.sumo(log_w) + 1e4, rtol=1e-13, atol=0)
    alone = torch.cat([bounds.sumo(log_w[..., b : b + 1]) for b in range(B)])
    torch.testing.assert_close(bounds.sumo(log_w), alone, rtol=1e-14, atol=0)
    single = log_w.float()
    torch.testing.assert_close(bounds.sumo(single).double(), bounds.sumo(single.double()), rtol=1e-5, atol=0)
    assert bounds.sumo(single).dtype == torch.float32


def test_sumo_with_weights_of_zero():
    """P(N >= 1) = 1, so that L_1 has no part in it: a first weight of zero is as any other. Two are the end."""
    log_w = random_log_w(1, K, B)
    log_w[0, 0, 0] = log_w[0, 1, 1] = log_w[0, :2, 2] = log_w[0, :, 3] = -math.inf
    found = bounds.sumo(log_w)
    assert found[:2].isfinite().all() and (found[2:] == -math.inf).all()
    nearly = log_w.masked_fill(log_w == -math.inf, -1e6)
    torch.testing.assert_close(found[:2], bounds.sumo(nearly)[:2], rtol=1e-8, atol=0)


def test_sumo_needs_two_particles():
    with pytest.raises(ValueError, match=r"sumo needs at least 2 particles\. Got 1"):
        bounds.sumo(random_log_w(M, 1, B))


@pytest.mark.parametrize("u", [0.0, -0.1, 1.1, math.nan])
def test_u_outside_0_to_1_is_named(u):
    with pytest.raises(ValueError, match=rf"u must lie in \(0, 1\]. Got {u}"):
        bounds.sumo_particles(u)

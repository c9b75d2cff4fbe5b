"""SNR and DSNR against NumPy's plain formulas, their floors against pure noise and closed forms, Pareto k-hat."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from lightning_iwae.diagnostics import SNR, Tail, _pareto_shape, active_units, pareto_k, signal_to_noise


def z_score(sample, expected):
    """Of the mean of independent values, by their own standard error."""
    sample = np.asarray(sample)
    return (sample.mean() - expected) / (sample.std(ddof=1) / math.sqrt(sample.size))


def of(*arrays, n=None):
    """`signal_to_noise` of the rows of each array (n, P), named "a", "b", ..."""
    rows = zip(*(torch.as_tensor(array) for array in arrays), strict=True)
    names = "abc"[: len(arrays)]
    return signal_to_noise(lambda: dict(zip(names, next(rows), strict=True)), n or len(arrays[0]))


def noise(n, P, seed=0):
    return np.random.default_rng(seed).standard_normal((n, P))


def plain_snr(draws):
    return np.abs(draws.mean(0)) / draws.std(0, ddof=1)


def plain_dsnr(draws, direction_from):
    u = direction_from.mean(0) / np.linalg.norm(direction_from.mean(0))
    along = draws @ u
    return np.mean(np.abs(along) / np.linalg.norm(draws - along[:, None] * u, axis=1))


# --- streaming ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 5, 6, 7, 100, 101])
@pytest.mark.parametrize(("scale", "offset"), [(np.logspace(-6, 6, 7), 0.0), (1.0, 0.3), (1.0, -1e6)], ids=str)
def test_streaming_equals_numpy(n, scale, offset):
    draws = noise(n, 7) * scale + offset
    result = of(draws)["a"]
    np.testing.assert_allclose(result.snr, plain_snr(draws), rtol=1e-8)  # sum x^2 - n mean^2 would be off by 1e-4
    half = n // 2
    assert result.dsnr == pytest.approx(plain_dsnr(draws[half:], draws[:half]), rel=1e-9)
    assert result.n == n


def test_estimates_are_kept_apart_by_name_and_size():
    a, b = noise(20, 5), noise(20, 3, seed=1) + 2
    both = of(a, b)
    for name, draws in (("a", a), ("b", b)):
        np.testing.assert_allclose(both[name].snr, plain_snr(draws), rtol=1e-12)
        assert both[name].dsnr == of(draws)["a"].dsnr


def test_float32_gradients_are_summed_in_float64():
    draws = (noise(2_000, 3) * 1e-3 + 1e3).astype(np.float32)
    np.testing.assert_allclose(of(draws)["a"].snr, plain_snr(draws.astype(np.float64)), rtol=1e-9)


def test_draws_exactly_n():
    rows = iter(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    signal_to_noise(lambda: {"a": next(rows)}, 7)
    assert len(list(rows)) == 2


@pytest.mark.parametrize("n", [-1, 0, 1, 3])
def test_fewer_than_four_draws_are_refused(n):
    with pytest.raises(ValueError, match=f"at least 4. Got {n}"):
        signal_to_noise(lambda: pytest.fail("drawn"), n)


# --- known signals ------------------------------------------------------------------------------------------


def test_snr_of_a_known_signal():
    n, P = 400, 5_000
    snr = of(noise(n, P) + 0.5)["a"].snr
    # |mean| / std of normal draws is a non-central t over sqrt(n); its mean lies 0.2 % above 0.5 here
    exact = scipy.stats.nct(n - 1, 0.5 * math.sqrt(n)).mean() / math.sqrt(n)
    assert abs(z_score(snr, exact)) < 4
    assert abs(z_score(snr, 0.5 * math.sqrt((n - 10) / n))) > 8


def test_dsnr_of_a_strong_signal_is_its_length_over_the_noise():
    P, length = 50, 1000.0
    results = [of(noise(40, P, seed) + length / math.sqrt(P))["a"].dsnr for seed in range(200)]
    expected = length * scipy.stats.chi(P - 1).expect(lambda r: 1 / r)
    # the first 20 draws' mean is itself off by |noise| / sqrt(20), which is seen as noise across
    assert abs(z_score(results, expected / math.sqrt(1 + 1 / 20))) < 4
    assert abs(z_score(results, expected)) > 8


# --- floors -------------------------------------------------------------------------------------------------


def test_snr_of_pure_noise_is_at_its_floor():
    n = 1_000
    result = of(noise(n, 4_000))["a"]
    assert abs(z_score(result.snr, result.snr_floor)) < 4
    assert abs(z_score(result.snr, SNR(result.snr, 0.0, n // 2).snr_floor)) > 8


@pytest.mark.parametrize("n", [20, 100, 10_000])
def test_snr_floor_is_the_mean_of_students_t(n):
    t = scipy.stats.t(n - 1)
    exact = 2 * t.expect(lambda x: x, lb=0, ub=np.inf) / math.sqrt(n)
    assert SNR(torch.ones(3), 0.0, n).snr_floor == pytest.approx(exact, rel=1 / n)


def test_dsnr_of_pure_noise_is_at_its_floor():
    P, runs = 20, [noise(100, 20, seed) for seed in range(200)]
    floor = SNR(torch.ones(P), 0.0, 100).dsnr_floor
    assert abs(z_score([of(draws)["a"].dsnr for draws in runs], floor)) < 4
    # a direction fitted to the draws that it judges flatters them
    assert abs(z_score([plain_dsnr(draws, draws) for draws in runs], floor)) > 8


@pytest.mark.parametrize("P", [3, 4, 20, 1_000, 20_000_000])
def test_dsnr_floor_is_the_mean_of_normal_over_chi(P):
    floor = SNR(torch.ones(1).expand(P), 0.0, 10).dsnr_floor
    normal = 2 * scipy.stats.norm.pdf(0)
    if P <= 20:
        assert floor == pytest.approx(normal * scipy.stats.chi(P - 1).expect(lambda r: 1 / r), rel=1e-6)
    else:
        assert floor == pytest.approx(normal / math.sqrt(P - 2.5), rel=1e-3)


# --- edges --------------------------------------------------------------------------------------------------


def test_parameters_that_never_vary_are_left_out():
    draws = noise(50, 6) + 1
    draws[:, 1] = 0
    draws[:, 4] = 0.1  # not a binary fraction: its running mean must not drift
    result = of(draws)["a"]
    np.testing.assert_allclose(result.snr, plain_snr(draws[:, [0, 2, 3, 5]]), rtol=1e-12)
    assert result.dsnr_floor == SNR(torch.ones(4), 0.0, 50).dsnr_floor


@pytest.mark.parametrize("value", [0.0, 0.1, -1e30])
def test_gradient_that_never_varies_has_no_snr(value):
    result = of(np.full((10, 5), value))["a"]
    assert len(result.snr) == 0
    assert math.isnan(result.snr.mean()) and math.isnan(result.dsnr_floor)
    assert all(math.isnan(q) for q in result.quantiles((0.25, 0.5)))
    assert math.isnan(result.dsnr) or result.dsnr > 1e6  # 0 / 0, or all signal


def test_gradient_of_length_one_has_nothing_across():
    draws = noise(50, 1) + 0.3
    result = of(draws)["a"]
    np.testing.assert_allclose(result.snr, plain_snr(draws), rtol=1e-12)
    assert result.dsnr == math.inf and math.isnan(result.dsnr_floor)


def test_gradient_of_length_two_has_a_dsnr_but_no_floor():
    draws = noise(50, 2) + 0.3
    result = of(draws)["a"]
    assert result.dsnr == pytest.approx(plain_dsnr(draws[25:], draws[:25]), rel=1e-9)
    assert math.isnan(result.dsnr_floor)  # E[1 / chi_1] diverges


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradient_that_is_not_finite_is_an_error_naming_it(bad):
    a, b = noise(10, 5), noise(10, 6, seed=1)
    b[6, 2:4] = bad
    with pytest.raises(FloatingPointError, match=r"gradient of b is not finite in 2 of 6 parameters, at draw 7 of 10"):
        of(a, b)


# --- quantiles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("P", [1, 2, 3, 4, 5, 1001])
def test_quantiles_equal_numpys(P):
    snr = np.abs(noise(1, P)[0])
    levels = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
    result = SNR(torch.from_numpy(snr), 0.0, 10).quantiles(levels)
    np.testing.assert_allclose(result, np.quantile(snr, levels), rtol=1e-12)


def test_quantiles_of_more_parameters_than_torch_takes():
    P = 2**24 + 5  # a small network by today's measure
    snr = torch.arange(P, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="too large"):
        snr.quantile(0.5)
    assert SNR(snr, 0.0, 10).quantiles((0.25, 0.5, 0.75)) == [2**22 + 1, 2**23 + 2, 3 * 2**22 + 3]


# --- active units -------------------------------------------------------------------------------------------


def test_active_units_lie_above_the_threshold():
    variances = torch.tensor([0.0, 0.0099, 0.01, 0.0101, 1.0, math.nan], dtype=torch.float64)
    assert active_units(variances) == 2
    assert active_units(variances, 0.5) == 1
    assert active_units(variances[:0]) == 0


# --- Pareto k-hat -------------------------------------------------------------------------------------------


def plain_pareto_k(log_w):
    """One datum's, in Python's numbers, step by step as Vehtari et al. and Zhang and Stephens write it."""
    S = len(log_w)
    w = sorted(math.exp(v - max(log_w)) for v in log_w)
    M = math.ceil(min(S / 5, 3 * S**0.5))
    cut = w[S - M - 1]
    x = [v - cut for v in w[S - M :] if v > cut]
    n = len(x)
    m = 30 + math.floor(n**0.5)
    quartile = x[math.floor(n / 4 + 0.5) - 1]
    thetas = [1 / x[-1] + (1 - (m / (j - 0.5)) ** 0.5) / (3 * quartile) for j in range(1, m + 1)]

    def shape(theta):
        return sum(math.log(1 - theta * v) for v in x) / n

    likelihoods = [n * (math.log(-theta / shape(theta)) - shape(theta) - 1) for theta in thetas]
    weights = [1 / sum(math.exp(other - mine) for other in likelihoods) for mine in likelihoods]
    k = shape(sum(theta * weight for theta, weight in zip(thetas, weights, strict=True)))
    return (n * k + 10 * 0.5) / (n + 10)


@pytest.mark.parametrize("S", [25, 26, 100, 225, 1000])
def test_k_hat_equals_the_plain_formula(S):
    log_w = np.concatenate([noise(S, 3), 3 * noise(S, 3, seed=1), np.round(noise(S, 3, seed=2), 2)], 1)
    expected = [plain_pareto_k(column) for column in log_w.T.tolist()]
    np.testing.assert_allclose(pareto_k(torch.from_numpy(log_w)), expected, rtol=1e-9)


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.3, 0.7, 1.2])
def test_k_hat_of_pareto_weights_is_their_shape(shape):
    S, tail = 10_000, 300
    w = scipy.stats.genpareto(shape).rvs((S, 100), random_state=0)
    k_hat = pareto_k(torch.from_numpy(np.log(w))).numpy()
    drawn_to_a_half = (tail * shape + 5) / (tail + 10)
    assert k_hat.mean() == pytest.approx(drawn_to_a_half, abs=0.02)
    for column, mine in zip(w.T[:3], k_hat, strict=False):  # the likeliest shape of the same tail
        ordered = np.sort(column)
        fitted, *_ = scipy.stats.genpareto.fit(ordered[-tail:] - ordered[-tail - 1], floc=0)
        assert mine == pytest.approx((tail * fitted + 5) / (tail + 10), abs=0.04)


def gaussian_log_weights(variance, S, data):
    """Of the one-dimensional toy at its best mean (x = mu = 0): log p(x) is -log(4 pi) / 2."""
    z = torch.randn(S, data, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * math.sqrt(variance)
    log_p = -(z**2) - math.log(2 * math.pi)  # log p(z) + log p(0 | z)
    return log_p + z**2 / (2 * variance) + math.log(2 * math.pi * variance) / 2


@pytest.mark.parametrize("variance", [0.1, 0.15, 0.25, 0.35])
def test_k_hat_of_a_narrow_gaussian_is_one_minus_twice_its_variance(variance):
    k_hat = pareto_k(gaussian_log_weights(variance, 20_000, 60)).mean().item()
    theory = 1 - 2 * variance
    assert theory - 0.06 < k_hat < theory + 0.01  # the tail is log-thinner than a power


def test_k_hat_of_a_wide_gaussian_is_negative():
    assert pareto_k(gaussian_log_weights(2 / 3, 20_000, 20)).max() < 0  # bounded weights


def test_k_hat_takes_log_weights_of_any_size():
    log_w = 2 * torch.randn(400, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k = pareto_k(log_w)
    for shift in (1e4, -1e4):
        torch.testing.assert_close(pareto_k(log_w + shift), k, rtol=1e-9, atol=1e-9)
    huge = pareto_k(2_000 * log_w)
    assert (huge > 5).all() and huge.isfinite().all()
    for low in (-math.inf, -1e5):  # where the weight is 0 in any case
        padded = torch.cat([log_w, torch.full((100, 5), low, dtype=torch.float64)])
        np.testing.assert_allclose(pareto_k(padded), [plain_pareto_k(column) for column in padded.T.tolist()])


def test_k_hat_where_there_is_no_tail_to_fit():
    log_w = torch.randn(100, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_w[:, 0] = -90.0  # q is the posterior
    log_w[:, 1] = -math.inf
    log_w[:, 2] = torch.where(torch.arange(100) < 4, 1.0, 0.0)  # four above a tie
    log_w[:, 3] = torch.where(torch.arange(100) < 3, log_w[:, 3], -math.inf)
    log_w[50, 4] = math.nan
    assert pareto_k(log_w)[:4].tolist() == [-math.inf, math.inf, math.inf, math.inf]
    assert pareto_k(log_w)[4].isnan() and pareto_k(log_w)[5].isfinite()


def test_k_hat_of_an_exponential_tail_is_the_limit_of_the_formula():
    # excesses whose lower quartile puts a grid point at theta = 0, where the formula is 0 / 0
    spread = math.sqrt(34 / 5.5) - 1
    x = torch.tensor([1.0] + 14 * [0.9] + 5 * [spread / 3], dtype=torch.float64)[:, None]
    assert _pareto_shape(x).isfinite().all()


def test_k_hat_refuses_too_few_weights():
    with pytest.raises(ValueError, match=r"at least 25 particles. Got 24"):
        pareto_k(torch.zeros(24, 3))
    tail = Tail(50)
    tail.add(torch.zeros(49, 3))
    with pytest.raises(ValueError, match="of 50 particles was given 49"):
        tail.k_hat()


def test_k_hat_drops_the_dimension_it_is_taken_along():
    log_w = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0))
    k = pareto_k(log_w, 1)
    assert k.shape == (2, 3) and k.dtype == torch.float64
    assert k[1, 2] == pareto_k(log_w[1, :, 2])

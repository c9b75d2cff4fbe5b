"""The laboratory: its statistics against known Gaussians and NumPy, its gradients against a plain loop of autograd."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal

from lightning_iwae import laboratory
from lightning_iwae.laboratory import Row, corrected_snr, fit_slope, measure, slopes
from lightning_iwae.models import LinearGaussian
from lightning_iwae.randomness import forked, seed_for
from lightning_iwae.sides import Side

IWAE, DREG, STL, VIMCO = (Side(name, 2) for name in ("iwae", "dreg", "stl", "vimco"))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)


def z_score(sample, expected):
    sample = np.asarray(sample)
    return (sample.mean() - expected) / (sample.std(ddof=1) / math.sqrt(sample.size))


# ------------------------------------------------------------------------------------------------ the correction
def vectors(n, means, runs, seed=0):
    """`runs` samples (n, P) of normal vectors of unit variance and these means (P,)."""
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal((n, len(means))) + means) for _ in range(runs)]


@pytest.mark.parametrize("strength", [1.0, 3.0])
def test_correction_finds_the_snr_of_normal_means_near_the_floor(strength):
    n, found, truth = 100, [], []
    for seed in range(60):
        means = strength / math.sqrt(n) * np.random.default_rng(100 + seed).standard_normal(400)
        found.append(corrected_snr(vectors(n, means, 1, seed)[0], seed))
        truth.append(np.abs(means).mean())
    plain, corrected, _ = (np.array(v) for v in zip(*found, strict=True))
    assert abs(z_score(corrected / truth, 1.0)) < 4.5
    assert z_score(plain / truth, 1.0) > 10  # the biased twin


@pytest.mark.parametrize("shape", [np.full(300, 15.0), np.linspace(10, 40, 300), np.repeat([10.0, 60.0], 150)])
def test_correction_lets_clear_signals_be_whatever_their_shape(shape):
    n = 100
    found = [corrected_snr(draws, seed)[1] for seed, draws in enumerate(vectors(n, shape / math.sqrt(n), 20))]
    assert np.mean(found) == pytest.approx((shape / math.sqrt(n)).mean(), rel=0.01)


def test_correction_of_pure_noise_leaves_little_of_it():
    found = [corrected_snr(draws, seed) for seed, draws in enumerate(vectors(100, np.zeros(400), 20))]
    plain, corrected, _ = zip(*found, strict=True)
    assert np.mean(corrected) < 0.2 * np.mean(plain)


def test_plain_is_numpys():
    (draws,) = vectors(50, np.linspace(0, 2, 9), 1)
    values = draws.numpy()
    assert corrected_snr(draws)[0] == pytest.approx((np.abs(values.mean(0)) / values.std(0, ddof=1)).mean(), rel=1e-12)


def expected_size(draws):
    """The expected sizes of true ratios N(0, v), given ratios with noise 1/n; SciPy's folded normal."""
    n = len(draws)
    ratio = math.sqrt((n - 3) / (n - 1)) * draws.mean(0) / draws.std(0, ddof=1)
    v = max((ratio**2).mean() - 1 / n, 1e-12)
    at, scale = v / (v + 1 / n) * ratio, math.sqrt(v / n / (v + 1 / n))
    return scipy.stats.foldnorm(np.abs(at) / scale, scale=scale).mean().mean()


def test_correction_and_bootstrap_are_scipy_s():
    (draws,) = vectors(12, np.linspace(-1, 1, 5), 1)
    counts = np.random.default_rng(7).multinomial(12, np.full(12, 1 / 12), size=laboratory.RESAMPLES)
    values = [expected_size(np.repeat(draws.numpy(), row, axis=0)) for row in counts]
    _, corrected, error = corrected_snr(draws, 7)
    assert corrected == pytest.approx(expected_size(draws.numpy()), rel=1e-10)
    assert error == pytest.approx(np.std(values, ddof=1), rel=1e-10)


def test_standard_error_is_the_spread_over_experiments_of_dependent_parameters():
    n, P, runs = 100, 60, 200
    rng = np.random.default_rng(3)
    found = []
    for seed in range(runs):
        common = rng.standard_normal((n, 1))  # parameters of a network move together
        draws = 0.5 + 0.8 * common + 0.6 * rng.standard_normal((n, P))
        found.append(corrected_snr(torch.from_numpy(draws), seed))
    _, corrected, error = (np.array(v) for v in zip(*found, strict=True))
    ratio = np.mean(error**2) / corrected.var(ddof=1)
    spread = math.sqrt(2 / (runs - 1))  # of a variance of `runs` values
    assert abs(ratio - 1) < 4.5 * spread
    independent = corrected.std(ddof=1) ** 2 / (1 / n * (1 + 0.5**2 / 2) / P)  # parameters taken for independent
    assert independent - 1 > 4.5 * spread * independent


def test_parameters_that_never_vary_are_left_out():
    (draws,) = vectors(30, np.array([0.5, 1.0]), 1)
    with_dead = torch.cat([draws[:, :1], torch.zeros(30, 1), draws[:, 1:]], 1)
    assert corrected_snr(with_dead, 1) == corrected_snr(draws, 1)


# ------------------------------------------------------------------------------------------------ measurement
def toy(dim=3, size=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = LinearGaussian(dim)
    for p in model.parameters():
        nn.init.normal_(p, std=0.4, generator=generator)
    return model, torch.randn(size, dim, generator=generator)


def by_hand(model, x, M, K, draws, seed):
    """Gradients (draws, P) of phi by IWAE and DReG and of theta by IWAE, one draw after another, by plain autograd."""
    phi, theta = list(model.inference.parameters()), [model.mu]
    found = {"iwae": [], "dreg": [], "theta": []}
    for draw in range(draws):
        with forked(seed_for(seed, "laboratory", M, K, draw), CPU):
            q = model.posterior(x)
            z = q.rsample((M * K,))
        held = Independent(Normal(q.base_dist.loc.detach(), q.base_dist.scale), 1)
        log_w, log_w_path = (
            (model.prior().log_prob(z) + model.likelihood(z).log_prob(x) - p.log_prob(z)).reshape(M, K, -1)
            for p in (q, held)
        )
        bound = (log_w.logsumexp(1) - math.log(K)).mean()
        squared = torch.softmax(log_w.detach(), 1).square()
        surrogates = {
            "iwae": (bound, phi),
            "dreg": ((squared * log_w_path).sum(1).mean(), phi),
            "theta": (bound, theta),
        }
        for name, (value, parameters) in surrogates.items():
            grads = torch.autograd.grad(value, parameters, retain_graph=True)
            found[name].append(torch.cat([g.flatten() for g in grads]).numpy())
    return {name: np.stack(rows) for name, rows in found.items()}


def test_rows_are_those_of_a_plain_loop():
    model, x = toy()
    n = 11
    for M, K in ((2, 3), (3, 2)):
        hand = by_hand(model, x, M, K, n, seed=5)
        rows = list(measure(model, x, [IWAE, DREG], [IWAE], [(M, K)], n, seed=5))
        assert [(r.side, r.estimator) for r in rows] == [("phi", "iwae"), ("phi", "dreg"), ("theta", "iwae")]
        for row, g in zip(rows, hand.values(), strict=True):
            assert (row.M, row.K, row.n) == (M, K, n)
            mean, std = g.mean(0), g.std(0, ddof=1)
            assert row.snr_plain == pytest.approx((np.abs(mean) / std).mean(), rel=1e-9)
            assert row.mean_norm == pytest.approx(np.linalg.norm(mean), rel=1e-9)
            assert row.std_norm == pytest.approx(np.linalg.norm(std), rel=1e-9)
            assert row.snr_floor == pytest.approx(math.sqrt(2 / (math.pi * n)))
            u = g[: n // 2].mean(0) / np.linalg.norm(g[: n // 2].mean(0))
            along = g[n // 2 :] @ u
            across = np.linalg.norm(g[n // 2 :] - along[:, None] * u, axis=1)
            assert row.dsnr == pytest.approx((np.abs(along) / across).mean(), rel=1e-9)
            _, snr, error = corrected_snr(torch.from_numpy(g), seed_for(5, "bootstrap", M, K))
            assert (row.snr, row.standard_error) == pytest.approx((snr, error), rel=1e-9)
            assert row.snr_hi - row.snr == pytest.approx(1.96 * error) == row.snr - row.snr_lo
    swapped = by_hand(model, x, 3, 2, n, seed=5)["iwae"].mean(0)  # of the last grid point, M and K the other way
    assert np.linalg.norm(swapped) != pytest.approx(rows[1].mean_norm, rel=1e-3)


def test_draws_are_shared_and_depend_on_their_own_setting_alone():
    model, x = toy()

    def rows(phi, theta, grid, draws=8, seed=0):
        return {(r.side, r.estimator, r.M, r.K): r for r in measure(model, x, phi, theta, grid, draws, seed)}

    whole = rows([IWAE, STL, DREG], [IWAE], [(1, 1), (2, 4), (1, 2)])
    assert rows([IWAE], [], [(2, 4)]).items() <= whole.items()
    assert rows([], [IWAE], [(1, 2), (1, 1)]).items() <= whole.items()
    assert replace(whole["phi", "stl", 1, 1], estimator="dreg") == whole["phi", "dreg", 1, 1]  # equal on equal draws
    assert whole["phi", "stl", 1, 2].snr != whole["phi", "dreg", 1, 2].snr
    assert rows([IWAE], [], [(2, 4)], seed=1)["phi", "iwae", 2, 4].snr != whole["phi", "iwae", 2, 4].snr


def test_global_random_state_is_left_alone():
    model, x = toy()
    torch.manual_seed(0)
    list(measure(model, x, [IWAE], [IWAE], [(1, 2)], 8))
    after = torch.randn(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.randn(3))
    assert all(p.grad is None for p in model.parameters())


def test_rows_carry_the_models_theory_and_others_have_none():
    model, x = toy()
    rows = list(measure(model, x, [IWAE, STL], [IWAE], [(1, 1), (2, 16)], 8))
    for row in rows:
        exact = model.exact_snr(x, row.side, row.estimator, row.M, row.K)
        assert row.theory == (None if exact is None else pytest.approx(exact.mean().item()))
    assert [row.theory is None for row in rows] == [False, False, False, False, True, False]


# ------------------------------------------------------------------------------------------------ which are measured
def test_estimators_that_cannot_be_at_K_are_left_out_there():
    model, x = toy()
    rows = list(measure(model, x, [IWAE, VIMCO], [IWAE, Side("tvo", 2, partition=3)], [(2, 1), (1, 2)], 8))
    assert [(r.K, r.side, r.estimator) for r in rows] == [
        *((1, "phi", "iwae"), (1, "theta", "iwae")),
        *((2, "phi", "iwae"), (2, "phi", "vimco"), (2, "theta", "iwae"), (2, "theta", "tvo")),
    ]
    assert rows[-1].options == "partition=3"


def test_part_of_the_parameters_stands_for_all():
    model, x = toy(5)  # P = 30 and 5
    whole = list(measure(model, x, [IWAE, STL], [IWAE], [(1, 2)], 8, seed=2))
    some = list(measure(model, x, [IWAE, STL], [IWAE], [(1, 2)], 8, seed=2, parameters=4))
    hand = by_hand(model, x, 1, 2, 8, seed=2)
    for name, few, all_of_them in zip(("iwae", None, "theta"), some, whole, strict=True):
        same = {field: getattr(few, field) for field in ("mean_norm", "std_norm", "dsnr", "dsnr_floor")}
        assert same == {field: getattr(all_of_them, field) for field in same}
        if name:
            snr = np.abs(hand[name].mean(0)) / hand[name].std(0, ddof=1)
            order = torch.randperm(snr.size, generator=torch.Generator().manual_seed(seed_for(2, few.side)))
            assert few.snr_plain == pytest.approx(snr[order[:4]].mean(), rel=1e-9) != all_of_them.snr_plain
    other = list(measure(model, x, [IWAE], [], [(1, 2)], 8, seed=3, parameters=4))
    assert other[0].theory != some[0].theory


def test_chosen_parameters_are_the_same_for_every_estimator_and_setting(monkeypatch):
    model, x = toy(5)
    chosen = []
    row = laboratory.Kept.row
    monkeypatch.setattr(laboratory.Kept, "row", lambda kept, *a: chosen.append(kept.chosen.tolist()) or row(kept, *a))
    list(measure(model, x, [IWAE, STL], [], [(1, 2), (2, 4)], 8, parameters=4))
    assert len(chosen) == 4 and len({tuple(c) for c in chosen}) == 1 and len(set(chosen[0])) == 4


def test_frozen_parameters_are_no_part_of_phi():
    model, x = toy()
    model.inference.weight.requires_grad_(False)
    assert laboratory.gradients(model, x, [IWAE], [], 2)[0].shape == (3,)


@pytest.mark.parametrize("draws", [0, 7])
def test_too_few_draws_are_refused(draws):
    model, x = toy()
    with pytest.raises(ValueError, match=f"draws must be at least 8. Got {draws}"):
        next(measure(model, x, [IWAE], [], [(1, 2)], draws))


def test_gradient_that_is_not_finite_is_an_error_of_the_estimators_name():
    model, x = toy()
    with torch.no_grad():
        model.inference.bias.fill_(math.inf)
    with pytest.raises(FloatingPointError, match=r"phi by dreg \(2 particles\) is not finite"):
        next(measure(model, x, [DREG], [], [(1, 2)], 8))


# ------------------------------------------------------------------------------------------------ data in chunks
class Quiet(LinearGaussian):
    """Its noise is a function of the datum, so that it does not depend on the chunks."""

    def posterior(self, x):
        mean = self.inference(x)
        std = math.sqrt(self.variance)

        class Fixed(Independent):
            def rsample(self, sample_shape=()):
                index = torch.arange(sample_shape[0])[:, None, None]
                return mean + std * torch.sin(7 * x + 3 * index)

        return Fixed(Normal(mean, torch.full_like(mean, std)), 1)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_chunks_add_up_to_the_gradient_of_the_mean(size, monkeypatch):
    model, x = toy(size=7)
    quiet = Quiet(3)
    quiet.load_state_dict(model.state_dict())
    sides = [Side("iwae", 4), Side("wake", 4)], [Side("iwae", 4)]
    whole = laboratory.gradients(quiet, x, *sides, 8)
    monkeypatch.setattr(laboratory, "AT_ONCE", size * 8 * 3)
    assert [len(part) for part in laboratory.chunks(quiet, x, 8)] == [min(size, 7 - i) for i in range(0, 7, size)]
    for chunked, g in zip(laboratory.gradients(quiet, x, *sides, 8), whole, strict=True):
        torch.testing.assert_close(chunked, g, rtol=1e-10, atol=1e-13)


class Conditional(nn.Module):
    """q(z | x, y) = N(a x + y, 1), p(x | z, y) = N(c z + y, 1), p(z) = N(0, 1): one parameter a side."""

    def __init__(self):
        super().__init__()
        self.inference, self.generative = (nn.Linear(1, 1, bias=False) for _ in range(2))

    def prior(self, y):
        return Independent(Normal(torch.zeros(1), torch.ones(1)), 1)

    def posterior(self, x, y):
        return Independent(Normal(self.inference(x) + y[:, None], torch.ones(1)), 1)

    def likelihood(self, z, y):
        return Independent(Normal(self.generative(z) + y[:, None], torch.ones(1)), 1)


def test_labels_go_with_their_data(monkeypatch):
    torch.manual_seed(0)
    model, x, y = Conditional(), torch.randn(6, 1), torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    sides = [Side("elbo", 1)], [Side("elbo", 1)]
    monkeypatch.setattr(laboratory, "AT_ONCE", 4 * 2)  # two data at once
    phi, theta = laboratory.gradients(model, (x, y), *sides, 4)
    torch.manual_seed(1)
    phi, theta = laboratory.gradients(model, (x, y), *sides, 4)
    torch.manual_seed(1)
    z = [model.posterior(x[i : i + 2], y[i : i + 2]).rsample((4,)) for i in (0, 2, 4)]
    z = torch.cat(z, 1)
    log_joint = model.prior(y).log_prob(z) + model.likelihood(z, y).log_prob(x)
    (by_hand,) = torch.autograd.grad(log_joint.mean(), model.generative.weight, retain_graph=True)
    torch.testing.assert_close(theta, by_hand.flatten())
    (by_hand,) = torch.autograd.grad((log_joint - model.posterior(x, y).log_prob(z)).mean(), model.inference.weight)
    torch.testing.assert_close(phi, by_hand.flatten())


class Binary(nn.Module):
    """z in {0, 1}^4, x in {0, 1}^3."""

    def __init__(self):
        super().__init__()
        self.inference, self.generative = nn.Linear(3, 4), nn.Linear(4, 3)

    def prior(self):
        return Independent(Bernoulli(logits=torch.zeros(4)), 1)

    def posterior(self, x):
        return Independent(Bernoulli(logits=self.inference(x)), 1)

    def likelihood(self, z):
        return Independent(Bernoulli(logits=self.generative(z)), 1)


def test_discrete_z_takes_score_estimators_only():
    torch.manual_seed(0)
    model, x = Binary(), (torch.rand(5, 3) > 0.5).double()
    rows = list(measure(model, x, [VIMCO, Side("rloo", 2)], [IWAE], [(1, 3)], 8))
    assert all(math.isfinite(row.snr) and row.theory is None for row in rows)
    with pytest.raises(ValueError, match=r"phi: estimator 'iwae' needs a reparameterised posterior.*use .*vimco"):
        list(measure(model, x, [VIMCO, IWAE], [IWAE], [(1, 3)], 8))


# ------------------------------------------------------------------------------------------------ slopes
def made_up(side="phi", estimator="iwae", M=1, K=1, snr=1.0, error=0.01):
    row = Row(estimator, "", side, M, K, 100, snr, snr - 1.96 * error, snr + 1.96 * error, *[0.0] * 6, None)
    assert row.standard_error == pytest.approx(error)
    return row


def test_slope_of_a_power_law_is_its_exponent():
    points = [(n, made_up(snr=3 * n**-0.5, error=0.1 / n)) for n in (1, 4, 16, 64)]
    slope, error = fit_slope(points)
    assert slope == pytest.approx(-0.5, abs=1e-12) and error > 0


def test_slope_is_weighted_by_the_errors_as_scipys():
    rng = np.random.default_rng(0)
    counts = np.array([4, 16, 64, 256])
    snr, errors = 0.2 * counts**0.5 * rng.uniform(0.8, 1.2, 4), np.array([0.01, 0.2, 0.05, 0.3])
    points = [(int(n), made_up(snr=s, error=e)) for n, s, e in zip(counts, snr, errors, strict=True)]
    best, covariance = scipy.optimize.curve_fit(
        lambda log_n, slope, at_1: at_1 + slope * log_n,
        np.log(counts),
        np.log(snr),
        sigma=errors / snr,  # of a logarithm
        absolute_sigma=True,
    )
    assert fit_slope(points) == pytest.approx((best[0], math.sqrt(covariance[0, 0])), rel=1e-5)
    assert fit_slope(points)[0] != pytest.approx(np.polyfit(np.log(counts), np.log(snr), 1)[0], rel=1e-2)


def test_slopes_are_fitted_where_they_are_asymptotic():
    K = (1, 4, 16, 64, 256)
    rows = [made_up("phi", "iwae", 1, k, k**-0.5) for k in K]
    rows += [made_up("phi", "dreg", 1, k, k**0.5) for k in K]
    rows += [made_up("theta", "iwae", 1, k, k**0.5) for k in K]
    rows += [made_up(side, "iwae", m, 8, m**0.5) for side in ("phi", "theta") for m in (1, 4, 16)]
    found = {(s.side, s.estimator, s.axis): s for s in slopes(rows)}
    spans = {key: (s.first, s.last) for key, s in found.items()}
    assert spans == {
        ("phi", "iwae", "K"): (16, 256),
        ("phi", "iwae", "M"): (1, 16),
        ("phi", "dreg", "K"): (64, 256),
        ("theta", "iwae", "K"): (64, 256),
        ("theta", "iwae", "M"): (1, 16),
    }
    for key, slope in found.items():
        assert slope.slope == pytest.approx(slope.theory), key
        assert slope.theory == (-0.5 if key == ("phi", "iwae", "K") else 0.5)


def test_points_without_a_signal_are_no_part_of_a_slope():
    rows = [made_up(K=k, snr=k**-0.5, error=0.001) for k in (16, 64)]
    noise = [made_up(K=256, snr=0.01, error=0.02), made_up(K=1024, snr=-0.01, error=0.02)]
    (slope,) = slopes(rows + noise)
    assert (slope.first, slope.last) == (16, 64)
    assert slopes(noise) == []


# ------------------------------------------------------------------------------------------------ several processes
def test_rows_do_not_depend_on_the_number_of_workers():
    torch.set_num_threads(1)
    model, x = toy()
    settings = [IWAE, Side("sleep", 2), VIMCO], [IWAE], [(1, 2), (2, 3)], 12
    seen: list[int] = []
    alone = list(measure(model, x, *settings))
    assert list(measure(model, x, *settings, watch=seen.append, workers=2)) == alone
    assert seen == [7 * 2] * 12 + [7 * 6] * 12


def test_mistake_is_raised_by_this_process_whatever_the_workers():
    with pytest.raises(ValueError, match="reparameterised posterior"):
        next(measure(Binary(), torch.ones(5, 3), [IWAE], [IWAE], [(1, 3)], 8, workers=2))


def test_model_that_cannot_be_handed_over_is_refused():
    model, x = toy()
    model.inference.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="workers must be 1, as the model or the data can't be given"):
        next(measure(model, x, [IWAE], [], [(1, 2)], 8, workers=2))
    with pytest.raises(ValueError, match=r"workers must be at least 1. Got 0"):
        next(measure(model, x, [IWAE], [], [(1, 2)], 8, workers=0))

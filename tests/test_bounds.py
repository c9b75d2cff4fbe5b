"""Values of the bounds against NumPy on axes that all differ, and what must hold for every draw."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.special
import torch

from lightning_iwae import bounds

M, K, B = 3, 5, 4
BETAS = [0.0, 0.05, 0.5, 1.0]


def random_log_w(*shape, scale=3.0, seed=0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 90


def numpy_bound(name, log_w, beta=None, alpha=None, partition=None):
    """A loop over data and groups, one logarithm at a time."""
    values = []
    for b in range(log_w.shape[2]):
        groups = [log_w[m, :, b].numpy() for m in range(log_w.shape[0])]
        everything = np.concatenate(groups)
        elbo = everything.mean()
        pooled = scipy.special.logsumexp(everything) - np.log(everything.size)
        miwae = np.mean([scipy.special.logsumexp(g) - np.log(g.size) for g in groups])
        values.append({"elbo": elbo, "iwae": pooled, "miwae": miwae}.get(name))
        if name == "ciwae":
            values[-1] = beta * elbo + (1 - beta) * miwae
        if name == "vr_iwae":
            tilted = [scipy.special.logsumexp((1 - alpha) * g) - np.log(g.size) for g in groups]
            values[-1] = np.mean(tilted) / (1 - alpha)
        if name == "tvo":
            values[-1] = np.mean([riemann_sum(g, partition) for g in groups])
    return np.array(values)


def riemann_sum(log_w, partition):
    """sum (b' - b) E_b[log w], its weights w^b from SciPy."""
    ends = np.linspace(0, 1, partition + 1) if isinstance(partition, int) else np.array(partition)
    means = [scipy.special.softmax(b * log_w) @ log_w for b in ends[:-1]]
    return np.diff(ends) @ means


ALL = [("elbo", {}), ("iwae", {}), ("miwae", {})] + [("ciwae", {"beta": beta}) for beta in BETAS]
ALL += [("vr_iwae", {"alpha": alpha}) for alpha in (0.0, 0.4, 0.9)]
ALL += [("tvo", {"partition": partition}) for partition in (1, 5, (0.0, 0.1, 0.7, 1.0))]
every_bound = pytest.mark.parametrize(("name", "options"), ALL)


def value(name, log_w, options):
    return getattr(bounds, name)(log_w, **options)


@every_bound
@pytest.mark.parametrize("shape", [(M, K, B), (1, K, B), (M, 1, B), (1, 1, 1), (K, M, B)])
def test_values_are_numpy_s(name, options, shape):
    log_w = random_log_w(*shape)
    found = value(name, log_w, options)
    assert found.shape == (shape[2],) and found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), numpy_bound(name, log_w, **options), rtol=1e-14)


@every_bound
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_constant_moves_every_bound_by_itself(name, options, offset):
    log_w = random_log_w(M, K, B)
    moved = value(name, log_w + offset, options)
    torch.testing.assert_close(moved, value(name, log_w, options) + offset, rtol=1e-14, atol=0)


@every_bound
def test_single_precision_at_log_weights_of_1e4(name, options):
    log_w = (1e4 * torch.randn(M, K, B, generator=torch.Generator().manual_seed(1))).float()
    found = value(name, log_w, options)
    assert found.dtype == torch.float32 and found.isfinite().all()
    np.testing.assert_allclose(found.numpy(), numpy_bound(name, log_w.double(), **options), rtol=1e-5)


# --- identities of one draw -----------------------------------------------------------------------------------


def test_one_particle_is_the_elbo():
    log_w = random_log_w(M, 1, B)
    torch.testing.assert_close(bounds.miwae(log_w), bounds.elbo(log_w), rtol=1e-15, atol=0)


def test_one_group_is_iwae():
    log_w = random_log_w(1, K, B)
    torch.testing.assert_close(bounds.miwae(log_w), bounds.iwae(log_w), rtol=1e-15, atol=0)


def test_the_ends_of_ciwae():
    log_w = random_log_w(M, K, B)
    assert torch.equal(bounds.ciwae(log_w, beta=0.0), bounds.miwae(log_w))
    assert torch.equal(bounds.ciwae(log_w, beta=1.0), bounds.elbo(log_w))


def test_the_ends_of_vr_iwae():
    log_w = random_log_w(M, K, B)
    torch.testing.assert_close(bounds.vr_iwae(log_w, alpha=0.0), bounds.miwae(log_w), rtol=1e-15, atol=0)
    nearly = bounds.vr_iwae(log_w, alpha=1 - 1e-6)
    torch.testing.assert_close(nearly, bounds.elbo(log_w), rtol=1e-6, atol=0)
    lone = random_log_w(M, 1, B)
    torch.testing.assert_close(bounds.vr_iwae(lone, alpha=0.4), bounds.elbo(lone), rtol=1e-15, atol=0)


def test_vr_iwae_falls_as_alpha_grows():
    log_w = random_log_w(M, K, B)
    for alpha, larger in pairwise((0.0, 0.2, 0.5, 0.9, 0.99)):
        assert (bounds.vr_iwae(log_w, alpha=alpha) > bounds.vr_iwae(log_w, alpha=larger)).all()


def test_tvo_rises_from_the_elbo_to_iwae_as_its_partition_gets_finer():
    """d/db log (1/K) sum w^b is E_b[log w], so that the integral is L_K: and its Riemann sums end there as 1/P."""
    log_w = random_log_w(M, K, B)
    torch.testing.assert_close(bounds.tvo(log_w, partition=1), bounds.elbo(log_w), rtol=1e-15, atol=0)
    gaps = []
    for P in (1, 2, 4, 512, 1024):
        gaps.append(bounds.miwae(log_w) - bounds.tvo(log_w, partition=P))
    assert all((coarse > fine).all() and (fine > 0).all() for coarse, fine in pairwise(gaps))
    torch.testing.assert_close(gaps[-2] / gaps[-1], torch.full((B,), 2.0, dtype=torch.float64), rtol=2e-3, atol=0)


def test_a_partition_is_a_number_of_intervals_or_its_points():
    log_w = random_log_w(M, K, B)
    for given in ([0.0, 0.25, 0.5, 0.75, 1.0], (0, 0.25, 0.5, 0.75, 1)):
        assert torch.equal(bounds.tvo(log_w, partition=given), bounds.tvo(log_w, partition=4))
    assert bounds.points(4) == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_bounds_holds_for_every_draw(seed):
    log_w = random_log_w(M, K, B, seed=seed)
    ordered = [bounds.iwae(log_w)] + [bounds.ciwae(log_w, beta=beta) for beta in BETAS]
    for higher, lower in pairwise(ordered):
        assert (higher > lower).all()
    assert (ordered[-1] == bounds.elbo(log_w)).all()


@every_bound
def test_equal_weights_make_every_bound_that_weight(name, options):
    log_w = torch.full((M, K, B), -87.5, dtype=torch.float64)
    torch.testing.assert_close(value(name, log_w, options), log_w[0, 0], rtol=1e-15, atol=0)


@every_bound
def test_the_order_of_particles_in_a_group_and_of_groups_is_nothing(name, options):
    log_w = random_log_w(M, K, B)
    shuffled = log_w[torch.tensor([2, 0, 1])][:, torch.tensor([4, 1, 0, 3, 2])]
    torch.testing.assert_close(value(name, shuffled, options), value(name, log_w, options), rtol=1e-14, atol=0)


def test_moving_a_particle_to_another_group_changes_miwae_alone():
    log_w = random_log_w(M, K, B)
    moved = log_w.clone()
    moved[0, 1], moved[2, 3] = log_w[2, 3], log_w[0, 1]
    for same in (bounds.iwae, bounds.elbo):
        torch.testing.assert_close(same(moved), same(log_w), rtol=1e-14, atol=0)
    assert ((bounds.miwae(moved) - bounds.miwae(log_w)).abs() > 1e-5).all()


def test_m_and_k_are_not_interchangeable():
    log_w = random_log_w(M, K, B)
    swapped = log_w.transpose(0, 1)
    for same in (bounds.iwae, bounds.elbo):
        torch.testing.assert_close(same(swapped), same(log_w), rtol=1e-14, atol=0)
    assert ((bounds.miwae(swapped) - bounds.miwae(log_w)).abs() > 1e-3).all()


@every_bound
def test_data_do_not_meet(name, options):
    log_w = random_log_w(M, K, B)
    alone = torch.cat([value(name, log_w[..., b : b + 1], options) for b in range(B)])
    torch.testing.assert_close(value(name, log_w, options), alone, rtol=1e-15, atol=0)


# --- zero weights ---------------------------------------------------------------------------------------------


def test_one_zero_weight_costs_a_bound_its_share_and_the_elbo_everything():
    log_w = random_log_w(M, K, B)
    log_w[1, 2, 3] = -math.inf
    for name in ("iwae", "miwae"):
        np.testing.assert_allclose(value(name, log_w, {}).numpy(), numpy_bound(name, log_w), rtol=1e-14)
    assert bounds.elbo(log_w)[3] == -math.inf and bounds.elbo(log_w)[:3].isfinite().all()
    assert bounds.ciwae(log_w, beta=0.0).isfinite().all()
    assert bounds.ciwae(log_w, beta=0.5)[3] == -math.inf


@every_bound
def test_a_group_without_any_weight_is_minus_infinity_and_never_nan(name, options):
    log_w = random_log_w(M, 1, B)
    log_w[1, 0, 3] = -math.inf
    found = value(name, log_w, options)
    assert found[:3].isfinite().all()
    assert found[3].isfinite() if name == "iwae" else found[3] == -math.inf


# --- refusals -------------------------------------------------------------------------------------------------


@every_bound
@pytest.mark.parametrize("shape", [(), (5,), (3, 5), (3, 5, 4, 1), (0, 5, 4), (3, 0, 4)])
def test_a_wrong_shape_is_named(name, options, shape):
    with pytest.raises(ValueError, match=r"must have shape \(M, K, B\).*Got ") as error:
        value(name, torch.zeros(shape), options)
    assert str(tuple(shape)) in str(error.value)


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan, math.inf])
def test_beta_outside_0_to_1_is_named(beta):
    with pytest.raises(ValueError, match=rf"beta must lie in \[0, 1\]. Got {beta}"):
        bounds.ciwae(random_log_w(M, K, B), beta=beta)


@pytest.mark.parametrize("alpha", [-0.1, 1.0, 1.1, math.nan, -math.inf])
def test_alpha_outside_0_to_1_is_named(alpha):
    with pytest.raises(ValueError, match=rf"alpha must lie in \[0, 1\). Got {alpha}"):
        bounds.vr_iwae(random_log_w(M, K, B), alpha=alpha)


@pytest.mark.parametrize("intervals", [0, -3])
def test_a_partition_without_an_interval_is_named(intervals):
    with pytest.raises(ValueError, match=rf"partition must have at least 1 interval. Got {intervals}"):
        bounds.tvo(random_log_w(M, K, B), partition=intervals)


NO_PARTITIONS = [[], [0.0], [0.0, 0.5], [0.1, 1.0], [0.0, 0.5, 0.5, 1.0], [0.0, 0.7, 0.3, 1.0], [0.0, math.nan, 1.0]]


@pytest.mark.parametrize("partition", [*NO_PARTITIONS, 2.0, "3", None])
def test_points_that_do_not_grow_from_0_to_1_are_named(partition):
    with pytest.raises(ValueError, match=r"partition must be a number of intervals, or points that grow .* Got "):
        bounds.tvo(random_log_w(M, K, B), partition=partition)

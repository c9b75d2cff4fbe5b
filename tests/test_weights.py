"""Normalised weights, log-mean-exp, ESS and leave-one-out against SciPy and NumPy, where exp overflows or vanishes."""

import math

import numpy as np
import pytest
import scipy.special
import torch

from lightning_iwae.weights import ess, log_mean_exp, log_sum_others, mean_others, normalised, relative

M, K, B = 3, 5, 4


def random_log_w(*shape, scale=3.0, seed=0, dtype=torch.float64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


CASES = {
    "ordinary": random_log_w(M, K, B),
    "far below 0": random_log_w(M, K, B) - 1e4,
    "far above 0": random_log_w(M, K, B) + 1e4,
    "far apart": 1e4 * random_log_w(M, K, B),
    "one zero weight": random_log_w(M, K, B).index_fill(1, torch.tensor([2]), -math.inf),
    "one particle": random_log_w(M, 1, B),
}
every_case = pytest.mark.parametrize("log_w", CASES.values(), ids=CASES.keys())


@every_case
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_values_are_scipy_s(log_w, dim):
    x = log_w.numpy()
    if dim == 1 or not np.isinf(x).any():
        weights = scipy.special.softmax(x, axis=dim)
        np.testing.assert_allclose(normalised(log_w, dim).numpy(), weights, rtol=1e-12)
        np.testing.assert_allclose(ess(log_w, dim).numpy(), 1 / (weights**2).sum(dim), rtol=1e-12)
    mean = scipy.special.logsumexp(x, axis=dim, b=1 / x.shape[dim])
    np.testing.assert_allclose(log_mean_exp(log_w, dim).numpy(), mean, rtol=1e-13)


def test_the_particles_are_axis_1_unless_said_otherwise():
    log_w = CASES["ordinary"]
    assert torch.equal(normalised(log_w), normalised(log_w, 1)) and ess(log_w).shape == (M, B)
    assert torch.equal(log_mean_exp(log_w), log_mean_exp(log_w, 1))


@every_case
def test_ess_lies_between_1_and_k_and_does_not_move_with_a_constant(log_w):
    k = log_w.shape[1]
    assert (ess(log_w) >= 1 - 1e-12).all() and (ess(log_w) <= k + 1e-12).all()
    torch.testing.assert_close(ess(log_w + 8.0), ess(log_w), rtol=1e-9, atol=0)


def test_ess_ends():
    assert torch.equal(ess(torch.zeros(1, 8, 1)), torch.full((1, 1), 8.0))
    assert torch.equal(ess(torch.tensor([[[0.0], [-1e4], [-math.inf]]])), torch.ones(1, 1))


def test_ess_is_the_log_form_of_the_reference():
    log_w = CASES["ordinary"]
    by_logs = torch.exp(2 * torch.logsumexp(log_w, 1) - torch.logsumexp(2 * log_w, 1))
    torch.testing.assert_close(ess(log_w), by_logs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [1, 5])
def test_a_group_without_any_weight_is_uniform_and_leaves_the_others_alone(k):
    log_w = random_log_w(M, k, B)
    log_w[1, :, 2] = -math.inf
    weights = normalised(log_w)
    assert torch.equal(weights[1, :, 2], torch.full((k,), 1 / k, dtype=torch.float64))
    others = torch.ones(M, B, dtype=bool)
    others[1, 2] = False
    expected = torch.softmax(log_w, 1).transpose(1, 2)[others]
    assert torch.equal(weights.transpose(1, 2)[others], expected)
    assert log_mean_exp(log_w)[1, 2] == -math.inf and log_mean_exp(log_w)[others].isfinite().all()


def test_single_precision_keeps_its_dtype_and_seven_digits():
    log_w = random_log_w(M, K, B) - 1e3
    single = log_w.float()
    for function in (normalised, log_mean_exp, ess):
        assert function(single).dtype == torch.float32
        torch.testing.assert_close(function(single).double(), function(single.double()), rtol=2e-6, atol=1e-7)


# --- the others -----------------------------------------------------------------------------------------------


def each_without(log_w, function):
    """`function` of the others of each particle: NumPy, one deletion at a time."""
    x = log_w.double().numpy()
    return np.stack([function(np.delete(x, k, axis=1)) for k in range(x.shape[1])], axis=1)


TAKES_ALL = random_log_w(M, K, B).index_add(1, torch.tensor([2]), torch.full((M, 1, B), 300.0, dtype=torch.float64))
OTHERS = {name: log_w for name, log_w in CASES.items() if name != "one particle"} | {
    "one takes all": TAKES_ALL,
    "two particles": random_log_w(M, 2, B),
    "one weight not zero": random_log_w(M, K, B).index_fill(1, torch.tensor([0, 2, 3, 4]), -math.inf),
}
every_other = pytest.mark.parametrize("log_w", OTHERS.values(), ids=OTHERS.keys())


@every_other
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
def test_log_sum_of_the_others_is_a_loop_over_deletions(log_w, dtype):
    log_w = log_w.to(dtype)
    found = log_sum_others(log_w)
    exact = each_without(log_w, lambda x: scipy.special.logsumexp(x, axis=1))
    assert found.dtype == dtype
    np.testing.assert_allclose(found.numpy(), exact, rtol=1e-13 if dtype == torch.float64 else 1e-6, atol=1e-5)
    eps = 2 * torch.finfo(dtype).eps  # exp's last bit depends on where in memory a value lies
    torch.testing.assert_close(log_sum_others(log_w.transpose(0, 1), 0).transpose(0, 1), found, rtol=eps, atol=eps)


def test_the_whole_less_one_is_not_the_sum_of_the_others():
    """What `log_sum_others` is there to avoid: where one weight outweighs the rest, a difference has no digit left."""
    exact = each_without(TAKES_ALL, lambda x: scipy.special.logsumexp(x, axis=1))[:, 2]
    by_difference = (TAKES_ALL.exp().sum(1) - TAKES_ALL[:, 2].exp()).log().numpy()
    assert (np.abs(by_difference - exact) > 1).all()


@every_other
def test_mean_of_the_others_is_a_loop_over_deletions(log_w):
    np.testing.assert_allclose(mean_others(log_w).numpy(), each_without(log_w, lambda x: x.mean(1)), rtol=1e-12)
    torch.testing.assert_close(mean_others(log_w.transpose(0, 2), 1).transpose(0, 2), mean_others(log_w))


@pytest.mark.parametrize("function", [log_sum_others, mean_others])
def test_a_single_particle_has_no_others(function):
    with pytest.raises(ValueError, match=r"needs at least 2 particles, as it compares .*\. Got 1"):
        function(random_log_w(M, 1, B))


def test_relative_weights_have_the_largest_at_0_and_are_0_where_all_are_zero():
    log_w = random_log_w(M, K, B) + 1e4
    log_w[1, :, 2] = -math.inf
    log_w[0, 0, 0] = -math.inf
    with np.errstate(invalid="ignore"):
        expected = log_w.numpy() - log_w.numpy().max(1, keepdims=True)
    expected[1, :, 2] = 0
    np.testing.assert_array_equal(relative(log_w).numpy(), expected)

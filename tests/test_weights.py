"""Normalised weights, log-mean-exp and ESS against SciPy and NumPy, at sizes where exp would overflow or vanish."""

import math

import numpy as np
import pytest
import scipy.special
import torch

from lightning_iwae.weights import ess, log_mean_exp, normalised

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

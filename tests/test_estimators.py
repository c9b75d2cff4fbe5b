"""Channel weights: one contract for every row of both tables, names, options and sides.

What each row is lies in `test_estimators_rows.py`, where a new one needs a twin. If it takes a new option, give that a
value in OPTIONS; the contract then covers it.
"""

import inspect
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import scipy.special
import torch

from lightning_iwae import Side, bounds
from lightning_iwae.estimators import PHI, THETA, phi_weights, theta_weights

M, K, B = 3, 5, 4
OPTIONS = {"beta": 0.3, "alpha": 0.4, "partition": 5, "gamma": 0.0}
NOT_SHIFT_INVARIANT = {"score"}  # the plain score function has the bound's value in its weights
AT_LEAST_2_PARTICLES = {"tvo", "jvi", "jvi-dreg", "rloo", "vimco", "vimco-arithmetic", "ovis"}  # or equal at K = 1


def random_log_w(*shape, scale=2.0, seed=0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 90


def required(function):
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return {p.name: OPTIONS[p.name] for p in parameters if p.default is p.empty}


ROWS = [("theta", name) for name in THETA] + [("phi", name) for name in PHI]
every_row = pytest.mark.parametrize(("side", "name"), ROWS, ids=[f"{side}-{name}" for side, name in ROWS])


def channels(side, name, log_w, **options):
    """The weights as a tuple, with the options that the row requires."""
    table, weights = (THETA, theta_weights) if side == "theta" else (PHI, phi_weights)
    found = weights(name, log_w, **required(table[name]) | options)
    return (found,) if side == "theta" else found


def softmax(log_w):
    return torch.from_numpy(scipy.special.softmax(log_w.numpy(), axis=1))


# --- the contract ---------------------------------------------------------------------------------------------

EXTREMES = {
    "ordinary": random_log_w(M, K, B),
    "far below 0": random_log_w(M, K, B) - 1e4,
    "far above 0": random_log_w(M, K, B) + 1e4,
    "far apart": random_log_w(M, K, B, scale=1e4),
    "one takes all": random_log_w(M, K, B).index_add(1, torch.tensor([2]), torch.full((M, 1, B), 1e4).double()),
    "equal": torch.full((M, K, B), -90.0, dtype=torch.float64),
    "one zero weight": random_log_w(M, K, B).index_fill(1, torch.tensor([2]), -math.inf),
    "one weight not zero": random_log_w(M, K, B).index_fill(1, torch.tensor([0, 2, 3, 4]), -math.inf),
    "one zero group": random_log_w(M, K, B).index_fill(0, torch.tensor([1]), -math.inf),
    "two particles": random_log_w(M, 2, B),
    "one particle": random_log_w(M, 1, B),
    "one particle, far below 0": random_log_w(M, 1, B) - 1e4,
    "one particle, one zero weight": random_log_w(M, 1, B).index_fill(2, torch.tensor([1]), -math.inf),
    "one of each": random_log_w(1, 1, 1),
}


@every_row
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("log_w", EXTREMES.values(), ids=EXTREMES.keys())
def test_contract_shape_dtype_detached_finite(side, name, log_w, dtype):
    log_w = log_w.to(dtype).requires_grad_()
    before = log_w.detach().clone()
    try:
        weights = channels(side, name, log_w)
    except ValueError as error:
        assert name in AT_LEAST_2_PARTICLES and log_w.shape[1] == 1 and "particles" in str(error)
        return
    for w in weights:
        assert w.shape == log_w.shape and w.dtype == dtype
        assert not w.requires_grad and w.isfinite().all()
        assert w.untyped_storage().data_ptr() != log_w.untyped_storage().data_ptr()
    assert torch.equal(before, log_w.detach())


@pytest.mark.parametrize("name", THETA)
@pytest.mark.parametrize("case", ["ordinary", "far apart", "one zero weight", "one zero group", "two particles"])
def test_contract_theta_weights_sum_to_1_as_every_bound_moves_with_a_constant(name, case):
    (a,) = channels("theta", name, EXTREMES[case])
    torch.testing.assert_close(a.sum((0, 1)), torch.ones(B, dtype=a.dtype), rtol=1e-12, atol=0)


@every_row
def test_contract_a_constant_changes_no_weight(side, name):
    log_w = random_log_w(M, K, B)
    same = [
        torch.allclose(w, v, rtol=1e-9, atol=1e-12)
        for w, v in zip(channels(side, name, log_w), channels(side, name, log_w + 64.0), strict=True)
    ]
    assert all(same) == (name not in NOT_SHIFT_INVARIANT)


@every_row
def test_contract_groups_and_data_do_not_meet(side, name):
    """Each group of each datum gets the weights it would get alone, divided by M: no axis can be mistaken."""
    log_w = random_log_w(M, K, B)
    together = channels(side, name, log_w)
    for m in range(M):
        for b in range(B):
            alone = channels(side, name, log_w[m : m + 1, :, b : b + 1])
            for w, v in zip(together, alone, strict=True):
                torch.testing.assert_close(w[m, :, b], v[0, :, 0] / M, rtol=1e-12, atol=1e-15)


@every_row
def test_contract_weights_follow_their_particles(side, name):
    log_w, order = random_log_w(M, K, B), torch.tensor([4, 1, 0, 3, 2])
    for w, v in zip(channels(side, name, log_w), channels(side, name, log_w[:, order]), strict=True):
        torch.testing.assert_close(w[:, order], v, rtol=1e-12, atol=1e-15)


@every_row
def test_contract_strides_do_not_matter(side, name):
    log_w = random_log_w(B, K, M).transpose(0, 2)
    for w, v in zip(channels(side, name, log_w), channels(side, name, log_w.contiguous()), strict=True):
        torch.testing.assert_close(w, v, rtol=1e-12, atol=1e-15)


@every_row
def test_contract_options_are_checked_by_name(side, name):
    table, weights = (THETA, theta_weights) if side == "theta" else (PHI, phi_weights)
    log_w, options = random_log_w(M, K, B), required(table[name])
    with pytest.raises(ValueError, match=rf"{side}: estimator '{name}' has no option 'betta'; it takes ") as error:
        weights(name, log_w, **options, betta=0.5)
    for option in options:
        assert option in str(error.value)
        without = {k: v for k, v in options.items() if k != option}
        with pytest.raises(ValueError, match=rf"{side}: estimator '{name}' needs the option '{option}'"):
            weights(name, log_w, **without)


@every_row
@pytest.mark.parametrize("shape", [(15, 4), (3, 5, 4, 1), (0, 5, 4), (3, 0, 4)])
def test_contract_shapes_are_checked(side, name, shape):
    with pytest.raises(ValueError, match=r"must have shape \(M, K, B\).*Got ") as error:
        channels(side, name, torch.zeros(shape))
    assert str(shape) in str(error.value)


@every_row
def test_contract_says_what_it_estimates_and_where_it_is_from(side, name):
    text = inspect.getdoc((THETA if side == "theta" else PHI)[name])
    assert text is not None and re.search(r"arXiv \d{4}\.\d{4,5}", text)


# --- the rows -------------------------------------------------------------------------------------------------

GRADIENTS = [("elbo", {}, bounds.elbo), ("iwae", {}, bounds.miwae)] + [
    ("ciwae", {"beta": beta}, lambda log_w, beta=beta: bounds.ciwae(log_w, beta=beta)) for beta in (0.0, 0.05, 0.5, 1.0)
]


@pytest.mark.parametrize(("name", "options", "bound"), GRADIENTS)
@pytest.mark.parametrize("shape", [(M, K, B), (K, M, B), (1, K, B), (M, 1, B)])
def test_bounds_weights_are_the_gradient_of_the_bound(name, options, bound, shape):
    log_w = random_log_w(*shape).requires_grad_()
    (gradient,) = torch.autograd.grad(bound(log_w).sum(), log_w)
    a = theta_weights(name, log_w, **options)
    c, s = phi_weights(name, log_w, **options)
    torch.testing.assert_close(a, gradient, rtol=1e-13, atol=1e-16)
    assert torch.equal(c, a) and torch.equal(s, -a)


def test_theta_s_pooled_weights_are_the_gradient_of_iwae():
    log_w = random_log_w(M, K, B).requires_grad_()
    (gradient,) = torch.autograd.grad(bounds.iwae(log_w).sum(), log_w)
    pooled = theta_weights("iwae", log_w.reshape(1, M * K, B)).reshape(M, K, B)
    torch.testing.assert_close(pooled, gradient, rtol=1e-13, atol=1e-16)
    assert (pooled - theta_weights("iwae", log_w)).abs().max() > 0.01


@pytest.mark.parametrize(("name", "power"), [("stl", 1), ("dreg", 2)])
def test_path_only_estimators_are_powers_of_the_weights(name, power):
    log_w = random_log_w(M, K, B)
    c, s = phi_weights(name, log_w)
    torch.testing.assert_close(c, softmax(log_w) ** power / M, rtol=1e-13, atol=0)
    assert not s.any()


def test_one_particle_is_the_elbo_for_every_row_that_estimates_a_bound():
    log_w = random_log_w(M, 1, B)
    expected = torch.full((M, 1, B), 1 / M, dtype=torch.float64)
    for name, options in (("elbo", {}), ("iwae", {}), ("ciwae", {"beta": 0.3})):
        torch.testing.assert_close(theta_weights(name, log_w, **options), expected)
        torch.testing.assert_close(phi_weights(name, log_w, **options)[0], expected)
    for name in ("stl", "dreg"):
        torch.testing.assert_close(phi_weights(name, log_w)[0], expected)


def test_m_and_k_are_not_interchangeable():
    log_w = random_log_w(M, K, B)
    for name in ("iwae", "stl", "dreg"):
        swapped = phi_weights(name, log_w.transpose(0, 1))[0].transpose(0, 1)
        assert (swapped - phi_weights(name, log_w)[0]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["elbo", "iwae", "ciwae", "stl", "dreg"])
def test_zero_weights_get_what_they_should(name):
    """NumPy in exact terms: a zero weight among others counts nothing; the only one of its group counts whole."""
    log_w = random_log_w(M, K, B)
    log_w[1, 2, 3] = -math.inf
    w = np.exp(log_w.numpy() + 90)
    w /= w.sum(1, keepdims=True)
    uniform = np.full_like(w, 1 / K)
    expected = {"elbo": uniform, "iwae": w, "ciwae": 0.3 * uniform + 0.7 * w, "stl": w, "dreg": w**2}[name] / M
    np.testing.assert_allclose(channels("phi", name, log_w)[0].numpy(), expected, rtol=1e-12)
    lone = random_log_w(M, 1, B)
    lone[1, 0, 3] = -math.inf
    np.testing.assert_allclose(channels("phi", name, lone)[0].numpy(), 1 / M)


# --- names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "side", "table"), [(theta_weights, "theta", THETA), (phi_weights, "phi", PHI)])
def test_an_unknown_name_lists_the_known_ones(weights, side, table):
    for name in ("iwea", "", ".", "..x", "x..y", "math.nothing", "no.such.module", "math.pi", "IWAE"):
        with pytest.raises(ValueError, match=rf"^{side}: unknown estimator '{re.escape(name)}'") as error:
            weights(name, random_log_w(M, K, B))
        assert f"Known for {side}: {', '.join(table)}, or package.module.function" in str(error.value)


def test_a_name_of_the_other_side_is_said_to_be_one():
    with pytest.raises(ValueError, match=r"theta: estimator 'dreg' is for the other side only. Known for theta: elbo"):
        theta_weights("dreg", random_log_w(M, K, B))


OWN = """
import torch

def half(log_w, *, floor=0.0, tilt):
    return torch.softmax(tilt * log_w, 1) / log_w.shape[0] + floor

def path(log_w):
    return torch.softmax(log_w, 1), torch.zeros_like(log_w)

def flat(log_w):
    return torch.softmax(log_w, 1).mean(1, keepdim=True)

def stacked(log_w):
    return torch.stack([log_w, log_w])
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_estimators.py").write_text(OWN)
    (tmp_path / "broken_estimators.py").write_text("import a_package_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)


def test_an_estimator_of_one_s_own(own):
    log_w = random_log_w(M, K, B)
    found = theta_weights("own_estimators.half", log_w, tilt=0.5)
    torch.testing.assert_close(found, softmax(0.5 * log_w) / M)
    torch.testing.assert_close(phi_weights("own_estimators.path", log_w)[0], softmax(log_w))
    Side("own_estimators.path", K).check("phi", M * K)
    with pytest.raises(ValueError, match=r"theta: estimator 'own_estimators.half' needs the option 'tilt'"):
        theta_weights("own_estimators.half", log_w)
    with pytest.raises(ValueError, match="has no option 'beta'; it takes floor, tilt"):
        theta_weights("own_estimators.half", log_w, tilt=0.5, beta=0.1)


def test_an_estimator_of_one_s_own_must_return_weights(own):
    log_w = random_log_w(2, K, B)
    for name in ("own_estimators.flat", "own_estimators.path", "own_estimators.stacked"):
        with pytest.raises(ValueError, match=rf"theta: estimator '{name}' must return a tensor a of shape \(M, K, B\)"):
            theta_weights(name, log_w)
    for name in ("own_estimators.flat", "own_estimators.stacked"):
        with pytest.raises(ValueError, match=rf"phi: estimator '{name}' must return a tuple of tensors \(c, s\)"):
            phi_weights(name, log_w)


def test_an_estimator_whose_module_does_not_import_says_why(own):
    with pytest.raises(ValueError, match=r"unknown estimator 'broken_estimators.f' \(No module named 'a_package_that"):
        theta_weights("broken_estimators.f", random_log_w(M, K, B))


# --- sides ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("particles", [0, -8, 3, 7, 48, 128])
def test_particles_must_divide_samples_and_the_divisors_are_listed(particles):
    with pytest.raises(ValueError) as error:
        Side("iwae", particles).check("phi", 64)
    assert "phi.particles must divide samples (64): one of 1, 2, 4, 8, 16, 32, 64." in str(error.value)
    assert str(error.value).endswith(f"Got {particles}.")


@pytest.mark.parametrize(
    ("side", "key", "message"),
    [
        (Side("iwae", 8, beta=0.5), "theta", "theta: estimator 'iwae' has no option 'beta'; it takes none"),
        (Side("ciwae", 8), "model.theta", "needs the option 'beta'"),
        (Side("ciwae", 8, beta=1.5), "theta", r"beta must lie in \[0, 1\]. Got 1.5"),
        (Side("dreg", 8), "theta", "^theta: estimator 'dreg' is for the other side only"),
        (Side("dreg", 8), "model.theta", "^model.theta: estimator 'dreg' is for the other side only"),
        (Side("dregs", 8), "model.phi", "^model.phi: unknown estimator 'dregs'. Known for model.phi: .*, dreg,"),
        (Side("dregs", 8), "phi", "^phi: unknown estimator 'dregs'. Known for phi: elbo, iwae"),
    ],
)
def test_a_side_s_mistakes_are_named(side, key, message):
    with pytest.raises(ValueError, match=message):
        side.check(key, 64)


@pytest.mark.parametrize("samples", [0, -1])
def test_samples_must_be_positive(samples):
    with pytest.raises(ValueError, match=f"samples must be at least 1. Got {samples}"):
        Side("iwae", 1).check("theta", samples)


def test_a_side_views_samples_row_major_with_its_own_k():
    log_w = random_log_w(12, B)
    side = Side("iwae", 4)
    assert side.view(log_w).shape == (3, 4, B)
    for m in range(3):
        for k in range(4):
            assert torch.equal(side.view(log_w)[m, k], log_w[4 * m + k])
    torch.testing.assert_close(side.theta(log_w)[4:8], torch.softmax(log_w[4:8], 0) / 3)
    c, s = replace(side, estimator="dreg").phi(log_w)
    torch.testing.assert_close(c[8:], torch.softmax(log_w[8:], 0) ** 2 / 3)
    assert c.shape == s.shape == (12, B) and not s.any()

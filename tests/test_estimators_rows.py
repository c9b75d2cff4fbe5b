"""Each row of the tables: its formula in 60-digit decimals, the bound it differentiates, its identities, its ends.

A row's twin here is its paper's formula for one group, written as a loop over particles in Python's decimals: sums of
the others are sums of the others, so that no weight is too small or too large. Every row has one.
"""

import math
from decimal import Context, Decimal, localcontext
from itertools import pairwise

import pytest
import torch

from lightning_iwae import bounds
from lightning_iwae.estimators import DREAMING, PHI, PRIOR, THETA, phi_weights, prior_weights, theta_weights
from tests.test_estimators import EXTREMES, B, K, M, channels, random_log_w, required

ONE = Decimal(1)


# --- twins ------------------------------------------------------------------------------------------------------


def others(values, k):
    return values[:k] + values[k + 1 :]


def mean(values):
    return sum(values) / len(values)


def powered(f, power=ONE):
    """w~ from w^power."""
    w = [(power * v).exp() for v in f]
    return [v / sum(w) for v in w]


def log_mean(w):
    return mean(w).ln()


def both(a):
    """(c, s) of a total derivative."""
    return a, [-v for v in a]


def path(c):
    return c, [Decimal(0)] * len(c)


def score(s):
    return [Decimal(0)] * len(s), s


def elbo(f):
    return [ONE / len(f)] * len(f)


def ciwae(f, beta):
    return [beta / len(f) + (1 - beta) * w for w in powered(f)]


def jackknifed(f, power):
    """K w~_k^p less (K-1)/K of the same of each set without i."""
    n, w = len(f), [v.exp() for v in f]
    whole = [n * (v / sum(w)) ** power for v in w]
    if n == 1:
        return whole
    sets = [sum((w[k] / sum(others(w, i))) ** power for i in range(n) if i != k) for k in range(n)]
    return [v - (n - 1) * part / n for v, part in zip(whole, sets, strict=True)]


def vimco(f, stand_in):
    w = [v.exp() for v in f]
    without = [log_mean([*others(w, k), stand_in(others(f, k))]) for k in range(len(f))]
    return score([log_mean(w) - rest - v for rest, v in zip(without, powered(f), strict=True)])


def ovis(f, gamma):
    """d_k - c_k, with c_k = log Z^_-k - gamma w~_k + (1 - gamma) log(1 - 1/K)."""
    w, last = [v.exp() for v in f], (1 - ONE / len(f)).ln()
    control = [log_mean(others(w, k)) - gamma * v + (1 - gamma) * last for k, v in enumerate(powered(f))]
    return score([log_mean(w) - v - c for v, c in zip(powered(f), control, strict=True)])


def tvo(f, partition):
    """(a, s): w~ and its covariance with log w, over the left ends of equal intervals."""
    n, a, s = len(f), [Decimal(0)] * len(f), [Decimal(0)] * len(f)
    for i in range(partition):
        b, width = Decimal(i) / partition, ONE / partition
        w = powered(f, b)
        expected = sum(v * u for v, u in zip(w, f, strict=True))
        for k in range(n):
            covariance = w[k] * (f[k] - expected) * n / (n - 1)
            a[k] += width * (w[k] + b * covariance)
            s[k] += width * ((1 - b) * covariance - w[k])
    return a, s


TWINS_OF_THETA = {
    "elbo": elbo,
    "iwae": powered,
    "ciwae": ciwae,
    "vr-iwae": lambda f, alpha: powered(f, 1 - alpha),
    "tvo": lambda f, partition: tvo(f, partition)[0],
    "jvi": lambda f: jackknifed(f, 1),
    "gdreg": powered,
}
TWINS_OF_PHI = {
    "elbo": lambda f: both(elbo(f)),
    "iwae": lambda f: both(powered(f)),
    "ciwae": lambda f, beta: both(ciwae(f, beta)),
    "vr-iwae": lambda f, alpha: both(powered(f, 1 - alpha)),
    "tvo": lambda f, partition: score(tvo(f, partition)[1]),
    "jvi": lambda f: both(jackknifed(f, 1)),
    "stl": lambda f: path(powered(f)),
    "dreg": lambda f: path([w * w for w in powered(f)]),
    "ciwae-dreg": lambda f, beta: path([beta / len(f) + (1 - beta) * w * w for w in powered(f)]),
    "vr-iwae-dreg": lambda f, alpha: path([alpha * w + (1 - alpha) * w * w for w in powered(f, 1 - alpha)]),
    "jvi-dreg": lambda f: path(jackknifed(f, 2)),
    "wake": lambda f: score(powered(f)),
    "rws-dreg": lambda f: path([w * (1 - w) for w in powered(f)]),
    "score": lambda f: score([log_mean([v.exp() for v in f]) - w for w in powered(f)]),
    "rloo": lambda f: score([(f[k] - mean(others(f, k))) / len(f) for k in range(len(f))]),
    "vimco": lambda f: vimco(f, lambda rest: mean(rest).exp()),
    "vimco-arithmetic": lambda f: vimco(f, lambda rest: mean([v.exp() for v in rest])),
    "ovis": ovis,
    "sleep": lambda f: path([Decimal(0)] * len(f)),
}
ROWS = [("theta", name) for name in TWINS_OF_THETA] + [("phi", name) for name in TWINS_OF_PHI]
every_row = pytest.mark.parametrize(("side", "name"), ROWS, ids=[f"{side}-{name}" for side, name in ROWS])


def twin(side, name, log_w, **given):
    """A row's channels of log-weights (M, K, B), from its twin; groups and data one by one."""
    table, twins = (THETA, TWINS_OF_THETA) if side == "theta" else (PHI, TWINS_OF_PHI)
    options = {o: v if isinstance(v, int) else Decimal(str(v)) for o, v in (required(table[name]) | given).items()}
    found = torch.zeros(2, *log_w.shape, dtype=torch.float64)
    with localcontext(Context(prec=60)):
        for m in range(log_w.shape[0]):
            for b in range(log_w.shape[2]):
                f = [Decimal(v) for v in log_w[m, :, b].double().tolist()]
                weights = twins[name](f, **options)
                for i, channel in enumerate((weights, weights) if side == "theta" else weights):
                    found[i, m, :, b] = torch.tensor([float(v / log_w.shape[0]) for v in channel], dtype=torch.float64)
    return (found[0],) if side == "theta" else tuple(found)


def test_every_row_has_a_twin():
    assert set(TWINS_OF_THETA) == set(THETA) and set(TWINS_OF_PHI) == set(PHI)


FINITE = {
    "ordinary": random_log_w(M, K, B),
    "two particles": random_log_w(M, 2, B),
    "wide": random_log_w(M, K, B, scale=30.0),
    "one outweighs the rest": random_log_w(M, K, B).index_add(
        1, torch.tensor([2]), torch.full((M, 1, B), 80.0, dtype=torch.float64)
    ),
    "by a thousand nats": random_log_w(1, 3, 2, scale=1e3),
    "far below 0": random_log_w(1, 3, 2) - 1e4,
    "equal": torch.full((1, 3, 1), -90.0, dtype=torch.float64),
}


@every_row
@pytest.mark.parametrize("log_w", FINITE.values(), ids=FINITE.keys())
def test_weights_are_the_formula_in_decimals(side, name, log_w):
    """To 12 digits of the group's largest."""
    for w, exact in zip(channels(side, name, log_w), twin(side, name, log_w), strict=True):
        assert ((w - exact).abs() <= 1e-12 * exact.abs().amax(1, keepdim=True) + 1e-15).all()


OTHER_OPTIONS = [
    *(("phi", "ovis", {"gamma": gamma}) for gamma in (0.3, 1.0)),
    *(
        (side, name, {"beta": beta})
        for side, name in (("theta", "ciwae"), ("phi", "ciwae-dreg"))
        for beta in (0.0, 1.0)
    ),
    *((side, "tvo", {"partition": P}) for side in ("theta", "phi") for P in (1, 2, 12)),
    *((side, name, {"alpha": 0.9}) for side, name in (("theta", "vr-iwae"), ("phi", "vr-iwae-dreg"))),
]


@pytest.mark.parametrize(("side", "name", "options"), OTHER_OPTIONS)
def test_weights_of_other_options_are_the_formula_in_decimals(side, name, options):
    log_w = FINITE["wide"]
    for w, exact in zip(channels(side, name, log_w, **options), twin(side, name, log_w, **options), strict=True):
        assert ((w - exact).abs() <= 1e-12 * exact.abs().amax(1, keepdim=True) + 1e-15).all()


@pytest.mark.parametrize("name", ["vimco", "vimco-arithmetic", "ovis", "jvi", "jvi-dreg"])
def test_leave_one_out_is_exact_in_single_precision_where_one_outweighs_the_rest(name):
    """By taking w_k off the sum, log(1 - w~) would be log 0."""
    log_w = FINITE["one outweighs the rest"].float()
    for w, exact in zip(channels("phi", name, log_w), twin("phi", name, log_w), strict=True):
        assert w.dtype == torch.float32 and w.isfinite().all()
        torch.testing.assert_close(w.double(), exact, rtol=2e-7, atol=1e-12)
    assert torch.isinf(torch.log(1 - torch.softmax(log_w, 1))).any()


def test_gdreg_s_channels_of_the_prior():
    """b = w~ / M and c = -w~^2 / M, from `stl` and `dreg` of the same decimals."""
    log_w = FINITE["wide"]
    b, c = prior_weights("gdreg", log_w)
    torch.testing.assert_close(b, twin("phi", "stl", log_w)[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(c, -twin("phi", "dreg", log_w)[0], rtol=1e-12, atol=0)
    assert set(PRIOR) == {"gdreg"} and set(DREAMING) == {"sleep"}


# --- gradients of bounds ----------------------------------------------------------------------------------------

TOTAL = [("vr-iwae", {"alpha": alpha}, bounds.vr_iwae) for alpha in (0.0, 0.3, 0.9)] + [("jvi", {}, bounds.jvi)]


@pytest.mark.parametrize(("name", "options", "bound"), TOTAL)
@pytest.mark.parametrize("shape", [(M, K, B), (K, M, B), (1, K, B), (M, 2, B)])
def test_weights_are_the_gradient_of_the_bound(name, options, bound, shape):
    log_w = random_log_w(*shape).requires_grad_()
    (gradient,) = torch.autograd.grad(bound(log_w, **options).sum(), log_w)
    a = theta_weights(name, log_w, **options)
    c, s = phi_weights(name, log_w, **options)
    torch.testing.assert_close(a, gradient, rtol=1e-11, atol=1e-14)
    assert torch.equal(c, a) and torch.equal(s, -a)


@pytest.mark.parametrize("partition", [1, 2, 7, (0.0, 0.02, 0.3, 1.0)])
def test_tvo_is_the_gradient_of_its_sum_but_for_the_covariance_s_correction(partition):
    """d/d log w_k of sum_b db E_b[f] is db [w~ + b Cov]; K/(K-1) multiplies the second term alone."""
    log_w = random_log_w(M, K, B).requires_grad_()
    (gradient,) = torch.autograd.grad(bounds.tvo(log_w, partition=partition).sum(), log_w)
    first = sum(
        (after - b) * torch.softmax(b * log_w.detach(), 1) / M for b, after in pairwise(bounds.points(partition))
    )
    a = theta_weights("tvo", log_w, partition=partition)
    torch.testing.assert_close(a, first + K / (K - 1) * (gradient - first), rtol=1e-11, atol=1e-14)


def crowd(copies):
    """A latent of 3 states, q = (2, 1, 5)/8 held by so many copies, so that particles' averages are those under q.

    Returns log w (1, K, 1), the state of each particle, logits of q and log p(x, z).
    """
    logits = torch.tensor([2.0, 1.0, 5.0], dtype=torch.float64).log().requires_grad_()
    log_p = torch.tensor([-1.0, -2.5, -0.3], dtype=torch.float64, requires_grad=True)
    z = torch.tensor([0] * 2 + [1] + [2] * 5).repeat(copies)
    return (log_p - logits.log_softmax(0)).detach()[z][None, :, None], z, logits, log_p


@pytest.mark.parametrize("partition", [1, 3, (0.0, 0.1, 0.6, 1.0)])
def test_tvo_of_every_state_in_its_share_is_the_gradient_of_the_exact_sum(partition):
    """By autograd of sum_b db sum_z pi_b(z) log w(z), enumerated. K/(K-1) is 1 to within 1e-5 at K = 160,000."""
    log_w, z, logits, log_p = crowd(20_000)
    log_q = logits.log_softmax(0)
    f, total = log_p - log_q, torch.zeros((), dtype=torch.float64)
    for b, after in pairwise(bounds.points(partition)):
        total = total + (after - b) * (torch.softmax((1 - b) * log_q + b * log_p, 0) * f).sum()
    of_q, of_p = torch.autograd.grad(total, [logits, log_p])
    one_hot = torch.nn.functional.one_hot(z, 3).double()
    a = theta_weights("tvo", log_w, partition=partition).flatten()
    s = phi_weights("tvo", log_w, partition=partition)[1].flatten()
    torch.testing.assert_close(a @ one_hot, of_p, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(s @ (one_hot - log_q.exp().detach()), of_q, rtol=2e-5, atol=1e-6)


# --- identities of one draw -------------------------------------------------------------------------------------


def test_stl_is_dreg_and_dreg_of_reweighted_wake_sleep():
    log_w = random_log_w(M, K, B)
    parts = phi_weights("dreg", log_w)[0] + phi_weights("rws-dreg", log_w)[0]
    torch.testing.assert_close(phi_weights("stl", log_w)[0], parts, rtol=1e-14, atol=0)


@pytest.mark.parametrize("particles", [2, K])
def test_rloo_is_the_gradient_of_minus_half_the_variance_of_log_w(particles):
    """VarGrad: unbiased variance over the particles of a group, through log q alone, z held."""
    log_q = random_log_w(M, particles, B, seed=1).requires_grad_()
    log_p = random_log_w(M, particles, B, seed=2)
    log_w = log_p - log_q
    (gradient,) = torch.autograd.grad(-0.5 * log_w.var(1, correction=1).mean(0).sum(), log_q)
    c, s = phi_weights("rloo", log_w)
    torch.testing.assert_close(s, gradient, rtol=1e-12, atol=1e-15)
    assert not c.any()


def test_wake_theta_is_iwae_s_theta():
    log_w = random_log_w(M, K, B)
    wake_theta = (torch.softmax(log_w, 1) / M * random_log_w(M, K, B, seed=4)).sum((0, 1))
    iwae = (theta_weights("iwae", log_w) * random_log_w(M, K, B, seed=4)).sum((0, 1))
    torch.testing.assert_close(iwae, wake_theta, rtol=1e-14, atol=0)
    assert torch.equal(phi_weights("wake", log_w)[1], theta_weights("iwae", log_w))


def test_both_vimcos_are_one_at_two_particles_alone():
    for particles, same in ((2, True), (3, False)):
        log_w = random_log_w(M, particles, B)
        geometric, arithmetic = (phi_weights(name, log_w)[1] for name in ("vimco", "vimco-arithmetic"))
        assert torch.allclose(geometric, arithmetic, rtol=1e-12, atol=1e-15) == same


def test_vimco_arithmetic_is_ovis_at_gamma_0_but_for_a_constant():
    """log(1 - 1/K), which has no part in the mean. At gamma = 1 OVIS has that constant, and wake's weights on top."""
    log_w = random_log_w(M, K, B)
    ovis_0, ovis_1 = (phi_weights("ovis", log_w, gamma=gamma)[1] for gamma in (0.0, 1.0))
    last = math.log(1 - 1 / K) / M
    torch.testing.assert_close(phi_weights("vimco-arithmetic", log_w)[1], ovis_0 + last, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(ovis_1, ovis_0 + last + phi_weights("wake", log_w)[1], rtol=1e-11, atol=1e-14)


# --- ends -------------------------------------------------------------------------------------------------------

ENDS = [
    ("theta", "ciwae", {"beta": 0.0}, "iwae"),
    ("theta", "ciwae", {"beta": 1.0}, "elbo"),
    ("theta", "vr-iwae", {"alpha": 0.0}, "iwae"),
    ("theta", "vr-iwae", {"alpha": 1 - 1e-13}, "elbo"),
    ("theta", "tvo", {"partition": 1}, "elbo"),
    ("phi", "ciwae", {"beta": 0.0}, "iwae"),
    ("phi", "ciwae", {"beta": 1.0}, "elbo"),
    ("phi", "ciwae-dreg", {"beta": 0.0}, "dreg"),
    ("phi", "vr-iwae", {"alpha": 0.0}, "iwae"),
    ("phi", "vr-iwae-dreg", {"alpha": 0.0}, "dreg"),
]


@pytest.mark.parametrize(("side", "name", "options", "end"), ENDS)
def test_ends_of_a_family_are_other_rows(side, name, options, end):
    log_w = random_log_w(M, K, B)
    for w, v in zip(channels(side, name, log_w, **options), channels(side, end, log_w), strict=True):
        torch.testing.assert_close(w, v, rtol=1e-10, atol=1e-14)


def test_ciwae_dreg_at_beta_1_and_vr_iwae_dreg_near_alpha_1_are_the_path_of_the_elbo():
    """Roeder et al.'s at K = 1, of every particle."""
    log_w = random_log_w(M, K, B)
    for name, options in (("ciwae-dreg", {"beta": 1.0}), ("vr-iwae-dreg", {"alpha": 1 - 1e-13})):
        c, s = phi_weights(name, log_w, **options)
        torch.testing.assert_close(c, torch.full_like(log_w, 1 / (M * K)), rtol=1e-10, atol=0)
        assert not s.any()


def test_tvo_of_one_interval_is_rloo_and_a_constant():
    """The ELBO's covariance form: -1/K has no part in the mean."""
    log_w = random_log_w(M, K, B)
    s = phi_weights("tvo", log_w, partition=1)[1]
    torch.testing.assert_close(s, phi_weights("rloo", log_w)[1] - 1 / (M * K), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", ["iwae", "ciwae", "vr-iwae", "jvi"])
def test_one_particle_is_the_elbo_s_total_derivative(name):
    log_w = random_log_w(M, 1, B)
    for w, v in zip(channels("phi", name, log_w), phi_weights("elbo", log_w), strict=True):
        torch.testing.assert_close(w, v, rtol=1e-14, atol=0)
    torch.testing.assert_close(channels("theta", name, log_w)[0], theta_weights("elbo", log_w), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["dreg", "ciwae-dreg", "vr-iwae-dreg", "jvi-dreg"])
def test_one_particle_is_stl(name):
    log_w = random_log_w(M, 1, B)
    for w, v in zip(channels("phi", name, log_w), phi_weights("stl", log_w), strict=True):
        torch.testing.assert_close(w, v, rtol=1e-14, atol=0)
    assert not phi_weights("rws-dreg", log_w)[0].any()


# --- weights of zero --------------------------------------------------------------------------------------------


def limit_of(side, name, log_w):
    """A row's channels as the weights of zero go to zero, and where they are still on the move then."""
    found = [
        torch.stack(channels(side, name, log_w.masked_fill(log_w == -math.inf, log_w[log_w.isfinite()].min() - far)))
        for far in (1e3, 2e3)
    ]
    return found[1], ~torch.isclose(*found, rtol=1e-9, atol=1e-12)


SUMS = {"tvo": 2, "jvi": 1, "jvi-dreg": 1}  # of terms with a limit and others without, in so many of these cases
CASES = ["one zero weight", "one weight not zero"]


@pytest.mark.parametrize(
    ("side", "name", "case"), [(*row, case) for row in ROWS for case in CASES[: 2 - SUMS.get(row[1], 0)]]
)
def test_zero_weights_are_the_limit_of_small_ones_or_leave_no_score(side, name, case):
    """Where there is no limit, as the row has log w itself in it, the weight is 0."""
    log_w = EXTREMES[case]
    found, (limit, moving) = torch.stack(channels(side, name, log_w)), limit_of(side, name, log_w)
    torch.testing.assert_close(found[~moving], limit[~moving], rtol=1e-9, atol=1e-12)
    assert not found[moving].any()
    diverging = {"rloo"} if case == "one zero weight" else {"rloo", "vimco", "vimco-arithmetic", "ovis"}
    assert bool(moving.any()) == (name in diverging)


def test_tvo_s_first_point_has_no_covariance_beside_a_weight_of_zero():
    """E_q[log w] is -inf there. What is left is -w~ at b = 0, and all of the limit at b > 0."""
    log_w, points = EXTREMES["one zero weight"], (0.0, 0.25, 1.0)
    limit = log_w.masked_fill(log_w == -math.inf, -1e5)
    w = torch.softmax(0.25 * limit, 1)
    covariance = K / (K - 1) * w * (limit - (w * limit).sum(1, keepdim=True))
    s = phi_weights("tvo", log_w, partition=points)[1]
    torch.testing.assert_close(s, (-0.25 / K + 0.75 * (0.75 * covariance - w)) / M, rtol=1e-10, atol=1e-13)
    a = theta_weights("tvo", log_w, partition=points)
    torch.testing.assert_close(a, (0.25 / K + 0.75 * (w + 0.25 * covariance)) / M, rtol=1e-10, atol=1e-13)
    assert (s[:, 2] < 0).all()  # never towards z of no weight

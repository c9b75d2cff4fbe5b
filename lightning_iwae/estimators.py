"""Gradient estimators as channel weights: pure functions of log-weights (M, K, B), nothing else.

Every estimator is an ascent direction made of three sums over groups m and particles k (docs: README, "The one idea"):

    theta:  sum a_mk * grad_theta log p_theta(x, z_mk)
    phi:    sum c_mk * (d log w_mk / d z_mk) (d z_mk / d phi)     path: phi held inside log q, z live
          + sum s_mk * grad_phi log q_phi(z_mk | x)               score: z held, phi live

A theta estimator returns `a`, a phi estimator `(c, s)`, all of shape (M, K, B), divided by M and not by B. Below,
w~ are the weights normalised within each group, so that "iwae" on (M, K) is the gradient of `bounds.miwae`, and
g = (d log w / dz)(dz / d phi), h = grad_phi log q. Those with c = 0 need no reparameterised q, and fit discrete z.
Where weights of zero leave a score no finite value, as in rloo, it is 0. Where all of a group's are zero, w~ is
uniform.

To add one: write the function, add its row to THETA or PHI, its twin to `tests/test_estimators_rows.py`.
"""

import importlib
import inspect
import math
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .bounds import Partition, check_alpha, check_beta, check_log_w, points
from .mistakes import did_you_mean, nearest
from .weights import check_others, log_mean_exp, log_sum_others, mean_others, normalised, relative

Phi = tuple[Tensor, Tensor]
ThetaEstimator = Callable[..., Tensor]
PhiEstimator = Callable[..., Phi]


# ------------------------------------------------------------------------------------------------ total derivatives
def elbo_weights(log_w: Tensor) -> Tensor:
    """Estimates the gradient of the ELBO, one log w after another: a = 1 / (M K). Kingma & Welling, arXiv 1312.6114."""
    M, K, _ = log_w.shape
    return torch.full_like(log_w, 1.0 / (M * K))


def iwae_weights(log_w: Tensor) -> Tensor:
    """Estimates the gradient of L_K: a = w~ / M. For theta the same as wake-theta (arXiv 1406.2751).

    Identity: d log (1/K) sum w = sum w~ d log w. Burda et al., arXiv 1509.00519.
    """
    return normalised(log_w) / len(log_w)


def ciwae_weights(log_w: Tensor, *, beta: float) -> Tensor:
    """Estimates the gradient of beta * ELBO + (1 - beta) * L_K: the same mixture of their weights.

    Rainforth et al., arXiv 1802.04537. Requires 0 <= beta <= 1.
    """
    check_beta(beta)
    return beta * elbo_weights(log_w) + (1.0 - beta) * iwae_weights(log_w)


def vr_iwae_weights(log_w: Tensor, *, alpha: float) -> Tensor:
    """Estimates the gradient of `bounds.vr_iwae`: a = w~ / M with w~ from w^(1 - alpha).

    Daudel et al., arXiv 2210.06226, of which Renyi's bound (arXiv 1602.02311) is the limit in K. Requires
    0 <= alpha < 1; alpha = 0 is the IWAE.
    """
    check_alpha(alpha)
    return normalised((1.0 - alpha) * log_w) / len(log_w)


def jvi_weights(log_w: Tensor) -> Tensor:
    """Estimates the gradient of the first-order jackknife, `bounds.jvi`: K times IWAE's less its leave-one-outs'.

    a = K w~ - (K-1)/K sum_(i != k) w_k / sum_(l != i) w_l, over M. Nowozin, ICLR 2018; Tucker et al., arXiv 1810.04152.
    At K = 1 the ELBO's.
    """
    return _jackknifed(log_w, 1)


def total(a: Tensor) -> Phi:
    """The total derivative a * d log w / d phi in channels: all of the path, minus the score of log q."""
    return a, -a


def elbo_phi(log_w: Tensor) -> Phi:
    """Estimates the gradient of the ELBO by reparameterisation. Kingma & Welling, arXiv 1312.6114."""
    return total(elbo_weights(log_w))


def iwae_phi(log_w: Tensor) -> Phi:
    """Estimates the gradient of L_K by reparameterisation. Burda et al., arXiv 1509.00519.

    Its SNR falls as K^-1/2 (Rainforth et al., arXiv 1802.04537, theorem 1).
    """
    return total(iwae_weights(log_w))


def ciwae_phi(log_w: Tensor, *, beta: float) -> Phi:
    """Estimates the gradient of beta * ELBO + (1 - beta) * L_K. Rainforth et al., arXiv 1802.04537."""
    return total(ciwae_weights(log_w, beta=beta))


def vr_iwae_phi(log_w: Tensor, *, alpha: float) -> Phi:
    """Estimates the gradient of `bounds.vr_iwae` by reparameterisation. Daudel et al., arXiv 2210.06226.

    For alpha > 0 the gradient does not vanish with K, and its SNR rises as K^+1/2.
    """
    return total(vr_iwae_weights(log_w, alpha=alpha))


def jvi_phi(log_w: Tensor) -> Phi:
    """Estimates the gradient of `bounds.jvi` by reparameterisation. Nowozin, ICLR 2018; arXiv 1810.04152."""
    return total(jvi_weights(log_w))


# ------------------------------------------------------------------------------------------------ path only
def stl(log_w: Tensor) -> Phi:
    """Sticking the landing: the IWAE's path with its score dropped, c = w~ / M. Roeder et al., arXiv 1703.09194.

    Estimates the ELBO's gradient at K = 1 only (there E[score] = 0). For K > 1 it is biased for L_K and tends to
    the wake-phi direction -grad KL(posterior || q). Per draw the sum of dreg and rws-dreg.
    """
    return path_only(normalised(log_w))


def dreg(log_w: Tensor) -> Phi:
    """Estimates the gradient of L_K, doubly reparameterised: c = w~^2 / M, no score. Tucker et al., arXiv 1810.04152.

    Identity: E[score term] rewritten by a second reparameterisation. Its SNR rises as K^+1/2.
    """
    return path_only(normalised(log_w).square())


def rws_dreg(log_w: Tensor) -> Phi:
    """Estimates what `wake` does, doubly reparameterised: c = (w~ - w~^2) / M. Tucker et al., arXiv 1810.04152.

    Identity: E[sum w~ h] = E[sum (w~ - w~^2) g]. Zero at K = 1.
    """
    w = normalised(log_w)
    return path_only(w - w.square())


def ciwae_dreg(log_w: Tensor, *, beta: float) -> Phi:
    """Estimates the gradient of beta * ELBO + (1 - beta) * L_K: stl's at K = 1 mixed with dreg's.

    c = (beta / K + (1 - beta) w~^2) / M, by the identities of arXiv 1703.09194 and 1810.04152.
    """
    check_beta(beta)
    return path_only(beta / log_w.shape[1] + (1.0 - beta) * normalised(log_w).square())


def vr_iwae_dreg(log_w: Tensor, *, alpha: float) -> Phi:
    """Estimates the gradient of `bounds.vr_iwae`: c = (alpha w~ + (1 - alpha) w~^2) / M, w~ from w^(1 - alpha).

    Daudel et al., arXiv 2210.06226.
    """
    check_alpha(alpha)
    w = normalised((1.0 - alpha) * log_w)
    return path_only(alpha * w + (1.0 - alpha) * w.square())


def jvi_dreg(log_w: Tensor) -> Phi:
    """Estimates the gradient of the first-order jackknife: dreg's squared weights in `jvi_weights`' combination.

    Tucker et al., arXiv 1810.04152. At K = 1 stl's.
    """
    return _jackknifed(log_w, 2), torch.zeros_like(log_w)


def path_only(c: Tensor) -> Phi:
    """Channels of the weights c, not yet divided by M, without a score."""
    return c / len(c), torch.zeros_like(c)


def _jackknifed(log_w: Tensor, power: int) -> Tensor:
    """(K w~_k^p - (K-1)/K sum_(i != k) w_k^p / (sum_(l != i) w_l)^p) / M."""
    M, K, _ = log_w.shape
    log_w = relative(log_w)
    whole = normalised(log_w) ** power
    if K == 1:
        return whole / M
    log_rest = log_sum_others(log_w)  # of the particles without i
    inverse = (-power * log_rest).masked_fill(log_rest == -math.inf, -math.inf)
    parts = (power * log_w + log_sum_others(inverse)).exp()
    return (K * whole - (K - 1) / K * parts) / M


# ------------------------------------------------------------------------------------------------ score only
def wake(log_w: Tensor) -> Phi:
    """Wake-phase phi of reweighted wake-sleep: s = w~ / M, ascent on -KL(posterior || q), biased by O(1/K).

    Bornschein & Bengio, arXiv 1406.2751; Le et al., arXiv 1805.10469. Its mean is zero at K = 1.
    """
    return score_only(normalised(log_w))


def score(log_w: Tensor) -> Phi:
    """Estimates the gradient of L_K by the plain score function: s = (L^ - w~) / M, L^ = log (1/K) sum w.

    Identity: grad E[L^] = E[L^ grad log q] + E[grad L^]; the baseline-free form of Mnih & Rezende, arXiv 1602.06725.
    """
    return score_only(log_mean_exp(log_w).unsqueeze(1) - normalised(log_w))


def rloo(log_w: Tensor) -> Phi:
    """Estimates the gradient of the ELBO: s = (log w_k - mean of the others' log w) / (M K). Requires K >= 2.

    Leave-one-out baselines (Kool et al., 2019); per draw the gradient of -1/2 Var(log w) over the samples (VarGrad,
    Richter et al., arXiv 2010.10436).
    """
    f = relative(log_w)
    return score_only((f - mean_others(f)) / f.shape[1])


def vimco(log_w: Tensor) -> Phi:
    """Estimates the gradient of L_K: s = (L^ - L^_-k - w~) / M, in L^_-k the geometric mean of the others for w_k.

    Mnih & Rezende, arXiv 1602.06725. L^_-k does not depend on z_k. Requires K >= 2.
    """
    return _vimco(log_w, lambda log_w, rest: mean_others(log_w))


def vimco_arithmetic(log_w: Tensor) -> Phi:
    """As `vimco` with the arithmetic mean of the others for w_k. Mnih & Rezende, arXiv 1602.06725."""
    return _vimco(log_w, lambda log_w, rest: rest - math.log(log_w.shape[1] - 1))


def ovis(log_w: Tensor, *, gamma: float) -> Phi:
    """Asymptotically optimal control variates: s = (-log(1 - w~) - (1 - gamma) w~ + gamma log(1 - 1/K)) / M.

    Lievin et al., arXiv 2008.01998. gamma = 0 estimates the gradient of L_K, with an SNR that rises as K^+1/2;
    gamma = 1 has stl's expectation, and is biased for it. Requires K >= 2 and 0 <= gamma <= 1.
    """
    check_beta(gamma, "gamma")
    log_w = relative(log_w)
    surprise = log_w.logsumexp(1, keepdim=True) - log_sum_others(log_w)  # -log(1 - w~)
    return score_only(surprise - (1.0 - gamma) * normalised(log_w) + gamma * math.log1p(-1.0 / log_w.shape[1]))


def sleep(log_w: Tensor) -> Phi:
    """Sleep-phase phi: ascent on E_p(x,z)[log q(z|x)], on the model's own draws; these samples have no part in it.

    c = s = 0, and `routing` adds M dreams a datum. Hinton et al., Science 268, 1995; Bornschein & Bengio,
    arXiv 1406.2751.
    """
    return score_only(torch.zeros_like(log_w))


def score_only(s: Tensor) -> Phi:
    """Channels of the weights s, not yet divided by M, without a path."""
    s = s.nan_to_num(0.0, 0.0, 0.0) / len(s)
    return torch.zeros_like(s), s


def _vimco(log_w: Tensor, stand_in: Callable[[Tensor, Tensor], Tensor]) -> Phi:
    log_w = relative(log_w)
    rest = log_sum_others(log_w)
    all_k, without_k = log_w.logsumexp(1, keepdim=True), torch.logaddexp(rest, stand_in(log_w, rest))
    return score_only(all_k - without_k - normalised(log_w))


# ------------------------------------------------------------------------------------------------ thermodynamic
def tvo_weights(log_w: Tensor, *, partition: Partition) -> Tensor:
    """Estimates the gradient of the thermodynamic integral's Riemann sum, `bounds.tvo`, in its covariance form.

    a = sum_i db_i [w~ + K/(K-1) b_i w~ (f - sum w~ f)] / M with w~ from w^(b_i), f = log w. Masrani et al.,
    arXiv 1907.00031. Consistent as K grows, biased by O(1/K). Requires K >= 2.
    """
    return _thermodynamic(log_w, partition)[0]


def tvo_phi(log_w: Tensor, *, partition: Partition) -> Phi:
    """The same for phi, by the score: s = sum_i db_i [-w~ + K/(K-1) (1 - b_i) w~ (f - sum w~ f)] / M.

    Masrani et al., arXiv 1907.00031; discrete z too. Requires K >= 2.
    """
    s = _thermodynamic(log_w, partition)[1]
    return torch.zeros_like(s), s


def _thermodynamic(log_w: Tensor, partition: Partition) -> Phi:
    check_others(log_w)
    M, K, _ = log_w.shape
    log_w = relative(log_w)
    a, s = torch.zeros_like(log_w), torch.zeros_like(log_w)
    for b, following in pairwise(points(partition)):
        w = normalised(b * log_w) if b else torch.full_like(log_w, 1.0 / K)
        f = log_w.masked_fill(w == 0, 0.0)
        covariance = (K / (K - 1) * w * (f - (w * f).sum(1, keepdim=True))).nan_to_num(0.0, 0.0, 0.0)
        a += (following - b) / M * (w + b * covariance)
        s += (following - b) / M * ((1.0 - b) * covariance - w)
    return a, s


# ------------------------------------------------------------------------------------------------ learnt priors
def gdreg(log_w: Tensor) -> Phi:
    """Estimates the gradient of L_K in the parameters of p(z), doubly reparameterised: b = w~ / M, c = -w~^2 / M.

    In place of sum a * grad_theta log p(z), the path sum (b d log p(x|z) / dz + c d log w / dz) dT/dtheta through the
    prior's own z = T(e; theta), e = T^-1(z) held. Identity: Bauer & Mnih, arXiv 2101.11046, with f = w~. Requires a
    learnt prior that can be reparameterised.
    """
    w = normalised(log_w) / len(log_w)
    return w, -w * w * len(log_w)


# ------------------------------------------------------------------------------------------------ the tables
THETA: dict[str, ThetaEstimator] = {
    "elbo": elbo_weights,
    "iwae": iwae_weights,
    "ciwae": ciwae_weights,
    "vr-iwae": vr_iwae_weights,
    "tvo": tvo_weights,
    "jvi": jvi_weights,
    "gdreg": iwae_weights,  # and for the prior's parameters PRIOR
}
PHI: dict[str, PhiEstimator] = {
    "elbo": elbo_phi,
    "iwae": iwae_phi,
    "ciwae": ciwae_phi,
    "vr-iwae": vr_iwae_phi,
    "tvo": tvo_phi,
    "jvi": jvi_phi,
    "stl": stl,
    "dreg": dreg,
    "ciwae-dreg": ciwae_dreg,
    "vr-iwae-dreg": vr_iwae_dreg,
    "jvi-dreg": jvi_dreg,
    "wake": wake,
    "rws-dreg": rws_dreg,
    "score": score,
    "rloo": rloo,
    "vimco": vimco,
    "vimco-arithmetic": vimco_arithmetic,
    "ovis": ovis,
    "sleep": sleep,  # and DREAMING
}
PRIOR: dict[str, PhiEstimator] = {
    "gdreg": gdreg
}  # rows of THETA that treat the parameters of p(z) in a way of their own
DREAMING = {"sleep"}  # rows of PHI that learn from draws of the model


def theta_weights(name: str, log_w: Tensor, **options: Any) -> Tensor:
    """The theta channel `a` (M, K, B) of the estimator `name`, detached. `options` are the estimator's own."""
    check_log_w(log_w)
    return _checked("theta", name, find("theta", name, options)(log_w.detach().double(), **options), log_w)[0]


def phi_weights(name: str, log_w: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The phi channels `(c, s)`, each (M, K, B), of the estimator `name`, detached."""
    check_log_w(log_w)
    c, s = _checked("phi", name, find("phi", name, options)(log_w.detach().double(), **options), log_w)
    return c, s


def prior_weights(name: str, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """The channels `(b, c)`, each (M, K, B), of theta's estimator `name` for the parameters of p(z): see `gdreg`."""
    check_log_w(log_w)
    b, c = PRIOR[name](log_w.detach().double())
    return b.to(log_w.dtype), c.to(log_w.dtype)


def _checked(side: str, name: str, weights: Any, log_w: Tensor) -> tuple[Tensor, ...]:
    """The channels in the type of `log_w`. Functions are given float64: differences of log-weights lose digits."""
    channels = (weights,) if side == "theta" else weights
    tensors = isinstance(channels, tuple) and all(isinstance(w, Tensor) and w.shape == log_w.shape for w in channels)
    if not tensors or len(channels) != (1 if side == "theta" else 2):
        what = "a tensor a" if side == "theta" else "a tuple of tensors (c, s), each"
        raise ValueError(f"{side}: estimator {name!r} must return {what} of shape (M, K, B) = {tuple(log_w.shape)}.")
    return tuple(w.to(log_w.dtype) for w in channels)


def find(side: str, name: str, options: dict[str, Any]) -> Callable:
    """The estimator `name` of a side ("theta", "phi" or a key that ends so), its options checked by its signature.

    `name` is a row of the side's table, or `package.module.function` for a function of your own.
    """
    table, other = (THETA, PHI) if side.endswith("theta") else (PHI, THETA)
    if name in table:
        function: Callable = table[name]
    elif name in other:
        raise ValueError(
            f"{side}: estimator {name!r} is for the other side only. Known for {side}: {', '.join(table)}."
        )
    else:
        function = _imported(side, name, list(table))
    parameters = _options(function)
    known = [p.name for p in parameters]
    for option in options:
        if option not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise ValueError(f"{side}: estimator {name!r} has no option {option!r}; it {takes}.")
    for p in parameters:
        if p.default is p.empty and p.name not in options:
            raise ValueError(f"{side}: estimator {name!r} needs the option {p.name!r}.")
    return function


@lru_cache
def _options(function: Callable) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())[1:]


def _imported(side: str, name: str, known: list[str]) -> Callable:
    module, _, attribute = name.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), attribute)
        inspect.signature(function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"{side}: unknown estimator {name!r}{f' ({error})' if module else ''}. "
            f"Known for {side}: {', '.join(known)}, or package.module.function for one of your own."
            f"{did_you_mean(nearest(name, known))}"
        ) from error
    return function

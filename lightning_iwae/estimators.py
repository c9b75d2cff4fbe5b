"""Gradient estimators as channel weights: pure functions of log-weights (M, K, B), nothing else.

Every estimator is an ascent direction made of three sums over groups m and particles k (docs: README, "The one idea"):

    theta:  sum a_mk * grad_theta log p_theta(x, z_mk)
    phi:    sum c_mk * (d log w_mk / d z_mk) (d z_mk / d phi)     path: phi held inside log q, z live
          + sum s_mk * grad_phi log q_phi(z_mk | x)               score: z held, phi live

A theta estimator returns `a`, a phi estimator `(c, s)`, all of shape (M, K, B), divided by M and not by B. Below,
w~ are the weights normalised within each group, so that "iwae" on (M, K) is the gradient of `bounds.miwae`.

To add one: write the function, add its row to THETA or PHI, add its row to `tests/test_estimators.py`.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .bounds import check_beta, check_log_w
from .mistakes import did_you_mean, nearest
from .weights import normalised

ThetaEstimator = Callable[..., Tensor]
PhiEstimator = Callable[..., tuple[Tensor, Tensor]]


def elbo_weights(log_w: Tensor) -> Tensor:
    """Estimates the gradient of the ELBO, one log w after another: a = 1 / (M K). Kingma & Welling, arXiv 1312.6114."""
    M, K, _ = log_w.shape
    return torch.full_like(log_w, 1.0 / (M * K))


def iwae_weights(log_w: Tensor) -> Tensor:
    """Estimates the gradient of L_K: a = w~ / M.

    Identity: d log (1/K) sum w = sum w~ d log w. Burda et al., arXiv 1509.00519.
    """
    return normalised(log_w, 1) / log_w.shape[0]


def ciwae_weights(log_w: Tensor, *, beta: float) -> Tensor:
    """Estimates the gradient of beta * ELBO + (1 - beta) * L_K: the same mixture of their weights.

    Rainforth et al., arXiv 1802.04537. Requires 0 <= beta <= 1.
    """
    check_beta(beta)
    return beta * elbo_weights(log_w) + (1.0 - beta) * iwae_weights(log_w)


def total(a: Tensor) -> tuple[Tensor, Tensor]:
    """The total derivative a * d log w / d phi in channels: all of the path, minus the score of log q."""
    return a, -a


def elbo_phi(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates the gradient of the ELBO by reparameterisation. Kingma & Welling, arXiv 1312.6114."""
    return total(elbo_weights(log_w))


def iwae_phi(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates the gradient of L_K by reparameterisation. Burda et al., arXiv 1509.00519.

    Its SNR falls as K^-1/2 (Rainforth et al., arXiv 1802.04537, theorem 1).
    """
    return total(iwae_weights(log_w))


def ciwae_phi(log_w: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """Estimates the gradient of beta * ELBO + (1 - beta) * L_K. Rainforth et al., arXiv 1802.04537."""
    return total(ciwae_weights(log_w, beta=beta))


def stl(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """Sticking the landing: the IWAE's path with its score dropped, c = w~ / M. Roeder et al., arXiv 1703.09194.

    Estimates the ELBO's gradient at K = 1 only (there E[score] = 0). For K > 1 it is biased for L_K and tends to
    the wake-phi direction -grad KL(posterior || q).
    """
    a = iwae_weights(log_w)
    return a, torch.zeros_like(a)


def dreg(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates the gradient of L_K, doubly reparameterised: c = w~^2 / M, no score. Tucker et al., arXiv 1810.04152.

    Identity: E[score term] rewritten by a second reparameterisation. Its SNR rises as K^+1/2.
    """
    c = normalised(log_w, 1).square() / log_w.shape[0]
    return c, torch.zeros_like(c)


THETA: dict[str, ThetaEstimator] = {
    "elbo": elbo_weights,
    "iwae": iwae_weights,
    "ciwae": ciwae_weights,
}
PHI: dict[str, PhiEstimator] = {
    "elbo": elbo_phi,
    "iwae": iwae_phi,
    "ciwae": ciwae_phi,
    "stl": stl,
    "dreg": dreg,
}


def theta_weights(name: str, log_w: Tensor, **options: float) -> Tensor:
    """The theta channel `a` (M, K, B) of the estimator `name`, detached. `options` are the estimator's own."""
    check_log_w(log_w)
    return _checked("theta", name, find("theta", name, options)(log_w.detach(), **options), log_w)


def phi_weights(name: str, log_w: Tensor, **options: float) -> tuple[Tensor, Tensor]:
    """The phi channels `(c, s)`, each (M, K, B), of the estimator `name`, detached."""
    check_log_w(log_w)
    return _checked("phi", name, find("phi", name, options)(log_w.detach(), **options), log_w)


def _checked(side: str, name: str, weights: Any, log_w: Tensor) -> Any:
    channels = (weights,) if side == "theta" else weights
    tensors = isinstance(channels, tuple) and all(isinstance(w, Tensor) and w.shape == log_w.shape for w in channels)
    if not tensors or len(channels) != (1 if side == "theta" else 2):
        what = "a tensor a" if side == "theta" else "a tuple of tensors (c, s), each"
        raise ValueError(f"{side}: estimator {name!r} must return {what} of shape (M, K, B) = {tuple(log_w.shape)}.")
    return weights


def find(side: str, name: str, options: dict[str, float]) -> Callable:
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
    parameters = list(inspect.signature(function).parameters.values())[1:]
    known = [p.name for p in parameters]
    for option in options:
        if option not in known:
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise ValueError(f"{side}: estimator {name!r} has no option {option!r}; it {takes}.")
    for p in parameters:
        if p.default is p.empty and p.name not in options:
            raise ValueError(f"{side}: estimator {name!r} needs the option {p.name!r}.")
    return function


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


@dataclass(frozen=True)
class Side:
    """How one side (theta or phi) is trained: its estimator, and the K particles of each of its groups.

    Args:
        estimator: a row of `THETA` or `PHI`, or `package.module.function`.
        particles: K, the particles inside each logarithm; must divide the number of samples S, M = S / K.
        beta: CIWAE's weight of the ELBO.
    """

    estimator: str = "iwae"
    particles: int = 1
    beta: float | None = None

    def __str__(self) -> str:
        options = "".join(f", {name} {value}" for name, value in self.options.items())
        return f"{self.estimator} ({self.particles} particle{'s' * (self.particles > 1)}{options})"

    @property
    def options(self) -> dict[str, float]:
        """The options that are set."""
        return {} if self.beta is None else {"beta": self.beta}

    def check(self, side: str, samples: int) -> None:
        """Raise ValueError, naming the key, unless this is a valid setting of `side` for `samples` samples."""
        if samples < 1:
            raise ValueError(f"samples must be at least 1. Got {samples}.")
        if self.particles < 1 or samples % self.particles:
            divisors = ", ".join(str(k) for k in range(1, samples + 1) if samples % k == 0)
            raise ValueError(
                f"{side}.particles must divide samples ({samples}): one of {divisors}. Got {self.particles}."
            )
        if self.beta is not None:
            check_beta(self.beta, f"{side}.beta")
        find(side, self.estimator, self.options)

    def check_kl_weight(self, side: str) -> None:
        """Raise ValueError unless this phi estimator holds for a KL weight below 1.

        Total derivatives (s = -c) do: the weighted log w is differentiated as it stands. Those that drop or rewrite
        log q's score do so by an identity that needs it to have weight 1.
        """
        log_w = torch.linspace(-1.0, 0.0, self.particles).reshape(1, -1, 1)
        c, s = phi_weights(self.estimator, log_w, **self.options)
        if not torch.equal(c, -s):
            raise ValueError(
                f"{side}: estimator {self.estimator!r} can't be used with a KL weight below 1, as it is no total "
                "derivative of the bound. Use elbo, iwae or ciwae, or no KL warm-up."
            )

    def view(self, log_w: Tensor) -> Tensor:
        """This side's view (M, K, B) of the shared log-weights (S, B), row-major."""
        return log_w.unflatten(0, (-1, self.particles))

    def theta(self, log_w: Tensor) -> Tensor:
        """theta's channel `a` (S, B) for log-weights (S, B)."""
        return theta_weights(self.estimator, self.view(log_w), **self.options).flatten(0, 1)

    def phi(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """phi's channels `(c, s)`, each (S, B), for log-weights (S, B)."""
        c, s = phi_weights(self.estimator, self.view(log_w), **self.options)
        return c.flatten(0, 1), s.flatten(0, 1)

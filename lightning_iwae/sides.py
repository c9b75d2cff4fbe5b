"""How one network is trained: the estimator of a side, its options and its particles, as configs give them."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .bounds import check_alpha, check_beta, points
from .estimators import DREAMING, PHI, PRIOR, find, phi_weights, prior_weights, theta_weights

CHECKS = {
    "beta": check_beta,
    "alpha": check_alpha,
    "gamma": check_beta,
    "partition": points,
}


@dataclass(frozen=True)
class Side:
    """How one side (theta or phi) is trained: its estimator, and the K particles of each of its groups.

    Args:
        estimator: a row of `THETA` or `PHI`, or `package.module.function`.
        particles: K, the particles inside each logarithm; must divide the number of samples S, M = S / K.
        beta: CIWAE's weight of the ELBO.
        alpha: VR-IWAE's order, in [0, 1).
        gamma: OVIS's, in [0, 1].
        partition: TVO's number of intervals of [0, 1], or their points.
    """

    estimator: str = "iwae"
    particles: int = 1
    beta: float | None = None
    alpha: float | None = None
    gamma: float | None = None
    partition: int | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.partition, list):  # a side is hashable
            object.__setattr__(self, "partition", tuple(self.partition))

    def __str__(self) -> str:
        options = "".join(f", {name} {value}" for name, value in self.options.items())
        return f"{self.estimator} ({self.particles} particle{'s' * (self.particles > 1)}{options})"

    @property
    def options(self) -> dict[str, Any]:
        """The options that are set."""
        return {name: value for name in CHECKS if (value := getattr(self, name)) is not None}

    def check(self, side: str, samples: int) -> None:
        """Raise ValueError, naming the key, unless this is a valid setting of `side` for `samples` samples."""
        if samples < 1:
            raise ValueError(f"samples must be at least 1. Got {samples}.")
        if self.particles < 1 or samples % self.particles:
            divisors = ", ".join(str(k) for k in range(1, samples + 1) if samples % k == 0)
            raise ValueError(
                f"{side}.particles must divide samples ({samples}): one of {divisors}. Got {self.particles}."
            )
        for name, value in self.options.items():
            CHECKS[name](value, f"{side}.{name}")
        function = find(side, self.estimator, self.options)
        try:
            _try(function, self.particles, **self.options)
        except ValueError as error:
            raise ValueError(f"{side}.particles: estimator {self.estimator!r} {error}") from error

    def check_kl_weight(self, side: str) -> None:
        """Raise ValueError unless this estimator holds for a KL weight below 1.

        Total derivatives (s = -c) do: the weighted log w is differentiated as it stands. Those that drop or rewrite
        log q's score do so by an identity that needs it to have weight 1.
        """
        if side.endswith("theta"):
            total = self.estimator not in PRIOR
        else:
            c, s = phi_weights(self.estimator, made_up(self.particles), **self.options)
            total = torch.equal(c, -s)
        if not total:
            raise ValueError(
                f"{side}: estimator {self.estimator!r} can't be used with a KL weight below 1, as it is no total "
                "derivative of the bound. Use elbo, iwae, ciwae, vr-iwae or jvi, or no KL warm-up."
            )

    @property
    def needs_path(self) -> bool:
        """Whether phi's estimator has a path channel, and so needs a reparameterised q."""
        return _needs(self)[0]

    @property
    def needs_score(self) -> bool:
        """Whether phi's estimator has a score channel."""
        return _needs(self)[1]

    @property
    def dreams(self) -> bool:
        """Whether phi learns from M draws of the model a datum, in place of these samples."""
        return self.estimator in DREAMING

    @property
    def of_prior(self) -> bool:
        """Whether theta's estimator has channels of its own for the parameters of p(z)."""
        return self.estimator in PRIOR

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

    def prior(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """The channels `(b, c)`, each (S, B), of the parameters of p(z), where theta's estimator has such."""
        b, c = prior_weights(self.estimator, self.view(log_w))
        return b.flatten(0, 1), c.flatten(0, 1)


def made_up(particles: int) -> Tensor:
    """Log-weights (1, K, 1), by which an estimator shows what it needs."""
    return torch.linspace(-1.0, 0.0, particles, dtype=torch.float64).reshape(1, -1, 1)


@lru_cache(typed=True)
def _try(function: Callable[..., Any], particles: int, **options: Any) -> None:
    """Once for each function and setting: it costs a small step some per cent."""
    function(made_up(particles), **options)


@lru_cache
def _needs(side: Side) -> tuple[bool, bool]:
    c, s = phi_weights(side.estimator, made_up(side.particles), **side.options)
    return bool(c.any()), bool(s.any())


def without_path() -> list[str]:
    """The rows of `PHI` that fit a q that is not reparameterised."""
    some: dict[str, Any] = {"beta": 0.5, "alpha": 0.5, "gamma": 0.5, "partition": 2}
    options = {name: {o: some[o] for o in inspect.signature(PHI[name]).parameters if o in some} for name in PHI}
    return [name for name in PHI if not Side(name, 2, **options[name]).needs_path]

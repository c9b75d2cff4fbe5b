"""Gradients through the whole path of `routing`, many at once: z-scores of pairs, limits in K, slopes of SNR."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from .. import bounds, routing
from ..estimators import PHI
from ..laboratory import corrected_snr
from ..sides import Side
from .targets import options_of


class Replicas(nn.Module):
    """The linear-Gaussian model with parameters (R, D), a datum's own: one backward pass draws R gradients."""

    def __init__(self, replicates: int, dim: int, distance: float = 0.5, log_s: float = 0.2) -> None:
        super().__init__()
        steps = torch.arange(dim, dtype=torch.float64)
        mu, self.x = -0.4 - 0.1 * steps, (0.5 - 0.2 * steps).expand(replicates, -1)
        start = {"b": (self.x[0] + mu) / 2 + distance + 0.1 * steps, "log_s": log_s + 0.05 * steps, "mu": mu}
        full = {name: nn.Parameter(value.expand(replicates, -1).clone()) for name, value in start.items()}
        self.inference = nn.ParameterDict({"b": full["b"], "log_s": full["log_s"]})
        self.generative = nn.ParameterDict({"mu": full["mu"]})

    def prior(self) -> Distribution:
        """N(mu, I)."""
        mu = self.generative["mu"]
        return Independent(Normal(mu, torch.ones_like(mu), validate_args=False), 1)

    def posterior(self, x: Tensor) -> Distribution:
        """N(b, s^2), whatever x."""
        return Independent(Normal(self.inference["b"], self.inference["log_s"].exp(), validate_args=False), 1)

    def likelihood(self, z: Tensor) -> Distribution:
        """N(z, I)."""
        return Independent(Normal(z, torch.ones_like(z), validate_args=False), 1)

    def draws(self, M: int, K: int, phi: Sequence[Side], theta: Sequence[Side]) -> list[Tensor]:
        """A gradient a row, (R, P): of b and log s for phi's sides, of mu for theta's. Through `routing`."""
        drawn = routing.draw(self, self.x, M * K, "separate")
        found = routing.phi_gradients(drawn, phi, list(self.inference.parameters()))
        found += routing.theta_gradients(drawn, theta)
        return [torch.cat(grads, -1) * len(self.x) for grads in found]


PAIRED = {  # phi's rows: the rows on the same draws whose sum has the same expectation
    "stl": ("iwae", "wake"),
    "dreg": ("iwae",),
    "ciwae-dreg": ("ciwae",),
    "vr-iwae-dreg": ("vr-iwae",),
    "jvi-dreg": ("jvi",),
    "rws-dreg": ("wake",),
    "score": ("iwae",),
    "rloo": ("elbo",),
    "vimco": ("iwae",),
    "vimco-arithmetic": ("iwae",),
    "ovis": ("iwae",),
}


def of_sleep(model: Replicas) -> Tensor:
    """The expectation (P,) of sleep's gradient, in b and log s, in closed form."""
    b, log_s, mu = (p.detach()[0] for p in (*model.inference.values(), *model.generative.values()))
    return torch.cat([(mu - b) / (2 * log_s).exp(), (1 + (mu - b).square()) / (2 * log_s).exp() - 1])


class Z(NamedTuple):
    """Of all coordinates: the largest |z| of a row, that of its twin, and the least SNR of a draw."""

    worst: float
    twin: float
    snr: float


def z_scores(M: int, K: int, dim: int, replicates: int, phi: dict[str, Side], theta: dict[str, Side]) -> dict[str, Z]:
    """Each row against what it must equal in the mean, on the same draws, by `phi-vimco` and the like."""
    sums: dict[str, Tensor] = {}
    at_once = max(1, 2**19 // (M * K * dim))
    for start in range(0, replicates, at_once):
        model = Replicas(min(at_once, replicates - start), dim)
        found = model.draws(M, K, list(phi.values()), list(theta.values()))
        by_name = dict(zip([f"phi-{n}" for n in phi] + [f"theta-{n}" for n in theta], found, strict=True))
        for name, expected in references(model, by_name).items():
            new = summed(by_name[name], expected)
            sums[name] = sums[name] + new if name in sums else new
    return {name: scored(total, replicates) for name, total in sums.items()}


def paired(M: int, K: int, dim: int, replicates: int, own_side: Side, claimed_side: Side) -> Z:
    """A phi estimator against another that has its expectation, on the same draws."""
    return scored(summed(*Replicas(replicates, dim).draws(M, K, [own_side, claimed_side], [])), replicates)


def summed(g: Tensor, expected: Tensor) -> Tensor:
    """What `scored` takes, of gradients (R, P) and what they must equal in the mean; the twin is 5 % too long."""
    rows = torch.stack([g - expected, 1.05 * g - expected, g])
    return torch.stack([rows.sum(1), rows.square().sum(1)])


def scored(sums: Tensor, n: int) -> Z:
    """From sums and sums of squares (2, 3, P) of difference, the twin's difference, and the gradient."""
    mean = sums[0] / n
    variance = (sums[1] - n * mean.square()) / (n - 1)
    z = mean.abs() / (variance / n).sqrt()
    z = z.masked_fill((mean == 0) & (variance == 0), 0.0)  # the same draw for draw
    return Z(z[0].max().item(), z[1].max().item(), (mean[2].abs() / variance[2].sqrt()).min().item())


def references(model: Replicas, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """What rows must equal in the mean: sums of other rows on the same draws, or a closed form."""
    wanted: dict[str, Tensor] = {}
    for name, others in PAIRED.items():
        if f"phi-{name}" in found:
            wanted[f"phi-{name}"] = sum((found[f"phi-{o}"] for o in others), torch.zeros(()))
    if "theta-gdreg" in found:
        wanted["theta-gdreg"] = found["theta-iwae"]
    if "phi-sleep" in found:
        wanted["phi-sleep"] = of_sleep(model)
    return wanted


def limit(name: str, options: dict[str, Any], model: Replicas) -> Tensor:
    """What a row that is biased at finite K tends to, (P,) of b and log s in one dimension, in closed form."""
    b, log_s, mu = (p.detach()[0].requires_grad_() for p in (*model.inference.values(), *model.generative.values()))
    s2, c = (2 * log_s).exp(), (model.x[0] + mu) / 2
    if name != "tvo":
        return torch.cat([(c - b) / s2, (0.5 + (c - b).square()) / s2 - 1]).detach()
    total, log_px = torch.zeros(1), Normal(mu, math.sqrt(2)).log_prob(model.x[0])
    for here, there in itertools.pairwise(bounds.points(options["partition"])):
        precision = (1 - here) / s2 + 2 * here
        at = ((1 - here) * b / s2 + 2 * here * c) / precision
        value = log_px + (2 * s2).log() / 2 - (at - c).square() - 1 / precision
        total = total + (there - here) * (value + ((at - b).square() + 1 / precision) / (2 * s2))
    return torch.cat(torch.autograd.grad(total.sum(), [b, log_s]))


TEND = ("stl", "wake", "rws-dreg", "tvo")


def biases(replicates: int, counts: Sequence[int] = (4, 16, 64)) -> dict[str, list[float]]:
    """Relative distance from their limit of the rows that are biased at finite K, by K: falls as 1/K."""
    found: dict[str, list[float]] = {name: [] for name in TEND}
    for K in counts:
        sides = [Side(name, K, **options_of(PHI[name])) for name in TEND]
        n = max(2000, replicates // K)
        model = Replicas(n, 1)
        for name, g, side in zip(TEND, model.draws(1, K, sides, []), sides, strict=True):
            exact = limit(name, side.options, model)
            found[name].append(float((g.mean(0) - exact).norm() / exact.norm()))
    return found


# ------------------------------------------------------------------------------------------------ slopes of SNR
def snr_slopes(phi: dict[str, Side], theta: dict[str, Side], replicates: int, seed: int = 0) -> dict[str, "Slopes"]:
    """`phi-vimco` -> slopes of log SNR in K (64, 256 at M = 1) and in M (1, 4, 16 at K = 8), in two dimensions.

    phi is far from its optimum, for its signal to stand out; for theta it is near, as the bias of L_K hides the slope.
    At fewer particles slopes are not yet those of large K.
    """
    along: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for side, rows, distance in (("phi", phi, 0.6), ("theta", theta, 0.05)):
        for axis, points in (("K", [(1, 64), (1, 256)]), ("M", [(1, 8), (4, 8), (16, 8)])):
            for M, K in points:
                for name, snr in measured(side, rows, distance, M, K, replicates, seed).items():
                    at = K if axis == "K" else M
                    along.setdefault(f"{side}-{name}", {}).setdefault(axis, []).append((at, snr))
    return {name: Slopes(*(_slope(axes[axis]) for axis in ("K", "M"))) for name, axes in along.items()}


def measured(
    side: str, rows: dict[str, Side], distance: float, M: int, K: int, replicates: int, seed: int
) -> dict[str, float]:
    """SNR of each row; nan where it is within 3 standard errors of nothing."""
    at_K = [replace(row, particles=K) for row in rows.values()]
    sides = (at_K, []) if side == "phi" else ([], at_K)
    size = max(1, 2**19 // (M * K))  # of what fits a cache
    sizes = [size] * (replicates // size) + [replicates % size] * bool(replicates % size)
    parts = [Replicas(n, 2, distance, -0.2).draws(M, K, *sides) for n in sizes]
    found = {}
    for name, *draws in zip(rows, *parts, strict=True):
        _, snr, error = corrected_snr(torch.cat(draws), seed, resamples=50)
        found[name] = snr if snr > 3 * error else math.nan
    return found


class Slopes(NamedTuple):
    """Of log SNR against log K and log M; nan where the signal is lost in noise."""

    K: float
    M: float


def _slope(points: list[tuple[int, float]]) -> float:
    counts, values = (np.log(v) for v in zip(*points, strict=True))
    return float(np.polyfit(counts, values, 1)[0]) if np.isfinite(values).all() else math.nan

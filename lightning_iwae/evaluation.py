"""How good a trained model is: log p(x) by importance sampling in constant memory, and what comes with it."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .diagnostics import LEAST_PARTICLES, Tail, active_units
from .matmul import Fast
from .models.base import draw_posterior

Keyed = dict[str, Tensor]


class Streamed(NamedTuple):
    """Importance-sampling estimates per datum, each (B,); nats but for `ess`."""

    log_px: Tensor  # log (1/K) sum w: a lower bound of log p(x) in expectation, by about Var[w] / (2 K p(x)^2)
    elbo: Tensor  # mean of log w
    ess: Tensor  # (sum w)^2 / sum w^2, divided by K
    rate: Tensor  # mean of log q(z|x) - log p(z): estimates KL(q(z|x) || p(z)), Alemi et al.'s R (arXiv 1711.00464)
    distortion: Tensor  # mean of -log p(x|z), their D; elbo = -(rate + distortion) of these very samples


@torch.no_grad()
def importance_sample(
    model: Any, x: Tensor, particles: int, chunk: int | None = None, watch: Callable[[Tensor], None] | None = None
) -> Streamed:
    """Estimate log p(x), the ELBO, its two parts and the ESS from exactly `particles` draws of z ~ q(z | x) per datum.

    The encoder runs once. Samples are drawn, weighed and forgotten `chunk` at a time, so that memory does not grow
    with `particles`; the result does not depend on `chunk` but for the random numbers' order.

    Args:
        model: follows `models.base.Model`.
        x: batch (B, ...).
        particles: K.
        chunk: particles drawn at once; by default as many as keep a chunk's data near 4 million numbers, on a GPU 64
            million. They are decoded in as many slices as make the cache hold a slice's.
        watch: is given each chunk's log-weights (chunk, B), in float64, for what else is wanted of them.
    """
    if particles < 1:
        raise ValueError(f"particles must be at least 1. Got {particles}.")
    if chunk is None:
        chunk = drawn_at_once(x)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1. Got {chunk}.")
    if not len(x):  # a process's share of a short batch; torch.distributions can't sum over nothing
        if watch is not None:
            watch(x.new_zeros(particles, 0))
        return Streamed(*x.new_zeros(5, 0, dtype=torch.float64))
    q, prior = model.posterior(x), model.prior()
    rate = torch.zeros(len(x), device=x.device, dtype=torch.float64)
    distortion = rate.clone()
    log_sum = rate - math.inf
    log_sum_squares = rate - math.inf
    decoded = cached(x.device) / max(1, x.numel())  # at once
    for start in range(0, particles, chunk):
        z, _ = draw_posterior(q, min(chunk, particles - start))
        information = q.log_prob(z).double() - prior.log_prob(z)
        parts = z.tensor_split(min(len(z), math.ceil(len(z) / decoded)))
        log_likelihood = torch.cat([_log_likelihood(model, x, part) for part in parts]).double()
        log_w = log_likelihood - information
        if watch is not None:
            watch(log_w)
        rate += information.sum(0)
        distortion -= log_likelihood.sum(0)
        log_sum = torch.logaddexp(log_sum, log_w.logsumexp(0))
        log_sum_squares = torch.logaddexp(log_sum_squares, (2 * log_w).logsumexp(0))
    ess = torch.exp(2 * log_sum - log_sum_squares) / particles
    ess = ess.masked_fill(log_sum == -math.inf, 1.0)  # weights all 0 are alike, as in weights.ess
    rate, distortion = rate / particles, distortion / particles
    return Streamed(log_sum - math.log(particles), -(rate + distortion), ess, rate, distortion)


def _log_likelihood(model: Any, x: Tensor, z: Tensor) -> Tensor:
    """log p(x | z) of each sample, (S, B). What the decoder gave is let go before the next slice is decoded."""
    with Fast():
        p_x = model.likelihood(z)
    return p_x.log_prob(x)


def drawn_at_once(x: Tensor) -> int:
    """Particles of a default chunk for x (B, ...): some 4 million numbers of data, on a GPU 64 million."""
    return max(1, 2 ** (22 if x.device.type == "cpu" else 26) // max(1, x.numel()))


def cached(device: torch.device) -> int:
    """How many float32 numbers the second-level caches of torch's threads hold; of another device than CPU no matter.

    Where Linux does not tell the size, 1 MiB a core is taken.
    """
    if device.type != "cpu":
        return sys.maxsize
    try:
        size = int(Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        size = 2**20
    return torch.get_num_threads() * size // 4


def evaluate(model: Any, x: Tensor, particles: int, k_hat: bool = False) -> Keyed:
    """The figures of one batch per datum, each (B,), in nats but for ess, a fraction of K.

    `kl_q_posterior` = log_px - elbo estimates KL(q(z|x) || p(z|x)). `kl_is_64` = log_px - iwae_64 is the same for the
    64-particle extended distributions: Rainforth et al.'s "KL(Q||P)" (arXiv 1802.04537, table 1). `rate` and
    `distortion` are elbo's two parts, see `Streamed`. `k_hat`, if asked for, says whether log_px can be relied on: see
    `diagnostics.Tail`.
    """
    tail = Tail(particles) if k_hat else None
    at_64 = importance_sample(model, x, 64).log_px
    found = importance_sample(model, x, particles, watch=tail.add if tail else None)
    figures = {
        "iwae_64": at_64,
        "log_px": found.log_px,
        "elbo": found.elbo,
        "kl_q_posterior": found.log_px - found.elbo,
        "kl_is_64": found.log_px - at_64,
        "ess": found.ess,
        "rate": found.rate,
        "distortion": found.distortion,
    }
    return figures | {"k_hat": tail.k_hat()} if tail else figures


def evaluate_for_means(model: Any, x: Tensor, particles: int) -> Keyed:
    """As `evaluate`, all of which can be averaged: of k-hat, if there are particles enough, whether it is over 0.7."""
    figures = evaluate(model, x, particles, particles >= LEAST_PARTICLES)
    if "k_hat" in figures:
        figures["k_hat_above_0.7"] = (figures.pop("k_hat") > 0.7).double()
    return figures


class Totals:
    """Running sums of per-datum figures, from which means, standard errors and active units are taken.

    Sums, since those of several processes add up exactly, however unevenly the data fall to them. Active units only
    where posterior means were given.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None  # (3, number of figures + Z): count, sum, sum of squares

    def add(self, figures: Keyed, posterior_mean: Tensor | None = None) -> None:
        """Figures (B,) by name, and the posterior means (B, ...)."""
        self.names = list(figures)
        rows = torch.stack(list(figures.values()), 1)
        if posterior_mean is not None:
            rows = torch.cat([rows, posterior_mean.flatten(1).double()], 1)
        new = torch.stack([torch.ones_like(rows).sum(0), rows.sum(0), rows.square().sum(0)])
        self.sums = new if self.sums is None else self.sums + new

    def result(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, Any]:
        """{"mean", "se"} of each figure, and "active_units"; `reduce` adds the sums of all processes."""
        if self.sums is None:
            raise ValueError("nothing was evaluated.")
        n, total, squares = reduce(self.sums)
        mean = total / n
        variance = (squares - n * mean.square()).clamp(min=0) / (n - 1)
        se = (variance / n).sqrt()
        out: dict[str, Any] = {
            k: {"mean": m.item(), "se": e.item()} for k, m, e in zip(self.names, mean, se, strict=False)
        }
        units = variance[len(self.names) :]
        return out | {"active_units": active_units(units)} if len(units) else out


def moment(q: Any, name: Literal["mean", "stddev"]) -> Tensor | None:
    """A distribution's mean or standard deviation; None where it knows none, as a flow's."""
    try:
        return getattr(q, name)
    except (AttributeError, NotImplementedError):
        return None


@torch.no_grad()
def mean_variances(model: Any, x: Tensor, samples: int = 100) -> Tensor:
    """Var_x(E_q[z_u | x]) of each latent number over x (N, ...), (Z,): what `diagnostics.active_units` goes by.

    Where q knows no mean, as a flow, it is that of draws, whose own variance over `samples` is taken off again:
    unbiased. (For a second layer Burda et al.'s code takes one pass of samples through the first and leaves their
    variance in; q of `models.TwoLayer` says what its mean is where the first layer is at its own.)
    """
    q = model.posterior(x)
    mean = moment(q, "mean")
    if mean is not None:
        return mean.double().flatten(1).var(0)
    z = draw_posterior(q, samples)[0].double().flatten(2)
    return z.mean(0).var(0) - z.var(0).mean(0) / samples


def table(result: dict[str, Any]) -> str:
    """The figures of `Totals.result` as text."""
    labels = {
        "iwae_64": "L_64 (nats)",
        "log_px": f"log p(x), {result['particles']} particles (nats)",
        "elbo": "ELBO (nats)",
        "kl_q_posterior": "KL(q || posterior) = log p(x) - ELBO (nats)",
        "kl_is_64": "KL of 64 particles = log p(x) - L_64 (nats)",
        "ess": f"ESS / {result['particles']}",
        "rate": "rate R = KL(q || prior) (nats)",
        "distortion": "distortion D = -log p(x|z) (nats)",
        "k_hat_above_0.7": "Pareto k-hat > 0.7: log p(x) is unreliable",
        "log_px_ais": "log p(x) by AIS (nats)",
        "ais_minus_is": "AIS - importance sampling, same data (nats)",
        "ais_acceptance": "AIS: acceptance of HMC moves",
        "ais_ess": "AIS: ESS / chains",
        "bdmc_lower": "BDMC: log p(x) from below (nats)",
        "bdmc_upper": "BDMC: log p(x) from above (nats)",
        "bdmc_gap": "BDMC: gap (nats)",
        "bdmc_acceptance": "BDMC: acceptance of HMC moves",
    }
    rows = [f"{labels[k]:<46}{result[k]['mean']:>12.4f} +- {result[k]['se']:.4f}" for k in labels if k in result]
    if "active_units" in result:
        rows.append(f"{'active units (posterior mean varies by > 0.01)':<46}{result['active_units']:>7}")
    if "active_units_train" in result:
        rows.append(f"{'active units of the first 500 training data':<46}{result['active_units_train']:>7}")
    for name, data in (("ais", "test data"), ("bdmc", "simulated data")):
        if name in result:
            rows.append(
                "{0}: {data} {1}, {chains} chains from the {start}, {temperatures} temperatures, {leapfrog} leapfrog "
                "steps: {decoder_passes} decoder passes a datum".format(name.upper(), data, **result[name])
            )
    return "\n".join(rows)

"""The laboratory: signal-to-noise of many estimators' gradients over a grid of (M, K), at fixed parameters and data."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import routing
from .diagnostics import Running
from .models import Batch, given, split
from .parallel import Workers
from .randomness import forked, seed_for
from .sides import Side

AT_ONCE = 2**20  # numbers in the samples of a chunk of data: what stays in a cache
RESAMPLES = 200


@dataclass(frozen=True)
class Row:
    """What was measured of one estimator at one (M, K), from n draws of the gradient. `snr.csv` has these columns."""

    estimator: str
    options: str
    side: str  # phi or theta
    M: int
    K: int
    n: int
    snr: float  # mean over parameters of |mean| / std, what noise adds to |mean| taken off
    snr_lo: float  # and its interval: 1.96 standard errors to either side
    snr_hi: float
    snr_floor: float  # what |mean| / std comes to where the true mean is 0
    snr_plain: float  # as it stands, without the correction
    dsnr: float
    dsnr_floor: float
    mean_norm: float
    std_norm: float
    theory: float | None  # of snr, where it is known

    @property
    def standard_error(self) -> float:
        """Of snr, by the bootstrap."""
        return (self.snr_hi - self.snr_lo) / (2 * 1.96)


def measure(
    model: Any,
    batch: Batch,
    phi: Sequence[Side],
    theta: Sequence[Side],
    grid: Sequence[tuple[int, int]],
    draws: int,
    seed: int = 0,
    parameters: int = 1000,
    watch: Callable[[int], None] = lambda samples: None,
    workers: int = 1,
) -> Iterator[Row]:
    """Rows for every estimator at every (M, K), whose gradients come from the same samples.

    A gradient is of the mean over the batch. Draw number d at (M, K) is a function of (seed, M, K, d).

    Args:
        model: follows `models.base.Model`.
        batch: data (N, ...), or data and labels; weighed and differentiated a chunk at a time.
        phi, theta: estimators; their particles are replaced by each K. One that can't be at a K is left out there.
        grid: (M, K), groups and particles.
        draws: n, gradients drawn of each, at least 8.
        parameters: of each side that snr is taken over, chosen at random if there are more; norms and dsnr take all.
        watch: is told of the samples that were drawn, N * M * K each time.
        workers: processes that draw, see `Workers`; results do not depend on them.
    """
    if draws < 8:
        raise ValueError(f"draws must be at least 8. Got {draws}.")
    x, _ = split(batch)
    with Workers(draw_gradients, (model, batch), workers) as pool:
        for M, K in grid:
            sides = {"phi": fitting(phi, "phi", M, K), "theta": fitting(theta, "theta", M, K)}
            kept = [Kept(name, side, draws, seed, parameters) for name, fit in sides.items() for side in fit]
            tasks = ((sides["phi"], sides["theta"], M * K, (seed, "laboratory", M, K, draw)) for draw in range(draws))
            for found in pool.map(tasks):
                for record, g in zip(kept, found, strict=True):
                    record.add(torch.from_numpy(g))
                watch(len(x) * M * K)
            for record in kept:
                yield record.row(M, K, theory(model, x, record, M, K))


def draw_gradients(
    model: Any, batch: Batch, phi: Sequence[Side], theta: Sequence[Side], samples: int, key: Sequence[int | str]
) -> list[np.ndarray]:
    """One draw of `gradients`, a function of `key`, on the CPU."""
    with forked(seed_for(*key), split(batch)[0].device):
        return [g.cpu().numpy() for g in gradients(model, batch, phi, theta, samples)]


def fitting(sides: Sequence[Side], name: str, M: int, K: int) -> list[Side]:
    """The sides at K particles, but for those that can't be."""
    found = []
    for side in sides:
        at_K = replace(side, particles=K)
        try:
            at_K.check(name, M * K)
        except ValueError:
            continue
        found.append(at_K)
    return found


def gradients(model: Any, batch: Batch, phi: Sequence[Side], theta: Sequence[Side], samples: int) -> list[Tensor]:
    """One draw of each side's gradient, (P,): of phi's sides, then of theta's."""
    inference = [p for p in model.inference.parameters() if p.requires_grad]
    N, total = len(split(batch)[0]), None
    for part in chunks(model, batch, samples):
        x, y = split(part)
        drawn = routing.draw(model, x, samples, y=y)
        found = [*routing.phi_gradients(drawn, phi, inference), *routing.theta_gradients(drawn, theta)]
        flat = [torch.cat([g.flatten() for g in grads]) * (len(x) / N) for grads in found]
        total = flat if total is None else [a + b for a, b in zip(total, flat, strict=True)]
    return total or []


def chunks(model: Any, batch: Batch, samples: int) -> Iterator[Batch]:
    """The batch in parts whose samples are about `AT_ONCE` numbers."""
    x, y = split(batch)
    width = math.prod(given(model, None if y is None else y[:1]).posterior(x[:1]).event_shape)
    size = max(1, AT_ONCE // (samples * max(width, 1)))
    for start in range(0, len(x), size):
        yield x[start : start + size] if y is None else (x[start : start + size], y[start : start + size])


class Kept:
    """The draws of one estimator: some parameters' gradients whole, of all of them running moments."""

    def __init__(self, name: str, side: Side, draws: int, seed: int, parameters: int) -> None:
        self.name, self.side, self.draws = name, side, draws
        self.seed, self.parameters = seed, parameters
        self.rows: list[Tensor] = []
        self.running: Running | None = None

    def add(self, g: Tensor) -> None:
        """The next draw, (P,)."""
        if not g.isfinite().all():
            raise FloatingPointError(f"the gradient of {self.name} by {self.side} is not finite.")
        if self.running is None:
            self.running = Running(g, self.draws)
            order = torch.randperm(len(g), generator=torch.Generator().manual_seed(seed_for(self.seed, self.name)))
            self.chosen = order[: self.parameters].sort().values.to(g.device)
        self.running.add(g)
        self.rows.append(g[self.chosen].double().cpu())

    def row(self, M: int, K: int, theory: Tensor | None) -> Row:
        """The statistics."""
        assert self.running is not None
        n, whole = self.draws, self.running.result()
        plain, snr, error = corrected_snr(torch.stack(self.rows), seed_for(self.seed, "bootstrap", M, K))
        return Row(
            estimator=self.side.estimator,
            options=" ".join(f"{name}={value}" for name, value in self.side.options.items()),
            side=self.name,
            M=M,
            K=K,
            n=n,
            snr=snr,
            snr_lo=snr - 1.96 * error,
            snr_hi=snr + 1.96 * error,
            snr_floor=whole.snr_floor,
            snr_plain=plain,
            dsnr=whole.dsnr,
            dsnr_floor=whole.dsnr_floor,
            mean_norm=self.running.mean.norm().item(),
            std_norm=self.running.std.norm().item(),
            theory=None if theory is None else theory[self.chosen.cpu()].mean().item(),
        )


def corrected_snr(draws: Tensor, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float, float]:
    """Mean over parameters of |mean| / std of draws (n, P): as it stands, corrected for noise, and its standard error.

    The standard error is the spread over resampled draws: a little too large where noise prevails, as resampling adds
    some of its own.
    """
    n = len(draws)
    draws = draws[:, draws.std(0) > 0]
    mean = draws.mean(0)
    centred = draws - mean
    ratio = mean / centred.std(0)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    weights = torch.from_numpy(counts / n)
    shift = weights @ centred
    variance = (weights @ centred.square() - shift.square()) * (n / (n - 1))
    resampled = less_noise((mean + shift) / variance.sqrt(), n)
    return ratio.abs().mean().item(), less_noise(ratio, n).item(), resampled.std().item()


def less_noise(ratio: Tensor, n: int) -> Tensor:
    """Mean over the last axis of the |true ratio|, from ratios (..., P) of mean to standard deviation of n draws.

    A ratio is the true one plus N(0, 1/n), and its size by itself would be too large where that prevails. By empirical
    Bayes (Efron & Morris, JASA 68, 1973): true ratios are taken as drawn from N(0, v), v the mean square less 1/n, and
    replaced by what is then to be expected of their size. Where noise is small this is |ratio|, whatever their shape.
    """
    noise = 1.0 / n
    ratio = math.sqrt((n - 3) / (n - 1)) * ratio  # then the square is true^2 + 1/n in the mean
    v = (ratio.square().mean(-1, keepdim=True) - noise).clamp(min=1e-12)
    kept = v / (v + noise)
    at, scale = kept * ratio, (kept * noise).sqrt()
    z = at / scale
    size = at * torch.erf(z / math.sqrt(2)) + scale * math.sqrt(2 / math.pi) * torch.exp(-z.square() / 2)
    return size.mean(-1)


def theory(model: Any, x: Tensor, record: Kept, M: int, K: int) -> Tensor | None:
    """The SNR (P,) that a model knows of its gradients, if it does: see `LinearGaussian.exact_snr`."""
    exact = getattr(model, "exact_snr", None)
    return None if exact is None else exact(x, record.name, record.side.estimator, M, K)


@dataclass(frozen=True)
class Slope:
    """Of log snr against log K at M = 1, or against log M at one K, from `first` on. `slopes.csv` has these columns."""

    side: str
    estimator: str
    options: str
    axis: str
    first: int
    last: int
    slope: float
    standard_error: float
    theory: float | None

    def __str__(self) -> str:
        known = "" if self.theory is None else f", theory {self.theory:+.1f}"
        span = f"{self.axis} = {self.first} .. {self.last}"
        return f"{self.side:6}{self.estimator:18}{span:18}{self.slope:+.3f} +- {self.standard_error:.3f}{known}"


FALLING = {"iwae": -0.5, "vimco": -0.5, "vimco-arithmetic": -0.5}  # phi's slope in K; the others' is +1/2
UNKNOWN = {"jvi", "jvi-dreg", "score", "sleep"}


def slopes(rows: Sequence[Row]) -> list[Slope]:
    """Fits of every estimator along K at M = 1, where it is asymptotic (from K = 16 or 64 on), and along M."""
    found = []
    for side, estimator, options in dict.fromkeys((r.side, r.estimator, r.options) for r in rows):
        own = [r for r in rows if (r.side, r.estimator, r.options) == (side, estimator, options)]
        falls = side == "phi" and estimator in FALLING
        in_K = [(r.K, r) for r in own if r.M == 1 and (16 if falls else 64) <= r.K]
        several = [K for K in dict.fromkeys(r.K for r in own) if len({r.M for r in own if r.K == K}) > 1]
        in_M = [[(r.M, r) for r in own if r.K == K] for K in several]
        known = FALLING.get(estimator, 0.5) if side == "phi" else 0.5
        for axis, points, value in [
            ("K", in_K, None if estimator in UNKNOWN else known),
            *(("M", p, 0.5) for p in in_M),
        ]:
            points = sorted(((n, r) for n, r in points if r.snr > 2 * r.standard_error), key=lambda p: p[0])
            if len(points) > 1:
                slope, error = fit_slope(points)
                ends = points[0][0], points[-1][0]
                found.append(Slope(side, estimator, options, axis, *ends, slope, error, value))
    return found


def fit_slope(points: Sequence[tuple[int, Row]]) -> tuple[float, float]:
    """Slope of log snr against log count, weighted by the rows' standard errors, and its own standard error."""
    counts, rows = zip(*[(n, row) for n, row in points if row.snr > 0], strict=True)
    w = np.array([row.snr / row.standard_error for row in rows])
    (slope, _), covariance = np.polyfit(np.log(counts), np.log([row.snr for row in rows]), 1, w=w, cov="unscaled")
    return float(slope), float(math.sqrt(covariance[0, 0]))

"""What a model's posterior of z looks like for a few data: particles with weights, and densities to draw.

`K` particles, `B` data, `Z` latent dimensions (event dimensions flattened). Everything is in float64 on the CPU but
what the model itself computes.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .models.base import draw_posterior
from .weights import normalised


class Particles(NamedTuple):
    """Draws from q(z | x) and their log-weights."""

    z: Tensor  # (K, B, ...) as the model takes them
    log_w: Tensor  # (K, B), log p(x, z) - log q(z | x). Nats

    @property
    def flat(self) -> Tensor:
        """z as (K, B, Z), float64 on the CPU."""
        return self.z.reshape(*self.z.shape[:2], -1).double().cpu()


class View(NamedTuple):
    """p(z | x) of one datum over one or two latent dimensions, and the moments of it and of q(z | x) there."""

    axes: tuple[Tensor, ...]  # centres of cells (n,), one axis a dimension
    density: Tensor  # (n,) or (n, n), the first axis first: mean over each cell, per unit of z
    mean: Tensor  # (D,), of p(z | x)
    cov: Tensor  # (D, D)
    q_mean: Tensor
    q_cov: Tensor
    ess: float = math.nan  # effective number of particles behind it; nan for a grid, which needs none


@torch.no_grad()
def draw(model: Any, x: Tensor, particles: int, chunk: int | None = None) -> Particles:
    """K = `particles` draws of z ~ q(z | x) for each of x (B, ...), weighed `chunk` at a time.

    Raises:
        ValueError: for fewer than 2 particles.
    """
    if particles < 2:
        raise ValueError(f"particles must be at least 2. Got {particles}.")
    q = model.posterior(x)
    z, _ = draw_posterior(q, particles)
    log_w = [_log_joint(model, x, part) - q.log_prob(part) for part in z.split(chunk or _chunk(x))]
    return Particles(z, torch.cat(log_w).double().cpu())


def active_dimensions(means: Tensor, count: int = 2) -> list[int]:
    """The `count` dimensions (or all, if fewer) whose posterior mean varies most over data, in ascending order.

    Args:
        means: E_q[z | x] of each datum, (B, Z).
    """
    if means.ndim != 2 or len(means) < 2:
        raise ValueError(f"means must have shape (B, Z), B at least 2. Got {tuple(means.shape)}.")
    return sorted(means.var(0).argsort(descending=True)[:count].tolist())


def views(model: Any, x: Tensor, drawn: Particles, dimensions: list[int], points: int = 81) -> list[View]:
    """p(z | x) of each datum of x (B, ...): on a grid where z has one or two dimensions, else from the particles."""
    if drawn.flat.shape[2] <= 2:
        return on_grid(model, x, drawn, points)
    return from_particles(drawn, dimensions)


@torch.no_grad()
def on_grid(model: Any, x: Tensor, drawn: Particles, points: int = 81) -> list[View]:
    """p(z | x) of a z of one or two dimensions by evaluating p(x, z) on `points` a dimension: no sampling error.

    A box that covers the prior is narrowed, datum by datum, to where the density is within 8 nats of its maximum,
    or q reaches with three standard deviations.
    """
    flat = drawn.flat
    K, B, Z = flat.shape
    if Z > 2:
        raise ValueError(f"a grid needs z of one or two dimensions. Got {Z}.")
    prior = model.prior()
    of_prior = prior.sample((1000,) if prior.batch_shape else (1000, B)).reshape(1000, B, Z).double().cpu()
    q_low, q_high = flat.mean(0) - 3 * flat.std(0), flat.mean(0) + 3 * flat.std(0)
    low = torch.minimum(of_prior.mean(0) - 5 * of_prior.std(0), q_low)
    high = torch.maximum(of_prior.mean(0) + 5 * of_prior.std(0), q_high)
    for last in (False, False, True):
        if last:  # the same scale along both dimensions
            middle, half = (low + high) / 2, ((high - low) / 2).amax(1, keepdim=True)
            low, high = middle - half, middle + half
        axes, z = _grid(low, high, points)
        parts = z.to(drawn.z).view(-1, *drawn.z.shape[1:]).split(_chunk(x))
        log_joint = torch.cat([_log_joint(model, x, part) for part in parts]).double().cpu()
        inside = (log_joint > log_joint.amax(0) - 8).unsqueeze(2)
        step = (high - low) / (points - 1)
        low = torch.minimum(z.masked_fill(~inside, math.inf).amin(0) - step, q_low)
        high = torch.maximum(z.masked_fill(~inside, -math.inf).amax(0) + step, q_high)
    p = normalised(log_joint, 0)
    density = (p / step.prod(1)).view(*[points] * Z, B)
    return [
        View(
            tuple(axes[:, b].T),
            density[..., b],
            *_moments(z[:, b], p[:, b]),
            *_moments(flat[:, b], torch.full((K,), 1 / K, dtype=p.dtype)),
        )
        for b in range(B)
    ]


def from_particles(drawn: Particles, dimensions: list[int], bins: int = 25) -> list[View]:
    """p(z | x) over one or two of z's dimensions: a histogram of the particles by their normalised weights.

    It is no better than the particles: see `ess`. The box covers three standard deviations of q and of p(z | x).
    """
    if len(dimensions) not in (1, 2):
        raise ValueError(f"dimensions must be one or two. Got {dimensions}.")
    z, w = drawn.flat[..., dimensions], normalised(drawn.log_w, 0)
    return [_histogram(z[:, b], w[:, b], bins) for b in range(z.shape[1])]


def resample(drawn: Particles, generator: torch.Generator | None = None) -> Tensor:
    """One particle of each datum by its weight, (1, B, ...): a draw from p(z | x) as far as the particles reach."""
    chosen = torch.multinomial(normalised(drawn.log_w, 0).T, 1, generator=generator).squeeze(1)
    return drawn.z[chosen.to(drawn.z.device), torch.arange(drawn.z.shape[1], device=drawn.z.device)].unsqueeze(0)


def _log_joint(model: Any, x: Tensor, z: Tensor) -> Tensor:
    return model.prior().log_prob(z) + model.likelihood(z).log_prob(x)


def _chunk(x: Tensor) -> int:
    return max(1, 2**22 // max(1, x.numel()))


def _grid(low: Tensor, high: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Axes (points, B, Z), and the points (points^Z, B, Z) of their product, of boxes (B, Z)."""
    fraction = torch.linspace(0, 1, points, dtype=low.dtype).view(-1, 1, 1)
    axes = low + fraction * (high - low)
    if axes.shape[2] == 1:
        return axes, axes
    shape = (points, points, low.shape[0])
    first, second = axes[:, None, :, 0].expand(shape), axes[None, :, :, 1].expand(shape)
    return axes, torch.stack([first, second], -1).flatten(0, 1)


def _moments(z: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of points z (N, D) with probabilities p (N,)."""
    mean = p @ z
    return mean, (z - mean).T @ ((z - mean) * p.unsqueeze(1))


def _histogram(z: Tensor, w: Tensor, bins: int) -> View:
    """Of particles z (K, D) with weights w (K,)."""
    mean, cov = _moments(z, w)
    q_mean, q_cov = _moments(z, torch.full_like(w, 1 / len(w)))
    reach, q_reach = 3 * cov.diagonal().sqrt(), 3 * q_cov.diagonal().sqrt()
    low, high = torch.minimum(mean - reach, q_mean - q_reach), torch.maximum(mean + reach, q_mean + q_reach)
    half = ((high - low) / 2).max()
    low, width = (low + high) / 2 - half, 2 * half / bins
    cell = ((z - low) / width).floor().long()
    inside = ((cell >= 0) & (cell < bins)).all(1)
    index = cell[inside] @ torch.tensor([bins ** (z.shape[1] - 1 - d) for d in range(z.shape[1])])
    mass = torch.bincount(index, w[inside], bins ** z.shape[1])
    centres = low + width * (torch.arange(bins, dtype=z.dtype).unsqueeze(1) + 0.5)
    density = (mass / width ** z.shape[1]).view(*[bins] * z.shape[1])
    return View(tuple(centres.T), density, mean, cov, q_mean, q_cov, ess=1 / w.square().sum().item())

"""Signal-to-noise ratios of gradients, Pareto k-hat of weights, and active units: pure functions of tensors."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_PARTICLES = 25  # for a Pareto k-hat: a tail of 5


class SNR(NamedTuple):
    """Signal-to-noise of one network's gradient, from n draws at fixed parameters and data."""

    snr: Tensor  # (P,) per parameter, |mean| / std; parameters whose gradient never varies left out
    dsnr: float  # E[ |parallel part| / |orthogonal part| ] of a gradient with regard to the mean direction
    n: int

    @property
    def snr_floor(self) -> float:
        """What |mean| / std comes to where the true mean is 0: sqrt(2 / (pi n))."""
        return math.sqrt(2 / (math.pi * self.n))

    @property
    def dsnr_floor(self) -> float:
        """What the DSNR comes to for pure noise in P dimensions: E|N(0,1)| E[1 / chi_(P-1)]; nan below P = 3."""
        P = len(self.snr)
        if P < 3:
            return math.nan
        return math.sqrt(2 / math.pi) * math.exp(math.lgamma((P - 2) / 2) - math.lgamma((P - 1) / 2)) / math.sqrt(2)

    def quantiles(self, levels: Sequence[float]) -> list[float]:
        """Quantiles of `snr` at `levels` in [0, 1], interpolated linearly; nan if no parameter's gradient varies.

        By sorting: torch.quantile refuses more than 2^24 numbers, and networks have more parameters.
        """
        if not len(self.snr):
            return [math.nan] * len(levels)
        ordered = self.snr.sort().values
        at = ordered.new_tensor(levels) * (len(ordered) - 1)
        return torch.lerp(ordered[at.floor().long()], ordered[at.ceil().long()], at.frac()).tolist()


class Running:
    """Streaming mean and variance (Welford) of vectors (P,) in float64, and their direction ratio."""

    def __init__(self, size: Tensor, n: int) -> None:
        self.half, self.seen, self.ratio = n // 2, 0, 0.0
        self.mean = torch.zeros_like(size, dtype=torch.float64)
        self.squares = self.mean.clone()
        self.direction = self.mean

    def add(self, g: Tensor) -> None:
        """The next draw, (P,)."""
        g = g.double()
        if self.seen == self.half:
            self.direction = self.mean / self.mean.norm()
        if self.seen >= self.half:
            along = g @ self.direction
            self.ratio += (along.abs() / torch.addcmul(g, along, self.direction, value=-1).norm()).item()
        self.seen += 1
        delta = g - self.mean
        self.mean.add_(delta, alpha=1 / self.seen)
        self.squares.addcmul_(delta, delta, value=1 - 1 / self.seen)

    @property
    def std(self) -> Tensor:
        """Standard deviation of each entry, (P,)."""
        return (self.squares / (self.seen - 1)).sqrt()

    def result(self) -> SNR:
        """Of all draws; entries that never vary are left out."""
        varies = self.std > 0
        return SNR((self.mean.abs() / self.std)[varies], self.ratio / (self.seen - self.half), self.seen)


def signal_to_noise(gradients: Callable[[], dict[str, Tensor]], n: int) -> dict[str, SNR]:
    """SNR (Rainforth et al., arXiv 1802.04537; the post's eq. 13) and DSNR of several gradient estimates at once.

    Memory is a few vectors, whatever n. For the DSNR the direction of the mean comes from the first half of the
    draws, and the ratio is averaged over the second, so that no draw is judged by a direction fitted to it.

    Args:
        gradients: draws anew, at the same parameters and data, and returns estimates (P,) by name.
        n: number of draws, at least 4.

    Raises:
        FloatingPointError: for a gradient that is not finite, naming it.
    """
    if n < 4:
        raise ValueError(f"draws must be at least 4. Got {n}.")
    running: dict[str, Running] = {}
    for draw in range(1, n + 1):
        for name, g in gradients().items():
            if not math.isfinite(g.sum()) and (bad := int((~g.isfinite()).sum())):
                raise FloatingPointError(
                    f"the gradient of {name} is not finite in {bad} of {g.numel()} parameters, at draw {draw} of {n}."
                )
            running.setdefault(name, Running(g, n)).add(g)
    return {name: r.result() for name, r in running.items()}


def active_units(variances: Tensor, threshold: float = 0.01) -> int:
    """How many latent units are used: Var_x(E_q[z_u | x]) > 0.01 (Burda et al., arXiv 1509.00519).

    Args:
        variances: of the posterior means over data, (Z,).
    """
    return int((variances > threshold).sum())


class Tail:
    """The largest of S log-weights of each datum, kept across chunks, and the Pareto k-hat of their tail.

    k-hat is the shape of the generalised Pareto distribution that fits the largest min(S / 5, 3 sqrt S) weights where
    they exceed the next one (Vehtari et al., arXiv 1507.02646): weights have finite moments up to about 1 / k-hat, so
    that log p(x) is well estimated below 0.5, usable to 0.7 and unreliable beyond, whatever its standard error says.

    Args:
        samples: S, at least 25.
    """

    def __init__(self, samples: int) -> None:
        if samples < LEAST_PARTICLES:
            raise ValueError(f"a Pareto k-hat needs at least {LEAST_PARTICLES} particles. Got {samples}.")
        self.samples, self.seen = samples, 0
        self.size = math.ceil(min(samples / 5, 3 * math.sqrt(samples)))
        self._largest: Tensor | None = None  # (size + 1, ...), unordered

    def add(self, log_w: Tensor) -> None:
        """The next chunk, (any, ...)."""
        self.seen += len(log_w)
        rows = log_w.double() if self._largest is None else torch.cat([self._largest, log_w.double()])
        self._largest = rows.topk(min(self.size + 1, len(rows)), 0, sorted=False).values

    def k_hat(self) -> Tensor:
        """Of each datum, (...). -inf where the tail's weights are equal: there is none, as at q(z | x) = p(z | x).

        inf where all weights are zero, or where ties leave fewer than 5 above the cut-off; nan if a weight is nan.
        """
        if self.seen != self.samples or self._largest is None:
            raise ValueError(f"a Pareto k-hat of {self.samples} particles was given {self.seen}.")
        shape = self._largest.shape[1:]
        largest = self._largest.reshape(len(self._largest), shape.numel()).sort(0, descending=True).values
        cut, top = largest[-1], largest[:-1]
        count = (top > cut).sum(0)
        k = torch.full_like(cut, math.inf).masked_fill((count == 0) & (cut > -math.inf), -math.inf)
        for n in count[count >= 5].unique().tolist():  # one, but for ties
            k[count == n] = _pareto_shape(_excesses(top[:n, count == n], cut[count == n]))
        return k.masked_fill(largest[0].isnan(), math.nan).view(shape)


def pareto_k(log_w: Tensor, dim: int = 0) -> Tensor:
    """Pareto k-hat of weights along `dim`, which is removed: see `Tail`. Takes log-weights of +-1e4 and -inf."""
    tail = Tail(log_w.shape[dim])
    tail.add(log_w.movedim(dim, 0))
    return tail.k_hat()


def _excesses(log_w: Tensor, log_cut: Tensor) -> Tensor:
    """(w - cut) / (largest w - cut); those that are 600 nats below the largest or more count as 600 below."""
    log_x = log_w + torch.log(-torch.expm1(log_cut - log_w))
    return (log_x - log_x[0]).clamp(min=-600).exp()


def _pareto_shape(x: Tensor) -> Tensor:
    """Shape k of a generalised Pareto distribution from x (n, B), the largest first and equal to 1.

    The estimate of Zhang and Stephens (Technometrics 51, 2009): theta = -k / sigma is averaged over a grid by its
    profile likelihood. Then, as Vehtari et al. do, drawn to 0.5 as by ten more data.
    """
    n, m = len(x), 30 + math.isqrt(len(x))
    spread = torch.sqrt(m / (torch.arange(m, device=x.device, dtype=x.dtype) + 0.5)) - 1
    theta = 1 - spread[:, None] / (3 * x[n - int(n / 4 + 0.5)])  # by the lower quartile
    theta = theta.masked_fill(theta == 0, 1e-30)  # the exponential distribution, k = 0, as a limit
    k = torch.stack([torch.log1p(-t * x).mean(0) for t in theta])
    likelihood = n * (torch.log(-theta / k) - k - 1)
    theta_hat = (likelihood.softmax(0) * theta).sum(0)
    return (torch.log1p(-theta_hat * x).sum(0) + 5) / (n + 10)

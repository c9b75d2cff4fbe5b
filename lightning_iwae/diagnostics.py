"""Signal-to-noise ratios of gradients, and active units: pure functions of tensors."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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


class _Running:
    """Streaming mean and variance (Welford) of vectors (P,) in float64, and their direction ratio."""

    def __init__(self, size: Tensor, n: int) -> None:
        self.half, self.seen, self.ratio = n // 2, 0, 0.0
        self.mean = torch.zeros_like(size, dtype=torch.float64)
        self.squares = self.mean.clone()
        self.direction = self.mean

    def add(self, g: Tensor) -> None:
        g = g.double()
        if self.seen == self.half:
            self.direction = self.mean / self.mean.norm()
        if self.seen >= self.half:
            along = g @ self.direction
            self.ratio += (along.abs() / (g - along * self.direction).norm()).item()
        self.seen += 1
        delta = g - self.mean
        self.mean = self.mean + delta / self.seen
        self.squares += delta * (g - self.mean)

    def result(self) -> SNR:
        std = (self.squares / (self.seen - 1)).sqrt()
        varies = std > 0
        return SNR((self.mean.abs() / std)[varies], self.ratio / (self.seen - self.half), self.seen)


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
    running: dict[str, _Running] = {}
    for draw in range(1, n + 1):
        for name, g in gradients().items():
            if bad := int((~g.isfinite()).sum()):
                raise FloatingPointError(
                    f"the gradient of {name} is not finite in {bad} of {g.numel()} parameters, at draw {draw} of {n}."
                )
            running.setdefault(name, _Running(g, n)).add(g)
    return {name: r.result() for name, r in running.items()}


def active_units(variances: Tensor, threshold: float = 0.01) -> int:
    """How many latent units are used: Var_x(E_q[z_u | x]) > 0.01 (Burda et al., arXiv 1509.00519).

    Args:
        variances: of the posterior means over data, (Z,).
    """
    return int((variances > threshold).sum())

"""p(x | z) from what a decoder puts out: one distribution over all pixels, by name in a network's `likelihood`."""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, constraints

from .base import full_precision
from .bernoulli import BernoulliPixels, Compiled, Kernel, eager
from .normal import DiagonalNormal

Name = Literal["bernoulli", "gaussian", "discretised-logistic"]


def make(name: Name, pixels: int) -> nn.Module:
    """The module that makes the distribution of that name from a decoder's output (..., X)."""
    if name not in get_args(Name):
        raise ValueError(f"network.likelihood must be one of {', '.join(get_args(Name))}. Got {name}.")
    return {"bernoulli": BernoulliLikelihood, "gaussian": Gaussian, "discretised-logistic": DiscretisedLogistic}[name](
        pixels
    )


# ------------------------------------------------------------------------------------------------ zeros and ones
class BernoulliLikelihood(nn.Module):
    """A Bernoulli per pixel, the decoder's output its logits. For x in [0, 1]."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.kernel: Kernel = eager

    def forward(self, output: Tensor) -> Distribution:
        """Of outputs (..., X)."""
        return BernoulliPixels(output, self.kernel)

    def output_of(self, mean: Tensor) -> Tensor:
        """Log-odds of a mean (X,) clipped to [0.001, 0.999]."""
        return torch.logit(mean.clamp(0.001, 0.999))


def compile_likelihoods(network: nn.Module) -> bool:
    """Have torch.compile make one loop of each Bernoulli likelihood's value and gradient; whether there is any."""
    found = [module for module in network.modules() if isinstance(module, BernoulliLikelihood)]
    for module in found:
        module.kernel = Compiled()
    return bool(found)


# ------------------------------------------------------------------------------------------------ grey values
class Gaussian(nn.Module):
    """N(output, scale^2) per pixel, with a learnt scale of each pixel. For real x.

    The scale stays above 1e-3: on pixels that never vary the likelihood is unbounded without.
    """

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((pixels,), -1.0))

    def forward(self, output: Tensor) -> Distribution:
        """Of outputs (..., X)."""
        scale = full_precision(self.log_scale).exp() + 1e-3
        return DiagonalNormal(full_precision(output), scale)

    def output_of(self, mean: Tensor) -> Tensor:
        """The mean itself."""
        return mean


class DiscretisedLogistic(nn.Module):
    """A logistic with mean output and learnt scale per pixel, on the 256 grey levels 0, 1/255, .. 1.

    Salimans et al., arXiv 1701.05517, section 2.1, with one component; Kingma et al., arXiv 1606.04934.
    """

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((pixels,), -2.0))

    def forward(self, output: Tensor) -> Distribution:
        """Of outputs (..., X)."""
        return Independent(LogisticLevels(full_precision(output), full_precision(self.log_scale)), 1)

    def output_of(self, mean: Tensor) -> Tensor:
        """A middle grey is 0."""
        return mean - 0.5


class LogisticLevels(Distribution):
    """P(x) = sigmoid((x + h - mean) / s) - sigmoid((x - h - mean) / s) at the levels, h half a level.

    The lowest level takes all below it, the highest all above. A value between levels counts as the nearest.

    Args:
        mean: (...), of the logistic; at 0.5 + mean, so that an output of 0 is a middle grey.
        log_scale: broadcast with mean; to the scale 1e-3 is added, a quarter of a level.
    """

    arg_constraints = {}  # noqa: RUF012
    support = constraints.unit_interval
    LEVELS = 256

    def __init__(self, mean: Tensor, log_scale: Tensor) -> None:
        self.loc, self.scale = torch.broadcast_tensors(mean + 0.5, log_scale.exp() + 1e-3)
        super().__init__(self.loc.shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """log P(x), of the broadcast shape. Nats. Exact in both tails: differences are taken in log space."""
        top = self.LEVELS - 1
        level = (value * top).round()
        inverse = 1 / self.scale
        above = ((level + 0.5) / top - self.loc) * inverse
        below = ((level - 0.5) / top - self.loc) * inverse
        # log(sigmoid(a) - sigmoid(b)) = log sigmoid(a) + log sigmoid(-b) + log(1 - exp(b - a))
        width = inverse / top
        inside = F.logsigmoid(above) + F.logsigmoid(-below) + torch.log(-torch.expm1(-width))
        return torch.where(level <= 0, F.logsigmoid(above), torch.where(level >= top, F.logsigmoid(-below), inside))

    @property
    def mean(self) -> Tensor:
        """sum_k P(x >= k / 255) / 255, in [0, 1]."""
        total = torch.zeros_like(self.loc)
        for k in range(1, self.LEVELS):
            total += torch.sigmoid((self.loc - (k - 0.5) / (self.LEVELS - 1)) / self.scale)
        return total / (self.LEVELS - 1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Levels, by rounding a logistic draw."""
        with torch.no_grad():
            u = torch.rand(self._extended_shape(sample_shape), device=self.loc.device, dtype=self.loc.dtype)
            x = self.loc + self.scale * torch.logit(u, eps=1e-7)
            return (x.clamp(0, 1) * (self.LEVELS - 1)).round() / (self.LEVELS - 1)

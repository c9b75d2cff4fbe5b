"""A normal distribution per latent number or pixel, with a log-density and its gradients in few operations."""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from ..derivatives import asked, under_torch_func


class DiagonalNormal(Independent):
    """N(loc, diag scale^2) from loc and scale (..., Z), all Z one event."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__(Normal(loc, scale, validate_args=False), 1, validate_args=False)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """loc + scale noise, (*sample_shape, ..., Z), of the same noise as torch's."""
        loc, scale = self.base_dist.loc, self.base_dist.scale
        noise = loc.new_empty(torch.Size(sample_shape) + loc.shape).normal_()
        return torch.addcmul(loc, noise, scale)

    def log_prob(self, value: Tensor) -> Tensor:
        """-|e|^2 / 2 - sum log scale - Z / 2 log 2 pi with e = (value - loc) / scale, shape (...,). Nats."""
        loc, scale = self.base_dist.loc, self.base_dist.scale
        if loc.shape[-1] == 1 and value.ndim:  # one for all of Z
            loc, scale = (t.expand(*t.shape[:-1], value.shape[-1]) for t in (loc, scale))
        if under_torch_func():  # torch.func takes its own derivatives
            e = (value - loc) / scale
            return -0.5 * e.square().sum(-1) - _log_normaliser(scale)
        with torch._C.DisableTorchFunction():  # type: ignore[attr-defined]  # no layers here for `weighing` to see
            return _LogProb.apply(value, loc, scale)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "DiagonalNormal":
        """The same for a larger batch."""
        shape = torch.Size(batch_shape) + self.event_shape
        return DiagonalNormal(self.base_dist.loc.expand(shape), self.base_dist.scale.expand(shape))


class StandardNormal(DiagonalNormal):
    """N(0, I) of z (..., Z)."""

    def __init__(self, latent: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(
            torch.zeros(latent, dtype=dtype, device=device), torch.ones(latent, dtype=dtype, device=device)
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """-|z|^2 / 2 - Z / 2 log 2 pi, shape (...,). Nats."""
        loc = self.base_dist.loc
        if value.dtype != loc.dtype or value.shape[-1:] != loc.shape:
            return super().log_prob(value)
        if under_torch_func():
            return -0.5 * value.square().sum(-1) - 0.5 * math.log(2 * math.pi) * len(loc)
        with torch._C.DisableTorchFunction():  # type: ignore[attr-defined]
            return _StandardLogProb.apply(value)


def standard_normal(latent: int, like: Tensor) -> StandardNormal:
    """N(0, I) of z (..., Z), on the device of `like`, in float64 if that is and else in float32. Made once for each."""
    return _standard_normal(latent, like.dtype if like.dtype == torch.float64 else torch.float32, like.device)


@cache
def _standard_normal(latent: int, dtype: torch.dtype, device: torch.device) -> StandardNormal:
    with torch.inference_mode(False):  # else a later training could not use it
        return StandardNormal(latent, dtype, device)


class _StandardLogProb(torch.autograd.Function):
    """-|z|^2 / 2 - Z / 2 log 2 pi over the last axis."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return torch.linalg.vector_norm(z, dim=-1).square_().add_(math.log(2 * math.pi) * z.shape[-1]).mul_(-0.5)

    @staticmethod
    def backward(ctx: Any, seed: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return z * -seed.unsqueeze(-1)


class _LogProb(torch.autograd.Function):
    """Keeps e = (value - loc) / scale, of which all three gradients are made."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        inverse = 1 / scale
        e = (value - loc).mul_(inverse)
        ctx.save_for_backward(value, loc, scale, inverse, e)
        length = torch.linalg.vector_norm(e, dim=-1)
        return torch.addcmul(-_log_normaliser(scale), length, length, value=-0.5)

    @staticmethod
    def backward(ctx: Any, seed: Tensor) -> tuple[Tensor | None, ...]:
        value, loc, scale, inverse, e = ctx.saved_tensors
        if torch.is_grad_enabled():  # a derivative of this one is wanted
            inverse = 1 / scale
            e = (value - loc) * inverse
        of_value, of_loc, of_scale = asked(ctx)
        seed = seed.unsqueeze(-1)
        g = e * seed
        ones = seed.sum_to_size(*scale.shape[:-1], 1) if of_scale else None
        return (
            (g * -inverse).sum_to_size(value.shape) if of_value else None,
            g.sum_to_size(loc.shape) * inverse if of_loc else None,
            ((g * e).sum_to_size(scale.shape) - ones) * inverse if of_scale else None,
        )


def _log_normaliser(scale: Tensor) -> Tensor:
    """sum log scale + Z / 2 log 2 pi."""
    return scale.log().sum(-1) + 0.5 * math.log(2 * math.pi) * scale.shape[-1]

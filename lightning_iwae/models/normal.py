"""A normal distribution per latent number or pixel, with a log-density and its gradients in few operations."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import Independent, Normal


class DiagonalNormal(Independent):
    """N(loc, diag scale^2) from loc and scale (..., Z), all Z one event."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__(Normal(loc, scale, validate_args=False), 1, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """-|e|^2 / 2 - sum log scale - Z / 2 log 2 pi with e = (value - loc) / scale, shape (...,). Nats."""
        loc, scale = self.base_dist.loc, self.base_dist.scale
        with torch._C.DisableTorchFunction():  # type: ignore[attr-defined]  # no layers here for `weighing` to see
            return _LogProb.apply(value, loc, scale)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "DiagonalNormal":
        """The same for a larger batch."""
        shape = torch.Size(batch_shape) + self.event_shape
        return DiagonalNormal(self.base_dist.loc.expand(shape), self.base_dist.scale.expand(shape))


class _LogProb(torch.autograd.Function):
    """Keeps e = (value - loc) / scale, of which all three gradients are made."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        inverse = 1 / scale
        e = (value - loc).mul_(inverse)
        ctx.save_for_backward(e, inverse)
        ctx.shapes = value.shape, loc.shape
        norm = torch.linalg.vector_norm(e, dim=-1)
        return norm.square_().mul_(-0.5).sub_(scale.log().sum(-1) + 0.5 * math.log(2 * math.pi) * e.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, seed: Tensor) -> tuple[Tensor | None, ...]:
        e, inverse = ctx.saved_tensors
        of_value, of_loc, of_scale = ctx.needs_input_grad
        value, parameters = ctx.shapes
        seed = seed.unsqueeze(-1)
        g = e * seed
        ones = seed.sum_to_size(*parameters[:-1], 1) if of_scale else None
        return (
            (g * -inverse).sum_to_size(value) if of_value else None,
            g.sum_to_size(parameters) * inverse if of_loc else None,
            ((g * e).sum_to_size(parameters) - ones) * inverse if of_scale else None,
        )

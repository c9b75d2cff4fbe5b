"""A Bernoulli per pixel, of whose logits log-likelihood and gradient are made together.

Beside the matrix products this is where a step's time goes: a decoder puts out S * B * X logits.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, constraints

from ..derivatives import all_ones, no_second_derivative
from .base import full_precision

BLOCK = 2**19  # logits at a time, which fit the second-level caches of few cores and keep many busy

Kernel = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


# ------------------------------------------------------------------------------------------------ the kernels
def eager(logits: Tensor, x: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """sum x * l - log(1 + exp l) over the last axis of logits, (...,), and x - sigmoid(l), (..., X), if asked for.

    The sum is in full precision, the gradient in that of the logits. On CPU one exponential serves both: with e = exp l
    and u = 1 + e they are sums of x * l - log u, and (x - (1 - x) e) / u, which loses no digits for x of 0 or 1 and l
    of either sign. Where e overflows, or a product of four u, and on other devices, on which a look at the result
    would make the host wait, torch's own functions are taken.
    """
    if logits.device.type == "cpu":
        log_prob, delta = _in_blocks(logits, x, gradient)
        if math.isfinite(log_prob.sum()):
            return log_prob, delta
    full = full_precision(logits)
    log_prob = torch.addcmul(F.softplus(full, threshold=40.0).neg_(), full, x).sum(-1)
    return log_prob, (x - torch.sigmoid(full)).to(logits.dtype) if gradient else None


def _in_blocks(logits: Tensor, x: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """`eager` by one exponential, some rows after others, so that what one operation leaves the next finds cached."""
    delta, y = (torch.empty_like(logits), x - 1) if gradient else (None, None)
    rows = max(1, BLOCK // max(1, logits[:1].numel()))
    if logits.ndim == 1 or len(logits) <= rows:
        return _block(logits, x, y, delta), delta
    log_prob = full_precision(logits[:0]).new_empty(logits.shape[:-1])
    x, y = x.expand_as(logits), None if y is None else y.expand_as(logits)
    for block in (slice(start, start + rows) for start in range(0, len(logits), rows)):
        of_rows = (None, None) if y is None or delta is None else (y[block], delta[block])
        log_prob[block] = _block(logits[block], x[block], *of_rows)
    return log_prob, delta


def _block(logits: Tensor, x: Tensor, y: Tensor | None, delta: Tensor | None) -> Tensor:
    """log p of logits (..., X) at x. Its gradient is written to `delta`, with y = x - 1, unless there is none."""
    full = full_precision(logits)
    e = full.exp()
    if delta is None or y is None:
        u = e.add_(1)
    else:
        times_u = torch.addcmul(x, e, y, out=delta if delta.dtype == e.dtype else None)
        u = e.add_(1)
        torch.div(times_u, u, out=delta)
    return _less_logs(full, x, u).sum(-1).to(full.dtype)


def _less_logs(logits: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """x * l - log u, added up over up to 4 pixels that share a logarithm: what nearly cancels, first. Spoils u."""
    if logits.shape[-1] % 2:
        return torch.mul(logits, x).sub_(u.log_())
    (l1, l2), (x1, x2), (u1, u2) = (t.tensor_split(2, -1) for t in (logits, x, u))
    v, u = (l1 * x1).addcmul_(l2, x2), u1.mul_(u2)
    if v.shape[-1] % 2 == 0:
        (v1, v2), (u1, u2) = (t.tensor_split(2, -1) for t in (v, u))
        v, u = v1.add_(v2), u1.mul_(u2)
    return v.sub_(u.log_())


def formula(logits: Tensor, x: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The same in one expression that never overflows, for a compiler to make one loop of.

    log(1 + exp l) = max(l, 0) + log(1 + e) with e = exp -|l|.
    """
    full = full_precision(logits)
    e = torch.exp(-full.abs())
    log_prob = (full * x - full.clamp(min=0) - _log1p(e)).sum(-1)
    delta = torch.where(full > 0, x * e - (1 - x), x - (1 - x) * e) / (1 + e) if gradient else None
    return log_prob, None if delta is None else delta.to(logits.dtype)


def _log1p(e: Tensor) -> Tensor:
    """log(1 + e) for e in [0, 1]. In float32 to 4e-8 of it by a polynomial, as torch's takes as long as all the rest.

    e times the interpolation of log(1 + e) / e at the Chebyshev points of [0, 1].
    """
    if e.dtype == torch.float64:
        return torch.log1p(e)
    p = 0.005126102123 * e - 0.029074064606
    for c in (0.077516086623, -0.136022476124, 0.190768807308, -0.248353989972, 0.333181217074, -0.499994449763):
        p = p * e + c
    return (p * e + 0.999999965926) * e


class Compiled:
    """`formula` by torch.compile; `eager`, after a warning, where that fails, as without a C++ compiler."""

    def __init__(self) -> None:
        self.kernel: Kernel | None = None  # from the first call on: the compiler takes seconds to import

    def __call__(self, logits: Tensor, x: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """As the kernel in use."""
        try:
            if self.kernel is None:
                self.kernel = torch.compile(formula, dynamic=True)
            # Rows of x lie apart, lest the compiler see a loop over whole batches beside the one over each row's sum.
            apart = F.pad(x, (0, 16))[..., : x.shape[-1]]
            return self.kernel(logits, apart, gradient)
        except Exception as error:  # of whatever kind: it is the compiler's
            if self.kernel is eager:
                raise
            told = str(error).strip().splitlines() or [""]
            warnings.warn(f"model.compile does nothing, as torch.compile failed: {told[0]}", stacklevel=2)
            self.kernel = eager
            return eager(logits, x, gradient)

    def __reduce__(self) -> tuple[type, tuple]:
        return Compiled, ()  # another process compiles its own


# ------------------------------------------------------------------------------------------------ the distribution
class BernoulliPixels(Distribution):
    """A Bernoulli per pixel from logits (..., X), all X one event; for x anywhere in [0, 1].

    Logits may have a lower precision, as they leave a network under autocast: log_prob is float32 all the same, and
    only its gradient is rounded to theirs.
    """

    arg_constraints: ClassVar[dict] = {}  # type: ignore[misc]
    support = constraints.independent(constraints.boolean, 1)

    def __init__(self, logits: Tensor, kernel: Kernel = eager) -> None:
        self.logits, self.kernel = logits, kernel
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """sum x * logit + log(1 - p) over pixels, shape (...,). Nats."""
        if torch.compiler.is_compiling():  # a model that is compiled itself: its compiler takes the derivative
            logits = full_precision(self.logits)
            return (logits * value - F.softplus(logits, threshold=40.0)).sum(-1)
        with torch._C.DisableTorchFunction():  # type: ignore[attr-defined]  # no layers here for `weighing` to see
            logits, _ = torch.broadcast_tensors(self.logits, value)
            if not torch.is_grad_enabled():
                return self.kernel(logits, value, False)[0]
            return _LogProb.apply(logits, value, self.kernel)

    @property
    def mean(self) -> Tensor:
        """p = P(x = 1), (..., X)."""
        return torch.sigmoid(full_precision(self.logits))

    @property
    def variance(self) -> Tensor:
        """p (1 - p), (..., X)."""
        return self.mean * (1 - self.mean)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Zeros and ones."""
        with torch.no_grad():
            return torch.bernoulli(self.mean.expand(self._extended_shape(sample_shape)))


class _LogProb(torch.autograd.Function):
    """sum x * l - log(1 + exp l) over the last axis; its gradient x - sigmoid(l) is kept instead of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x: Tensor, kernel: Kernel) -> Tensor:
        of_logits, of_x, _ = ctx.needs_input_grad
        log_prob, delta = kernel(logits.detach(), x.detach(), of_logits)
        ctx.save_for_backward(delta, logits if of_x else None)
        ctx.x_shape = x.shape
        return log_prob

    @staticmethod
    @no_second_derivative
    def backward(ctx: Any, seed: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        delta, logits = ctx.saved_tensors
        of_x = None if logits is None else (seed.unsqueeze(-1) * logits).sum_to_size(ctx.x_shape)
        if delta is None or all_ones(seed):
            return delta, of_x, None
        return (delta * seed.unsqueeze(-1)).to(delta.dtype), of_x, None

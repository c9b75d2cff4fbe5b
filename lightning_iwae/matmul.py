"""Linear layers' products of float32 on a CPU, by the faster of the two libraries that torch has for them.

torch gives them to MKL, which uses AVX-512 on Intel's processors only; oneDNN uses it on all that have it, and takes
half the time on those of others. Both work in full float32: only the order of sums differs. After
`torch.backends.mkldnn.enabled = False` all go to MKL.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CPU = Path("/proc/cpuinfo")
LEAST = 2**21  # multiplications, of which smaller products are left to torch: oneDNN takes longer to start


def linear(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """h @ weight.T + bias, (..., out) for h (..., in) and weight (out, in): F.linear. Leaves no graph."""
    if not _onednn(h.numel() * len(weight), h, weight, bias):
        return F.linear(h, weight, bias)
    return _by_onednn(h, weight, bias)


def parameter_gradients(delta: Tensor, h: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor]:
    """sum a delta h.T and sum a delta over rows, (out, in) and (out,), for delta (N, out), h (N, in) and a (N, 1).

    Rows are not weighed where a is None. Leaves no graph.
    """
    if not _onednn(delta.numel() * h.shape[1], delta, h):
        return delta.T @ (h if a is None else h * a), delta.sum(0) if a is None else a.flatten() @ delta
    factors = h.new_empty(h.shape[1] + 1, len(h))  # the bias's is a row more
    if a is None:
        factors[:-1], factors[-1] = h.T, 1.0
    else:
        torch.mul(h.T, a.T, out=factors[:-1])
        factors[-1] = a.flatten()
    gradients = _by_onednn(factors, delta.T)
    return gradients[:-1].T, gradients[-1]


class Fast(TorchFunctionMode):
    """While active, F.linear is `linear` where no gradients are taken, as in an evaluation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and not torch.is_grad_enabled() and not transformed():
            return linear(*args)
        return func(*args, **(kwargs or {}))


def transformed() -> bool:
    """Whether what is called now is compiled, or under torch.func."""
    return (
        torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]
    )


def _by_onednn(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The call that torch.compile makes for F.linear."""
    return torch.ops.mkldnn._linear_pointwise(h, weight, bias, "none", [], "")


def _onednn(size: int, *factors: Tensor | None) -> bool:
    """Whether oneDNN is to make a product of so many multiplications."""
    return (
        size >= LEAST
        and mkl_lags()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and all(t is None or _plain(t) for t in factors)
    )


def _plain(t: Tensor) -> bool:
    return t.dtype == torch.float32 and t.device.type == "cpu" and type(t) in (Tensor, nn.Parameter)


@cache
def mkl_lags() -> bool:
    """Whether this is a processor with AVX-512 of another maker than Intel, as Linux has it."""
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and CPU.exists()
        and "GenuineIntel" not in CPU.read_text()
    )

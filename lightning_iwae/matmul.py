"""Linear layers on a CPU, by the faster of the two libraries that torch has for their products.

torch gives them to MKL, which uses AVX-512 on Intel's processors only; oneDNN uses it on all that have it, and takes
half the time on those of others. Both work in full float32: only the order of sums differs. And oneDNN's product can
take a tanh along, in float32 and bfloat16. Under `by_torch`, or after `torch.backends.mkldnn.enabled = False`, all is
torch's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_variadic

CPU = Path("/proc/cpuinfo")
PLAIN = (Tensor, nn.Parameter)
LEAST = 2**21  # multiplications, of which smaller products are left to torch: oneDNN takes longer to start


def linear(h: Tensor, weight: Tensor, bias: Tensor | None = None, tanh: bool = False) -> Tensor:
    """h @ weight.T + bias, (..., out) for h (..., in) and weight (out, in), or its tanh. Leaves no graph.

    Under autocast in its lower precision, as F.linear.
    """
    if torch.is_autocast_enabled("cpu") and h.device.type == "cpu":
        h, weight = _lowered(h), _lowered(weight)
        bias = None if bias is None else _lowered(bias)
    if _onednn(h.numel() * len(weight), h, weight, bias):
        return _by_onednn(h, weight, bias, tanh)
    out = F.linear(h, weight, bias)
    return out.tanh_() if tanh else out


def tanh_linear(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """tanh(F.linear(h, weight, bias)), for `Fast` and `Weighing` to see as one: oneDNN's product takes tanh along."""
    if has_torch_function_variadic(h, weight, bias):
        return handle_torch_function(tanh_linear, (h, weight, bias), h, weight, bias)
    return torch.tanh(F.linear(h, weight, bias))


def parameter_gradients(delta: Tensor, h: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor]:
    """sum a delta h.T and sum a delta over rows, (out, in) and (out,), for delta (N, out), h (N, in) and a (N, 1).

    Rows are not weighed where a is None. Leaves no graph.
    """
    if delta.dtype != torch.float32 or not _onednn(delta.numel() * h.shape[1], delta, h):
        return delta.T @ (h if a is None else h * a), delta.sum(0) if a is None else a.flatten() @ delta
    factors = h.new_empty(h.shape[1] + 1, len(h))  # the bias's is a row more
    if a is None:
        factors[:-1], factors[-1] = h.T, 1.0
    else:
        torch.mul(h.T, a.T, out=factors[:-1])
        factors[-1] = a.flatten()
    gradients = _by_onednn(factors, delta.T)
    return gradients[:-1].T, gradients[-1]


LAYERS: tuple[Callable, ...] = (F.linear, tanh_linear)


class Fast(TorchFunctionMode):
    """While active, F.linear and `tanh_linear` are `linear` where no gradients are taken, as in an evaluation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LAYERS and not kwargs and not torch.is_grad_enabled() and not transformed():
            h, weight, bias = (*args, None)[:3]
            return linear(h, weight, bias, tanh=func is tanh_linear)
        return func(*args, **(kwargs or {}))


@contextmanager
def by_torch() -> Iterator[None]:
    """Inside, all goes to torch."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def transformed() -> bool:
    """Whether what is called now is compiled, or under torch.func."""
    return (
        torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]
    )


def _by_onednn(h: Tensor, weight: Tensor, bias: Tensor | None = None, tanh: bool = False) -> Tensor:
    """The call that torch.compile makes for F.linear."""
    return torch.ops.mkldnn._linear_pointwise(h, weight, bias, "tanh" if tanh else "none", [], "")


def _lowered(t: Tensor) -> Tensor:
    return t.to(torch.get_autocast_dtype("cpu")) if t.dtype == torch.float32 else t


def _onednn(size: int, *factors: Tensor | None) -> bool:
    """Whether oneDNN is to make a product of so many multiplications."""
    assert factors[0] is not None
    dtype = factors[0].dtype
    return (
        size >= LEAST
        and bool(torch.backends.mkldnn.enabled)
        and (mkl_lags() if dtype == torch.float32 else dtype == torch.bfloat16 and has_bf16())
        and all(t is None or (t.dtype == dtype and t.device.type == "cpu" and type(t) in PLAIN) for t in factors)
    )


@cache
def mkl_lags() -> bool:
    """Whether this is a processor with AVX-512 of another maker than Intel, as Linux has it."""
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and CPU.exists()
        and "GenuineIntel" not in CPU.read_text()
    )


@cache
def has_bf16() -> bool:
    """Whether oneDNN makes products of bfloat16 here; then torch gives it all of them, but without tanh."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()

"""Linear layers on a CPU, by the faster of the two libraries that torch has for their products.

torch gives them to MKL, which uses AVX-512 on Intel's processors only; oneDNN uses it on all that have it, and takes
half the time on those of others. Both work in full float32: only the order of sums differs. And oneDNN's product can
take a tanh along, in float32 and bfloat16. Under `by_torch`, or after `torch.backends.mkldnn.enabled = False`, all is
torch's.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_variadic

from .derivatives import under_torch_func

CPU = Path("/proc/cpuinfo")
LEAST = 2**21  # multiplications, of which smaller products are left to torch: oneDNN takes longer to start
ROWS = 128  # of data, with fewer of which it does so within a step: at K = 1 and batch 20 that took 1.18 times as long


def linear(h: Tensor, weight: Tensor, bias: Tensor | None = None, tanh: bool = False) -> Tensor:
    """h @ weight.T + bias, (..., out) for h (..., in) and weight (out, in), or its tanh. Leaves no graph.

    Under autocast in its lower precision, as F.linear.
    """
    if torch.is_autocast_enabled("cpu") and h.device.type == "cpu":
        h, weight = _lowered(h), _lowered(weight)
        bias = None if bias is None else _lowered(bias)
    if _onednn(h, weight, bias) and h.numel() >= ROWS * h.shape[-1]:
        return _layer(h, weight, bias, tanh) if tanh or bias is not None else _product(h, weight.T)
    out = F.linear(h, weight, bias)
    return out.tanh_() if tanh else out


def tanh_mlp(h: Tensor, *parameters: Any) -> Tensor:
    """Linear layers with tanh between them, by the weight and bias of each; `Fast` and `Weighing` see them as one."""
    if has_torch_function_variadic(h, *parameters):
        return handle_torch_function(tanh_mlp, (h, *parameters), h, *parameters)
    for i in range(0, len(parameters), 2):
        h = F.linear(torch.tanh(h) if i else h, *parameters[i : i + 2])
    return h


def outputs(h: Tensor, *parameters: Any) -> Iterator[Tensor]:
    """What each layer of `tanh_mlp` gives, its tanh taken along, one after another. Leaves no graph."""
    for i in range(0, len(parameters), 2):
        h = linear(h, parameters[i], parameters[i + 1], i + 2 < len(parameters))
        yield h


def parameter_gradients(delta: Tensor, h: Tensor, a: Tensor | None, bias: bool = True) -> tuple[Tensor, Tensor | None]:
    """sum a delta h.T and sum a delta over rows, (out, in) and (out,), for delta (N, out), h (N, in) and a (N, 1).

    Rows are not weighed where a is None; without `bias` the second may be None. Leaves no graph.
    """
    if len(h) < ROWS or not _onednn(h.T, delta.T):
        of_weight = delta.T @ (h if a is None else h * a)
        if not bias:
            return of_weight, None
        return of_weight, delta.sum(0) if a is None else a.flatten() @ delta
    factors = h.new_empty(len(h), h.shape[1] + 1)  # the bias's is a column more
    if a is None:
        factors[:, :-1], factors[:, -1] = h, 1.0
    else:
        torch.mul(h, a, out=factors[:, :-1])
        factors[:, -1:] = a
    gradients = _product(factors.T, delta)
    return gradients[:-1].T, gradients[-1]


LAYERS: tuple[Callable, ...] = (F.linear, tanh_mlp)


class Fast(TorchFunctionMode):
    """While active, F.linear and `tanh_mlp` are the last of `outputs` where no gradients are taken: in evaluations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LAYERS and not kwargs and not torch.is_grad_enabled() and not transformed():
            h, weight, *others = args
            return deque(outputs(h, weight, *(others or [None])), maxlen=1).pop()
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
    """Whether what is called now is compiled, under torch.func, or differentiated forwards."""
    return torch.compiler.is_compiling() or under_torch_func() or forward_ad._current_level >= 0


def _layer(h: Tensor, weight: Tensor, bias: Tensor | None = None, tanh: bool = False) -> Tensor:
    """By oneDNN, as torch.compile does it. The call reads a bias without its strides."""
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(h, weight, bias, "tanh" if tanh else "none", [], "")


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right by oneDNN, faster than as a layer: gradients of weights by 8 to 17 %, of inputs by 4 to 6 %."""
    if left.dtype == torch.bfloat16:  # torch gives it these by itself
        return left @ right
    if not lower_is_full():
        return _layer(left, right.T)
    with lower():
        return left @ right


@contextmanager
def lower() -> Iterator[None]:
    """Inside, torch gives products of float32 to oneDNN, as ones that it may make in less than that."""
    of_products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, of_products.fp32_precision = of_products.fp32_precision, "bf16"
    try:
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        of_products.fp32_precision = before


@cache
def lower_is_full() -> bool:
    """Whether oneDNN uses no such leave, as without AMX: sums of products of 10 bits come out whole."""
    if not hasattr(torch.backends.mkldnn, "matmul"):  # older torch
        return False
    source = torch.Generator().manual_seed(0)
    left, right = (torch.randint(1024, shape, generator=source) for shape in ((512, 16), (16, 512)))
    with lower():
        return torch.equal((left.float() @ right.float()).long(), left @ right)


def _lowered(t: Tensor) -> Tensor:
    return t.to(torch.get_autocast_dtype("cpu")) if t.dtype == torch.float32 else t


def _onednn(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether oneDNN is to make this product: a layer's in the strict sense, as it checks little of what it gets."""
    sizes = weight.ndim == 2 and h.ndim > 0 and h.shape[-1] == weight.shape[1]
    return (
        sizes
        and h.numel() * len(weight) >= LEAST
        and (bias is None or bias.shape == weight.shape[:1])
        and bool(torch.backends.mkldnn.enabled)
        and (mkl_lags() if h.dtype == torch.float32 else h.dtype == torch.bfloat16 and has_bf16())
        and all(t is None or _plain(t, h.dtype) for t in (h, weight, bias))
    )


def _plain(t: Tensor, dtype: torch.dtype) -> bool:
    alike = t.dtype == dtype and t.device.type == "cpu" and t.layout == torch.strided
    return alike and type(t) in (Tensor, nn.Parameter)


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

"""theta's weights applied inside the layers, so that one backward pass serves both theta and z.

A layer's parameter gradient is a sum over samples. `Weighing`, switched on around the generative network's forward
pass, replaces linear layers and convolutions by Functions that, on the way back, pass on the plain
gradient of the input but weigh each sample by `a` where the gradient of the parameters is summed. Parameters that
are (also) used in any other way keep their ordinary gradient: `weighed` tells the two kinds apart by walking the
graph, and `routing.together` treats each as it must.

What the graph cannot show is whether a layer's rows are the samples in order; `routing.draw` settles that by
comparing gradients.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .derivatives import no_second_derivative
from .matmul import LAYERS, linear, outputs, parameter_gradients, transformed

CONVOLUTIONS: tuple[Callable, ...] = (
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)


class Weighing(TorchFunctionMode):
    """While active, linear layers and convolutions become ones whose parameter gradients can be weighed per sample.

    Args:
        theta: the parameters that may be weighed.
        shape: (S, B), the leading axes of a sample-wise input; rows flattened to S * B are taken in that order.
    """

    def __init__(self, theta: Iterable[nn.Parameter], shape: tuple[int, int]) -> None:
        super().__init__()
        self.theta = set(theta)
        self.shape = shape
        self.a: Tensor | None = None  # (S, B); None: not weighed
        self.wanted: set[nn.Parameter] = set()

    @contextmanager
    def backward(self, wanted: Iterable[nn.Parameter], a: Tensor | None) -> Iterator[None]:
        """For a pass that asks for the gradients of `wanted`, each sample weighed by `a`; their hooks `held_back`."""
        self.wanted, self.a = set(wanted), a
        try:
            with held_back(self.wanted):
                yield
        finally:
            self.wanted, self.a = set(), None

    def factor(self, rows: Tensor) -> Tensor | None:
        """What sample-wise `rows` are multiplied by: each sample's `a`, with as many axes; None for no weighing."""
        if self.a is None:
            return None
        a = self.a if rows.shape[:2] == self.shape else self.a.flatten()
        return a.to(rows).reshape(a.shape + (1,) * (rows.ndim - a.ndim))

    def gradients(
        self, delta: Tensor, h: Tensor, a: Tensor | None, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """A layer's, of those parameters that are wanted, for delta (N, out), h (N, in) and a (N, 1)."""
        if self.wanted.isdisjoint((weight, bias)):
            return _unwanted(weight), _unwanted(bias)
        of_weight, of_bias = parameter_gradients(delta, h.to(delta.dtype), a, bias is not None)
        return (
            of_weight if weight in self.wanted else _unwanted(weight),
            of_bias if bias in self.wanted else _unwanted(bias),
        )

    def _applies(self, func: Any, args: tuple, kwargs: dict) -> bool:
        if not (func in LAYERS or func in CONVOLUTIONS) or len(args) < 3 or kwargs or _intercepted():
            return False
        h, weight, *_ = args
        flat = h.ndim > 1 and h.shape[0] == self.shape[0] * self.shape[1]
        if func in LAYERS:
            rows_are_samples, parameters = flat or (h.ndim > 2 and h.shape[:2] == self.shape), args[1:]
        else:
            rows_are_samples, parameters = flat and h.ndim == weight.ndim, args[1:3]
        trained = [p in self.theta for p in parameters if p is not None and p.requires_grad]  # among frozen ones
        return rows_are_samples and any(trained) and all(trained)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._applies(func, args, kwargs):
            return func(*args, **kwargs)
        if func in LAYERS:
            return _Layers.apply(self, *args)
        return _Convolution.apply(self, func, args[3:], *args[:3])


@contextmanager
def held_back(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Hooks of the parameters (Tensor.register_hook) wait: they see the gradient once, in the loss's own backward."""
    held = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in held:
            hooks.update(kept)


def _intercepted() -> bool:
    """Whether the layer is compiled, under torch.func, or has its saved tensors intercepted (by checkpointing)."""
    return (
        transformed() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # type: ignore[attr-defined]
    )


def _unwanted(parameter: Tensor | None) -> Tensor | None:
    """The gradient of a parameter that the pass does not ask for; costs next to nothing."""
    return None if parameter is None else parameter.new_zeros(()).expand_as(parameter)


class _Layers(torch.autograd.Function):
    """Linear layers with tanh between them. A layer's input is weighed rather than the gradient of what it gives: a
    decoder's last layer is its widest.
    """

    @staticmethod
    def forward(ctx: Any, mode: Weighing, h: Tensor, *parameters: Tensor | None) -> Tensor:
        *inner, out = outputs(h, *parameters)
        ctx.mode, ctx.depth = mode, len(inner) + 1
        ctx.save_for_backward(h, *inner, *parameters)
        return out.detach()  # no view, so that an activation may act in place

    @staticmethod
    @no_second_derivative
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        mode: Weighing = ctx.mode
        inputs, parameters = ctx.saved_tensors[: ctx.depth], ctx.saved_tensors[ctx.depth :]
        a = mode.factor(delta)
        if a is not None:
            a = a.expand(*delta.shape[:-1], 1).flatten(0, -2)
        rows, gradients = delta.flatten(0, -2), list[Tensor | None]()
        for i in reversed(range(ctx.depth)):
            h, (weight, bias) = inputs[i].flatten(0, -2), parameters[2 * i : 2 * i + 2]
            gradients[:0] = mode.gradients(rows, h, a, weight, bias)
            if i or ctx.needs_input_grad[1]:
                rows = linear(rows, weight.to(rows.dtype).T)
            if i:
                rows = torch.ops.aten.tanh_backward(rows, h)
        return None, rows.view_as(inputs[0]) if ctx.needs_input_grad[1] else None, *gradients


class _Convolution(torch.autograd.Function):
    """Any convolution, with a small graph of its own inside, from which the two kinds of gradient are taken apart."""

    @staticmethod
    def forward(ctx: Any, mode: Weighing, func: Callable, rest: tuple, *tensors: Tensor | None) -> Tensor:
        ctx.mode, ctx.parameters = mode, tensors[1:]
        with torch.enable_grad():
            ctx.inner = [None if t is None else t.detach().requires_grad_() for t in tensors]
            ctx.out = func(*ctx.inner, *rest)
        return ctx.out.detach()

    @staticmethod
    @no_second_derivative
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        mode: Weighing = ctx.mode
        grads = [None, *map(_unwanted, ctx.parameters)]
        if ctx.needs_input_grad[3]:
            (grads[0],) = torch.autograd.grad(ctx.out, ctx.inner[0], delta, retain_graph=True)
        asked = [i for i, p in enumerate(ctx.parameters, 1) if p is not None and p in mode.wanted]
        if asked:
            inner = [ctx.inner[i] for i in asked]
            a = mode.factor(delta)
            found = torch.autograd.grad(ctx.out, inner, delta if a is None else delta * a, retain_graph=True)
            for i, g in zip(asked, found, strict=True):
                grads[i] = g
        return None, None, None, *grads


def edges(*outputs: Tensor) -> Iterator[tuple[Any, int, Any]]:
    """Every edge of the outputs' graph: a node, the slot of its input, and the node which that input came out of."""
    seen, stack = set(), [output.grad_fn for output in outputs]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for slot, (following, _) in enumerate(node.next_functions):
            yield node, slot, following
            stack.append(following)


def leaves(*outputs: Tensor) -> set[Tensor]:
    """The tensors without a history, parameters among them, that any output depends on."""
    return {following.variable for _, _, following in edges(*outputs) if hasattr(following, "variable")}


def weighed(output: Tensor, theta: Sequence[nn.Parameter], module: nn.Module) -> set[nn.Parameter]:
    """Those of theta, trainable parameters of `module`, that `output` depends on only through weighed layers.

    Raises:
        ValueError: for a parameter that `output` does not depend on at all, and for reentrant checkpointing, through
            which no separate gradients can be taken.
    """
    of_theta = set(theta)
    inside: set[nn.Parameter] = set()
    outside: set[nn.Parameter] = set()
    layers = (_Layers._backward_cls, _Convolution._backward_cls)  # type: ignore[attr-defined]
    for node, slot, following in edges(output):
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "The generative network uses reentrant checkpointing, which hides its parameters from "
                "torch.autograd.grad. Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )
        parameter = getattr(following, "variable", None)
        if parameter is not None and parameter in of_theta:
            (inside if isinstance(node, layers) and slot > 0 else outside).add(parameter)
    if missing := of_theta - inside - outside:
        names = [name for name, p in module.named_parameters() if p in missing]
        raise ValueError(
            f"log p(x, z) does not depend on the generative parameter(s) {', '.join(names)}. If that is meant, "
            "freeze them with requires_grad_(False); if not, look for no_grad or detach on the way."
        )
    return inside - outside

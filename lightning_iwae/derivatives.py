"""What autograd Functions leave to others: derivatives of derivatives, and those that torch.func takes."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def no_second_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of an autograd Function that no gradient can be taken of again.

    Refused under create_graph=True. torch's own `once_differentiable` lets it pass as a constant there where the seed
    is one: a Hessian of zeros.
    """

    @wraps(backward)
    def only_once(ctx: Any, *seeds: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(ctx).__name__}: second derivatives (create_graph=True) can't be taken through it. Networks "
                "outside `routing.draw`, and torch's own distributions, have them."
            )
        return backward(ctx, *seeds)

    return only_once


def asked(ctx: Any) -> list[bool]:
    """Of which of its inputs an autograd Function's backward is to give gradients in the pass that is under way.

    `ctx.needs_input_grad` tells of which it may ever be: a pass for z alone has no use for those of q's parameters.
    Of leaves autograd does not tell.
    """
    goes_on = torch._C._will_engine_execute_node  # type: ignore[attr-defined]
    return [
        needed and (hasattr(following, "variable") or goes_on(following))
        for needed, (following, _) in zip(ctx.needs_input_grad, ctx.next_functions, strict=True)
    ]


def all_ones(seed: Tensor) -> bool:
    """Whether it is known that a gradient is all ones; on a GPU a look would make it wait."""
    return seed.device.type == "cpu" and bool((seed == 1).all())


def under_torch_func() -> bool:
    """Whether torch.func takes derivatives of its own of what is called now, or maps it."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]

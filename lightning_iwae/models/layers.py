"""Layers of the networks: tanh layers, with what else is trained beside them."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..matmul import tanh_mlp


class Layers(nn.Sequential):
    """Layers one after another, numbered; modules that have a name lie beside them, and are not called."""

    def forward(self, h: Tensor) -> Tensor:
        """What the last layer gives."""
        layers = self.numbered
        if is_tanh_mlp(layers):
            return tanh_mlp(h, *(p for layer in layers[::2] for p in (layer.weight, layer.bias)))
        for layer in layers:
            h = layer(h)
        return h

    @property
    def numbered(self) -> list[Any]:
        """The layers, in order."""
        return [layer for name, layer in self._modules.items() if name.isdigit()]

    @property
    def last(self) -> nn.Linear:
        """The last numbered layer."""
        last = self.numbered[-1]
        assert isinstance(last, nn.Linear)
        return last


def is_tanh_mlp(layers: Sequence[Any]) -> bool:
    """Whether these are linear layers and tanh in turn as torch has them, and nobody hooks in between."""
    if len(layers) % 2 == 0 or _has_any_global_hook():
        return False
    for i, layer in enumerate(layers):
        own = vars(layer)
        if type(layer) is not (nn.Tanh if i % 2 else nn.Linear) or "forward" in own:
            return False
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return False
    return True


def tanh_layers(widths: Sequence[int]) -> Layers:
    """Linear layers of these widths with tanh between them, Glorot-uniform weights and zero biases."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        linear = nn.Linear(width_in, width_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return Layers(*layers[:-1])


@torch.no_grad()
def set_output(bias: Tensor, mean: Tensor, likelihood: nn.Module) -> None:
    """Set a decoder's output bias (X,) such that it starts at the training data's mean (X,).

    Raises:
        ValueError: unless the mean has a value for each of the network's pixels.
    """
    if mean.shape != bias.shape:
        raise ValueError(f"network.pixels is {len(bias)}, but data have shape {tuple(mean.shape)}.")
    bias.copy_(likelihood.output_of(mean))  # type: ignore[operator]


def attach(model: nn.Module, network: nn.Module, name: str, part: nn.Module) -> None:
    """Make a part with parameters the `network`'s (phi's or theta's), another one the model's own."""
    if any(True for _ in part.parameters()):
        network.add_module(name, part)
    else:
        model.add_module(f"_{name}", part)


def check_widths(**widths: int | Sequence[int]) -> None:
    """Raise ValueError, naming the argument, unless every width is at least 1."""
    for name, given in widths.items():
        for width in [given] if isinstance(given, int) else given:
            if width < 1:
                raise ValueError(f"network.{name} must be at least 1. Got {width}.")

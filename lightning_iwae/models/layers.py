"""Layers of the networks: tanh layers, with what else is trained beside them."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..matmul import tanh_linear


class TanhLinear(nn.Linear):
    """A linear layer with tanh after it."""

    def forward(self, h: Tensor) -> Tensor:
        """tanh(W h + b)."""
        return tanh_linear(h, self.weight, self.bias)


class Layers(nn.Sequential):
    """Layers one after another, numbered; modules that have a name lie beside them, and are not called."""

    def forward(self, h: Tensor) -> Tensor:
        """What the last layer gives."""
        for name, layer in self.named_children():
            if name.isdigit():
                h = layer(h)
        return h

    @property
    def last(self) -> nn.Linear:
        """The last numbered layer."""
        numbered = [layer for name, layer in self.named_children() if name.isdigit()]
        assert isinstance(numbered[-1], nn.Linear)
        return numbered[-1]


def tanh_layers(widths: Sequence[int]) -> Layers:
    """Linear layers of these widths with tanh between them, Glorot-uniform weights and zero biases."""
    layers: dict[str, nn.Module] = {}
    for i, (width_in, width_out) in enumerate(pairwise(widths), 2 - len(widths)):
        linear = (TanhLinear if i else nn.Linear)(width_in, width_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers[str(2 * len(layers))] = linear  # 0, 2, 4: the numbers that checkpoints have them by
    return Layers(OrderedDict(layers))


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

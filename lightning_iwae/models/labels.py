"""Labels: batches that have them, and networks that are conditional on them."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.distributions import Distribution

Batch = Tensor | tuple[Tensor, Tensor]  # data x (B, ...), or data and labels y (B,)


def split(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """A batch's data (B, ...) and its labels (B,), if it has any."""
    return (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1])


def cut(batch: Batch, size: int) -> Batch:
    """The first `size` data of a batch, with their labels."""
    return batch[:size].clone() if isinstance(batch, Tensor) else (batch[0][:size].clone(), batch[1][:size].clone())


class Given:
    """The model p(z | y) p(x | z, y), q(z | x, y) of a conditional network at labels y (B,).

    A conditional network is one whose three methods take y as a last argument: prior(y), posterior(x, y) and
    likelihood(z, y). Made by `given`.
    """

    def __init__(self, network: Any, y: Tensor) -> None:
        self.network, self.y = network, y
        self.inference, self.generative = network.inference, network.generative

    def prior(self) -> Distribution:
        """p(z | y), batch shape () or (B,)."""
        return self.network.prior(self.y)

    def posterior(self, x: Tensor) -> Distribution:
        """q(z | x, y), batch shape (B,)."""
        return self.network.posterior(x, self.y)

    def likelihood(self, z: Tensor) -> Distribution:
        """p(x | z, y), batch shape (S, B)."""
        return self.network.likelihood(z, self.y)


def given(network: Any, y: Tensor | None) -> Any:
    """The model at labels y (B,), or the network itself where there are none. Raises as `check_labels` does."""
    check_labels(network, y is not None)
    return network if y is None else Given(network, y)


def check_labels(network: Any, labels: bool) -> None:
    """Raise TypeError for labels that the network takes none of, and for none where it needs them."""
    takes = takes_labels(network)
    if takes and not labels:
        raise TypeError(
            f"network {type(network).__name__} takes labels (its posterior has an argument besides x), but the data "
            "have none: set data.init_args.labels to true (for Arrays, give the files of labels), or pass y."
        )
    if labels and not takes:
        raise TypeError(
            f"network {type(network).__name__} takes no labels: its posterior(x) would have to be posterior(x, y), as "
            "prior(y) and likelihood(z, y). Set data.init_args.labels to false, or leave y out."
        )


def takes_labels(network: Any) -> bool:
    """Whether a network is conditional: its posterior needs an argument besides x."""
    function = inspect.getattr_static(type(network), "posterior", None)
    if inspect.isfunction(function) and "posterior" not in vars(network):
        return _arguments_of_class(function) > 2
    return _arguments(network.posterior) > 1


def _arguments(function: Callable) -> int:
    """How many must be given by position."""
    parameters = inspect.signature(function).parameters.values()
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


_arguments_of_class = lru_cache(_arguments)  # asked of every batch

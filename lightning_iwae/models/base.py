"""What a model is: three distributions, and the two networks whose parameters are theta and phi."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution


@runtime_checkable
class Model(Protocol):
    """A latent-variable model p(z) p(x | z) with an inference network q(z | x).

    Any torch.nn.Module with these five names is one. For data x (B, ...) and samples z (S, B, ...), every log_prob
    has shape (S, B): put event dimensions inside `torch.distributions.Independent`. Parameters come out of networks
    in the compute precision; give the distributions `.float()` ones, so that log-weights keep theirs under autocast.
    """

    inference: nn.Module  # phi
    generative: nn.Module  # theta, a learnt prior's parameters included; disjoint from phi

    def prior(self) -> Distribution:
        """p(z)."""
        ...

    def posterior(self, x: Tensor) -> Distribution:
        """q(z | x), batch shape (B,); its rsample((S,)), or sample where z is discrete, gives z (S, B, ...)."""
        ...

    def likelihood(self, z: Tensor) -> Distribution:
        """p(x | z), batch shape (S, B)."""
        ...


def check_model(model: nn.Module) -> None:
    """Raise TypeError or ValueError, naming what is wrong, unless `model` follows `Model`.

    Every parameter must be phi's or theta's (`.inference`, `.generative`), none both's.
    """
    what = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"network must be a torch.nn.Module. Got {what}.")
    missing = [n for n in ("inference", "generative", "prior", "posterior", "likelihood") if not hasattr(model, n)]
    if missing:
        raise TypeError(f"network {what} lacks {', '.join(missing)}: see lightning_iwae.models.base.Model.")
    phi, theta = (set(model.get_submodule(name).parameters()) for name in ("inference", "generative"))
    names = {p: name for name, p in model.named_parameters()}
    if both := [names[p] for p in phi & theta]:
        raise ValueError(f"network {what}: parameters in both .inference and .generative: {', '.join(sorted(both))}.")
    if neither := [name for p, name in names.items() if p not in phi | theta]:
        raise ValueError(f"network {what}: parameters in neither .inference nor .generative: {', '.join(neither)}.")


def full_precision(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is: what a network gives to a distribution, under autocast too."""
    return x if x.dtype == torch.float64 else x.float()


def draw_posterior(q: Distribution, samples: int) -> tuple[Tensor, bool]:
    """z (S, B, ...) ~ q, and whether it is reparameterised, a function of q's parameters."""
    shape = torch.Size([samples])
    try:
        return q.rsample(shape), True
    except NotImplementedError:
        return q.sample(shape), False


def draw_prior(model: Any, n: int) -> Tensor:
    """z ~ p(z), (1, n, ...); of a prior that depends on labels, one for each."""
    p = model.prior()
    return p.sample((1,) if p.batch_shape else (1, n))


def data_shape(model: Any) -> tuple[int, ...]:
    """The shape of a datum, as the likelihood has it; draws from the prior to find out."""
    return tuple(model.likelihood(draw_prior(model, 1)).event_shape)

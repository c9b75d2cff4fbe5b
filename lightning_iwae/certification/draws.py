"""Single draws of `routing`'s gradients against plain autograd, for the rows that differentiate something."""

import itertools

import torch
from torch import Tensor

from .. import bounds, routing
from ..sides import Side
from ..weights import normalised
from .replicates import Replicas
from .targets import TARGETS, applicable


def per_draw(side: Side, name: str, samples: int = 12) -> float | None:
    """Largest error of `routing.loss`'s gradient on one draw, against plain autograd of what the row differentiates.

    None for rows that differentiate nothing: their expectation alone is known.
    """
    torch.manual_seed(5)
    model = Replicas(7, 2)
    drawn = routing.draw(model, model.x, samples, "separate")
    phi, theta = (Side("iwae", samples), side) if name == "theta" else (side, Side("iwae", samples))
    routing.loss(drawn, theta, phi).backward(retain_graph=True)
    parameters = list((model.inference if name == "phi" else model.generative).parameters())
    surrogate = differentiated(side, name, model, drawn.z, drawn.z_held.detach())
    if surrogate is None:
        return None
    plain = torch.autograd.grad(surrogate.mean(), parameters)
    ours = [torch.zeros_like(p) if p.grad is None else -p.grad for p in parameters]
    return max(float((g - h).abs().max() / h.abs().max()) for g, h in zip(ours, plain, strict=True))


def differentiated(side: Side, name: str, model: Replicas, z: Tensor, held: Tensor) -> Tensor | None:
    """What autograd, left to itself, would differentiate (B,): a bound, wake's surrogate, TVO's."""
    bound = TARGETS[side.estimator].bound
    log_q = model.posterior(model.x).log_prob(held)
    log_p = model.prior().log_prob(held) + model.likelihood(held).log_prob(model.x)
    if side.estimator == "wake":
        w = normalised(side.view((log_p - log_q).detach()))
        return (w * side.view(log_q)).sum(1).mean(0)
    if side.estimator == "tvo":
        return thermodynamic(side, side.view(log_p), side.view(log_q))
    if side.estimator not in ("elbo", "iwae", "ciwae", "vr-iwae", "jvi") or bound is None:
        return None
    if name == "phi":
        log_p = model.prior().log_prob(z) + model.likelihood(z).log_prob(model.x)
        log_q = model.posterior(model.x).log_prob(z)
    return bound(side.view(log_p - log_q), **applicable(bound, side.options))


def thermodynamic(side: Side, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Masrani et al.'s surrogate (arXiv 1907.00031): E[log w] and K/(K-1) Cov(log w, log of the path's density)."""
    b = bounds.points(side.options["partition"])
    f, K, total = (log_p - log_q).detach(), log_p.shape[1], torch.zeros(())
    for here, there in itertools.pairwise(b):
        w = torch.softmax(here * f, 1)
        density = here * log_p + (1 - here) * log_q
        centred = f - (w * f).sum(1, keepdim=True)
        total = total + (there - here) * ((w * (log_p - log_q)).sum(1) + K / (K - 1) * (w * centred * density).sum(1))
    return total.mean(0)

"""The posterior that K importance-weighted samples stand for: draws from q_EW."""

from typing import Any

import torch
from torch import Tensor

from .models.base import draw_posterior
from .weights import normalised


@torch.no_grad()
def draw_implicit(model: Any, x: Tensor, particles: int, samples: int = 1, chunk: int | None = None) -> Tensor:
    """z (S, B, ...) ~ q_EW(z | x): of K = `particles` draws from q(z | x), one taken by its normalised weight.

    q_EW (Cremer, Morris and Duvenaud, arXiv 1704.02916) is what an IWAE's bound makes of its q. With w(z) = p(x, z) /
    q(z | x) and z_2, ..., z_K ~ q(z | x),

        q_EW(z | x) = E[ p(x, z) / ((1/K) (w(z) + w(z_2) + ... + w(z_K))) ],

    which integrates to 1, is q at K = 1 and tends to p(z | x) with K. ELBO(q) <= L_K <= ELBO(q_EW) <= log p(x): these
    draws are at least as good as the bound says.

    L_K itself is the ELBO of K draws at once, log p(x) - KL(q_IS || p_IS), with

        q_IS(z_1, ..., z_K | x) = prod_k q(z_k | x)
        p_IS(z_1, ..., z_K | x) = (1/K) sum_k p(z_k | x) prod_(l != k) q(z_l | x),

    both of which integrate to 1. (A. Kosiorek's "What is wrong with VAEs?" writes a 1/K before the product in q_IS, its
    eq. 11, which is one too many: that integrates to 1/K.)

    Args:
        model: follows `models.base.Model`.
        x: batch (B, ...).
        particles: K.
        samples: S, independent draws of a datum; each costs K decoder passes.
        chunk: samples drawn at once; by default as many as keep their data near 4 million numbers.
    """
    if chunk is None:
        chunk = max(1, 2**22 // max(1, particles * x.numel()))
    for name, value in (("particles", particles), ("samples", samples), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1. Got {value}.")
    q, prior = model.posterior(x), model.prior()
    drawn = []
    for start in range(0, samples, chunk):
        z, _ = draw_posterior(q, min(chunk, samples - start) * particles)
        log_w = (prior.log_prob(z) + model.likelihood(z).log_prob(x) - q.log_prob(z)).double()
        w = normalised(log_w.view(-1, particles, len(x)), 1)
        taken = torch.multinomial(w.movedim(1, -1).reshape(-1, particles), 1)  # of each sample and datum
        taken = taken.view(-1, 1, len(x), *(1 for _ in z.shape[2:]))
        groups = z.view(-1, particles, *z.shape[1:])
        drawn.append(groups.take_along_dim(taken, 1).squeeze(1))
    return torch.cat(drawn)

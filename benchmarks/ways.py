"""Ways to train the papers' network (784-200-200-50) by PIWAE or IWAE: each makes a step from the work to be done.

All start from the same weights and data and take a step of Adam on both networks. Those of other libraries are in
`peers`.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.distributions import Bernoulli, Distribution, Independent

from lightning_iwae import Side, bounds, iw_loss
from lightning_iwae.models import MLP
from lightning_iwae.models.likelihoods import compile_likelihoods
from lightning_iwae.weighing import Weighing

from .timing import Step, Unavailable

Precision = Callable[[], AbstractContextManager]

RATE = 1e-4
CHUNK = 32  # half of the least K whose memory and time are compared, so that all of these are in chunks

OURS = "PIWAE"
BF16 = "PIWAE, bf16-mixed"
COMPILED = "PIWAE, compiled"
BF16_COMPILED = "PIWAE, bf16-mixed, compiled"
CHUNKED = f"PIWAE, chunks of {CHUNK}"
BY_HAND = "by hand"
BY_HAND_COMPILED = "by hand, compiled"
BY_HAND_BF16 = "by hand, bf16-mixed"
BY_HAND_BF16_COMPILED = "by hand, bf16-mixed, compiled"
BY_HAND_TWO_GRADS = "by hand, two passes back"
STOCK_IWAE = "stock IWAE"
TWO_GRADS = "stock PIWAE, two grads"
TWO_GRADS_OURS = "PIWAE, two grads, our kernels"
PYTHAE = "pythae PIWAE"
JAX = "JAX PIWAE"
JAX_IWAE = "JAX IWAE"


@dataclass(frozen=True)
class Work:
    """One step: a batch, and samples for each datum, all of which are theta's particles and an eighth phi's."""

    batch: int
    samples: int

    @property
    def phi(self) -> int:
        """Particles of phi's bound."""
        return max(1, self.samples // 8)

    def start(self) -> tuple[MLP, Tensor]:
        """The network and the batch (B, 784) that every way starts from."""
        torch.manual_seed(0)
        model = MLP()
        return model, torch.bernoulli(torch.rand(self.batch, 784))


# ------------------------------------------------------------------------------------------------ the package's
def piwae_loss(model: MLP, x: Tensor, work: Work, **options: Any) -> Tensor:
    """Its own gradient for each side."""
    theta, phi = Side("iwae", work.samples), Side("iwae", work.phi)
    return iw_loss(model, x, samples=work.samples, theta=theta, phi=phi, **options)


def piwae(work: Work) -> Step:
    """As the README's loop."""
    return stepper(work, piwae_loss)


def piwae_bf16(work: Work) -> Step:
    """Under autocast, as with Lightning's bf16-mixed."""
    return stepper(work, piwae_loss, bf16)


def piwae_chunked(work: Work) -> Step:
    """In chunks of samples, in constant memory."""
    return stepper(work, lambda model, x, work: piwae_loss(model, x, work, chunk=CHUNK))


def piwae_compiled(work: Work, precision: Precision = nullcontext) -> Step:
    """With `compile: true`: its likelihood's loop by torch.compile."""
    step = stepper(work, piwae_loss, precision, prepare=compile_likelihoods)
    with told_if_not_compiled():
        step()
    return step


@contextmanager
def told_if_not_compiled() -> Iterator[None]:
    """Around the first call of what compiles: Unavailable where it can't, and would go on without."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield
    if failed := [str(w.message) for w in told if "model.compile" in str(w.message)]:
        raise Unavailable(failed[0])


# ------------------------------------------------------------------------------------------------ by hand
def stock(logits: Tensor) -> Distribution:
    """p(x | z) as torch has it."""
    return Independent(Bernoulli(logits=logits), 1)


def log_weights(model: MLP, x: Tensor, samples: int, likelihood: Callable[[Tensor], Distribution] = stock) -> Tensor:
    """log w (S, B) by torch.distributions, with everything attached."""
    q = model.posterior(x)
    z = q.rsample(torch.Size([samples]))
    return model.prior().log_prob(z) + likelihood(model.generative(z)).log_prob(x) - q.log_prob(z)


def iwae_loss(model: MLP, x: Tensor, work: Work) -> Tensor:
    """What one would write."""
    return -torch.logsumexp(log_weights(model, x, work.samples), 0).mean()


def stock_iwae(work: Work) -> Step:
    """One bound for both networks, by autograd alone."""
    return stepper(work, iwae_loss)


def two_gradients(model: MLP, log_w: Tensor, work: Work, layers: Weighing | None = None) -> list[Tensor]:
    """Of minus each side's bound for its parameters, theta's first: two passes back through all of the graph.

    `layers`, if the package's were used, are told which gradients a pass is for, as torch's are by autograd.
    """
    of_theta = -bounds.miwae(log_w.view(1, work.samples, -1)).mean()
    of_phi = -bounds.miwae(log_w.view(-1, work.phi, work.batch)).mean()
    theta, phi = list(model.generative.parameters()), list(model.inference.parameters())
    with layers.backward(theta, None) if layers else nullcontext():
        found = grad(of_theta, theta, retain_graph=True)
    return [*found, *grad(of_phi, phi)]


def two_grads(work: Work, own_kernels: bool = False) -> Step:
    """PIWAE by two calls of torch.autograd.grad; with the package's layers and log p(x | z), if so wanted."""
    model, x = work.start()
    optimizers = adams(model)
    parameters = [*model.generative.parameters(), *model.inference.parameters()]
    likelihood = model.parts[1] if own_kernels else stock

    def step() -> None:
        layers = Weighing(model.generative.parameters(), (work.samples, work.batch)) if own_kernels else None
        with layers or nullcontext():
            log_w = log_weights(model, x, work.samples, likelihood)
        found = two_gradients(model, log_w, work, layers)
        for p, g in zip(parameters, found, strict=True):
            p.grad = g
        for optimizer in optimizers:
            optimizer.step()

    return step


# ------------------------------------------------------------------------------------------------ shared
def bf16() -> AbstractContextManager:
    """Autocast on the CPU."""
    return torch.autocast("cpu", torch.bfloat16)


def adams(model: MLP) -> Sequence[torch.optim.Optimizer]:
    """theta's and phi's, as one kernel each."""
    networks: tuple[nn.Module, ...] = model.generative, model.inference
    return [torch.optim.Adam(network.parameters(), lr=RATE, fused=True) for network in networks]


def stepper(
    work: Work,
    loss: Callable[[MLP, Tensor, Work], Tensor],
    precision: Precision = nullcontext,
    prepare: Callable[[MLP], object] = lambda model: None,
) -> Step:
    """One backward pass of `loss` and a step of both networks, of a network that `prepare` has had first."""
    model, x = work.start()
    prepare(model)
    optimizers = adams(model)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        with precision():
            loss(model, x, work).backward()
        for optimizer in optimizers:
            optimizer.step()

    return step

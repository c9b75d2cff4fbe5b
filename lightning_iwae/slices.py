"""A batch's samples, drawn all at once or in slices: with a chunk of 64, 4096 samples take the memory of 64.

    loss = iw_loss(model, x, samples=4096, theta=Side("iwae", 4096), phi=Side("dreg", 4096), chunk=64)
    loss.backward()

Estimators need the log-weights of all samples, gradients the graph of each. So the samples are drawn twice: `draw`
keeps their log-weights only, and `loss`, with what the estimators make of those, draws slice after slice again from
the same random state, adds its gradients to running sums and forgets it. The encoder runs once. The gradient is that
of the same samples at once, and the price one more forward pass of theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.distributions import Distribution

from . import bounds, routing
from .memory import Peak
from .models.labels import given
from .randomness import forked, noted, repeated
from .routing import Draw, Method, Weights, trainable
from .sides import Side
from .weighing import held_back

MEASURED = 64  # samples at most from whose memory that of more is inferred


def iw_loss(
    model: Any,
    x: Tensor,
    y: Tensor | None = None,
    *,
    samples: int,
    theta: Side,
    phi: Side,
    method: Method = "auto",
    kl_weight: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """Minus theta's bound in nats, averaged over the batch, with each side's own estimator as its gradient.

    Args:
        model: follows `models.base.Model`.
        x: batch (B, ...).
        y: its labels (B,), for a conditional model (see `models.labels.Given`).
        samples: S, drawn per datum and shared by both sides; each views them as (S / K, K, B) with its own K.
        theta, phi: estimator and particles of the generative and of the inference network.
        method, kl_weight: see `routing.draw`.
        chunk: samples per datum in memory at a time; None for all.

    Returns: scalar, to be minimised. Its value is -bounds.miwae of theta's view. phi's gradient does not depend on
        `theta`, nor theta's on `phi`.
    """
    theta.check("theta", samples)
    phi.check("phi", samples)
    check_chunk(chunk)
    if kl_weight != 1.0:
        theta.check_kl_weight("theta")
        phi.check_kl_weight("phi")
    return loss(draw(model, x, samples, method, y=y, kl_weight=kl_weight, chunk=chunk), theta, phi)


def check_chunk(chunk: int | None, name: str = "chunk") -> None:
    """Raise ValueError, naming the key, for a chunk of no samples."""
    if chunk is not None and chunk < 1:
        raise ValueError(f"{name} must be at least 1, or null for all samples at once. Got {chunk}.")


# ------------------------------------------------------------------------------------------------ the samples
@dataclass
class Slices:
    """Samples of one batch, `chunk` of them per datum at a time: log-weights, and how to draw each slice again.

    Made by `draw`.
    """

    network: Any
    x: Tensor
    y: Tensor | None
    q: Distribution  # with the graph of the encoder, which has run once
    has_path: bool  # whether z is a function of phi
    method: Method
    kl_weight: float
    chunk: int
    log_w: Tensor  # (S, B), detached
    states: list[Tensor]  # of each random stream before each slice, (slices, bytes)

    def __len__(self) -> int:
        return len(self.states[0])

    def rows(self, i: int) -> slice:
        """Which of the S samples are slice i's."""
        return slice(i * self.chunk, min((i + 1) * self.chunk, len(self.log_w)))

    def again(self, i: int) -> Draw:
        """Slice i with its graphs, to be let go before the next. Random states stay as they are."""
        rows = self.rows(i)
        size = rows.stop - rows.start
        with repeated([of_stream[i].clone() for of_stream in self.states], self.x.device), torch.enable_grad():
            return routing.draw(self.network, self.x, size, self.method, self.q, self.y, self.kl_weight)

    def worst(self) -> int:
        """The slice of the sample whose log-weights are least often finite."""
        return int((~self.log_w.isfinite()).sum(1).argmax()) // self.chunk


def draw(
    network: Any,
    x: Tensor,
    samples: int,
    method: Method = "auto",
    q: Distribution | None = None,
    y: Tensor | None = None,
    kl_weight: float = 1.0,
    chunk: int | None = None,
) -> Draw | Slices:
    """Samples of x (B, ...) as by `routing.draw`; where they are more than `chunk`, in slices, the last one shorter.

    They are distributed alike, but another chunk draws other noise.
    """
    if chunk is None or chunk >= samples:
        return routing.draw(network, x, samples, method, q, y, kl_weight)
    return in_slices(network, x, samples, method, q, y, kl_weight, chunk)


def in_slices(
    network: Any,
    x: Tensor,
    samples: int,
    method: Method,
    q: Distribution | None,
    y: Tensor | None,
    kl_weight: float,
    chunk: int,
) -> Slices:
    """`draw` in slices, be it only one."""
    model = routing.checked(network, y)
    routing.modes(model.generative)  # which are refused where samples would depend on each other
    q = model.posterior(x) if q is None else q
    starts, theta = range(0, samples, chunk), trainable(model.generative)
    with torch.no_grad():
        for i, start in enumerate(starts):
            state = noted(x.device)
            size = min(chunk, samples - start)
            # As the second time, lest bf16 round otherwise.
            weighing = routing.weighing_of(theta, x, size, method)
            sampled = routing.sample(model, q, x, size, kl_weight, weighing)
            if i == 0:  # what stays is made once: bits of it among the large arrays that go would break up the heap
                log_w = sampled.log_p.new_empty(samples, len(x))
                states = [of_stream.new_empty(len(starts), len(of_stream)) for of_stream in state]
            torch.sub(sampled.log_p, sampled.log_q, out=log_w[start : start + chunk])
            for kept, of_stream in zip(states, state, strict=True):
                kept[i] = of_stream
    has_path = sampled.z_held.requires_grad
    torch.clear_autocast_cache()  # where older torch keeps weights that it cast without a graph
    return Slices(network, x, y, q, has_path, method, kl_weight, chunk, log_w, states)


# ------------------------------------------------------------------------------------------------ their gradients
def loss(drawn: Draw | Slices, theta: Side, phi: Side) -> Tensor:
    """`iw_loss` from samples already drawn; callable again, with other estimators, on the same samples."""
    if isinstance(drawn, Draw):
        return routing.loss(drawn, theta, phi)
    routing.check_path(drawn.q, drawn.has_path, phi)
    log_w, inference = drawn.log_w, trainable(drawn.network.inference)
    w = routing.weights(log_w, theta, phi)
    sums = {p: torch.zeros_like(p) for p in trainable(drawn.network)}
    differs = torch.zeros(len(drawn), dtype=torch.bool, device=log_w.device)
    for i in range(len(drawn)):
        differs[i] = _add(sums, drawn, i, w)
    check_repeated(differs)
    if phi.dreams:
        for p, g in zip(inference, _of_dreams(drawn, phi, inference), strict=True):
            sums[p] -= g
    return routing.scalar(bounds.miwae(theta.view(log_w)).mean(), sums.items())


def _add(sums: dict[nn.Parameter, Tensor], drawn: Slices, i: int, w: Weights) -> Tensor:
    """Add slice i's gradients to the sums. Whether its log-weights are others than before, a scalar."""
    part, rows, inference = drawn.again(i), drawn.rows(i), trainable(drawn.network.inference)
    of_theta, through = routing.descent(part, w.rows(rows))
    gradients = dict(zip(part.theta, of_theta, strict=True))
    if inference:
        outputs, seeds = zip(*((tensor, g) for tensor, g in through if tensor.requires_grad), strict=True)
        with held_back(inference):
            of_phi = grad(outputs, inference, seeds, retain_graph=True, materialize_grads=True)
        gradients.update(zip(inference, of_phi, strict=True))
    for p, g in gradients.items():
        sums[p] += g
    before, tolerance = drawn.log_w[rows], 1e-9 if w.a.dtype == torch.float64 else 1e-4
    return ((part.log_w - before).abs() > tolerance * (1 + before.abs())).any()


def check_repeated(differs: Tensor) -> None:
    """Raise ValueError if any slice `differs` from what it was the first time."""
    if differs.any():
        raise ValueError(
            f"chunk must be null for this network, which is drawn from twice with a chunk: at the same random state "
            f"its log-weights should be the same. Got others in {int(differs.sum())} of {len(differs)} slices. Does it "
            "keep a state (as spectral norm in training mode does), or random numbers that are not torch's?"
        )


def phi_gradients(
    drawn: Draw | Slices, sides: Sequence[Side], parameters: Sequence[Tensor]
) -> list[tuple[Tensor, ...]]:
    """`routing.phi_gradients`, of samples in slices too."""
    if isinstance(drawn, Draw):
        return routing.phi_gradients(drawn, sides, parameters)
    for side in sides:
        routing.check_path(drawn.q, drawn.has_path, side)
    channels = {side: side.phi(drawn.log_w) for side in sides if not side.dreams}
    sums = {side: [torch.zeros_like(p) for p in parameters] for side in channels}
    for i in range(len(drawn)):
        _add_phi(sums, drawn, i, channels, parameters)
    means = {side: tuple(g / drawn.log_w.shape[1] for g in of_sum) for side, of_sum in sums.items()}
    return [_of_dreams(drawn, side, parameters) if side.dreams else means[side] for side in sides]


def _add_phi(
    sums: dict[Side, list[Tensor]],
    drawn: Slices,
    i: int,
    channels: dict[Side, tuple[Tensor, Tensor]],
    parameters: Sequence[Tensor],
) -> None:
    part, rows = drawn.again(i), drawn.rows(i)
    for side, (c, s) in channels.items():
        for total, g in zip(sums[side], routing.phi_ascent(part, side, c[rows], s[rows], parameters), strict=True):
            total += g


def _of_dreams(drawn: Slices, phi: Side, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradient of `routing.dreams`, `chunk` of a datum's M at a time."""
    model, M = given(drawn.network, drawn.y), len(phi.view(drawn.log_w))
    sums = [torch.zeros_like(p) for p in parameters]
    for start in range(0, M if parameters else 0, drawn.chunk):
        size = min(drawn.chunk, M - start)
        dreamt = routing.dreams(model, model.prior(), drawn.log_w, size)
        with held_back(parameters):
            found = grad(dreamt * (size / M), parameters, materialize_grads=True)
        for total, g in zip(sums, found, strict=True):
            total += g
    return tuple(sums)


# ------------------------------------------------------------------------------------------------ a chunk that fits
def fitting(
    network: Any,
    x: Tensor,
    samples: int,
    method: Method = "auto",
    q: Distribution | None = None,
    y: Tensor | None = None,
    *,
    memory: float,
) -> tuple[int, float]:
    """The largest chunk whose slice takes no more than `memory` bytes at once, and what it takes.

    All the samples, else a power of two, and 1 where even that takes more. Measured on slices of 1, 2, 4, .. up to 64
    samples, none larger than fits, and from there in proportion: no less than it takes, as arrays that do not grow
    with samples are counted as if they did. Left out are the encoder's own graph, of B rows, and what is kept of every
    slice: log-weights, and 5 kB of random state. Random states stay as they are.
    """
    model = given(network, y)
    q = model.posterior(x) if q is None else q
    size, taken = 1, _taken(network, x, 1, method, q, y)
    while 2 * taken <= memory and 2 * size <= min(samples, MEASURED):
        size, taken = 2 * size, _taken(network, x, 2 * size, method, q, y)
    chunk = size
    while chunk < samples and taken / size * min(2 * chunk, samples) <= memory:
        chunk = min(2 * chunk, samples)
    return chunk, taken / size * chunk


def _taken(network: Any, x: Tensor, size: int, method: Method, q: Distribution, y: Tensor | None) -> int:
    """Bytes that a slice of so many samples takes at once."""
    with forked(0, x.device), Peak() as peak:
        drawn = in_slices(network, x, size, method, q, y, 1.0, size)
        ones = torch.ones_like(drawn.log_w)
        sums = {p: torch.zeros_like(p) for p in trainable(network)}
        _add(sums, drawn, 0, Weights(ones, ones if drawn.has_path else None, ones))
    return peak.bytes

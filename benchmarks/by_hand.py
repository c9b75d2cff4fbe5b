"""PIWAE's step and log p(x) written out: the same operations, with no autograd, no distributions, nothing checked.

How little may lie between torch's operations: a plain rewriting, no lower bound. Gradients are those of the package.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_iwae.matmul import linear, outputs, parameter_gradients
from lightning_iwae.models import MLP
from lightning_iwae.models.bernoulli import Compiled, Kernel, eager

from .timing import Step
from .ways import Precision, Work, adams, told_if_not_compiled

Layers = Sequence[tuple[Tensor, Tensor]]  # weight and bias of each, tanh between them


def by_hand(
    work: Work, kernel: Kernel = eager, precision: Precision = nullcontext, backward_passes: Literal[1, 2] = 1
) -> Step:
    """With the package's likelihood kernel."""
    model, x = work.start()
    optimizers = adams(model)
    parameters = [*model.generative.parameters(), *model.inference.parameters()]

    def step() -> None:
        eps = torch.randn(work.samples, work.batch, 50)
        with precision():
            found = gradients(model, x, eps, work, kernel, backward_passes)
        for p, g in zip(parameters, found, strict=True):
            p.grad = g.to(p.dtype)
        for optimizer in optimizers:
            optimizer.step()

    return step


def by_hand_compiled(work: Work, precision: Precision = nullcontext) -> Step:
    """With its compiled one."""
    step = by_hand(work, Compiled(), precision)
    with told_if_not_compiled():
        step()
    return step


@torch.no_grad()
def gradients(
    model: MLP, x: Tensor, eps: Tensor, work: Work, kernel: Kernel, backward_passes: Literal[1, 2] = 1
) -> list[Tensor]:
    """Of minus each side's bound, theta's first, for noise (S, B, Z).

    Of two passes back through the decoder the one is theta's, with its weights on the logits, and the other z's.
    With z = mean + scale eps, log q(z | x) = -|eps|^2 / 2 - sum log scale + const. has no other gradient than that of
    the scale.
    """
    encoder, decoder = layers_of(model.inference), layers_of(model.generative)
    encoded, output = forward(encoder, x)
    mean, log_scale = output.chunk(2, -1)
    scale = log_scale.exp()
    z = torch.addcmul(mean, eps, scale)
    decoded, logits = forward(decoder, z.flatten(0, 1))
    log_likelihood, delta = kernel(logits.unflatten(0, z.shape[:2]), x, True)
    assert delta is not None
    log_w = log_likelihood + (eps.square().sum(-1) - z.square().sum(-1)) / 2 + log_scale.sum(-1)
    a = log_w.softmax(0) / -work.batch
    groups = log_w.unflatten(0, (-1, work.phi))
    c = (groups.softmax(1) / (-work.batch * len(groups))).view(*log_w.shape, 1)

    rows, of_row = delta.flatten(0, 1), a.view(-1, 1)
    if backward_passes == 1:
        theta, of_z = backward(decoder, decoded, rows, of_row)
    else:
        theta, _ = backward(decoder, decoded, rows * of_row.to(rows.dtype), None)
        of_z = of_input(decoder, decoded, rows)
    path = (of_z.view_as(z) - z) * c
    of_output = torch.cat([path.sum(0), (path * eps).sum(0) * scale + c.sum(0)], -1)
    phi, _ = backward(encoder, encoded, of_output, None)
    return [*theta, *phi]


@torch.no_grad()
def log_px(model: MLP, x: Tensor, particles: int, held: int, slices: int) -> Tensor:
    """log (1/K) sum w of each datum, (B,), in float64; `held` particles drawn at once, decoded in so many slices."""
    decoder = layers_of(model.generative)
    mean, log_scale = forward(layers_of(model.inference), x)[1].chunk(2, -1)
    scale, found = log_scale.exp(), []
    for start in range(0, particles, held):
        eps = torch.randn(min(held, particles - start), *mean.shape)
        z = torch.addcmul(mean, eps, scale)
        parts = [
            eager(forward(decoder, part.flatten(0, 1))[1].unflatten(0, part.shape[:2]), x, False)[0]
            for part in z.tensor_split(min(len(z), slices))
        ]
        of_z = (torch.linalg.vector_norm(eps, dim=-1) ** 2 - torch.linalg.vector_norm(z, dim=-1) ** 2) / 2
        found.append(((torch.cat(parts) + of_z).double() + log_scale.sum(-1)).logsumexp(0))
    return torch.stack(found).logsumexp(0) - math.log(particles)


def forward(layers: Layers, h: Tensor) -> tuple[list[Tensor], Tensor]:
    """Each layer's input, and what the last one gives."""
    *inner, last = outputs(h, *chain.from_iterable(layers))
    return [h, *inner], last


def backward(layers: Layers, inputs: list[Tensor], delta: Tensor, a: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Gradients of weights and biases, rows weighed by a; and that of the first input, by rows, if there is an `a`."""
    found: list[Tensor] = []
    for of_output, h in zip(deltas(layers, inputs, delta), reversed(inputs), strict=True):
        of_weight, of_bias = parameter_gradients(of_output, h, a)
        assert of_bias is not None
        found = [of_weight, of_bias, *found]
    return found, of_output if a is None else linear(of_output, layers[0][0].T)


def deltas(layers: Layers, inputs: list[Tensor], delta: Tensor) -> Iterator[Tensor]:
    """The gradient of what each layer gives before its tanh, the last one's first."""
    yield delta
    for (weight, _), h in zip(reversed(layers[1:]), reversed(inputs[1:]), strict=True):
        delta = torch.ops.aten.tanh_backward(linear(delta, weight.T), h)
        yield delta


def of_input(layers: Layers, inputs: list[Tensor], delta: Tensor) -> Tensor:
    """The gradient of the first input alone."""
    *_, delta = deltas(layers, inputs, delta)
    return linear(delta, layers[0][0].T)


def layers_of(network: nn.Module) -> Layers:
    """Its linear layers."""
    return [(layer.weight, layer.bias) for layer in network.modules() if isinstance(layer, nn.Linear)]

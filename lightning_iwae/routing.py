"""One forward pass, one backward pass of one scalar, and two gradients that do not touch each other.

    loss(draw(model, x, samples=64), theta=Side("iwae", 64), phi=Side("iwae", 8)).backward()

`draw` samples z ~ q_phi(z | x) once and evaluates log p and log q on z with the graph cut at z, so that the three
channels of `estimators` lie apart: path (through z), score (through log q at fixed z) and theta (through log p at
fixed z). `loss` weighs each and hands autograd one scalar, which DDP, gradient accumulation and the like treat as
they treat any other.

theta needs weights of its own in the pass that also carries d log w / dz. `separate` is the plain way, right for
every decoder: two passes back through it, one for theta and one for z. `together` is one pass for both, in which no
sample is weighed and theta's weights act inside the layers (see `weighing`); it costs what a plain IWAE step costs.
`draw` proves it equal to `separate` on the first batch of every shape, again on the 2nd, 4th, 8th and so on, and does
without it where it is not.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from . import bounds
from .derivatives import all_ones, no_second_derivative
from .models.base import check_model, draw_posterior
from .models.labels import given
from .sides import Side, without_path
from .weighing import Weighing, leaves, weighed

Method = Literal["auto", "separate"]


# ------------------------------------------------------------------------------------------------ the loss
@dataclass
class Draw:
    """Samples of one batch and their log-weights, with the graphs that the channels need. Made by `draw`."""

    model: Any
    q: Distribution
    prior: Distribution
    z: Tensor  # (S, B, ...), a function of phi where q is reparameterised
    z_held: Tensor  # the same values, on which the next three were evaluated: a leaf, with a gradient if z has a path
    log_q: Tensor  # (S, B), a function of phi and z_held
    log_p: Tensor  # (S, B), log p(z) + log p(x | z), a function of theta and z_held; both with the KL weight in them
    log_likelihood: Tensor  # (S, B), log p(x | z) alone
    theta: list[nn.Parameter]
    inside: set[nn.Parameter]  # those of theta that `together` weighs inside their layers
    weighing: Weighing

    @property
    def log_w(self) -> Tensor:
        """Log-weights log p(x, z) - log q(z | x), shape (S, B), detached. Nats."""
        return (self.log_p - self.log_q).detach()

    @cached_property
    def path(self) -> Tensor:
        """d log w / dz of each sample, (S, B, ...), by passes of its own: what several estimators share."""
        return grad((self.log_p - self.log_q).sum(), self.z_held, retain_graph=True)[0]


class Weights(NamedTuple):
    """What each sample's gradients are multiplied by, (S, B) each; None where unused.

    The channels of `estimators` times -1 / B, for descent and a mean over data: cheaper here than of whole gradients.
    What is below 1e-30 (in float64 1e-300) is 0.
    """

    a: Tensor
    c: Tensor | None
    s: Tensor
    prior_b: Tensor | None = None  # of an estimator with channels of its own for p(z)
    prior_c: Tensor | None = None

    def rows(self, rows: slice) -> "Weights":
        """Those of some of the samples."""
        return self.each(lambda w: w[rows])

    def each(self, f: Callable[[Tensor], Tensor]) -> "Weights":
        """f of each that is used."""
        return Weights(*(w if w is None else f(w) for w in self))  # type: ignore[arg-type]


def weights(log_w: Tensor, theta: Side, phi: Side) -> Weights:
    """Those of both sides' estimators for log-weights (S, B)."""
    exact = log_w.double()  # as every estimator takes them, to be rounded once
    c, s = phi.phi(exact)
    of_prior = theta.prior(exact) if theta.of_prior else ()
    channels = Weights(theta.theta(exact), c if phi.needs_path else None, s, *of_prior)
    used = torch.stack([w for w in channels if w is not None]) * (-1 / log_w.shape[1])
    # Below this a weight's products would be subnormal numbers, which take a CPU many times as long.
    nothing = 1e8 * torch.finfo(log_w.dtype).tiny
    of_each = iter(F.hardshrink(used.to(log_w.dtype), nothing).unbind())
    return Weights(*(None if w is None else next(of_each) for w in channels))  # type: ignore[arg-type]


def loss(drawn: Draw, theta: Side, phi: Side) -> Tensor:
    """Minus theta's bound in nats, averaged over the batch, with each side's own estimator as its gradient.

    Callable again, with other estimators, on the same draw. See `slices.iw_loss`.
    """
    log_w = drawn.log_w
    check_path(drawn.q, drawn.z_held.requires_grad, phi)
    of_theta, through = descent(drawn, weights(log_w, theta, phi))
    pairs = [*through, *zip(drawn.theta, of_theta, strict=True)]
    result = scalar(bounds.miwae(theta.view(log_w)).mean(), pairs)
    if phi.dreams:
        dreamt = dreams(drawn.model, drawn.prior, log_w, len(phi.view(log_w)))
        result = result - (dreamt - dreamt.detach())
    return result


def descent(drawn: Draw, w: Weights) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Gradients of `drawn.theta`, and the tensors that depend on phi, each with its own; to be minimised along."""
    through = [(drawn.log_q, w.s)]
    if w.prior_b is not None and w.prior_c is not None:
        theta = through_prior(drawn, w.a, w.prior_b, w.prior_c)
        path = None if w.c is None else _over(w.c, drawn.path)
    else:
        theta, path = (together if drawn.inside else separate)(drawn, w.a, w.c)
    if path is not None:
        through.append((drawn.z, path))
    return theta, through


def scalar(bound: Tensor, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """-bound, to be minimised, with the gradient by each tensor that comes with it."""
    pairs = list(pairs)
    return _Loss.apply(bound, [g for _, g in pairs], *(tensor for tensor, _ in pairs))


def phi_gradients(drawn: Draw, sides: Sequence[Side], parameters: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Ascent directions of `parameters`, inference ones, by the estimator of each side on one draw; mean over data."""
    log_w, found = drawn.log_w, []
    for side in sides:
        check_path(drawn.q, drawn.z_held.requires_grad, side)
        if side.dreams:
            outputs = dreams(drawn.model, drawn.prior, log_w, len(side.view(log_w)))
            found.append(grad(outputs, parameters, materialize_grads=True))
        else:
            of_sum = phi_ascent(drawn, side, *side.phi(log_w), parameters)
            found.append(tuple(g / log_w.shape[1] for g in of_sum))
    return found


def phi_ascent(drawn: Draw, side: Side, c: Tensor, s: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Ascent directions of `parameters`, inference ones, for the channels of one side's estimator; sum over data."""
    parts = [(drawn.log_q, s)] if side.needs_score or not side.needs_path else []
    if side.needs_path:
        parts.append((drawn.z, _over(c, drawn.path)))
    outputs, seeds = zip(*parts, strict=True)
    return grad(outputs, parameters, seeds, retain_graph=True, materialize_grads=True)


def theta_gradients(drawn: Draw, sides: Sequence[Side]) -> list[tuple[Tensor, ...]]:
    """Ascent directions of `drawn.theta` by the estimator of each side on one draw; mean over data."""
    log_w, found = drawn.log_w, []
    for side in sides:
        a = side.theta(log_w)
        of_sum = through_prior(drawn, a, *side.prior(log_w)) if side.of_prior else separate(drawn, a, None)[0]
        found.append(tuple(g / log_w.shape[1] for g in of_sum))
    return found


def check_path(q: Distribution, has_path: bool, phi: Side) -> None:
    """Raise ValueError if phi's estimator needs a path through z that the posterior does not have."""
    if phi.needs_path and not has_path:
        raise ValueError(
            f"phi: estimator {phi.estimator!r} needs a reparameterised posterior(x), with rsample, for its path "
            f"gradient. Got {_named(q)}, which has none: use {', '.join(without_path())}."
        )


def dreams(model: Any, prior: Distribution, log_w: Tensor, M: int) -> Tensor:
    """Mean of log q(z | x) over M draws of the model p(x, z) per datum of log_w (S, B): sleep's objective. Nats."""
    B = log_w.shape[1]
    with torch.no_grad(), torch.autocast(log_w.device.type, enabled=False):
        z = prior.sample(torch.Size((M,) if prior.batch_shape else (M, B)))
    with torch.no_grad():
        x = model.likelihood(z).sample()
    return torch.stack([model.posterior(x_m).log_prob(z_m) for x_m, z_m in zip(x, z, strict=True)]).mean()


class _Loss(torch.autograd.Function):
    """The scalar -bound, whose gradient with respect to each of `tensors` is the one given."""

    @staticmethod
    def forward(ctx: Any, bound: Tensor, gradients: Sequence[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return -bound

    @staticmethod
    @no_second_derivative
    def backward(ctx: Any, seed: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(ctx.gradients if all_ones(seed) else torch._foreach_mul(ctx.gradients, seed))


def separate(drawn: Draw, a: Tensor, c: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    """sum a * d log p / d theta for each parameter, and c * d log w / dz (S, B, ...): the reference.

    Without c, none of the latter.
    """
    with drawn.weighing.backward(drawn.theta, None):
        theta = grad(drawn.log_p, drawn.theta, a, retain_graph=True) if drawn.theta else ()
    path = None if c is None else _of_log_w(drawn, [drawn.z_held], c)[0]
    return list(theta), path


def together(drawn: Draw, a: Tensor, c: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    """The same as `separate`, in one pass for z and for all parameters that are weighed inside their layers.

    The others (an observation scale, a learnt prior, layers of other kinds) take a pass of their own, which goes no
    further back than the network they lie in.
    """
    inside = [p for p in drawn.theta if p in drawn.inside]
    outside = [p for p in drawn.theta if p not in drawn.inside]
    grads: dict[nn.Parameter, Tensor] = {}
    if outside:
        with drawn.weighing.backward(outside, None):
            grads.update(zip(outside, grad(drawn.log_p, outside, a, retain_graph=True), strict=True))
    wanted = inside if c is None else [*inside, drawn.z_held]
    with drawn.weighing.backward(inside, a):
        found = _of_log_w(drawn, wanted, torch.ones_like(a)) if wanted else ()
    grads.update(zip(inside, found, strict=False))
    return [grads[p] for p in drawn.theta], None if c is None else _over(c, found[-1])


def _of_log_w(drawn: Draw, wanted: Sequence[Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    """Gradients of sum seed * log w for theta and z_held; theta has none through log q."""
    outputs, seeds = [drawn.log_p], [seed]
    if drawn.log_q.requires_grad and drawn.z_held.requires_grad:  # else a constant
        outputs.append(drawn.log_q)
        seeds.append(-seed)
    return grad(outputs, wanted, seeds, retain_graph=True)


def through_prior(drawn: Draw, a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
    """Ascent of theta by an estimator with channels b, c of its own for the parameters of p(z): `estimators.gdreg`."""
    log_likelihood = drawn.log_likelihood
    with drawn.weighing.backward(drawn.theta, None):
        plain = grad(log_likelihood, drawn.theta, a, retain_graph=True, allow_unused=True, materialize_grads=True)
    z = reparameterised(drawn.prior, drawn.z_held.detach())
    (of_likelihood,) = grad(log_likelihood.sum(), drawn.z_held, retain_graph=True)
    path = _over(b, of_likelihood) + _over(c, drawn.path)
    with drawn.weighing.backward(drawn.theta, None):
        by_prior = grad(z, drawn.theta, path, retain_graph=True, allow_unused=True, materialize_grads=True)
    return [g + h for g, h in zip(plain, by_prior, strict=True)]


def reparameterised(p: Distribution, z: Tensor) -> Tensor:
    """z = T(e; theta) as a function of the parameters of p, with e = T^-1(z; theta) held; in value z itself.

    Of normal distributions, and of those that have a method `reparameterise(z)`.

    Raises:
        ValueError: for other distributions, and for parameters that are not learnt.
    """
    if hasattr(p, "reparameterise"):
        moved = p.reparameterise(z)
    else:
        inner = p.base_dist if isinstance(p, Independent) else p
        if isinstance(inner, Normal):
            moved = inner.loc + inner.scale * ((z - inner.loc) / inner.scale).detach()
        elif isinstance(inner, MultivariateNormal):
            L = inner.scale_tril
            e = torch.linalg.solve_triangular(L, (z - inner.loc).unsqueeze(-1), upper=False).detach()
            moved = inner.loc + (L @ e).squeeze(-1)
        else:
            raise ValueError(
                "theta: estimator 'gdreg' needs a prior() that is normal, or has a method reparameterise(z). "
                f"Got {_named(p)}."
            )
    if not moved.requires_grad:
        raise ValueError(f"theta: estimator 'gdreg' needs a learnt prior. prior() is {_named(p)}, without parameters.")
    return moved


def _over(weights: Tensor, gradient: Tensor) -> Tensor:
    """`gradient` (S, B, ...) with each sample's part multiplied by its weight (S, B)."""
    return weights.reshape(weights.shape + (1,) * (gradient.ndim - weights.ndim)) * gradient


# ------------------------------------------------------------------------------------------------ the draw
def draw(
    network: Any,
    x: Tensor,
    samples: int,
    method: Method = "auto",
    q: Distribution | None = None,
    y: Tensor | None = None,
    kl_weight: float = 1.0,
) -> Draw:
    """Sample z (S, B, ...) from the network's posterior of x (B, ...) and evaluate the log-weights (S, B) on it.

    Args:
        method: "auto" weighs theta inside the layers where that is proven equal; "separate" never does.
        q: the posterior, if it is not to be network.posterior(x). Without rsample (discrete z) there is no path, and
            phi's estimator must do without.
        y: labels (B,) of a conditional network.
        kl_weight: beta in log w = log p(x|z) + beta (log p(z) - log q(z|x)), for a warm-up from 0 to 1 (Sonderby et
            al., arXiv 1602.02282). Below 1 phi's estimator must be a total derivative, see `Side.check_kl_weight`.

    Raises:
        ValueError: where a gradient can't be right: a distribution's log_prob that is not (S, B) in full precision,
            samples that depend on each other (BatchNorm in training mode), generative parameters that log p(x, z)
            does not reach, reentrant checkpointing, parameters that both networks own or use.
    """
    model = checked(network, y)
    parameters = list(model.generative.parameters())
    theta = [p for p in parameters if p.requires_grad]
    proof = _PROOFS[network].setdefault(_situation(model, parameters, x, samples, method, kl_weight), _Proof())
    proof.draws += 1
    weighing = weighing_of(theta, x, samples, method)

    q = model.posterior(x) if q is None else q
    sampled = sample(model, q, x, samples, kl_weight, weighing)
    if proof.due:
        _check_apart(model, posterior=leaves(sampled.z, sampled.log_q), joint=leaves(sampled.log_p))
    drawn = Draw(model, q, *sampled, theta, weighed(sampled.log_p, theta, model.generative), weighing)
    if proof.refuted:
        drawn.inside.clear()
    if proof.due:
        _prove(drawn, model.generative, proof)
    drawn.inside &= proof.proven
    return drawn


def weighing_of(theta: list[nn.Parameter], x: Tensor, samples: int, method: Method) -> Weighing:
    """That of theta's layers; none for "separate"."""
    return Weighing(theta if method == "auto" else [], (samples, len(x)))


def trainable(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that are to have a gradient."""
    return [p for p in network.parameters() if p.requires_grad]


def checked(network: Any, y: Tensor | None) -> Any:
    """The model at labels y (B,), if any. Raises as `check_model` and `given`."""
    if network not in _PROOFS:
        check_model(network)
        _PROOFS[network] = {}
    return given(network, y)


class Sampled(NamedTuple):
    """Samples and their log-densities, see `Draw`."""

    prior: Distribution
    z: Tensor
    z_held: Tensor
    log_q: Tensor
    log_p: Tensor
    log_likelihood: Tensor


def sample(
    model: Any,
    q: Distribution,
    x: Tensor,
    samples: int,
    kl_weight: float,
    weighing: AbstractContextManager,
) -> Sampled:
    """z (S, B, ...) ~ q, and the log-densities of `model` on it, the generative ones under `weighing`."""
    shape, device = (samples, len(x)), x.device.type
    with torch.autocast(device, enabled=False):
        z, has_path = draw_posterior(q, samples)
        z_held = z.detach().requires_grad_(has_path)
        log_q = _log_prob(q, z_held, "posterior(x).log_prob(z)", shape)
    with weighing:
        p_x = model.likelihood(z_held)
        with torch.autocast(device, enabled=False):
            log_likelihood = _log_prob(p_x, x, "likelihood(z).log_prob(x)", shape)
            prior = model.prior()
            log_p_z = _log_prob(prior, z_held, "prior().log_prob(z)", shape)
            if kl_weight != 1.0:
                log_p_z, log_q = kl_weight * log_p_z, kl_weight * log_q
    return Sampled(prior, z, z_held, log_q, log_likelihood + log_p_z, log_likelihood)


@dataclass
class _Proof:
    """What is known of `together` for one model in one situation, after so many draws.

    Due on the 1st, 2nd, 4th, 8th, ... draw, as a network may come to do what it did not: a gate that starts at zero,
    a schedule, a branch that depends on data.
    """

    draws: int = 0
    proven: set[nn.Parameter] = field(default_factory=set)
    refuted: bool = False

    @property
    def due(self) -> bool:
        return self.draws & (self.draws - 1) == 0


_PROOFS: WeakKeyDictionary[nn.Module, dict[tuple, _Proof]] = WeakKeyDictionary()


def _situation(
    model: Any, parameters: list[nn.Parameter], x: Tensor, samples: int, method: Method, kl_weight: float
) -> tuple:
    weighted = kl_weight != 0.0  # at 0 a learnt prior has no gradient
    trained = tuple(p.requires_grad for p in parameters)
    autocast = torch.is_autocast_enabled(x.device.type)
    return method, samples, weighted, x.shape, autocast, modes(model.generative), trained


def _prove(drawn: Draw, generative: nn.Module, proof: _Proof) -> None:
    """Compare `together` with `separate` for random weights; warn where theta's gradients differ.

    A gradient of zero proves nothing. Weights are powers of two, with which rounding commutes: of equal gradients
    only the order of summation differs, in any precision.

    Raises:
        ValueError: if d log p / dz differs, which is so only if samples depend on each other.
    """
    source = torch.Generator().manual_seed(0)
    exponents = torch.randint(-3, 1, (2, *drawn.log_p.shape), generator=source)
    signs = 2 * torch.randint(2, exponents.shape, generator=source) - 1
    a, c = (signs * 2.0**exponents).to(drawn.log_p)
    alone = replace(drawn, log_q=drawn.log_q.detach())  # d log q / dz may be large enough to hide a difference
    theta, z = separate(alone, a, c if drawn.z_held.requires_grad else None)
    theta_together, z_together = together(alone, a, None if z is None else c)
    if z is not None and z_together is not None and _differ(z, z_together):
        raise ValueError(
            "log p(x, z) of one sample depends on other samples (as under a normalisation over the batch): then "
            "particles are not independent and L_K is no bound."
        )
    names = {p: name for name, p in generative.named_parameters()}
    wrong = [names[p] for p, g, h in zip(drawn.theta, theta, theta_together, strict=True) if _differ(g, h)]
    if wrong:
        proof.refuted = True
        warnings.warn(
            f"The gradients of {', '.join(wrong)} can't be weighed inside their layers, whose rows seem not to be the "
            "samples in order (S, B). Taking two backward passes through the generative network instead of one.",
            stacklevel=4,
        )
    nonzero = {p for p, g in zip(drawn.theta, theta, strict=True) if 0 < g.norm() < float("inf")}
    proof.proven = set() if proof.refuted else nonzero


def _differ(reference: Tensor, other: Tensor) -> bool:
    tolerance = 1e-9 if reference.dtype == torch.float64 else 1e-3
    return bool((reference - other).norm() > tolerance * reference.norm())


def _check_apart(model: Any, posterior: set[Tensor], joint: set[Tensor]) -> None:
    """Each network's parameters have gradients from one side alone: refuse those that the other side uses too.

    phi's that its own side does not use are refused as well; theta's are by `weighed`.
    """
    idle = [n for n, p in model.inference.named_parameters() if p.requires_grad and p not in posterior]
    if idle:
        raise ValueError(
            f"posterior(x) does not depend on the inference parameter(s) {', '.join(idle)}. If that is meant, freeze "
            "them with requires_grad_(False); if not, look for no_grad or detach on the way."
        )
    for user, used, owner in (
        ("posterior(x)", posterior, "generative"),
        ("prior() or likelihood(z)", joint, "inference"),
    ):
        if names := [name for name, p in getattr(model, owner).named_parameters() if p in used]:
            raise ValueError(
                f"{user} depends on the {owner} network's parameter(s) {', '.join(names)}, whose gradient there "
                "belongs to neither side. Detach them there."
            )


def modes(generative: nn.Module) -> tuple[bool, ...]:
    """Whether each of its modules is in training mode. Raises ValueError for BatchNorm that is."""
    found = []
    for name, module in generative.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"BatchNorm in training mode in the generative network ({name}): it makes particles depend on each "
                "other, so that L_K is no bound. Use eval mode, or LayerNorm."
            )
        found.append(module.training)
    return tuple(found)


def _log_prob(p: Distribution, value: Tensor, what: str, shape: tuple[int, int]) -> Tensor:
    """p.log_prob(value), which must be (S, B); where it can't be, say so in shapes."""
    try:
        log_prob = p.log_prob(value)
    except (RuntimeError, ValueError) as error:  # how torch says that sizes differ
        raise ValueError(
            f"{what} must have shape (samples, batch) = {shape}. {_named(p)}, of batch shape {tuple(p.batch_shape)} "
            f"and event shape {tuple(p.event_shape)}, can't take values of shape {tuple(value.shape)}: {error}"
        ) from error
    if log_prob.shape != shape:
        raise ValueError(
            f"{what} must have shape (samples, batch) = {shape}, event dimensions inside "
            f"torch.distributions.Independent. Got {tuple(log_prob.shape)}."
        )
    if log_prob.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{what} must be float32 or float64, as log-weights lie hundreds of nats from 0: give the distribution "
            f"`.float()` parameters. Got {log_prob.dtype}."
        )
    return log_prob


def _named(p: Distribution) -> str:
    inner = getattr(p, "base_dist", None)
    return f"{type(p).__name__}({type(inner).__name__})" if inner is not None else type(p).__name__

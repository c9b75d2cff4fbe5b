"""Estimators and losses broken in the ways that others have been: each must be refused, and by what it is said."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import bounds, routing
from ..estimators import PHI, THETA
from ..sides import Side
from .exact import Quadrature
from .replicates import Replicas
from .targets import L_K, TARGETS


def wrong_sign(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """VIMCO downhill."""
    c, s = PHI["vimco"](log_w)
    return c, -s


def axes_swapped(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """IWAE with weights normalised over the groups instead of the particles."""
    a = THETA["iwae"](log_w.transpose(0, 1)).transpose(0, 1)
    return a, -a


def biased(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """DReG, 5 % too long."""
    c, s = PHI["dreg"](log_w)
    return 1.05 * c, 1.05 * s


def surrogate_as_value(drawn: routing.Draw, theta: Side, phi: Side) -> Tensor:
    """A loss whose gradient is right and whose value is -sum w~ log w, as another library logs it."""
    right = routing.loss(drawn, theta, phi)
    view = theta.view(drawn.log_w)
    wrong = -(torch.softmax(view, 1) * view).sum(1).mean()
    return right - right.detach() + wrong


def theta_s_gradient_added(drawn: routing.Draw, theta: Side, phi: Side) -> Tensor:
    """A loss that sends theta's bound to phi as well, as two full backward passes do."""
    also = routing.loss(drawn, theta, theta)
    return routing.loss(drawn, theta, phi) + also - also.detach()


Loss = Callable[[routing.Draw, Side, Side], Tensor]


def gradient_error(weights: Callable, name: str = "iwae") -> float:
    """Relative error of a phi estimator's expectation against a row's target, K = 3, by quadrature."""
    exact = Quadrature(3)
    target = exact.target(TARGETS.get(name, L_K), "phi", {})
    return float((exact.found("phi", weights, {}) - target).norm() / target.norm())


def value_error(loss: Loss) -> float:
    """Distance in nats of a loss from minus the bound, on one draw of 12 samples."""
    drawn, theta = _drawn(), Side("iwae", 12)
    return abs(loss(drawn, theta, Side("iwae", 3)).item() + bounds.miwae(theta.view(drawn.log_w)).mean().item())


def leak(loss: Loss) -> float:
    """By how much phi's gradient changes, relatively, with theta's objective alone, on one draw."""
    drawn, phi = _drawn(), Side("iwae", 3)
    parameters = list(drawn.model.inference.parameters())
    one, other = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss(drawn, theta, phi), parameters, retain_graph=True)])
        for theta in (Side("iwae", 12), Side("elbo", 1))
    )
    return float((one - other).norm() / one.norm())


def _drawn() -> routing.Draw:
    torch.manual_seed(7)
    model = Replicas(5, 2).double()
    return routing.draw(model, model.x, 12, "separate")


BROKEN: tuple[tuple[str, str, Callable[[], float], Callable[[], float], float], ...] = (
    # what is broken, the check, its figure for the broken one and for ours, the largest that passes
    ("wrong sign", "quadrature", lambda: gradient_error(wrong_sign), lambda: gradient_error(PHI["vimco"]), 1e-6),
    ("M and K swapped", "quadrature", lambda: gradient_error(axes_swapped), lambda: gradient_error(PHI["iwae"]), 1e-6),
    ("5 % bias", "quadrature", lambda: gradient_error(biased), lambda: gradient_error(PHI["dreg"]), 1e-6),
    (
        "surrogate logged as value",
        "value against the bound",
        lambda: value_error(surrogate_as_value),
        lambda: value_error(routing.loss),
        1e-12,
    ),
    (
        "phi's gradient with theta's added",
        "phi's gradient under another theta",
        lambda: leak(theta_s_gradient_added),
        lambda: leak(routing.loss),
        1e-12,
    ),
)

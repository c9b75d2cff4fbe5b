"""log p(x) by annealed importance sampling, and from both sides where the data are the model's own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .hmc import Bridge, Start, move
from .models.base import draw_prior
from .weights import ess, log_mean_exp

Watch = Callable[[], object]
ACCEPTANCE = 0.65  # what steps are adapted to, the best for HMC in many dimensions (Neal, arXiv 1206.1901, 5.4.4)
FIRST_MOVES, FIRST_STEP, RATE = 20, 0.5, 0.3  # of the preliminary run


@dataclass(frozen=True)
class Annealing:
    """How many chains go how slowly from r(z) to p(z | x).

    Args:
        chains: of each datum. Their weights are averaged.
        temperatures: T; beta goes from 0 to 1 in so many differences, with T - 1 moves between them.
        leapfrog: steps of each move.
        schedule: of beta. `sigmoid` is slow at both ends (Grosse et al., arXiv 1511.02543), `linear` is even.
        start: what r is, the `prior` or q(z | x), the `posterior` network's.
        pilot: chains of the preliminary run, which finds the steps.
    """

    chains: int = 16
    temperatures: int = 500
    leapfrog: int = 5
    schedule: Literal["sigmoid", "linear"] = "sigmoid"
    start: Start = "prior"
    pilot: int = 4

    def check(self, where: str = "annealing") -> None:
        """Raise ValueError, naming the setting, for what can't be."""
        for name in ("chains", "temperatures", "leapfrog", "pilot"):
            if getattr(self, name) < 1:
                raise ValueError(f"{where}.{name} must be at least 1. Got {getattr(self, name)}.")
        for name, known in (("schedule", ("sigmoid", "linear")), ("start", get_args(Start))):
            if getattr(self, name) not in known:
                raise ValueError(f"{where}.{name} must be {' or '.join(known)}. Got {getattr(self, name)}.")

    def betas(self) -> list[float]:
        """beta_0 = 0, ..., beta_T = 1."""
        even = torch.linspace(0, 1, self.temperatures + 1, dtype=torch.float64)
        if self.schedule == "linear":
            return even.tolist()
        s = torch.sigmoid(4 * (2 * even - 1))
        return ((s - s[0]) / (s[-1] - s[0])).tolist()

    @property
    def pilot_moves(self) -> int:
        """Of the preliminary run."""
        return FIRST_MOVES + self.temperatures - 1 if self.temperatures > 1 else 0

    def moves(self, ways: int = 1) -> int:
        """How often `watch` is called, by `ais` (one way) and by `bdmc` (two)."""
        return self.pilot_moves + ways * (self.temperatures - 1)

    def passes(self, ways: int = 1) -> int:
        """The cost of a datum in decoder passes, each forward and back."""
        pilot = self.pilot * (1 + self.pilot_moves * self.leapfrog) if self.pilot_moves else 0
        return pilot + ways * self.chains * (1 + (self.temperatures - 1) * self.leapfrog)


DEFAULT = Annealing()


class Annealed(NamedTuple):
    """What the chains of each datum came to."""

    log_w: Tensor  # (C, B) float64: the mean of w is p(x) in expectation
    acceptance: Tensor  # (B,), the mean over chains and moves; nan if there were no moves

    @property
    def log_px(self) -> Tensor:
        """log (1/C) sum w, (B,) in nats: in expectation a lower bound of log p(x)."""
        return log_mean_exp(self.log_w, 0)

    @property
    def ess(self) -> Tensor:
        """Of the chains' weights, (B,), as a fraction of C."""
        return ess(self.log_w, 0) / len(self.log_w)


class Bidirectional(NamedTuple):
    """Data that were simulated, and log p(x) of each from both sides; in nats, (B,)."""

    x: Tensor  # (B, ...)
    lower: Tensor  # in expectation at most log p(x)
    upper: Tensor  # in expectation at least log p(x)
    acceptance: Tensor  # mean over chains and moves both ways


def ais(model: Any, x: Tensor, annealing: Annealing = DEFAULT, watch: Watch | None = None) -> Annealed:
    """Annealed importance sampling (Neal, arXiv physics/9803008) by HMC, as Wu et al. do (arXiv 1611.04273).

    Each chain starts at z_0 ~ r(z) and goes through f_beta(z) = r(z)^(1 - beta) p(x, z)^beta, which from the prior is
    p(z) p(x | z)^beta. Its log-weight is the sum over i of (beta_i - beta_(i-1)) log p(x, z_(i-1)) / r(z_(i-1)); z_i
    comes from z_(i-1) by a move that leaves f_(beta_i) as it is. The expectation of w is p(x), so that log_px is a
    lower bound in expectation, whatever the moves: poor ones make it looser, not wrong. With one temperature it is
    importance sampling from r.

    That holds for moves that do not depend on the chain. A step that adapts to a chain's own past does: acceptance
    tells where the chain is, and E[w] = p(x) would be lost. So steps are found in a preliminary run, of which nothing
    else is kept, for each datum and temperature (see `steps_for`), and the run proper has them fixed: exact.

    Args:
        model: follows `models.base.Model`, with continuous, unbounded z. Put it in eval mode.
        x: batch (B, ...).
        annealing: how; its `passes()` is the cost of a datum.
        watch: is called after each of `annealing.moves()`.

    Raises:
        ValueError: if z is discrete or bounded, log p(x | z) has no gradient by z, or a setting can't be.
    """
    annealing.check()
    with gradients():
        bridge = Bridge(model, usable(x), annealing.start)
        steps = steps_for(bridge, annealing, watch)
        return anneal(bridge, bridge.draw(annealing.chains), annealing, steps, watch=watch)


def bdmc(model: Any, n: int, annealing: Annealing = DEFAULT, watch: Watch | None = None) -> Bidirectional:
    """Bidirectional Monte Carlo (Grosse et al., arXiv 1511.02543) on n data that the model simulates.

    Of x ~ p(x | z), z ~ p(z), that z is an exact draw from the posterior p(z | x). `ais` gives the lower bound. Chains
    that start at z and go its way back have weights with E[1 / w] = 1 / p(x), so that -log of the mean of 1 / w is an
    upper bound in expectation. The gap between them bounds the error of either. It is one of simulated data: it says
    of real ones as much as they are alike.

    Args:
        model: as for `ais`; of a conditional one as many labels as n.
        n: B, data to simulate.
        annealing: how, forth and back; its `passes(2)` is the cost of a datum.
        watch: is called after each of `annealing.moves(2)`.

    Raises:
        ValueError: as `ais` does.
    """
    annealing.check()
    with gradients():
        z = draw_prior(model, n)
        x = model.likelihood(z).sample()[0]
        bridge = Bridge(model, x, annealing.start)
        steps = steps_for(bridge, annealing, watch)
        forth = anneal(bridge, bridge.draw(annealing.chains), annealing, steps, watch=watch)
        exact = z.expand(annealing.chains, *z.shape[1:])
        back = anneal(bridge, exact, annealing, steps, reverse=True, watch=watch)
        upper = -log_mean_exp(-back.log_w, 0)
        return Bidirectional(x, forth.log_px, upper, (forth.acceptance + back.acceptance) / 2)


def check_model(model: Any, x: Tensor, start: Start = "prior") -> None:
    """Raise as `ais` does, before anything is done. Draws one z for each of x (B, ...)."""
    with gradients():
        bridge = Bridge(model, usable(x), start)
        bridge.at(bridge.draw(1))


def anneal(
    bridge: Bridge,
    z: Tensor,
    annealing: Annealing,
    steps: list[Tensor],
    reverse: bool = False,
    watch: Watch | None = None,
) -> Annealed:
    """Chains from z (C, B, ...) through all temperatures; in reverse from a draw of the posterior's to r.

    Both ways take the same sum: forwards z_(i-1) is weighed at i and moved at beta_i, backwards it was moved to at
    beta_i and is weighed at i.

    Args:
        bridge: from r to p(x, z).
        z: draws from r, or in reverse from p(z | x).
        annealing: as for `ais`.
        steps: of the leapfrog, one (B,) for each of beta_1, ..., beta_(T-1); they must not depend on z.
        reverse: which way.
        watch: is called after each move.
    """
    betas, T = annealing.betas(), annealing.temperatures
    levels = range(T, 0, -1) if reverse else range(1, T + 1)
    point = bridge.at(z)
    log_w = torch.zeros_like(point.log_w, dtype=torch.float64)
    accepted = log_w.new_zeros(log_w.shape[1])
    for nth, i in enumerate(levels):
        log_w += (betas[i] - betas[i - 1]) * point.log_w.double()
        if nth < T - 1:
            k = i - 1 if reverse else i
            point, acceptance = move(bridge, point, betas[k], steps[k - 1], annealing.leapfrog)
            accepted += acceptance.mean(0)
            if watch:
                watch()
    return Annealed(log_w, accepted / (T - 1) if T > 1 else accepted * torch.nan)


def steps_for(bridge: Bridge, annealing: Annealing, watch: Watch | None = None) -> list[Tensor]:
    """Leapfrog steps for each temperature between 0 and 1, (B,) each, by a run of `annealing.pilot` chains.

    A datum's step grows by e^(0.3 (a - 0.65)) after a move that a of its chains accepted, from move to move. At beta_1
    there are some moves more, for a start.
    """
    betas = annealing.betas()[1:-1]
    steps: list[Tensor] = []
    if not betas:
        return steps
    point = bridge.at(bridge.draw(annealing.pilot))
    step = torch.full_like(point.log_r[0], FIRST_STEP)
    for i, beta in enumerate([betas[0]] * FIRST_MOVES + betas):
        point, acceptance = move(bridge, point, beta, step, annealing.leapfrog)
        step = step * torch.exp(RATE * (acceptance.mean(0) - ACCEPTANCE)).to(step)
        if i >= FIRST_MOVES:
            steps.append(step)
        if watch:
            watch()
    return steps


@contextmanager
def gradients() -> Iterator[None]:
    """Autograd is there, also inside an evaluation of Lightning's, which runs in inference mode."""
    with torch.inference_mode(False), torch.no_grad():  # on where `Bridge.at` asks for it
        yield


def usable(x: Tensor) -> Tensor:
    """x, of which autograd may keep some."""
    return x.clone() if x.is_inference() else x

"""What a run is trained on as it goes on: samples, estimators and the KL weight as functions of the epoch alone.

No state: a resumed run is where the unbroken one was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .sides import Side


@dataclass(frozen=True)
class Objective:
    """Samples drawn per datum, and how each network is trained on them."""

    samples: int
    theta: Side
    phi: Side

    def check(self, key: str = "model") -> None:
        """Raise ValueError, naming the key below `key`, unless both sides fit the samples."""
        self.theta.check(f"{key}.theta", self.samples)
        self.phi.check(f"{key}.phi", self.samples)

    def __str__(self) -> str:
        sides = (f"{name} {side}" for name, side in (("theta", self.theta), ("phi", self.phi)))
        return f"{self.samples} samples, {', '.join(sides)}"


@dataclass(frozen=True)
class Change:
    """What is different from the start of an epoch on; what is left out stays as it was.

    Args:
        epoch: the first epoch, counted from 0, of the change.
        samples: S, drawn per datum.
        theta: estimator and particles of the generative network.
        phi: estimator and particles of the inference network.
    """

    epoch: int
    samples: int | None = None
    theta: Side | None = None
    phi: Side | None = None


class Schedule:
    """A first objective and its changes, such as Burda et al.'s warm start: the VAE's first, then the IWAE's.

    Args:
        first: the objective of epoch 0.
        changes: in the order of their epochs.

    Raises:
        ValueError: naming the key, for epochs that do not grow from 1, and for an objective that can't be.
    """

    def __init__(self, first: Objective, changes: Sequence[Change] = ()) -> None:
        first.check()
        epochs = [0, *(change.epoch for change in changes)]
        if any(later <= earlier for earlier, later in pairwise(epochs)):
            raise ValueError(f"model.schedule: epochs must grow, from 1 on. Got {', '.join(map(str, epochs[1:]))}.")
        self.stages = [(0, first)]
        for i, change in enumerate(changes):
            before = self.stages[-1][1]
            objective = Objective(
                change.samples or before.samples, change.theta or before.theta, change.phi or before.phi
            )
            objective.check(f"model.schedule[{i}]")
            self.stages.append((change.epoch, objective))

    def at(self, epoch: int) -> Objective:
        """The objective of an epoch, counted from 0."""
        return next(objective for start, objective in reversed(self.stages) if start <= epoch)


def kl_weight(epochs: float, warmup: float) -> float:
    """beta, growing linearly from 0 to 1 over `warmup` epochs, after `epochs` of them; 1 without a warm-up.

    Of log w = log p(x|z) + beta (log p(z) - log q(z|x)): Sonderby et al., arXiv 1602.02282, section 2.3.
    """
    return min(1.0, epochs / warmup) if warmup > 0 else 1.0

"""How much is measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Sizes and durations. The network is the papers' throughout.

    Args:
        seconds: of each point, about; long steps take more.
        rounds: of each point at least.
        batches: B of the steps compared, at `samples` each.
        samples: S = K of theta.
        particles: K at which cost is measured, at the least of `batches`.
        memory: K at which peak memory is measured.
        images: data of which log p(x) is estimated.
        log_px_particles: K of log p(x).
        pretraining: steps of the model that log p(x) is of.
        blocks: pairs of fit's blocks and the bare loop's.
        block: steps of one block; fit logs once in each.
        draws: of one measurement of the signal-to-noise ratio.
    """

    seconds: float = 60
    rounds: int = 7
    batches: tuple[int, ...] = (20, 128, 512)
    samples: int = 64
    particles: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096)
    memory: tuple[int, ...] = (64, 512, 4096)
    images: int = 20
    log_px_particles: int = 5000
    pretraining: int = 300
    blocks: int = 20
    block: int = 50
    draws: int = 100


FULL = Plan()
QUICK = Plan(
    seconds=1,
    rounds=3,
    particles=(1, 16, 64, 256),
    memory=(64, 256),
    images=4,
    log_px_particles=1000,
    pretraining=100,
    blocks=3,
    draws=10,
)

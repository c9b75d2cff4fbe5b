"""Ways of doing the same work, timed in turn, round after round, in one process.

On a machine that others use too a time means little, but the ratio of two times from one round does. So every round
times every way once, in an order of its own, and ratios are taken round by round. As training repeats one step, the
first call of a turn, which finds the caches full of another way's data, is not counted.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Step = Callable[[], object]
Times = dict[str, list[float]]  # seconds a call, one for each round


class Unavailable(Exception):
    """Why a way can't be measured here."""


class Spread(NamedTuple):
    """Median and quartiles."""

    low: float
    median: float
    high: float


def measure(ways: Mapping[str, Step], seconds: float, least: int = 5, burst: float = 0.1) -> Times:
    """Time all `ways` for about `seconds`, in at least so many rounds.

    In a round each way is called once, and then timed over as many calls as fill `burst` seconds; before the first
    round, three times.
    """
    calls = {}
    for name, step in ways.items():
        step()
        step()
        calls[name] = max(1, round(burst / timed(step, 1)))
    order, times = list(ways), Times({name: [] for name in ways})
    shuffle, start, rounds = random.Random(0).shuffle, time.perf_counter(), 0
    while rounds < least or time.perf_counter() - start < seconds:
        shuffle(order)
        for name in order:
            ways[name]()
            times[name].append(timed(ways[name], calls[name]))
        rounds += 1
    return times


def timed(step: Step, calls: int) -> float:
    """Seconds a call."""
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def made(makers: Mapping[str, Callable[[], Step]]) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps of those ways that are available, and of the others the reason why not."""
    steps, skipped = {}, {}
    for name, make in makers.items():
        try:
            steps[name] = make()
        except Unavailable as reason:
            skipped[name] = str(reason)
    return steps, skipped


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """above / below, round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: Sequence[float]) -> Spread:
    """Quartiles, interpolated between the values themselves; one value is all three."""
    return Spread(*(statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * list(values)))

"""What the measurements should show, and whether they do."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import fit, log_px, scaling, step, ways
from .timing import Spread, ratios, spread

Results = dict[str, Any]
Figures = Callable[[Results], Sequence[float]]


@dataclass(frozen=True)
class Target:
    """A figure with its bound.

    Args:
        text: what it is.
        wanted: the bound on its median.
        at_least: whether it is a lower bound.
        figures: the figure, once or for each round, of what was found; KeyError or ValueError if it was not measured.
        best: likewise, what it would be of the same work by hand, where that was measured too.
    """

    text: str
    wanted: float
    at_least: bool
    figures: Figures
    best: Figures | None = None

    def found(self, results: Results) -> Spread | None:
        """Median and quartiles, or None if it was not measured."""
        return measured(self.figures, results)

    def possible(self, results: Results) -> Spread | None:
        """The same of the work by hand."""
        return None if self.best is None else measured(self.best, results)

    def met(self, found: Spread) -> bool:
        """By the median."""
        return found.median >= self.wanted if self.at_least else found.median <= self.wanted


def measured(figures: Figures, results: Results) -> Spread | None:
    """Median and quartiles, or None of what was not measured."""
    try:
        return spread(figures(results))
    except (KeyError, ValueError):
        return None


# ------------------------------------------------------------------------------------------------ figures
def found(results: Results, section: str) -> Any:
    """What a section found."""
    return results[section]["found"]


def at(rows: Sequence[dict], **which: Any) -> dict:
    """The row with these values. KeyError if there is none."""
    for row in rows:
        if all(row[key] == value for key, value in which.items()):
            return row
    raise KeyError(which)


def step_ratio(above: str, below: str, batch: int = 128) -> Callable[[Results], list[float]]:
    """Time of one way over another's, round by round."""

    def figures(results: Results) -> list[float]:
        times = at(found(results, "step"), batch=batch)["times"]
        return ratios(times[above], times[below])

    return figures


def ratio_of(section: str, above: str, below: str) -> Callable[[Results], list[float]]:
    """The same of a section with one point."""

    def figures(results: Results) -> list[float]:
        times = found(results, section)["times"]
        return ratios(times[above], times[below])

    return figures


def exponent(results: Results) -> list[float]:
    """Of time in K from 64 on, by least squares through the logarithms, round by round."""
    times = found(results, "chunks")["times"]
    log_k = [math.log(int(K)) for K in times]
    return [
        statistics.linear_regression(log_k, [math.log(seconds) for seconds in own]).slope
        for own in zip(*times.values(), strict=True)
    ]


def memory_growth(above_idle: bool) -> Callable[[Results], list[float]]:
    """Peak at the largest K over that at 64, in chunks; of the whole process, or of what a step adds to it."""

    def figures(results: Results) -> list[float]:
        rows = [row for row in found(results, "memory") if row["way"] == ways.CHUNKED]
        least, most = (r["peak"] - above_idle * r["idle"] for r in (rows[0], rows[-1]))
        return [most / least]

    return figures


def disagreement(results: Results) -> list[float]:
    """|difference| of the two estimates of log p(x) in its standard errors, those of means over rounds."""
    values = found(results, "log_px")["values"]
    ours, theirs = values[log_px.OURS], values[log_px.PYTHAE]
    error = math.hypot(*(statistics.stdev(v) / math.sqrt(len(v)) for v in (ours, theirs)))
    return [abs(statistics.mean(ours) - statistics.mean(theirs)) / error]


def synchronisation(results: Results, way: str = scaling.SYNCHRONISED) -> list[float]:
    """Time with the all-reduce, or that of one number, over time without, at batch 128."""
    times = at(found(results, "scaling"), batch=128)["times"]
    return ratios(times[way], times[scaling.ALONE])


def meeting(results: Results) -> list[float]:
    """With that of one number."""
    return synchronisation(results, scaling.MEETING)


def draws(results: Results) -> list[float]:
    """Steps that a draw of the SNR measurement costs."""
    section = found(results, "fit")
    return [r / section["draws"] for r in ratios(section["times"][fit.SNR], section["times"][fit.LOOP])]


# ------------------------------------------------------------------------------------------------ the table
AT_128 = "batch 128, 64 samples: "


def of_step(text: str, wanted: float, above: str, below: str, best: str) -> Target:
    """A lower bound on a ratio at batch 128, and below what step the ratio is the best there is."""
    return Target(AT_128 + text, wanted, True, step_ratio(above, below), step_ratio(above, best))


def of_log_px(text: str, wanted: float, above: str) -> Target:
    """The same of log p(x)."""
    figures = (ratio_of("log_px", above, below) for below in (log_px.OURS, log_px.BY_HAND))
    return Target("log p(x): " + text, wanted, True, *figures)


TARGETS = [
    of_step("pythae / ours", 3, ways.PYTHAE, ways.OURS, ways.BY_HAND),
    of_step("pythae / ours, compiled", 3, ways.PYTHAE, ways.COMPILED, ways.BY_HAND_COMPILED),
    of_step("pythae / ours, bf16-mixed", 6, ways.PYTHAE, ways.BF16, ways.BY_HAND_BF16),
    of_step("pythae / ours, bf16-mixed, compiled", 6, ways.PYTHAE, ways.BF16_COMPILED, ways.BY_HAND_BF16_COMPILED),
    of_step("stock two grads / ours", 1.7, ways.TWO_GRADS, ways.OURS, ways.BY_HAND),
    of_step("stock two grads / ours, compiled", 1.7, ways.TWO_GRADS, ways.COMPILED, ways.BY_HAND_COMPILED),
    Target(
        AT_128 + "two grads with our kernels / ours",
        1.3,
        True,
        step_ratio(ways.TWO_GRADS_OURS, ways.OURS),
        step_ratio(ways.BY_HAND_TWO_GRADS, ways.BY_HAND),
    ),
    of_step("JAX / ours", 1.7, ways.JAX, ways.OURS, ways.BY_HAND),
    of_step("JAX / ours, compiled", 1.7, ways.JAX, ways.COMPILED, ways.BY_HAND_COMPILED),
    Target(AT_128 + "ours / stock IWAE", 1.05, False, step_ratio(ways.OURS, ways.STOCK_IWAE)),
    of_step("products at the best rate / ours", 0.7, step.BEST, ways.OURS, ways.BY_HAND),
    of_step("products at the best rate / ours, compiled", 0.7, step.BEST, ways.COMPILED, ways.BY_HAND_COMPILED),
    of_step("products, each at its best / ours", 0.7, step.EACH, ways.OURS, ways.BY_HAND),
    Target(
        "fit / bare loop, batch 20",
        1.05,
        False,
        ratio_of("fit", fit.FIT, fit.LOOP),
        ratio_of("fit", fit.LEAST, fit.ITS_LOOP),
    ),
    of_log_px("pythae / ours", 5, log_px.PYTHAE),
    Target("log p(x): pythae / ours, compiled", 5, True, ratio_of("log_px", log_px.PYTHAE, log_px.COMPILED)),
    of_log_px("products at the best rate / ours", 0.7, log_px.BEST),
    of_log_px("products, each at its best / ours", 0.7, log_px.EACH),
    Target("log p(x): difference to pythae's, in standard errors", 3, False, disagreement),
    Target("peak memory of the process, K = 4096 / K = 64, in chunks", 1.5, False, memory_growth(False)),
    Target("the same of what a step adds to the idle process", 1.5, False, memory_growth(True)),
    Target("exponent of time in K from 64 to 4096, in chunks: at least", 0.95, True, exponent),
    Target("exponent of time in K from 64 to 4096, in chunks: at most", 1.05, False, exponent),
    Target("two processes, batch 128: with all-reduce / without", 1.10, False, synchronisation, meeting),
    Target("SNR callback: steps a draw, batch 20", 1.2, False, draws),
]

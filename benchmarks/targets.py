"""What the measurements should show, and whether they do."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import fit, log_px, scaling, step, ways
from .timing import Spread, ratios, spread

Results = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A figure with its bound.

    Args:
        text: what it is.
        wanted: the bound on its median.
        at_least: whether it is a lower bound.
        figures: the figure, once or for each round, of what was found; KeyError or ValueError if it was not measured.
    """

    text: str
    wanted: float
    at_least: bool
    figures: Callable[[Results], Sequence[float]]

    def found(self, results: Results) -> Spread | None:
        """Median and quartiles, or None if it was not measured."""
        try:
            return spread(self.figures(results))
        except (KeyError, ValueError):
            return None

    def met(self, found: Spread) -> bool:
        """By the median."""
        return found.median >= self.wanted if self.at_least else found.median <= self.wanted


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
    """Of time in K from 64 on, by least squares through the logarithms of the medians."""
    rows = [row for row in found(results, "cost") if row["samples"] >= 64]
    logs = [(math.log(row["samples"]), math.log(statistics.median(row["times"][ways.CHUNKED]))) for row in rows]
    x, y = zip(*logs, strict=True)
    return [statistics.linear_regression(x, y).slope]


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


def synchronisation(results: Results) -> list[float]:
    """Time with the all-reduce over time without, at batch 128."""
    times = at(found(results, "scaling"), batch=128)["times"]
    return ratios(times[scaling.SYNCHRONISED], times[scaling.ALONE])


def draws(results: Results) -> list[float]:
    """Steps that a draw of the SNR measurement costs."""
    section = found(results, "fit")
    return [r / section["draws"] for r in ratios(section["times"][fit.SNR], section["times"][fit.LOOP])]


# ------------------------------------------------------------------------------------------------ the table
AT_128 = "batch 128, 64 samples: "
TARGETS = [
    Target(AT_128 + "pythae / ours", 3, True, step_ratio(ways.PYTHAE, ways.OURS)),
    Target(AT_128 + "pythae / ours, compiled", 3, True, step_ratio(ways.PYTHAE, ways.COMPILED)),
    Target(AT_128 + "pythae / ours, bf16-mixed", 6, True, step_ratio(ways.PYTHAE, ways.BF16)),
    Target(AT_128 + "pythae / ours, bf16-mixed, compiled", 6, True, step_ratio(ways.PYTHAE, ways.BF16_COMPILED)),
    Target(AT_128 + "stock two grads / ours", 1.7, True, step_ratio(ways.TWO_GRADS, ways.OURS)),
    Target(AT_128 + "stock two grads / ours, compiled", 1.7, True, step_ratio(ways.TWO_GRADS, ways.COMPILED)),
    Target(AT_128 + "two grads with our log_prob / ours", 1.3, True, step_ratio(ways.TWO_GRADS_OURS, ways.OURS)),
    Target(AT_128 + "JAX / ours", 1.7, True, step_ratio(ways.JAX, ways.OURS)),
    Target(AT_128 + "JAX / ours, compiled", 1.7, True, step_ratio(ways.JAX, ways.COMPILED)),
    Target(AT_128 + "ours / stock IWAE", 1.05, False, step_ratio(ways.OURS, ways.STOCK_IWAE)),
    Target(AT_128 + "products at the best rate / ours", 0.7, True, step_ratio(step.BEST, ways.OURS)),
    Target(AT_128 + "products at the best rate / ours, compiled", 0.7, True, step_ratio(step.BEST, ways.COMPILED)),
    Target(AT_128 + "products, each at its best / ours", 0.7, True, step_ratio(step.EACH, ways.OURS)),
    Target("fit / bare loop, batch 20", 1.05, False, ratio_of("fit", fit.FIT, fit.LOOP)),
    Target("log p(x): pythae / ours", 5, True, ratio_of("log_px", log_px.PYTHAE, log_px.OURS)),
    Target("log p(x): products at the best rate / ours", 0.7, True, ratio_of("log_px", log_px.BEST, log_px.OURS)),
    Target("log p(x): difference to pythae's, in standard errors", 3, False, disagreement),
    Target("peak memory of the process, K = 4096 / K = 64, in chunks", 1.5, False, memory_growth(False)),
    Target("the same of what a step adds to the idle process", 1.5, False, memory_growth(True)),
    Target("exponent of time in K from 64 to 4096, in chunks: at least", 0.95, True, exponent),
    Target("exponent of time in K from 64 to 4096, in chunks: at most", 1.05, False, exponent),
    Target("two processes, batch 128: with all-reduce / without", 1.10, False, synchronisation),
    Target("SNR callback: steps a draw, batch 20", 1.2, False, draws),
]

"""Curves of several seeds as one line and one band, and the coordinates to draw them at."""

import math
from typing import NamedTuple

import numpy as np

from .groups import Group
from .runs import Curve

WIDTH, HEIGHT = 460, 260  # of a panel; the plot lies inside these margins
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 34
POINTS = 12_000  # in a panel, of all groups together
EARLY = 0.1  # of a run: its steep start does not set the range of a linear axis


class Band(NamedTuple):
    """Mean, smallest and largest over seeds, each (S,)."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: int
    interpolated: bool  # the seeds were not logged at the same steps
    averaged: int  # logged values in a point, 1 if each is drawn


def band(curves: list[Curve], points: int) -> Band | None:
    """One group's seeds over the steps that all of them cover, in at most `points` points.

    Only steps that every seed logged are taken; where these are fewer than half, the seeds are interpolated linearly
    to the steps of the sparsest. So every point is over the same seeds, and none lies beyond a seed's last step.
    """
    first, last = max(c.steps[0] for c in curves), min(c.steps[-1] for c in curves)
    inside = [c.steps[(c.steps >= first) & (c.steps <= last)] for c in curves]
    grid = inside[0]
    for steps in inside[1:]:
        grid = np.intersect1d(grid, steps, assume_unique=True)
    sparsest = min(inside, key=len)
    interpolated = 2 * len(grid) < max(map(len, inside))
    if interpolated:
        grid = sparsest
    if not len(grid):
        return None
    values = np.stack([np.interp(grid, c.steps, c.values) for c in curves])
    averaged = -(-len(grid) // points)
    if averaged > 1:
        starts = np.arange(0, len(grid), averaged)
        counts = np.diff([*starts, len(grid)])
        grid = np.add.reduceat(grid, starts) / counts
        values = np.add.reduceat(values, starts, axis=1) / counts
    return Band(grid, values.mean(0), values.min(0), values.max(0), len(curves), interpolated, averaged)


def of_group(group: Group, metric: str, points: int) -> Band | None:
    """The band of a group's evaluated runs, or of its unfinished ones where none is evaluated."""
    runs = group.evaluated or group.runs
    curves = [run.curves[metric] for run in runs if metric in run.curves and len(run.curves[metric].steps)]
    return band(curves, points) if curves else None


# --------------------------------------------------------------------------------------------------- drawing
class Scale(NamedTuple):
    """A linear or logarithmic map of [low, high] to [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Coordinates; far outside they are held near the edge."""
        if self.log:
            low, high, values = math.log(self.low), math.log(self.high), np.log(np.maximum(values, self.low / 1e6))
        else:
            low, high = self.low, self.high
        at = self.start + (values - low) / (high - low) * (self.end - self.start)
        return np.clip(at, -2000, 4000)

    def ticks(self) -> list[float]:
        """About five round numbers within the range."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5)):
                ticks = [m * 10.0**d for d in decades for m in steps if self.low <= m * 10.0**d <= self.high]
                if len(ticks) >= 3:
                    return ticks[:: -(-len(ticks) // 8)]
            if len(ticks) >= 2:
                return ticks
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        return [i * step for i in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


class Line(NamedTuple):
    """One group in a panel: SVG points of its line and its band (empty for one seed), and what the line ends at."""

    group: int
    points: str
    band: str
    n: int
    end: float


class Panel(NamedTuple):
    """One metric: everything that the template draws."""

    metric: str
    x: Scale
    y: Scale
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    floor: float | None  # where pure noise would lie
    notes: list[str]


def panel(metric: str, groups: list[Group]) -> Panel | None:
    """The panel of a metric; None if no run logged it."""
    points = int(np.clip(POINTS / len(groups), 30, 240))
    bands = {i: b for i, g in enumerate(groups) if (b := of_group(g, metric, points)) is not None}
    if not bands:
        return None
    log = metric.startswith(("snr", "dsnr")) and all((b.low > 0).all() for b in bands.values())
    x = Scale(*spread([np.zeros(1), *(b.steps for b in bands.values())], pad=0), LEFT, WIDTH - RIGHT)
    y = Scale(*y_range(bands, log), HEIGHT - BOTTOM, TOP, log)
    lines = []
    for i, b in bands.items():
        at = x(b.steps)
        edge = path(np.r_[at, at[::-1]], y(np.r_[b.high, b.low[::-1]])) if b.n > 1 else ""
        lines.append(Line(i, path(at, y(b.mean)), edge, b.n, float(b.mean[-1])))
    floor = noise_floor(metric, groups)
    return Panel(metric, x, y, marks(x), marks(y), lines, floor and shown_at(y, floor), notes(bands))


def spread(arrays: list[np.ndarray], pad: float) -> tuple[float, float]:
    """Smallest and largest of all, never equal, with a margin."""
    low, high = min(float(a.min()) for a in arrays), max(float(a.max()) for a in arrays)
    margin = pad * (high - low) or (0 if high > low else 0.5 * abs(low) or 0.5)
    return low - margin, high + margin


def y_range(bands: dict[int, Band], log: bool) -> tuple[float, float]:
    """All values on a logarithmic axis; on a linear one those after the runs' steep start."""
    if log:
        low, high = spread([np.log(v) for b in bands.values() for v in (b.low, b.high)], pad=0.05)
        return math.exp(low), math.exp(high)
    start = EARLY * max(float(b.steps[-1]) for b in bands.values())
    late = [v[b.steps >= start] for b in bands.values() for v in (b.low, b.high)]
    return spread([v for v in late if len(v)], pad=0.06)


def path(x: np.ndarray, y: np.ndarray) -> str:
    """Coordinates as SVG's `points`."""
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def marks(scale: Scale) -> list[tuple[float, str]]:
    """(coordinate, label) of the ticks."""
    ticks = scale.ticks()
    return [(round(float(scale(np.array(t))), 1), label(t)) for t in ticks]


def label(value: float) -> str:
    """A tick's number: 20k for 20000, with a real minus."""
    text = f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.6g}"
    return text.replace("-", "\N{MINUS SIGN}")


def noise_floor(metric: str, groups: list[Group]) -> float | None:
    """The SNR of pure noise, if all runs have the same (which they have not at different numbers of draws)."""
    curves = [c for g in groups for run in g.runs if (c := run.curves.get(f"{metric}_floor")) is not None]
    values = np.concatenate([c.values for c in curves]) if curves else np.zeros(0)
    return float(values[0]) if len(values) and np.allclose(values, values[0], rtol=1e-6) else None


def shown_at(scale: Scale, value: float) -> float | None:
    """The coordinate of a value, or None if it lies outside."""
    return float(scale(np.array(value))) if scale.low <= value <= scale.high else None


def notes(bands: dict[int, Band]) -> list[str]:
    """What was done to the values before they were drawn."""
    out = []
    if (averaged := max(b.averaged for b in bands.values())) > 1:
        out.append(f"each point is the mean of up to {averaged} logged values")
    if any(b.interpolated for b in bands.values()):
        out.append("seeds logged at different steps are interpolated")
    return out

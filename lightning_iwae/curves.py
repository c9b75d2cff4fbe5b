"""Pictures of metrics.csv: bounds, gaps and effective sample size over training, and gradients' signal-to-noise."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .figures import COLOURS, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .laboratory import Row as Measured
    from .laboratory import Slope

Row = Mapping[str, str]
SIDES = {"phi": "inference network (phi)", "theta": "generative network (theta)"}
BOUNDS = {  # name -> label, colour, line
    "train/bound_theta": ("training, theta's bound", COLOURS[5], "-"),
    "train/bound_phi": ("training, phi's bound", COLOURS[2], "--"),
    "val/elbo": ("ELBO", COLOURS[4], ".-"),
    "val/iwae_64": ("L_64", COLOURS[0], ".-"),
    "val/log_px": ("log p(x)", COLOURS[1], ".-"),
    "val/exact_log_px": ("log p(x), exact", "black", ":"),
}
GAPS = {
    "val/kl_q_posterior": ("log p(x) - ELBO", COLOURS[4], ".-"),
    "val/kl_is_64": ("log p(x) - L_64", COLOURS[0], ".-"),
}
ESS = {"train/ess": ("training", COLOURS[5], "-"), "val/ess": ("validation", COLOURS[1], ".-")}


def read(path: Path) -> list[Row]:
    """The rows of a metrics.csv; none if there is no such file."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def column(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values (n,) of the rows that have a finite value of this name."""
    pairs = [(float(row["step"]), float(row[name])) for row in rows if row.get(name) and row.get("step")]
    finite = [pair for pair in pairs if math.isfinite(pair[1])]
    steps, values = np.array(finite).reshape(-1, 2).T
    return steps, values


def blocks(steps: np.ndarray, values: np.ndarray, most: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points (n,): means over as many neighbours as it takes; the last block may be short."""
    size = -(-len(steps) // most) or 1
    starts = np.arange(0, len(steps), size)
    counts = np.diff([*starts, len(steps)])
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def training(rows: Sequence[Row]) -> "Figure":
    """Bounds, the gaps between log p(x) and them, and the ESS, over steps. Bounds of the first tenth may be cut off."""
    drawn = figure(4.6)
    axes = drawn.subplot_mosaic([["bounds", "gaps"], ["bounds", "ess"]], width_ratios=[1.5, 1], sharex=True)
    shown = _lines(axes["bounds"], rows, BOUNDS)
    _lines(axes["gaps"], rows, GAPS)
    ess = [values for _, values in _lines(axes["ess"], rows, ESS, 100)]
    if ess and 0 < 10 * min(map(np.min, ess)) < max(map(np.max, ess)):
        _logarithmic(axes["ess"])
    axes["bounds"].set(title="Bounds on log p(x) (nats)", xlabel="step")
    axes["gaps"].set(title="Gaps to log p(x) (nats)")
    axes["ess"].set(title="Effective sample size (% of particles)", xlabel="step")
    end = max((steps[-1] for steps, _ in shown), default=0)
    late = np.concatenate([np.empty(0), *(values[steps >= end / 10] for steps, values in shown)])
    if len(late) and late.max() > late.min():
        margin = 0.05 * (late.max() - late.min())
        axes["bounds"].set_ylim(late.min() - margin, late.max() + margin)
    return drawn


def _lines(
    axis: "Axes", rows: Sequence[Row], names: Mapping[str, tuple[str, str, str]], scale: float = 1
) -> list[tuple[np.ndarray, np.ndarray]]:
    shown = []
    for name, (label, colour, line) in names.items():
        steps, values = blocks(*column(rows, name))
        if len(steps):
            shown.append((steps, scale * values))
            axis.plot(*shown[-1], line, color=colour, lw=1.5, label=label)
    axis.grid(alpha=0.25)
    if shown:
        axis.legend(fontsize=9)
    return shown


def _logarithmic(axis: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())


def signal_to_noise(runs: Mapping[str, Sequence[Row]], ratios: Sequence[str] = ("snr",)) -> "Figure":
    """SNR (and DSNR) of phi's and theta's gradient over steps: the mean over parameters, their quartiles as a band, and
    what pure noise would show, dotted. Of a single run the other estimators that were measured too, dashed.

    Args:
        runs: label -> rows; one colour each.
        ratios: "snr", "dsnr" or both, a row of panels each.
    """
    drawn = figure(0.3 + 3.2 * len(ratios))
    axes = drawn.subplots(len(ratios), 2, sharex=True, squeeze=False)
    for line, ratio in zip(axes, ratios, strict=True):
        for axis, (side, title) in zip(line, SIDES.items(), strict=True):
            for (label, rows), colour in zip(runs.items(), COLOURS, strict=False):
                _ratio(axis, rows, f"{ratio}/{side}", label, colour)
            if len(runs) == 1:
                _others(axis, next(iter(runs.values())), f"{ratio}/{side}/")
            axis.set_title(title, fontsize=11)
            axis.grid(alpha=0.25)
        line[0].set_ylabel(f"{ratio.upper()} of one gradient estimate")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    if len(runs) > 1:
        axes[0, 0].legend(ncols=2, fontsize=9)
    return drawn


def snr_over_grid(rows: Sequence["Measured"], slopes: Sequence["Slope"] = ()) -> "Figure":
    """SNR of the laboratory's rows against K at M = 1 (left) and against M at one K (right), phi above, theta below.

    Intervals as bands; hollow where they reach 0; theory black and dashed; what pure noise would show dotted; the
    slopes fitted in the legends. An estimator has one colour throughout.
    """
    drawn = figure(7.6)
    axes = drawn.subplots(2, 2, sharex="col", sharey="row", squeeze=False, width_ratios=[1.35, 1])
    shades = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(map(_estimator, rows)))}
    several = {r.K for r in rows if r.M > 1}
    for line, (side, title) in zip(axes, SIDES.items(), strict=True):
        for axis, name in zip(line, ("K", "M"), strict=True):
            own = [r for r in rows if r.side == side and (r.M == 1 if name == "K" else r.K in several)]
            fitted = {_estimator(s): s.slope for s in slopes if (s.side, s.axis) == (side, name)}
            _grid_panel(axis, own, name, fitted, shades)
            at = "M = 1" if name == "K" else f"K = {', '.join(map(str, sorted(several)))}"
            axis.set_title(f"{title}, {at}", fontsize=10.5)
        line[0].set_ylabel("SNR of one gradient estimate")
        _grid_limits(line[0], [r for r in rows if r.side == side])
    axes[1, 0].set_xlabel("particles K")
    axes[1, 1].set_xlabel("groups M")
    return drawn


def _estimator(of: "Measured | Slope") -> str:
    return f"{of.estimator} {of.options}".strip()


def _grid_panel(
    axis: "Axes", rows: Sequence["Measured"], name: str, fitted: Mapping[str, float], shades: Mapping[str, str]
) -> None:
    theory = "theory"
    for estimator in (e for e in shades if e in map(_estimator, rows)):
        own = sorted((r for r in rows if _estimator(r) == estimator), key=lambda r: getattr(r, name))
        known = [(getattr(r, name), r.theory) for r in own if r.theory]
        own = [r for r in own if _seen(r)]
        at, colour = [getattr(r, name) for r in own], shades[estimator]
        label = estimator + (f"  {fitted[estimator]:+.2f}" if estimator in fitted else "")
        faces = [colour if r.snr_lo > 0 else "white" for r in own]
        axis.plot(at, [r.snr for r in own], "-", color=colour, lw=1.6, label=label)
        axis.scatter(at, [r.snr for r in own], s=20, c=faces, edgecolors=colour, zorder=3)
        least = [max(r.snr_lo, r.snr / 1e3) for r in own]
        axis.fill_between(at, least, [r.snr_hi for r in own], color=colour, alpha=0.18, lw=0)
        if len(known) > 1:
            axis.plot(*zip(*known, strict=True), "--", color="black", lw=1, zorder=2.5, label=theory)
            theory = "_"
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(ticks := sorted({getattr(r, name) for r in rows}), [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    if rows:
        axis.axhline(rows[0].snr_floor, color="grey", ls=":", lw=1.2, zorder=0)
        axis.legend(fontsize=8, title="slope fitted" if fitted else None, title_fontsize=8, loc="upper left")


def _seen(row: "Measured") -> bool:
    """Whether there is something to show, and not what is left of noise once it is taken off."""
    return row.snr > row.snr_floor / 5


def _grid_limits(axis: "Axes", rows: Sequence["Measured"]) -> None:
    """Round all that is shown, with room above for the legend; what pure noise would show named."""
    shown = [value for r in rows if _seen(r) for value in (r.snr, r.theory or 0) if value > 0]
    if not shown:
        return
    low, high = math.log10(min(shown)), math.log10(max(shown))
    room = 0.11 * min(6, 1 + len({r.estimator for r in rows}))
    axis.set_ylim(10 ** (low - 0.12), 10 ** (high + room * max(high - low, 1)))
    axis.yaxis.set_major_formatter("{x:g}")
    place = axis.get_yaxis_transform()  # x in fractions of the panel
    floor = rows[0].snr_floor
    axis.text(
        0.01, floor, "pure noise, uncorrected", transform=place, va="bottom", color="grey", fontsize=8, clip_on=True
    )


def _others(axis: "Axes", rows: Sequence[Row], prefix: str) -> None:
    """The estimators that were measured beside the one that is trained with."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if name.startswith(prefix) and value)
    for i, name in enumerate(names):
        colour, line = COLOURS[1 + i % (len(COLOURS) - 1)], ("--", "-.", ":")[i // (len(COLOURS) - 1) % 3]
        steps, values = column(rows, name)
        marker = "o" if len(steps) == 1 else None
        axis.plot(steps, values, line, color=colour, lw=1.5, marker=marker, label=name.removeprefix(prefix))
    if names:
        axis.lines[0].set_label("trained with")
        axis.legend(fontsize=8, ncols=2)


def _ratio(axis: "Axes", rows: Sequence[Row], name: str, label: str, colour: str) -> None:
    steps, values = column(rows, name)
    if not len(steps):
        return
    axis.plot(steps, values, color=colour, lw=1.8, label=label, marker="o" if len(steps) == 1 else None)
    (below, low), (above, high) = (column(rows, f"{name}_q{p}") for p in (25, 75))
    if len(below) == len(above) == len(steps):
        axis.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
    _logarithmic(axis)
    floor = column(rows, f"{name}_floor")[1]
    if len(floor) and not axis.texts:
        axis.axhline(floor[0], color="grey", ls=":", lw=1.2)
        place = axis.get_yaxis_transform()  # x in fractions of the panel
        axis.text(0.99, floor[0], "pure noise", transform=place, ha="right", va="bottom", color="grey")

"""Pictures of performance.json: a step's time in each way, and time and memory against K."""

import statistics
from typing import TYPE_CHECKING

from lightning_iwae import figures

from . import step, ways
from .targets import Results, found
from .timing import spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = dict(zip(step.AGAINST_K, figures.COLOURS, strict=False))


def drawn(results: Results) -> dict[str, bytes]:
    """Files by name, of what was measured."""
    files = {}
    if "step" in results:
        files["performance_step.png"] = bars(found(results, "step"))
    if "cost" in results:
        files["performance_cost.png"] = against_k(results)
    return files


def bars(points: list[dict]) -> bytes:
    """Median and quartiles of each way's time at batch 128, or the largest; the fastest at the bottom."""
    point = next((p for p in points if p["batch"] == 128), points[-1])
    times = sorted(point["times"].items(), key=lambda way: statistics.median(way[1]))
    drawn = figures.figure(0.8 + 0.32 * len(times))
    axis = drawn.add_subplot()
    for i, (name, seconds) in enumerate(times):
        low, median, high = spread([1e3 * value for value in seconds])
        ours = name.startswith(ways.OURS) and name != ways.TWO_GRADS_OURS
        limit = name.startswith((ways.BY_HAND, step.EACH, step.BEST))
        colour = figures.COLOURS[0] if ours else "0.8" if limit else figures.COLOURS[5]
        axis.barh(i, median, color=colour, xerr=[[median - low], [high - median]], error_kw={"lw": 1, "capsize": 2})
        axis.text(high, i, f"  {median:.0f}", va="center", fontsize=9)
    axis.set_yticks(range(len(times)), [name for name, _ in times])
    axis.set(title=f"A step at batch {point['batch']}, {point['samples']} samples: median, quartiles", xlabel="ms")
    axis.spines[["top", "right"]].set_visible(False)
    return figures.png(figures.render(drawn))


def against_k(results: Results) -> bytes:
    """Time left, and where it was measured peak memory right, both axes logarithmic."""
    rows = found(results, "cost")
    peaks = [row for row in found(results, "memory") if "peak" in row] if "memory" in results else []
    drawn = figures.figure(4.2)
    axes = drawn.subplots(1, 2 if peaks else 1, squeeze=False)[0]
    for way, colour in COLOURS.items():
        own = [(row["samples"], row["times"][way]) for row in rows if way in row["times"]]
        line(axes[0], way, colour, [(K, 1e3 * statistics.median(seconds)) for K, seconds in own])
        if peaks:
            line(axes[1], way, colour, [(row["samples"], row["peak"] / 2**20) for row in peaks if row["way"] == way])
    axes[0].set(title=f"A step at batch {rows[0]['batch']} (ms)", xlabel="K")
    if peaks:
        axes[1].set(title="Peak memory of the process (MiB)", xlabel="K")
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figures.png(figures.render(drawn))


def line(axis: "Axes", label: str, colour: str, points: list[tuple[int, float]]) -> None:
    """Of one way, if there is something of it."""
    if points:
        axis.plot(*zip(*points, strict=True), "o-", color=colour, ms=4, lw=1.5, label=label)
    axis.set(xscale="log", yscale="log")
    axis.grid(alpha=0.25, which="major")

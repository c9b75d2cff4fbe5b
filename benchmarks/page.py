"""docs/performance.md and its pictures, from performance.json: every figure in them is computed here."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import fit, log_px, pictures, scaling, step, ways
from .targets import TARGETS, Results, found
from .timing import Spread, ratios, spread

MIB = 2**20
LINKS = [  # n, link, seconds a hop, bytes a second, seconds of compute a step: assumed, but for the CPU's
    (8, "8 GPUs, NVLink", 5e-6, 150e9, 3e-3),
    (8, "8 GPUs, PCIe 4", 10e-6, 12e9, 3e-3),
    (8, "8 nodes of a GPU, 100 Gb/s InfiniBand", 10e-6, 11e9, 3e-3),
    (8, "8 nodes of a GPU, 10 Gb/s Ethernet", 50e-6, 1.1e9, 3e-3),
    (64, "8 nodes of 8 GPUs, 100 Gb/s InfiniBand", 10e-6, 11e9, 3e-3),
    (8, "8 nodes on CPU, 10 Gb/s Ethernet", 50e-6, 1.1e9, None),
]


def write(out: Path) -> None:
    """Page and pictures beside the results."""
    results = json.loads((out / "performance.json").read_text())
    (out / "performance.md").write_text(render(results))
    for name, png in pictures.drawn(results).items():
        (out / name).write_bytes(png)


def render(results: Results) -> str:
    """The page's text. Sections that were not measured are left out."""
    folder = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=False)
    folder.keep_trailing_newline = True
    tables: dict[str, Callable] = {
        "cost": cost,
        "chunks": in_chunks,
        "memory": memory,
        "log_px": of_log_px,
        "fit": of_fit,
    }
    parts = {name: table(found(results, name)) if name in results else None for name, table in tables.items()}
    points = found(results, "step") if "step" in results else []
    return folder.get_template("page.md.jinja").render(
        machine=machine(results),
        quick=any(section["quick"] for section in results.values()),
        verdicts=[verdict(target, results) for target in TARGETS],
        ours=ways.OURS,
        chunk=ways.CHUNK,
        each=step.EACH,
        best=step.BEST,
        steps=[{**point, "rows": against(point["times"], point["skipped"], ways.OURS)} for point in points],
        products=products(points),
        operations=found(results, "operations") if "operations" in results else None,
        scaling=of_scaling(found(results, "scaling")) if "scaling" in results else None,
        estimates=estimates(points),
        **parts,
    )


# ------------------------------------------------------------------------------------------------ numbers
def number(value: float) -> str:
    """Three digits."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def with_quartiles(values: Spread) -> str:
    """Median (quartiles), of one value only itself."""
    if values.low == values.high:
        return number(values.median)
    return f"{number(values.median)} ({number(values.low)} .. {number(values.high)})"


def ms(seconds: Sequence[float]) -> str:
    """Median, in milliseconds."""
    return number(1e3 * statistics.median(seconds))


def megabytes(size: float) -> str:
    """Of 10^6 bytes."""
    return f"{size / 1e6:.2f} MB"


# ------------------------------------------------------------------------------------------------ tables
def machine(results: Results) -> list[tuple[str, str]]:
    """What was measured on: where sections differ, each of the values."""
    values: dict[str, list[str]] = {}
    for section in results.values():
        for name, value in section["machine"].items():
            told = f"{value / 2**30:.0f} GiB" if name == "memory" else str(value)
            values.setdefault(name, [])
            values[name] += [told] if told not in values[name] else []
    return [(name, "; ".join(several)) for name, several in values.items()]


def verdict(target: Any, results: Results) -> tuple[str, ...]:
    """Text, bound, what was found, whether it is met, and the same by hand."""
    bound = f"{'≥' if target.at_least else '≤'} {target.wanted}"
    values, best = target.found(results), target.possible(results)
    possible = "" if best is None else number(best.median)
    if values is None:
        return target.text, bound, "", "not measured", possible
    return target.text, bound, with_quartiles(values), "met" if target.met(values) else "**not met**", possible


def against(times: dict, skipped: dict, reference: str) -> list[tuple[str, str, str]]:
    """Each way's milliseconds, and its time over the reference's; or why there are none."""
    rows = [(name, ms(own), with_quartiles(spread(ratios(own, times[reference])))) for name, own in times.items()]
    return rows + [(name, "", reason) for name, reason in skipped.items()]


def products(points: Sequence[dict]) -> dict | None:
    """Rates at batch 128, or the largest."""
    if not points:
        return None
    point = next((p for p in points if p["batch"] == 128), points[-1])
    rows = [(p["name"], number(p["flop"] / 1e9), p["way"], f"{p['rate'] / 1e9:.0f}") for p in point["products"]]
    return {"batch": point["batch"], "rows": rows}


def cost(rows: Sequence[dict]) -> dict:
    """Milliseconds, a row for each K and a column for each way."""

    def cell(row: dict, way: str) -> str:
        return ms(row["times"][way]) if way in row["times"] else row["skipped"].get(way, "")

    columns = list(step.AGAINST_K)
    lines = [(f"K = {row['samples']}", *(cell(row, way) for way in columns)) for row in rows]
    return {"batch": rows[0]["batch"], "columns": columns, "rows": lines}


def in_chunks(section: dict) -> list[tuple[str, str, str]]:
    """K, time, and time over K."""
    return [(K, ms(own), number(1e3 * statistics.median(own) / int(K))) for K, own in section["times"].items()]


def memory(rows: Sequence[dict]) -> dict:
    """MiB, likewise."""
    table: dict[int, dict[str, str]] = {}
    for row in rows:
        told = row.get("skipped") or f"{row['peak'] / MIB:.0f} ({(row['peak'] - row['idle']) / MIB:.0f})"
        table.setdefault(row["samples"], {})[row["way"]] = told
    columns = list(dict.fromkeys(row["way"] for row in rows))
    lines = [(f"K = {K}", *(cells[way] for way in columns)) for K, cells in table.items()]
    return {"batch": rows[0]["batch"], "columns": columns, "rows": lines}


def of_log_px(section: dict) -> dict:
    """Milliseconds an image, and what came out."""

    def estimate(name: str) -> str:
        values = section["values"].get(name, [])
        if len(values) < 2:
            return ""
        return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"

    times = {name: [seconds / section["images"] for seconds in own] for name, own in section["times"].items()}
    rows = against(times, section["skipped"], log_px.OURS)
    return section | {"rows": [(*row, estimate(row[0])) for row in rows]}


def of_fit(section: dict) -> dict:
    """A step of fit and loop, a measurement of the SNR; a step in a bare fit and its loop."""
    in_turns = (
        {
            fit.LOOP: "a step of the bare loop",
            fit.FIT: "a step of fit",
            fit.INSIDE: "of it, in `IWModule.training_step`",
            fit.SNR: f"a measurement of the SNR by {section['draws']} draws",
        },
        {
            fit.ITS_LOOP: "a step of the bare loop, in another process",
            fit.LEAST: "the same step in a fit by Lightning and no more",
        },
    )
    rows = []
    for names in in_turns:
        times = {told: section["times"][name] for name, told in names.items()}
        rows += against(times, {}, next(iter(times)))
    return section | {"rows": rows}


def of_scaling(rows: Sequence[dict]) -> list[tuple[str, ...]]:
    """Both ways, their ratio, and bytes."""
    reduced = scaling.SYNCHRONISED, scaling.MEETING
    return [
        (
            str(row["batch"]),
            *(ms(row["times"][name]) for name in (*reduced, scaling.ALONE)),
            *(with_quartiles(spread(ratios(row["times"][name], row["times"][scaling.ALONE]))) for name in reduced),
            megabytes(row["traffic"]),
        )
        for row in rows
    ]


def estimates(points: Sequence[dict]) -> list[tuple[str, ...]]:
    """What the all-reduce takes on several links, and what it adds to a step."""
    rows: list[tuple[str, ...]] = []
    for n, link, latency, bandwidth, assumed in LINKS:
        compute = assumed or next((statistics.median(p["times"][ways.OURS]) for p in points if p["batch"] == 128), None)
        if compute is None:
            continue
        seconds = scaling.all_reduce_seconds(n, latency, bandwidth)
        rows.append(
            (
                str(n),
                link,
                f"{1e6 * latency:.0f} µs",
                f"{bandwidth / 1e9:g} GB/s",
                f"{1e3 * seconds:.2f} ms",
                f"{1e3 * compute:.0f} ms",
                f"{100 * seconds / compute:.0f} %",
            )
        )
    return rows

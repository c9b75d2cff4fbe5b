"""Final figures of all groups, their tests against the reference, and what makes runs incomparable."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .groups import Group, canonical, shown
from .runs import FIGURES, Run
from .statistics import Summary, Welch, holm, paired, summarise, welch


class Kind(NamedTuple):
    """What a figure is called, its unit, and which way is better (+1 up, -1 down, 0 neither)."""

    label: str
    unit: str
    better: int


KINDS = {
    "iwae_64": Kind("L_64", "nats", 1),
    "log_px": Kind("log p(x)", "nats", 1),
    "elbo": Kind("ELBO", "nats", 1),
    "kl_q_posterior": Kind("KL(q ‖ posterior)", "nats", -1),
    "kl_is_64": Kind("log p(x) \N{MINUS SIGN} L_64", "nats", -1),
    "ess": Kind("ESS", "fraction", 1),
    "active_units": Kind("active units", "count", 0),
    "rate": Kind("rate", "nats", 0),
    "distortion": Kind("distortion", "nats", 0),
    "log_px_ais": Kind("log p(x) by AIS", "nats", 1),
    "ais_minus_is": Kind("AIS \N{MINUS SIGN} log p(x), same data", "nats", 0),
    "bdmc_gap": Kind("BDMC gap", "nats", 0),
}
# of evaluation.json: figures at different values of these do not compare
ABOUT = {
    "data": "data",
    "binarization": "binarisation of the data",
    "particles": "number of test particles",
    "version": "version of lightning_iwae",
    "device": "device",
    "ais": "settings of annealed importance sampling",
    "bdmc": "settings of bidirectional Monte Carlo",
}
# of config.yaml, by the ends of keys: the same for what is logged along a run
MEASURED = {
    "Evaluation.particles": "particles of val/log_px and val/ess",
    "Evaluation.size": "validation data of val/log_px and val/ess",
    "GradientSNR.size": "data in the probe of the SNR",
    "GradientSNR.draws": "draws of the SNR",
}


class Test(NamedTuple):
    """One group's figure against the reference's."""

    group: int
    figure: str
    welch: Welch
    adjusted: float  # Holm's p over all tests of the report
    pairs: int  # seeds that both groups have
    paired: float | None  # p by these pairs, not adjusted


class Results(NamedTuple):
    """The table of final figures."""

    figures: list[str]  # columns
    cells: list[dict[str, Summary]]  # a row a group
    tests: dict[tuple[int, str], Test]
    best: dict[str, int]  # figure -> the group with the best mean
    decimals: dict[str, int]

    def text(self, figure: str, value: float, sign: bool = False) -> str:
        """A number with its column's decimals and a real minus."""
        return f"{value:{'+' if sign else ''}.{self.decimals[figure]}f}".replace("-", "\N{MINUS SIGN}")


def kind(figure: str) -> Kind:
    """What is known of a figure; one of a user's own goes by its key."""
    return KINDS.get(figure, Kind(figure, "", 0))


def results(groups: list[Group], reference: Group) -> Results:
    """Summaries of every figure and group, and Welch's tests against the reference where both have two seeds."""
    present = {name for g in groups for run in g.runs for name in run.figures}
    figures = [name for name in FIGURES if name in present] + sorted(present - set(FIGURES))
    values = [{name: values_of(g, name) for name in figures} for g in groups]
    cells: list[dict[str, Summary]] = []
    for g, row in zip(groups, values, strict=True):
        found = {f: summarise(v, [run.figures[f].se for run in g.runs if f in run.figures]) for f, v in row.items()}
        cells.append({f: s for f, s in found.items() if s is not None})
    base = values[groups.index(reference)]
    tested = {
        (i, f): w
        for i, row in enumerate(values)
        for f in figures
        if groups[i] is not reference and (w := welch(row[f], base[f])) is not None
    }
    adjusted = holm([w.p for w in tested.values()])
    tests = {
        (i, f): Test(i, f, w, p, *by_seed(groups[i], reference, f))
        for ((i, f), w), p in zip(tested.items(), adjusted, strict=True)
    }
    return Results(figures, cells, tests, best(figures, cells), {f: decimals(f, cells) for f in figures})


def values_of(g: Group, figure: str) -> list[float]:
    """One value a seed."""
    return [run.figures[figure].mean for run in g.runs if figure in run.figures]


def by_seed(g: Group, reference: Group, figure: str) -> tuple[int, float | None]:
    """Number of seeds in common, and p of the differences between runs of one seed.

    A seed fixes the data's split and binarisation too, so that its runs are alike, and their difference varies less.
    """
    a, b = ({run.seed: run.figures[figure].mean for run in x.runs if figure in run.figures} for x in (g, reference))
    seeds = [seed for seed in a if seed in b and seed is not None]
    return len(seeds), paired([a[seed] for seed in seeds], [b[seed] for seed in seeds])


def best(figures: list[str], cells: list[dict[str, Summary]]) -> dict[str, int]:
    """The group with the best mean of each figure that has a better side, of two groups or more."""
    out = {}
    for figure in figures:
        means = {i: cell[figure].mean * kind(figure).better for i, cell in enumerate(cells) if figure in cell}
        if kind(figure).better and means and max(means.values()) - min(means.values()) > 1e-9:
            out[figure] = max(means, key=lambda i: means[i])
    return out


def decimals(figure: str, cells: list[dict[str, Summary]]) -> int:
    """So many that the typical spread has two significant digits."""
    found = [cell[figure] for cell in cells if figure in cell]
    spreads = [s for c in found if (s := c.sd or c.se) and s > 1e-9 * abs(c.mean)]  # not of rounding alone
    if not spreads:
        return 0 if all(float(c.mean).is_integer() for c in found) else 2
    return int(np.clip(1 - math.floor(math.log10(np.median(spreads))), 0, 5))


# ---------------------------------------------------------------------------------------------- comparability
def warnings(groups: list[Group], runs: list[Run]) -> list[str]:
    """Sentences on what a reader should know before comparing."""
    out = [
        differing(label, [(run, shown(run.about[key])) for run in runs if key in run.about])
        for key, label in ABOUT.items()
    ]
    for key, what in MEASURED.items():
        ending = f"callbacks.{key}"
        values = [(run, shown(v)) for run in runs for k, v in run.settings.items() if k.endswith(ending)]
        out.append(differing(what, values))
    keys = {key for run in runs for key in run.settings if key.startswith("data.") and key != "data.batch_size"}
    for key in sorted(keys):
        out.append(differing(key, [(run, canonical(run.settings.get(key))) for run in runs if run.settings]))
    if others := [of_another_step(run) for run in runs if evaluated_elsewhere(run)]:
        out.append(f"Not of the best checkpoint, test again: {listed(others, separator='; ')}.")
    if repeats := [f"{run.path} (seed {run.seed}, {g.name})" for g in groups for run in g.repeats]:
        out.append(f"Same settings and same seed as another run, so left out of every figure: {listed(repeats)}.")
    seeds = {tuple(sorted(run.seed for run in g.evaluated if run.seed is not None)) for g in groups if g.evaluated}
    if len(seeds) > 1:
        out.append("The groups were not run with the same seeds.")
    return [sentence for sentence in out if sentence]


def evaluated_elsewhere(run: Run) -> bool:
    """Whether evaluation.json is of other weights than best.ckpt holds now, by their steps."""
    return run.best_step is not None and "step" in run.about and run.about["step"] != run.best_step


def of_another_step(run: Run) -> str:
    """What evaluation.json is of, and what it should be of."""
    checkpoint, step = run.about.get("checkpoint"), run.about["step"]
    of = f"of {checkpoint} at step {step}" if checkpoint else "of no checkpoint"
    return f"{run.path.name}, whose evaluation.json is {of} and best.ckpt of step {run.best_step}"


def differing(what: str, values: Iterable[tuple[Run, str]]) -> str:
    """A warning if the runs have more than one value."""
    by_value: dict[str, list[str]] = defaultdict(list)
    for run, value in values:
        by_value[value].append(run.path.name)
    if len(by_value) < 2:
        return ""
    parts = [f"{value} in {listed(names, 3)}" for value, names in by_value.items()]
    return f"Not comparable, by the {what}: {listed(parts, 4, '; ')}."


def listed(items: list[str], most: int = 6, separator: str = ", ") -> str:
    """The first few, and how many more there are."""
    more = f"{separator}and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more

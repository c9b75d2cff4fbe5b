"""The report as one HTML page: the template's content, and nothing from outside the page."""

from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup, escape

from . import curves, markdown, pictures
from .groups import Group, canonical, shown
from .results import Results, kind
from .runs import CURVES, UNTESTED, Run

COLOURS = 8  # Okabe and Ito's; more groups than that are grey
STRIP = 24  # groups in a strip plot at most
TITLES = {
    "val/log_px": "log p(x), validation",
    "val/iwae_64": "L_64, validation",
    "val/elbo": "ELBO, validation",
    "train/bound_theta": "theta's bound, training",
    "val/kl_q_posterior": "KL(q ‖ posterior), validation",
    "val/ess": "ESS, validation",
    "snr/phi": "SNR of phi's gradient",
    "snr/theta": "SNR of theta's gradient",
    "dsnr/phi": "DSNR of phi's gradient",
    "dsnr/theta": "DSNR of theta's gradient",
}
UNITS = {"val/ess": "fraction of the particles", "train/bound_theta": "nats; each group's own bound"}


class Strip(NamedTuple):
    """One final figure with a dot a seed: rows of (group, mean's coordinate, seeds' coordinates)."""

    figure: str
    scale: curves.Scale
    ticks: list[tuple[float, str]]
    rows: list[tuple[int, float, list[float]]]
    height: int


def render(
    out: Path,
    title: str,
    command: str,
    groups: list[Group],
    reference: Group,
    results: Results,
    warnings: list[str],
    runs: list[Run],
) -> str:
    """The whole page; `out` is where it will lie, for its links."""
    chosen = coloured(groups, reference, results)
    colour = {i: n for n, i in enumerate(chosen)}
    gallery, unseen = pictures.gallery(groups, chosen)
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "p": markdown.p_value, "sub": sub}
    number = {id(run): i for i, g in enumerate(groups) for run in g.runs + g.repeats}
    content: dict[str, Any] = {
        "title": title,
        "command": command,
        "subtitle": subtitle(groups, runs),
        "groups": groups,
        "reference": groups.index(reference),
        "results": results,
        "kind": kind,
        "spread": markdown.spread,
        "explanation": markdown.explanation(groups, reference, results),
        "warnings": warnings + unseen,
        "damaged": [run for run in runs if run.damaged],
        "untested": [run for run in runs if run.untested],
        "UNTESTED": UNTESTED,
        "runs": runs,
        "number": {id(run): number.get(id(run)) for run in runs},
        "id": id,
        "colour": colour,
        "row_order": ranked(groups, results) if len(groups) > COLOURS else chosen,
        "keys": list(groups[0].settings),
        "common": common(runs),
        "strips": [strip(f, groups, chosen[:STRIP], results) for f in results.figures],
        "panels": [p for metric in CURVES if (p := curves.panel(metric, groups)) is not None],
        "in_front": lambda lines: sorted(lines, key=lambda line: (line.group in colour, -line.group)),
        "titles": TITLES,
        "units": UNITS,
        "summary": summary,
        "gallery": gallery,
        "link": lambda path: pictures.link(path, out),
        "w": curves.WIDTH,
        "h": curves.HEIGHT,
        "box": (curves.LEFT, curves.TOP, curves.WIDTH - curves.RIGHT, curves.HEIGHT - curves.BOTTOM),
    }
    return environment.get_template("page.html").render(content)


def coloured(groups: list[Group], reference: Group, results: Results) -> list[int]:
    """Groups with a colour of their own: all in their order, or the best by log p(x) and the reference."""
    if len(groups) <= COLOURS:
        return list(range(len(groups)))
    best, at = ranked(groups, results), groups.index(reference)
    return best[:COLOURS] if at in best[:COLOURS] else [*best[: COLOURS - 1], at]


def ranked(groups: list[Group], results: Results) -> list[int]:
    """Groups by log p(x): on the test data, then those that have only its last value in training, then the others."""
    last = [[run.curves["val/log_px"].values[-1:] for run in g.runs if "val/log_px" in run.curves] for g in groups]
    trained = [float(np.mean(np.concatenate(v))) if v and all(map(len, v)) else -np.inf for v in last]
    tested = [cell["log_px"].mean if "log_px" in cell else -np.inf for cell in results.cells]
    return sorted(range(len(groups)), key=lambda i: (-tested[i], -trained[i]))


def subtitle(groups: list[Group], runs: list[Run]) -> str:
    """How many runs of what."""
    parts = [f"{len(runs)} run{'s' * (len(runs) != 1)} in {len(groups)} group{'s' * (len(groups) != 1)}"]
    for key, form in (("data", "{}"), ("binarization", "{} binarisation"), ("particles", "{} test particles")):
        values = {str(run.about[key]) for run in runs if key in run.about}
        parts += [form.format(*values)] if len(values) == 1 else []
    return "; ".join(parts)


def common(runs: list[Run]) -> dict[str, Any]:
    """Settings that all readable runs share."""
    readable = [run.settings for run in runs if run.settings]
    return {
        key: value
        for key, value in readable[0].items()
        if all(key in other and canonical(other[key]) == canonical(value) for other in readable)
    }


def strip(figure: str, groups: list[Group], chosen: list[int], results: Results) -> Strip:
    """Each seed's final figure as a dot, each group's mean as a bar."""
    values = {i: np.array([r.figures[figure].mean for r in groups[i].runs if figure in r.figures]) for i in chosen}
    values = {i: v for i, v in values.items() if len(v)}
    scale = curves.Scale(*(curves.spread(list(values.values()), pad=0.08) if values else (0.0, 1.0)), 8, 292)
    rows = [(i, float(scale(v.mean())), scale(v).tolist()) for i, v in values.items()]
    ticks = curves.marks(scale)
    return Strip(figure, scale, ticks[:: -(-len(ticks) // 5)], rows, 14 * len(rows) + 26)


def summary(panel: curves.Panel, groups: list[Group], colour: dict[int, int]) -> str:
    """A panel in words, for those who do not see it."""
    ends = [f"{groups[line.group].name} at {curves.label(line.end)}" for line in panel.lines if line.group in colour]
    return f"{TITLES[panel.metric]}, against the step. Ends: {', '.join(ends)}."


def sub(text: str) -> Markup:
    """L_64 with its index below, escaped."""
    return Markup(str(escape(text)).replace("L_64", "L<sub>64</sub>"))

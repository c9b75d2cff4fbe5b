"""The report as Markdown tables."""

import re

from .groups import Group, shown
from .results import Results, kind
from .runs import UNTESTED, Run
from .statistics import Summary


def document(
    title: str, groups: list[Group], reference: Group, results: Results, warnings: list[str], runs: list[Run]
) -> str:
    """Final figures, their notes, the settings that differ, and what could not be read."""
    damaged, untested = [r for r in runs if r.damaged], [r for r in runs if r.untested]
    parts = [f"# {escape(title)}", *(f"> {escape(w)}" for w in warnings)]
    if results.figures:
        parts += [figures_table(groups, reference, results), note(groups, reference, results)]
    keys = list(groups[0].settings)
    if keys:
        rows = [[escape(g.name), *(code(shown(g.settings[key])) for key in keys)] for g in groups]
        parts += ["## Settings that differ", table(["group", *map(code, keys)], rows)]
    if damaged:
        parts += ["## Unfinished or damaged", "\n".join(f"- {code(r.path)}: {problems(r)}" for r in damaged)]
    if untested:
        parts += [f"## {len(untested)} {escape(UNTESTED)}", "\n".join(f"- {code(r.path)}" for r in untested)]
    return "\n\n".join(parts) + "\n"


def problems(run: Run) -> str:
    """What is wrong with a run, in one line."""
    return escape("; ".join(run.problems))


def figures_table(groups: list[Group], reference: Group, results: Results) -> str:
    """Groups by figures: mean and spread, the best mean bold, p-values below."""
    head = ["group", "seeds", *(heading(figure) for figure in results.figures)]
    rows = []
    for i, g in enumerate(groups):
        name = escape(g.name) + (" (reference)" if g is reference and results.tests else "")
        seeds = len(g.evaluated)
        rows.append([name, str(seeds), *(cell(results, i, figure, seeds) for figure in results.figures)])
    return table(head, rows)


def heading(figure: str) -> str:
    """A column's label and unit."""
    label, unit, _ = kind(figure)
    return escape(f"{label} ({unit})" if unit else label)


def cell(results: Results, group: int, figure: str, seeds: int) -> str:
    """`**-22.05 ± 0.08**, p = 0.012*`."""
    summary = results.cells[group].get(figure)
    if summary is None:
        return "\N{EN DASH}"
    text = spread(results, figure, summary, seeds)
    text = f"**{text}**" if results.best.get(figure) == group else text
    test = results.tests.get((group, figure))
    star = r" \*" if test is not None and test.adjusted < 0.05 else ""
    return text if test is None else f"{text}; p {p_value(test.adjusted)}{star}"


def spread(results: Results, figure: str, summary: Summary, seeds: int) -> str:
    """Mean ± sd over seeds; of one seed mean (± standard error of the evaluation). Says if it is of fewer seeds."""
    mean = results.text(figure, summary.mean)
    fewer = f" (n={summary.n})" if summary.n != seeds else ""
    if summary.sd is not None:
        return f"{mean} ± {results.text(figure, summary.sd)}{fewer}"
    return mean + ("" if summary.se is None else f" (± {results.text(figure, summary.se)})") + fewer


def p_value(p: float) -> str:
    """`= 0.012`, or `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.0995 else f"= {p:.2f}"


def note(groups: list[Group], reference: Group, results: Results) -> str:
    """What ± means, and what was tested."""
    return "\n\n".join(map(escape, explanation(groups, reference, results)))


def explanation(groups: list[Group], reference: Group, results: Results) -> list[str]:
    """Sentences under the table, of the page and of the Markdown file."""
    summaries = [summary for row in results.cells for summary in row.values()]
    out = []
    if any(s.n > 1 for s in summaries):
        out.append("Mean ± standard deviation over seeds (n \N{MINUS SIGN} 1 in the denominator).")
    if any(s.n == 1 for s in summaries):
        out.append(
            "(± …) in brackets, of a single seed: the standard error of the evaluation over the test data, which says "
            "nothing of the spread between seeds; no test is made."
        )
    if results.best:
        out.append("Bold: the best mean, whatever its spread.")
    if results.tests:
        n = len(results.tests)
        out.append(
            f"p: Welch's two-sided t-test of a group's mean against that of {reference.name}, by Holm's method "
            f"adjusted for all {n} test{'s' * (n > 1)} of this report; * below 0.05. Runs are taken as independent. "
            "Where groups share seeds that is cautious, as a seed also fixes the split and binarisation of this "
            "package's data sets: tests by pairs of one seed are in the page's list of all tests."
        )
    elif len(groups) > 1:
        out.append(f"No tests against {reference.name}: they need two seeds or more on both sides, which vary.")
    return out


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column left, the others right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escape(text: str) -> str:
    """Text that Markdown takes as it stands."""
    text = re.sub(r"([\\`*|<>\[\]#])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def code(text: object) -> str:
    """Text as code; within a table a bar must still be escaped."""
    plain = " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{plain or ' '}`"

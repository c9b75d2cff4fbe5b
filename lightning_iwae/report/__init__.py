"""`python -m lightning_iwae report RUN...`: runs compared from their files alone, in one page and one table."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import NoReturn

DESCRIPTION = """Compare runs by what they wrote: config.yaml, metrics.csv, evaluation.json, figures/*.png.
Writes one HTML page that needs nothing else, and a Markdown table. Runs with equal settings and
different seeds form a group: mean and standard deviation over seeds, and Welch's t-test of each
group's final figures against a reference group."""


class Parser(argparse.ArgumentParser):
    """Mistakes become a ValueError instead of a usage dump."""

    def error(self, message: str) -> NoReturn:
        """The command line says it, in one line."""
        raise ValueError(f"report: {message}")


def parser() -> Parser:
    """The sub-command's arguments."""
    p = Parser(
        prog="lightning_iwae report",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's directory, or a directory of runs")
    p.add_argument("--out", type=Path, default=Path("."), help="directory, or a file that ends in .html or .md")
    p.add_argument("--reference", metavar="NAME", help="group that the others are tested against; default: the first")
    p.add_argument("--title", help="of the page")
    return p


def main(args: list[str]) -> None:
    """Run the sub-command; a mistake exits with status 2 and one message."""
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run(args: list[str]) -> None:
    """Read, compare, write both files, say where they are."""
    given = parser().parse_args(args)
    from . import markdown, page, runs  # only now: --help needs none of them
    from .groups import find_reference, group
    from .results import results, warnings

    html, text = outputs(given.out)
    found = [runs.read(path) for path in runs.find(given.runs)]
    groups = group(found)
    if not groups:
        told = "; ".join(f"{r.path}: {', '.join(r.problems)}" for r in found[:5])
        raise ValueError(f"RUN must be runs with a readable config.yaml. Got {told}.")
    reference = find_reference(groups, given.reference)
    compared, warned = results(groups, reference), warnings(groups, found)
    title = given.title or f"{len(found)} run{'s' * (len(found) != 1)} compared"
    command = shlex.join(["python", "-m", "lightning_iwae", "report", *args])
    html.parent.mkdir(parents=True, exist_ok=True)
    html.write_text(page.render(html, title, command, groups, reference, compared, warned, found), encoding="utf-8")
    text.write_text(markdown.document(title, groups, reference, compared, warned, found), encoding="utf-8")
    damaged, untested = sum(r.damaged for r in found), sum(r.untested for r in found)
    print(f"{page.subtitle(groups, found)}; {damaged or 'none'} unfinished or damaged.")
    if untested:
        print(f"{untested} {runs.UNTESTED}.")
    print(f"Saved as {html} and {text}")


def outputs(out: Path) -> tuple[Path, Path]:
    """The page and the table that `--out` means."""
    if out.suffix in (".html", ".md") and not out.is_dir():
        return out.with_suffix(".html"), out.with_suffix(".md")
    if out.is_file():
        raise ValueError(f"--out must be a directory, or a file that ends in .html or .md. Got {out}.")
    return out / "report.html", out / "report.md"

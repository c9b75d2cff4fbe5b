"""The command: measures, keeps what it found, and draws the page from that."""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from .sections import SECTIONS, measured

ABOUT = f"""\
Measures what lightning_iwae costs, and writes docs/performance.md.

Ways of doing the same work take turns in one process, a section's own; what counts is the ratio of their times, round
by round. All of it takes about 20 minutes on two idle cores, --quick about three. `make bench` runs it in an
environment of its own, with pythae and JAX; what is not installed is left out, and the page says so.

sections:
{chr(10).join(f"  {name:11} {what}" for name, what in SECTIONS.items())}

Results are kept in performance.json beside the page: what --only leaves out stays as it was, and --redraw makes page
and pictures without measuring.
"""


def main(words: list[str] | None = None) -> None:
    """Measure section by section, then write the page."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few rounds and small sizes: to see that it works")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="directory (default: docs)")
    parser.add_argument("--redraw", action="store_true", help="measure nothing")
    args = parser.parse_args(words)
    names = [] if args.redraw else args.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"--only must name some of {', '.join(SECTIONS)}. Got {', '.join(sorted(unknown))}.")
    if args.redraw and not (args.out / "performance.json").exists():
        parser.error(f"there is no {args.out / 'performance.json'} to redraw.")
    for name in names:  # in a process of its own, lest one find the heap that another left
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            keep(args.out, name, process.submit(measured, name, args.quick).result())
    from . import page

    page.write(args.out)


def keep(out: Path, name: str, section: dict) -> None:
    """Put a section into performance.json, in place of an earlier one."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "performance.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[name] = section
    path.write_text(json.dumps(rounded({key: results[key] for key in SECTIONS if key in results})) + "\n")


def rounded(value):  # type: ignore[no-untyped-def]
    """Floats to five digits, at any depth."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()

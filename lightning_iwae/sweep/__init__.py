"""`python -m lightning_iwae sweep -c sweeps/optuna.yaml`: many fits, chosen by Optuna, shared by many workers.

settings.py   a sweep's YAML
space.py      what is tried
storage.py    where the study is kept, and what to do when it does not answer
rehearsal.py  fits that are made ready, before the first is run
study.py      who works on which trial; nothing is lost or counted twice
trial.py      one trial's processes
worker.py     one worker's loop, and what it shows
page.py       the report
"""

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from ..mistakes import Mistake, did_you_mean, nearest, shown

STORAGES = "sqlite:///FILE, journal://FILE or postgresql://USER@HOST/DATABASE"
DESCRIPTION = """Choose settings by Optuna: every trial is a fit in a process and a run directory of its own.
The same command started again goes on with the study; started elsewhere with the same --storage
it is one worker more. At the end, and for a study that is over, it writes a report."""


class Parser(argparse.ArgumentParser):
    """Mistakes become a `Mistake` instead of a usage dump."""

    def error(self, message: str) -> NoReturn:
        """The command line says it, in one line."""
        raise Mistake(f"sweep: {message}")


def parser() -> Parser:
    """The sub-command's arguments."""
    p = Parser(
        prog="lightning_iwae sweep",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "-c", "--config", metavar="FILE", required=True, action="append", help="the sweep's YAML, as sweeps/optuna.yaml"
    )
    p.add_argument(
        "--storage",
        metavar="URL",
        help=f"{STORAGES} (default: LIGHTNING_IWAE_STORAGE of the environment, else sqlite below --out)",
    )
    p.add_argument("--out", metavar="DIR", type=Path, help="gets runs/ and the report (default: runs/STUDY)")
    p.add_argument("--study", metavar="NAME", help="in place of the one in the YAML")
    p.add_argument("--trials", metavar="N", type=number, help="in place of the number in the YAML")
    return p


def number(text: str) -> int | str:
    """A whole number; what is none is refused with the others."""
    return int(text) if text.lstrip("-").isdecimal() else text


def unknown(word: str, file: str) -> str:
    """What to say of an argument that is none."""
    name = word.partition("=")[0]
    if not word.startswith("-"):
        return f"sweep: unexpected argument {word!r}: options are --key value, the sweep's YAML -c FILE."
    if "." in name:
        return f"sweep: unknown option {name}: settings of the fits go below options: in {file}."
    return f"sweep: unknown option {name}.{did_you_mean(nearest(name, OPTIONS))}"


OPTIONS = ("--config", "--storage", "--out", "--study", "--trials")


def main(words: list[str]) -> None:
    """Run the sub-command."""
    given, others = parser().parse_known_args(words)
    if others:
        raise Mistake(unknown(others[0], given.config[0]))
    if len(given.config) > 1:
        raise Mistake(f"sweep: -c takes one file, the sweep's YAML. Got {', '.join(given.config)}.")
    if given.storage == "":
        raise Mistake(f"--storage must be {STORAGES}. Got ''.")
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise Mistake("sweep needs optuna: pip install 'lightning-iwae[sweep]'.") from error
    from . import page, settings, storage, worker

    over = {key: value for key in ("study", "trials") if (value := getattr(given, key)) is not None}
    for key, value in over.items():
        holds, wanted = settings.CHECKS[key]
        if not holds(value):
            raise Mistake(f"--{key} must be {wanted}. Got {shown(value)}.")
    sweep = settings.read(given.config[0], over)
    out = given.out or Path("runs") / sweep.study
    made = [path for path in (out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Mistake(f"--out {out}: {error.strerror}.") from error
    url = given.storage or os.environ.get(storage.VARIABLE) or f"sqlite:///{out / 'study.db'}"
    try:
        study = worker.work(sweep, url, out)
    finally:
        with suppress(OSError):  # not empty, unless a mistake came first
            for path in made:
                path.rmdir()
    page.write(study, out)
    if not any(row.outcome in ("finished", "pruned") for row in page.table(study)):
        print("error: no trial has finished. Their reasons are above, their logs in runs/*/log.txt.", file=sys.stderr)
        sys.exit(1)

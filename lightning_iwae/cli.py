"""The command line: `python -m lightning_iwae {fit,validate,test} -c run.yaml [-c overlay.yaml] [--key value]`."""

import ctypes
import sys


def keep_freed_memory() -> None:
    """Have glibc reuse the large arrays of one step in the next, rather than return them and fault them in again.

    Saves about a quarter of a step's time on CPU (benchmarks/step.py); other platforms are left as they are.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mmap_max, trim_threshold = -4, -1  # malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def main(args: list[str] | None = None) -> None:
    """Run the command line; a mistake in config or data exits with status 2, a broken run with 1, and one message."""
    words = sys.argv[1:] if args is None else args
    if words[:1] == ["report"]:
        from . import report  # reads files only: no Lightning

        return report.main(words[1:])
    keep_freed_memory()
    from . import commands  # Lightning takes seconds to import
    from .data import DataError

    try:
        commands.run(args)
    except (ValueError, TypeError, DataError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)

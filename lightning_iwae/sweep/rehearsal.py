"""Fits made ready but not run: `python -m lightning_iwae.sweep.rehearsal`, with the arguments of each on stdin.

Its last line says which was refused first, and why: [index, message], or null. One process for all of them.
"""

import json
import sys
from collections.abc import Sequence


def refused(fits: Sequence[Sequence[str]]) -> tuple[int, str] | None:
    """The first fit, each given by its arguments, that the command line refuses before it has data or a device."""
    from ..cli import status_of
    from ..cli.commands import make_ready

    for i, words in enumerate(fits):
        try:
            make_ready(list(words))
        except Exception as error:
            if status_of(error) is None:
                raise
            return i, str(error)
    return None


if __name__ == "__main__":
    print("\n" + json.dumps(refused(json.load(sys.stdin))))

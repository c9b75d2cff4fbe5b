"""What a user got wrong, as one message; and which exceptions are that rather than a bug."""

import dis
from collections.abc import Iterable
from typing import Any


class Mistake(Exception):
    """Something in the command line, a config or what they name is wrong. Its text is all that the user is told."""


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of `known` that `name` was probably meant to be."""
    import difflib

    lower = {k.lower(): k for k in known}
    found = difflib.get_close_matches(name.lower(), lower, 1, cutoff)
    return lower[found[0]] if found else None


def did_you_mean(name: str | None) -> str:
    """The end of a message that has a suggestion, or nothing."""
    return f" Did you mean {name}?" if name else ""


def shown(value: Any) -> str:
    """A value as it stands in a message."""
    if isinstance(value, dict | list):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} ({str(value)[:60]})"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)[:80]


def raised_here(error: BaseException) -> bool:
    """Whether a `raise` of this package threw it: then it is a check of ours, and its text is meant for the user.

    What Python or a library threw, on the way through this package or through a user's class, is a bug.
    """
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    code = traceback.tb_frame.f_code
    name = traceback.tb_frame.f_globals.get("__name__", "")
    raising = dis.opname[code.co_code[traceback.tb_lasti]] == "RAISE_VARARGS"
    return raising and name.partition(".")[0] == __package__

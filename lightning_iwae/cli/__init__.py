"""The command line: `python -m lightning_iwae COMMAND`, as in `fit -c run.yaml -c overlay.yaml --key value`.

Light: help, version and a mistyped command are answered without importing torch or Lightning.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .._version import __version__
from ..mistakes import Mistake, did_you_mean, nearest, raised_here
from ..signals import Interrupted

COMMANDS = {
    "fit": "train both networks; writes a run directory",
    "validate": "evaluate a checkpoint on the validation data: log p(x), bounds, KLs, ESS",
    "test": "the same on the test data; writes evaluation.json",
    "predict": "posterior, log p(x) and ESS of each datum, to a file",
    "report": "one page and a table of finished runs",
    "sweep": "choose settings by Optuna: many fits, shared by any number of workers",
    "snr": "signal-to-noise of many estimators' gradients over K and M, against theory where it is known",
    "certify": "check the expectation of every estimator, or of your own, and write docs/estimators.md",
    "claims": "the claims that all this rests on, each measured: what is expected, what is found",
}
USAGE = "python -m lightning_iwae"
HELP = f"""\
usage: {USAGE} COMMAND [options]

Importance-weighted auto-encoders whose two networks are trained on separate bounds and gradient estimators.

commands:
{chr(10).join(f"  {name:9} {what}" for name, what in COMMANDS.items())}

examples:
  {USAGE} fit -c conf/mnist.yaml
  {USAGE} fit -c conf/digits.yaml -c conf/objective/dreg.yaml --model.phi.particles 16
  {USAGE} test runs/digits
  {USAGE} predict runs/digits mine.npy

exit status:
  0    done
  1    the run broke: a bound or gradient was not finite, or under DDP another process was lost (one message);
       or there is a bug (a traceback)
  2    a mistake in the command line, a config, the data or a checkpoint (one message)
  130  interrupted from the keyboard
  143  stopped by SIGTERM, 138 by SIGUSR1, with a checkpoint saved: go on with --ckpt_path last

options:
  -h, --help  this text; after a command, that command's options
  --version   the version

Configs are explained in docs/configuration.md, everything else in README.md.
"""


def keep_freed_memory() -> None:
    """Have glibc reuse the large arrays of one step in the next, rather than return them and fault them in again.

    Saves about a quarter of a step's time on CPU; other platforms are left as they are.
    """
    import ctypes

    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mmap_max, trim_threshold = -4, -1  # malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def main(args: list[str] | None = None) -> None:
    """Run the command line `args`, or that of the process. The exit statuses are in HELP."""
    words = sys.argv[1:] if args is None else args
    if not words or words[0] in ("-h", "--help"):
        print(HELP, end="", file=sys.stdout if words else sys.stderr)
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        print(f"lightning_iwae {__version__}")
        sys.exit(0)
    with one_message():
        check_command(words[0])
        if words[0] == "report":
            from .. import report  # reads files only: no Lightning

            return report.main(words[1:])
        if words[0] == "sweep":
            from .. import sweep  # its trials are processes of their own: no torch, no Lightning

            return sweep.main(words[1:])
        keep_freed_memory()
        if words[0] in ("snr", "claims", "certify"):
            from . import experiments

            return getattr(experiments, words[0])(words[1:])
        from . import commands  # Lightning takes seconds to import

        commands.run(args)


def script() -> None:
    """The console script `lightning-iwae`: as `python -m`, it finds a user's modules in the working directory."""
    sys.path.insert(0, "")
    main()


def check_command(word: str) -> None:
    """Mistake unless `word` is a command."""
    if word.startswith("-"):
        raise Mistake(f"the command comes first: one of {', '.join(COMMANDS)}. Got {word}.")
    if word not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise Mistake(f"unknown command {word!r}: one of {known}.{did_you_mean(nearest(word, COMMANDS))}")


@contextmanager
def one_message() -> Iterator[None]:
    """Exit with a message in place of a traceback where the user is at fault, or the run broke in a known way."""
    try:
        yield
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.status)
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's trainer exits with 1
            sys.exit(130)
        raise
    except Exception as error:
        status = status_of(error)
        if status is None:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(status)


def status_of(error: Exception) -> int | None:
    """The exit status that goes with a message; None for what is nobody's mistake but a bug, whose traceback is due."""
    if isinstance(error, Mistake):
        return 2
    if isinstance(error, FloatingPointError):
        return 1
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from ..data import DataError
    from ..ddp import LostProcess

    if isinstance(error, LostProcess):
        return 1
    if isinstance(error, DataError | MisconfigurationException):
        return 2
    return 2 if isinstance(error, ValueError | TypeError) and raised_here(error) else None

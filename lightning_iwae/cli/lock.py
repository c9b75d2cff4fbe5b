"""One fit at a time in a run's directory: two would write the same rows and checkpoints."""

import fcntl
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


@contextmanager
def sole_fit(directory: Path) -> Iterator[None]:
    """Keep other fits out of a directory, which is made if it is not there, and taken away again if nothing came in.

    The system drops the lock with the process, however that ends: the file that a killed one leaves keeps nobody out.

    Raises:
        ValueError: if another fit is in it.
    """
    fresh = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ".lock"
    try:
        with open(path, "a+") as file:
            lock(file, directory)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    finally:
        if fresh:
            with suppress(OSError):
                directory.rmdir()


def lock(file: TextIO, directory: Path) -> None:
    """Lock the open file and write into it whose it is; ValueError if it is another fit's."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read()
        by = f" ({holder})" if holder else ""
        raise ValueError(f"trainer.default_root_dir: {directory} is in use by another fit{by}.") from None
    except OSError as error:
        told = f"its file system has no locks ({error.strerror}). Start no second fit in it."
        warnings.warn(f"trainer.default_root_dir: {directory} can't be locked, as {told}", stacklevel=2)
        return
    if os.fstat(file.fileno()).st_nlink == 0:  # removed by a fit that ended between our open and our lock
        raise just_left(directory)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    os.fsync(file.fileno())  # for those on other machines


def just_left(directory: Path) -> ValueError:
    """What to raise where a fit has ended while another one was starting."""
    return ValueError(f"trainer.default_root_dir: {directory} was in use by another fit until now. Start again.")

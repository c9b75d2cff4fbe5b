"""Files that are whole or not there, whenever the process dies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def part(path: Path) -> Path:
    """The name under which `path` is written until it is whole; what a killed process leaves there is overwritten."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` in one move once its content is on the disk.

    If the block raises, or the process dies in it, `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part(path), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part(path), path)
    finally:
        part(path).unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name too
    os.close(folder)

"""Files of published data sets: found, checked by MD5, parsed (IDX), and written whole or not at all."""

import contextlib
import gzip
import hashlib
import os
import re
import stat
import time
import zlib
from pathlib import Path

import numpy as np

from lightning_iwae.data.base import DataError

PART = re.compile(r"\..+\.[0-9a-f]{8}\.part")
PART_SECONDS = 3600  # an older part is nobody's: a write takes seconds


def check_md5(content: bytes, expected: str, origin: str) -> None:
    """DataError, naming `origin`, unless the content has the expected MD5."""
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise DataError(f"{origin} must have MD5 {expected}. Got {found}, of {len(content)} bytes.")


def decompress(content: bytes, origin: str) -> bytes:
    """The content gunzipped; DataError, naming `origin`, if it cannot be."""
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{origin} is not a whole gzip file: {error}.") from error


def find(folder: Path, names: list[str]) -> Path | None:
    """The first of the files `names` below the folder that is there; DataError if it cannot be looked for."""
    if (mode := _mode(folder)) is not None and not stat.S_ISDIR(mode):
        raise DataError(f"data.folder must be a folder. Got the file {folder}.")
    for path in (folder / name for name in names):
        mode = _mode(path)
        if mode is None:
            continue
        if not stat.S_ISREG(mode):
            raise DataError(f"{path} must be a file. Got {'a folder' if stat.S_ISDIR(mode) else 'something else'}.")
        return path
    return None


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def read(path: Path) -> bytes:
    """A file's content; DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def parse_idx(content: bytes, origin: str) -> np.ndarray:
    """The array of an IDX file: bytes 0, 0, 8 (uint8), number of axes, their big-endian sizes, the data."""
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DataError(f"{origin} must begin with 00 00 08 (IDX, uint8). Got {content[:3].hex(' ')}.")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(f"{origin} must have a header of {start} bytes. Got {len(content)} bytes in all.")
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], dtype=">u4"))
    data = np.frombuffer(content, dtype=np.uint8, offset=start)
    if data.size != np.prod(shape, dtype=np.int64):
        raise DataError(f"{origin} must hold data of shape {shape}. Got {data.size} bytes.")
    return data.reshape(shape)


def write_whole(path: Path, content: bytes) -> None:
    """Writes under another name in the same folder, then renames: a reader sees the whole file or none.

    So processes that write the same file at once do no harm. DataError if it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}. Nothing of it was left there.") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what processes that were killed while they wrote have left; it is never read in any case."""
    with contextlib.suppress(OSError):
        for path in folder.glob(".*.part"):
            if PART.fullmatch(path.name) and time.time() - path.stat().st_mtime > PART_SECONDS:
                path.unlink(missing_ok=True)

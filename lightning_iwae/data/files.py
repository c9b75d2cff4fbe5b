"""IDX files: checked by MD5, parsed, and written whole or not at all."""

import gzip
import hashlib
import os
import zlib
from pathlib import Path

import numpy as np

from lightning_iwae.data.base import DataError


def check_md5(content: bytes, expected: str, origin: str) -> None:
    """DataError, naming `origin`, unless the content has the expected MD5."""
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise DataError(f"{origin} must have MD5 {expected} (uncompressed). Got {found}.")


def decompress(content: bytes, origin: str) -> bytes:
    """The content gunzipped; DataError, naming `origin`, if it cannot be."""
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{origin} is not a whole gzip file: {error}.") from error


def read_checked(path: Path, md5: str) -> bytes:
    """A file's content, gunzipped if its name ends in .gz; DataError if its MD5 (uncompressed) is another."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = decompress(content, str(path))
    check_md5(content, md5, str(path))
    return content


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
    """Writes under another name in the same folder, then renames: a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

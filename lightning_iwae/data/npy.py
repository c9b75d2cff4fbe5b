"""Arrays out of .npy and .npz files that a user names, as `data.npy` or `data.npz:key`. Nothing is ever unpickled."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_iwae.data.base import DataError

CHUNK = 4096  # rows looked at in one go


def read_items(option: str, source: str) -> tuple[Tensor, str]:
    """x (N, X), uint8 or float32, and type and shape of an item in words; DataError if it is not that.

    A .npy file is mapped into memory, not read, unless it is float64, which is rounded to float32.
    """
    array = _read(option, source)
    if array.dtype not in (np.uint8, np.float32, np.float64):
        raise DataError(f"{option}: {source} must be uint8, float32 or float64. Got {array.dtype}.")
    if array.ndim < 2 or array.size == 0:
        raise DataError(f"{option}: {source} must have shape (N, ...), none of it empty. Got {array.shape}.")
    _check_finite(option, source, array)
    array = array.astype(np.float32) if array.dtype == np.float64 else array
    return torch.from_numpy(array.reshape(len(array), -1)), f"{array.dtype} of shape {array.shape[1:]}"


def read_labels(option: str, source: str, count: int) -> Tensor:
    """y (count,) int64 out of integers of any kind, none below 0; DataError if they are not that."""
    array = _read(option, source)
    if array.dtype.kind not in "iu":
        raise DataError(f"{option}: {source} must hold integers. Got {array.dtype}.")
    if array.shape != (count,):
        raise DataError(f"{option}: {source} must have shape ({count},), a label an item. Got {array.shape}.")
    if array.min() < 0:
        raise DataError(f"{option}: {source} must have no label below 0. Got {array.min()} at {array.argmin()}.")
    return torch.from_numpy(array.astype(np.int64))


def _check_finite(option: str, source: str, array: np.ndarray) -> None:
    if array.dtype == np.uint8:
        return
    for first in range(0, len(array), CHUNK):
        bad = np.argwhere(~np.isfinite(array[first : first + CHUNK]))
        if len(bad):
            index = (int(bad[0][0]) + first, *map(int, bad[0][1:]))
            raise DataError(f"{option}: {source} must be finite. Got {array[index]} at {list(index)}.")


def _read(option: str, source: str) -> np.ndarray:
    path, key = _split(source)
    if path.suffix not in (".npy", ".npz"):
        raise DataError(f"{option} must name a .npy or .npz file, or FILE.npz:KEY. Got {source}.")
    if not path.is_file():
        raise DataError(f"{option}: no file {path}.")
    try:
        loaded = np.load(path, mmap_mode="c", allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else _member(loaded, f"{option}: {path}", key)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if any(word in str(error) for word in ("pickle", "Python objects")):
            raise DataError(
                f"{option}: {source} must hold numbers in NumPy's format. Got Python objects, which are not loaded as "
                f"that may run code, or another format."
            ) from error
        raise DataError(f"{option}: {source} cannot be read: {error}") from error


def _split(source: str) -> tuple[Path, str | None]:
    """`data.npz:key` into file and key."""
    path, found, key = source.rpartition(".npz:")
    return (Path(f"{path}.npz"), key) if found else (Path(source), None)


def _member(archive: np.lib.npyio.NpzFile, origin: str, key: str | None) -> np.ndarray:
    with archive:
        keys = archive.files
        if key is None and len(keys) == 1:
            key = keys[0]
        if key is None:
            raise DataError(
                f"{origin} must be named with a key, FILE.npz:KEY. It holds {', '.join(keys) or 'nothing'}."
            )
        if key not in keys:
            raise DataError(f"{origin} must hold an array {key}. Got {', '.join(keys) or 'none'}.")
        return archive[key]

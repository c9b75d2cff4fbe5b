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
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is found
        numbers = array if array.dtype != np.float64 else array.astype(np.float32)
    if (bad := _first_not_finite(numbers)) is not None:
        raise DataError(f"{option}: {source} must be finite as float32. Got {array[bad]} at {list(bad)}.")
    return torch.from_numpy(numbers.reshape(len(numbers), -1)), f"{numbers.dtype} of shape {numbers.shape[1:]}"


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


def _first_not_finite(numbers: np.ndarray) -> tuple[int, ...] | None:
    for first in range(0, len(numbers) if numbers.dtype == np.float32 else 0, CHUNK):
        finite = np.isfinite(numbers[first : first + CHUNK])
        if not finite.all():
            row, *others = map(int, np.argwhere(~finite)[0])
            return (first + row, *others)
    return None


def _read(option: str, source: str) -> np.ndarray:
    path, key = _split(source)
    if path.suffix not in (".npy", ".npz"):
        raise DataError(f"{option} must name a .npy or .npz file, or FILE.npz:KEY. Got {source}.")
    if not path.is_file():
        raise DataError(f"{option}: no file {path}.")
    try:
        array = _mapped(path, option) if path.suffix == ".npy" else _member(path, key, option)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if not any(word in str(error) for word in ("pickle", "Python objects")):
            raise DataError(f"{option}: {source} cannot be read: {error}") from error
        array = None
    if not isinstance(array, np.ndarray):
        raise DataError(
            f"{option}: {source} must hold numbers in NumPy's format. Got Python objects, which are not loaded as that "
            f"may run code, or another format."
        )
    return array


def _split(source: str) -> tuple[Path, str | None]:
    """`data.npz:key` into file and key."""
    path, found, key = source.rpartition(".npz:")
    return (Path(f"{path}.npz"), key) if found else (Path(source), None)


def _mapped(path: Path, option: str) -> np.ndarray:
    array = np.load(path, mmap_mode="c", allow_pickle=False)  # what is written to it stays in memory
    if not isinstance(array, np.ndarray):
        array.close()
        raise DataError(f"{option}: {path} must be one array. Got an archive.")
    return array


def _member(path: Path, key: str | None, option: str) -> np.ndarray:
    with path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise DataError(f"{option}: {path}:{key} must be an archive. Got one array.")
        keys = archive.files
        if key is None and len(keys) != 1:
            held = ", ".join(keys) or "nothing"
            raise DataError(f"{option}: {path} must be named with a key, FILE.npz:KEY. It holds {held}.")
        if key not in (None, *keys):
            raise DataError(f"{option}: {path} must hold an array {key}. Got {', '.join(keys) or 'none'}.")
        return archive[key or keys[0]]

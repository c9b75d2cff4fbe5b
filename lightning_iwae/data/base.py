"""The LightningDataModule that the data sets share."""

from typing import Literal, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_iwae.data.batches import Batches, binarize, draw_bytes, generator_for, to_float

Binarization = Literal["dynamic", "static", "threshold", "none"]


class DataError(RuntimeError):
    """A data set cannot be found, or what was found is not what it should be."""


class ArrayData(LightningDataModule):
    """Base of the data sets: three tensors in memory, cut into `Batches`.

    A subclass says in `load` what its tensors are. After `setup`, `train`, `val` and `test` have shape
    (N, X): uint8 pixels, or floats. Pixels that were binarised once and for all are 0 or 255 there.

    Binarisation: "dynamic" draws each training pixel anew at each presentation, with probability pixel / 255
    (Burda et al. 2016, https://arxiv.org/abs/1509.00519); its validation and test sets are one draw, fixed by
    (seed, split), so that evaluations are comparable. "static" fixes one such draw of the training set too.
    "threshold" takes pixel >= 128. "none" keeps intensities in [0, 1]. Numbers under different settings are
    not comparable: on MNIST they are nats apart.

    Args:
        batch_size: items in a batch of all processes together; in training divisible by their number.
        validation: number of training items held out, chosen by `seed`.
        seed: of split, order and binarisation.
        binarization: see above.
        limit_train: keep only so many training items, for quick experiments. None keeps all.

    Example, a data set of one's own:
        >>> class Noise(ArrayData):
        ...     def load(self):
        ...         train, val = self.split(torch.randint(256, (100, 9), dtype=torch.uint8))
        ...         return train, val, torch.randint(256, (20, 9), dtype=torch.uint8)
        >>> data = Noise(batch_size=32, validation=10, seed=0, binarization="dynamic")
        >>> data.setup()
        >>> [tuple(x.shape) for x in data.train_dataloader()]
        [(32, 9), (32, 9)]
    """

    def __init__(
        self,
        batch_size: int,
        validation: int,
        seed: int,
        binarization: Binarization,
        limit_train: int | None = None,
    ) -> None:
        super().__init__()
        check_at_least("batch_size", batch_size, 1)
        check_at_least("validation", validation, 1)
        check_at_least("seed", seed, 0)
        if limit_train is not None:
            check_at_least("limit_train", limit_train, 1)
        known = get_args(Binarization)
        if binarization not in known:
            raise ValueError(f"data.binarization must be one of {', '.join(known)}. Got {binarization}.")
        self.batch_size = batch_size
        self.validation = validation
        self.seed = seed
        self.binarization = binarization
        self.limit_train = limit_train
        self.train: Tensor | None = None
        self.val: Tensor | None = None
        self.test: Tensor | None = None
        self._train_mean: Tensor | None = None

    def load(self) -> tuple[Tensor, Tensor, Tensor]:
        """Training, validation and test items, each (N, X): uint8 pixels not yet binarised, or floats."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Loads everything once, whatever the stage."""
        if self.train is not None:
            return
        train, val, test = self.load()
        train = train[: self.limit_train]
        self._train_mean = _mean(train)
        self.val = self._fixed(val, "val")
        self.test = self._fixed(test, "test")
        self.train = train if self.binarization == "dynamic" else self._fixed(train, "train")

    def split(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Shuffles items (N, X) by `seed` and holds out `validation` of them: (train, val)."""
        if self.validation >= len(items):
            raise ValueError(f"data.validation must be below the {len(items)} items. Got {self.validation}.")
        order = torch.randperm(len(items), generator=generator_for(self.seed, "split"))
        return items[order[self.validation :]], items[order[: self.validation]]

    @property
    def train_mean(self) -> Tensor:
        """Mean over the training items before binarisation, float32 (X,); of pixels it lies in [0, 1]."""
        return self._loaded(self._train_mean)

    def probe(self, n: int, stage: Literal["train", "val"] = "train") -> Tensor:
        """The first n items of a split as floats (n, X), the same at each call: for diagnostics."""
        if stage not in ("train", "val"):
            raise ValueError(f"stage must be train or val. Got {stage}.")
        items = self._loaded(self.train if stage == "train" else self.val)
        if not 1 <= n <= len(items):
            raise ValueError(f"a probe of {stage} must have 1 to {len(items)} items. Got {n}.")
        if stage == "train" and self.binarization == "dynamic":
            noise = draw_bytes(items[:n].shape, generator_for(self.seed, "probe"))
            return binarize(items[:n], noise)
        return to_float(items[:n])

    def train_dataloader(self) -> Batches:
        """Full batches in an order that changes with the trainer's epoch."""
        return self._batches(self.train, shuffle=True)

    def val_dataloader(self) -> Batches:
        """The validation items in order."""
        return self._batches(self.val, shuffle=False)

    def test_dataloader(self) -> Batches:
        """The test items in order."""
        return self._batches(self.test, shuffle=False)

    def predict_dataloader(self) -> Batches:
        """The test items in order."""
        return self.test_dataloader()

    def _batches(self, items: Tensor | None, shuffle: bool) -> Batches:
        return Batches(
            self._loaded(items),
            self.batch_size,
            shuffle=shuffle,
            dynamic=shuffle and self.binarization == "dynamic",
            seed=self.seed,
            epoch=lambda: self.trainer.current_epoch if self.trainer else 0,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
        )

    def _fixed(self, items: Tensor, split: str) -> Tensor:
        if self.binarization == "none":
            return items
        if self.binarization == "threshold":
            ones = items >= 128
        else:
            ones = draw_bytes(items.shape, generator_for(self.seed, "fixed", split)) < items
        return ones.to(torch.uint8).mul_(255)

    def _loaded(self, value: Tensor | None) -> Tensor:
        if value is None:
            name = type(self).__name__
            raise RuntimeError(f"{name} has no data yet: call prepare_data() and setup() first.")
        return value


def _mean(items: Tensor) -> Tensor:
    if items.dtype != torch.uint8:
        return items.double().mean(0).float()
    # by chunks, to save memory; a chunk's float32 sum stays below 2^24 and is exact
    total = sum(chunk.float().sum(0).double() for chunk in items.split(4096))
    return (total / (255 * len(items))).float()


def check_at_least(name: str, value: int, least: int) -> None:
    """ValueError for a constructor's argument that is too small."""
    if value < least:
        raise ValueError(f"data.{name} must be at least {least}. Got {value}.")

"""The LightningDataModule that the data sets share."""

from typing import Literal, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_iwae.data.batches import (
    Batches,
    Items,
    binarize,
    draw_bytes,
    generator_for,
    parts,
    take,
    to_float,
)

Binarization = Literal["dynamic", "static", "threshold", "none"]


class DataError(RuntimeError):
    """A data set cannot be found, or what was found is not what it should be."""


class ArrayData(LightningDataModule):
    """Base of the data sets: three tensors in memory, cut into `Batches`.

    A subclass says in `load` what its tensors are. After `setup`, `train`, `val` and `test` have shape
    (N, X): uint8 pixels, or floats. Pixels that were binarised once and for all are 0 or 255 there.

    Batches are floats x (B, X), or with `labels` tuples (x, y), y (B,) int64: in training, validation, test and
    prediction alike.

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
        labels: batches are (x, y).

    Example, a data set of one's own; in a config it is `data: {class_path: my_module.Noise}`:
        >>> class Noise(ArrayData):
        ...     def __init__(self, batch_size: int = 32, seed: int = 0, labels: bool = False):
        ...         super().__init__(batch_size, 10, seed, "dynamic", labels=labels)
        ...
        ...     def load(self):
        ...         x, y = torch.randint(256, (120, 9), dtype=torch.uint8), torch.arange(120) % 3
        ...         train, val = self.split((x[:100], y[:100]))
        ...         return train, val, (x[100:], y[100:])
        >>> data = Noise(labels=True)
        >>> data.setup()
        >>> [(tuple(x.shape), tuple(y.shape)) for x, y in data.train_dataloader()]
        [((32, 9), (32,)), ((32, 9), (32,))]

    Nor need a data module be an `ArrayData`: any LightningDataModule does whose batches are float tensors x (B, X),
    or (x, y). What `Batches` adds it then lacks: a run that does not depend on the number of processes, resuming
    inside an epoch, and `probe`.
        >>> class Own(LightningDataModule):
        ...     def train_dataloader(self):
        ...         return DataLoader(torch.rand(100, 9), batch_size=20, shuffle=True)
        ...
        ...     def val_dataloader(self):
        ...         return DataLoader(torch.rand(20, 9), batch_size=20)
        >>> next(iter(Own().train_dataloader())).shape
        torch.Size([20, 9])
    """

    def __init__(
        self,
        batch_size: int,
        validation: int,
        seed: int,
        binarization: Binarization,
        limit_train: int | None = None,
        labels: bool = False,
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
        self.labels = labels
        self.train: Tensor | None = None
        self.val: Tensor | None = None
        self.test: Tensor | None = None
        self._train_mean: Tensor | None = None
        self._labels: dict[str, Tensor] = {}

    def load(self) -> tuple[Items, Items, Items | None]:
        """Training, validation and test items, each x (N, X): uint8 pixels not yet binarised, or floats.

        What has labels gives (x, y), y (N,) integers, whether they are asked for or not. What has no test items
        gives None for them.
        """
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Loads everything where Lightning asks for it first, before a logger makes the run's directory."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Loads everything once, whatever the stage."""
        if self.train is not None:
            return
        train, val, test = self.load()
        x = self._unlabelled(take(train, slice(self.limit_train)), "train")
        self._train_mean = _mean(x)
        self.val = self._fixed(self._unlabelled(val, "val"), "val")
        self.test = None if test is None else self._fixed(self._unlabelled(test, "test"), "test")
        self.train = x if self.binarization == "dynamic" else self._fixed(x, "train")

    def split(self, items: Items) -> tuple[Items, Items]:
        """Shuffles items x (N, X), or (x, y), by `seed` and holds out `validation` of them: (train, val)."""
        count = len(parts(items)[0])
        if self.validation >= count:
            raise ValueError(f"data.validation must be below the {count} items. Got {self.validation}.")
        order = torch.randperm(count, generator=generator_for(self.seed, "split"))
        return take(items, order[self.validation :]), take(items, order[: self.validation])

    @property
    def train_mean(self) -> Tensor:
        """Mean over the training items before binarisation, float32 (X,); of pixels it lies in [0, 1]."""
        return self._loaded(self._train_mean)

    def probe(self, n: int) -> Items:
        """The first n training items as a batch, the same at each call: for diagnostics."""
        items = self._loaded(self.train)
        if not 1 <= n <= len(items):
            raise ValueError(f"a probe of train must have 1 to {len(items)} items. Got {n}.")
        if self.binarization == "dynamic":
            x = binarize(items[:n], draw_bytes(items[:n].shape, generator_for(self.seed, "probe")))
        else:
            x = to_float(items[:n])
        return (x, self._labels["train"][:n]) if self.labels else x

    def train_dataloader(self) -> Batches:
        """Full batches in an order that changes with the trainer's epoch."""
        return self._batches(self.train, "train", shuffle=True)

    def val_dataloader(self) -> Batches:
        """The validation items in order."""
        return self._batches(self.val, "val", shuffle=False)

    def test_dataloader(self) -> Batches:
        """The test items in order; ValueError if there are none."""
        if self.train is not None and self.test is None:
            raise ValueError(f"{type(self).__name__} has no test items, which a test or a prediction needs.")
        return self._batches(self.test, "test", shuffle=False)

    def predict_dataloader(self) -> Batches:
        """The test items in order."""
        return self.test_dataloader()

    def _batches(self, items: Tensor | None, split: str, shuffle: bool) -> Batches:
        return Batches(
            self._loaded(items),
            self.batch_size,
            shuffle=shuffle,
            dynamic=shuffle and self.binarization == "dynamic",
            seed=self.seed,
            epoch=lambda: self.trainer.current_epoch if self.trainer else 0,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
            labels=self._labels.get(split),
        )

    def _unlabelled(self, items: Items, split: str) -> Tensor:
        """x; its labels are checked and kept, if they are asked for."""
        x, y = parts(items)
        if not self.labels:
            return x
        if y is None:
            raise ValueError(f"data.labels must be false, as {type(self).__name__} has none. Got true.")
        if y.shape != x.shape[:1]:
            raise ValueError(f"labels of {split} must have shape ({len(x)},), one an item. Got {tuple(y.shape)}.")
        self._labels[split] = y.long()
        return x

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
    # by chunks, to save memory; of pixels a chunk's float32 sum stays below 2^24 and is exact
    pixels = items.dtype == torch.uint8
    total = sum((chunk.float() if pixels else chunk.double()).sum(0).double() for chunk in items.split(4096))
    return (total / ((255 if pixels else 1) * len(items))).float()


def check_at_least(name: str, value: int, least: int) -> None:
    """ValueError for a constructor's argument that is too small."""
    if value < least:
        raise ValueError(f"data.{name} must be at least {least}. Got {value}.")

"""A user's own arrays, by path."""

import torch

from lightning_iwae.data.base import ArrayData, Binarization, DataError
from lightning_iwae.data.batches import Batches, Items, parts
from lightning_iwae.data.npy import read_items, read_labels


class Arrays(ArrayData):
    """Arrays of one's own out of .npy and .npz files; of an archive with several, one is named as `FILE.npz:KEY`.

    Items are uint8 pixels or finite floats, of shape (N, ...), each flattened to X numbers; float64 is rounded to
    float32. The three sets have one type and one shape of item. Whether floats suit the likelihood is its matter:
    a Bernoulli wants [0, 1].

    Without `val`, validation items are chosen from `train` by `seed`. Without `test` there is no test set: `test` and
    `predict` refuse, and do not take the validation set in its stead, by which a checkpoint may have been chosen.

    .npy files are mapped, not read. A training set larger than memory works if it is uint8 or float32, `val` is
    given, and `binarization` is none or dynamic; all else makes a copy. What each setup does read is all of it once
    or twice, for its mean and in search of NaN.

    Labels are integers from 0 on, (N,), given for all of the sets or for none; with them batches are (x, y).

    Args:
        train: file of the training items.
        val: of the validation items.
        test: of the test items.
        train_labels: of the training items' labels.
        val_labels: of the validation items' labels, if `val` is given.
        test_labels: of the test items' labels, if `test` is given.
        batch_size: items in a batch of all processes together; in training divisible by their number.
        validation: number of training items held out if there is no `val`. None is a tenth.
        seed: of split, order and binarisation.
        binarization: none (floats as they are, uint8 pixels / 255); of uint8 also dynamic, static or threshold, see
            `ArrayData`.
        limit_train: keep only so many training items, for quick experiments. None keeps all.

    Example, as part of a config:
        data:
          class_path: lightning_iwae.data.Arrays
          init_args: {train: faces.npz:train, test: faces.npz:test, batch_size: 50, binarization: dynamic}
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        train_labels: str | None = None,
        val_labels: str | None = None,
        test_labels: str | None = None,
        batch_size: int = 100,
        validation: int | None = None,
        seed: int = 0,
        binarization: Binarization = "none",
        limit_train: int | None = None,
    ) -> None:
        held_out = 1 if validation is None else validation
        super().__init__(batch_size, held_out, seed, binarization, limit_train, labels=train_labels is not None)
        if val is not None and validation is not None:
            raise ValueError(f"data.validation must be null where data.val is given. Got {validation}.")
        self.tenth = validation is None
        self.files = {"train": train, "val": val, "test": test}
        self.label_files = {"train": train_labels, "val": val_labels, "test": test_labels}
        for split, labels in self.label_files.items():
            if (labels is not None) != (self.labels and self.files[split] is not None):
                raise ValueError(
                    f"data.{split}_labels must be given where data.{split} and data.train_labels are, else be null. "
                    f"Got {labels or 'null'}."
                )

    def load(self) -> tuple[Items, Items, Items | None]:
        """The files' items, and labels if there are any."""
        sets = {split: self._read(split, file) for split, file in self.files.items() if file is not None}
        train = sets["train"]
        if "val" not in sets:
            if self.tenth:
                self.validation = max(1, len(parts(train)[0]) // 10)
            train, sets["val"] = self.split(train)
        return train, sets["val"], sets.get("test")

    def test_dataloader(self) -> Batches:
        """The test items in order; ValueError if there are none."""
        if self.files["test"] is None:
            raise ValueError("data.test must be given for a test or a prediction. Got null.")
        return super().test_dataloader()

    def _read(self, split: str, file: str) -> Items:
        x, form = read_items(f"data.{split}", file)
        if x.dtype != torch.uint8 and self.binarization != "none":
            raise ValueError(f"data.binarization must be none, as {file} is not uint8. Got {self.binarization}.")
        if split == "train":
            self._form = form
        elif form != self._form:
            raise DataError(f"data.{split}: {file} must have items as data.train, {self._form}. Got {form}.")
        labels = self.label_files[split]
        return x if labels is None else (x, read_labels(f"data.{split}_labels", labels, len(x)))

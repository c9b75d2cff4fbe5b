"""scikit-learn's 8x8 digits: small, and inside its wheel, so that nothing is downloaded."""

import torch

from lightning_iwae.data.base import ArrayData, Binarization, check_at_least
from lightning_iwae.data.batches import Items, generator_for, take


class Digits(ArrayData):
    """The 1,797 digits of 64 pixels from `sklearn.datasets.load_digits`; 0..16 there, 0..255 here.

    The test items are the same for every seed, as in other data sets; `seed` splits off the validation items.

    Args:
        batch_size: items in a batch of all processes together; in training divisible by their number.
        validation: number of training items held out, chosen by `seed`.
        test: number of test items.
        seed: of validation split, order and binarisation.
        binarization: dynamic (drawn at each presentation), static (drawn once), threshold (pixel >= 128) or
            none (intensities in [0, 1]).
        limit_train: keep only so many training items, for quick experiments. None keeps all.
        labels: batches are (x, y), y the digit.
    """

    def __init__(
        self,
        batch_size: int = 100,
        validation: int = 200,
        test: int = 360,
        seed: int = 0,
        binarization: Binarization = "dynamic",
        limit_train: int | None = None,
        labels: bool = False,
    ) -> None:
        super().__init__(batch_size, validation, seed, binarization, limit_train, labels)
        check_at_least("test", test, 1)
        self.test_items = test

    def load(self) -> tuple[Items, Items, Items]:
        """Images as uint8 (N, 64), and digits (N,): training, validation, test."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = torch.from_numpy(digits.data).mul(255 / 16).round().to(torch.uint8)
        if self.test_items >= len(pixels):
            raise ValueError(f"data.test must be below the {len(pixels)} digits. Got {self.test_items}.")
        order = torch.randperm(len(pixels), generator=generator_for("digits", "test"))
        items = take((pixels, torch.from_numpy(digits.target)), order)
        train, val = self.split(take(items, slice(self.test_items, None)))
        return train, val, take(items, slice(self.test_items))

"""Data sets, one LightningDataModule a file: whole batches by index from tensors in memory."""

from lightning_iwae.data.base import ArrayData, DataError
from lightning_iwae.data.batches import Batches
from lightning_iwae.data.digits import Digits
from lightning_iwae.data.gaussian import Gaussian
from lightning_iwae.data.mnist import MNIST

__all__ = ["MNIST", "ArrayData", "Batches", "DataError", "Digits", "Gaussian"]

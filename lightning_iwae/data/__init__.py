"""Data sets, one LightningDataModule a file: whole batches by index from tensors in memory."""

from lightning_iwae.data.arrays import Arrays
from lightning_iwae.data.base import ArrayData, DataError
from lightning_iwae.data.batches import Batches
from lightning_iwae.data.digits import Digits
from lightning_iwae.data.fashion_mnist import FashionMNIST
from lightning_iwae.data.gaussian import Gaussian
from lightning_iwae.data.kmnist import KMNIST
from lightning_iwae.data.mnist import MNIST
from lightning_iwae.data.omniglot import Omniglot

__all__ = [
    "KMNIST",
    "MNIST",
    "ArrayData",
    "Arrays",
    "Batches",
    "DataError",
    "Digits",
    "FashionMNIST",
    "Gaussian",
    "Omniglot",
]

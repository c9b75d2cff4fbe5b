"""Data of the linear-Gaussian model, whose bounds and gradients have closed forms."""

import torch
from torch import Tensor

from lightning_iwae.data.base import ArrayData, check_at_least
from lightning_iwae.data.batches import generator_for


class Gaussian(ArrayData):
    """The toy of Rainforth et al. 2018, section 4 (https://arxiv.org/abs/1802.04537).

    mu_true ~ N(0, I), z ~ N(mu_true, I), x | z ~ N(z, I), so that x ~ N(mu_true, 2 I). Training, validation
    and test sets have `size` items each and share `mu_true`. The training set's likeliest mu is `train_mean`.

    Args:
        batch_size: items in a batch of all processes together; in training divisible by their number.
        dim: dimension of mu, z and x.
        size: number of items in each set.
        seed: of mu_true, data and order.
    """

    def __init__(self, batch_size: int = 128, dim: int = 20, size: int = 1_024, seed: int = 0) -> None:
        check_at_least("dim", dim, 1)
        check_at_least("size", size, 1)
        super().__init__(batch_size, validation=size, seed=seed, binarization="none")
        self.dim = dim
        self.size = size
        self.mu_true = torch.randn(dim, generator=generator_for(seed, "gaussian", "mu"))

    def load(self) -> tuple[Tensor, Tensor, Tensor]:
        """Items as float32 (size, dim): training, validation, test."""
        return self._draw("train"), self._draw("val"), self._draw("test")

    def _draw(self, split: str) -> Tensor:
        generator = generator_for(self.seed, "gaussian", split)
        z = self.mu_true + torch.randn(self.size, self.dim, generator=generator)
        return z + torch.randn(self.size, self.dim, generator=generator)

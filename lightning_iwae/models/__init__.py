"""Models: modules whose prior(), posterior(x) and likelihood(z) are torch.distributions."""

from .base import Model, check_model, data_shape, draw_posterior, draw_prior
from .labels import Batch, check_labels, cut, given, split, takes_labels
from .linear_gaussian import LinearGaussian
from .mlp import MLP

__all__ = [
    "MLP",
    "Batch",
    "LinearGaussian",
    "Model",
    "check_labels",
    "check_model",
    "cut",
    "data_shape",
    "draw_posterior",
    "draw_prior",
    "given",
    "split",
    "takes_labels",
]

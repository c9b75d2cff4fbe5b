"""Models: modules whose prior(), posterior(x) and likelihood(z) are torch.distributions."""

from .base import Model, check_model, data_shape, draw_posterior, draw_prior
from .convolutional import Convolutional
from .discrete import Discrete
from .labels import Batch, check_labels, cut, given, split, takes_labels
from .linear_gaussian import LinearGaussian
from .mlp import MLP
from .two_layer import TwoLayer

__all__ = [
    "MLP",
    "Batch",
    "Convolutional",
    "Discrete",
    "LinearGaussian",
    "Model",
    "TwoLayer",
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

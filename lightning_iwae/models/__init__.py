"""Models: modules whose prior(), posterior(x) and likelihood(z) are torch.distributions."""

from .base import Model, check_labels, check_model, given
from .linear_gaussian import LinearGaussian
from .mlp import MLP

__all__ = ["MLP", "LinearGaussian", "Model", "check_labels", "check_model", "given"]

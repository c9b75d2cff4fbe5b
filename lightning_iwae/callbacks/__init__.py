"""Lightning callbacks: thin shells round `evaluation` and `diagnostics`."""

from .evaluation import Evaluation
from .gradient_snr import GradientSNR

__all__ = ["Evaluation", "GradientSNR"]

"""Lightning callbacks: thin shells round `evaluation` and `diagnostics`, and the checkpoints."""

from .checkpoints import Checkpoints
from .evaluation import Evaluation
from .gradient_snr import GradientSNR

__all__ = ["Checkpoints", "Evaluation", "GradientSNR"]

"""Lightning callbacks: thin shells round evaluation, diagnostics, figures and predictions, and the checkpoints."""

from .checkpoints import Checkpoints
from .evaluation import Evaluation
from .figures import Figures
from .gradient_snr import GradientSNR
from .predictions import Predictions

__all__ = ["Checkpoints", "Evaluation", "Figures", "GradientSNR", "Predictions"]

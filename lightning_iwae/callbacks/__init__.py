"""Lightning callbacks: thin shells round evaluation, diagnostics, figures and predictions, and the checkpoints."""

from .annealing import AIS, BDMC
from .checkpoints import Checkpoints
from .evaluation import Evaluation
from .figures import Figures
from .gradient_snr import GradientSNR
from .predictions import Predictions

__all__ = ["AIS", "BDMC", "Checkpoints", "Evaluation", "Figures", "GradientSNR", "Predictions"]

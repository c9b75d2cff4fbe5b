"""Lightning callbacks: thin shells round `evaluation`, `diagnostics` and `figures`, and the checkpoints."""

from .checkpoints import Checkpoints
from .evaluation import Evaluation
from .figures import Figures
from .gradient_snr import GradientSNR

__all__ = ["Checkpoints", "Evaluation", "Figures", "GradientSNR"]

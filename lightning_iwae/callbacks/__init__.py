"""Lightning callbacks: thin shells round `evaluation`, `diagnostics` and `figures`."""

from .evaluation import Evaluation
from .figures import Figures
from .gradient_snr import GradientSNR

__all__ = ["Evaluation", "Figures", "GradientSNR"]

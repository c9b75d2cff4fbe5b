"""Importance-weighted auto-encoders whose two networks are trained on separate bounds and estimators."""

from ._version import __version__
from .estimators import Side
from .routing import iw_loss

__all__ = ["Side", "__version__", "iw_loss"]

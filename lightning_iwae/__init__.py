"""Importance-weighted auto-encoders whose two networks are trained on separate bounds and estimators."""

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .loading import load
    from .sides import Side
    from .slices import iw_loss

__all__ = ["Side", "__version__", "iw_loss", "load"]
# imported when first used: torch takes seconds
HOME = {"Side": ".sides", "iw_loss": ".slices", "load": ".loading"}


def __getattr__(name: str) -> Any:
    """The public name `name`, from where it is defined."""
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(HOME[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

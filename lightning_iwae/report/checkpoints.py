"""The step of a checkpoint, without its weights and without torch."""

import pickle
import zipfile
from pathlib import Path
from typing import Any


class _Inert(dict):
    """Stands for whatever a pickle names: takes everything, does nothing."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __setstate__(self, _: Any) -> None:
        pass


class _Plain(pickle.Unpickler):
    """Reads plain values, and runs nothing: tensors and all other objects come out inert."""

    def find_class(self, module: str, name: str) -> Any:
        return _Inert

    def persistent_load(self, pid: Any) -> None:
        """A tensor's numbers, which lie elsewhere in the file."""


def step_of(path: Path) -> int | None:
    """Steps of training that are in a checkpoint; None where there is none, or it can't be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
            with archive.open(name) as file:
                step = _Plain(file).load()["global_step"]
    except Exception:  # a broken pickle can raise anything
        return None
    return step if type(step) is int else None

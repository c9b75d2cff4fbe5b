"""Class paths of a config: the class that one means, or what was probably meant."""

import importlib
import inspect
from collections.abc import Iterable
from typing import Any

from .mistakes import Mistake, did_you_mean, nearest


def find_class(path: str, bases: list[type]) -> type:
    """The class that a class_path means. Mistake unless there is one, and it derives from one of `bases`."""
    found = by_name(path, bases) if "." not in path else imported(path, bases)
    if not (inspect.isclass(found) and issubclass(found, tuple(bases))):
        wanted = " or ".join(an(public(base)) for base in bases)
        raise Mistake(f"must be the class_path of {wanted}. Got {path!r}, which is not one.")
    return found


def by_name(name: str, bases: list[type]) -> type:
    """A class by its bare name, among those that are loaded."""
    known = {c.__name__: c for c in subclasses(bases)}
    if name not in known:
        raise Mistake(
            f"no class {name!r} is known.{did_you_mean(public(known[n]) if (n := nearest(name, known)) else None)}"
        )
    return known[name]


def imported(path: str, bases: list[type]) -> Any:
    """What is at a dotted path."""
    names = path.split(".")
    found: Any = None
    for depth, name in enumerate(names):
        here = ".".join(names[: depth + 1])
        if hasattr(found, name):
            found = getattr(found, name)
            continue
        try:
            if found is not None and not inspect.ismodule(found):
                raise ModuleNotFoundError(name=here)
            found = importlib.import_module(here)
        except ModuleNotFoundError as error:
            if error.name != here:
                raise Mistake(f"{here} can't be imported: {error}.") from error
            raise Mistake(
                f"{not_there(name, names[:depth])}{did_you_mean(nearest_class(path, found, bases))}"
            ) from error
        except ImportError as error:
            raise Mistake(f"{here} can't be imported: {error}.") from error
    return found


def not_there(name: str, above: list[str]) -> str:
    """Where an import path ends."""
    return f"{'.'.join(above)} has no {name!r}." if above else f"no module {name!r}."


def nearest_class(path: str, module: Any, bases: list[type]) -> str | None:
    """The class that a path was probably meant to lead to: of the module that it leads to, else of all that fit."""
    beside = {n: c for n, c in vars(module).items() if inspect.isclass(c)} if module is not None else {}
    beside = {n: c for n, c in beside.items() if issubclass(c, tuple(bases))}
    name = path.rpartition(".")[2]
    if near := nearest(name, beside):
        return public(beside[near])
    everywhere = {public(c): c for c in subclasses(bases)}
    by_last = {p.rpartition(".")[2]: p for p in everywhere}
    near = nearest(path, everywhere, 0.8)
    return near or (by_last[n] if (n := nearest(name, by_last, 0.8)) else None)


def subclasses(bases: Iterable[type]) -> set[type]:
    """All subclasses that are loaded."""
    found: set[type] = set()
    for base in bases:
        derived: list[type] = base.__subclasses__()
        for cls in derived:
            if cls not in found:
                found |= {cls, *subclasses([cls])}
    return found


def public(cls: type) -> str:
    """The shortest path by which a class can be imported."""
    names = cls.__module__.split(".")
    for depth in range(1, len(names) + 1):
        module = ".".join(names[:depth])
        if getattr(importlib.import_module(module), cls.__name__, None) is cls:
            return f"{module}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def an(name: str) -> str:
    """The name with its article."""
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"

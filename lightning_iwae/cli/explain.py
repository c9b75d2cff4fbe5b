"""Why the parser refused: the one key that is wrong, what it must be, and what it was probably meant to be.

jsonargparse decides what a valid config is; this only looks for the reason once it has said no. It goes down the
merged config beside the parser's own options, asking the parser about one value at a time.
"""

import dataclasses
import inspect
import os
import types
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..class_paths import an, find_class, public
from ..mistakes import Mistake, did_you_mean, nearest, shown
from .configs import Request, merge


class Fault(NamedTuple):
    """Something that is wrong. A lower rank is surer to be the reason."""

    rank: int
    text: str


def reason(parser: ArgumentParser, request: Request) -> str | None:
    """What to tell the user whose `request` the `parser` has refused, if it can be found."""
    try:
        faults = list(walk(parser, resolved(parser, request), "", request))
    except Mistake as mistake:
        return str(mistake)
    return min(faults, key=lambda fault: fault.rank).text if faults else None


def brief(message: str) -> str:
    """The parser's own words, without the subtypes of unions."""
    lines = [line.strip("- ") for line in message.splitlines()]
    kept = [line for line in lines if line and not line.startswith(("Subtypes:", "Errors:", "Given value type"))]
    return " ".join(kept)[:400]


# ---------------------------------------------------------------------------------------------- references
def resolved(parser: ArgumentParser, request: Request) -> dict[str, Any]:
    """The request's tree, with ${} replaced. Mistake for a reference that leads nowhere."""
    tree: dict[str, Any] = request.tree
    if "${" not in str(tree):
        return tree
    full = parser.get_defaults(skip_validation=True).as_dict()
    merge(full, deepcopy(tree))
    try:
        whole: Any = OmegaConf.to_container(OmegaConf.create(full), resolve=True)
    except OmegaConfBaseException as error:
        raise Mistake(bad_reference(error, full, request)) from error
    return only(tree, whole)


def only(tree: Any, values: Any) -> Any:
    """Those of `values` that `tree` has, in its shape."""
    if isinstance(tree, dict) and isinstance(values, dict):
        return {key: only(value, values.get(key)) for key, value in tree.items()}
    return values


def bad_reference(error: OmegaConfBaseException, full: dict[str, Any], request: Request) -> str:
    """Which key refers to what that is not there."""
    key = error.full_key or "config"
    what = f"{key}{request.where(key)}"
    problem = str(error.msg or error).splitlines()[0]
    if "Recursive" in problem:
        return f"{what} refers to itself by its ${{}}, directly or through another key."
    target = problem.split("'")[1] if problem.startswith("Interpolation key '") else ""
    if not target:
        return f"{what} has a ${{}} that can't be resolved: {problem}."
    near = did_you_mean(nearest(target, [key for key, _ in nodes(full)]))
    return f"{what} refers to ${{{target}}}, which is no key.{near}"


# ---------------------------------------------------------------------------------------------- keys
def walk(
    parser: ArgumentParser, tree: dict[str, Any], prefix: str, request: Request, group: str = ""
) -> Iterator[Fault]:
    """The faults of `tree`, whose keys are below `group` of the parser's; `prefix` is the parser's own key."""
    known = options_of(parser)
    linked = getattr(parser, "linked", {})
    for name, value in tree.items():
        own = f"{group}{name}"
        key = f"{prefix}{own}"
        if key in linked:
            yield Fault(0, f"{key}{request.where(key)} follows {linked[key]}. Set that instead.")
        elif any(k.startswith(f"{own}.") for k in known):
            if isinstance(value, dict):
                yield from walk(parser, value, prefix, request, f"{own}.")
            elif not (isinstance(value, str) and os.path.isfile(value)):
                yield Fault(0, f"{key}{request.where(key)} must be a mapping of keys. Got {shown(value)}.")
        elif own not in known:
            yield Fault(0, unknown(key, own, known, prefix, request))
        elif (hint := getattr(known[own], "_typehint", None)) is not None:
            yield from check(key, value, hint, request)
    if not group:
        yield from missing(parser, tree, prefix, linked)


def options_of(parser: ArgumentParser) -> dict[str, Any]:
    """The parser's keys and their actions, without those that only load a file for a group."""
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "==SUPPRESS==")}
    return {k: a for k, a in actions.items() if not k.endswith(".help") and type(a).__name__ != "_ActionConfigLoad"}


def unknown(key: str, own: str, known: Iterable[str], prefix: str, request: Request) -> str:
    """What to say of a key that is none: the nearest beside it, else the nearest anywhere, else all beside it."""
    group, _, name = own.rpartition(".")
    beside = [k for k in known if k.rpartition(".")[0] == group]
    beside += [] if group else sorted({k.partition(".")[0] for k in known if "." in k})
    names = {k.rpartition(".")[2]: k for k in beside}
    elsewhere = [k for k in known if k.rpartition(".")[2] == name]
    near = names.get(nearest(name, names, 0.8) or "") or next(iter(elsewhere), None)
    near = near or names.get(nearest(name, names) or "") or nearest(own, known, 0.85)
    listed = f" Known there: {', '.join(names)}." if len(names) < 20 else ""
    return f"{key}{request.where(key)} is not a known key.{did_you_mean(prefix + near) if near else listed}"


def missing(parser: ArgumentParser, tree: dict[str, Any], prefix: str, linked: dict[str, str]) -> Iterator[Fault]:
    """The required keys that `tree` lacks."""
    required = {action.dest for action in parser._actions if action.required} | parser._extra_required_keys
    for key in sorted(required):
        node: Any = tree
        for name in key.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        if node is None and f"{prefix}{key}" not in linked:
            action = options_of(parser).get(key)
            what = expected(getattr(action, "_typehint", None)).removesuffix(" or null")
            yield Fault(1, f"{prefix}{key} is missing: it must be {what}.")


def check_accepted(parser: ArgumentParser, request: Request) -> None:
    """Mistake for what the parser takes without a word: no mapping for a group, null for a number, linked keys."""
    known, tree = options_of(parser), request.tree
    for key, value in nodes(tree):
        hint = getattr(known.get(key), "_typehint", None)
        if any(k.startswith(f"{key}.") for k in known) and not isinstance(value, dict | str):
            raise Mistake(f"{key}{request.where(key)} must be a mapping of keys. Got {shown(value)}.")
        if value is None and hint is not None and not allows_null(hint):
            raise Mistake(not_of_type(key, None, hint, request))
    for target, source in getattr(parser, "linked", {}).items():
        for key in (target, target.replace(".init_args", "")):
            if key in dict(nodes(tree)):
                raise Mistake(f"{key}{request.where(key)} follows {source}. Set that instead.")


def nodes(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value and mapping."""
    for name, value in tree.items():
        yield f"{prefix}{name}", value
        if isinstance(value, dict):
            yield from nodes(value, f"{prefix}{name}.")


def allows_null(hint: Any) -> bool:
    """Whether null is a value of this type, as far as can be known."""
    return any(part is type(None) or not (part in WORDS or get_origin(part) is Literal) for part in members(hint))


# ---------------------------------------------------------------------------------------------- values
def check(key: str, value: Any, hint: Any, request: Request) -> Iterator[Fault]:
    """What is wrong with one value of the type `hint`."""
    value = structured(value, hint)
    fine = allows_null(hint) if value is None else fits(value, hint)
    bases = classes(hint)
    if fine and not (bases and isinstance(value, dict | list) and "None" in str(value)):  # a null may lie deeper
        return
    if isinstance(value, list) and (item := item_of(hint)) is not None:
        for i, element in enumerate(value):
            yield from check(f"{key}[{i}]", element, item, request)
    elif bases and dataclasses.is_dataclass(bases[0]) and isinstance(value, dict):
        yield from walk(parser_of(bases[0], set()), value, f"{key}.", request)
    elif bases and (isinstance(value, dict) or (isinstance(value, str) and str not in members(hint))):
        yield from check_class(key, value, hint, bases, request)
    elif not fine:
        yield Fault(0, not_of_type(key, value, hint, request))


def structured(value: Any, hint: Any) -> Any:
    """The list or mapping that an option's text means."""
    if not isinstance(value, str) or str in members(hint) or not value.startswith(("[", "{", "- ")):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def not_of_type(key: str, value: Any, hint: Any, request: Request) -> str:
    """`key` must be one thing and is another."""
    near = nearest(value, [str(c) for c in choices(hint)]) if isinstance(value, str) else None
    return f"{key}{request.where(key)} must be {expected(hint)}. Got {shown(value)}.{did_you_mean(near)}"


def fits(value: Any, hint: Any) -> bool:
    """Whether the parser takes `value` for an option of type `hint`."""
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=hint, sub_configs=True)
        parser.parse_object({"value": deepcopy(value)})
    except Exception:
        return False
    return True


def members(hint: Any) -> list[Any]:
    """The types that a union allows, or the one type."""
    if get_origin(hint) in (Union, types.UnionType):
        return [m for part in get_args(hint) for m in members(part)]
    return [hint]


def choices(hint: Any) -> list[Any]:
    """The values that Literal allows."""
    return [c for part in members(hint) if get_origin(part) is Literal for c in get_args(part)]


def item_of(hint: Any) -> Any:
    """The type of a list's items."""
    lists = [p for p in members(hint) if isinstance(get_origin(p), type) and issubclass(get_origin(p), Iterable)]
    lists = [p for p in lists if get_origin(p) not in (dict, tuple) and len(get_args(p)) == 1]
    return get_args(lists[0])[0] if lists else None


def classes(hint: Any) -> list[type]:
    """The classes that a value of type `hint` is an instance of, or makes."""
    found = []
    for part in members(hint):
        if get_origin(part) is Callable and get_args(part):
            found += classes(get_args(part)[-1])
        elif inspect.isclass(part) and part.__module__ not in ("builtins", "pathlib", "enum"):
            found.append(part)
    return found


WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def expected(hint: Any) -> str:
    """A type in words."""
    words = []
    if literals := list(dict.fromkeys(str(c) for c in choices(hint))):
        words.append(f"one of {', '.join(literals)}")
    for part in members(hint):
        origin = get_origin(part)
        if part in WORDS:
            words.append(WORDS[part])
        elif dataclasses.is_dataclass(part):
            words.append(f"a mapping of {', '.join(field.name for field in dataclasses.fields(part))}")
        elif classes(part):
            words.append(f"the class_path of {an(public(classes(part)[0]))}")
        elif item_of(part) is not None:
            words.append(f"a list of ({expected(item_of(part))})")
        elif origin is not Literal:
            words.append("a mapping" if origin is dict else "a path" if "Path" in str(part) else "another value")
    return " or ".join(dict.fromkeys(words))


# ---------------------------------------------------------------------------------------------- classes
def check_class(key: str, value: Any, hint: Any, bases: list[type], request: Request) -> Iterator[Fault]:
    """What is wrong with {class_path, init_args} or a class path."""
    spec = {"class_path": value} if isinstance(value, str) else dict(value)
    path = spec.pop("class_path", None)
    given = spec.pop("init_args", None)
    spec.pop("dict_kwargs", None)
    if not isinstance(path, str):
        got = f"Got {shown(path)}." if path is not None else f"Got {shown(value)} without one."
        yield Fault(0, f"{key}{request.where(key)} must have a class_path, of {an(public(bases[0]))}. {got}")
        return
    class_key = f"{key}.class_path" if isinstance(value, dict) else key
    try:
        cls = find_class(path, bases)
    except Mistake as mistake:
        where = f"{class_key}{request.where(class_key)}"
        yield Fault(0, f"{where} {mistake}" if str(mistake).startswith("must") else f"{where}: {mistake}")
        return
    if given is not None and not isinstance(given, dict):
        yield Fault(0, f"{key}.init_args{request.where(f'{key}.init_args')} must be a mapping. Got {shown(given)}.")
        return
    parser = parser_of(cls, skipped(hint))
    init_args = dict(given or {})
    for name, stray in spec.items():
        if name in options_of(parser):  # --model.network.latent is short for ...init_args.latent
            init_args.setdefault(name, stray)
            where = request.where(f"{key}.{name}")
            yield Fault(2, f"{key}.{name}{where} belongs below init_args: {key}.init_args.{name}.")
        else:
            own = nearest(name, ["class_path", "init_args"])
            text = unknown(f"{key}.{name}", name, options_of(parser), f"{key}.init_args.", request)
            yield Fault(0, f"{key}.{name} is not a known key.{did_you_mean(f'{key}.{own}')}" if own else text)
    yield from walk(parser, init_args, f"{key}.init_args.", request)


def skipped(hint: Any) -> set[int]:
    """How many arguments the caller of an optimiser's or scheduler's class will give."""
    calls = [m for m in members(hint) if get_origin(m) is Callable and get_args(m)]
    return {len(get_args(calls[0])[0])} if calls else set()


def parser_of(cls: type, skip: set[Any]) -> ArgumentParser:
    """A parser of the arguments of a class."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False, skip=skip)
    return parser

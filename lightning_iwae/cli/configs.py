"""A command line and its config files read by themselves: to find what is wrong with them, and where it was written.

What a run is made of is the parser's to read. This reads the same words a second time, in order to refuse early what
the parser would take silently (a key given twice, an empty file) and to say of a bad key which line it stands on.
"""

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..mistakes import Mistake, did_you_mean, nearest

FLAGS = ("-h", "--help", "--print_config")
NUMBER = re.compile(r"-\.?\d")


@dataclass
class Source:
    """One config file, or one option of the command line: its keys and the line of each (0: the command line)."""

    name: str
    tree: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)


@dataclass
class Request:
    """All that the user asked for, in order."""

    sources: list[Source]

    @property
    def tree(self) -> dict[str, Any]:
        """The sources merged, later ones winning."""
        merged: dict[str, Any] = {}
        for source in self.sources:
            merge(merged, deepcopy(source.tree))
        return merged

    def where(self, key: str) -> str:
        """' (FILE, line N)' where `key` was last given, or nothing where it was not.

        An option may leave init_args and class_path out.
        """
        short = key.replace(".init_args", "").removesuffix(".class_path")
        for source in reversed(self.sources):
            if key in source.lines:
                return f" ({source.name}, line {source.lines[key]})" if source.lines[key] else f" ({source.name})"
            option = next(iter(source.lines.items()))  # of a command line's source there is one
            if option[1] == 0 and (option[0] == short or option[0].startswith(f"{key}.")):
                return f" ({source.name})"
        return ""


def read(words: list[str]) -> Request:
    """The files and options of a sub-command's arguments. Mistake where one cannot be read."""
    sources = []
    for name, value in options(words):
        if name in ("-c", "--config"):
            sources.append(read_file(value))
        else:
            sources.append(from_option(name[2:], value))
    return Request(sources)


# ---------------------------------------------------------------------------------------------- the command line
def options(words: list[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of each option but flags. Mistake for a word that is no option, and for one without its value."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word.startswith("-c") and not word.startswith("--"):
            name, equals, value = "-c", word[2:], word[2:].removeprefix("=")
        if name in FLAGS or name.endswith(".help"):
            continue
        if not name.startswith("-"):
            raise Mistake(f"unexpected argument {word!r}: options are --key value, files -c FILE.")
        if name != "-c" and not name.startswith("--"):
            raise Mistake(f"unknown option {word}: options are --key value, files -c FILE.")
        if not equals:
            if not rest or is_option(rest[0]):
                what = "a file" if name in ("-c", "--config") else "a value"
                got = f" Got {rest[0]} next." if rest else " Nothing follows it."
                raise Mistake(f"{name.removeprefix('--')} needs {what}: {name} {what.split()[1].upper()}.{got}")
            value = rest.pop(0)
        yield name, value


def is_option(word: str) -> bool:
    """Whether a word is an option rather than the value of the one before it."""
    return len(word) > 1 and word.startswith("-") and not NUMBER.match(word) and not word.startswith("- ")  # a list


def from_option(key: str, value: str) -> Source:
    """`--a.b value` as {a: {b: value}}; `--a.b+ value` as {a: {b+: [value]}}, which `merge` appends."""
    tree: Any = [value] if key.endswith("+") else value
    for name in reversed(key.split(".")):
        tree = {name: tree}
    return Source("command line", tree, {key.removesuffix("+"): 0})


# ---------------------------------------------------------------------------------------------- files
def read_file(name: str, keys: str = "model, data, trainer, ...") -> Source:
    """A config file, or another YAML of such keys.

    Mistake, with its line, unless it holds one mapping of keys of which none is given twice.
    """
    text = text_of(name)
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is None:
            raise Mistake(f"{name} is empty: expected a mapping of keys ({keys}).")
        if not isinstance(node, yaml.MappingNode):
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "text"
            raise Mistake(f"{name} must hold a mapping of keys ({keys}). Got {kind}.")
        lines: dict[str, int] = {}
        note_lines(node, "", name, lines, ())
        return Source(name, yaml.safe_load(text), lines)
    except yaml.YAMLError as error:
        raise Mistake(f"{name}{yaml_problem(error)}") from error


def text_of(name: str) -> str:
    """The text of a file; Mistake where there is none."""
    path = Path(name)
    try:
        if path.is_dir():
            raise Mistake(f"config {name} is a directory: expected a YAML file.")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise Mistake(f"config {name}: no such file.{suggestion(path)}") from error
    except UnicodeDecodeError as error:
        raise Mistake(f"config {name} is not UTF-8 text (byte {error.start}): expected a YAML file.") from error
    except (OSError, ValueError) as error:
        raise Mistake(f"config {name} can't be read: {getattr(error, 'strerror', None) or error}.") from error


def suggestion(path: Path) -> str:
    """The file beside it that was probably meant."""
    try:
        there = [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    except OSError:
        return ""
    near = nearest(path.name, there)
    return did_you_mean(str(path.with_name(near)) if near else None)


def yaml_problem(error: yaml.YAMLError) -> str:
    """', line N: what is wrong' of an error that yaml raised."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    line = f", line {mark.line + 1}" if mark else ""
    hint = " Indent with spaces, not tabs." if r"'\t'" in problem else ""
    return f"{line}: not valid YAML: {problem}.{hint}"


def note_lines(node: yaml.Node, prefix: str, name: str, lines: dict[str, int], above: tuple[yaml.Node, ...]) -> None:
    """Note the line of each dotted key below `node`. Mistake for a key that is given twice."""
    if node in above:
        raise Mistake(f"{name}, line {node.start_mark.line + 1}: {prefix} contains itself.")
    for key, at, value in children(node, prefix, name):
        lines[key] = at.start_mark.line + 1
        note_lines(value, key, name, lines, (*above, node))


def children(node: yaml.Node, prefix: str, name: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """(dotted key, where it stands, value) of a list or mapping."""
    if isinstance(node, yaml.SequenceNode):
        yield from ((f"{prefix}[{i}]", item, item) for i, item in enumerate(node.value))
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key_node, value in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key, line = f"{prefix}.{key_node.value}".lstrip("."), key_node.start_mark.line + 1
        if key in first:
            raise Mistake(f"{name}, line {line}: {key} is given twice, first on line {first[key]}. Keep one of them.")
        first[key] = line
        yield key, key_node, value


# ---------------------------------------------------------------------------------------------- merging
def merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    """Lay `new` over `into`, as the parser does: mappings are merged, all else is replaced.

    A class_path that changes leaves init_args behind, which the new class may not take.
    """
    for key, value in new.items():
        old = into.get(key.removesuffix("+"))
        if key.endswith("+"):
            into[key[:-1]] = [*old, *value] if isinstance(old, list) else value
            continue
        if isinstance(old, dict) and "class_path" in old and isinstance(value, str):
            value = {"class_path": value}
        if isinstance(old, list) and old and isinstance(old[-1], dict) and isinstance(value, dict):
            old = old[-1]  # an option for what a list ends with
        if isinstance(old, dict) and isinstance(value, dict):
            if value.get("class_path", old.get("class_path")) != old.get("class_path"):
                old.clear()
            merge(old, value)
        else:
            into[key] = value

"""The search space: what a trial may choose for dotted keys, and the points that it consists of."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..mistakes import Mistake, did_you_mean, nearest, shown

FORMS = {
    frozenset({"choices"}): "choices",
    frozenset({"low", "high"}): "range",
    frozenset({"low", "high", "log"}): "range",
    frozenset({"low", "high", "step"}): "range",
    frozenset({"divisors_of"}): "divisors",
}
KNOWN = ("choices", "low", "high", "log", "step", "divisors_of", "when")


@dataclass(frozen=True)
class Parameter:
    """One key of the space. Exactly one of choices, low and high, divisors_of is given."""

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    divisors_of: Any = None  # a number, or a key of the space
    when: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # key -> values under which this one is chosen

    @property
    def form(self) -> str:
        """choices, divisors or range."""
        return "choices" if self.choices else "range" if self.divisors_of is None else "divisors"

    def applies(self, known: Mapping[str, Any]) -> bool:
        """Whether it is chosen, with these values of the keys before it."""
        return all(known.get(key) in values for key, values in self.when.items())

    def name(self, known: Mapping[str, Any]) -> str:
        """Its name in the study. Each set of divisors is a parameter of its own, since Optuna's have one set each."""
        following = self.form == "divisors" and isinstance(self.divisors_of, str)
        return f"{self.key} (divides {known[self.divisors_of]})" if following else self.key

    def finite(self, known: Mapping[str, Any]) -> list[Any] | None:
        """All its values, or None if they are without number."""
        if self.form == "choices":
            return list(self.choices)
        if self.form == "divisors":
            n = self.divisors_of if isinstance(self.divisors_of, int) else known[self.divisors_of]
            return [d for d in range(1, n + 1) if n % d == 0]
        if self.log or (self.step is None and not self.integer):
            return None
        step = self.step or 1
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        return [type(self.low)(self.low + i * step) for i in range(count)]

    @property
    def integer(self) -> bool:
        """Whether a range is of whole numbers: its ends, and its step, are written as such."""
        return all(isinstance(v, int) for v in (self.low, self.high, self.step or 1))

    def suggest(self, trial: Any, known: Mapping[str, Any]) -> Any:
        """An Optuna trial's value of it."""
        name = self.name(known)
        if self.form != "range":
            return decoded(trial.suggest_categorical(name, [encoded(v) for v in self.finite(known) or []]))
        if self.integer:
            return trial.suggest_int(name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(name, float(self.low), float(self.high), step=self.step, log=self.log)


@dataclass(frozen=True)
class Space:
    """The parameters, in the order in which they are chosen: what `when` and `divisors_of` name comes before."""

    parameters: tuple[Parameter, ...]

    def suggest(self, trial: Any, base: Mapping[str, Any]) -> dict[str, Any]:
        """An Optuna trial's point: key -> value. `base` has the other settings, by dotted key."""
        point: dict[str, Any] = {}
        for parameter in self.parameters:
            known = {**base, **point}
            if parameter.applies(known):
                point[parameter.key] = parameter.suggest(trial, known)
        return point

    def points(self, base: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Every point of the grid, and the study's parameters of it. Mistake where a range has no step."""
        yield from self._from(0, {}, {}, base)

    def first(self, base: Mapping[str, Any], parameter: Parameter | None = None) -> dict[str, Any]:
        """One point, in which `parameter`, if any is given, is chosen: to try the settings with."""
        wanted = {key: values[0] for key, values in parameter.when.items()} if parameter else {}
        point: dict[str, Any] = {}
        for p in self.parameters:
            known = {**base, **point}
            if p.applies(known):
                values = p.finite(known)
                point[p.key] = wanted[p.key] if p.key in wanted else values[0] if values else p.low
        return point

    def _from(
        self, depth: int, point: dict[str, Any], names: dict[str, Any], base: Mapping[str, Any]
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        if depth == len(self.parameters):
            yield point, names
            return
        parameter, known = self.parameters[depth], {**base, **point}
        if not parameter.applies(known):
            yield from self._from(depth + 1, point, names, base)
            return
        values = parameter.finite(known)
        if values is None:
            raise Mistake(f"space.{parameter.key} must be a list, or have a step, for sampler: grid.")
        for value in values:
            chosen = names | {parameter.name(known): encoded(value) if parameter.form != "range" else value}
            yield from self._from(depth + 1, point | {parameter.key: value}, chosen, base)


def encoded(value: Any) -> Any:
    """A choice as Optuna can store it: itself, or its JSON if it is a list or a mapping."""
    return value if value is None or isinstance(value, bool | int | float | str) else f"json:{json.dumps(value)}"


def decoded(value: Any) -> Any:
    """The choice that was `encoded`."""
    return json.loads(value[5:]) if isinstance(value, str) and value.startswith("json:") else value


# ------------------------------------------------------------------------------------------------ reading
def read(tree: Any, base: Mapping[str, Any]) -> Space:
    """The space of a sweep's YAML. Mistake naming the key for what is none; `base` has the keys of the config."""
    if not isinstance(tree, dict) or not tree:
        raise Mistake(f"space must map dotted keys to what is tried for them. Got {shown(tree)}.")
    parameters: list[Parameter] = []
    for key, spec in tree.items():
        p = parameter(str(key), spec)
        before = [p.key for p in parameters]
        check_references(p, before, base)
        if isinstance(p.divisors_of, str) and p.divisors_of not in before:
            p = replace(p, divisors_of=base[p.divisors_of])
        parameters.append(p)
    return Space(tuple(parameters))


def parameter(key: str, spec: Any) -> Parameter:
    """One key of the space."""
    where = f"space.{key}"
    spec = {"choices": spec} if isinstance(spec, list) else dict(spec) if isinstance(spec, dict) else spec
    if not isinstance(spec, dict):
        raise Mistake(f"{where} must be a list of choices, {{low, high}} or {{divisors_of}}. Got {shown(spec)}.")
    for name in spec:
        if name not in KNOWN:
            raise Mistake(f"{where}: unknown key {name!r}.{did_you_mean(nearest(str(name), KNOWN))}")
    form = frozenset(spec) - {"when"}
    if form not in FORMS:
        raise Mistake(
            f"{where} must have choices, low and high (and log or step), or divisors_of. Got {', '.join(spec)}."
        )
    checks: dict[str, Callable[[Any], bool]] = {
        "choices": lambda v: isinstance(v, list) and len(v) > 0,
        "low": is_number,
        "high": is_number,
        "step": lambda v: is_number(v) and v > 0,
        "log": lambda v: isinstance(v, bool),
        "divisors_of": lambda v: isinstance(v, str) or (type(v) is int and v > 0),
        "when": lambda v: isinstance(v, dict) and len(v) > 0,
    }
    wanted = {
        "choices": "a list that is not empty",
        "step": "a positive number",
        "log": "true or false",
        "divisors_of": "a key or a positive whole number",
        "when": "{key: value} or {key: [values]}",
    }
    for name, value in spec.items():
        if not checks[name](value):
            raise Mistake(f"{where}.{name} must be {wanted.get(name, 'a number')}. Got {shown(value)}.{science(value)}")
    if "low" in spec and not spec["low"] < spec["high"]:
        raise Mistake(f"{where}: low must be less than high. Got {spec['low']} and {spec['high']}.")
    if spec.get("log") and spec["low"] <= 0:
        raise Mistake(f"{where}: low must be positive with log. Got {spec['low']}.")
    when = {str(k): tuple(v) if isinstance(v, list) else (v,) for k, v in spec.pop("when", {}).items()}
    return Parameter(key, tuple(spec.pop("choices", ())), when=when, **spec)


def science(value: Any) -> str:
    """A hint for numbers that YAML takes for words."""
    if isinstance(value, str):
        try:
            return f" Write {float(value)!r}." if "." in repr(float(value)) else f" Write {float(value):.1e}."
        except ValueError:
            pass
    return ""


def is_number(value: Any) -> bool:
    """A finite int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_references(p: Parameter, before: list[str], base: Mapping[str, Any]) -> None:
    """Mistake if `when` or `divisors_of` names what is not known by then."""
    named = [("when", key) for key in p.when]
    named += [("divisors_of", p.divisors_of)] if isinstance(p.divisors_of, str) else []
    for option, key in named:
        if key not in before and key not in base:
            known = [*before, *base]
            raise Mistake(
                f"space.{p.key}.{option}: {key!r} must be a key of the space that comes before it, or of the config."
                f"{did_you_mean(nearest(key, known))}"
            )
        if option == "divisors_of" and key not in before and type(base[key]) is not int:
            raise Mistake(
                f"space.{p.key}.divisors_of: {key} must be a whole number in the config. Got {shown(base[key])}."
            )

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
        return [(int if self.integer else float)(self.low + i * step) for i in range(count)]

    def tried(self, known: Mapping[str, Any]) -> list[Any]:
        """What of it is tried before the first trial: all choices, the ends of a range, the largest divisor."""
        if self.form == "range":
            last = self.low + (self.high - self.low) // self.step * self.step if self.step else self.high
            return [self.low, last]
        n = known[self.divisors_of] if isinstance(self.divisors_of, str) else self.divisors_of
        return list(self.choices) or [n]

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

    def rehearsal(self, base: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Few points in which every choice of every list is taken. Not every combination: they share the points."""
        points: list[dict[str, Any]] = []
        for p in self.parameters:
            divides = p.form == "divisors"
            for turn, value in enumerate([0] if divides else p.tried(base)):
                if not any(p.key in q and (divides or q[p.key] == value) for q in points):
                    points.append(self.first(base, p, turn))
        return points

    def first(self, base: Mapping[str, Any], parameter: Parameter | None = None, turn: int = 0) -> dict[str, Any]:
        """The first value of each key, or that of another turn, and what `parameter` needs to be chosen."""
        wanted: dict[str, Any] = {}
        asked = [parameter] if parameter else []
        while asked:  # a condition's key may have a condition itself
            for key, values in asked.pop().when.items():
                if key not in wanted:
                    wanted[key] = values[0]
                    asked += [p for p in self.parameters if p.key == key]
        point: dict[str, Any] = {}
        for p in self.parameters:
            known = {**base, **point}
            if p.applies(known):
                tried = p.tried(known)
                value = wanted.get(p.key, tried[turn % len(tried)])
                divides = p.form != "divisors" or tried[0] % value == 0  # else what needs it is not in this point
                point[p.key] = value if divides else tried[0]
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
        earlier = {q.key: q for q in parameters}
        check_references(p, earlier, {str(k) for k in tree}, base)
        if isinstance(p.divisors_of, str) and p.divisors_of not in earlier:
            p = replace(p, divisors_of=base[p.divisors_of])
        parameters.append(p)
    return Space(tuple(parameters))


def parameter(key: str, spec: Any) -> Parameter:
    """One key of the space."""
    where = f"space.{key}"
    if key == "seed_everything":
        raise Mistake("space.seed_everything: seeds are not chosen. `seeds: N` takes N of them for each trial.")
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
        "choices": lambda v: isinstance(v, list) and len(v) > 0 and all(map(is_plain, v)),
        "low": is_number,
        "high": is_number,
        "step": lambda v: is_number(v) and v > 0,
        "log": lambda v: isinstance(v, bool),
        "divisors_of": lambda v: isinstance(v, str) or (type(v) is int and v > 0),
        "when": lambda v: isinstance(v, dict) and len(v) > 0 and [] not in v.values(),
    }
    wanted = {
        "choices": "a list of numbers, words, null, lists or mappings of these, and not empty",
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
    if key == "config" and not all(v is None or isinstance(v, str) for v in spec.get("choices", [0])):
        raise Mistake(f"{where} must be a list of config files, or null for none. Got {shown(spec)}.")
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


def is_plain(value: Any) -> bool:
    """Whether JSON can write it, and reads the same."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError):
        return False


def is_number(value: Any) -> bool:
    """A finite int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_references(p: Parameter, earlier: Mapping[str, Parameter], space: set[str], base: Mapping[str, Any]) -> None:
    """Mistake if `when` or `divisors_of` names what is not known by then, or a `when` can never hold."""
    named = [("when", key) for key in p.when]
    named += [("divisors_of", p.divisors_of)] if isinstance(p.divisors_of, str) else []
    for option, key in named:
        of = earlier.get(key)
        if of is None and key in space:
            raise Mistake(f"space.{p.key}.{option}: {key} must stand above it in the space.")
        if of is None and key not in base:
            known = [*earlier, *base]
            raise Mistake(
                f"space.{p.key}.{option}: {key!r} must be a key of the space that comes before it, or of the config."
                f"{did_you_mean(nearest(key, known))}"
            )
        if option == "when" and of is None and base[key] not in p.when[key]:
            got = ", ".join(map(shown, p.when[key]))
            raise Mistake(
                f"space.{p.key}.when: {key} is {shown(base[key])} in the config, and is not chosen. Got {got}."
            )
        if option == "when" and of is not None:
            for value in p.when[key]:
                unset = of.when and key in base and base[key] == value  # what it is where it is not chosen
                if (wanted := never(of, value, earlier)) and not unset:
                    raise Mistake(f"space.{p.key}.when: {key} must be {wanted}. Got {shown(value)}.")
        if option == "divisors_of":
            values = [base[key]] if of is None else list(of.choices) if of.form == "choices" else [1]
            wrong = [v for v in values if type(v) is not int or v < 1]
            if wrong or (of is not None and of.form == "range" and not (of.integer and of.low >= 1)):
                got = shown(wrong[0]) if wrong else f"a range from {of.low if of else None}"
                raise Mistake(f"space.{p.key}.divisors_of: {key} must be a whole number from 1 on. Got {got}.")
            if of is not None and not of.when.items() <= p.when.items():
                raise Mistake(f"space.{p.key} must have the `when` of {key}, of which it is a divisor.")


def never(p: Parameter, value: Any, earlier: Mapping[str, Parameter]) -> str:
    """What a key of the space would have to be if it can't be `value`; nothing if it can."""
    if p.form == "choices":
        return "" if value in p.choices else "one of its choices"
    if p.form == "range":
        if not p.integer and not p.step:
            return "a list, or have a step, to be compared with a value"
        steps = (value - p.low) / (p.step or 1) if is_number(value) else 0.5
        fits = abs(steps - round(steps)) < 1e-9 and p.low <= value <= p.high
        return "" if fits else f"from {p.low} to {p.high}" + (f" in steps of {p.step}" if p.step else "")
    whole = type(value) is int and value > 0
    if isinstance(p.divisors_of, int):
        return "" if whole and p.divisors_of % value == 0 else f"a divisor of {p.divisors_of}"
    of = earlier[p.divisors_of]
    if of.form == "divisors":
        fits = not never(of, value, earlier)
    elif of.form == "range":
        fits = whole and of.high // value * value >= of.low
    else:
        fits = whole and any(n % value == 0 for n in of.choices)
    return "" if fits else f"a divisor of {p.divisors_of}"

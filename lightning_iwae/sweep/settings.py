"""A sweep's YAML: what is tried, by what it is judged, and how much of it."""

import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ..class_paths import find_class, public, subclasses
from ..cli import configs
from ..mistakes import Mistake, did_you_mean, nearest, shown
from .space import Space, is_number, is_plain
from .space import read as read_space

TPE = {"multivariate": True, "group": True, "constant_liar": True}  # for conditional spaces and parallel workers
NO_OBJECTIVE = (
    "A training bound is none: it grows with the number of particles, whatever the model does. "
    "Take val/log_px, or another val/ name of docs/metrics.md."
)
FIT = {"model", "data", "trainer"}  # what a fit's config consists of


@dataclass(frozen=True)
class Sweep:
    """What sweeps/optuna.yaml says, checked.

    Attributes:
        study: its name in the storage, and by default that of the directory: runs/<study>.
        configs: the base config and its overlays, as `-c` of a fit.
        options: further options of every fit, `--key=value`.
        space: what is chosen.
        objectives: name in metrics.csv -> maximize or minimize.
        sampler: class_path of an Optuna sampler, or "grid".
        trials: how many are to finish; of a grid all.
        seeds: fits of a trial, each with another seed; its objectives are their means.
        budget: steps or seconds of each fit; what the config says if none is given.
        retries: how often a trial is begun again that was lost or broke in an unknown way.
        launcher: words before the command of each fit, as srun and its options.
        evaluate: whether `test` follows each fit.
        heartbeat: seconds between two signs of life of a running trial.
        grace: seconds without one after which a trial counts as lost.
        patience: seconds for which a storage that does not answer is waited for.
        file: the YAML, for messages.
    """

    study: str
    configs: tuple[str, ...]
    space: Any
    options: tuple[str, ...] = ()
    objectives: Mapping[str, str] = field(default_factory=lambda: {"val/log_px": "maximize"})
    sampler: Any = None
    pruner: Any = None
    trials: int | None = None
    seeds: int = 1
    budget: Mapping[str, float] = field(default_factory=dict)
    retries: int = 3
    launcher: tuple[str, ...] = ()
    evaluate: bool = False
    seed: int = 0
    heartbeat: float = 10.0
    grace: float = 60.0
    patience: float = 600.0
    file: str = "sweep"

    @property
    def signs(self) -> list[int]:
        """1 for each objective to maximize, -1 for each to minimize."""
        return [1 if direction == "maximize" else -1 for direction in self.objectives.values()]

    @property
    def grid(self) -> bool:
        """Whether every point is tried once."""
        return self.sampler == "grid"

    def make_sampler(self, seed: int) -> Any:
        """The sampler of one trial. Mistake for arguments that it does not take."""
        import optuna

        if self.grid:
            return optuna.samplers.RandomSampler(seed)  # never asked: all is given
        path, arguments = class_of(self.sampler or {"class_path": "TPESampler", "init_args": TPE}, "sampler")
        return made(path, arguments, "sampler", optuna.samplers.BaseSampler, seed)

    def make_pruner(self) -> Any:
        """The pruner, or one that prunes nothing."""
        import optuna

        if self.pruner is None:
            return optuna.pruners.NopPruner()
        return made(*class_of(self.pruner, "pruner"), "pruner", optuna.pruners.BasePruner)

    def space_over(self, base: Mapping[str, Any]) -> Space:
        """The search space, with the config's settings by dotted key to refer to."""
        return read_space(self.space, base)

    def identity(self) -> dict[str, Any]:
        """What has to be the same for all who work on a study."""
        return {
            "configs": list(self.configs),
            "options": list(self.options),
            "space": self.space,
            "objective": dict(self.objectives),
            "grid": self.grid,
            "seeds": self.seeds,
            "budget": dict(self.budget),
        }


CLASS = {"class_path", "init_args"}


def class_of(value: Any, where: str) -> tuple[str, dict[str, Any]]:
    """The class_path and init_args of a setting that names a class."""
    value = {"class_path": value} if isinstance(value, str) else value
    if not isinstance(value, dict) or not isinstance(value.get("class_path"), str) or set(value) - CLASS:
        raise Mistake(f"{where} must be a class_path, or {{class_path, init_args}}. Got {shown(value)}.")
    arguments = value.get("init_args") or {}
    if not isinstance(arguments, dict):
        raise Mistake(f"{where}.init_args must map names to values. Got {shown(arguments)}.")
    return value["class_path"], arguments


def made(path: str, arguments: dict[str, Any], where: str, base: type, seed: int | None = None) -> Any:
    """An object of Optuna's, seeded where it can be."""
    try:
        cls = find_class(path, [base])
    except Mistake as error:
        known = {c.__name__: c for c in subclasses([base])}
        near = None if "Did you mean" in str(error) else nearest(f"{path}{where}", known)  # TPE, of TPESampler
        raise Mistake(f"{where}.class_path: {error}{did_you_mean(public(known[near]) if near else None)}") from error
    if seed is not None and "seed" in inspect.signature(cls).parameters:
        arguments = {"seed": seed} | arguments
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "is experimental"
        try:
            return cls(**arguments)
        except (TypeError, ValueError, ImportError) as error:
            raise Mistake(f"{where}: {cls.__name__}: {error}.") from error


# ------------------------------------------------------------------------------------------------ reading
def read(path: str, over: Mapping[str, Any] | None = None) -> Sweep:
    """The sweep of a YAML file; `over` replaces some of its keys. Mistake naming the key that is wrong."""
    tree = configs.read_file(path, "study, configs, space, ...").tree
    if "space" not in tree and (of_fit := FIT & set(tree)):
        raise Mistake(f"{path} is a fit's config (it has {min(of_fit)}), not a sweep's, as sweeps/optuna.yaml is.")
    if {"method", "parameters"} <= set(tree):
        raise Mistake(f"{path} is a W&B sweep, not one by Optuna: `wandb sweep {path}`, see docs/wandb.md.")
    with in_file(path):
        return replace(parsed(tree | dict(over or {})), file=path)


@contextmanager
def in_file(path: str) -> Iterator[None]:
    """Have a Mistake say in which file it stands."""
    try:
        yield
    except Mistake as error:
        raise Mistake(f"{path}: {error}") from error


def parsed(tree: dict[str, Any]) -> Sweep:
    """The sweep that a mapping describes."""
    for key in tree:
        if key not in CHECKS:
            raise Mistake(f"unknown key {key!r}.{did_you_mean(nearest(str(key), CHECKS))}")
    for key in ("study", "configs", "space"):
        if key not in tree:
            raise Mistake(f"{key} is missing: expected {CHECKS[key][1]}.")
    for key, value in tree.items():
        holds, wanted = CHECKS[key]
        if not holds(value):
            raise Mistake(f"{key} must be {wanted}. Got {shown(value)}.")
    values = {key: value for key, value in tree.items() if key not in ("objective", "options")}
    if "objective" in tree:
        values["objectives"] = objectives(tree["objective"])
    values["configs"] = tuple(tree["configs"])
    values["options"] = tuple(option(key, value) for key, value in tree.get("options", {}).items())
    values["launcher"] = tuple(str(word) for word in tree.get("launcher", ()))
    sweep = Sweep(**values)
    if sweep.grid and sweep.trials is not None:
        raise Mistake("trials must be left out with sampler: grid, which tries every point once.")
    if not sweep.grid and sweep.trials is None:
        raise Mistake("trials is missing: expected how many trials are to finish.")
    if len(sweep.objectives) > 1 and sweep.pruner is not None:
        raise Mistake("pruner must be null with several objectives: Optuna prunes by one only.")
    if sweep.grace < 2 * sweep.heartbeat:
        raise Mistake(f"grace must be at least twice the heartbeat ({sweep.heartbeat} s). Got {sweep.grace}.")
    sweep.make_sampler(0)
    sweep.make_pruner()
    return sweep


def objectives(value: Any) -> dict[str, str]:
    """name -> direction, of one name or of a mapping."""
    value = {value: "maximize"} if isinstance(value, str) else value
    for name, direction in value.items():
        if not str(name).startswith("val/"):
            raise Mistake(f"objective: {name!r} must be a validation metric. {NO_OBJECTIVE}")
        if direction not in ("maximize", "minimize"):
            raise Mistake(f"objective.{name} must be maximize or minimize. Got {shown(direction)}.")
    return dict(value)


def option(key: str, value: Any) -> str:
    """A setting as an option of the command line. A word like 1e-3, which YAML takes for one, stays as it is."""
    return f"--{key}={value if isinstance(value, str) else json.dumps(value)}"


def is_name(value: Any) -> bool:
    """A word that may be a directory's name."""
    return isinstance(value, str) and re.fullmatch(r"[\w-][\w.-]*", value) is not None


def is_names(value: Any) -> bool:
    """A list of words, not empty."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(v, str) for v in value)


def whole(least: int) -> Callable[[Any], bool]:
    """Whether a value is a whole number, and not less."""
    return lambda v: type(v) is int and v >= least


def is_class(value: Any) -> bool:
    """A class_path by itself or with init_args, or nothing."""
    return value is None or isinstance(value, str | dict)


def is_budget(value: Any) -> bool:
    """{steps: N} or {seconds: S}."""
    return (
        isinstance(value, dict)
        and len(value) == 1
        and set(value) <= {"steps", "seconds"}
        and all(is_number(v) and v > 0 and (name != "steps" or type(v) is int) for name, v in value.items())
    )


def positive(value: Any) -> bool:
    """A number above nought."""
    return is_number(value) and value > 0


CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "study": (is_name, "a name of letters, digits, . _ - that does not begin with a dot"),
    "configs": (is_names, "a list of config files, the base first"),
    "options": (lambda v: isinstance(v, dict) and is_plain(v), "a mapping of dotted keys to plain values"),
    "space": (lambda v: isinstance(v, dict) and len(v) > 0, "a mapping of dotted keys to what is tried"),
    "objective": (lambda v: isinstance(v, str | dict) and len(v) > 0, "a name, or {name: maximize|minimize, ...}"),
    "sampler": (is_class, "grid, or the class_path of an Optuna sampler, or {class_path, init_args}"),
    "pruner": (is_class, "null, the class_path of an Optuna pruner, or {class_path, init_args}"),
    "trials": (whole(1), "a whole number from 1 on"),
    "seeds": (whole(1), "a whole number from 1 on"),
    "budget": (is_budget, "{steps: N} or {seconds: S}"),
    "retries": (whole(0), "a whole number from 0 on"),
    "launcher": (lambda v: isinstance(v, list) and all(type(w) in (str, int) for w in v), "a list of words"),
    "evaluate": (lambda v: isinstance(v, bool), "true or false"),
    "seed": (whole(0), "a whole number from 0 on"),
    "heartbeat": (positive, "a positive number of seconds"),
    "grace": (positive, "a positive number of seconds"),
    "patience": (positive, "a positive number of seconds"),
}

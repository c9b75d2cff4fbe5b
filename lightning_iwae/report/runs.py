"""Runs as they lie on disk: config.yaml, metrics.csv, evaluation.json, figures/*.png, and what of these is missing."""

import csv
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import yaml

from .checkpoints import step_of

FILES = ("config.yaml", "metrics.csv", "evaluation.json")
FIGURES = ("iwae_64", "log_px", "elbo", "kl_q_posterior", "kl_is_64", "ess", "active_units")
CURVES = (
    "val/log_px",
    "val/iwae_64",
    "val/elbo",
    "train/bound_theta",
    "val/kl_q_posterior",
    "val/ess",
    "snr/phi",
    "snr/theta",
    "dsnr/phi",
    "dsnr/theta",
)
FLOORS = ("snr/phi_floor", "snr/theta_floor")  # what pure noise would give
PRESENTATION = ("trainer.logger", "trainer.enable_", "trainer.callbacks.Figures", "ckpt_path", "weights_only")
DAMAGE = (OSError, ValueError, TypeError, yaml.YAMLError, csv.Error, RecursionError)
UNTESTED = "not tested (no evaluation.json): run `test`, or `evaluate: true` in the sweep"
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is ten times as fast


class Estimate(NamedTuple):
    """One figure of evaluation.json: mean over the test data and its standard error, None for a plain number."""

    mean: float
    se: float | None


class Curve(NamedTuple):
    """One column of metrics.csv where it has values: steps in increasing order, (n,), and values, (n,)."""

    steps: np.ndarray
    values: np.ndarray


@dataclass
class Run:
    """What could be read of one run; `problems` says in a sentence each what could not."""

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)  # dotted key -> value, seeds and places apart
    seed: int | None = None
    figures: dict[str, Estimate] = field(default_factory=dict)  # of evaluation.json
    about: dict[str, Any] = field(default_factory=dict)  # data, binarization, particles, version, device, step
    best_step: int | None = None  # of best.ckpt as it is now
    curves: dict[str, Curve] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def untested(self) -> bool:
        """Whether nothing is wrong with it but that."""
        return self.problems == [UNTESTED]

    @property
    def damaged(self) -> bool:
        """Whether anything else is wrong."""
        return bool(self.problems) and not self.untested


# --------------------------------------------------------------------------------------------------- finding
def find(paths: list[Path]) -> list[Path]:
    """Run directories among `paths`, each once; a directory that is no run stands for those directly inside it."""
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"RUN must be a run's directory, or a directory of runs. Got {path}: no such directory.")
        runs = [path] if is_run(path) else sorted((p for p in path.iterdir() if is_run(p)), key=natural)
        if not runs:
            raise ValueError(f"RUN must hold config.yaml, or directories that do. Got {path}, with neither.")
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def is_run(path: Path) -> bool:
    """Whether a directory has any of a run's files, so that one that lost its config.yaml is told of."""
    return path.is_dir() and any((path / name).is_file() for name in FILES)


def natural(path: Path) -> list[tuple[int, str]]:
    """Sorting key that puts digits-2 before digits-10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name)]


# --------------------------------------------------------------------------------------------------- reading
def read(path: Path) -> Run:
    """Everything that the report shows of one run. Never raises for what is missing or damaged."""
    run = Run(path, pictures=sorted((path / "figures").glob("*.png"), key=natural))
    run.best_step = step_of(path / "checkpoints" / "best.ckpt")
    for name, reader in zip(FILES, (_read_config, _read_metrics, _read_evaluation), strict=True):
        try:
            reader(run, path / name)
        except FileNotFoundError:
            run.problems.append(UNTESTED if name == "evaluation.json" else f"{name} is missing")
        except DAMAGE as error:
            run.problems.append(f"{name} is damaged: {' '.join(str(error).split())[:200]}")
    return run


def _read_config(run: Run, path: Path) -> None:
    with open(path, encoding="utf-8") as file:
        config = yaml.load(file, Loader)
    if not isinstance(config, dict) or not config:
        raise ValueError(f"expected keys and values, got {config!r:.50}")
    json.dumps(config, default=str)  # ValueError if it contains itself
    flat = dict(flatten(config))
    seeds = [flat[key] for key in ("seed_everything", "model.seed", "data.seed") if type(flat.get(key)) is int]
    run.seed = seeds[0] if seeds else None
    run.settings = {key: value for key, value in flat.items() if not is_apart(key)}


def is_apart(key: str) -> bool:
    """Keys that say where a run lies, how it is shown, or its seed: not settings that groups differ in."""
    names = key.split(".")
    return key.startswith(PRESENTATION) or names[-1] in {
        "seed_everything",
        "seed",
        "default_root_dir",
        "dirpath",
        "save_dir",
        "folder",
        "download",
        "model_registry",
    }


def flatten(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a config; `class_path` becomes the value at its own key, `init_args` lie below it.

    A list's classes go by their names: trainer.callbacks.Evaluation.particles. Other lists are values.
    """
    if isinstance(node, dict) and "class_path" in node:
        yield key, node["class_path"]
        yield from flatten({**(node.get("init_args") or {}), **(node.get("dict_kwargs") or {})}, key)
    elif isinstance(node, dict):
        for name, value in node.items():
            yield from flatten(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list) and node and all(isinstance(item, dict) for item in node):
        names: list[str] = []
        for item in node:
            name = str(item.get("class_path", "")).rpartition(".")[2]
            names.append(name)
            yield from flatten(item, f"{key}.{name}" + (f"[{names.count(name)}]" if names.count(name) > 1 else ""))
    else:
        yield key, node


def _read_evaluation(run: Run, path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, got {content!r:.50}")
    for name, value in content.items():
        if name not in FIGURES and not (isinstance(value, dict) and "mean" in value):
            run.about[name] = value
            continue
        mean, se = (value.get("mean"), value.get("se")) if isinstance(value, dict) else (value, None)
        if is_finite(mean) and (se is None or is_finite(se)):
            run.figures[name] = Estimate(mean, se)
        else:
            run.problems.append(f"evaluation.json: {name} is not finite: {value!r:.60}")
    run.problems += [f"evaluation.json: {name} is missing" for name in FIGURES if name not in content]
    if run.seed is None and type(content.get("seed")) is int:
        run.seed = content["seed"]


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether it is a number, and a finite one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_metrics(run: Run, path: Path) -> None:
    """Rows are sparse: each column is taken where it has a value. A last line without its end is torn, and left out."""
    content = path.read_bytes().replace(b"\r\n", b"\n")
    head, _, body = content[: content.rfind(b"\n") + 1].partition(b"\n")
    header = next(csv.reader([head.decode(errors="replace")]), [])
    if "step" not in header:
        raise ValueError("no column 'step'")
    if not body:
        raise ValueError("no rows")
    body, starts, ends = fields(body, len(header))

    def numbers(column: int, rows: np.ndarray) -> np.ndarray:
        places = zip(starts[rows, column].tolist(), ends[rows, column].tolist(), strict=True)
        return np.array([float(body[start:end]) for start, end in places])

    for name in [name for name in CURVES + FLOORS if name in header]:
        column = header.index(name)
        rows = np.flatnonzero(ends[:, column] > starts[:, column])
        if len(rows):
            try:
                steps, values = numbers(header.index("step"), rows), numbers(column, rows)
            except ValueError as error:
                raise ValueError(f"column {name}: {error}") from None
            run.curves[name] = _curve(run, name, steps, values)


def fields(body: bytes, width: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    """(lines made equally wide, starts, ends) of the fields in it, (lines, width). Ten times as fast as `csv`.

    A line may be shorter, from before a column came. Numbers are not quoted.
    """
    for _ in range(2):
        codes = np.frombuffer(body, np.uint8)
        ends = np.flatnonzero((codes == ord(",")) | (codes == ord("\n")))
        if len(ends) == width * np.count_nonzero(codes == ord("\n")) and (codes[ends[width - 1 :: width]] == 10).all():
            starts = np.r_[0, ends[:-1] + 1]
            return body, starts.reshape(-1, width), ends.reshape(-1, width)
        body = b"".join(line + b"," * (width - 1 - line.count(b",")) + b"\n" for line in body.splitlines())
    raise ValueError("a line has more fields than the first")


def _curve(run: Run, name: str, steps: np.ndarray, values: np.ndarray) -> Curve:
    good = np.isfinite(steps) & np.isfinite(values)
    if not good.all():
        run.problems.append(f"metrics.csv: {(~good).sum()} of {len(good)} values of {name} are not finite; left out")
    # of a step that was logged twice the later value
    kept, last = np.unique(steps[good][::-1], return_index=True)
    return Curve(kept, values[good][::-1][last])

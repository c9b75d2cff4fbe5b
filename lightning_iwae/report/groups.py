"""Runs with equal settings and different seeds make a group; groups are named by what sets them apart."""

import difflib
import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from .runs import Run

ABSENT = "(absent)"


@dataclass
class Group:
    """Runs that differ in their seeds alone."""

    name: str
    settings: dict[str, Any]  # those that differ between groups
    runs: list[Run]
    repeats: list[Run] = field(default_factory=list)  # of a seed that is there already: counted once

    @property
    def evaluated(self) -> list[Run]:
        """Those of which there are final figures."""
        return [run for run in self.runs if run.figures]


def group(runs: list[Run]) -> list[Group]:
    """Groups in the order of their first runs. Runs without settings belong to none."""
    runs = [run for run in runs if run.settings]
    if not runs:
        return []
    keys = [key for key in dict.fromkeys(k for run in runs for k in run.settings) if differs(key, runs)]
    parts: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        parts[tuple(canonical(run.settings.get(key, ABSENT)) for key in keys)].append(run)
    settings = [{key: part[0].settings.get(key, ABSENT) for key in keys} for part in parts.values()]
    found = [Group("", s, *without_repeats(part)) for s, part in zip(settings, parts.values(), strict=True)]
    for g, name in zip(found, names(found), strict=True):
        g.name = name
    return found


def differs(key: str, runs: list[Run]) -> bool:
    """Whether the runs have more than one value of a setting; one that only some have differs."""
    return len({canonical(run.settings.get(key, ABSENT)) for run in runs}) > 1


def canonical(value: Any) -> str:
    """Equal for equal values, with 1.0 equal to 1."""
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value, default=str)


def without_repeats(runs: list[Run]) -> tuple[list[Run], list[Run]]:
    """(one run of each seed, the others). Finished ones are preferred; runs of unknown seed are all kept."""
    kept: dict[Any, Run] = {}
    for run in sorted(runs, key=lambda run: not run.figures):
        kept.setdefault(id(run) if run.seed is None else f"seed {run.seed}", run)
    chosen = {id(run) for run in kept.values()}
    first = sorted((run for run in runs if id(run) in chosen), key=lambda run: (run.seed is None, run.seed or 0))
    return first, [run for run in runs if id(run) not in chosen]


# ---------------------------------------------------------------------------------------------------- naming
def names(groups: list[Group]) -> list[str]:
    """The users' own names where the directories carry them, otherwise the settings that set the groups apart."""
    chosen = names_of_directories(groups) or names_of_settings(groups)
    counts, seen = Counter(chosen), Counter[str]()
    for i, name in enumerate(chosen):
        seen[name] += 1
        chosen[i] = f"{name} #{seen[name]}" if counts[name] > 1 else name
    return chosen


def names_of_directories(groups: list[Group]) -> list[str] | None:
    """digits-iwae-0, digits-iwae-1, digits-vae-0 -> iwae, vae; None unless they name every group, each its own.

    Numbers alone do not: trial-1, trial-2 are no names.
    """
    stems = [{stem(run) for run in g.runs + g.repeats} for g in groups]
    if any(len(s) != 1 for s in stems) or len(set.union(set(), *stems)) != len(groups):
        return None
    words = [re.split(r"[-_. ]", s.pop()) for s in stems]
    while len(groups) > 1 and len({w[0] for w in words}) == 1 and min(map(len, words)) > 1:
        words = [w[1:] for w in words]
    joined = ["-".join(w) for w in words]
    letters = {re.sub(r"[\W\d_]", "", name) for name in joined}
    return joined if len(letters) == len(groups) and min(map(len, letters)) > 1 else None


def stem(run: Run) -> str:
    """A directory's name without the seed at its end."""
    name = run.path.resolve().name
    match = re.fullmatch(r"(.+?)[-_. ]?(?:seed|s)?[-_=]?(\d+)", name, re.I)
    return match[1].rstrip("-_. ") if match and run.seed is not None and int(match[2]) == run.seed else name


def names_of_settings(groups: list[Group]) -> list[str]:
    """As few settings as tell the groups apart: PIWAE(8, 8), or batch_size=20, or both."""
    if len(groups) == 1:
        return [objective(groups[0].runs[0].settings) or "all runs"]
    labels: list[list[str]] = [[] for _ in groups]
    known = [objective(g.runs[0].settings) for g in groups]
    if len({tuple(side(g.runs[0].settings, name)[0] for name in ("theta", "phi")) for g in groups}) > 1:
        known = [name or both_sides(g.runs[0].settings) for name, g in zip(known, groups, strict=True)]
    if len(set(known)) > 1 and None not in known:
        labels = [[str(name)] for name in known]
    keys = list(groups[0].settings)
    short = shortened(keys)
    for key in sorted(keys, key=lambda key: (key.count("."), keys.index(key))):
        if (parts := len(set(map(tuple, labels)))) == len(groups):
            break
        finer = [[*label, f"{short[key]}={shown(g.settings[key])}"] for label, g in zip(labels, groups, strict=True)]
        if len(set(map(tuple, finer))) > parts:
            labels = finer
    return [", ".join(label) for label in labels]


# phi's estimator beside theta's iwae, on the same particles
OF_IWAE = {
    "stl": "IWAE-STL",
    "dreg": "IWAE-DReG",
    "vimco": "VIMCO",
    "wake": "RWS",
    "rws-dreg": "RWS-DReG",
    "sleep": "wake-sleep",
}


def objective(settings: dict[str, Any]) -> str | None:
    """The objective's name in the literature, by both sides' estimators and particles; None if it has none."""
    samples = settings.get("model.samples")
    sides = [side(settings, name) for name in ("theta", "phi")]
    (theta, k_theta, _), (phi, k_phi, options) = sides
    if type(samples) is not int or any(type(k) is not int or k < 1 or samples % k for k in (k_theta, k_phi)):
        return None
    match theta, phi:
        case "elbo", "elbo":
            return "VAE"
        case "iwae", "iwae" if k_theta == k_phi == samples:
            return "IWAE"
        case "iwae", "iwae" if k_theta == k_phi:
            return f"MIWAE({samples // k_phi}, {k_phi})"
        case "iwae", "iwae" if k_theta == samples:
            return f"PIWAE({samples // k_phi}, {k_phi})"
        case "ciwae", "ciwae" if sides[0] == sides[1] and set(options) == {"beta"} and k_phi == samples:
            return f"CIWAE({options['beta']})"
        case (("vr-iwae" | "tvo"), ("vr-iwae" | "tvo")) if sides[0] == sides[1] and k_phi == samples:
            return f"{theta.upper()}({', '.join(map(shown, options.values()))})"
        case "iwae", str() if k_theta == k_phi == samples and phi in OF_IWAE and not options:
            return OF_IWAE[phi]
    return None


def both_sides(settings: dict[str, Any]) -> str:
    """What an objective without a name is: theta iwae(64), phi wake(64)."""
    sides = {name: side(settings, name) for name in ("theta", "phi")}
    values = {name: [shown(k), *(f"{o}={shown(v)}" for o, v in rest.items())] for name, (_, k, rest) in sides.items()}
    return ", ".join(f"{name} {shown(sides[name][0])}({', '.join(values[name])})" for name in sides)


def side(settings: dict[str, Any], name: str) -> tuple[Any, Any, dict[str, Any]]:
    """(estimator, particles, options that are set) of theta or phi."""
    start = f"model.{name}."
    options = {k.removeprefix(start): v for k, v in settings.items() if k.startswith(start) and v is not None}
    return options.pop("estimator", None), options.pop("particles", None), options


def shortened(keys: list[str]) -> dict[str, str]:
    """Each key's shortest ending that no other key has: model.phi.particles -> phi.particles."""
    endings = {key: [".".join(key.split(".")[-n:]) for n in range(1, key.count(".") + 2)] for key in keys}
    counts = Counter(ending for each in endings.values() for ending in each)
    out = {key: next(e for e in endings[key] if counts[e] == 1 or e == key) for key in keys}
    # particles alone would not say whose
    return {k: ".".join(k.split(".")[-2:]) if re.match(r"model\.(theta|phi)\.\w+$", k) else s for k, s in out.items()}


def shown(value: Any) -> str:
    """A setting's value, short: a class by its own name."""
    if isinstance(value, str):
        return value.rpartition(".")[2] if re.fullmatch(r"([A-Za-z_]\w*\.)+[A-Za-z_]\w*", value) else value
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, default=str, ensure_ascii=False)


def find_reference(groups: list[Group], name: str | None) -> Group:
    """The group of that name, or of the run directory of that name; without one the first."""
    if name is None:
        return groups[0]
    for g in groups:
        if name.lower() == g.name.lower() or name.rstrip("/") in {
            n for r in g.runs for n in (str(r.path), r.path.name)
        }:
            return g
    known = [g.name for g in groups]
    near = difflib.get_close_matches(name, known, 1, 0.5)
    listed = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    raise ValueError(f"--reference must be one of {listed}. Got {name}.{f' Did you mean {near[0]}?' if near else ''}")

"""The report of a study: one HTML page that needs nothing else, and a Markdown table."""

import base64
import io
import os
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import stdev
from typing import Any, NamedTuple

import jinja2
import optuna
from optuna.trial import FrozenTrial, TrialState

from .. import report
from ..writing import replacing
from .settings import Sweep
from .storage import shown
from .study import Study, attempts, has_ended
from .trial import fit_words


class Row(NamedTuple):
    """One trial, as the table has it."""

    slot: int
    outcome: str  # finished, pruned, failed, or open
    values: tuple[float, ...]
    errors: tuple[float | None, ...]  # standard errors over seeds
    point: dict[str, Any]
    seconds: float  # of all attempts whose worker lived to tell
    tries: int
    reasons: list[str]  # of attempts that did not end well
    log: str
    command: str


def write(study: Study, out: Path) -> None:
    """sweep.html and sweep.md in the sweep's directory; says how many trials ended how, and where the files are."""
    sweep = study.sweep
    rows = table(study)
    done = [row for row in rows if row.outcome == "finished"]
    front = best(rows, sweep)
    keys = list(dict.fromkeys(key for row in rows for key in row.point))
    title = f"Study {sweep.study}"
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FileSystemLoader([Path(__file__).parent, Path(report.__file__).parent]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("page.html").render(
        title=title,
        subtitle=subtitle(rows, study),
        storage=shown(study.url),
        objectives=sweep.objectives,
        rows=rows,
        front=front,
        keys=keys,
        pictures=pictures(study, len(done)) if done else [],
        cell=cell,
        setting=setting,
    )
    for name, text in (("sweep.html", html), ("sweep.md", markdown(title, rows, front, keys, study))):
        place = out / f".{os.getpid()}-{name}"  # several workers may be at this point
        with replacing(place) as file:
            file.write(text.encode())
        os.replace(place, out / name)
    print(f"{subtitle(rows, study)}\nSaved as {out / 'sweep.html'} and {out / 'sweep.md'}", flush=True)


def table(study: Study) -> list[Row]:
    """A row for each slot that has been tried."""
    rows = []
    for slot, tried in attempts(study.trials()).items():
        last = tried[-1]
        outcome = "open"
        if has_ended(tried, study.sweep.retries):
            outcome = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned"}.get(last.state, "failed")
        notes = last.user_attrs
        point = notes.get("point", {})
        runs = [str(Path("runs") / name) for name in notes.get("runs", [])]
        words = fit_words(study.sweep, point, 0)
        words = [word for word in words if not word.startswith("--seed_everything")]
        rows.append(
            Row(
                slot,
                outcome,
                tuple(last.values or ()),
                standard_errors(last),
                point,
                sum(t.user_attrs.get("seconds", 0.0) for t in tried),
                len(tried),
                [
                    f"attempt {i}: {t.user_attrs['reason']}"
                    for i, t in enumerate(tried, 1)
                    if t.user_attrs.get("reason")
                ],
                runs[0] if runs else "",
                shlex.join(["python", "-m", "lightning_iwae", *words]),
            )
        )
    return rows


def standard_errors(trial: FrozenTrial) -> tuple[float | None, ...]:
    """Of the mean over seeds, for each objective."""
    by_seed = trial.user_attrs.get("of_seeds", [])
    n = len(by_seed)
    if n < 2:
        return tuple(None for _ in trial.values or ())
    return tuple(stdev(column) / n**0.5 for column in zip(*by_seed, strict=True))


def best(rows: list[Row], sweep: Sweep) -> list[Row]:
    """The best trial; with several objectives those that no other one beats in all (the Pareto front)."""
    done = [
        (row, [s * v for s, v in zip(sweep.signs, row.values, strict=True)])
        for row in rows
        if row.outcome == "finished"
    ]

    def beaten(mine: list[float]) -> bool:
        return any(all(o >= m for o, m in zip(other, mine, strict=True)) and other != mine for _, other in done)

    return [row for row, values in done if not beaten(values)]


def subtitle(rows: list[Row], study: Study) -> str:
    """How many trials ended how."""
    counts = {o: sum(row.outcome == o for row in rows) for o in ("finished", "pruned", "failed", "open")}
    told = ", ".join(f"{n} {o}" for o, n in counts.items() if n)
    again = sum(row.tries - 1 for row in rows)
    return f"{max(study.slots, len(rows))} trials: {told or 'none begun'}; {again or 'none'} begun again"


def setting(value: Any) -> str:
    """A setting in a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def cell(row: Row, i: int) -> str:
    """A value with its standard error."""
    if i >= len(row.values):
        return "\N{EN DASH}"
    text = f"{row.values[i]:.4f}"
    error = row.errors[i] if i < len(row.errors) else None
    return (text if error is None else f"{text} ± {error:.4f}").replace("-", "\N{MINUS SIGN}")


def markdown(title: str, rows: list[Row], front: list[Row], keys: list[str], study: Study) -> str:
    """The same as a table."""
    names = [*study.sweep.objectives, *keys]
    lines = [f"# {title}", "", subtitle(rows, study), ""]
    lines += ["| trial | outcome | " + " | ".join(names) + " | seconds | tries |", "|" + "---|" * (len(names) + 4)]
    for row in rows:
        values = [cell(row, i) for i in range(len(study.sweep.objectives))]
        cells = [str(row.slot), row.outcome, *values, *(setting(row.point.get(key, "")) for key in keys)]
        cells = [cell.replace("|", "\\|") for cell in cells]
        lines.append("| " + " | ".join([*cells, f"{row.seconds:.0f}", str(row.tries)]) + " |")
    lines += ["", "## Best"] if front else []
    for row in front:
        told = ", ".join(f"{name} {cell(row, i)}" for i, name in enumerate(study.sweep.objectives))
        lines += ["", f"Trial {row.slot}: {told}", "", f"    {row.command}"]
    reasons = [f"- trial {row.slot}, {reason}" for row in rows for reason in row.reasons]
    return "\n".join(lines + (["", "## Attempts that did not end well", "", *reasons] if reasons else [])) + "\n"


# ------------------------------------------------------------------------------------------------ pictures
def pictures(study: Study, finished: int) -> list[tuple[str, str, str]]:
    """(title, what it shows, data URI) of Optuna's plots; without those that these trials don't allow."""
    from optuna.visualization import matplotlib as plots

    names = list(study.sweep.objectives)
    optuna_study = optuna.create_study(directions=study.study.directions)  # in memory: it answers
    optuna_study.add_trials([t for t in study.trials() if t.state in (TrialState.COMPLETE, TrialState.PRUNED)])
    single = len(names) == 1
    if single:
        drawn = [
            ("History", "Each trial, and the best so far.", picture(plots.plot_optimization_history, optuna_study))
        ]
    else:
        uri = picture(plots.plot_pareto_front, optuna_study, target_names=names)
        drawn = [("Pareto front", "Trials that no other one beats in all objectives, and the others.", uri)]
    for i, name in enumerate(names if finished > 2 else []):
        asked = {} if single else {"target": values(i), "target_name": name}
        uri = picture(plots.plot_parallel_coordinate, optuna_study, **asked)
        better = "better" if single else "lower"
        drawn.append(
            (f"Parallel coordinates, {name}", f"A line for each finished trial; the darker, the {better}.", uri)
        )
        uri = picture(plots.plot_param_importances, optuna_study, **asked)
        text = "Share of the variance over trials that a random forest lays to each key (fANOVA)."
        drawn.append((f"Importances, {name}", text, uri))
    return [(title, text, uri) for title, text, uri in drawn if uri]


def values(i: int) -> Callable[[FrozenTrial], float]:
    """An objective of a trial."""
    return lambda trial: trial.values[i]


def picture(draw: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """A data URI of what Optuna draws, or nothing if it can't be drawn of these trials."""
    from matplotlib import pyplot, use

    use("agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            axes = draw(*args, **kwargs)
        except (ValueError, RuntimeError):  # one value of each parameter, or of the objective
            return ""
        axes.set_title("")
        axes.figure.set_size_inches(9, 5)
        file = io.BytesIO()
        axes.figure.savefig(file, format="png", dpi=100, bbox_inches="tight")
    pyplot.close(axes.figure)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

"""One worker: takes trials of the study one after the other, runs them, and shows how far the study is."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from ..mistakes import Mistake
from ..mistakes import shown as shown_value
from ..signals import Interrupted, Signals
from .settings import Sweep, in_file
from .space import Space
from .storage import shown
from .study import POLL, Claim, Ended, Study, Taken, attempts, has_ended
from .trial import FOREIGN, Trial, fit_words, holds_run

WIDTH = 16  # of a column of the progress table


class Progress:
    """A line for each trial that ends, of whichever worker, and on a terminal one that is kept up to date."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep, self.shown = sweep, set[int]()
        self.columns: list[str] = []
        self.bar = tqdm(disable=None, bar_format="{n_fmt} of {total_fmt} trials [{elapsed}]{desc}")

    def say(self, text: str) -> None:
        """A line of its own."""
        self.bar.write(text)
        sys.stdout.flush()

    def head(self, study: Study, keys: list[str]) -> None:
        """What the columns are."""
        self.bar.total = study.slots
        self.columns = keys
        names = [*self.sweep.objectives, "seconds", *(short(key) for key in keys)]
        self.say(f"{'trial':>5} {'outcome':9} " + " ".join(f"{name:>{WIDTH}}" for name in names))

    def update(self, study: Study) -> None:
        """Show what has ended since."""
        found = attempts(study.trials())
        for slot, tried in found.items():
            for trial in tried:
                if trial.state.is_finished() and trial.number not in self.shown:
                    self.shown.add(trial.number)
                    self.say(row(slot, trial, self.columns, len(self.sweep.objectives)))
        self.bar.total = max(study.slots, len(found))  # fewer may be asked for than there are
        self.bar.n = sum(has_ended(tried, study.sweep.retries) for tried in found.values())
        told = [f"best {names(self.sweep)} {best}" for best in [best_so_far(found, self.sweep)] if best]
        running = [t for tried in found.values() for t in tried if t.state == TrialState.RUNNING]
        told += [f"trial {t.user_attrs['slot']} {latest(t)}" for t in running]
        self.bar.set_description_str("".join(f"; {part}" for part in told))

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.bar.leave = False
        self.bar.close()


def short(key: str) -> str:
    """A key without what says nothing: `phi.particles` of model.phi.particles."""
    names = [n for n in key.split(".") if n not in ("model", "init_args", "trainer", "data")]
    return ".".join(names[-2:])[-WIDTH:]


def names(sweep: Sweep) -> str:
    """The objectives' names."""
    return ", ".join(sweep.objectives)


def row(slot: int, trial: FrozenTrial, keys: list[str], objectives: int) -> str:
    """One line of the progress table: for a trial without a value, the reason."""
    outcome = trial.user_attrs.get("outcome", "?")
    head = f"{slot:5} {outcome:9} "
    values = list(trial.values or [])
    point = trial.user_attrs.get("point", {})
    if trial.state == TrialState.FAIL:
        return head + trial.user_attrs.get("reason", "")
    cells = [f"{v:.4f}" for v in values] + [""] * (objectives - len(values))
    cells.append(f"{trial.user_attrs.get('seconds', 0):.0f}")
    cells += [brief(point[key]) if key in point else "" for key in keys]
    return head + " ".join(f"{cell:>{WIDTH}}" for cell in cells)


def brief(value: Any) -> str:
    """A value in a column."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)[-WIDTH:]


def latest(trial: FrozenTrial) -> str:
    """How far a running trial is."""
    if not trial.intermediate_values:
        return "begun"
    step, value = max(trial.intermediate_values.items())
    return f"at step {step}: {value:.3f}"


def best_so_far(found: Mapping[int, list[FrozenTrial]], sweep: Sweep) -> str:
    """The best value of the first objective, and whose it is; nothing before there is one."""
    done = [t for tried in found.values() for t in tried if t.state == TrialState.COMPLETE]
    if not done:
        return ""
    best = max(done, key=lambda t: sweep.signs[0] * t.values[0])
    return f"{best.values[0]:.4f} (trial {best.user_attrs['slot']})"


# ------------------------------------------------------------------------------------------------ working
def work(sweep: Sweep, url: str, out: Path) -> Study:
    """Take part in a study until it is over. `Interrupted` if a signal comes: the trial in hand is given back."""
    with Signals(keyboard=True) as signals:
        progress = Progress(sweep)
        try:
            with in_file(sweep.file):
                base = base_settings(sweep)
                space = sweep.space_over(base)
                if sweep.grid:
                    list(space.points(base))  # a Mistake if there is no end of them
            there = sorted(path for path in (out / "runs").glob("*") if holds_run(path))

            def begin() -> None:  # what was there before the study was is another one's
                if there:
                    raise Mistake(FOREIGN.format(there[0]))
                with in_file(sweep.file):
                    rehearse(sweep, space, base)

            study = Study(sweep, url, progress.say, signals, begin)
            study.join(base)
            study.lay_out(space, base)
            progress.say(f"Study {sweep.study} in {shown(url)}, {study.slots} trials. Runs are in {out / 'runs'}")
            progress.head(study, [p.key for p in space.parameters])
            signals.deferred = True
            while not study.is_over():
                claim = study.claim()
                progress.update(study)
                if claim is None:
                    time.sleep(POLL)
                else:
                    attempt(study, claim, space, base, out, signals, progress)
                    progress.update(study)
                if signals.received:
                    raise Interrupted(signals.received, f"stopped. The same command goes on with study {sweep.study}.")
            progress.update(study)
            return study
        finally:
            progress.close()


def attempt(
    study: Study,
    claim: Claim,
    space: Space,
    base: Mapping[str, Any],
    out: Path,
    signals: Signals,
    progress: Progress,
) -> None:
    """Run one attempt at a trial, and tell the study how it ended."""
    trial, shown_at = claim.trial, 0.0

    def look() -> None:
        nonlocal shown_at
        study.beat(trial)
        if not progress.bar.disable and study.answering is not None and time.monotonic() - shown_at > 5:
            shown_at = time.monotonic()
            progress.update(study)

    try:
        study.beat(trial)
        point = study.choose(trial, space, base)
        study.note(trial, "point", point)
        seed = base["seed_everything"]
        ended = Trial(
            *(study.sweep, out, claim.slot, claim.token, point, seed, signals, look),
            on_value=lambda value, step: study.report(trial, value, step),
        ).run()
        study.finish(trial, ended)
    except Mistake:
        with suppress(Taken):
            study.finish(trial, Ended("returned", reason="its worker could not go on"))
        raise
    except Taken:
        progress.say("A trial of this worker has been given to another, since it seemed to be dead.")
    else:
        if "lacking" in ended.notes and not study.has_values():
            raise Mistake(
                f"{study.sweep.file}: {ended.reason} No trial has a value, and no other would: the sweep stops. "
                f"Mend it, and give the study another name than {study.sweep.study}."
            )


# ------------------------------------------------------------------------------------------------ before the first
def base_settings(sweep: Sweep) -> dict[str, Any]:
    """The config's settings by dotted key. Mistake if it is wrong."""
    try:
        text = printed(["fit", *(word for file in sweep.configs for word in ("-c", file)), *sweep.options])
    except Mistake as error:
        raise Mistake(below("options", str(error))) from error
    base = flat(yaml.safe_load(text))
    if type(base["seed_everything"]) is not int:
        raise Mistake(f"seed_everything must be a whole number. Got {shown_value(base['seed_everything'])}.")
    return base


def rehearse(sweep: Sweep, space: Space, base: Mapping[str, Any]) -> None:
    """Have fits made ready, in one process, in which every choice of the space is taken. Mistake if one is refused."""
    points = space.rehearsal(base)
    place = "--trainer.default_root_dir=runs/none"  # else a fresh directory is made, and removed
    told = refused([[*fit_words(sweep, point, 0), place] for point in points])
    if told is not None:
        index, message = told
        at = ", ".join(f"{key}: {shown_value(value)}" for key, value in points[index].items())
        raise Mistake(f"space: {message.replace(COMMAND_LINE, '')} Tried with {at}.")


COMMAND_LINE = " (command line)"  # where a fit finds what stands in the sweep's YAML


def below(key: str, message: str) -> str:
    """A fit's message about what stands below `key` of the sweep's YAML, if it does."""
    return f"{key}: {message.replace(COMMAND_LINE, '')}" if COMMAND_LINE in message else message


def refused(fits: Sequence[Sequence[str]]) -> tuple[int, str] | None:
    """As `rehearsal.refused`, in a process of its own."""
    command = [sys.executable, "-m", "lightning_iwae.sweep.rehearsal"]
    done = subprocess.run(command, input=json.dumps(fits), capture_output=True, text=True)
    if done.returncode:
        raise Mistake(f"space: a fit can't be made ready: {last_error(done.stderr)}")
    told = json.loads(done.stdout.splitlines()[-1])
    return None if told is None else (told[0], told[1])


def printed(words: list[str]) -> str:
    """The whole config that a fit with these arguments would have, as YAML; Mistake with its message if none."""
    command = [sys.executable, "-m", "lightning_iwae", *words, "--print_config"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Mistake(last_error(done.stderr))
    return done.stdout


def last_error(text: str) -> str:
    """The message that a command ended with."""
    lines = text.strip().splitlines() or ["no message"]
    return ([line for line in lines if line.startswith("error:")] or lines)[-1].removeprefix("error: ")


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, lists being values."""
    if not isinstance(node, dict):
        return {prefix: node}
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found

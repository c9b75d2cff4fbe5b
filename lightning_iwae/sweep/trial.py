"""One trial: its fits, each a process of its own that is watched from outside, and how they ended."""

import csv
import ctypes
import fcntl
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..mistakes import Mistake, did_you_mean, nearest
from ..signals import Signals
from ..writing import replacing
from .settings import Sweep, option
from .storage import VARIABLE
from .study import Ended

LOOK = 0.3  # seconds between two looks at a fit
PATIENCE = 180.0  # seconds that a fit has to save and to end when it is asked to
SECRETS = (VARIABLE, "PGPASSWORD", "PGPASSFILE")  # a fit does not talk to the study's storage
OWN = (*SECRETS, "LIGHTNING_IWAE_RUN_DIRECTORY")
STOPPED = {128 + signal.SIGTERM, 128 + signal.SIGUSR1}
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LIBC = ctypes.CDLL(None)


FOREIGN = "--out: {} holds a run that is not of this study. Give another directory, or remove it."
RETURNED = Ended("returned", reason="stopped by a signal; it goes on where it was")


class Stopped(Exception):
    """A signal came before the fit had begun."""


def run_name(slot: int, seed: int | None) -> str:
    """The directory of one fit below runs/."""
    return f"{slot:03}" if seed is None else f"{slot:03}-seed-{seed}"


def fit_words(sweep: Sweep, point: Mapping[str, Any], seed: int) -> list[str]:
    """The arguments of a fit at a point of the space, but its directory. `config` adds an overlay."""
    files = [*sweep.configs, *(v for key, v in point.items() if key == "config" and v is not None)]
    words = ["fit", *(word for file in files for word in ("-c", file))]
    words += [*sweep.options, *(option(key, value) for key, value in point.items() if key != "config")]
    words.append(f"--seed_everything={seed}")
    if "steps" in sweep.budget:
        words.append(f"--trainer.max_steps={sweep.budget['steps']}")
    if "seconds" in sweep.budget:
        words.append(f"--trainer.max_time={days(sweep.budget['seconds'])}")
    return words


def days(seconds: float) -> str:
    """DD:HH:MM:SS, as Lightning wants it."""
    minutes, s = divmod(math.ceil(seconds), 60)
    hours, m = divmod(minutes, 60)
    d, h = divmod(hours, 24)
    return f"{d:02}:{h:02}:{m:02}:{s:02}"


@dataclass
class Metrics:
    """metrics.csv of a run, read as it grows."""

    path: Path
    objectives: Sequence[str]
    signs: Sequence[float]  # 1 to maximize, -1 to minimize
    told: int = -1  # the last step that has been reported
    rest: float = 0.0  # when it is time to read it again: a long file takes time

    def rows(self) -> list[tuple[int, tuple[float, ...]]]:
        """(step, objectives) of every row that has them all. A last line that is being written is left for later."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except OSError:
            return []
        lines = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
        found = []
        for line in lines:
            if all(line.get(name) for name in self.objectives):
                found.append((int(line["step"]), tuple(float(line[name]) for name in self.objectives)))
        return found

    def new(self) -> Iterator[tuple[int, tuple[float, ...]]]:
        """Those not seen before, or nothing if it was read just now."""
        begun = time.monotonic()
        if begun < self.rest:
            return
        rows = self.rows()
        self.rest = begun + max(1.0, 50 * (time.monotonic() - begun))
        for step, values in rows:
            if step > self.told:
                self.told = step
                yield step, values

    def best(self) -> tuple[float, ...] | None:
        """The objectives where the first of them is best, as in best.ckpt; None without a finite value."""
        rows = [values for _, values in self.rows() if all(map(math.isfinite, values))]
        return max(rows, key=lambda values: self.signs[0] * values[0], default=None)

    def lacking(self) -> str:
        """Why there is no row with the objectives: what the file has instead. Nothing if there is such a row."""
        if self.rows():
            return ""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        has = [name for name in next(csv.reader([text.partition("\n")[0]]), []) if name.startswith("val/")]
        if not has:
            return (
                f"objective: {self.path} has no validation. Let the fits be longer (budget), or validate more often "
                "(trainer.check_val_every_n_epoch)."
            )
        missing = [name for name in self.objectives if name not in has] or self.objectives
        near = did_you_mean(nearest(missing[0], has))
        by = "" if "val/log_px" in has else " val/log_px is of lightning_iwae.callbacks.Evaluation."
        return f"objective: no {' and '.join(missing)} in {self.path}, which has {', '.join(has)}.{near}{by}"


@dataclass
class Trial:
    """The fits of one attempt at a trial, in the sweep's directory.

    Args:
        sweep: what is tried.
        out: the sweep's directory.
        slot: the trial's number.
        token: which study's it is.
        point: key -> value.
        seed: of the first fit; each further one has the next.
        signals: what may ask the worker to stop.
        on_look: called all the time while a fit runs.
        on_value: called with (objective, step) of the first fit's validations; whether to prune.
    """

    sweep: Sweep
    out: Path
    slot: int
    token: str
    point: Mapping[str, Any]
    seed: int
    signals: Signals
    on_look: Callable[[], None]
    on_value: Callable[[float, int], bool]
    values: list[tuple[float, ...]] = field(default_factory=list)  # of the fits so far

    @property
    def runs(self) -> list[Path]:
        """The directories of the fits."""
        seeds = range(self.seed, self.seed + self.sweep.seeds)
        return [self.out / "runs" / run_name(self.slot, s if self.sweep.seeds > 1 else None) for s in seeds]

    def run(self) -> Ended:
        """Fit with every seed, and say how it went."""
        begun = time.monotonic()
        for i, path in enumerate(self.runs):
            try:
                ended = self._fit(i, path)
            except Stopped:
                ended = RETURNED
            except OSError as error:  # a full disk, or one that is gone
                ended = Ended("broken", reason=f"{path}: {error}")
            if ended.outcome != "finished":
                break
            self.values.append(ended.values)
        if ended.outcome == "finished":
            means = tuple(sum(column) / len(column) for column in zip(*self.values, strict=True))
            ended = Ended("finished", means)
        notes = {"seconds": round(time.monotonic() - begun, 1), "runs": [path.name for path in self.runs]}
        return Ended(ended.outcome, ended.values, ended.reason, {**ended.notes, **notes, "of_seeds": self.values})

    def _fit(self, index: int, path: Path) -> Ended:
        metrics = Metrics(
            path / "metrics.csv",
            list(self.sweep.objectives),
            self.sweep.signs,
        )
        words = fit_words(self.sweep, self.point, self.seed + index)
        place = [f"--trainer.default_root_dir={path}"]
        with one_at_a_time(path, self._wait) as lock:
            self._mark(path)
            reporting = index == 0 and len(metrics.objectives) == 1  # Optuna prunes by one objective
            command = [*words, *place, "--ckpt_path=last"]
            status, pruned = self._process(command, path, lock, metrics, reporting)
            if pruned:
                return Ended("pruned", metrics.best() or ())
            if status == 0 and self.sweep.evaluate and self.signals.received == 0 and metrics.rows():
                test = ["test", *words[1:], *place, "--ckpt_path=best"]
                status, _ = self._process(test, path, lock, metrics, False)
        if status in STOPPED:
            self._look()  # a signal to both may reach the fit first
        if self.signals.received:
            return RETURNED
        if status:
            return Ended(*verdict(status, path / "log.txt"))
        if lacking := metrics.lacking():
            return Ended("failed", reason=lacking, notes={"lacking": True})
        best = metrics.best()
        if best is None:
            return Ended("failed", reason=f"{metrics.path} has no finite {' and '.join(self.sweep.objectives)}.")
        return Ended("finished", best)

    def _mark(self, path: Path) -> None:
        """Write whose run it is. Mistake if there is another study's, whose figures would be taken for this one's."""
        mark = path / "trial.json"
        if holds_run(path) and (not mark.exists() or json.loads(mark.read_text())["token"] != self.token):
            raise Mistake(FOREIGN.format(path))
        with replacing(mark) as file:
            file.write(json.dumps({"token": self.token, "trial": self.slot, "point": self.point}).encode())

    def _wait(self) -> None:
        self._look()
        if self.signals.received:
            raise Stopped

    def _look(self) -> None:
        self.on_look()
        time.sleep(LOOK)

    def _process(self, words: list[str], path: Path, lock: int, metrics: Metrics, reporting: bool) -> tuple[int, bool]:
        """(exit status, whether it was pruned) of one command, whose output goes to log.txt."""
        path.mkdir(parents=True, exist_ok=True)
        command = [*self.sweep.launcher, sys.executable, "-m", "lightning_iwae", *words]
        environment = {key: value for key, value in os.environ.items() if key not in OWN}
        pruned = asked = False
        with open(path / "log.txt", "ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                pass_fds=(lock,),
                preexec_fn=die_with_parent,
            )
        try:
            while process.poll() is None:
                self._look()
                for step, values in metrics.new() if reporting and not pruned else ():
                    pruned = pruned or self.on_value(values[0], step)
                if (pruned or self.signals.received) and not asked:
                    asked_by = self.signals.received
                    process.send_signal(asked_by if asked_by == signal.SIGUSR1 else signal.SIGTERM)
                    asked, deadline = True, time.monotonic() + PATIENCE
                if asked and time.monotonic() > deadline:
                    break
        finally:
            kill(process)
        return process.returncode, pruned


def holds_run(path: Path) -> bool:
    """Whether a directory has been given to a fit."""
    return (path / "trial.json").exists() or (path / "metrics.csv").exists()


def die_with_parent() -> None:
    """Between fork and exec of a fit: have the system kill it when its worker dies, by a kill -9 too."""
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a fit and all processes of its session, if they have not ended."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def one_at_a_time(path: Path, wait: Callable[[], None]) -> Iterator[int]:
    """Hold the lock of a run's directory, which its fit inherits; `wait` is called as long as another fit has it.

    That other one may be of a worker that was cut off from the study, and believed to be dead.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / f".{path.name}.lock", "ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                wait()
            except OSError:  # a file system without locks
                break
        yield file.fileno()


def verdict(status: int, log: Path) -> tuple[str, tuple[float, ...], str]:
    """(outcome, no values, reason) of a fit that did not end well.

    A mistake in the settings, or a gradient that is not finite, comes again: such a trial has failed. Any other end
    may have come from outside (memory, disk, a process of DDP that was lost), and the trial is begun again.
    """
    last = last_words(log)
    if status < 0:
        name = signal.Signals(-status).name
        out_of_memory = "; out of memory?" if -status == signal.SIGKILL else ""
        return "broken", (), f"killed by {name}{out_of_memory}"
    reason = f"exit status {status}: {last.removeprefix('error: ') or 'no message'}"
    return "failed" if status == 2 or "is not finite" in last else "broken", (), reason


def last_words(log: Path) -> str:
    """The message that a log's last command ends with: the line of an error, or the last one."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        lines = re.split(r"[\r\n]+", file.read().decode(errors="replace"))
    last = max((i for i, line in enumerate(lines) if line.startswith("$ ")), default=-1)
    lines = [line.strip() for line in lines[last + 1 :] if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or [""])[-1][:500]

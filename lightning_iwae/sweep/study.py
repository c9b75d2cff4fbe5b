"""A study that several workers share: every trial is tried until it ends, and counts once, whoever dies when.

A study has as many *slots* as trials are wanted. A slot's trial is *attempted* until one attempt is finished or pruned,
or failed for good. All that is needed for this is in the storage, and every step can be done twice, or by two workers
at once: of attempts with equal slot and number the earliest in the storage is the one, and only one worker can take it.
"""

import json
import math
import os
import socket
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, NoReturn

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from ..mistakes import Mistake
from ..mistakes import shown as shown_value
from ..signals import Signals
from . import storage
from .settings import Sweep
from .space import Space
from .storage import Unanswered, heard, patient

LOST = "its worker gave no sign of life for {:.0f} s: killed, or cut off"
POLL = 1.0  # seconds between two looks at a study in which others work


class Taken(Exception):
    """The trial is no longer this worker's: it was silent for too long, and the trial was given to another."""


class Next(NamedTuple):
    """An attempt that should be in the study."""

    slot: int
    attempt: int
    params: dict[str, Any] | None  # None: the sampler's, or the grid's
    token: str  # of the slot: tells its run from one of another study in the same directory


class Claim(NamedTuple):
    """An attempt that this worker has taken."""

    trial: optuna.Trial
    slot: int
    token: str


class Ended(NamedTuple):
    """How an attempt ended."""

    outcome: str  # finished, pruned, failed (not tried again), broken (tried again), lost, returned, surplus
    values: tuple[float, ...] = ()
    reason: str = ""
    notes: Mapping[str, Any] = {}


def attempts(trials: Sequence[FrozenTrial]) -> dict[int, list[FrozenTrial]]:
    """slot -> its attempts in order, the earliest trial of each number; what others put into the study is left out."""
    found: dict[int, dict[int, FrozenTrial]] = defaultdict(dict)
    for trial in sorted(trials, key=lambda t: t.number):
        if "slot" in trial.user_attrs:
            found[trial.user_attrs["slot"]].setdefault(trial.user_attrs["attempt"], trial)
    return {slot: [by_number[a] for a in sorted(by_number)] for slot, by_number in sorted(found.items())}


def has_ended(tried: Sequence[FrozenTrial], retries: int) -> bool:
    """Whether a slot's trial is finished, pruned, or given up."""
    last = tried[-1]
    if not last.state.is_finished():
        return False
    if last.state in (TrialState.COMPLETE, TrialState.PRUNED) or last.user_attrs.get("outcome") == "failed":
        return True
    return sum(t.user_attrs.get("outcome") in ("broken", "lost") for t in tried) > retries


def interrupted(tried: Sequence[FrozenTrial]) -> bool:
    """Whether a slot's last attempt that is over was given back or lost, and is the first to go on with."""
    over = [t for t in tried if t.state.is_finished()]
    return bool(over) and over[-1].user_attrs.get("outcome") in ("returned", "lost")


def missing(trials: Sequence[FrozenTrial], slots: int, retries: int) -> list[Next]:
    """The attempts that are to be put into the study: first ones, and next ones of trials that are not over."""
    found = attempts(trials)
    first = [Next(slot, 0, None, uuid.uuid4().hex) for slot in range(slots) if slot not in found]
    again = [
        Next(slot, len(tried), dict(tried[-1].params), tried[0].user_attrs["token"])
        for slot, tried in found.items()
        if tried[-1].state.is_finished() and not has_ended(tried, retries)
    ]
    return first + again


@contextmanager
def ours() -> Iterator[None]:
    """Taken where Optuna says that the trial has ended, which only another worker can have seen to."""
    try:
        yield
    except UpdateFinishedTrialError:
        raise Taken from None


def differing(a: Any, b: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, one value, the other) wherever two settings differ; ABSENT for what only one of them has."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in [*a, *(name for name in b if name not in a)]:
            yield from differing(a.get(name, ABSENT), b.get(name, ABSENT), f"{key}.{name}" if key else name)
    elif json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True):
        yield key, a, b


def distinct(a: Any, b: Any) -> tuple[str, str]:
    """Two different values as they stand in a message; in full where a short form would be the same of both."""
    one, other = (str(v) if v == ABSENT else shown_value(v) for v in (a, b))
    return (one, other) if one != other else (json.dumps(a), json.dumps(b))


ABSENT = "left out"
NEVER_BEGUN = Ended("returned", reason="taken by a worker that died before it began")
SURPLUS = Ended("surplus", reason="another worker put the same attempt into the study just before")


class Study:
    """A worker's side of a study.

    Args:
        sweep: what is tried.
        url: of the storage.
        say: where to tell that the storage does not answer.
        signals: that may come while it does not.
        begin: called before a study is made, or joined that has no trials.
    """

    def __init__(
        self,
        sweep: Sweep,
        url: str,
        say: Callable[[str], None],
        signals: Signals | None = None,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self.sweep, self.url, self.say, self.signals = sweep, url, say, signals or Signals()
        self.begin = begin
        self.patience = sweep.patience
        self.answering: float | None = time.monotonic()  # since when the storage has; None: it does not
        self.worker = f"{socket.gethostname()}:{os.getpid()}"
        self.grid: list[dict[str, Any]] = []  # the study's parameters of each point
        self.slots = sweep.trials or 0
        self._seen: dict[int, tuple[Any, float]] = {}  # trial -> its sign of life, and since when we know it
        self._beaten = 0.0
        self.study = self._open()

    @patient
    def _open(self) -> optuna.Study:
        pruner = self.sweep.make_pruner()
        return storage.open_study(self.url, self.sweep.study, self._directions(), pruner, self.begin)

    def answered(self, does: bool, told: str = "") -> None:
        """Note that the storage answers, or that it does not, and say so when it changes."""
        if does and self.answering is None:
            self.answering = time.monotonic()
            self.say("The storage answers again.")
        elif not does and self.answering is not None:
            self.answering = None
            self.say(f"The storage does not answer, and is asked again: {told}")

    @patient
    def join(self, config: Mapping[str, Any]) -> None:
        """Agree with the others on what is tried, `config` being the settings below it. Mistake where they differ."""
        mine = {"sweep": self.sweep.identity(), "config": dict(config)}
        theirs = self.study.user_attrs
        directions = [d.name.lower() for d in self.study.directions]
        if directions != self._directions():
            self._refuse("objective: its direction", ", ".join(directions), ", ".join(self._directions()))
        for part, keys in mine.items():
            if part not in theirs:
                self.study.set_user_attr(part, keys)
                continue
            for key, a, b in differing(theirs[part], json.loads(json.dumps(keys))):
                self._refuse(f"{part}: {key}", *distinct(a, b))

    def _refuse(self, key: str, theirs: str, mine: str) -> NoReturn:
        raise Mistake(
            f"{key} must be {theirs}, as when study {self.sweep.study} was begun. "
            f"Got {mine}. Give the study another name, or take back the change."
        )

    def _directions(self) -> list[str]:
        return list(self.sweep.objectives.values())

    def lay_out(self, space: Space, base: Mapping[str, Any]) -> None:
        """Number the points of a grid."""
        if self.sweep.grid:
            self.grid = [names for _, names in space.points(base)]
            self.slots = len(self.grid)

    # -------------------------------------------------------------------------------------------- reading
    @patient
    def trials(self) -> list[FrozenTrial]:
        """All of the study's."""
        return self.study.get_trials(deepcopy=False)

    def has_values(self) -> bool:
        """Whether any trial has told a value, be it on the way."""
        return any(t.values or t.intermediate_values for t in self.trials())

    def is_over(self) -> bool:
        """Whether every slot's trial is."""
        found = attempts(self.trials())
        return len(found) >= self.slots and all(
            has_ended(found[slot], self.sweep.retries) for slot in range(self.slots)
        )

    # -------------------------------------------------------------------------------------------- taking
    def claim(self) -> Claim | None:
        """A trial to work on; None if there is none just now, since others are at work on the last ones."""
        self._bury()
        self._fill()
        return self._take()

    def _bury(self) -> None:
        """Fail the trials of workers that are silent. No clock but this worker's is asked."""
        for trial in self.trials():
            if trial.state != TrialState.RUNNING or "slot" not in trial.user_attrs:
                continue
            sign = trial.user_attrs.get("sign")
            before, since = self._seen.get(trial.number, (None, None))
            if since is None or before != sign:
                self._seen[trial.number] = (sign, time.monotonic())
            elif time.monotonic() - max(since, self.answering or math.inf) > self.sweep.grace:
                begun = Ended("lost", reason=LOST.format(self.sweep.grace))
                with suppress(Taken):  # it has just ended
                    self._end(trial._trial_id, begun if sign else NEVER_BEGUN)

    @patient
    def _fill(self) -> None:
        for new in missing(self.trials(), self.slots, self.sweep.retries):
            params = new.params or (self.grid[new.slot] if self.grid else {})
            attributes = {"slot": new.slot, "attempt": new.attempt, "token": new.token}
            self.study.enqueue_trial(params, user_attrs=attributes)

    @patient
    def _take(self) -> Claim | None:
        trials = self.trials()
        chosen = {t.number for tried in attempts(trials).values() for t in tried}
        ours = [t for t in trials if t.user_attrs.get("slot", self.slots) < self.slots]
        stopped = [slot for slot, tried in attempts(trials).items() if interrupted(tried)]
        waiting_ones = [t for t in ours if t.state == TrialState.WAITING]
        for waiting in sorted(waiting_ones, key=lambda t: t.user_attrs["slot"] not in stopped):  # else as they came
            try:
                if waiting.number not in chosen:
                    self._end(waiting._trial_id, SURPLUS)
                elif self._storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING):
                    self._storage.set_trial_user_attr(waiting._trial_id, "worker", self.worker)
                    self._beaten = -math.inf
                    seed = self.sweep.seed + 1000 * waiting.user_attrs["slot"] + waiting.user_attrs["attempt"]
                    self.study.sampler = self.sweep.make_sampler(seed)
                    return Claim(
                        optuna.Trial(self.study, waiting._trial_id),
                        waiting.user_attrs["slot"],
                        attempts(trials)[waiting.user_attrs["slot"]][0].user_attrs["token"],
                    )
            except (UpdateFinishedTrialError, Taken):
                continue
        return None

    @property
    def _storage(self) -> optuna.storages.BaseStorage:
        return self.study._storage

    # -------------------------------------------------------------------------------------------- working
    @patient
    def choose(self, trial: optuna.Trial, space: Space, base: Mapping[str, Any]) -> dict[str, Any]:
        """The trial's point. What has been suggested once stays. Mistake if the sampler can't take the space."""
        with ours():
            try:
                return space.suggest(trial, base)
            except (ValueError, TypeError, AttributeError, ImportError) as error:
                raise Mistake(f"sampler: {type(self.study.sampler).__name__}: {error}") from error

    @patient
    def note(self, trial: optuna.Trial, key: str, value: Any) -> None:
        """Write something beside the trial."""
        with ours():
            trial.set_user_attr(key, value)

    def beat(self, trial: optuna.Trial) -> None:
        """Give a sign of life, if it is time; later if the storage does not answer. Taken if it is another's by now."""
        if time.monotonic() - self._beaten > self.sweep.heartbeat:
            self._beaten = time.monotonic()
            with ours(), self._if_it_answers():
                trial.set_user_attr("sign", f"{self.worker} {time.time():.0f}")

    def report(self, trial: optuna.Trial, value: float, step: int) -> bool:
        """Tell an intermediate value of the objective; whether the trial should be pruned."""
        with ours(), self._if_it_answers():
            trial.report(value, step)
            return trial.should_prune()
        return False

    @contextmanager
    def _if_it_answers(self) -> Iterator[None]:
        try:
            with heard(self.url):
                yield
            self.answered(True)
        except Unanswered as error:
            self.answered(False, str(error))

    def finish(self, trial: optuna.Trial, ended: Ended) -> None:
        """Tell how the trial ended. Taken if it has been given to another, and does not count."""
        self._end(trial._trial_id, ended)

    @patient
    def _end(self, trial_id: int, ended: Ended) -> None:
        states = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
        state = states.get(ended.outcome, TrialState.FAIL)
        try:
            for key, value in {"outcome": ended.outcome, "reason": ended.reason, **ended.notes}.items():
                self._storage.set_trial_user_attr(trial_id, key, value)
            self._storage.set_trial_state_values(trial_id, state, ended.values or None)
        except UpdateFinishedTrialError:
            if self._storage.get_trial(trial_id).state != state:
                raise Taken from None  # else the storage did it the first time, and only its answer was lost

"""SIGTERM and SIGUSR1, by which clusters announce that a run's time is over."""

import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(BaseException):
    """A signal stopped the run: an exit with `status`, 128 + the signal's number, not a failure."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(f"{signal.Signals(signum).name}: {message}")
        self.signal = signum
        self.status = 128 + signum


class Signals:
    """Handlers of SIGTERM and SIGUSR1 for as long as the `with` lasts.

    The first signal raises `Interrupted` on the spot, which is right as long as there is nothing to lose. While
    `deferred` is true its number is left in `received` instead, for whoever can finish a step and save first.
    A second SIGTERM kills at once.
    """

    def __init__(self) -> None:
        self.received = 0
        self.deferred = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGUSR1):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGTERM:
            signal.signal(signum, signal.SIG_DFL)
        if self.received:
            return
        self.received = signum
        if not self.deferred:
            raise Interrupted(signum, "stopped before the first step.")

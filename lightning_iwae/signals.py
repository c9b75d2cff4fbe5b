"""SIGTERM and SIGUSR1, by which clusters announce that a run's time is over."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

ECHO = 5.0  # seconds within which a second SIGTERM is the first one's


class Interrupted(BaseException):
    """A signal stopped the run: an exit with `status`, 128 + the signal's number, not a failure."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(f"{signal.Signals(signum).name}: {message}")
        self.signal = signum
        self.status = 128 + signum


class Signals:
    """Handlers of SIGTERM and SIGUSR1, and with `keyboard` of Ctrl-C, for as long as the `with` lasts.

    The first signal raises `Interrupted` on the spot, which is right as long as there is nothing to lose. While
    `deferred` is true its number is left in `received` instead, for whoever can finish a step and save first.
    A second SIGTERM kills at once, unless it comes within seconds: clusters signal a process and the one that started
    it, which hands it on.
    """

    def __init__(self, keyboard: bool = False) -> None:
        self.signals = (signal.SIGTERM, signal.SIGUSR1, *([signal.SIGINT] if keyboard else []))
        self.received = 0
        self.deferred = False
        self._terminated: float | None = None  # when the first SIGTERM came
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for signum in self.signals:
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGTERM:
            if self._terminated is not None and time.monotonic() - self._terminated > ECHO:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            self._terminated = self._terminated or time.monotonic()
        if signum == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        if self.received:
            return
        self.received = signum
        if not self.deferred:
            raise Interrupted(signum, "stopped before the first step.")
